"""The parent of a partitioned model: starts its ranks, hands them clips, takes frames back, ends them all on trouble.

Knows processes and bytes, no tensors: torch lives in the ranks (`model.rank`). Every rank gets the same jobs in the
same order over its own socket pair, as JSON; rank 0 answers with steps and results. Frames come back through two
anonymous memory files that the parent made and rank 0 inherited, so that nothing is left behind by whoever is killed.

Frames that a clip is to keep go to the ranks in a memory file of their own, whose descriptor follows the job.

Two jobs are under way at a time: while the caller encodes and stores the frames of one, the ranks denoise the next.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, fields
from mmap import PROT_READ, mmap
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from model.checkpoint import NotEnoughMemory, check_memory, free_bytes
from model.conditioning import Frames, Given
from model.config import Partition
from model.weights import find_model

Message: TypeAlias = "dict[str, Any]"
Device = Literal["cpu", "cuda"]
IN_FLIGHT = 2
POLL = 0.1  # seconds between two looks at what has been cancelled


class EngineError(Exception):
    """The engine stopped. Its ranks are gone; `start` begins anew."""


class RankDied(EngineError):
    """A rank's process ended, killed from outside or out of memory. Start the engine again and repeat the clips."""


class RankHung(EngineError):
    """No rank gave a sign of life for longer than the timeout. Start the engine again and repeat the clips."""


class StartFailed(EngineError):
    """The ranks could not load the model, or failed their self-test. Starting again will not help."""


class RenderFailed(EngineError):
    """A clip cannot be rendered: the model refuses its settings, or computes no finite pixels. `clip_id` says which."""

    def __init__(self, clip_id: str, reason: str) -> None:
        super().__init__(clip_id, reason)
        self.clip_id, self.reason = clip_id, reason

    def __str__(self) -> str:
        return f"clip {self.clip_id}: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipSpec:
    """All that determines the pixels of one clip, given the model."""

    clip_id: str
    prompt: str
    negative_prompt: str
    seed: int
    width: int
    height: int
    frames: int
    fps: int
    steps: int
    guidance: float
    solver: str
    shift: float
    start: Frames | None = field(default=None, compare=False, repr=False)  # [n, height, width, 3]: how it begins
    end: Frames | None = field(default=None, compare=False, repr=False)  # how it ends
    loop: bool = False  # after its last frame it comes back to its first one
    strength: float | None = None  # in (0, 1]: `start` is not kept but edited, the more the higher
    window: int = 0  # most frames to make at once; 0: all of them
    overlap: int = 5  # frames that a window takes over from the one before

    def __post_init__(self) -> None:
        for name, frames in (("start", self.start), ("end", self.end)):
            if frames is not None and (frames.shape[1:] != (self.height, self.width, 3) or not len(frames)):
                raise ValueError(f"{name} of clip {self.clip_id} is {frames.shape}, not frames of its size")
        if self.strength is not None and (self.start is None or not 0 < self.strength <= 1):
            raise ValueError(f"strength={self.strength} of clip {self.clip_id} must be in (0, 1], with a start")

    @property
    def given(self) -> Given:
        """What is known of its time line."""
        return Given(
            frames=self.frames,
            start=0 if self.start is None or self.strength is not None else len(self.start),
            end=0 if self.end is None else len(self.end),
            loop=self.loop,
            window=self.window,
            overlap=self.overlap,
        )

    @property
    def alike(self) -> tuple[object, ...]:
        """Clips that agree in this can be denoised as one batch."""
        size = self.width, self.height, self.given, self.strength
        return *size, self.steps, self.guidance, self.solver, self.shift


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedClip:
    """Frames, and how long they took. Times are unix seconds; a clip's share of a micro-batch is an equal one."""

    clip_id: str
    frames: Frames
    seconds: dict[str, float]  # text, denoise, decode
    steps: tuple[float, ...]  # when each denoising step ended
    started: float
    finished: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RankInfo:
    """What a rank said when it was ready."""

    rank: int
    pid: int
    parameter_bytes: int  # of the transformer, on this rank
    self_test: float  # largest difference between the partitioned and the whole network, relative
    seconds: dict[str, float]  # import, connect, load, self_test


@dataclass(slots=True)
class _Job:
    number: int
    specs: Sequence[ClipSpec]
    steps: list[float] = field(default_factory=list)
    told: set[str] = field(default_factory=set)  # clips whose cancellation the ranks know of


@dataclass(slots=True)
class _Rank:
    process: subprocess.Popen[bytes]
    wire: Wire


