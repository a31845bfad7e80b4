"""Variants of a model: what adapters and 8 bits make of its weights, what they must not touch, what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from flows.library.variants import BadVariant, Lora
from model.config import Partition
from model.loading.card import SECOND, TRANSFORMER, WEIGHTS, find_model, folder_digest
from model.loading.inspect import BadCheckpoint, check_folder
from model.loading.load import load_dit
from model.parallel.memory import NotEnoughMemory, check_memory, rank_bytes, vae_bytes
from model.parallel.mesh import ALONE
from model.parallel.partition import load_partitioned, parameter_bytes
from model.parallel.self_test import streamed
from tests.distributed.partition_worker import inputs
from tests.tiny import LORA_LAYERS, tiny_lora, tiny_model, tiny_wan, variant

PREFIXES = ("transformer.", "", "base_model.model.")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a negative zero among its weights, which a careless sum would turn."""
    folder = tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    file = folder / TRANSFORMER / WEIGHTS
    tensors = load_file(file)
    tensors["blocks.0.attn1.to_q.weight"][0, 0] = -0.0
    save_file(tensors, file)
    return folder


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan(tmp_path_factory.mktemp("wan") / "a14b", "2.2-a14b")


@pytest.fixture
def lora(model: Path, tmp_path: Path) -> Path:
    return tiny_lora(tmp_path / "lora.safetensors", model)


def weights(folder: Path, part: str = TRANSFORMER) -> dict[str, Tensor]:
    return load_dit(folder, torch.float32, part=part).state_dict()


def bits(tensor: Tensor) -> list[int]:
    return tensor.view(torch.int32).flatten().tolist()


def velocity(network: Callable[..., Tensor]) -> Tensor:
    latents, times, text, _ = inputs("per frame")
    return network(latents, times, text)


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "facts", "strength"),
    [
        ("transformer.", {}, 1),
        ("", {"alpha": 6.0}, 2),
        ("transformer.", {"metadata": {"transformer.lora_alpha": 12, "transformer.r": 3}}, 4),
        ("base_model.model.", {"beside": {"lora_alpha": 3, "use_rslora": True}}, 3**0.5),
        ("base_model.model.", {"beside": {"lora_alpha": 6, "alpha_pattern": {"to_q|proj": 1.5, ".*": 3}}}, None),
    ],
)
def test_merged_weights_are_the_sum(
    prefix: str, facts: dict[str, Any], strength: float | None, model: Path, tmp_path: Path
) -> None:
    beside = facts.pop("beside", None)
    file = tiny_lora(tmp_path / "lora.safetensors", model, prefix=prefix, **facts)
    if beside:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 3, **beside}))
    merged = weights(variant(model, tmp_path / "variant", f"{file}:0.8"))
    before, factors = weights(model), load_file(file)
    for name, weight in before.items():
        layer = name.removesuffix(".weight")
        if layer in LORA_LAYERS:
            own = strength or (0.5 if layer.endswith(("to_q", "proj")) and "time_proj" not in layer else 1)
            a, b = (factors[f"{prefix}{layer}.lora_{side}.weight"].double() for side in "AB")
            expected = (weight.double() + 0.8 * own * b @ a).float()
            torch.testing.assert_close(merged[name], expected, rtol=2e-7, atol=1e-9)
            assert (merged[name] - weight).abs().max() > 0.1
        else:
            assert bits(merged[name]) == bits(weight), name


def test_the_self_test_compares_with_merged_weights(model: Path, lora: Path, tmp_path: Path) -> None:
    folder = variant(model, tmp_path / "variant", f"{lora}:0.8", weights="int8")
    with torch.no_grad(), streamed(folder, torch.float32, torch.float32, "cpu") as whole:
        assert torch.equal(velocity(whole), velocity(load_dit(folder, torch.float32)))


def test_scale_0_gives_the_bytes_of_the_base(model: Path, lora: Path, tmp_path: Path) -> None:
    merged, before = weights(variant(model, tmp_path / "variant", f"{lora}:0")), weights(model)
    assert all(bits(merged[name]) == bits(before[name]) for name in before)


