"""Messages between an engine and its ranks: a frozen dataclass for each kind. `model.engine.wire` carries them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from model.engine.clip import ClipSpec, RankInfo
from model.engine.faults import Cause

Device = Literal["cpu", "cuda"]
Compile: TypeAlias = bool | Literal["reduce-overhead"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSettings:
    """The command line of a rank. The engine fills in the fields with defaults when it starts one."""

    path: str  # of the model
    partition: str
    device: Device
    dtype: str  # of the transformer
    threads: int
    micro_batch: int
    compile: Compile
    frame_step: int  # frames that become one latent frame
    boundary: float | None  # time between the two experts, where there are two
    rank: int = 0
    parent: int = 0  # process id of the engine
    port: int = 0  # where the ranks meet
    wire: int = -1  # descriptor of this rank's socket
    listener: int | None = None  # descriptor of the socket bound to `port`; rank 0 has it
    buffers: tuple[int, ...] = ()  # descriptors of the memory files for frames; rank 0 has them


# --- to a rank --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderClip:
    job: int
    clip: ClipSpec
    buffer: int  # the memory file for its frames
    fingerprint: str  # of its resume states; empty: it has none and saves none
    checkpoint_every: tuple[int, float]  # steps and seconds; 0: never


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelClip:
    """The clip is not wanted any more."""

    job: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SuspendClip:
    """The clip is to be saved at its next step, and to stop there."""

    job: int


@dataclass(frozen=True, slots=True)
class Exit:
    pass


# --- from a rank ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReady:
    info: RankInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFailed:
    """The last message of a rank that ends by an error."""

    reason: str
    clips: tuple[str, ...]  # that it was computing
    cause: Cause
    time: float  # unix seconds


@dataclass(frozen=True, slots=True)
class RankAtWork:
    """A sign of life within a step that measures a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipBegan:
    job: int
    step: int  # that it goes on from, over all windows


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsTaken:
    steps: tuple[tuple[int, int, int], ...]  # job, step, steps in all
    time: float  # unix seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipSaved:
    job: int
    step: int
    data: bytes  # a resume state


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipDone:
    """Its frames lie in its buffer. The fields are those of `RenderedClip`."""

    job: int
    seconds: dict[str, float]
    spans: tuple[tuple[str, float, float], ...]
    peak_bytes: int
    skipped_steps: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipFailed:
    job: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipDropped:
    """A clip that was cancelled or suspended takes no further step."""

    job: int


ToRank: TypeAlias = RenderClip | CancelClip | SuspendClip | Exit
Ended: TypeAlias = ClipDone | ClipFailed | ClipDropped
FromRank: TypeAlias = RankReady | RankFailed | RankAtWork | ClipBegan | StepsTaken | ClipSaved | Ended
