"""What a model folder holds is told without loading it, and every way in which it can be wrong is named."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from model.config import Partition
from model.loading.card import SHIPPED
from model.loading.inspect import BadCheckpoint, Stored, check_folder, read_header
from model.loading.load import load_dit, load_text, load_vae
from model.parallel.memory import (
    NotEnoughMemory,
    _left_to,
    check_memory,
    free_bytes,
    rank_bytes,
    text_bytes,
    vae_bytes,
    what_fits,
)
from model.parallel.partition import parameter_bytes
from tests.tiny import tiny_model, tiny_wan

ROOT = Path(__file__).parents[2]
WEIGHTS = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan(tmp_path_factory.mktemp("wan") / "a14b", "2.2-a14b")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "tiny"))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(BadCheckpoint, match=message) as caught:
        check_folder(folder)
    assert "\n" not in str(caught.value)


def changed(file: Path, **values: Any) -> None:
    """Sets keys of a JSON file; those set to `...` are removed."""
    kept = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in kept.items() if value is not ...}))


def divided(folder: Path, part: str) -> None:
    """Splits a part's weights into two files and an index, as large releases come."""
    file = folder / WEIGHTS[part]
    tensors, places = load_file(file), dict[str, str]()
    for k in range(2):
        name = f"{file.stem}-{k + 1:05d}-of-00002.safetensors"
        half = {tensor: tensors[tensor] for tensor in sorted(tensors)[k::2]}
        save_file(half, file.parent / name)
        places |= dict.fromkeys(half, name)
    file.unlink()
    file.with_name(f"{file.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


# --- good folders -----------------------------------------------------------------------------------------------------


def test_mini_is_whole_and_can_be_told_without_tensors() -> None:
    mini = SHIPPED / "mini"
    checked = check_folder(mini)
    assert checked.boundary is None and set(checked.parts) == {"transformer", "vae", "text_encoder"}
    assert checked.parameters == sum(p.numel() for p in load_dit(mini, torch.float32).parameters())
    assert checked.bytes == sum((mini / name).stat().st_size for name in WEIGHTS.values())


def test_importing_it_loads_no_torch() -> None:
    heavy = {"torch", "safetensors", "prefect"}
    code = f"import sys, model.loading.inspect, flows.library.models; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("release", ["2.1", "2.2-ti2v"])
def test_what_diffusers_saves_is_whole(release: str, tmp_path: Path) -> None:
    checked = check_folder(tiny_wan(tmp_path / "wan", release))
    assert checked.boundary is None and checked.parts["vae"].kind == "AutoencoderKLWan"


def test_two_experts_are_whole(experts: Path) -> None:
    checked = check_folder(experts)
    assert checked.boundary == 0.875
    assert checked.parameters == 2 * checked.parts["transformer"].parameters


@pytest.mark.parametrize("part", WEIGHTS)
def test_several_files_are_as_good_as_one(part: str, folder: Path) -> None:
    one = check_folder(folder).parts[part]
    divided(folder, part)
    several = check_folder(folder).parts[part]
    assert len(several.files) == 2 and several.tensors == one.tensors


# --- bad folders ------------------------------------------------------------------------------------------------------

BREAKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no index": (lambda f: (f / "model_index.json").unlink(), r"model_index\.json is missing: name a folder in the"),
    "no JSON": (lambda f: (f / "model_index.json").write_text("{"), r"model_index\.json is not JSON"),
    "a list": (lambda f: (f / "vae/config.json").write_text("[]"), r"vae/config\.json must hold a JSON object"),
    "no folder": (
        lambda f: shutil.rmtree(f / "scheduler"),
        r"model_index\.json names the folder scheduler, which is not",
    ),
    "outside": (
        lambda f: changed(f / "model_index.json", **{"../tiny": ["a", "B"]}),
        r"names the folder \.\./tiny, which is not there",
    ),
    "no vae": (lambda f: changed(f / "model_index.json", vae=[None, None]), r"model_index\.json names no vae"),
    "no tokens": (
        lambda f: (f / "tokenizer/tokenizer.json").unlink(),
        r"tokenizer has neither tokenizer\.json nor spiece\.model",
    ),
    "empty": (lambda f: (f / "tokenizer/merges.txt").write_text(""), r"tokenizer/merges\.txt is empty: fetch it again"),
    "no config": (lambda f: (f / "transformer/config.json").unlink(), r"transformer/config\.json is missing"),
    "another transformer": (
        lambda f: changed(f / "transformer/config.json", _class_name="WanVACETransformer3DModel"),
        r"transformer/config\.json calls for WanVACETransformer3DModel, .*: transformer must be WanTransformer3DModel",
    ),
    "another autoencoder": (
        lambda f: changed(f / "vae/config.json", _class_name="AutoencoderKL"),
        r"vae must be AutoencoderKLWan or CausalVideoVAE",
    ),
    "another text encoder": (
        lambda f: changed(f / "text_encoder/config.json", architectures=["T5EncoderModel"]),
        r"text_encoder/config\.json calls for T5EncoderModel, .*: text_encoder must be UMT5EncoderModel",
    ),
    "image to video": (
        lambda f: changed(f / "transformer/config.json", image_dim=1280),
        r"image_dim=1280 is not support",
    ),
    "image to video, 2.2": (
        lambda f: changed(f / "transformer/config.json", in_channels=36),
        r"takes 36 channels and gives 16, the autoencoder has 16",
    ),
    "another width of text": (
        lambda f: changed(f / "transformer/config.json", text_dim=32),
        r"the text encoder gives 16 channels, the transformer takes 32",
    ),
    "no layers": (
        lambda f: changed(f / "transformer/config.json", num_layers=...),
        r"transformer/config\.json lacks 'num_layers'",
    ),
    "half a layer": (
        lambda f: changed(f / "transformer/config.json", num_layers=1.5),
        r"transformer/config\.json cannot be used: sizes must be whole numbers",
    ),
    "no d_ff": (lambda f: changed(f / "text_encoder/config.json", d_ff=...), r"text_encoder/config\.json lacks 'd_ff'"),
    "a layer missing": (
        lambda f: changed(f / "transformer/config.json", num_layers=3),
        r"the weights lack blocks\.2\.\S+ and \d+ more, which config\.json asks for",
    ),
    "a layer too much": (
        lambda f: changed(f / "transformer/config.json", num_layers=1),
        r"the weights hold blocks\.1\.\S+ and \d+ more, which config\.json has no place for",
    ),
    "another shape": (
        lambda f: changed(f / "transformer/config.json", ffn_dim=128),
        r"blocks\.0\.ffn\.net\.0\.proj\.weight is \(96, 48\), config\.json asks for \(128, 48\)",
    ),
    "another autoencoder's shape": (
        lambda f: changed(f / "vae/config.json", channels=[8, 8, 16]),
        r"vae: \S+ is \(.*\), config\.json asks for \(",
    ),
    "half a text encoder": (
        lambda f: changed(f / "text_encoder/config.json", num_layers=2),
        r"text_encoder: the weights lack encoder\.block\.1\.",
    ),
    "an expert without a time": (
        lambda f: (
            shutil.copytree(f / "transformer", f / "transformer_2"),
            changed(f / "model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"]),
        ),
        r"model_index\.json names transformer_2 and no boundary_ratio: set it to",
    ),
    "a time without an expert": (
        lambda f: changed(f / "model_index.json", boundary_ratio=0.875, transformer_2=[None, None]),
        r"model_index\.json has boundary_ratio=0\.875 and no transformer_2",
    ),
    "an expert without a name": (
        lambda f: shutil.copytree(f / "transformer", f / "transformer_2"),
        r"transformer_2 is there, but model_index\.json does not name it",
    ),
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_folder_is_refused_in_one_sentence(what: str, folder: Path) -> None:
    breaks, message = BREAKS[what]
    breaks(folder)
    refused(folder, message)


