"""One rank of an engine: `python -m model.engine.rank SETTINGS`, started by `model.engine.engine` only.

All ranks get the same clips in the same order and take every denoising step in lockstep. Before each step rank 0 says
in one small message which clips take part, so that all let the same ones join and leave. Beside the transformer's own
collectives there is one more: a clip that joins brings its prompts and the latents it begins with, from rank 0.

Rank 0 encodes prompts and given frames; all ranks decode, each some rows of the picture (`model.parallel.vae_rows`). An
engine of one GPU does that in a thread of its own while steps go on (`Side`), others between two steps. Whatever goes
wrong with one clip is said of that clip. All else is reported and ends the process; the parent then ends the others.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from model.config import Partition, Shape
from model.engine.job import Job, draft, given_frames
from model.engine.process import Inbox, Peak, Side, cpu_kind, end_with, out_of_memory, write_all
from model.engine.wire import Message, Wire, clip_in
from model.loading.card import SECOND, TRANSFORMER
from model.media.windows import Canvas, Frames, seed_of, windows

if TYPE_CHECKING:
    from torch import Tensor

    from model.network.diffusion import SolverState
    from model.network.text import TextEncoder
    from model.network.vae import VAE, WanVAE

PROMPTS_KEPT = 256
IDLE = 1.0  # seconds after which rank 0 says that there is nothing to do: the others wait for its word


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # told to a whole host, it is for the parent, who ends its ranks
    settings = json.loads(sys.argv[1])
    end_with(settings["parent"])
    wire = Wire(Connection(settings["wire"]))
    rank: Rank | None = None

    def fatal(problem: BaseException, clips: Sequence[str] = ()) -> None:
        import traceback

        traceback.print_exception(problem)
        reason = f"{type(problem).__name__}: {problem}"
        memory = out_of_memory(problem)
        with suppress(OSError):
            wire.send({"type": "error", "reason": reason, "clips": [*clips], "memory": memory, "time": time.time()})
        sys.stderr.flush()
        os._exit(1)  # no destructors: in a broken process group they abort

    try:
        rank = Rank(settings, wire, Inbox(wire), fatal)
        rank.serve()
    except BaseException as problem:
        fatal(problem, rank.at_work if rank else ())
    os._exit(0)


class Rank:
    """One share of the model, and the clips it is at."""

    def __init__(
        self,
        settings: dict[str, Any],
        wire: Wire,
        inbox: Inbox,
        fatal: Callable[[BaseException, Sequence[str]], None],
    ) -> None:
        """Imports, joins the group, loads this rank's part, tests it and tells the parent."""
        started = time.perf_counter()
        import torch

        from model.engine.batch import Batch
        from model.loading.load import load_text, load_vae
        from model.network import cpu
        from model.parallel.memory import check_memory, free_bytes
        from model.parallel.mesh import connect, groups_of
        from model.parallel.partition import load_partitioned, parameter_bytes
        from model.parallel.self_test import self_test
        from model.parallel.vae_rows import DividedDecoder

        torch.set_num_threads(settings["threads"])
        torch.set_grad_enabled(False)
        cpu.prepare()
        self.rank: int = settings["rank"]
        self.device: str = settings["device"]
        self.wire, self.inbox, self.slots = wire, inbox, settings["slots"]
        self.frame_step: int = settings["frame_step"]
        path, dtype = Path(settings["path"]), getattr(torch, settings["dtype"])
        divided = Partition.parse(settings["partition"])
        self.world = divided.world
        if settings["compile"]:
            from model.network.compiled import check_compiler

            check_compiler(self.device)
            if divided.zero > 1:
                raise ValueError(f"partition {divided} cannot be compiled: zero gathers weights while a block computes")
        if self.device == "cuda":
            torch.cuda.set_device(self.rank)
            check_memory(path, divided, free_bytes(self.device), dtype.itemsize, self.device)
        laps = {"import": time.perf_counter() - started}

        def lap(name: str) -> None:
            laps[name] = time.perf_counter() - started - sum(laps.values())

        connect(self.rank, self.world, settings["port"], self.device, settings["listener"])
        groups = groups_of(divided, self.device)
        lap("connect")
        boundary: float | None = settings["boundary"]
        parts = [TRANSFORMER] if boundary is None else [TRANSFORMER, SECOND]
        experts = [load_partitioned(path, groups, dtype, self.device, part=p) for p in parts]
        if settings["compile"]:
            from model.network.compiled import compile_blocks

            for dit in experts:
                compile_blocks(dit, settings["compile"])
        self.text: TextEncoder | None = load_text(path, dtype, self.device) if self.rank == 0 else None
        self.vae: VAE | WanVAE = load_vae(path, torch.float32, self.device)
        self.decoder = DividedDecoder(self.vae, self.rank, self.world)
        self.encoded: OrderedDict[str, Tensor] = OrderedDict()
        lap("load")
        tested = [
            self_test(dit, path, groups, dtype, self.device, part, bool(settings["compile"])).error
            for dit, part in zip(experts, parts, strict=True)
        ]
        lap("self_test")
        self.peak = Peak(self.device, self.world)
        self.batch = Batch(experts, size=settings["micro_batch"], boundary=boundary, groups=groups)
        self.jobs: dict[int, Job] = {}  # of rank 0: all that are not done; of the others: those under way
        self.ready: deque[Job] = deque()  # of rank 0: may begin to be denoised
        self.side = Side(fatal) if self.device == "cuda" and self.world == 1 else None
        info = {
            "rank": self.rank,
            "pid": os.getpid(),
            "parameter_bytes": sum(map(parameter_bytes, experts)),
            "self_test": max(tested),
            "device": torch.cuda.get_device_name() if self.device == "cuda" else cpu_kind(),
            "seconds": {name: round(value, 3) for name, value in laps.items()},
        }
        wire.send({"type": "ready", "info": info})

    @property
    def at_work(self) -> list[str]:
        """Clips that are being denoised."""
        return [self.jobs[number].spec.clip_id for number in self.batch]

    def serve(self) -> None:
        """Step after step, until the parent says exit."""
        while (turn := self._agree(self._next_turn() if self.rank == 0 else [])) is not None:
            for number in set(self.batch) - set(turn):
                self.batch.leave(number)
            for number in turn:
                if number not in self.batch:
                    self._join(number)
            if len(self.batch):
                self._step()

    # --- who takes part in the next step ------------------------------------------------------------------------------

    def _next_turn(self) -> list[int] | None:
        """Rank 0: the clips of the next step, or None for the end. Waits a moment when there are none."""
        wait = not len(self.batch) and not self.ready
        with suppress(queue.Empty):
            while True:
                message = self.inbox.messages.get(wait, IDLE) if wait else self.inbox.messages.get_nowait()
                if message["type"] == "exit":
                    return None
                self._take(message)
                wait = False
        turn: list[int] = []
        for number in self.batch:
            if self.jobs[number].dropped or self.jobs[number].leaves:
                self._drop(self.jobs[number])
            else:
                turn.append(number)
        while self.ready and len(turn) < self.batch.size:
            if self.ready[0].dropped or self.ready[0].leaves:
                self._drop(self.ready.popleft())
            elif not turn or self.ready[0].kind == self.jobs[turn[0]].kind:
                turn.append(self.ready.popleft().number)
            else:
                break  # its turn comes when those under way are done
        return turn

    def _take(self, message: Message) -> None:
        """Rank 0: a message of the parent, or of the side thread."""
        number = message["job"]
        if message["type"] == "render":
            steps, seconds = message["every"]
            self.jobs[number] = Job(number, clip_in(message), message["slot"], message["of"], (steps, seconds))
            self._beside(partial(self._prepare, self.jobs[number]), self.jobs[number].spec.clip_id)
        elif message["type"] == "ready":
            job = self.jobs[number]
            if job.begun:  # it has waited its turn
                self.ready.appendleft(job)
            else:
                self.ready.append(job)
        elif message["type"] == "cancel" and number in self.jobs:
            self.jobs[number].dropped = True
        elif message["type"] == "leave" and number in self.jobs:
            self.jobs[number].leaves = True
        elif message["type"] == "over":
            del self.jobs[number]

    def _agree(self, turn: list[int] | None) -> list[int] | None:
        """Rank 0's word on the next step, on all ranks."""
        if self.world == 1:
            return turn
        import torch
        import torch.distributed as dist

        word = torch.full((2 + self.batch.size,), -1, dtype=torch.int64)
        if turn is not None:
            word[: 2 + len(turn)] = torch.tensor([len(turn), min(self.jobs, default=1 << 62), *turn])
        dist.broadcast(word, 0)
        count, oldest, *numbers = word.tolist()
        if self.rank:
            self.jobs = {number: job for number, job in self.jobs.items() if number >= oldest}
        return None if count < 0 else numbers[:count]

    def _join(self, number: int) -> None:
        """A clip begins to be denoised: all ranks get what rank 0 has prepared."""
        import torch
        import torch.distributed as dist

        from model.network.diffusion import SolverState, in_model_times, model_time, solve
        from model.network.stepcache import Computed, StepCache
        from model.parallel.guidance import total

        if self.rank == 0:
            job = self.jobs[number]
            text, here, window, last = job.text, job.here, job.window, job.computed
            assert text is not None and here is not None
            x, step = torch.stack([here.x, *here.past, *([last.x] if last else [])]), here.step
            computed, job.computed = last.step if last else -1, None
            if not job.begun:
                job.begun, job.saved = True, (job.step, time.monotonic())
                self._say(job, "begin", step=job.step)
        else:
            job, text, x, window, step, computed = self._job(number), torch.zeros(0), torch.zeros(0), 0, 0, -1
        if self.world > 1:
            sizes = torch.tensor([window, step, computed, *text.shape, *x.shape] if self.rank == 0 else [0] * 11)
            dist.broadcast(sizes, 0)
            window, step, computed, *shape = sizes.tolist()
            if self.rank:
                text, x = torch.empty(shape[:3]), torch.empty(shape[3:])
            dist.broadcast(text, 0)
            dist.broadcast(x, 0)
        spec, job.window = job.spec, window
        known = job.plan[window].known(self.frame_step)
        x, *past = x.to(self.device)
        last = None if computed < 0 else Computed(computed, past.pop())
        again = None if last is None else model_time(job.times[last.step], spec.solver)
        job.here = SolverState(x, step, tuple(past))
        way = in_model_times(solve(job.here, job.times, spec.solver), spec.solver)
        if spec.step_cache is not None:
            steps, guided = len(job.times) - 1, spec.guidance != 1
            summed = partial(total, groups=self.batch.groups, guided=guided)
            job.cache = StepCache(spec.step_cache, steps, summed, step=step, last=last)
        self.batch.join(number, way, text[0], text[1], spec.guidance, known, job.cache, again)

    def _job(self, number: int) -> Job:
        """A clip whose turn has come, on a rank that rank 0 told so.

        Clips begin in the order in which they were sent: whichever comes before it has been dropped.
        """
        while number not in self.jobs:
            message = self.inbox.messages.get()
            if message["type"] == "render":
                spec = clip_in(message)
                if message["job"] == number:
                    self.jobs[number] = Job(number, spec, message["slot"], plan=windows(spec.given, self.frame_step))
        return self.jobs[number]

    # --- what is done -------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        import torch

        going, began = [self.jobs[number] for number in self.batch], time.time()
        arrived = self.batch.step()
        if self.device == "cuda":
            torch.cuda.current_stream().synchronize()  # or the queue of steps would run ahead of a cancellation
        ended = time.time()
        for job in going:
            job.step += 1
            job.spent("denoise", began, ended, len(going))
        if self.rank == 0:
            steps = [(job.number, job.step, job.steps) for job in going]
            self.wire.send({"type": "steps", "steps": steps, "time": ended})
        for job in going:
            if (latents := arrived.get(job.number)) is None:
                if self.rank == 0 and job.due:
                    self._save(job)
                continue
            if job.cache is not None:
                job.skipped, job.cache.skipped = job.skipped + job.cache.skipped, 0
            if bool(latents.isfinite().all()):
                self._beside(partial(self._decode, job, job.window, latents), job.spec.clip_id)
            elif self.rank == 0:
                guidance = job.spec.guidance
                self._end(job, "failed", f"the model computed latents that are not finite (guidance={guidance})")

    def _beside(self, work: Callable[[], None], clip_id: str) -> None:
        """Does something for a clip while steps go on, where that pays, else now.

        On one GPU it does. On several, two threads with two communicators could wait for each other. On a CPU the
        threads of two parallel regions fight for the same cores: mini took 1.26 seconds a clip in place of 0.63.
        """
        if self.side is not None:
            self.side.do(work, clip_id)
        else:
            work()

    def _end(self, job: Job, how: str, reason: str = "") -> None:
        """Rank 0: there will be no frames of this clip."""
        self._say(job, how, reason=reason)
        del self.jobs[job.number]

    def _drop(self, job: Job) -> None:
        """Rank 0: it takes no further step here. Where it is to go on elsewhere, the parent gets what that takes."""
        if job.begun and not job.dropped:
            self._save(job)
        self._end(job, "dropped")

    def _save(self, job: Job) -> None:
        """Rank 0 sends the parent how far a clip has come, in a memory file. All ranks have the same latents."""
        from model.engine.resume import ResumeState, to_bytes
        from model.network.diffusion import SolverState

        here = job.here
        job.saved = job.step, time.monotonic()
        if here is None or not job.of:
            return
        here = SolverState(here.x.cpu(), here.step, tuple(tensor.cpu() for tensor in here.past))
        if not all(bool(tensor.isfinite().all()) for tensor in (here.x, *here.past)):
            return  # its end will say so
        assert job.canvas is not None
        pixels = job.canvas.pixels[0] if job.window else None
        skipped, last = (None, None) if job.spec.step_cache is None else job.cache_state
        state = ResumeState(job.window, here, pixels, skipped, last)
        file = os.memfd_create("rushes-unfinished")
        try:
            write_all(file, to_bytes(state, job.of))
            self.wire.send({"type": "checkpoint", "job": job.number, "step": job.step, "time": time.time()}, file)
        finally:
            os.close(file)

    def _prepare(self, job: Job) -> None:
        """Rank 0: prompts are encoded, and what the clip begins with."""
        import torch

        began, spec = time.time(), job.spec
        try:
            job.plan = windows(spec.given, self.frame_step)
            job.text = torch.stack([self._encode(spec.prompt), self._encode(spec.negative_prompt)])
            job.spent("text", began)
            job.canvas = Canvas(spec.given, *given_frames(spec), self.frame_step)
            if not job.plan:  # all its frames are given
                self._say(job, "begin", step=0)
                self._finish(job, self.peak.own())
            elif not self._go_on(job):
                self._begin(job)
        except Exception as problem:
            if out_of_memory(problem):
                raise
            self._over(job, "failed", reason=f"{type(problem).__name__}: {problem}")

    def _go_on(self, job: Job) -> bool:
        """Rank 0: the clip will go on from where an earlier attempt had come. False: there is nothing of use."""
        from model.engine.resume import Expected, Unusable, from_bytes

        spec = job.spec
        if spec.resume_state is None:
            return False
        assert job.canvas is not None

        def latents(window: int) -> tuple[int, ...]:
            return tuple(self.vae.latent_shape(Shape(spec.width, spec.height, job.plan[window].frames)))

        steps, pixels = len(job.times) - 1, job.canvas.pixels[0]
        due = Expected(len(job.plan), steps, spec.solver, latents, pixels.shape, spec.step_cache is not None)
        try:
            there = from_bytes(spec.resume_state, job.of, due)
        except Unusable as problem:
            print(
                f"clip {spec.clip_id} begins anew, its checkpoint is of no use: {problem}", file=sys.stderr, flush=True
            )
            return False
        if there.pixels is not None:
            pixels[:] = there.pixels
        job.window, job.step = there.window, there.window * steps + there.solver.step
        job.skipped, job.computed = there.skipped or 0, there.computed
        self._ready(job, there.solver)
        return True

    def _ready(self, job: Job, here: SolverState) -> None:
        """Rank 0: its turn may come."""
        from model.engine.batch import BatchKey

        alone = None if job.spec.step_cache is None else job.number
        known = job.plan[job.window].known(self.frame_step)
        job.here, job.kind = here, BatchKey.of(here.x, job.spec.guidance, known, alone)
        self.inbox.messages.put({"type": "ready", "job": job.number})

    def _begin(self, job: Job) -> None:
        """Rank 0: latents that the window begins with: noise (blended into what is edited), and what is known."""
        import torch

        from model.network.diffusion import SolverState, blend, noise

        began, spec, window = time.time(), job.spec, job.plan[job.window]
        known = window.known(self.frame_step)
        assert job.canvas is not None
        x = noise(seed_of(spec.seed, job.window), self.vae.latent_shape(Shape(spec.width, spec.height, window.frames)))
        if spec.strength is not None:
            x = blend(self._latents_of(draft(spec, window)), x, torch.tensor(spec.strength))
        if any(known):
            clean, places = self._latents_of(job.canvas.known(window)[0]), torch.tensor(known).nonzero().flatten()
            x[:, places] = clean[:, places]
        if spec.strength is not None or any(known):
            job.spent("decode", began)  # the autoencoder was at it
        self._ready(job, SolverState(x))

    def _decode(self, job: Job, number: int, latents: Tensor) -> None:
        """Latents [C, T, H, W] become frames, on rank 0. All ranks have the same latents."""
        began, window, spec = time.time(), job.plan[number], job.spec
        pixels = self.decoder.decode(latents[None])
        peak = self.peak()
        if pixels is None:
            return
        assert job.canvas is not None
        if pixels.shape != (window.frames, spec.height, spec.width, 3):
            raise ValueError(f"the decoder gave {pixels.shape} for {window.frames} frames")
        job.canvas.paint(window, pixels[None])
        job.spent("decode", began)
        job.window = number + 1
        if job.dropped:
            self._over(job, "dropped")
        elif job.window < len(job.plan):
            self._begin(job)
        else:
            self._finish(job, peak)

    def _finish(self, job: Job, peak: int) -> None:
        """Rank 0: all frames of a clip are there."""
        began = time.time()
        assert job.canvas is not None
        self._write(job.slot, job.canvas.frames[0])
        job.spent("decode", began)
        skipped = None if job.cache is None else job.skipped
        self._over(job, "done", seconds=job.seconds, spans=job.spans, peak_bytes=peak, skipped=skipped)

    def _over(self, job: Job, how: str, **said: Any) -> None:
        """The last word on a clip of whoever was at it beside the steps."""
        self._say(job, how, **said)
        self.inbox.messages.put({"type": "over", "job": job.number})

    def _say(self, job: Job, what: str, **said: Any) -> None:
        """Rank 0 tells the parent of a clip."""
        self.wire.send({"type": what, "job": job.number, "time": time.time(), **said})

    def _latents_of(self, pixels: Frames) -> Tensor:
        """[T, H, W, 3] -> [C, T, H, W] on the CPU."""
        from model.network.vae import to_video

        return self.vae.encode(to_video(pixels[None], self.device))[0].float().cpu()

    def _encode(self, prompt: str) -> Tensor:
        """[L, Dt] on the CPU; the last prompts are remembered, the empty negative one among them."""
        assert self.text is not None
        if prompt not in self.encoded:
            self.encoded[prompt] = self.text.encode([prompt])[0].float().cpu()
            if len(self.encoded) > PROMPTS_KEPT:
                self.encoded.popitem(last=False)
        self.encoded.move_to_end(prompt)
        return self.encoded[prompt]

    def _write(self, slot: int, frames: Frames) -> None:
        """Lays a clip's frames into its memory file."""
        os.ftruncate(self.slots[slot], 0)
        write_all(self.slots[slot], np.ascontiguousarray(frames).reshape(-1).data)


if __name__ == "__main__":
    main()
