"""Rank 0's decisions: which clips take the next step, which join, which leave.

Plain values: no tensors, no processes, no clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from model.engine.job import RankJob


@dataclass(slots=True)
class Turn:
    """A decision on one step."""

    clips: list[int] = field(default_factory=list[int])  # jobs that take the step: those under way, then those who join
    leaving: list[RankJob] = field(default_factory=list[RankJob])  # cancelled or suspended: they take no further step


class Scheduler:
    """The jobs of rank 0, and a queue of those that may be denoised.

    A batch holds at most `size` clips, all with one key. Clips join in the order in which they became ready: one with
    another key waits for the batch to empty, and holds up those behind it, so that none waits for ever.
    """

    def __init__(self, size: int, jobs: dict[int, RankJob]) -> None:
        """jobs: where all jobs are kept that are not done; shared with the caller."""
        self.size, self.jobs = size, jobs
        self.ready: deque[RankJob] = deque()

    def enqueue(self, number: int) -> None:
        """A job may be denoised. One that was at it, and begins another window, goes first."""
        job = self.jobs[number]
        if job.begun:
            self.ready.appendleft(job)
        else:
            self.ready.append(job)

    def cancel(self, number: int) -> None:
        """Drops a job at its next step; nothing to do where it is done."""
        if number in self.jobs:
            self.jobs[number].cancelled = True

    def suspend(self, number: int) -> None:
        """Saves and drops a job at its next step; nothing to do where it is done."""
        if number in self.jobs:
            self.jobs[number].suspended = True

    def next_turn(self, batch: Sequence[int]) -> Turn:
        """Decides on the next step, while the jobs in `batch` are under way."""
        turn = Turn()
        for number in batch:
            if self.jobs[number].leaves:
                turn.leaving.append(self.jobs[number])
            else:
                turn.clips.append(number)
        while self.ready and len(turn.clips) < self.size:
            if self.ready[0].leaves:
                turn.leaving.append(self.ready.popleft())
            elif not turn.clips or self.ready[0].key == self.jobs[turn.clips[0]].key:
                turn.clips.append(self.ready.popleft().number)
            else:
                break
        return turn