@pytest.mark.parametrize("boundary", [0, 1, "half"])
def test_a_time_that_is_none_is_refused(boundary: object, experts: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(experts, tmp_path / "wan"))
    changed(folder / "model_index.json", boundary_ratio=boundary)
    refused(folder, rf"boundary_ratio={re.escape(repr(boundary))} must be a number between 0 and 1")


def test_two_experts_of_different_shapes_are_refused(experts: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(experts, tmp_path / "wan"))
    changed(folder / "transformer_2/config.json", ffn_dim=128)
    refused(folder, "transformer and transformer_2 differ in their config.json")


def test_a_lacking_tensor_of_diffusers_autoencoder_is_named(experts: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(experts, tmp_path / "wan"))
    tensors = load_file(folder / WEIGHTS["vae"])
    del tensors["post_quant_conv.bias"]
    save_file(tensors, folder / WEIGHTS["vae"])
    refused(folder, r"vae: the weights lack post_quant_conv\.bias, which config\.json asks for")


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("ending", [".bin", ".pt", ".ckpt"])
def test_pickles_are_never_opened(part: str, ending: str, folder: Path) -> None:
    file = folder / WEIGHTS[part]
    file.rename(file.with_suffix(ending))
    refused(folder, rf"{part} has its weights as a pickle only \({file.stem}{ending}\).*convert it to safetensors")


