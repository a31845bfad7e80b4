"""A clip on a rank, from its prompt to its frames."""

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


@dataclass(frozen=True, slots=True)
class JobReady:
    """Rank 0 to itself: a job may be denoised."""

    job: int


@dataclass(frozen=True, slots=True)
class JobOver:
    """Rank 0 to itself: a job has ended beside the steps."""

    job: int


@dataclass
class RankJob:
    """A clip on a rank, from the engine's message to its frames."""

    number: int
    spec: ClipSpec
    buffer: int  # the memory file for its frames
    fingerprint: str = ""  # of its resume states; empty: it has none and saves none
    checkpoint_every: tuple[int, float] = (0, 0.0)  # steps and seconds; 0: never
    plan: list[Window] = field(default_factory=list[Window])
    window: int = 0  # the one under way
    step: int = 0  # over all windows
    cache: StepCache | None = None  # of the window under way
    skipped: int = 0  # steps, over all windows before it
    computed: Computed | None = None  # of rank 0 before it joins: the step that its cache must compute again
    solver: SolverState | None = None  # of the window under way; of rank 0 before it joins, too
    # Of rank 0:
    canvas: Canvas | None = None
    text: Tensor | None = None  # [2, L, Dt] prompt and negative prompt
    key: BatchKey | None = None  # it joins clips with the same one
    begun: bool = False  # it was in a batch
    cancelled: bool = False  # it is not wanted any more
    suspended: bool = False  # it is to make room, and to go on elsewhere from where it is
    saved: tuple[int, float] = (0, 0.0)  # step and time of its last resume state, or of its beginning here
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    spans: list[tuple[str, float, float]] = field(default_factory=list[tuple[str, float, float]])

    @property
    def leaves(self) -> bool:
        """Whether it takes no further step."""
        return self.cancelled or self.suspended

    @cached_property
    def times(self) -> list[float]:
        """The times of a window's steps, from noise to 0."""
        from model.network.diffusion import schedule

        return times_from(schedule(self.spec.steps, self.spec.shift, self.spec.solver), self.spec.strength or 1.0)

    @property
    def steps(self) -> int:
        """Total steps over all windows."""
        return len(self.plan) * (len(self.times) - 1)

    @property
    def checkpoint_due(self) -> bool:
        """Whether it is time to save a resume state."""
        (steps, seconds), (step, when) = self.checkpoint_every, self.saved
        return 0 < steps <= self.step - step or 0 < seconds <= time.monotonic() - when

    @property
    def cache_state(self) -> tuple[int, Computed | None]:
        """Steps that its step cache skipped so far, and the last one that it did not, in this window."""
        if self.cache is None or self.solver is None:
            return self.skipped, None
        last = self.cache.last if self.solver.step else None  # between two windows it is of the one before
        return self.skipped + self.cache.skipped, last and replace(last, x=last.x.cpu())

    def spent(self, stage: str, began: float, now: float | None = None, share: int = 1) -> None:
        """Adds the time from `began` to `now` (unix seconds) to a stage; `share` clips were in it together."""
        now = now or time.time()
        self.seconds[stage] += (now - began) / share
        if self.spans and self.spans[-1][0] == stage:  # many steps, one span
            began = self.spans.pop()[1]
        self.spans.append((stage, began, now))


def given_frames(spec: ClipSpec) -> tuple[Frames, Frames]:
    """The frames that a clip begins and ends with, [1, n, H, W, 3] each."""
    nothing: Frames = np.zeros((0, spec.height, spec.width, 3), np.uint8)
    start = nothing if spec.start is None or spec.strength is not None else spec.start
    return start[None], (nothing if spec.end is None else spec.end)[None]


def draft(spec: ClipSpec, window: Window) -> Frames:
    """The frames of the edited clip in a window, [T, H, W, 3]; beyond its end its last frame is held."""
    assert spec.start is not None
    places = np.arange(window.first, window.first + window.frames).clip(0, len(spec.start) - 1)
    return spec.start[places]
