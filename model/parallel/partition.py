"""How one DiT is divided over the ranks of an engine: DeepSpeed's layers, placed by a plan.

The network never learns its rank. `load_partitioned` builds it without memory, puts DeepSpeed's layers where the plan
says, reads this rank's slices of the weights and hangs the sequence exchange into the network's three hooks. Where an
axis has one rank its group is None and every function here gives its input back, so one process and N run one path.

Letters: B batch, N tokens of a clip, n tokens of this rank, H heads, K head size, D width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.config import Partition
from model.loading.card import TRANSFORMER, kept_weights
from model.loading.int8 import INT8, keep_in_int8
from model.loading.tensors import WeightFiles, empty, read_parameters
from model.network.dit import DiT, set_type
from model.network.layers import Attention, Block, HeadsRMSNorm
from model.parallel.mesh import Axis, Groups
from model.parallel.ulysses import SharedRows, Ulysses
from model.parallel.zero_inference import divide_weights, held

Kind = Literal["column", "row", "norm"]
Plan = Mapping[str, Kind]
# Where the transformer is divided under tensor parallelism: outputs of the first linear layer of a pair ("column"),
# inputs of the second ("row", summed over the ranks after), and the norm that spans the heads between them.
WAN_PLAN: Plan = {
    r"blocks\.\d+\.attn1\.to_[qkv]": "column",
    r"blocks\.\d+\.attn1\.norm_[qk]": "norm",
    r"blocks\.\d+\.attn1\.to_out\.0": "row",
    r"blocks\.\d+\.attn2\.to_[qkv]": "column",
    r"blocks\.\d+\.attn2\.norm_[qk]": "norm",
    r"blocks\.\d+\.attn2\.to_out\.0": "row",
    r"blocks\.\d+\.ffn\.net\.0\.proj": "column",
    r"blocks\.\d+\.ffn\.net\.2": "row",
}


def load_partitioned(
    path: Path, groups: Groups, dtype: torch.dtype, device: str, plan: Plan = WAN_PLAN, part: str = TRANSFORMER
) -> DiT:
    """This rank's share of a transformer of a model folder, in evaluation mode.

    Only the slices that this rank keeps are read from the files; under ZeRO-3 all of its tensor parallel slice, one
    layer at a time.
    Raises ValueError when the partition does not divide the network or the files do not hold it.
    """
    dit = empty(path, part)
    place(dit, groups, plan)
    set_type(dit, dtype)
    if kept_weights(path) == INT8:
        if groups.zero.group is not None:
            raise ValueError(f"{path.name} keeps its weights in 8 bits, which zero cannot divide: choose another axis")
        keep_in_int8(dit)
    with WeightFiles(path, part) as files:

        def fill(module: nn.Module, prefix: str = "", recurse: bool = False) -> None:
            module.to_empty(device=device, recurse=recurse)
            read_parameters(module, files, groups.tp.part, prefix, recurse)

        if groups.zero.group is None:
            fill(dit, recurse=True)
        else:
            divide_weights(dit, groups.zero.group, fill)
    return dit


def place(dit: DiT, groups: Groups, plan: Plan = WAN_PLAN) -> None:
    """Divides the network in place.

    Raises ValueError when heads or layer sizes do not divide, a pattern of the plan matches no layer, or a linear layer
    of a block is in no pattern: each of these would otherwise give wrong pictures and no error.
    """
    Partition(sp=groups.sp.size, tp=groups.tp.size).check_heads(dit.config.heads)
    divide_layers(dit, groups.tp, plan)
    if groups.sp.group is not None:
        exchange = Ulysses(groups.sp)
        dit.split, dit.merge = exchange.split, exchange.merge
        for block in dit.blocks:
            assert isinstance(block, Block)
            block.attn1.attend = exchange.attend  # cross-attention stays with its tokens: every rank has all the text
    if groups.batch.group is not None:
        rows = SharedRows(groups.batch)
        dit.register_forward_pre_hook(rows.own)
        dit.register_forward_hook(rows.everyones)


def divide_layers(dit: DiT, tp: Axis, plan: Plan) -> None:
    """Tensor parallelism: DeepSpeed's layers where the plan says."""
    unused = set(plan)
    for name, module in list(dit.named_modules()):
        matched = [pattern for pattern in plan if re.fullmatch(pattern, name)]
        if isinstance(module, nn.Linear) and name.startswith("blocks.") and not matched:
            raise ValueError(f"the partition plan does not say how to divide {name}")
        for pattern in matched:
            unused.discard(pattern)
            if tp.group is not None:
                owner, _, leaf = name.rpartition(".")
                setattr(dit.get_submodule(owner), leaf, divide(name, module, plan[pattern], tp))
        if isinstance(module, Attention):
            module.heads //= tp.size
    if unused:
        raise ValueError(f"the partition plan matches no layer of this transformer with {', '.join(sorted(unused))}")


def divide(name: str, module: nn.Module, kind: Kind, tp: Axis) -> nn.Module:
    """One layer's share. Raises ValueError when its size does not divide over the ranks, or it is no such layer."""
    from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer
    from deepspeed.module_inject.tp_shard import AutoTPMeta

    expected = HeadsRMSNorm if kind == "norm" else nn.Linear
    if not isinstance(module, expected):
        raise ValueError(f"the partition plan takes {name} for a {expected.__name__}, it is a {type(module).__name__}")
    size = module.weight.shape[1 if kind == "row" else 0]
    if size % tp.size:
        raise ValueError(f"{name}: its {size} channels do not divide over tp {tp.size} ranks")
    if isinstance(module, HeadsRMSNorm):
        return DividedHeadsRMSNorm(module, tp)
    layer = LinearAllreduce if kind == "row" else LinearLayer
    return layer(module, tp.group, name=name, tp_meta=AutoTPMeta(tp_grain_size=1))


class DividedHeadsRMSNorm(nn.Module):
    """`HeadsRMSNorm` where each rank holds some of the heads: the sum of squares spans all of them."""

    def __init__(self, whole: HeadsRMSNorm, tp: Axis) -> None:
        super().__init__()
        self.eps, self.group = whole.eps, tp.group
        self.width = whole.weight.shape[0]
        self.weight = nn.Parameter(whole.weight.detach().chunk(tp.size)[tp.rank].clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, n, D / tp]
        square = x.float().pow(2).sum(-1, keepdim=True)
        dist.all_reduce(square, group=self.group)
        return (x.float() * torch.rsqrt(square / self.width + self.eps)).to(x.dtype) * self.weight


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of parameters that this rank holds: of those that ZeRO-3 divides its parts, and any that are whole now."""
    tensors = {id(tensor): tensor for p in module.parameters() for tensor in (p, held(p))}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