def test_other_weights_are_not_taken_for_these(folder: Path) -> None:
    file = folder / WEIGHTS["transformer"]
    file.rename(file.with_suffix(".fp16.safetensors"))
    refused(
        folder, r"has diffusion_pytorch_model\.fp16\.safetensors, but neither diffusion_pytorch_model\.safetensors nor"
    )
    (file.with_suffix(".fp16.safetensors")).unlink()
    refused(folder, r"transformer has no weights: neither")


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_missing_file_of_several_is_named(part: str, folder: Path) -> None:
    divided(folder, part)
    lost = sorted((folder / part).glob("*.safetensors"))[1]
    lost.unlink()
    refused(folder, rf"{lost.name} is missing, \S+\.index\.json names it: fetch that file")


@pytest.mark.parametrize("name", ["../vae/diffusion_pytorch_model.safetensors", "weights.bin"])
def test_an_index_that_leads_elsewhere_is_refused(name: str, folder: Path) -> None:
    divided(folder, "transformer")
    (index,) = (folder / "transformer").glob("*.index.json")
    places = json.loads(index.read_text())["weight_map"]
    changed(index, weight_map=places | {"proj_out.bias": name})
    refused(folder, "which is no safetensors file of that folder")
    changed(index, weight_map=places | {"proj_out.more": next(iter(places.values()))})
    refused(folder, r"has no proj_out\.more, which \S+ says it has")
    changed(index, weight_map=...)
    refused(folder, "has no weight_map")


def test_quantised_weights_are_refused(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS["transformer"])
    tensors["proj_out.weight"] = tensors["proj_out.weight"].to(torch.int8)
    save_file(tensors, folder / WEIGHTS["transformer"])
    refused(folder, r"proj_out\.weight is stored as I8, .*: take weights that are not quantised")


# --- damaged files ----------------------------------------------------------------------------------------------------


@given(data=st.data())
def test_a_file_that_was_cut_anywhere_is_refused(data: st.DataObject, whole: Path, tmp_path_factory: Any) -> None:
    part = data.draw(st.sampled_from(sorted(WEIGHTS)))
    bytes_of = (whole / WEIGHTS[part]).read_bytes()
    header = 8 + int.from_bytes(bytes_of[:8], "little")
    kept = data.draw(st.integers(0, len(bytes_of) - 1) | st.integers(0, header) | st.just(len(bytes_of) - 1))
    cut = tmp_path_factory.mktemp("cut") / "model.safetensors"
    cut.write_bytes(bytes_of[:kept])
    with pytest.raises(BadCheckpoint) as caught:
        read_header(cut)
    assert f"has {kept} bytes" in str(caught.value)
    if kept >= header:
        assert f"has {kept} bytes, its header says {len(bytes_of)}" in str(caught.value)


