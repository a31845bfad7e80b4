"""LoRA files as other programs write them: whose names say which layer, and what is not read is named."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_musubi_wan_lora_to_diffusers,
    _convert_non_diffusers_wan_lora_to_diffusers,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.loading.inspect import BadCheckpoint
from model.loading.load import load_dit
from model.loading.lora import ALPHA, DIFF, DIFF_B, LAYERS, A, B, layer_of, layers_of
from tests.tiny import LORA_LAYERS, tiny_lora, tiny_model, variant

Tensors = dict[str, Tensor]
OWN = {layer: own for own, layer in LAYERS.items()}  # Wan's name of a layer that is called as here


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def wans(layer: str) -> str:
    """Wan's own name of a layer: blocks.0.attn1.to_q -> blocks.0.self_attn.q."""
    number = re.match(r"blocks\.(\d+)\.", layer)
    own = OWN[re.sub(r"^blocks\.\d+\.", "blocks.N.", layer)]
    return own.replace("N", number[1], 1) if number else own


def kohyas(layer: str) -> str:
    return "lora_unet_" + wans(layer).replace(".", "_")


DOWN, UP = "lora_down.weight", "lora_up.weight"
WAYS: dict[str, tuple[Callable[[str], str], str, str]] = {
    "diffusers": (lambda layer: f"transformer.{layer}", A, B),
    "diffusers, older": (lambda layer: f"transformer.{layer}", "lora.down.weight", "lora.up.weight"),
    "bare diffusers": (lambda layer: layer, A, B),
    "ComfyUI": (lambda layer: f"diffusion_model.{wans(layer)}", A, B),
    "ComfyUI, down and up": (lambda layer: f"diffusion_model.{wans(layer)}", DOWN, UP),
    "ComfyUI, whole model": (lambda layer: f"model.diffusion_model.{wans(layer)}", A, B),
    "bare Wan": (wans, A, B),
    "DiffSynth": (wans, "lora_A.default.weight", "lora_B.default.weight"),
    "kohya": (kohyas, DOWN, UP),
    "kohya on diffusers": (lambda layer: "lora_unet_" + layer.replace(".", "_"), DOWN, UP),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_a_file_of_any_naming_gives_the_weights_of_diffusers_own(
    way: str, alpha: float | None, model: Path, tmp_path: Path
) -> None:
    file = tiny_lora(tmp_path / "lora.safetensors", model, alpha=alpha)
    name, a, b = WAYS[way]
    ending = {A: a, B: b, ALPHA: ALPHA}
    renamed: Tensors = {}
    for key, tensor in load_file(file).items():
        found = re.fullmatch(r"transformer\.(.+)\.(lora_[AB]\.weight|alpha)", key)
        assert found is not None
        renamed[f"{name(found[1])}.{ending[found[2]]}"] = tensor
    save_file(renamed, tmp_path / "renamed.safetensors")
    wanted, ours = (
        load_dit(variant(model, tmp_path / each, f"{tmp_path / each}.safetensors"), torch.float32).state_dict()
        for each in ("lora", "renamed")
    )
    before = load_dit(model, torch.float32).state_dict()
    assert all(torch.equal(ours[key], wanted[key]) for key in wanted)
    changed = {key for key in wanted if not torch.equal(wanted[key], before[key])}
    assert changed == {f"{layer}.weight" for layer in LORA_LAYERS}


def test_the_table_is_that_of_diffusers() -> None:
    """Every linear layer, by the conversions that diffusers' pipelines do."""
    linear = {own: layer for own, layer in LAYERS.items() if "norm" not in own and "modulation" not in own}
    del linear["patch_embedding"]  # which it does not convert
    numbered = [(own.replace("N", n), layer.replace("N", n)) for own, layer in linear.items() for n in ("0", "1")]
    for convert, prefix, alpha in (
        (_convert_non_diffusers_wan_lora_to_diffusers, "diffusion_model.", False),
        (_convert_musubi_wan_lora_to_diffusers, "lora_unet_", True),
    ):
        file: Tensors = {}
        for own, layer in numbered:
            if alpha and not layer.startswith("blocks."):
                continue  # musubi-tuner trains the blocks alone
            name = prefix + (own.replace(".", "_") if alpha else own)
            file |= {f"{name}.{ending}": torch.zeros(1, 1) for ending in ((DOWN, UP) if alpha else (A, B))}
            file |= {f"{name}.alpha": torch.ones(())} if alpha else {}
            assert layer_of(name) == (None, layer)
        theirs = {name.removeprefix("transformer.").rpartition(".lora_")[0] for name in convert(dict(file))}
        assert {layer for _, layer in layers_of(file, "transformer")} == theirs


def test_differences_of_weights_and_biases_are_added(model: Path, tmp_path: Path) -> None:
    before = load_dit(model, torch.float32).state_dict()
    named = {
        f"blocks.0.norm3.{DIFF}": "blocks.0.norm2.weight",
        f"blocks.0.norm3.{DIFF_B}": "blocks.0.norm2.bias",
        f"blocks.1.self_attn.norm_q.{DIFF}": "blocks.1.attn1.norm_q.weight",
        f"blocks.1.modulation.{DIFF}": "blocks.1.scale_shift_table",
        f"head.modulation.{DIFF}": "scale_shift_table",
        f"head.head.{DIFF}": "proj_out.weight",
        f"patch_embedding.{DIFF}": "patch_embedding.weight",
        f"blocks.0.ffn.0.{DIFF_B}": "blocks.0.ffn.net.0.proj.bias",
    }
    random = torch.Generator().manual_seed(0)
    added = {ours: torch.randn(before[ours].shape, generator=random) for ours in named.values()}
    file = {f"diffusion_model.{theirs}": added[ours] for theirs, ours in named.items()}
    # A convolution has factors too, and a bias of B is as strong as B.
    shape = before["patch_embedding.weight"].shape
    a, b = torch.randn(2, *shape[1:], generator=random), torch.randn(shape[0], 2, 1, 1, 1, generator=random)
    file |= {f"diffusion_model.patch_embedding.{DOWN}": a, f"diffusion_model.patch_embedding.{UP}": b}
    file["diffusion_model.patch_embedding.lora_B.bias"] = torch.ones(shape[0])
    file["diffusion_model.patch_embedding.alpha"] = torch.tensor(1.0)
    both = torch.einsum("oruvw,rcthk->octhk", b, a) / 2
    added["patch_embedding.weight"] = added["patch_embedding.weight"] + both
    added["patch_embedding.bias"] = torch.full((shape[0],), 0.5)
    save_file(file, tmp_path / "lora.safetensors")
    folder = variant(model, tmp_path / "variant", f"{tmp_path / 'lora.safetensors'}:0.5")
    for name, tensor in load_dit(folder, torch.float32).state_dict().items():
        expected = before[name] + 0.5 * added[name] if name in added else before[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-6)


Q = "diffusion_model.blocks.0.self_attn.q"
REFUSED = {
    "DoRA": ({f"{Q}.dora_scale": (48, 1)}, f"{Q}.dora_scale is of DoRA, and"),
    "LoKr": ({f"{Q}.lokr_w1": (4, 4), f"{Q}.lokr_w2": (12, 12)}, f"{Q}.lokr_w1 is of LoKr, and"),
    "LoHa": ({f"{Q}.hada_w1_a": (48, 2)}, f"{Q}.hada_w1_a is of LoHa, and"),
    "OFT": ({f"{Q}.oft_blocks": (4, 12, 12)}, f"{Q}.oft_blocks is of OFT, and"),
    "GLoRA": ({f"{Q}.a1.weight": (2, 48)}, f"{Q}.a1.weight is of GLoRA, and"),
    "a core": ({f"{Q}.lora_mid.weight": (2, 2, 1)}, "is of LoCon with a core tensor, and"),
    "unknown": ({f"{Q}.something": (48, 48)}, f"{Q}.something has none of the names that LoRA files have, and"),
    "text": ({"lora_te1_text_model_q.lora_down.weight": (2, 8)}, "changes the text encoder, and an adapter can"),
    "twice": ({f"{Q}.{A}": (2, 48), f"{Q}.{DOWN}": (2, 48)}, "are both lora_A.weight of blocks.0.attn1.to_q"),
    "image": ({"diffusion_model.img_emb.proj.1.lora_A.weight": (2, 48)}, "img_emb.proj.1 is no linear layer of this"),
    "k_img": ({f"{Q[:-11]}cross_attn.k_img.{A}": (2, 48)}, "blocks.0.attn2.add_k_proj is no linear layer of this"),
    "block": ({f"{Q.replace('0', '90')}.{A}": (2, 48)}, "transformer.blocks.90.attn1.to_q is no linear layer of"),
    "kohya's other": ({f"lora_unet_single_blocks_0_linear1.{DOWN}": (2, 48)}, "single_blocks_0_linear1 is no linear"),
    "a diff of another size": ({f"{Q}.{DIFF}": (40, 48)}, "to_q.weight, which is (48, 48) in this model"),
    "a bias that is not there": ({f"{Q[:-1]}norm_q.{DIFF_B}": (48,)}, "norm_q.bias, which is not in this model"),
    "alpha alone": ({f"{Q}.alpha": ()}, "to_q has no lora_A.weight"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_named_in_a_sentence(case: str, model: Path, tmp_path: Path) -> None:
    shapes, said = REFUSED[case]
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "lora.safetensors")
    with pytest.raises(BadCheckpoint, match=re.escape(said)) as caught:
        variant(model, tmp_path / "variant", str(tmp_path / "lora.safetensors"))
    assert "\n" not in str(caught.value) and not (tmp_path / "variant").exists()
