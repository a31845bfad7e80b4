"""The decoder of an autoencoder divided over the ranks of an engine, by rows of the picture.

Every rank decodes some rows. A convolution that reaches beyond them gets the missing row from the neighbour, and an
attention layer sees all rows, so the picture is the one that a single rank decodes, without seams. Time is not divided:
decoders are causal, and each latent frame waits for what the one before left behind.

Letters: B batch, C channels, T/H/W frames/rows/columns, h rows of this rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.network.vae import to_pixels

if TYPE_CHECKING:
    from model.media.windows import Frames
    from model.network.vae import VAE, WanVAE


class DividedDecoder:
    """The decoder of `vae` on rank `rank` of `world`. It changes the network: `vae.decode` alone is no longer right."""

    def __init__(self, vae: VAE | WanVAE, rank: int, world: int) -> None:
        self.vae, self.rank, self.world = vae, rank, world
        self.shares: list[int] = []  # latent rows of each rank while they decode together
        if world == 1:
            return
        for module in vae.decoder.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d) and (reach := module.kernel_size[-2] // 2):
                self._divide(module, reach)
            elif type(module).__name__ == "WanAttentionBlock":
                module.register_forward_pre_hook(self._before_attention)
                module.register_forward_hook(self._after_attention)

    def decode(self, latents: Tensor) -> Frames | None:
        """latents [1, C, T, H, W], the same on all ranks -> frames [T, H, W, 3] on rank 0, None on the others."""
        rows = latents.shape[-2]
        if rows < self.world:  # too few to divide
            return to_pixels(self.video(latents))[0] if self.rank == 0 else None
        self.shares = [rows * (k + 1) // self.world - rows * k // self.world for k in range(self.world)]
        first = sum(self.shares[: self.rank])
        try:
            mine = to_pixels(self.video(latents.narrow(-2, first, self.shares[self.rank])))[0]
            return self._gathered(mine)
        finally:
            self.shares = []

    def video(self, latents: Tensor) -> Tensor:
        """latents [1, C, T, h, W] -> video [1, 3, T, h, W] in -1..1, the neighbours' rows taken into account."""
        return self.vae.decode(latents.contiguous())

    def _divide(self, conv: nn.Conv2d | nn.Conv3d, reach: int) -> None:
        """Rows of padding are replaced by those of the neighbours; at the picture's border they are still zeros."""
        padding = [int(size) for size in conv.padding]
        conv.padding = (*padding[:-2], 0, padding[-1])  # pyright: ignore
        if (own := getattr(conv, "_padding", None)) is not None:  # diffusers' causal convolutions pad by themselves
            conv._padding = (*own[:2], 0, 0, *own[4:])  # pyright: ignore

        def extend(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:  # the input, and perhaps earlier frames
            return tuple(self._extended(x, reach) if isinstance(x, Tensor) else x for x in given)

        conv.register_forward_pre_hook(extend)

    def _extended(self, x: Tensor, reach: int) -> Tensor:
        """[..., h, W] -> [..., reach + h + reach, W]."""
        above, below = (x.new_zeros(*x.shape[:-2], reach, x.shape[-1]) for _ in range(2))
        steps: list[dist.P2POp] = []
        if self.shares and self.rank > 0:
            steps.append(dist.P2POp(dist.isend, x[..., :reach, :].contiguous(), self.rank - 1))
            steps.append(dist.P2POp(dist.irecv, above, self.rank - 1))
        if self.shares and self.rank < self.world - 1:
            steps.append(dist.P2POp(dist.isend, x[..., -reach:, :].contiguous(), self.rank + 1))
            steps.append(dist.P2POp(dist.irecv, below, self.rank + 1))
        for step in dist.batch_isend_irecv(steps) if steps else ():
            step.wait()
        return torch.cat((above, x, below), -2)

    def _before_attention(self, _: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        return (self._all_rows(given[0]),)

    def _after_attention(self, _: nn.Module, __: tuple[Tensor], made: Tensor) -> Tensor:
        return self._own_rows(made)

    def _all_rows(self, x: Tensor) -> Tensor:
        """[..., h, W] -> [..., H, W]; shares may differ by one latent row, so they are padded on the way."""
        if not self.shares:
            return x
        scale, most = x.shape[-2] // self.shares[self.rank], max(self.shares)
        padded = x.new_zeros(*x.shape[:-2], scale * most, x.shape[-1])
        padded[..., : x.shape[-2], :] = x
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return torch.cat([part[..., : scale * rows, :] for part, rows in zip(parts, self.shares, strict=True)], -2)

    def _own_rows(self, x: Tensor) -> Tensor:
        if not self.shares:
            return x
        scale = x.shape[-2] // sum(self.shares)
        return x.narrow(-2, scale * sum(self.shares[: self.rank]), scale * self.shares[self.rank])

    def _gathered(self, mine: Frames) -> Frames | None:
        """[T, h, W, 3] of every rank -> [T, H, W, 3] on rank 0."""
        if self.rank > 0:
            dist.send(torch.from_numpy(mine), 0)
            return None
        parts, scale = [mine], mine.shape[1] // self.shares[0]
        for rank in range(1, self.world):
            part = torch.empty(len(mine), scale * self.shares[rank], *mine.shape[2:], dtype=torch.uint8)
            dist.recv(part, rank)
            parts.append(part.numpy())
        return np.concatenate(parts, 1)
