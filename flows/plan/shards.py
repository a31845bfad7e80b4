"""How a request is cut into shards, and how many engines it deserves: decisions only, on plain values.

A shard is what one engine leases at a time. All its clips have one shape (size, length, steps, guidance on or off), so
an engine can denoise several together. It should take about `shard_seconds`: a lost engine then loses little and a
priority is soon felt, yet leasing costs nothing beside rendering. What a clip will take is predicted from what earlier
clips took, by the rates of `flows.plan.layout`.

It knows neither Prefect nor the ledger nor the model's weights: `flows.generate` brings the clips and carries out the
plan.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import NamedTuple, Protocol

from flows.plan.layout import (
    Gpu,
    Network,
    Rates,
    Staged,
    Work,
    best_layout,
    cheapest_layout,
    partition_of,
    shared_partition,
)
from model.config import ClipShape, Partition

MAX_SHARDS = 1000  # of one request: each is a Prefect task run, and a flow run stays readable up to about so many
START_SECONDS = 15.0  # what an engine costs before its first clip: flow run, processes, weights (6 to 16 s measured)

LEAST_SECONDS = 1e-3  # that any clip is predicted to take


class Sized(Protocol):
    """The sizes that a clip's cost depends on."""

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
    def window(self) -> int | None: ...
    @property
    def made_frames(self) -> int | None: ...


class Waiting(Sized, Protocol):
    """A clip that no shard holds yet."""

    @property
    def clip_id(self) -> str: ...
    @property
    def suspect(self) -> bool: ...  # it failed before, or was lost with its engine


class Finished(Sized, Protocol):
    """Finished clips of a shape, and the seconds that one took of an engine of some partition: in all, and by stage."""

    @property
    def partition(self) -> str: ...
    @property
    def seconds(self) -> float: ...
    @property
    def stages(self) -> Mapping[str, float]: ...


