"""A rank's side of one clip: what is known of it, from its prompt to its frames."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from model.engine.clip import ClipSpec
from model.media.windows import Canvas, Frames, Window, times_from

if TYPE_CHECKING:
    from torch import Tensor

    from model.engine.batch import BatchKey
    from model.network.diffusion import SolverState
    from model.network.stepcache import Computed, StepCache

STAGES = ("text", "denoise", "decode")


@dataclass
class Job:
    """A clip on this rank, from the parent's message to its frames."""

    number: int
    spec: ClipSpec
    slot: int  # which memory file its frames go to
    of: str = ""  # what must be alike where it goes on from a checkpoint; without it there are none
    every: tuple[int, float] = (0, 0.0)  # steps and seconds between two checkpoints; 0: as many as you like
    plan: list[Window] = field(default_factory=list[Window])
    window: int = 0  # the one under way
    step: int = 0  # over all windows
    cache: StepCache | None = None  # of the window under way
    skipped: int = 0  # steps, over all windows before it
    computed: Computed | None = None  # of rank 0 before it joins: the step that its cache is to compute again
    here: SolverState | None = None  # where the window under way is; of rank 0 before it joins, too
    # Of rank 0:
    canvas: Canvas | None = None
    text: Tensor | None = None  # [2, L, Dt] prompt and negative prompt
    kind: BatchKey | None = None  # whom it may sit beside
    begun: bool = False  # its turn has come
    dropped: bool = False  # nobody wants it any more
    leaves: bool = False  # it is to make room, and to go on elsewhere from where it is
    saved: tuple[int, float] = (0, 0.0)  # step and time of its last checkpoint, or of its beginning here
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    spans: list[tuple[str, float, float]] = field(default_factory=list[tuple[str, float, float]])

    @cached_property
    def times(self) -> list[float]:
        """Of the steps of a window."""
        from model.network.diffusion import schedule

        return times_from(schedule(self.spec.steps, self.spec.shift, self.spec.solver), self.spec.strength or 1.0)

    @property
    def steps(self) -> int:
        """Of all windows."""
        return len(self.plan) * (len(self.times) - 1)

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        (steps, seconds), (step, when) = self.every, self.saved
        return 0 < steps <= self.step - step or 0 < seconds <= time.monotonic() - when

    @property
    def cache_state(self) -> tuple[int, Computed | None]:
        """What a checkpoint keeps of its cache: steps skipped so far, and the last one that was not, in this window."""
        if self.cache is None or self.here is None:
            return self.skipped, None
        last = self.cache.last if self.here.step else None  # which between two windows is of the one before
        return self.skipped + self.cache.skipped, last and replace(last, x=last.x.cpu())

    def spent(self, stage: str, began: float, now: float | None = None, share: int = 1) -> None:
        """From `began` to `now` (unix seconds) it was in this stage, one of so many clips."""
        now = now or time.time()
        self.seconds[stage] += (now - began) / share
        if self.spans and self.spans[-1][0] == stage:  # many steps, one span
            began = self.spans.pop()[1]
        self.spans.append((stage, began, now))


def given_frames(spec: ClipSpec) -> tuple[Frames, Frames]:
    """What a clip begins and ends with, [1, n, H, W, 3] each."""
    nothing: Frames = np.zeros((0, spec.height, spec.width, 3), np.uint8)
    start = nothing if spec.start is None or spec.strength is not None else spec.start
    return start[None], (nothing if spec.end is None else spec.end)[None]


def draft(spec: ClipSpec, window: Window) -> Frames:
    """The part of what is edited that a window covers, [T, H, W, 3]; a short one is held."""
    assert spec.start is not None
    places = np.arange(window.first, window.first + window.frames).clip(0, len(spec.start) - 1)
    return spec.start[places]
