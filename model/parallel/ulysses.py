"""Sequence parallelism: DeepSpeed's DistributedAttention (Ulysses) over padded tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from model.network.layers import TextKV, attention
from model.parallel.mesh import Axis, gather


class Ulysses:
    """DeepSpeed-Ulysses: each rank holds some of the tokens; for self-attention they trade tokens against heads.

    A sequence that does not divide is padded to one that does. The pads are cut from keys and values before attention
    and from the sequence at the end, so that they change nothing.
    """

    def __init__(self, sp: Axis) -> None:
        from deepspeed.sequence.layer import DistributedAttention

        self.sp = sp
        self.count = 0  # true tokens of the sequence last split
        local: Any = self.local  # declared a Module there, but only ever called
        group: Any = sp.group
        self.distributed = DistributedAttention(local, group, scatter_idx=2, gather_idx=1)

    def split(self, x: Tensor, dim: int) -> Tensor:
        """[..., N, ...] -> [..., n, ...]: this rank's tokens, zeros where the sequence has ended."""
        self.count = x.shape[dim]
        share = -(-self.count // self.sp.size)
        start = min(self.sp.rank * share, self.count)
        mine = x.narrow(dim, start, min(share, self.count - start))
        if mine.shape[dim] < share:
            missing = list(mine.shape)
            missing[dim] = share - mine.shape[dim]
            mine = torch.cat((mine, mine.new_zeros(missing)), dim)
        return mine.contiguous()

    def merge(self, x: Tensor, dim: int) -> Tensor:
        """[..., n, ...] -> [..., N, ...] on every rank, the pads left off."""
        return torch.cat(gather(x, self.sp), dim).narrow(dim, 0, self.count)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [B, n, H, K] each
        return self.distributed(q, k, v, 0)

    def local(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [B, padded N, H / sp, K] each
        return attention(q, k[:, : self.count], v[:, : self.count]).contiguous()


class SharedRows:
    """A batch whose rows (clips, and halves of guidance) are computed by different ranks.

    All ranks are called with all rows and get all velocities. Every rank computes as many rows, so where they do not
    divide some are computed twice: a rank that waits for the others' weights must run along anyway.
    """

    def __init__(self, batch: Axis) -> None:
        self.batch = batch
        self.count = self.share = 0  # rows of the batch last seen, and of each rank

    def own(self, _: nn.Module, given: tuple[Tensor, Tensor, Tensor | list[TextKV]]) -> tuple[Any, ...]:
        """Latents [R, C, T, H, W], times [R, ...] and text [R, L, Dt] (or its keys and values) -> this rank's rows."""
        latents, times, text = given
        self.count = latents.shape[0]
        self.share = -(-self.count // self.batch.size)
        start = min(self.batch.rank * self.share, self.count - self.share)
        mine = slice(start, start + self.share)
        own = text[mine] if isinstance(text, Tensor) else [(k[mine], v[mine]) for k, v in text]
        return latents[mine], times[mine], own

    def everyones(self, _: nn.Module, __: tuple[Any, ...], velocity: Tensor) -> Tensor:
        """This rank's rows [share, C, T, H, W] -> those of all [R, C, T, H, W]."""
        parts: list[Tensor] = []
        for rank, part in enumerate(gather(velocity, self.batch)):
            seen = min(rank * self.share, self.count)  # what earlier ranks have computed
            parts.append(part[seen - min(rank * self.share, self.count - self.share) :])
        return torch.cat(parts)