class WorkShape(NamedTuple):
    """The size that all clips of a shard have in common."""

    width: int
    height: int
    frames: int
    steps: int
    guided: bool  # guidance runs the model twice a step
    mode: str = "text-to-video"
    strength: float = 1.0  # of an edit, which takes about this share of the steps
    made: int = 0  # frames that go through the model, where that is not `frames`
    window: int = 0  # most of them at once; 0: all

    @classmethod
    def of(cls, clip: Sized) -> WorkShape:
        mode, strength, made, window = str(clip.mode), clip.strength or 1.0, clip.made_frames or 0, clip.window or 0
        guided = clip.guidance != 1
        return cls(clip.width, clip.height, clip.frames, clip.steps, guided, mode, strength, made, window)

    @property
    def work(self) -> Work:
        """One clip of it, as the planner of GPUs sees it."""
        size, steps = ClipShape(self.width, self.height, self.frames), math.ceil(self.steps * self.strength)
        return Work(size=size, steps=steps, guided=self.guided, made=self.made, window=self.window)


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """Clips for one engine to lease together, in the order of the request."""

    shape: WorkShape
    clip_ids: tuple[str, ...]
    seconds: float  # predicted


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Predicts what a clip takes of an engine of some partition.

    What was measured of a shape on a partition beats any formula. Then come the rates of what ran on that partition,
    and where nothing did, those of all partitions together, scaled by their number of ranks.
    """

    network: Network
    rates: Rates
    of_partition: Mapping[Partition, Rates] = field(default_factory=dict[Partition, Rates])
    measured: Mapping[tuple[WorkShape, Partition], float] = field(
        default_factory=dict[tuple[WorkShape, Partition], float]
    )

    def seconds(self, shape: WorkShape, partition: Partition) -> float:
        """Predicted engine seconds of one clip; always above zero."""
        known = self.measured.get((shape, partition))
        return known or max(LEAST_SECONDS, self.formula(shape.work, partition))

    def formula(self, work: Work, partition: Partition) -> float:
        """Predicted seconds of one clip, by the rates alone."""
        return self.of_partition.get(partition, self.rates).seconds(work, self.network, partition.world)

    def memory(self, shape: WorkShape, partition: Partition, at_once: int = 1) -> int | None:
        """Predicted bytes on the fullest rank, which denoises so many clips at once; None where that is not known."""
        return (
            None if self.network.guessed else self.network.memory(shape.work.at_once, partition, shape.guided, at_once)
        )

    @classmethod
    def from_history(cls, finished: Iterable[Finished], network: Network, assumed: Rates) -> CostModel:
        """Measured rates, and assumed ones where nothing was measured. Medians: one slow clip does not mislead."""
        taken: dict[tuple[WorkShape, Partition], list[Finished]] = {}
        for clip in finished:
            if clip.seconds > 0 and math.isfinite(clip.seconds):
                taken.setdefault((WorkShape.of(clip), Partition.parse(clip.partition)), []).append(clip)
        known = {of: median(clip.seconds for clip in clips) for of, clips in taken.items()}
        timed = {
            (shape, partition): Staged(
                shape.work,
                partition.world,
                {stage: median(clip.stages[stage] for clip in clips) for stage in clips[0].stages},
            )
            for (shape, partition), clips in taken.items()
        }
        rates = Rates.fit_stages(list(timed.values()), network, assumed)
        partitions = {partition for _, partition in timed}
        of_partition = {
            each: Rates.fit_stages([m for (_, where), m in timed.items() if where == each], network, rates)
            for each in partitions
        }
        return cls(network=network, rates=rates, of_partition=of_partition, measured=known)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaGroup:
    """Clips for engines of one partition, of which so many should run at once."""

    partition: Partition
    replicas: int
    waiting: Sequence[Waiting]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrangement:
    """Who renders what, those first whose turn is first."""

    groups: tuple[ReplicaGroup, ...]
    gpus: int  # that it takes
    seconds: float  # from the first clip's beginning to the last one's end


@dataclass(frozen=True, slots=True)
class ByReplica:
    """The cost model, asked about replicas of so many GPUs (flows.plan.layout.Predictor)."""

    cost: CostModel
    gpu: Gpu

    def seconds(self, work: Work, network: Network, gpus: int = 1) -> float:
        partition = partition_of(network, work.at_once, gpus, self.gpu, work.guided) or Partition(sp=gpus)
        return max(LEAST_SECONDS, self.cost.formula(work, partition))


def arrange(
    waiting: Sequence[Waiting], cost: CostModel, gpu: Gpu, gpus: int, deadline: float | None = None
) -> Arrangement:
    """Which partition renders which clips: all done soonest, or by a deadline (in seconds) with the fewest GPU-hours.

    Of a shape, the clips asked for first come first. Where no layout meets the deadline it is the soonest one, and its
    `seconds` say so. Raises CannotFit when no replica holds one of the shapes.
    """
    clips: dict[Work, list[Waiting]] = {}
    for clip in waiting:
        clips.setdefault(WorkShape.of(clip).work, []).append(clip)
    work = [replace(each, clips=len(alike)) for each, alike in clips.items()]
    rates = ByReplica(cost, gpu)
    if deadline is None:
        layout = best_layout(work, cost.network, rates, gpu, gpus, pause=START_SECONDS)
    else:
        layout = cheapest_layout(work, cost.network, rates, gpu, gpus, deadline, pause=START_SECONDS)
    groups: list[ReplicaGroup] = []
    for phase in layout.phases:
        shared = shared_partition(cost.network, phase.work, phase.gpus, gpu)
        parts: dict[Partition, list[Waiting]] = {}
        for each in phase.work:
            own = shared or partition_of(cost.network, each.at_once, phase.gpus, gpu, each.guided)
            assert own is not None  # or there would be no such layout
            alike = clips[replace(each, clips=1)]
            parts.setdefault(own, []).extend(alike[: each.clips])
            del alike[: each.clips]
        groups += [ReplicaGroup(partition=own, replicas=phase.replicas, waiting=part) for own, part in parts.items()]
    return Arrangement(groups=tuple(groups), gpus=layout.gpus, seconds=layout.seconds)


def shards(
    waiting: Sequence[Waiting],
    cost: Callable[[WorkShape], float],
    *,
    seconds: float,
    engines: int = 1,
    room: int = MAX_SHARDS,
    remaining: int | None = None,
    fewest: int = 1,
) -> list[PlannedShard]:
    """Cuts clips into shards of one shape each. `cost`: the predicted seconds of one clip.

    Shards take about `seconds`, and have at least `fewest` clips where there are so many for each engine: what is
    rendered one by one is neither batched nor published while the next is rendered. But there are at least as many
    shards as engines to feed (if there are so many clips), and at most `room` (larger ones then), or one for every
    shape where there are more shapes than that. `remaining`, when planning goes in waves, is how many clips of the
    request are still to be planned, these included: this wave then takes its part of the room only. Shards come in the
    order of the request: what was asked first is seen first.
    """
    groups: dict[WorkShape, list[str]] = {}
    place: dict[str, int] = {}
    for clip in waiting:
        place[clip.clip_id] = len(place)
        groups.setdefault(WorkShape.of(clip), []).append(clip.clip_id)
    if not groups:
        return []
    room = max(len(groups), room * len(waiting) // max(len(waiting), remaining or 0))
    counts = _counts(
        {shape: (len(ids), cost(shape)) for shape, ids in groups.items()},
        seconds=seconds,
        at_least=min(engines, len(waiting), room),
        at_most=room,
        fewest=fewest,
    )
    planned = [
        PlannedShard(shape, tuple(part), len(part) * cost(shape))
        for shape, ids in groups.items()
        for part in _split(ids, counts[shape])
    ]
    return sorted(planned, key=lambda shard: place[shard.clip_ids[0]])


def _counts(
    groups: dict[WorkShape, tuple[int, float]], *, seconds: float, at_least: int, at_most: int, fewest: int
) -> dict[WorkShape, int]:
    """How many shards each shape gets. `groups`: clips of a shape and seconds of one of them."""

    def most(n: int) -> int:
        count = max(1, n // fewest)
        if fewest > 1 and count > at_least > 1:
            count -= count % at_least  # as many for each engine: none has one more of these long shards than others
        return count

    def ask(target: float) -> dict[WorkShape, int]:
        return {shape: min(most(n), max(1, math.ceil(n * each / target))) for shape, (n, each) in groups.items()}

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
