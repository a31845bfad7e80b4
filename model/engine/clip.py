"""Requests to an engine, its results and its failures: values and exceptions."""

from __future__ import annotations

from dataclasses import dataclass, field

from model.media.windows import Frames, Given


class EngineError(Exception):
    """The engine stopped. Its ranks are gone; `start` begins anew."""

    exit_code = 1


class RankDied(EngineError):
    """A rank's process ended, killed from outside or by an error. Start the engine again and repeat the clips."""


class OutOfMemory(RankDied):
    """A rank had no memory left for what it was given. Fewer clips at a time need less."""


class DeviceFailed(RankDied):
    """A device failed under a rank, or the connection of two: the machine's fault, not that of a clip."""


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
    step_cache: float | None = None  # in (0, 1]: steps that change less are not computed (`model.network.stepcache`)
    guidance_2: float | None = None  # of a second expert, where guidance is on; None: as guidance
    resume_state: bytes | None = field(default=None, compare=False, repr=False)  # where to go on from, if usable

    def __post_init__(self) -> None:
        for name, frames in (("start", self.start), ("end", self.end)):
            if frames is not None and (frames.shape[1:] != (self.height, self.width, 3) or not len(frames)):
                raise ValueError(f"{name} of clip {self.clip_id} is {frames.shape}, not frames of its size")
        if self.strength is not None and (self.start is None or not 0 < self.strength <= 1):
            raise ValueError(f"strength={self.strength} of clip {self.clip_id} must be in (0, 1], with a start")
        if self.step_cache is not None and not 0 < self.step_cache <= 1:
            raise ValueError(f"step_cache={self.step_cache} of clip {self.clip_id} must be in (0, 1], or None")

    @property
    def given(self) -> Given:
        """The known frames of its time line."""
        return Given(
            frames=self.frames,
            start=0 if self.start is None or self.strength is not None else len(self.start),
            end=0 if self.end is None else len(self.end),
            loop=self.loop,
            window=self.window,
            overlap=self.overlap,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedClip:
    """Frames, and how long they took. Times are unix seconds."""

    clip_id: str
    frames: Frames
    seconds: dict[str, float]  # text, denoise, decode; a step's time is shared among the clips that took it
    spans: tuple[tuple[str, float, float], ...]  # stage, from when, to when
    steps: tuple[float, ...]  # when each denoising step ended
    peak_bytes: int  # of memory, on the fullest rank, since its start
    skipped_steps: int | None = None  # that its step cache answered, over all windows; None: it has none

    @property
    def started(self) -> float:
        return self.spans[0][1]

    @property
    def finished(self) -> float:
        return self.spans[-1][2]


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedState:
    """The resume state of a clip. With `data` as its `resume_state` it goes on from there on any engine of one kind."""

    clip_id: str
    step: int  # over all windows
    fingerprint: str  # that an engine must give the clip to go on from here
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankInfo:
    """A rank's report when it is ready."""

    rank: int
    pid: int
    parameter_bytes: int  # of the transformer, on this rank
    self_test: float  # largest difference between the partitioned and the whole network, relative
    device: str  # its kind: what a GPU calls itself, or what a CPU can do
    seconds: dict[str, float]  # import, connect, load, self_test


BROUGHT = ("start", "end")  # frames that a clip brings
