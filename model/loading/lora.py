"""Low-rank adapters: files that change a transformer's linear layers by B @ A, merged into the weights at load.

"LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al., 2021): W + s * (alpha / r) * B A, with A [r, in] and
B [out, r]. alpha is r (`get_peft_kwargs` in diffusers' `utils/peft_utils.py`) unless somebody says otherwise: a tensor
`<layer>.alpha`, the file's own metadata `lora_adapter_metadata`, or peft's adapter_config.json, which lies beside the
files that peft writes. A file may also hold differences of whole weights and biases, `<layer>.diff` and `.diff_b`.

Layers are called as in diffusers' Wan pipelines (`transformer.blocks.0.attn1.to_q`, `transformer_2.` for a second
expert), by peft (`base_model.model.` before it), as in Wan's own code (`blocks.0.self_attn.q`), by ComfyUI
(`diffusion_model.` before that), or by kohya's trainers (`lora_unet_blocks_0_self_attn_q`). `LAYERS` is the table.

Nothing here knows ranks: a caller says which rows and columns it holds.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.loading.card import TRANSFORMER, Adapter, read_adapters

if TYPE_CHECKING:
    from torch import Tensor

A, B, ALPHA, B_BIAS, DIFF, DIFF_B = "lora_A.weight", "lora_B.weight", "alpha", "lora_B.bias", "diff", "diff_b"
METADATA = "lora_adapter_metadata"  # where diffusers says in a file what peft says beside it
SAID = ("lora_alpha", "alpha_pattern", "use_rslora")  # what of it decides how strong an adapter is

# Wan's own names of layers, and those here, which are diffusers' (its scripts/convert_wan_to_diffusers.py).
_OF_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_IN_BLOCK = {
    **{f"self_attn.{own}": f"attn1.{layer}" for own, layer in _OF_ATTENTION.items()},
    **{f"cross_attn.{own}": f"attn2.{layer}" for own, layer in _OF_ATTENTION.items()},
    "cross_attn.k_img": "attn2.add_k_proj",  # of image-to-video models: named, so that an error names them
    "cross_attn.v_img": "attn2.add_v_proj",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "norm3": "norm2",
    "modulation": "scale_shift_table",
}
_OUTSIDE = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
LAYERS = {**_OUTSIDE, **{f"blocks.N.{own}": f"blocks.N.{layer}" for own, layer in _IN_BLOCK.items()}}
# With underscores for all that separates, as kohya's trainers write either.
_UNDERSCORED = {name.replace(".", "_"): layer for pair in LAYERS.items() for name in pair for layer in pair[1:]}
_TENSORS = {
    A: r"lora_A(\.\w+)?\.weight|lora_A|lora_down\.weight|lora\.down\.weight|lora_linear_layer\.down\.weight",
    B: r"lora_B(\.\w+)?\.weight|lora_B|lora_up\.weight|lora\.up\.weight|lora_linear_layer\.up\.weight",
    B_BIAS: r"lora_B(\.\w+)?\.bias",
    ALPHA: r"alpha",
    DIFF: r"diff",
    DIFF_B: r"diff_b",
}
_PREFIX = re.compile(
    r"(?:base_model\.model\.)?(?:(transformer|transformer_2)\.|(?:model\.)?diffusion_model\.|(?:pipe\.)?dit\.|)"
)
_KOHYA = re.compile(r"(?:lora_unet|lora_transformer|lycoris)_([^.]+)")
_TEXT_ENCODER = re.compile(r"(?:base_model\.model\.)?(?:text_encoder\w*\.|text_encoders\.|lora_te\w*_|te\.)")
# Other ways to change a layer, by what their tensors are called.
_OTHERS = {
    "DoRA": r"dora_scale|lora_magnitude_vector(\.\w+)?(\.weight)?",
    "LoKr": r"lokr_\w+",
    "LoHa": r"hada_\w+",
    "OFT": r"b?oft_\w+(\.\w+)*|rescale",
    "GLoRA": r"[ab][12]\.weight",
    "IA3": r"on_input|ia3_l(\.\w+)?",
    "LoCon with a core tensor": r"lora_mid\.weight",
    "a LoRA of embeddings": r"lora_embedding_[AB](\.\w+)?",
    "a change of shapes": r"set_weight|reshape_weight",
}

Layers = Mapping[tuple[str, str], Mapping[str, str]]  # (transformer, layer) -> A, B, ALPHA … -> the tensor's name


def layers_of(names: Iterable[str], into: str) -> Layers:
    """Which layers the tensors of a file change, those of no named transformer in the transformer `into`.

    Raises ValueError, with a sentence, for a tensor that changes no layer in a way that is known.
    """
    layers: defaultdict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for name in names:
        if _TEXT_ENCODER.match(name):
            raise ValueError(f"{name} changes the text encoder, and an adapter can change the transformer alone")
        found = next((each for each in _split(name, _TENSORS)), None)
        if found is None:
            other = next((each for each in _split(name, _OTHERS)), None)
            what = f"is of {other[1]}" if other else "has none of the names that LoRA files have"
            raise ValueError(
                f"{name} {what}, and what can be merged is LoRA ({A} and {B}, or lora_down and lora_up, with alpha), "
                f"{DIFF} and {DIFF_B}"
            )
        layer, kind = found
        part, layer = layer_of(layer)
        kinds = layers[part if part not in (None, TRANSFORMER) else into, layer]
        if kind in kinds:
            raise ValueError(
                f"{name} and {kinds[kind]} are both {kind} of {layer}, so that it is not clear which is it"
            )
        kinds[kind] = name
    return layers


def _split(name: str, endings: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """The layer as the file calls it, and the key of the ending that its tensor's name has."""
    for key, ending in endings.items():
        if found := re.fullmatch(rf"(.+)\.(?:{ending})", name):
            yield found[1], key