def by_hand(network: WanTransformer3DModel, file: Path, alpha: float) -> None:
    """What a low-rank adapter is, beside every layer as a pair of linear layers."""
    tensors = load_file(file)
    for layer in LORA_LAYERS:
        down, up = (torch.nn.Linear(*tensors[f"transformer.{layer}.lora_{s}.weight"].T.shape, bias=False) for s in "AB")
        down.weight.data, up.weight.data = (tensors[f"transformer.{layer}.lora_{s}.weight"] for s in "AB")
        factor = alpha / down.out_features
        network.get_submodule(layer).register_forward_hook(
            lambda _, x, y, up=up, down=down, factor=factor: y + factor * up(down(x[0]))
        )


def by_peft(network: WanTransformer3DModel, file: Path, alpha: float) -> None:
    pytest.importorskip("peft")
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.endswith("alpha")}
    network.load_lora_adapter(tensors, network_alphas={f"transformer.{layer}.alpha": alpha for layer in LORA_LAYERS})


@pytest.mark.parametrize("adapt", [by_hand, by_peft])
@torch.no_grad()
def test_a_velocity_is_that_of_diffusers(
    adapt: Callable[[WanTransformer3DModel, Path, float], None], model: Path, tmp_path: Path
) -> None:
    file = tiny_lora(tmp_path / "lora.safetensors", model, alpha=5.0)
    theirs = WanTransformer3DModel.from_pretrained(model / TRANSFORMER).eval()
    adapt(theirs, file, 5.0)
    latents, times, text, _ = inputs("divides")
    wanted = theirs(latents, 1000 * times[:, 0], text, return_dict=False)[0]
    ours = load_dit(variant(model, tmp_path / "variant", str(file)), torch.float32)(latents, times, text)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)
    assert (ours - load_dit(model, torch.float32)(latents, times, text)).abs().max() > 0.01


def test_each_expert_gets_its_own(experts: Path, tmp_path: Path) -> None:
    layer = LORA_LAYERS[:1]
    unnamed = tiny_lora(tmp_path / "unnamed.safetensors", experts, layer, prefix="")
    named = tiny_lora(tmp_path / "named.safetensors", experts, layer, prefix="transformer_2.", seed=3)
    before = [weights(experts, part) for part in (TRANSFORMER, SECOND)]

    def changed(number: int, *loras: str) -> list[float]:
        folder = variant(experts, tmp_path / f"variant-{number}", *loras)
        check_folder(folder)
        after = [weights(folder, part) for part in (TRANSFORMER, SECOND)]
        pairs = zip(after, before, strict=True)
        return [float((a[f"{layer[0]}.weight"] - b[f"{layer[0]}.weight"]).norm()) for a, b in pairs]

    first, none = changed(0, str(unnamed))
    assert first > 0.1 and none == 0
    assert changed(1, f"transformer_2={unnamed}") == pytest.approx([0, first])
    assert changed(2, str(unnamed), f"transformer_2={unnamed}:0.5") == pytest.approx([first, first / 2])
    assert changed(3, str(named))[0] == 0 < changed(4, str(named))[1]


# --- what a digest covers ---------------------------------------------------------------------------------------------


def test_the_digest_says_what_is_rendered_with(model: Path, lora: Path, tmp_path: Path) -> None:
    other = tiny_lora(tmp_path / "other.safetensors", model, seed=5)
    renamed = Path(shutil.copy(lora, tmp_path / "renamed.sft"))
    asked: dict[str, list[tuple[Any, ...]]] = {
        "base": [()],
        "adapter": [(f"{lora}",), (f"{lora}:1",), (f"{renamed}:1.0",)],
        "weaker": [(f"{lora}:0.5",)],
        "other": [(f"{other}",)],
        "both": [(f"{lora}", f"{other}"), (f"{other}", f"{lora}")],
    }
    found: dict[str, set[str]] = {}
    for kept in (None, "int8"):
        for name, ways in asked.items():
            folders = [
                variant(model, tmp_path / f"{kept} {name} {number}", *way, weights=kept)
                for number, way in enumerate(ways)
            ]
            found[f"{kept} {name}"] = {folder_digest(folder) for folder in folders}
    again = variant(tmp_path / "None adapter 0", tmp_path / "again", str(other), weights="int8")
    found["int8 both"].add(folder_digest(again))
    assert all(len(digests) == 1 for digests in found.values()), "the same model, asked for in other words"
    assert len(set.union(*found.values())) == len(found) and folder_digest(model) in found["None base"]
    assert find_model(again).weights == "int8" and find_model(model).weights is None
    kept, merged = weights(again), weights(tmp_path / "int8 both 1")
    assert all(torch.equal(kept[name], merged[name]) for name in kept)


