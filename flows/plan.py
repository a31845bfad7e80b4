"""How a request is cut into shards, and how many engines it deserves: decisions only, on plain values.

A shard is what one engine leases at a time. All its clips have one shape (size, length, steps, guidance on or off), so
an engine can denoise several together. It should take about `shard_seconds`: a lost engine then loses little and a
priority is soon felt, yet leasing costs nothing beside rendering. What a clip will take is predicted from what earlier
clips took.

It knows neither Prefect nor the ledger nor the model: `flows.generate` brings the clips and carries out the plan.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple, Protocol

MAX_SHARDS = 1000  # of one request: each is a Prefect task run, and a flow run stays readable up to about so many
START_SECONDS = 15.0  # what an engine costs before its first clip: flow run, processes, weights (6 to 16 s measured)

# On two CPU cores mini took 0.91 s for a single clip of 80 tokens, 25 steps and two passes a step.
SECONDS_PER_TOKEN_PASS = 2e-4
SECONDS_PER_CLIP = 0.1  # text, decoder, encoder, store


class Sized(Protocol):
    """What a clip's cost depends on."""

    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def frames(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def guidance(self) -> float: ...
    @property
    def mode(self) -> str: ...
    @property
    def strength(self) -> float | None: ...
    @property
    def made_frames(self) -> int | None: ...


class Waiting(Sized, Protocol):
    """A clip that no shard holds yet."""

    @property
    def clip_id(self) -> str: ...


class Measured(Sized, Protocol):
    """A finished clip, and the seconds it took of its engine."""

    @property
    def seconds(self) -> float: ...


class Shape(NamedTuple):
    """What all clips of a shard have in common."""

    width: int
    height: int
    frames: int
    steps: int
    guided: bool  # guidance runs the model twice a step
    mode: str = "text-to-video"
    strength: float = 1.0  # of an edit, which takes about this share of the steps
    made: int = 0  # frames that go through the model, where that is not `frames`

    @classmethod
    def of(cls, clip: Sized) -> Shape:
        guided = clip.guidance != 1
        mode, strength, made = str(clip.mode), clip.strength or 1.0, clip.made_frames or 0
        return cls(clip.width, clip.height, clip.frames, clip.steps, guided, mode, strength, made)

    @property
    def token_passes(self) -> int:
        """Tokens that the transformer sees over all steps, for a token of 16x16 pixels and 4 frames.

        A model with other patches differs by a constant factor, which the measured rate contains.
        """
        frames = ((self.made or self.frames) - 1) // 4 + 1
        steps = math.ceil(self.steps * self.strength)
        return frames * math.ceil(self.width / 16) * math.ceil(self.height / 16) * steps * (1 + self.guided)


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """Clips for one engine to lease together, in the order of the request."""

    shape: Shape
    clip_ids: tuple[str, ...]
    seconds: float  # predicted


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Predicts engine seconds: so much a clip, and so much for every token in every pass through the model.

    `by_shape` holds what was measured for a shape itself, which beats any formula (attention grows with the square of
    the tokens; a small clip leaves the device half idle).
    """

    per_clip: float = SECONDS_PER_CLIP
    per_token_pass: float = SECONDS_PER_TOKEN_PASS
    by_shape: dict[Shape, float] = field(default_factory=dict[Shape, float])

    def seconds(self, shape: Shape) -> float:
        """Predicted seconds of one clip; always above zero."""
        return self.by_shape.get(shape) or self.per_clip + self.per_token_pass * shape.token_passes

    @classmethod
    def from_history(cls, finished: Iterable[Measured]) -> CostModel:
        """What was measured, and the defaults where nothing was. Medians, so that one slow clip misleads nobody."""
        seconds: dict[Shape, list[float]] = {}
        for clip in finished:
            if clip.seconds > 0 and math.isfinite(clip.seconds):
                seconds.setdefault(Shape.of(clip), []).append(clip.seconds)
        if not seconds:
            return cls()
        known = {shape: median(taken) for shape, taken in seconds.items()}
        rates = [max(0.0, each - SECONDS_PER_CLIP) / shape.token_passes for shape, each in known.items()]
        return cls(per_token_pass=median(rates), by_shape=known)


def shards(
    waiting: Sequence[Waiting],
    cost: CostModel,
    *,
    seconds: float,
    engines: int = 1,
    room: int = MAX_SHARDS,
    remaining: int | None = None,
) -> list[PlannedShard]:
    """Cuts clips into shards of one shape each.

    Shards take about `seconds`, but there are at least as many as engines to feed (if there are so many clips), and at
    most `room` (larger ones then), or one for every shape where there are more shapes than that. `remaining`, when
    planning goes in waves, is how many clips of the request are still to be planned, these included: this wave then
    takes its part of the room only. Shards come in the order of the request: what was asked first is seen first.
    """
    groups: dict[Shape, list[str]] = {}
    place: dict[str, int] = {}
    for clip in waiting:
        place[clip.clip_id] = len(place)
        groups.setdefault(Shape.of(clip), []).append(clip.clip_id)
    if not groups:
        return []
    room = max(len(groups), room * len(waiting) // max(len(waiting), remaining or 0))
    counts = _counts(
        {shape: (len(ids), cost.seconds(shape)) for shape, ids in groups.items()},
        seconds=seconds,
        at_least=min(engines, len(waiting), room),
        at_most=room,
    )
    planned = [
        PlannedShard(shape, tuple(part), len(part) * cost.seconds(shape))
        for shape, ids in groups.items()
        for part in _split(ids, counts[shape])
    ]
    return sorted(planned, key=lambda shard: place[shard.clip_ids[0]])


def _counts(groups: dict[Shape, tuple[int, float]], *, seconds: float, at_least: int, at_most: int) -> dict[Shape, int]:
    """How many shards each shape gets. `groups`: clips of a shape and seconds of one of them."""

    def ask(target: float) -> dict[Shape, int]:
        return {shape: min(n, max(1, math.ceil(n * each / target))) for shape, (n, each) in groups.items()}

    counts = ask(seconds)
    if sum(counts.values()) > at_most:
        # Every shape may round up by one, so that many shards are set aside; then the sum cannot exceed the room.
        spare = at_most - len(groups)
        total = sum(n * each for n, each in groups.values())
        counts = ask(total / spare) if spare > 0 else dict.fromkeys(groups, 1)
    # Engines without a shard would stand idle: halve the longest shards first.
    longest = [(-n * each / counts[shape], shape) for shape, (n, each) in groups.items() if counts[shape] < n]
    heapq.heapify(longest)
    for _ in range(at_least - sum(counts.values())):
        _, shape = heapq.heappop(longest)
        counts[shape] += 1
        n, each = groups[shape]
        if counts[shape] < n:
            heapq.heappush(longest, (-n * each / counts[shape], shape))
    return counts


def _split(ids: list[str], parts: int) -> Iterable[list[str]]:
    """`parts` runs of equal length, give or take one."""
    size, longer = divmod(len(ids), parts)
    start = 0
    for part in range(parts):
        end = start + size + (part < longer)
        yield ids[start:end]
        start = end


def engines_wanted(seconds: float, shards: int, most: int, *, start_seconds: float = START_SECONDS) -> int:
    """How many engines the queued work deserves: no more than there are shards, nor than `most`.

    Another engine pays when it has at least as much to render as it costs to start.
    """
    if shards <= 0 or most <= 0:
        return 0
    worth = max(1, math.floor(seconds / start_seconds)) if math.isfinite(seconds) else most
    return min(shards, most, worth)