class Wire:
    """JSON messages over a socket pair, some with an open file."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def send(self, message: Message, file: int | None = None) -> None:
        """`file` is a descriptor that the other side gets one of its own for. Raises OSError when it is gone."""
        self.connection.send_bytes(json.dumps({**message, "file": file is not None}).encode())
        if file is not None:
            send_handle(self.connection, file, None)

    def receive(self) -> Message:
        """Waits for a message; "file" is a descriptor or None. Raises EOFError or OSError when the other is gone."""
        message = json.loads(self.connection.recv_bytes())
        message["file"] = recv_handle(self.connection) if message["file"] else None
        return message


class Engine:
    """One model on `partition.world` ranks of this machine. Not for use from two threads at a time.

    step_timeout: seconds without a sign of life (a step, a decoded clip) after which the ranks count as hung.
    start_timeout: seconds that loading may take.
    micro_batch: clips of one shape that are denoised together. Only 1 gives a clip the same bytes whatever comes with
        it: sums over a batch of another size may round differently. (On one CPU batches of 2 and 3 gave the bytes that
        single clips did; of 6, one pixel value in 80,000 was one level off.)
    dtype: of the transformer; by default float32 on a CPU and bfloat16 on CUDA.
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
        self.gpus, self.log = gpus, log
        self.ready: tuple[RankInfo, ...] = ()
        self._ranks: list[_Rank] = []
        self._slots: list[int] = []
        self._next_job = 0

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    @property
    def running(self) -> bool:
        return bool(self._ranks)

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
            self._spawn()
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

    def render(
        self,
        specs: Sequence[ClipSpec],
        *,
        on_step: Callable[[str, int, int], None] = lambda clip_id, step, steps: None,
        cancelled: Callable[[], set[str]] = set,
    ) -> Generator[RenderedClip]:
        """Yields the clips one by one, in order; the ranks work on while the caller looks at one.

        `on_step(clip_id, step, steps)` is called with step 0 when a clip's turn has come, and after each denoising
        step; a clip made in several windows takes more of them than it asks for, an edit fewer. `cancelled()` is asked
        many times a second for the ids that nobody wants any more: a running one stops at its next step, and none of
        them is yielded.
        Raises RenderFailed, RankDied or RankHung; the ranks are gone then.
        """
        if not self._ranks:
            raise EngineError("the engine has not been started")
        waiting = deque(self._batches(specs))
        jobs: deque[_Job] = deque()
        heard, begun = time.monotonic(), -1
        try:
            while waiting or jobs:
                dropped = cancelled()
                while waiting and len(jobs) < IN_FLIGHT:
                    batch = waiting.popleft()
                    if wanted := [spec for spec in batch if spec.clip_id not in dropped]:
                        jobs.append(self._submit(wanted))
                for job in jobs:
                    self._cancel(job, dropped)
                if jobs and jobs[0].number != begun:
                    begun = jobs[0].number
                    for spec in jobs[0].specs:
                        on_step(spec.clip_id, 0, spec.steps)
                message = self._next_message(jobs)
                if message is None:
                    if jobs and time.monotonic() - heard > self.step_timeout:
                        raise RankHung(f"no step for {self.step_timeout:g} s; {self._states()}")
                    continue
                heard = time.monotonic()
                job = next((job for job in jobs if job.number == message["job"]), None)
                if job is None:  # of a render that its caller left
                    continue
                if message["type"] == "step":
                    job.steps.append(message["time"])
                    for spec in job.specs:
                        on_step(spec.clip_id, message["step"], message["steps"])
                elif message["type"] == "done":
                    jobs.remove(job)
                    clips = self._collect(job, message)
                    yield from (clip for clip in clips if clip.clip_id not in cancelled())
                    heard = time.monotonic()
        except EngineError:
            self._end_ranks()
            raise
        finally:
            with suppress(OSError):
                for job in jobs:  # the caller has left, or a clip has failed
                    self._cancel(job, {spec.clip_id for spec in job.specs})

    def _batches(self, specs: Sequence[ClipSpec]) -> list[list[ClipSpec]]:
        """Neighbours that are alike, at most `micro_batch` of them."""
        batches: list[list[ClipSpec]] = []
        for spec in specs:
            if batches and len(batches[-1]) < self.micro_batch and batches[-1][0].alike == spec.alike:
                batches[-1].append(spec)
            else:
                batches.append([spec])
        return batches

    def _submit(self, specs: list[ClipSpec]) -> _Job:
        job = _Job(self._next_job, specs)
        self._next_job += 1
        message = {"type": "render", "job": job.number, "clips": [_without_pixels(spec) for spec in specs]}
        file = _pixels_file(specs)
        try:
            for number in range(len(self._ranks)):
                self._tell(number, message, file)
        finally:
            if file is not None:
                os.close(file)
        return job

    def _cancel(self, job: _Job, dropped: set[str]) -> None:
        """Rank 0 tells the others at the next step, so that all stop at the same one."""
        news = dropped & {spec.clip_id for spec in job.specs} - job.told
        if news and self._ranks:
            job.told |= news
            self._tell(0, {"type": "cancel", "job": job.number, "clips": sorted(news)})

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

    def _collect(self, job: _Job, message: Message) -> list[RenderedClip]:
        """Copies the frames of a job out of its memory file."""
        finished, clips, offset = message["time"], list[RenderedClip](), 0
        for spec in job.specs:
            if spec.clip_id in message["cancelled"]:
                continue
            frames = np.empty((spec.frames, spec.height, spec.width, 3), np.uint8)
            view = frames.reshape(-1).data
            while view:
                count = os.preadv(self._slots[job.number % IN_FLIGHT], [view], offset)
                if not count:
                    raise RenderFailed(spec.clip_id, f"rank 0 wrote {offset} bytes of frames, more were announced")
                view, offset = view[count:], offset + count
            clips.append(
                RenderedClip(
                    clip_id=spec.clip_id,
                    frames=frames,
                    seconds=message["seconds"],
                    steps=tuple(job.steps),
                    started=message["started"],
                    finished=finished,
                )
            )
        return clips

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
        }
        if self.gpus is not None and self.device == "cuda":
            shown = os.environ.get("CUDA_VISIBLE_DEVICES")  # the numbers count those that this process sees
            names = shown.split(",") if shown else [str(number) for number in range(max(self.gpus) + 1)]
            own["CUDA_VISIBLE_DEVICES"] = ",".join(names[number] for number in self.gpus)
        self._slots = [os.memfd_create(f"rushes-frames-{k}") for k in range(IN_FLIGHT)]
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
                        "frame_step": self.card.frame_step,
                        "boundary": self.card.boundary,
                        "parent": os.getpid(),
                        "wire": theirs.fileno(),
                        "listener": listener.fileno() if rank == 0 else None,
                        "slots": self._slots if rank == 0 else [],
                    }
                    with theirs:
                        process = subprocess.Popen(
                            [sys.executable, "-m", "model.rank", json.dumps(settings)],
                            stdin=subprocess.DEVNULL,
                            stdout=output or 2,
                            stderr=output or 2,
                            pass_fds=inherited,
                            process_group=0,
                            cwd=Path(__file__).resolve().parents[1],  # where `python -m` finds this very package
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
            return self._ranks[number].wire.receive()
        except (EOFError, OSError):
            return None

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
        if first["clips"]:
            return RenderFailed(first["clips"][0], first["reason"])
        return EngineError(first["reason"]) if self.ready else StartFailed(first["reason"])

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
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            rank.process.wait()
            rank.wire.connection.close()
        for slot in self._slots:
            os.close(slot)
        self._ranks, self._slots, self.ready = [], [], ()


PIXELS = ("start", "end")


def _without_pixels(spec: ClipSpec) -> Message:
    """A clip as a rank is told of it; of frames their number, since they come in a memory file."""
    counts = {name: len(frames) for name in PIXELS if (frames := getattr(spec, name)) is not None}
    return {each.name: getattr(spec, each.name) for each in fields(spec) if each.name not in PIXELS} | counts


def _pixels_file(specs: Sequence[ClipSpec]) -> int | None:
    """A memory file with the frames that the clips bring, one after the other; None if they bring none."""
    parts = [np.ascontiguousarray(f) for spec in specs for f in (spec.start, spec.end) if f is not None]
    if not parts:
        return None
    with ExitStack() as unless_whole:
        file = os.memfd_create("rushes-sources")
        unless_whole.callback(os.close, file)
        for part in parts:
            view = part.reshape(-1).data
            while view:
                view = view[os.write(file, view) :]
        unless_whole.pop_all()
    return file


def clips_in(message: Message) -> list[ClipSpec]:
    """The clips of a job as a rank got it, their frames mapped from the memory file, which is closed."""
    if message["file"] is None:
        return [ClipSpec(**clip) for clip in message["clips"]]
    with open(message["file"], "rb") as file:
        pixels = np.frombuffer(mmap(file.fileno(), 0, prot=PROT_READ), np.uint8)
    specs: list[ClipSpec] = []
    for clip in message["clips"]:
        for name in PIXELS:
            if name in clip:
                shape = clip[name], clip["height"], clip["width"], 3
                clip[name], pixels = pixels[: math.prod(shape)].reshape(shape), pixels[math.prod(shape) :]
        specs.append(ClipSpec(**clip))
    return specs


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"
