"""Classifier-free guidance over two ranks: each computes one half, both get the sum."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from model.network.dit import DiT
from model.network.layers import TextKV
from model.parallel.mesh import ALONE, Axis, Groups, gather


def total(x: Tensor, groups: Groups, guided: bool) -> Tensor:
    """The sum of x, which is of one clip, over all ranks of the engine, the same to the bit on each of them.

    x itself is overwritten. Ranks of the batch axis for which there is no row repeat others' and do not count.
    """
    if groups != ALONE:
        if groups.batch.rank > (guided and groups.cfg.group is None):
            x.zero_()
        dist.all_reduce(x)
    return x


def own_text(text: Tensor, negative: Tensor, cfg: Axis) -> Tensor:
    """This rank's text, of prompts and negative prompts [B, L, Dt]: both [2B, L, Dt] where it is alone, else one."""
    if cfg.group is None:
        return torch.cat((text, negative))
    return text if cfg.rank == 0 else negative


def both_halves(dit: DiT, x: Tensor, times: Tensor, text: Tensor | list[TextKV], cfg: Axis) -> tuple[Tensor, Tensor]:
    """The conditional and the unconditional velocity of x [B, C, T, H, W] at times [B] or [B, S].

    `text` is this rank's (`own_text`), or `dit.precompute_kv` of it. On one rank the two are one batch of 2B; over two
    ranks of the cfg axis each computes one and they exchange them.
    """
    if cfg.group is None:
        velocity = dit(torch.cat((x, x)), torch.cat((times, times)), text)
        conditional, unconditional = velocity.chunk(2)
    else:
        conditional, unconditional = gather(dit(x, times, text), cfg)
    return conditional, unconditional
