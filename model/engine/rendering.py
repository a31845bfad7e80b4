"""Clips under way: handed to the ranks, watched, and routed back to the caller as they are done.

A job is one clip. There are always some more under way than are denoised together: while the caller encodes and stores
one, the ranks decode the next, denoise others and encode the prompts of those that follow.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import TypeAlias

from model.engine import buffers
from model.engine.clip import ClipSpec, EngineError, RankHung, RenderedClip, RenderFailed, SavedState
from model.engine.messages import (
    CancelClip,
    ClipBegan,
    ClipDone,
    ClipDropped,
    ClipFailed,
    ClipSaved,
    Ended,
    FromRank,
    RankAtWork,
    RankFailed,
    RankReady,
    RenderClip,
    StepsTaken,
    SuspendClip,
)
from model.engine.ranks import Ranks

Made: TypeAlias = tuple[int, RenderedClip | RenderFailed]  # a clip's place among those asked for, and its outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Callbacks:
    """The caller's side of `Engine.render`, which says what each is for."""

    on_step: Callable[[str, int, int], None]
    cancelled: Callable[[], set[str]]
    on_checkpoint: Callable[[SavedState], None] | None
    checkpoint_every: tuple[int, float]
    leave: Callable[[], bool]


@dataclass(slots=True)
class EngineJob:
    """A clip under way, as the engine knows it."""

    number: int
    place: int  # among the clips to render
    spec: ClipSpec
    buffer: int  # the memory file for its frames
    fingerprint: str  # of its resume states; empty: it has none and saves none
    cancelled: bool = False  # the ranks know that it is not wanted any more
    suspended: bool = False  # they know that it is to make room
    steps: list[float] = field(default_factory=list[float])  # when each ended


class Rendering:
    """The jobs of some ranks. One call of `clips` at a time."""

    def __init__(self, ranks: Ranks, fingerprint: Callable[[ClipSpec], str]) -> None:
        self.ranks, self.fingerprint = ranks, fingerprint
        self.free = list(range(len(ranks.buffers)))  # buffers that no job uses
        self.abandoned: dict[int, int] = {}  # jobs that their caller has left, and their buffers
        self.jobs: dict[int, EngineJob] = {}
        self.numbers = count()

    def clips(
        self, specs: Mapping[int, ClipSpec], callbacks: Callbacks, timeout: Callable[[], float]
    ) -> Generator[Made]:
        """Yields each clip, by its place, as it is done.

        timeout: says the seconds without a message after which the ranks count as hung. Raises RankHung, RankDied,
        OutOfMemory.
        """
        waiting = deque(specs.items())
        heard = time.monotonic()
        try:
            while waiting or self.jobs:
                self._command(waiting, callbacks)
                message = self.ranks.next_message()
                if message is None:
                    if time.monotonic() - heard > (bound := timeout()):
                        raise RankHung(f"no step for {bound:g} s; {self.ranks.states()}")
                    continue
                heard = time.monotonic()
                if (ended := self._route(message, callbacks)) is None:
                    continue
                job = self.jobs.pop(ended.job)
                outcome = self._outcome(job, ended)
                self.free.append(job.buffer)
                if outcome is not None and job.spec.clip_id not in callbacks.cancelled():
                    yield job.place, outcome
                    heard = time.monotonic()
        except EngineError:  # the ranks are at an end: there is nothing to cancel
            self.jobs = {}
            raise
        finally:
            self._abandon()

    def _command(self, waiting: deque[tuple[int, ClipSpec]], callbacks: Callbacks) -> None:
        """Tells the ranks what the caller wants: clips that begin, and clips that stop."""
        cancelled = callbacks.cancelled()
        if leaves := callbacks.leave():
            waiting.clear()
        while waiting and self.free:
            place, spec = waiting.popleft()
            if spec.clip_id not in cancelled:
                self._submit(place, spec, callbacks)
        for job in self.jobs.values():
            if job.spec.clip_id in cancelled:
                self._cancel(job)
            elif leaves and not job.suspended:
                job.suspended = True
                self.ranks.tell(SuspendClip(job=job.number))

    def _submit(self, place: int, spec: ClipSpec, callbacks: Callbacks) -> None:
        resumable = callbacks.on_checkpoint is not None or spec.resume_state
        fingerprint = self.fingerprint(spec) if resumable else ""
        job = EngineJob(next(self.numbers), place, spec, self.free.pop(0), fingerprint)
        self.jobs[job.number] = job
        self.ranks.tell_all(
            RenderClip(
                job=job.number,
                clip=spec,
                buffer=job.buffer,
                fingerprint=fingerprint,
                checkpoint_every=callbacks.checkpoint_every,
            )
        )

    def _route(self, message: FromRank, callbacks: Callbacks) -> Ended | None:
        """Passes a message on to the caller; returns the one that ends a job of his."""
        match message:
            case StepsTaken():
                for number, step, steps in message.steps:
                    if job := self.jobs.get(number):
                        job.steps.append(message.time)
                        callbacks.on_step(job.spec.clip_id, step, steps)
            case ClipBegan():
                if job := self.jobs.get(message.job):
                    callbacks.on_step(job.spec.clip_id, message.step, job.spec.steps)
            case ClipSaved():
                job = self.jobs.get(message.job)
                if job and not job.cancelled and callbacks.on_checkpoint is not None:
                    callbacks.on_checkpoint(
                        SavedState(
                            clip_id=job.spec.clip_id, step=message.step, fingerprint=job.fingerprint, data=message.data
                        )
                    )
            case ClipDone() | ClipFailed() | ClipDropped():
                if (buffer := self.abandoned.pop(message.job, None)) is None:
                    return message
                self.free.append(buffer)
            case RankAtWork():
                pass  # that it came was the message
            case RankReady() | RankFailed():
                raise AssertionError(f"{message} is `Ranks`' to read")
        return None

    def _outcome(self, job: EngineJob, ended: Ended) -> RenderedClip | RenderFailed | None:
        """The result of a job, its frames copied out of its buffer; None where it was dropped."""
        if isinstance(ended, ClipDropped):
            return None
        if isinstance(ended, ClipFailed):
            return RenderFailed(job.spec.clip_id, ended.reason)
        shape = (job.spec.frames, job.spec.height, job.spec.width, 3)
        frames = buffers.read(self.ranks.buffers[job.buffer], shape)
        if isinstance(frames, int):
            return RenderFailed(job.spec.clip_id, f"rank 0 wrote {frames} bytes of frames, more were announced")
        return RenderedClip(
            clip_id=job.spec.clip_id,
            frames=frames,
            seconds=ended.seconds,
            spans=ended.spans,
            steps=tuple(job.steps),
            peak_bytes=ended.peak_bytes,
            skipped_steps=ended.skipped_steps,
        )

    def _cancel(self, job: EngineJob) -> None:
        """Rank 0 tells the others at the next step, so that all stop at the same one."""
        if not job.cancelled:
            job.cancelled = True
            self.ranks.tell(CancelClip(job=job.number))

    def _abandon(self) -> None:
        """Cancels the jobs under way: the caller has left."""
        with suppress(OSError, EngineError):
            for job in self.jobs.values():
                self.abandoned[job.number] = job.buffer
                self._cancel(job)
        self.jobs = {}
