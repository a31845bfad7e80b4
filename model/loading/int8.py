"""Linear layers kept in 8 bits: whole numbers, and for each output channel what one step of them is worth.

Weights only, symmetric, rounded to the nearest (the absmax scheme of Dettmers et al., "LLM.int8()", 2022, by rows and
without its exceptions for outliers). A weight is off by half a step at most, a step being 1/127 of the largest weight
of its row. Every layer is brought back to floats when it multiplies and forgotten after, so that memory holds a quarter
of what float32 takes and a step of sampling takes a little longer.

A row's step is that of the whole row, also where tensor parallelism gives a rank only some of its columns. So a
partition rounds every weight as one process does, and differs from it by the order of sums alone.

Why torchao 0.18 does not do this: under tensor parallelism its Int8Tensor meets DeepSpeed's layers, which multiply by
`weight.transpose`, and a network built without memory, which `to_empty` fills; it implements neither, nor the split by
which these layers would divide it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

INT8 = "int8"  # what `weights` in rushes.json says
LEVELS = 127  # on either side of zero: -128 is left out, so that both signs reach equally far
_PARAMETER = ".parametrizations.weight.original"
CODES, STEPS = f"{_PARAMETER}0", f"{_PARAMETER}1"  # how the parameters of a layer in 8 bits end, `.weight` before


class Int8(nn.Module):
    """How a layer's weight comes out of its parameters: codes [out, in] int8 and steps [out, 1] float32.

    As a parametrization it serves `nn.Linear` and DeepSpeed's layers alike, which read `weight` and know nothing of it.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, codes: Tensor, steps: Tensor) -> Tensor:
        return codes.float().mul_(steps).to(self.dtype)  # a quarter of the time of codes * steps on a CPU

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        steps = steps_of(weight.float())
        return codes_of(weight.float(), steps), steps


def keep_in_int8(dit: nn.Module) -> None:
    """Gives every linear layer of the blocks its weight in 8 bits. To be called while the network has no memory yet,
    and is of the type that it computes in: the steps stay float32 in any case."""
    for name, parameter in list(dit.named_parameters()):
        if is_kept_in_int8(name, parameter.ndim):
            layer = dit.get_submodule(name.removesuffix(".weight"))
            register_parametrization(layer, "weight", Int8(parameter.dtype), unsafe=True)  # unsafe: the type changes


def is_kept_in_int8(name: str, dims: int) -> bool:
    """Whether a parameter is the weight of a linear layer of a block: norms have one dimension, tables no `weight`."""
    return name.startswith("blocks.") and name.endswith(".weight") and dims == 2


def steps_of(rows: Tensor) -> Tensor:
    """The size of one step in each row: [out, in] float32 -> [out, 1]."""
    return rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * LEVELS) / LEVELS


def codes_of(weight: Tensor, steps: Tensor) -> Tensor:
    """[out, in] float32, which may be a part of whole rows, in their steps [out, 1] -> [out, in] int8."""
    return (weight / steps).round().to(torch.int8)