# --- what is refused --------------------------------------------------------------------------------------------------


def broken(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        tensors = load_file(file)
        change(tensors)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, file)

    return apply


A, B = "transformer.blocks.0.attn1.to_q.lora_A.weight", "transformer.blocks.0.attn1.to_q.lora_B.weight"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no such layer": (
        broken(lambda t: t.update({A.replace("0", "7"): t[A], B.replace("0", "7"): t[B]})),
        "transformer.blocks.7.attn1.to_q is no linear layer of this model",
    ),
    "no linear layer": (
        broken(lambda t: t.update({A.replace("to_q", "norm_q"): t[A], B.replace("to_q", "norm_q"): t[B]})),
        "transformer.blocks.0.attn1.norm_q is no linear layer of this model",
    ),
    "no such expert": (
        broken(lambda t: t.update({A.replace("transformer", SECOND): t[A]})),
        "transformer_2.blocks.0.attn1.to_q is no linear layer",
    ),
    "A does not fit": (
        broken(lambda t: t.update({A: t[A][:, :5].clone()})),
        "(48, 48), which lora_A.weight (3, 5) and",
    ),
    "B does not fit": (broken(lambda t: t.update({B: t[B][:, :2].clone()})), "lora_B.weight (48, 2) do not fit"),
    "A alone": (broken(lambda t: t.pop(B)), "to_q has no lora_B.weight"),
    "B alone": (broken(lambda t: t.pop(A)), "to_q has no lora_A.weight"),
    "whole numbers": (broken(lambda t: t.update({A: t[A].int()})), "to_q.lora_A.weight is I32, not one of"),
    "several alphas": (broken(lambda t: t.update({A[:-13] + "alpha": t[A][0]})), "alpha is (48,), it must be one"),
    "DoRA": (
        broken(lambda t: t.update({A[:-13] + "lora_magnitude_vector": t[A][0]})),
        "transformer.blocks.0.attn1.to_q.lora_magnitude_vector is of DoRA, and what can be merged is LoRA (",
    ),
    "empty": (broken(lambda t: t.clear()), "holds no tensors"),
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:-1]), "its header says"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_adapter_that_does_not_fit_is_refused(name: str, model: Path, lora: Path, tmp_path: Path) -> None:
    """When it is named, and when it lies in a folder that somebody else wrote."""
    spoil, message = BROKEN[name]
    folder = variant(model, tmp_path / "before", str(lora))
    spoil(lora)
    with pytest.raises(BadCheckpoint, match=re.escape(message)):
        variant(model, tmp_path / "variant", str(lora))
    assert not (tmp_path / "variant").exists()
    spoil(next((folder / "adapters").iterdir()))
    with pytest.raises(BadCheckpoint, match=re.escape(message)):
        check_folder(folder)


