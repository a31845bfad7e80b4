"""A renderer without ranks: deterministic frames in a millisecond; faults and waits that a test asks for by prompt.

It keeps the contract of `flows.render.renderer.Renderer` as `model.engine.engine.Engine` does, so that the real Worker
and Shard work with it: steps are told one by one, several clips are under way at once, a cancelled clip stops at its
next step, one that leaves is given to `on_checkpoint`, and ranks that died are gone until the next `start`.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from model.config import Partition
from model.engine.clip import (
    ClipSpec,
    DeviceFailed,
    EngineError,
    OutOfMemory,
    RankDied,
    RankHung,
    RenderedClip,
    RenderFailed,
    SavedState,
    StartFailed,
)
from model.engine.resume import fingerprint
from model.media.windows import Frames


class Fault(StrEnum):
    """Ways in which a clip can go wrong."""

    FAILS = "fails"  # the model refuses it; the ranks live on
    KILLS = "kills"  # a rank dies under it
    HANGS = "hangs"  # no rank gives a sign of life any more
    DEVICE = "device"  # a device fails under a rank
    OUT_OF_MEMORY = "out of memory"  # with more than one clip at a time


@dataclass(frozen=True, slots=True)
class Trouble:
    """A fault at the first `times` attempts of a clip, before the step `at`."""

    fault: Fault
    times: int = 1_000_000
    at: int = 1


@dataclass(slots=True)
class Script:
    """What happens to which clip, shared by all renderers of a test; and what they did. Keys are prompts."""

    trouble: dict[str, Trouble] = field(default_factory=dict[str, Trouble])
    broken: Fault | None = None  # of the machine: it strikes all clips
    held: dict[str, int] = field(default_factory=dict[str, int])  # the step at which a clip waits until it is let go
    attempts: Counter[str] = field(default_factory=Counter[str])  # times that a clip was begun
    steps: Counter[str] = field(default_factory=Counter[str])  # that were computed
    starts: int = 0  # of ranks
    bad_starts: int = 0  # of the next starts so many fail
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(slots=True)
class _Clip:
    spec: ClipSpec
    step: int
    kept_at: float
    began: float
    attempt: int
    times: list[float] = field(default_factory=list[float])

    def strikes(self, fault: Fault, trouble: Trouble | None) -> bool:
        return bool(
            trouble and trouble.fault is fault and self.attempt <= trouble.times and self.step + 1 == trouble.at
        )


class FakeRenderer:
    """`script` tells what goes wrong. step_timeout: seconds after which ranks that hang are given up."""

    def __init__(
        self,
        script: Script,
        model_digest: str,
        partition: Partition,
        *,
        micro_batch: int = 1,
        step_timeout: float = 0.3,
    ) -> None:
        self.script, self.model_digest, self.partition = script, model_digest, partition
        self.micro_batch, self.step_timeout = micro_batch, step_timeout
        self.running, self.killed = False, threading.Event()

    def start(self) -> None:
        if not self.running:
            with self.script.lock:
                self.script.starts += 1
                if self.script.bad_starts:
                    self.script.bad_starts -= 1
                    raise StartFailed("rank 1 of 2: NotEnoughDevices: partition tp=2 needs 2 GPUs")
            self.running = True
            self.killed.clear()

    def close(self) -> None:
        self.running = False

    def kill(self) -> None:
        self.killed.set()

    def fingerprint(self, spec: ClipSpec) -> str:
        return fingerprint(spec, self.model_digest, [str(self.partition), f"{self.micro_batch} at a time"])

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
        if not self.running:
            raise EngineError("the engine has not been started")
        waiting, active = list(specs), list[_Clip]()
        try:
            while waiting or active:
                if leave():
                    waiting.clear()
                while waiting and len(active) < self.micro_batch:
                    spec = waiting.pop(0)
                    if spec.clip_id not in cancelled():
                        active.append(self._begin(spec))
                        on_step(spec.clip_id, active[-1].step, spec.steps)
                for clip in tuple(active):
                    if clip.spec.clip_id in cancelled():
                        active.remove(clip)
                        continue
                    self._hold(clip, lambda clip=clip: leave() or clip.spec.clip_id in cancelled())
                    leaves = leave()
                    if failure := self._step(clip, len(active)):
                        active.remove(clip)
                        if on_failure is None:
                            raise failure
                        on_failure(failure)
                        continue
                    on_step(clip.spec.clip_id, clip.step, clip.spec.steps)
                    if clip.step == clip.spec.steps:
                        active.remove(clip)
                        if clip.spec.clip_id not in cancelled():
                            yield self._rendered(clip)
                    elif on_checkpoint and (leaves or self._is_due(clip, checkpoint_every)):
                        on_checkpoint(self._state(clip))
                        clip.kept_at = time.monotonic()
                        if leaves:
                            active.remove(clip)
        except OutOfMemory:
            self.running = False
            if self.micro_batch == 1:
                raise
            self.micro_batch //= 2
            self.start()
            unfinished = [*(clip.spec for clip in active), *waiting]
            yield from self.render(
                unfinished,
                on_step=on_step,
                cancelled=cancelled,
                on_failure=on_failure,
                on_checkpoint=on_checkpoint,
                checkpoint_every=checkpoint_every,
                leave=leave,
            )
        except RenderFailed:
            raise
        except EngineError:
            self.running = False
            raise

    def _begin(self, spec: ClipSpec) -> _Clip:
        with self.script.lock:
            self.script.attempts[spec.prompt] += 1
            attempt = self.script.attempts[spec.prompt]
        step = 0
        if spec.resume_state is not None:
            with suppress(ValueError):
                kept = json.loads(spec.resume_state)
                if kept["of"] == self.fingerprint(spec):
                    step = int(kept["step"])
        return _Clip(spec, step, time.monotonic(), time.time(), attempt)

    def _step(self, clip: _Clip, together: int) -> RenderFailed | None:
        """One denoising step. Raises as ranks do that die, hang or run out of memory."""
        self._wait(0.0)
        trouble = self.script.trouble.get(clip.spec.prompt)
        if self.script.broken is not None:
            trouble = Trouble(self.script.broken)
        if clip.strikes(Fault.DEVICE, trouble):
            raise DeviceFailed("a device failed under a rank: CUDA error: uncorrectable ECC error encountered")
        if clip.strikes(Fault.FAILS, trouble):
            return RenderFailed(clip.spec.clip_id, "the pixels are not finite")
        if clip.strikes(Fault.OUT_OF_MEMORY, trouble) and together > 1:
            raise OutOfMemory(f"a rank ran out of memory ({self.micro_batch} at a time)")
        if clip.strikes(Fault.KILLS, trouble):
            raise RankDied("rank 1 of 2 died (killed by SIGKILL)")
        if clip.strikes(Fault.HANGS, trouble):
            self._wait(self.step_timeout)
            raise RankHung(f"no step for {self.step_timeout:g} s; rank 0 is stopped, rank 1 is waiting")
        clip.step += 1
        clip.times.append(time.time())
        with self.script.lock:
            self.script.steps[clip.spec.prompt] += 1
        return None

    def _hold(self, clip: _Clip, ends: Callable[[], bool]) -> None:
        """Waits where the script holds the clip, until it lets it go or the clip is to end."""
        while self.script.held.get(clip.spec.prompt, clip.spec.steps) <= clip.step and not ends():
            self._wait(0.005)

    def _wait(self, seconds: float) -> None:
        if self.killed.wait(seconds):
            raise RankDied("rank 0 of 2 died (killed by SIGKILL)")

    def _is_due(self, clip: _Clip, every: tuple[int, float]) -> bool:
        steps, seconds = every
        by_step = steps > 0 and clip.step % steps == 0
        return by_step or (seconds > 0 and time.monotonic() - clip.kept_at >= seconds)

    def _state(self, clip: _Clip) -> SavedState:
        of = self.fingerprint(clip.spec)
        data = json.dumps({"of": of, "step": clip.step}).encode()
        return SavedState(clip_id=clip.spec.clip_id, step=clip.step, fingerprint=of, data=data)

    def _rendered(self, clip: _Clip) -> RenderedClip:
        ended = time.time()
        return RenderedClip(
            clip_id=clip.spec.clip_id,
            frames=frames_of(clip.spec, self.model_digest),
            seconds={"text": 0.0, "denoise": ended - clip.began, "decode": 0.0},
            spans=(("text", clip.began, clip.began), ("denoise", clip.began, ended), ("decode", ended, ended)),
            steps=tuple(clip.times),
            peak_bytes=1_000_000,
        )


def frames_of(spec: ClipSpec, model_digest: str) -> Frames:
    """The frames of a clip: a picture that its settings determine, which moves by a pixel a frame."""
    said = fingerprint(spec, model_digest, ())
    random = np.random.default_rng(int(hashlib.sha256(said.encode()).hexdigest()[:16], 16))
    colours = random.integers(0, 256, (spec.height // 16, spec.width // 16, 3), np.uint8)
    picture = np.repeat(np.repeat(colours, 16, 0), 16, 1)
    return np.stack([np.roll(picture, moved, 1) for moved in range(spec.frames)])
