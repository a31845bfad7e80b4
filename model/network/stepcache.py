"""First-block caching: at a step that changes little, most of the transformer is not computed but reused.

The first block runs at every step. What it adds to the tokens is compared with what it added at the last step that was
computed in full. Where the sum of the absolute changes is below `threshold` times the sum of the absolute values, the
other blocks are left out, and what they added together at that step is added once more. The embeddings, the first block
and the head always run, so the velocity still knows its time.

The rule is that of ParaAttention's First Block Cache (Cheng 2024, github.com/chengzeyi/ParaAttention), which diffusers
has as `FirstBlockCacheConfig`; a test compares the two. TeaCache (Liu et al. 2024, arXiv 2411.19108), on which it
builds, decides before any block runs: it foretells the change from the time-modulated input with a polynomial that is
fitted to each model, and adds up what it foretold since the last full step. Measuring needs no fit and costs a block.

Beyond that:
* The first and the last step of a window are computed in full, and so is the first of each expert: there is nothing to
  compare with, and nothing later could repair the last one.
* Tokens at time 0 (frames that are known) and pads do not count. They stand still, and would make a step look small.
* Both halves of guidance and all ranks decide together. Ranks that took different ways would wait for each other for
  ever.
* A clip decides for itself, and so is never batched with others: its pixels must not depend on its neighbours.

It keeps two tensors of the tokens' size, [2, n, D] each where guidance runs both halves, divided over the ranks as the
tokens are. A clip that is to go on elsewhere does not take them along: they follow from the latents that the last full
step was given, which are many times smaller. That step is computed once more, to the same bits.

It knows no process groups.
Letters: B halves of guidance, N tokens of the clip, n tokens of this rank, S times, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from model.network.dit import DiT, Layer, in_order
from model.network.patch import grid

V = TypeVar("V")  # a velocity, or those of both halves of guidance


@dataclass(frozen=True, slots=True)
class Computed:
    """A step that was computed in full."""

    step: int  # of its window
    x: Tensor  # [C, T, H, W], its input


class StepCache:
    """First-block cache of one window of one clip.

    steps: how many there will be. total: sums a tensor over all ranks that compute the clip, in place or not.
    step: those that were taken before it, and `last`: of these the last one that was computed in full, which must be
    computed again before the clip goes on.
    """

    def __init__(
        self,
        threshold: float,
        steps: int,
        total: Callable[[Tensor], Tensor] = lambda x: x,
        *,
        step: int = 0,
        last: Computed | None = None,
    ) -> None:
        self.threshold, self.steps, self.total, self.step, self.last = threshold, steps, total, step, last
        self.skipped = 0
        self._dit: DiT | None = None  # whose step was computed last
        self._added: tuple[Tensor, Tensor] | None = None  # [B, n, D] there: by its first block, by all others together

    def over(self, dit: DiT, predict: Callable[[Tensor, Tensor], V]) -> Callable[[Tensor, Tensor], V]:
        """`predict`, which runs `dit` once a call, with this cache in between. A call is a step.

        It is given latents [1, C, T, H, W] and times [1] or [1, S]. With several experts each gets its own `predict`
        from the one cache.
        """

        def cached(x: Tensor, times: Tensor) -> V:
            assert len(x) == 1, "a step cache serves one clip"
            now, skipped = self.step, self.skipped
            self.step += 1
            if dit is not self._dit:
                self._dit, self._added = dit, None
            run = dit.run
            dit.run = partial(self._run, _counted(dit, x, times))
            try:
                velocity = predict(x, times)
            finally:
                dit.run = run
            if self.skipped == skipped:
                self.last = Computed(now, x[0])
            return velocity

        return cached

    @property
    def left(self) -> int:
        """Steps that there will be after the one under way."""
        return self.steps - self.step

    def _run(self, counted: Tensor, layers: Sequence[Layer], x: Tensor) -> Tensor:
        """x [B, n, D] through all layers, or through the first one and past the others."""
        y = layers[0](x)
        first = y - x
        others = self._reusable(first, counted)
        if others is not None:
            self.skipped += 1
            return y + others
        self._added = None  # the blocks need the memory
        z = in_order(layers[1:], y)
        self._added = (first, z - y) if self.left else None
        return z

    def _reusable(self, first: Tensor, counted: Tensor) -> Tensor | None:
        """The other blocks' sum at the last full step, if the first one adds nearly what it added there; else None."""
        if not self.left or self._added is None:
            return None
        before, others = self._added
        return others if self._change(first, before, counted) < self.threshold else None  # a NaN is below nothing

    def _change(self, now: Tensor, then: Tensor, counted: Tensor) -> float:
        """The relative L1 distance of two [B, n, D], on all ranks the same."""
        parts = [(x.abs().sum(-1, dtype=torch.float32) * counted).sum(dtype=torch.float64) for x in (now - then, then)]
        change, size = self.total(torch.stack(parts)).tolist()
        return change / size if size else math.inf


def _counted(dit: DiT, x: Tensor, times: Tensor) -> Tensor:
    """[1, n] 1 for each of this rank's tokens that is being made, 0 for what is known and for pads."""
    cells = grid(x, dit.config.patch)
    made = (times.reshape(1, -1) > 0).float()  # [1, S]
    return dit.split(made.repeat_interleave(cells[0] * cells[1] * cells[2] // made.shape[1], 1), 1)
