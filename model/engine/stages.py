"""The stages of a clip on rank 0 before and after denoising: its prompts, its first latents, its frames.

They may run beside the steps, on another thread. An error that concerns one clip is reported as that clip's; what
is the memory's or the device's (`model.engine.faults`) is raised, and ends the rank.
"""

from __future__ import annotations

import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from model.config import ClipShape
from model.engine import buffers
from model.engine.batch import BatchKey
from model.engine.faults import cause_of
from model.engine.job import JobOver, JobReady, RankJob, draft, given_frames
from model.engine.loader import Networks
from model.engine.messages import ClipBegan, ClipDone, ClipDropped, ClipFailed, Ended, FromRank, RankSettings, ToRank
from model.engine.process import PeakMemory
from model.engine.resume import Expected, Unusable, from_bytes
from model.engine.wire import Wire
from model.media.windows import Canvas, Frames, seed_of, windows
from model.network.diffusion import SolverState, blend, noise
from model.network.vae import to_video

PROMPTS_KEPT = 256
Post: TypeAlias = Callable[[JobReady | JobOver], None]


class Stages:
    """Prepares jobs for the batch, decodes their windows, and tells the engine how each ends."""

    def __init__(
        self, networks: Networks, settings: RankSettings, wire: Wire[FromRank, ToRank], post: Post, peak: PeakMemory
    ) -> None:
        """post: puts a message to the rank itself."""
        self.networks, self.wire, self.post, self.peak = networks, wire, post, peak
        self.vae, self.device, self.frame_step = networks.vae, settings.device, settings.frame_step
        self.files = settings.buffers
        self.encoded: OrderedDict[str, Tensor] = OrderedDict()

    def prepare(self, job: RankJob) -> None:
        """Rank 0: encodes a job's prompts, and lays out its time line and the latents that it begins with."""
        began, spec = time.time(), job.spec
        try:
            job.plan = windows(spec.given, self.frame_step)
            job.text = torch.stack([self._encode(spec.prompt), self._encode(spec.negative_prompt)])
            job.spent("text", began)
            job.canvas = Canvas(spec.given, *given_frames(spec), self.frame_step)
            if not job.plan:  # all its frames are given
                self.wire.send(ClipBegan(job=job.number, step=0))
                self._finish(job, self.peak.own())
            elif not self._resume(job):
                self._begin_window(job)
        except Exception as problem:
            if cause_of(problem) != "other":
                raise
            self._end(ClipFailed(job=job.number, reason=f"{type(problem).__name__}: {problem}"))

    def decode(self, job: RankJob, number: int, latents: Tensor) -> None:
        """All ranks: decodes latents [C, T, H, W], the same on each, to the frames of window `number`, on rank 0."""
        began, window, spec = time.time(), job.plan[number], job.spec
        pixels = self.networks.decoder.decode(latents[None])
        peak = self.peak.of_all()
        if pixels is None:
            return
        assert job.canvas is not None
        if pixels.shape != (window.frames, spec.height, spec.width, 3):
            raise ValueError(f"the decoder gave {pixels.shape} for {window.frames} frames")
        job.canvas.paint(window, pixels[None])
        job.spent("decode", began)
        job.window = number + 1
        if job.cancelled:
            self._end(ClipDropped(job=job.number))
        elif job.window < len(job.plan):
            self._begin_window(job)
        else:
            self._finish(job, peak)

    def _resume(self, job: RankJob) -> bool:
        """Sets a job to where its resume state says; False where it has none of use."""
        spec = job.spec
        if not spec.resume_state:
            return False
        assert job.canvas is not None

        def latents(window: int) -> tuple[int, ...]:
            return tuple(self.vae.latent_shape(ClipShape(spec.width, spec.height, job.plan[window].frames)))

        steps, pixels = len(job.times) - 1, job.canvas.pixels[0]
        expected = Expected(len(job.plan), steps, spec.solver, latents, pixels.shape, spec.step_cache is not None)
        try:
            state = from_bytes(spec.resume_state, job.fingerprint, expected)
        except Unusable as problem:
            print(
                f"clip {spec.clip_id} begins anew, its checkpoint is of no use: {problem}", file=sys.stderr, flush=True
            )
            return False
        if state.pixels is not None:
            pixels[:] = state.pixels
        job.window, job.step = state.window, state.window * steps + state.solver.step
        job.skipped, job.computed = state.skipped or 0, state.computed
        self._enqueue(job, state.solver)
        return True

    def _begin_window(self, job: RankJob) -> None:
        """Makes the latents that a window begins with: noise, blended into what is edited, and known frames."""
        began, spec, window = time.time(), job.spec, job.plan[job.window]
        known = window.known(self.frame_step)
        assert job.canvas is not None
        x = noise(
            seed_of(spec.seed, job.window), self.vae.latent_shape(ClipShape(spec.width, spec.height, window.frames))
        )
        if spec.strength is not None:
            x = blend(self._latents_of(draft(spec, window)), x, torch.tensor(spec.strength))
        if any(known):
            clean, places = self._latents_of(job.canvas.known(window)[0]), torch.tensor(known).nonzero().flatten()
            x[:, places] = clean[:, places]
        if spec.strength is not None or any(known):
            job.spent("decode", began)  # the autoencoder was at it
        self._enqueue(job, SolverState(x))

    def _enqueue(self, job: RankJob, solver: SolverState) -> None:
        """The job may be denoised from this state on."""
        alone = None if job.spec.step_cache is None else job.number
        known = job.plan[job.window].known(self.frame_step)
        job.solver, job.key = solver, BatchKey.of(solver.x, job.spec.guidance, known, alone)
        self.post(JobReady(job.number))

    def _finish(self, job: RankJob, peak: int) -> None:
        """Hands over the frames of a clip that is done."""
        began = time.time()
        assert job.canvas is not None
        buffers.write(self.files[job.buffer], job.canvas.frames[0])
        job.spent("decode", began)
        skipped = None if job.cache is None else job.skipped
        spans = tuple(job.spans)
        self._end(ClipDone(job=job.number, seconds=job.seconds, spans=spans, peak_bytes=peak, skipped_steps=skipped))

    def _end(self, message: Ended) -> None:
        self.wire.send(message)
        self.post(JobOver(message.job))

    def _latents_of(self, pixels: Frames) -> Tensor:
        """[T, H, W, 3] -> [C, T, H, W] on the CPU."""
        return self.vae.encode(to_video(pixels[None], self.device))[0].float().cpu()

    def _encode(self, prompt: str) -> Tensor:
        """[L, Dt] on the CPU. The last prompts are kept, the empty negative one among them."""
        assert self.networks.text is not None
        if prompt not in self.encoded:
            self.encoded[prompt] = self.networks.text.encode([prompt])[0].float().cpu()
            if len(self.encoded) > PROMPTS_KEPT:
                self.encoded.popitem(last=False)
        self.encoded.move_to_end(prompt)
        return self.encoded[prompt]
