"""Reading parameters from safetensors: only the slice that a rank holds, adapters and int8 applied."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.loading.card import TRANSFORMER, dit_config, kept_weights, transformer_files
from model.loading.int8 import CODES, INT8, STEPS, codes_of, is_kept_in_int8, steps_of
from model.loading.lora import Adapters
from model.network.dit import DiT


@dataclass(frozen=True, slots=True)
class Part:
    """Part `index` of a tensor that is divided into `count` equal ones."""

    index: int = 0
    count: int = 1


WHOLE = Part()


def empty(path: Path, part: str = TRANSFORMER) -> DiT:
    """The network of a model folder, without memory."""
    with torch.device("meta"):
        return DiT(dit_config(path, part)).eval().requires_grad_(False)


class WeightFiles:
    """The tensors of a model's transformer, read slice by slice (safetensors only), as its variant makes them.

    One file is open at a time: what has been read of a file stays resident for as long as it is mapped.
    """

    def __init__(self, path: Path, part: str = TRANSFORMER) -> None:
        self.path = path / part
        self.files = transformer_files(path, part)
        self.adapters = Adapters(path, part)
        self.int8 = kept_weights(path) == INT8
        self.opened: tuple[Path, Any] | None = None
        self.rows: tuple[str, slice, Tensor] | None = None  # the last ones read for a layer in 8 bits
        self.stack = ExitStack()

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *problem: object) -> None:
        self.stack.close()

    def slice(self, name: str) -> Any:
        """safetensors' lazy view of one tensor: `get_shape()`, and indexing reads only what is asked for."""
        from safetensors import safe_open

        file = self.files[name]
        if self.opened is None or self.opened[0] != file:
            self.stack.close()
            self.opened = file, self.stack.enter_context(safe_open(file, "pt"))
        return self.opened[1].get_slice(name)

    def read(self, name: str, mine: Sequence[int], part: Part = WHOLE) -> Tensor:
        """A parameter of shape `mine`: where the file's tensor is `part.count` times as long, ours is that part of it.

        Adapters are merged. Of a layer in 8 bits it is the codes or the steps, or, in a network that keeps it in
        floats, what these come to. Raises ValueError where the files do not hold it.
        """
        weight = re.sub(f"({re.escape(CODES)}|{re.escape(STEPS)})$", ".weight", name)
        if weight not in self.files:
            raise ValueError(f"{self.path}: its weights have no {weight}")
        shape, where = tuple(self.slice(weight).get_shape()), list[slice]()
        for whole, own in zip(shape, mine, strict=False):
            divided = whole == own * part.count and part.count > 1
            where.append(slice(part.index * own, (part.index + 1) * own) if divided else slice(None))
        if self.int8 and is_kept_in_int8(weight, len(shape)):
            tensor = self._in_int8(name, weight, where[0], where[1])
        else:
            tensor = self._merged(weight, tuple(where))
        if tensor.shape != tuple(mine):
            raise ValueError(f"{self.path}: {weight} is {shape}, which does not give {tuple(mine)}")
        return tensor

    def _merged(self, weight: str, where: tuple[slice, ...]) -> Tensor:
        return self.adapters.merged(weight, self.slice(weight)[where], where)

    def _in_int8(self, name: str, weight: str, rows: slice, columns: slice) -> Tensor:
        """Whole rows are read, whose largest weight decides the step, though this rank may keep some columns only."""
        if self.rows is None or self.rows[:2] != (weight, rows):
            self.rows = weight, rows, self._merged(weight, (rows, slice(None))).float()
        steps = steps_of(self.rows[2])
        if name.endswith(STEPS):
            return steps
        codes = codes_of(self.rows[2][:, columns], steps)
        return codes if name.endswith(CODES) else codes * steps


@torch.no_grad()
def read_parameters(
    module: nn.Module, files: WeightFiles, part: Part = WHOLE, prefix: str = "", recurse: bool = True
) -> None:
    """Fills the parameters from the files, rounding each once to the type that it has here."""
    for name, parameter in module.named_parameters(recurse=recurse):
        parameter.copy_(files.read(prefix + name, parameter.shape, part))
