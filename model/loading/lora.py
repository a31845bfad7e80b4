"""Low-rank adapters: files that change a transformer's linear layers by B @ A, merged into the weights at load.

"LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al., 2021): W + s * (alpha / r) * B A, with A [r, in] and
B [out, r]. Names are those of diffusers' Wan pipelines (0.42, `WanLoraLoaderMixin` in `loaders/lora_pipeline.py`; both
experts since huggingface/diffusers#12074): `transformer.blocks.0.attn1.to_q.lora_A.weight` and `lora_B.weight`, with
`transformer_2.` before those of a second expert. alpha is r (`get_peft_kwargs` in diffusers' `utils/peft_utils.py`)
unless somebody says otherwise: a tensor `<layer>.alpha`, the file's own metadata `lora_adapter_metadata`, or peft's
adapter_config.json, which lies beside the files that peft writes (with `base_model.model.` before the names).

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

A, B, ALPHA = "lora_A.weight", "lora_B.weight", "alpha"
_NAME = re.compile(r"(?:base_model\.model\.)?(?:(transformer|transformer_2)\.)?(.+)\.(lora_[AB]\.weight|alpha)")
METADATA = "lora_adapter_metadata"  # where diffusers says in a file what peft says beside it
SAID = ("lora_alpha", "alpha_pattern", "use_rslora")  # what of it decides how strong an adapter is

Layers = Mapping[tuple[str, str], Mapping[str, str]]  # (transformer, layer) -> A, B and ALPHA -> the tensor's name


def layers_of(names: Iterable[str], into: str) -> Layers:
    """Which layers the tensors of a file change, those of no named transformer in the transformer `into`.

    Raises ValueError, with the name, for a tensor that is neither A nor B nor alpha of a layer.
    """
    layers: defaultdict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for name in names:
        found = _NAME.fullmatch(name)
        if found is None:
            raise ValueError(name)
        part = into if found[1] in (None, TRANSFORMER) else found[1]
        layers[part, found[2]][found[3]] = name
    return layers


def strength(said: Mapping[str, Any], layer: str, rank: int) -> float:
    """alpha / r of a layer, by what peft's or diffusers' configuration says; 1 where it says nothing.

    Layers are matched with `alpha_pattern`, and `use_rslora` divides by the root of r, as peft does.
    """
    patterns: Mapping[str, float] = said.get("alpha_pattern") or {}
    own = [alpha for pattern, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", layer)]
    alpha = own[0] if own else said.get("lora_alpha", rank)
    return alpha / (math.sqrt(rank) if said.get("use_rslora") else rank)


@dataclass(frozen=True, slots=True)
class Change:
    """The change of one layer by one file."""

    file: Path
    a: str
    b: str
    factor: float  # the adapter's scale times alpha / r


class Adapters:
    """The changes that the adapters of a model folder make to the layers of one transformer; none without adapters."""

    def __init__(self, path: Path, part: str) -> None:
        self.changes: defaultdict[str, list[Change]] = defaultdict(list)  # by the name of the weight
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
                rank = opened.get_slice(names[A]).get_shape()[0]
                alone = opened.get_tensor(names[ALPHA]).item() / rank if ALPHA in names else None
                factor = adapter.scale * (strength(said, layer, rank) if alone is None else alone)
                self.changes[f"{layer}.weight"].append(Change(file, names[A], names[B], factor))

    def merged(self, name: str, part: Tensor, where: tuple[slice, ...]) -> Tensor:
        """A part of the weight `name` [out, in], cut out at `where`, with what the adapters add to that part.

        Summed in float64 and not yet rounded to the engine's type: summed in float32, rows that a rank holds could
        differ in their last bits from the same rows of the whole, which rounding to 8 bits can make a whole step of.
        A weight that no adapter changes comes back as it is.
        """
        from safetensors import safe_open

        for change in self.changes.get(name, ()):
            with safe_open(change.file, "pt") as opened:
                b = opened.get_slice(change.b)[where[0], :].double()  # [rows, r]
                a = opened.get_slice(change.a)[:, where[1]].double()  # [r, columns]
            part = part.double().add_(b @ a, alpha=change.factor)
        return part


def said_in(metadata: Mapping[str, str], part: str) -> dict[str, Any]:
    """The metadata of a file about its adapter for one transformer, whose name diffusers puts before each entry."""
    said: Mapping[str, Any] = json.loads(metadata.get(METADATA, "{}"))
    found = {name: said.get(f"{part}.{name}", said.get(name)) for name in SAID}
    return {name: value for name, value in found.items() if value is not None}