@given(data=st.data())
def test_a_damaged_header_is_read_or_refused(data: st.DataObject, whole: Path, tmp_path_factory: Any) -> None:
    there = bytearray((whole / WEIGHTS["text_encoder"]).read_bytes())
    header = 8 + int.from_bytes(there[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        there[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.mktemp("damaged") / "model.safetensors"
    file.write_bytes(there)
    try:
        tensors = read_header(file)
    except BadCheckpoint as error:
        assert str(file) in str(error)
    else:
        assert all(isinstance(tensor, Stored) for tensor in tensors.values())


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_cut_file_is_found_in_its_folder(part: str, folder: Path) -> None:
    file = folder / WEIGHTS[part]
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(size - 1)
    refused(folder, rf"{WEIGHTS[part]} has {size - 1} bytes, its header says {size}: fetch it again")
    with file.open("ab") as stream:
        stream.write(b"too")
    refused(folder, rf"{WEIGHTS[part]} has {size + 2} bytes, its header says {size}")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', r"\(2,\) of F32 do not take 4 bytes"),
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "a begins at byte 4, where 0 is due"),
        ('{"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}', "cannot be read"),
        ('{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}', "must be whole numbers"),
        ('{"a": 1}', "cannot be read"),
        ("[]", "cannot be read"),
        ("{", "cannot be read"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(header: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    with pytest.raises(BadCheckpoint, match=message):
        read_header(file)


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 4\n")
    with pytest.raises(BadCheckpoint, match=r"begins with \d+, which is no length of a header"):
        read_header(file)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_bytes_are_those_that_loading_takes(whole: Path, experts: Path) -> None:
    """On one rank; tests/distributed/test_partition.py compares every partition."""
    assert rank_bytes(whole, Partition(), 4) == parameter_bytes(load_dit(whole, torch.float32))
    assert rank_bytes(experts, Partition(), 2) == 2 * parameter_bytes(load_dit(experts, torch.bfloat16))
    assert text_bytes(whole, 2) == parameter_bytes(load_text(whole, torch.bfloat16).encoder)
    vae: Any = load_vae(whole, torch.float32)
    assert vae_bytes(whole) == sum(t.numel() * t.element_size() for t in vae.state_dict().values())


def test_only_tensor_parallelism_and_zero_divide_weights(whole: Path) -> None:
    alone = rank_bytes(whole, Partition(), 4)
    assert rank_bytes(whole, Partition(cfg=2, sp=4), 4) == alone
    assert alone / 4 < rank_bytes(whole, Partition(tp=4), 4) < rank_bytes(whole, Partition(tp=2), 4) < alone
    assert alone / 4 <= rank_bytes(whole, Partition(sp=2, zero=4), 4) < 1.01 * alone / 4


@given(free=st.integers(0, 2_000_000), shared=st.booleans())
@settings(max_examples=8)  # each reads headers for every partition there is
def test_what_fits_is_the_smallest_that_fits(whole: Path, free: int, shared: bool) -> None:
    found = what_fits(whole, 4, free, 4, 8, shared=shared)
    device = "cpu" if shared else "cuda"
    order = [*(Partition(tp=tp) for tp in (1, 2, 4)), *(Partition(zero=zero) for zero in range(2, 9))]
    for smaller in order[: order.index(found)] if found else order:
        with pytest.raises(NotEnoughMemory, match=f"{found} would fit" if found else "would fit"):
            check_memory(whole, smaller, free, 4, device)
    if found:
        check_memory(whole, found, free, 4, device)


def test_ranks_on_a_cpu_share_its_memory(whole: Path) -> None:
    one = rank_bytes(whole, Partition(), 4) + vae_bytes(whole)
    free = one + text_bytes(whole, 4)
    check_memory(whole, Partition(cfg=2), free, 4, "cuda")
    with pytest.raises(NotEnoughMemory, match=r"free on cpu: partition cfg1xsp1xtp1 would fit"):
        check_memory(whole, Partition(cfg=2), free, 4, "cpu")
    check_memory(whole, Partition(cfg=2), free + one, 4, "cpu")


def test_numbers_are_told_as_people_read_them(whole: Path) -> None:
    each = (rank_bytes(whole, Partition(), 4) + vae_bytes(whole)) / (1 << 20)
    message = (
        rf"model tiny on cfg1xsp1xtp1 needs {each:.1f} MiB a rank and [\d.]+ MiB more .*; 0\.0 MiB are free on cuda"
    )
    with pytest.raises(NotEnoughMemory, match=message):
        check_memory(whole, Partition(), 0, 4, "cuda")
    with pytest.raises(NotEnoughMemory, match=r" GiB a rank and .*; 1\.0 GiB are free on cuda: no partition would fit"):
        check_memory(whole, Partition(), 1 << 30, 1 << 20, "cuda")


def test_the_hosts_memory_is_what_its_cgroups_leave(tmp_path: Path) -> None:
    assert 1 << 20 < free_bytes("cpu") < 1 << 50
    new, old = tmp_path / "a" / "b", tmp_path / "memory"
    for folder, limit, used, stat in (
        (tmp_path, "max", 10, ""),
        (tmp_path / "a", "5000", 1000, "anon 600\nactive_file 300\ninactive_file 100\n"),
        (new, "max", 900, ""),
    ):
        folder.mkdir(exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(stat)
    old.mkdir()
    (old / "memory.limit_in_bytes").write_text("700\n")
    (old / "memory.usage_in_bytes").write_text("800\n")
    (old / "memory.stat").write_text("active_file 0\ntotal_active_file 50\ntotal_inactive_file 150\n")
    own = tmp_path / "own"
    own.write_text("4:memory:/elsewhere\n3:cpu:/\n0::/a/b\n")
    left = _left_to(tmp_path, own)  # pyright: ignore[reportPrivateUsage]
    assert sorted(left) == [100, 4400]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_says_what_it_has_left() -> None:
    assert 0 < free_bytes("cuda") <= torch.cuda.get_device_properties(0).total_memory
