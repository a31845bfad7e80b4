"""A rank at work: takes the clips that rank 0 has chosen into its batch, and computes step after step.

All ranks get the same clips in the same order and take every denoising step in lockstep (`model.engine.lockstep`).
Beside the transformer's own collectives there are two: the next step's clips, and the start of each that joins.

Rank 0 decides (`model.engine.scheduler`), encodes prompts and given frames (`model.engine.stages`); all ranks decode,
each some rows of the picture (`model.parallel.vae_rows`). An engine of one GPU does that on a thread of its own while
steps go on, others between two steps.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch

from model.config import Partition
from model.engine import lockstep
from model.engine.batch import Batch
from model.engine.job import JobOver, JobReady, RankJob
from model.engine.loader import load
from model.engine.lockstep import NextStep, Start
from model.engine.messages import (
    CancelClip,
    ClipBegan,
    ClipDropped,
    ClipFailed,
    ClipSaved,
    Ended,
    Exit,
    FromRank,
    RankAtWork,
    RankReady,
    RankSettings,
    RenderClip,
    StepsTaken,
    SuspendClip,
    ToRank,
)
from model.engine.process import Fatal, Inbox, PeakMemory, SideThread
from model.engine.resume import ResumeState, to_bytes
from model.engine.scheduler import Scheduler
from model.engine.stages import Stages
from model.engine.wire import Wire
from model.media.windows import windows
from model.network.diffusion import SolverState, in_model_times, model_time, solve
from model.network.stepcache import Computed, StepCache
from model.parallel.guidance import total

IDLE = 1.0  # seconds after which rank 0 says that there is nothing to do: the others wait for its word


class Runner:
    """One rank's share of the model, and the clips that it computes."""

    def __init__(
        self, settings: RankSettings, wire: Wire[FromRank, ToRank], inbox: Inbox, fatal: Fatal, started: float
    ) -> None:
        """Loads this rank's part, tests it and tells the engine. started: perf_counter at the start of the imports."""
        networks = load(settings, started)
        self.rank, self.world = settings.rank, Partition.parse(settings.partition).world
        self.device, self.frame_step, self.wire, self.inbox = settings.device, settings.frame_step, wire, inbox
        self.batch = Batch(
            networks.experts,
            size=settings.micro_batch,
            boundary=settings.boundary,
            groups=networks.groups,
            at_work=self._at_work,
        )
        self.jobs: dict[int, RankJob] = {}  # of rank 0: all that are not done; of the others: those under way
        self.scheduler = Scheduler(settings.micro_batch, self.jobs)  # rank 0 asks its own
        peak = PeakMemory(settings.device, self.world)
        self.stages = Stages(networks, settings, wire, inbox.messages.put, peak)
        self.side = SideThread(fatal) if settings.device == "cuda" and self.world == 1 else None
        wire.send(RankReady(info=networks.info))

    @property
    def at_work(self) -> list[str]:
        """Ids of the clips that are being denoised."""
        return [self.jobs[number].spec.clip_id for number in self.batch]

    def _at_work(self) -> None:
        if self.rank == 0:
            self.wire.send(RankAtWork())

    def serve(self) -> None:
        """Takes step after step, until the engine says exit."""
        while True:
            step = lockstep.share_step(self._next_step() if self.rank == 0 else None, self.batch.size, self.world)
            if step.clips is None:
                return
            if self.rank:
                for number in [number for number in self.jobs if number < step.oldest]:
                    del self.jobs[number]
            for number in set(self.batch) - set(step.clips):
                self.batch.leave(number)
            for number in step.clips:
                if number not in self.batch:
                    self._join(number)
            if len(self.batch):
                self._step()

    # --- rank 0: who takes part in the next step --------------------------------------------------------------------

    def _next_step(self) -> NextStep:
        """Reads the inbox, waiting a moment where there is nothing to do, and decides."""
        wait = not len(self.batch) and not self.scheduler.ready
        with suppress(queue.Empty):
            while True:
                message = self.inbox.messages.get(wait, IDLE) if wait else self.inbox.messages.get_nowait()
                if isinstance(message, Exit):
                    return NextStep(None, lockstep.NONE)
                self._take(message)
                wait = False
        turn = self.scheduler.next_turn(list(self.batch))
        for job in turn.leaving:
            if job.begun and not job.cancelled:
                self._save(job)
            self._end(ClipDropped(job=job.number))
        return NextStep(turn.clips, min(self.jobs, default=lockstep.NONE))

    def _take(self, message: RenderClip | CancelClip | SuspendClip | JobReady | JobOver) -> None:
        match message:
            case RenderClip():
                job = self.jobs[message.job] = _job(message)
                self._beside(partial(self.stages.prepare, job), job.spec.clip_id)
            case JobReady(number):
                self.scheduler.enqueue(number)
            case CancelClip():
                self.scheduler.cancel(message.job)
            case SuspendClip():
                self.scheduler.suspend(message.job)
            case JobOver(number):
                del self.jobs[number]

    def _end(self, message: Ended) -> None:
        """The job has ended between two steps."""
        self.wire.send(message)
        del self.jobs[message.job]

    def _save(self, job: RankJob) -> None:
        """Sends the engine a job's resume state; all ranks have the same latents. Nothing where these are not finite:
        its end will say so.
        """
        job.saved = job.step, time.monotonic()
        if job.solver is None or not job.fingerprint:
            return
        solver = SolverState(job.solver.x.cpu(), job.solver.step, tuple(tensor.cpu() for tensor in job.solver.past))
        if not all(bool(tensor.isfinite().all()) for tensor in (solver.x, *solver.past)):
            return
        assert job.canvas is not None
        pixels = job.canvas.pixels[0] if job.window else None
        skipped, last = (None, None) if job.spec.step_cache is None else job.cache_state
        state = ResumeState(job.window, solver, pixels, skipped, last)
        self.wire.send(ClipSaved(job=job.number, step=job.step, data=to_bytes(state, job.fingerprint)))

    # --- all ranks ----------------------------------------------------------------------------------------------------

    def _join(self, number: int) -> None:
        """Takes a clip into the batch."""
        start = lockstep.share_start(self._start(self.jobs[number]) if self.rank == 0 else None, self.world)
        job = self._job(number)
        spec, job.window = job.spec, start.window
        known = job.plan[start.window].known(self.frame_step)
        x, *past = start.x.to(self.device)
        last = None if start.computed < 0 else Computed(start.computed, past.pop())
        recompute = None if last is None else model_time(job.times[last.step], spec.solver)
        job.solver = SolverState(x, start.step, tuple(past))
        solver = in_model_times(solve(job.solver, job.times, spec.solver), spec.solver)
        if spec.step_cache is not None:
            steps, guided = len(job.times) - 1, spec.guidance != 1
            summed = partial(total, groups=self.batch.groups, guided=guided)
            job.cache = StepCache(spec.step_cache, steps, summed, step=start.step, last=last)
        text, negative = start.text
        self.batch.join(
            number, solver, text, negative, spec.guidance, known, job.cache, recompute, guidance_2=spec.guidance_2
        )

    def _start(self, job: RankJob) -> Start:
        """Rank 0: the start of a clip that it has prepared."""
        text, solver, last = job.text, job.solver, job.computed
        assert text is not None and solver is not None
        job.computed = None
        if not job.begun:
            job.begun, job.saved = True, (job.step, time.monotonic())
            self.wire.send(ClipBegan(job=job.number, step=job.step))
        x = torch.stack([solver.x, *solver.past, *([last.x] if last else [])])
        return Start(job.window, solver.step, last.step if last else -1, text, x)

    def _job(self, number: int) -> RankJob:
        """The job of a clip that joins. Other ranks learn of it here.

        Clips begin in the order in which they were sent, so one before it that never began has been dropped.
        """
        while number not in self.jobs:
            message = self.inbox.messages.get()
            if isinstance(message, RenderClip) and message.job == number:
                self.jobs[number] = _job(message)
                self.jobs[number].plan = windows(message.clip.given, self.frame_step)
        return self.jobs[number]

    def _step(self) -> None:
        going, began = [self.jobs[number] for number in self.batch], time.time()
        arrived = self.batch.step()
        if self.device == "cuda":
            torch.cuda.current_stream().synchronize()  # or the queue of steps would run ahead of a cancellation
        ended = time.time()
        for job in going:
            job.step += 1
            job.spent("denoise", began, ended, len(going))
        if self.rank == 0:
            self.wire.send(StepsTaken(steps=tuple((job.number, job.step, job.steps) for job in going), time=ended))
        for job in going:
            if (latents := arrived.get(job.number)) is None:
                if self.rank == 0 and job.checkpoint_due:
                    self._save(job)
                continue
            if job.cache is not None:
                job.skipped, job.cache.skipped = job.skipped + job.cache.skipped, 0
            if bool(latents.isfinite().all()):
                self._beside(partial(self.stages.decode, job, job.window, latents), job.spec.clip_id)
            elif self.rank == 0:
                why = f"the model computed latents that are not finite (guidance={job.spec.guidance})"
                self._end(ClipFailed(job=job.number, reason=why))

    def _beside(self, work: Callable[[], None], clip_id: str) -> None:
        """Does a task for a clip while steps go on, where that pays, else now.

        On one GPU it does. On several, two threads with two communicators could wait for each other. On a CPU the
        threads of two parallel regions fight for the same cores: mini took 1.26 seconds a clip in place of 0.63.
        """
        if self.side is not None:
            self.side.do(work, clip_id)
        else:
            work()


def _job(message: RenderClip) -> RankJob:
    return RankJob(
        message.job, message.clip, message.buffer, message.fingerprint, checkpoint_every=message.checkpoint_every
    )
