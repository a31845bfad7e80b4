"""The parent of a partitioned model: starts its ranks, hands them clips, takes frames back, ends them all on trouble.

Knows processes and bytes, no tensors: torch lives in the ranks (`model.engine.rank`). Every rank gets the same jobs in
the same order over its own socket pair, as JSON; rank 0 answers with steps and results. Frames come back through
anonymous memory files that the parent made and rank 0 inherited, so that nothing is left behind by whoever is killed.

Frames that a clip is to keep go to the ranks in a memory file of their own, whose descriptor follows the job.

A job is one clip. There are always some more under way than are denoised together: while the caller encodes and stores
one, the ranks decode the next, denoise others and encode the prompts of those that follow.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from model.config import Partition
from model.engine.clip import (
    ClipSpec,
    EngineError,
    OutOfMemory,
    RankDied,
    RankHung,
    RankInfo,
    RenderedClip,
    RenderFailed,
    SavedState,
    StartFailed,
)
from model.engine.resume import fingerprint
from model.engine.wire import Message, Wire, all_of, pixels_file, without_pixels
from model.loading.card import find_model
from model.parallel.memory import NotEnoughMemory, check_memory, free_bytes

Device = Literal["cpu", "cuda"]
Compile: TypeAlias = bool | Literal["reduce-overhead"]
AHEAD = 1  # clips that ranks are given beyond those that they denoise
# What a rank frees it keeps for the next step (mallopt(3)): glibc would give large tensors back to the kernel, and take
# them from it page by page, at every layer. mini's steps of eight rows took an eighth longer so.
KEPT_MEMORY = {f"MALLOC_{name}_THRESHOLD_": str(1 << 30) for name in ("MMAP", "TRIM")}
POLL = 0.1  # seconds between two looks at what has been cancelled


@dataclass(slots=True)
class _Job:
    number: int
    place: int  # among the clips to render
    spec: ClipSpec
    slot: int
    of: str  # what must be alike where it goes on; empty where nobody asks
    dropped: bool = False  # the ranks know that nobody wants it any more
    leaves: bool = False  # they know that it is to make room
    steps: list[float] = field(default_factory=list[float])


@dataclass(slots=True)
class _Rank:
    process: subprocess.Popen[bytes]
    wire: Wire


class Engine:
    """One model on `partition.world` ranks of this machine. Not for use from two threads at a time.

    step_timeout: seconds without a sign of life (a step, a decoded clip) after which the ranks count as hung.
    start_timeout: seconds that loading may take.
    micro_batch: clips of one shape that are denoised together; they join and leave between any two steps. A clip's
        bytes do not depend on its neighbours (`model.engine.batch`), but may on this number. Halved when memory runs
        out.
    dtype: of the transformer; by default float32 on a CPU and bfloat16 on CUDA.
    compile: torch compiles the transformer's blocks (`model.network.compiled`): quicker steps, a slower start, other
    last bits;
        "reduce-overhead" replays them as CUDA graphs.
        The first step of a shape may then take minutes, so `step_timeout` is at least ten of them.
    cache: folder in which compiled code is kept for the next start; by default torch's own.
    gpus: the numbers of the GPUs that the ranks may use, one each; by default the first ones.
    log: where the ranks' standard output and error go; by default this process's standard error.
    """

    def __init__(
        self,
        path: str | Path,
        partition: Partition,
        *,
        device: Device = "cpu",
        threads_per_rank: int = 1,
        micro_batch: int = 1,
        step_timeout: float = 180.0,
        start_timeout: float = 600.0,
        dtype: Literal["float32", "bfloat16"] | None = None,
        compile: Compile = False,
        cache: Path | None = None,
        gpus: Sequence[int] | None = None,
        log: Path | None = None,
    ) -> None:
        """Raises ModelNotFound for a path that holds no model, ValueError for a partition that does not divide it."""
        if micro_batch < 1:
            raise ValueError(f"micro_batch={micro_batch} must be at least 1")
        self.card = find_model(path)
        partition.check_heads(self.card.heads)
        self.partition, self.device, self.threads_per_rank = partition, device, threads_per_rank
        self.micro_batch, self.step_timeout, self.start_timeout = micro_batch, step_timeout, start_timeout
        self.dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
        self.compile, self.cache, self.gpus, self.log = compile, cache, gpus, log
        if compile:
            self.step_timeout = max(step_timeout, 600.0)
        self.ready: tuple[RankInfo, ...] = ()
        self._ranks: list[_Rank] = []
        self._starter: ThreadPoolExecutor | None = None  # the thread that started them, and that they end with
        self._slots: list[int] = []  # memory files for frames
        self._free: list[int] = []  # those that no job uses
        self._left: dict[int, int] = {}  # jobs that their caller has left, and their slots
        self._next_job = 0

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    @property
    def running(self) -> bool:
        return bool(self._ranks)

    def fingerprint(self, spec: ClipSpec) -> str:
        """Digest of all that must be equal for this clip to go on from a resume state to the same bits."""
        numerics = [
            *(str(self.partition), self.device, self.dtype),
            *(f"{self.threads_per_rank} threads", f"{self.micro_batch} at a time", f"compile {self.compile}"),
            *(info.device for info in self.ready),
        ]
        return fingerprint(spec, self.card.digest, numerics)

    def start(self) -> None:
        """Starts the ranks and waits until every one has loaded and tested its part. Nothing to do if they run.

        Raises StartFailed, RankDied or RankHung; no rank is left then.
        """
        if self._ranks:
            return
        if self.device == "cpu":  # a rank looks at its own GPU itself
            size = 4 if self.dtype == "float32" else 2
            try:
                check_memory(self.card.path, self.partition, free_bytes("cpu"), size, "cpu")
            except NotEnoughMemory as error:
                raise StartFailed(str(error)) from None
        try:
            # The kernel ends a rank with the thread that started it: that is one which lasts, whoever calls this.
            self._starter = ThreadPoolExecutor(1, "ranks")
            self._starter.submit(self._spawn).result()
            self.ready = tuple(self._greeting(rank) for rank in range(self.partition.world))
        except BaseException:
            self._end_ranks()
            raise

    def close(self) -> None:
        """Asks the ranks to leave, and ends those that have not within two seconds."""
        for rank in self._ranks:
            with suppress(OSError):
                rank.wire.send({"type": "exit"})
        deadline = time.monotonic() + 2
        for rank in self._ranks:
            with suppress(subprocess.TimeoutExpired):
                rank.process.wait(max(0.0, deadline - time.monotonic()))
        self._end_ranks()

    def kill(self) -> None:
        """Ends the ranks now, in whatever they are at. From any thread: one that renders gets RankDied."""
        for rank in tuple(self._ranks):
            rank.process.kill()

    def render(
        self,
        specs: Sequence[ClipSpec],
        *,
        on_step: Callable[[str, int, int], None] = lambda clip_id, step, steps: None,
        cancelled: Callable[[], set[str]] = set,
        on_failure: Callable[[RenderFailed], None] | None = None,
        on_checkpoint: Callable[[SavedState], None] | None = None,
        checkpoint_every: tuple[int, float] = (0, 0.0),
        leave: Callable[[], bool] = lambda: False,
    ) -> Generator[RenderedClip]:
        """Yields clip by clip as they are done; the ranks work on while the caller looks at one.

        `on_step(clip_id, step, steps)` is called with step 0 when a clip's turn has come, and after each denoising
        step; a clip made in several windows takes more of them than it asks for, an edit fewer. `cancelled()` is asked
        many times a second for the ids that nobody wants any more: a running one stops at its next step, and none of
        them is yielded. `on_failure` is told of a clip that the model cannot make; the others go on. Without it, that
        is raised.
        `on_checkpoint` is given how far a running clip has come after so many steps and after so many seconds
        (`checkpoint_every`; 0: never). A clip that goes on from there is told to `on_step` with that step first. When
        `leave()` says so, clips under way are given to `on_checkpoint` at their next step and dropped, and no other
        one begins.
        Out of memory, the engine starts again with half as many clips at a time, down to one.
        Raises RenderFailed. Raises RankDied or RankHung; the ranks are gone then.
        """
        if not self._ranks:
            raise EngineError("the engine has not been started")
        left = dict(enumerate(specs))
        while True:
            try:
                for place, made in self._render(left, on_step, cancelled, on_checkpoint, checkpoint_every, leave):
                    del left[place]
                    if isinstance(made, RenderedClip):
                        yield made
                    elif on_failure is not None:
                        on_failure(made)
                    else:
                        raise made
                return
            except OutOfMemory:
                if self.micro_batch == 1:
                    raise
                self.micro_batch //= 2
                self.start()

    def _render(
        self,
        specs: Mapping[int, ClipSpec],
        on_step: Callable[[str, int, int], None],
        cancelled: Callable[[], set[str]],
        on_checkpoint: Callable[[SavedState], None] | None,
        every: tuple[int, float],
        leave: Callable[[], bool],
    ) -> Generator[tuple[int, RenderedClip | RenderFailed]]:
        waiting, jobs = deque(specs.items()), dict[int, _Job]()
        heard = time.monotonic()
        try:
            while waiting or jobs:
                dropped = cancelled()
                if leaves := leave():
                    waiting.clear()
                while waiting and self._free:
                    place, spec = waiting.popleft()
                    if spec.clip_id not in dropped:
                        job = self._submit(place, spec, on_checkpoint is not None, every)
                        jobs[job.number] = job
                for job in jobs.values():
                    if job.spec.clip_id in dropped:
                        self._drop(job)
                    elif leaves and not job.leaves:
                        job.leaves = True
                        self._tell(0, {"type": "leave", "job": job.number})
                message = self._next_message(list(jobs.values()))
                if message is None:
                    if time.monotonic() - heard > self.step_timeout:
                        raise RankHung(f"no step for {self.step_timeout:g} s; {self._states()}")
                    continue
                heard = time.monotonic()
                if message["type"] == "steps":
                    for number, step, steps in message["steps"]:
                        if job := jobs.get(number):
                            job.steps.append(message["time"])
                            on_step(job.spec.clip_id, step, steps)
                elif message["type"] == "begin":
                    if job := jobs.get(message["job"]):
                        on_step(job.spec.clip_id, message["step"], job.spec.steps)
                elif message["type"] == "checkpoint":
                    data, job = all_of(message["file"]), jobs.get(message["job"])
                    if job and not job.dropped and on_checkpoint is not None:
                        clip_id, step = job.spec.clip_id, message["step"]
                        on_checkpoint(SavedState(clip_id=clip_id, step=step, fingerprint=job.of, data=data))
                elif (slot := self._left.pop(message["job"], None)) is not None:
                    self._free.append(slot)
                else:
                    job = jobs.pop(message["job"])
                    made = self._outcome(job, message)
                    self._free.append(job.slot)
                    if made is not None and job.spec.clip_id not in cancelled():
                        yield job.place, made
                        heard = time.monotonic()
        except EngineError:
            self._end_ranks()
            raise
        finally:
            if self._ranks:
                with suppress(OSError, EngineError):
                    for job in jobs.values():  # the caller has left
                        self._left[job.number] = job.slot
                        self._drop(job)

    def _submit(self, place: int, spec: ClipSpec, save: bool, every: tuple[int, float]) -> _Job:
        of = self.fingerprint(spec) if save or spec.resume_state else ""
        job = _Job(self._next_job, place, spec, self._free.pop(0), of)
        self._next_job += 1
        message = {"type": "render", "job": job.number, "slot": job.slot, "clip": without_pixels(spec)}
        message |= {"of": of, "every": every}
        file = pixels_file(spec)
        try:
            for number in range(len(self._ranks)):
                self._tell(number, message, file)
        finally:
            if file is not None:
                os.close(file)
        return job

    def _drop(self, job: _Job) -> None:
        """Rank 0 tells the others at the next step, so that all stop at the same one."""
        if not job.dropped:
            job.dropped = True
            self._tell(0, {"type": "cancel", "job": job.number})

    def _tell(self, rank: int, message: Message, file: int | None = None) -> None:
        try:
            self._ranks[rank].wire.send(message, file)
        except OSError:
            raise self._trouble(rank, None, ()) from None

    def _next_message(self, jobs: Sequence[_Job]) -> Message | None:
        """A message of rank 0, or None after a moment without one. Raises for a rank that failed or died."""
        numbers = {rank.wire.connection: number for number, rank in enumerate(self._ranks)}
        for connection in sorted(wait(list(numbers), POLL), key=lambda c: numbers[c]):  # pyright: ignore
            number = numbers[connection]  # pyright: ignore
            try:
                message = self._ranks[number].wire.receive()
            except (EOFError, OSError):
                raise self._trouble(number, None, jobs) from None
            if message["type"] == "error":
                raise self._trouble(number, message, jobs)
            return message
        return None

    def _outcome(self, job: _Job, message: Message) -> RenderedClip | RenderFailed | None:
        """What a rank's last word on a clip means; frames are copied out of the clip's memory file. None: dropped."""
        if message["type"] == "dropped":
            return None
        if message["type"] == "failed":
            return RenderFailed(job.spec.clip_id, message["reason"])
        frames, offset = np.empty((job.spec.frames, job.spec.height, job.spec.width, 3), np.uint8), 0
        view = frames.reshape(-1).data
        while view:
            count = os.preadv(self._slots[job.slot], [view], offset)
            if not count:
                return RenderFailed(job.spec.clip_id, f"rank 0 wrote {offset} bytes of frames, more were announced")
            view, offset = view[count:], offset + count
        return RenderedClip(
            clip_id=job.spec.clip_id,
            frames=frames,
            seconds=message["seconds"],
            spans=tuple((stage, began, ended) for stage, began, ended in message["spans"]),
            steps=tuple(job.steps),
            peak_bytes=message["peak_bytes"],
            skipped_steps=message["skipped"],
        )

    def _spawn(self) -> None:
        """Every rank leads a process group of its own: a Ctrl-C for the parent must not reach it first.

        The parent binds the port that the ranks meet on and rank 0 inherits the socket, so that nobody can take it.
        """
        world = self.partition.world
        own = {
            "OMP_NUM_THREADS": str(self.threads_per_rank),
            "DS_ACCELERATOR": self.device,  # else DeepSpeed looks for one, and warns
            "GLOO_SOCKET_IFNAME": "lo",  # else gloo listens wherever the host's name points
            "HF_HUB_OFFLINE": "1",  # a rank reads its model folder and nothing else
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **(KEPT_MEMORY if self.device == "cpu" else {}),
            **({"TORCHINDUCTOR_CACHE_DIR": str(self.cache)} if self.cache else {}),
        }
        if self.gpus is not None and self.device == "cuda":
            shown = os.environ.get("CUDA_VISIBLE_DEVICES")  # the numbers count those that this process sees
            names = shown.split(",") if shown else [str(number) for number in range(max(self.gpus) + 1)]
            own["CUDA_VISIBLE_DEVICES"] = ",".join(names[number] for number in self.gpus)
        self._slots = [os.memfd_create(f"rushes-frames-{k}") for k in range(self.micro_batch + AHEAD)]
        self._free = list(range(len(self._slots)))
        output = self.log.open("ab") if self.log is not None else None
        try:
            with socket.create_server(("127.0.0.1", 0), backlog=max(world, 16)) as listener:
                for rank in range(world):
                    ours, theirs = socket.socketpair()
                    inherited = [theirs.fileno(), *([listener.fileno(), *self._slots] if rank == 0 else [])]
                    settings = {
                        "rank": rank,
                        "partition": str(self.partition),
                        "port": listener.getsockname()[1],
                        "path": str(self.card.path),
                        "device": self.device,
                        "dtype": self.dtype,
                        "threads": self.threads_per_rank,
                        "micro_batch": self.micro_batch,
                        "compile": self.compile,
                        "frame_step": self.card.frame_step,
                        "boundary": self.card.boundary,
                        "parent": os.getpid(),
                        "wire": theirs.fileno(),
                        "listener": listener.fileno() if rank == 0 else None,
                        "slots": self._slots if rank == 0 else [],
                    }
                    with theirs:
                        process = subprocess.Popen(
                            [sys.executable, "-m", "model.engine.rank", json.dumps(settings)],
                            stdin=subprocess.DEVNULL,
                            stdout=output or 2,
                            stderr=output or 2,
                            pass_fds=inherited,
                            process_group=0,
                            cwd=Path(__file__).resolve().parents[2],  # where `python -m` finds this very package
                            env={**os.environ, **own},
                        )
                    self._ranks.append(_Rank(process, Wire(Connection(ours.detach()))))
        finally:
            if output is not None:
                output.close()

    def _greeting(self, number: int) -> RankInfo:
        deadline = time.monotonic() + self.start_timeout
        while (left := deadline - time.monotonic()) > 0:
            connections = [rank.wire.connection for rank in self._ranks]
            for connection in wait(connections, min(left, 1.0)):
                other = connections.index(connection)  # pyright: ignore
                if other < number:  # has greeted: it can only have trouble to report
                    message = self._listen(other)
                    raise self._trouble(other, message, ())
                if other == number:
                    message = self._listen(number)
                    if message is None or message["type"] == "error":
                        raise self._trouble(number, message, ())
                    return RankInfo(**message["info"])
        raise RankHung(f"rank {number} was not ready after {self.start_timeout:g} s; {self._states()}")

    def _listen(self, number: int) -> Message | None:
        """What a rank says, None if it is gone."""
        try:
            message = self._ranks[number].wire.receive()
        except (EOFError, OSError):
            return None
        if message["file"] is not None:
            os.close(message["file"])
        return message

    def _trouble(self, number: int, message: Message | None, jobs: Sequence[_Job]) -> EngineError:
        """Finds the cause: the peers of a rank that died report broken collectives, which mean nothing."""
        reports = {number: message}
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            others = {r.wire.connection: k for k, r in enumerate(self._ranks) if k not in reports}
            if not others:
                break
            for connection in wait(list(others), deadline - time.monotonic()):
                other = others[connection]  # pyright: ignore
                said = self._listen(other)
                if said is None or said["type"] == "error":
                    reports[other] = said
        for k, said in reports.items():
            if said is None:
                with suppress(subprocess.TimeoutExpired):
                    self._ranks[k].process.wait(1)
                return RankDied(f"rank {k} of {len(self._ranks)} died ({_ending(self._ranks[k].process.poll())})")
        first = min((said for said in reports.values() if said is not None), key=lambda said: said["time"])
        if not self.ready:
            return StartFailed(first["reason"])
        if first["memory"]:
            return OutOfMemory(f"a rank ran out of memory ({self.micro_batch} at a time): {first['reason']}")
        if len(first["clips"]) == 1:
            return RenderFailed(first["clips"][0], first["reason"])
        return RankDied(f"a rank failed: {first['reason']}")

    def _states(self) -> str:
        """Where each rank is, as the kernel says."""
        states: list[str] = []
        for k, rank in enumerate(self._ranks):
            try:
                state = Path(f"/proc/{rank.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                state = "gone"
            names = {"R": "running", "S": "waiting", "D": "in the kernel", "T": "stopped", "Z": "dead"}
            states.append(f"rank {k} is {names.get(state, state)}")
        return ", ".join(states)

    def _end_ranks(self) -> None:
        """Ends every rank now and takes back what belonged to them."""
        if self._starter is not None:
            self._starter.shutdown()  # first, for an interrupt may have come while it still starts some
            self._starter = None
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            rank.process.wait()
            rank.wire.connection.close()
        for slot in self._slots:
            os.close(slot)
        self._ranks, self._slots, self._free, self._left, self.ready = [], [], [], {}, ()


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"
