"""The word of rank 0 between two steps: which clips take part, and how those that join begin.

All ranks must call the same function here at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

NONE = 1 << 62  # the oldest job where there is none


@dataclass(frozen=True, slots=True)
class NextStep:
    """The jobs of the next step (None: the ranks end), and the oldest job that is not done."""

    clips: list[int] | None
    oldest: int


@dataclass(frozen=True, slots=True)
class Start:
    """How a clip enters the batch."""

    window: int
    step: int  # of the window, that it goes on from
    computed: int  # the step that its step cache must compute again; -1: none
    text: Tensor  # [2, L, Dt] prompt and negative prompt
    x: Tensor  # [1 + n, C, T, H, W] the solver's latents, its past, and where `computed` says so the input of that step


def share_step(step: NextStep | None, size: int, world: int) -> NextStep:
    """Rank 0's decision on all ranks. step: None on the others. size: of a batch."""
    if world == 1:
        assert step is not None
        return step
    word = torch.full((2 + size,), -1, dtype=torch.int64)
    if step is not None and step.clips is not None:
        word[: 2 + len(step.clips)] = torch.tensor([len(step.clips), step.oldest, *step.clips])
    dist.broadcast(word, 0)
    count, oldest, *numbers = word.tolist()
    return NextStep(None if count < 0 else numbers[:count], oldest)


def share_start(start: Start | None, world: int) -> Start:
    """Rank 0's start of a clip on all ranks, its tensors on the CPU. start: None on the others."""
    if world == 1:
        assert start is not None
        return start
    sizes = torch.tensor([0] * 11 if start is None else _sizes(start))
    dist.broadcast(sizes, 0)
    window, step, computed, *shape = sizes.tolist()
    text, x = (start.text, start.x) if start is not None else (torch.empty(shape[:3]), torch.empty(shape[3:]))
    dist.broadcast(text, 0)
    dist.broadcast(x, 0)
    return Start(window, step, computed, text, x)


def _sizes(start: Start) -> list[int]:
    return [start.window, start.step, start.computed, *start.text.shape, *start.x.shape]