def layer_of(name: str) -> tuple[str | None, str]:
    """The transformer that the name of a layer says, if it does, and the layer as it is called here."""
    if found := _KOHYA.fullmatch(name):
        general, number = re.subn(r"^blocks_\d+_", "blocks_N_", found[1])
        layer = _UNDERSCORED.get(general)
        if layer is None:
            return None, found[1]
        return None, layer.replace("N", found[1].split("_")[1], 1) if number else layer
    prefix = _PREFIX.match(name)
    assert prefix is not None, "it may be empty"
    own = name[prefix.end() :]
    numbered = re.match(r"blocks\.(\d+)\.", own)
    general = re.sub(r"^blocks\.\d+\.", "blocks.N.", own)
    layer = LAYERS.get(general, general)
    return prefix[1], layer.replace("blocks.N.", numbered[0], 1) if numbered else layer


def strength(said: Mapping[str, Any], names: Iterable[str], rank: int) -> float:
    """alpha / r of a layer, by what peft's or diffusers' configuration says; 1 where it says nothing.

    names: the layer's here and in the file. They are matched with `alpha_pattern`, and `use_rslora` divides by the root
    of r, as peft does.
    """
    patterns: Mapping[str, float] = said.get("alpha_pattern") or {}
    matched = [alpha for pattern, alpha in patterns.items() for n in names if re.fullmatch(rf"(.*\.)?({pattern})", n)]
    alpha = matched[0] if matched else said.get("lora_alpha", rank)
    return alpha / (math.sqrt(rank) if said.get("use_rslora") else rank)


@dataclass(frozen=True, slots=True)
class Change:
    """The change of one parameter by one file."""

    file: Path
    a: str
    b: str | None  # None: `a` is the whole difference
    factor: float  # the adapter's scale, times alpha / r where there are two factors


class Adapters:
    """The changes that the adapters of a model folder make to the layers of one transformer; none without adapters."""

    def __init__(self, path: Path, part: str) -> None:
        self.changes: defaultdict[str, list[Change]] = defaultdict(list)  # by the name of the parameter
        for adapter in read_adapters(path):
            if adapter.scale:  # with 0 the weights stay as they are, to the sign of a zero
                self._note(path / adapter.file, adapter, part)

    def _note(self, file: Path, adapter: Adapter, part: str) -> None:
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            said = adapter.config or said_in(opened.metadata() or {}, part)
            for (where, layer), names in layers_of(opened.keys(), adapter.into).items():
                if where != part:
                    continue
                weight, bias = targets_of(layer)
                factor = adapter.scale
                if A in names:
                    rank = opened.get_slice(names[A]).get_shape()[0]
                    alone = opened.get_tensor(names[ALPHA]).item() / rank if ALPHA in names else None
                    there, _ = next(iter(_split(names[A], _TENSORS)))
                    there, _ = next(iter(_split(names[A], _TENSORS)))
                    factor = adapter.scale * (strength(said, (layer, there), rank) if alone is None else alone)
                    self.changes[weight].append(Change(file, names[A], names[B], factor))
                if B_BIAS in names:
                    self.changes[bias].append(Change(file, names[B_BIAS], None, factor))
                for kind, target in ((DIFF, weight), (DIFF_B, bias)):
                    if kind in names:
                        self.changes[target].append(Change(file, names[kind], None, adapter.scale))

    def merged(self, name: str, part: Tensor, where: tuple[slice, ...]) -> Tensor:
        """A part of the parameter `name`, such as a weight [out, in], cut out at `where`, with what the adapters add.

        Summed in float64 and not yet rounded to the engine's type: summed in float32, rows that a rank holds could
        differ in their last bits from the same rows of the whole, which rounding to 8 bits can make a whole step of.
        A parameter that no adapter changes comes back as it is.
        """
        from safetensors import safe_open

        for change in self.changes.get(name, ()):
            with safe_open(change.file, "pt") as opened:
                if change.b is None:
                    part = part.double().add_(opened.get_tensor(change.a)[where].double(), alpha=change.factor)
                    continue
                b = opened.get_slice(change.b)[where[0], :].double()  # [rows, r], and [rows, r, 1, 1, 1] of a Conv3d
                a = opened.get_slice(change.a)[:, where[1]].double()  # [r, columns], and [r, columns, t, h, w]
            added = b.flatten(1) @ a.flatten(1)
            part = part.double().add_(added.view(part.shape), alpha=change.factor)
        return part


def targets_of(layer: str) -> tuple[str, str]:
    """The names of a layer's weight and bias; a modulation table is a parameter by itself."""
    return layer if layer.endswith("scale_shift_table") else f"{layer}.weight", f"{layer}.bias"


def said_in(metadata: Mapping[str, str], part: str) -> dict[str, Any]:
    """The metadata of a file about its adapter for one transformer, whose name diffusers puts before each entry."""
    said: Mapping[str, Any] = json.loads(metadata.get(METADATA, "{}"))
    found = {name: said.get(f"{part}.{name}", said.get(name)) for name in SAID}
    return {name: value for name, value in found.items() if value is not None}