def test_what_cannot_be_asked_for_says_why(model: Path, lora: Path, tmp_path: Path) -> None:
    def refused(error: type[Exception], message: str, *loras: str) -> None:
        with pytest.raises(error, match=re.escape(message)):
            variant(model, tmp_path / "variant", *loras)

    pickle = tmp_path / "lora.bin"
    torch.save({}, pickle)
    refused(
        BadCheckpoint, f"{pickle} is a pickle, which is never opened here, since it may run any program", str(pickle)
    )
    refused(BadCheckpoint, "nowhere.safetensors is missing: name the safetensors file", "nowhere.safetensors:0.5")
    refused(BadVariant, "the scale 'much' must be a number, as in", f"{lora}:much")
    refused(BadVariant, "the scale 'nan' must be a number, as in", f"{lora}:nan")
    refused(BadVariant, "this adapter would be merged into transformer twice", str(lora), f"{lora}:0.5")
    refused(BadVariant, "the model has no transformer_2, leave that out", f"transformer_2={lora}")
    peft = tiny_lora(tmp_path / "peft" / "adapter_model.safetensors", model, prefix="base_model.model.")
    refused(BadCheckpoint, "adapter_config.json is missing, which peft writes beside adapter_model", str(peft))
    folder = variant(model, tmp_path / "bits", weights="int5")
    with pytest.raises(BadCheckpoint, match=r"rushes\.json: weights='int5' must be int8, or not be there"):
        check_folder(folder)
    named = tmp_path / "a:0.5"  # a file that is called like this comes before a scale
    shutil.copy(lora, named)
    assert Lora.parse(str(named)) == Lora(named) and Lora.parse(f"{named}:-2") == Lora(named, -2.0)


# --- 8 bits -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_8_bits_are_off_by_half_a_step_at_most(model: Path, tmp_path: Path) -> None:
    folder = variant(model, tmp_path / "int8", weights="int8")
    before, after = weights(model), weights(folder)
    for name, weight in before.items():
        if name.startswith("blocks.") and weight.ndim == 2:
            step = weight.abs().amax(1, keepdim=True) / 127
            error = (after[name] - weight).abs() / step
            assert 0.4 < error.max() <= 0.5001, name  # of thousands of weights some lie near the middle of two codes
            assert (after[name] / step).round().unique().numel() > 100  # ... and all codes are used
        else:
            assert torch.equal(after[name], weight), name
    exact = velocity(load_dit(model, torch.float32))
    error = (velocity(load_dit(folder, torch.float32)) - exact).norm() / exact.norm()
    assert 0 < error < 0.02  # a step is 1/127 of the largest weight: rounding is some 0.5 % of a typical one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_rank_keeps_8_bits_and_computes_what_they_are_worth(dtype: torch.dtype, model: Path, tmp_path: Path) -> None:
    folder = variant(model, tmp_path / "int8", weights="int8")
    kept, worth = load_partitioned(folder, ALONE, dtype, "cpu"), load_dit(folder, dtype)
    assert torch.equal(velocity(kept), velocity(worth))
    size = dtype.itemsize
    linear = sum(p.numel() for name, p in worth.blocks.named_parameters() if p.ndim == 2)
    rows = sum(p.shape[0] for p in worth.blocks.parameters() if p.ndim == 2)
    assert parameter_bytes(worth) - parameter_bytes(kept) == linear * (size - 1) - 4 * rows
    assert parameter_bytes(kept) == rank_bytes(folder, Partition(), size)
    assert {p.dtype for p in kept.parameters()} == {dtype, torch.int8, torch.float32}


def test_memory_that_only_8_bits_fit_into(model: Path, tmp_path: Path) -> None:
    folder = variant(model, tmp_path / "int8", weights="int8")
    free = rank_bytes(model, Partition(), 4) + vae_bytes(model) - 1
    with pytest.raises(NotEnoughMemory):
        check_memory(model, Partition(), free, 4, "cuda")
    check_memory(folder, Partition(), free, 4, "cuda")


def test_a_row_of_zeros_stays_zero(model: Path, tmp_path: Path) -> None:
    holed = Path(shutil.copytree(model, tmp_path / "holed"))
    tensors = load_file(holed / TRANSFORMER / WEIGHTS)
    tensors["blocks.0.ffn.net.2.weight"][3] = 0
    save_file(tensors, holed / TRANSFORMER / WEIGHTS)
    assert not weights(variant(holed, tmp_path / "int8", weights="int8"))["blocks.0.ffn.net.2.weight"][3].any()
