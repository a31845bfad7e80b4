"""How many GPUs should render one clip, and how many clips at once: pure functions on plain values.

One GPU a clip gives the most clips an hour, wherever a clip fits; more GPUs a clip give the next clip sooner, and are
needed where one is too small. So a batch is best begun with many small replicas and ended with few large ones, and how
far to go depends on how many clips there are, how long each takes, and when all must be done.

A clip on n GPUs is predicted to take `parallel / n + serial` seconds: the part that every further GPU shortens, and the
part that none does (Amdahl 1967). Both follow from the network's operations, the steps and the clip's pixels, with
rates that are fitted to what was measured.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import median
from typing import NamedTuple, Protocol

from model.config import ClipShape, DiTConfig, Partition

PETA, MEGA, GIB = 1e15, 1e6, 1 << 30
SPARE = 0.08  # of a GPU's memory for what nobody counts: the context, fragments, the allocator's slack


class CannotFit(ValueError):
    """No partition of the GPUs at hand holds the model and a clip of this shape. The message says what it takes."""

    exit_code = 1


class BadGpus(ValueError):
    """The GPUs are not said as a number and a known kind, like 8xh200."""

    exit_code = 2


class Gpu(NamedTuple):
    """One GPU: bytes of memory, and dense bfloat16 operations a second as its maker states them."""

    memory: int
    flops: float


GPUS = {  # data sheets, SXM versions where there are several
    "a100": Gpu(80 * GIB, 312e12),
    "h100": Gpu(80 * GIB, 989e12),
    "h200": Gpu(141 * GIB, 989e12),
    "b200": Gpu(180 * GIB, 2250e12),
    "l40s": Gpu(48 * GIB, 362e12),
    "rtx4090": Gpu(24 * GIB, 165e12),
    "cpu": Gpu(4 * GIB, 80e9),  # a core of a server and its share of the memory, in float32
}


def parse_gpus(text: str) -> tuple[int, str]:
    """Reads 8xh200, or 2xcpu for two ranks on a CPU. Raises BadGpus."""
    said = re.fullmatch(r"(\d{1,5})x([a-z0-9]+)", text.strip().lower())
    if said is None or said[2] not in GPUS or not int(said[1]):
        raise BadGpus(f"the GPUs {text!r} must be a number and a kind, like 8xh200; kinds: {', '.join(sorted(GPUS))}")
    return int(said[1]), said[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """The sizes of a model that a clip's cost depends on."""

    dit: DiTConfig
    text_tokens: int = 512
    stride: tuple[int, int, int] = (4, 8, 8)  # of the autoencoder: frames, rows, columns
    experts: int = 1  # transformers in memory, of which one works at a time
    beside: int = 0  # bytes of text encoder and autoencoder
    bytes_each: int = 2  # of a weight: bfloat16 on GPUs, float32 on CPUs
    guessed: bool = False  # nobody has looked at the model itself: its memory is not known

    def tokens(self, size: ClipShape) -> int:
        """Length of the transformer's sequence."""
        _, rows, columns = (stride * patch for stride, patch in zip(self.stride, self.dit.patch, strict=True))
        frames = math.ceil(((size.frames - 1) // self.stride[0] + 1) / self.dit.patch[0])
        return frames * math.ceil(size.height / rows) * math.ceil(size.width / columns)

    def operations(self, size: ClipShape) -> float:
        """Floating point operations of one pass."""
        return float(self.dit.operations(self.tokens(size), self.text_tokens))

    @property
    def weights(self) -> int:
        """Bytes of the transformers' blocks: all but all of their parameters."""
        width = self.dit.width
        return self.bytes_each * self.experts * self.dit.layers * (8 * width**2 + 2 * width * self.dit.ffn_dim)

    def memory(self, size: ClipShape, partition: Partition, guided: bool, at_once: int = 1) -> int:
        """Bytes on the fullest GPU of a partition that denoises so many clips at once.

        Activations are counted as the widest moment of a block: the stream in two types, queries, keys, values and
        output, and the feed-forward's hidden channels.
        """
        copies = at_once * (2 if guided and partition.cfg == 1 else 1)
        channels = 10 * self.dit.width + 2 * self.dit.ffn_dim // partition.tp
        activations = self.bytes_each * copies * channels * math.ceil(self.tokens(size) / partition.sp)
        return self.weights // partition.tp + self.beside + activations


def wan(
    layers: int, heads: int, ffn: int, *, channels: int = 16, stride: tuple[int, int, int] = (4, 8, 8), experts: int = 1
) -> Network:
    """A release of Wan: heads of 128 channels, UMT5-XXL (11 GB in bfloat16) and an autoencoder of half a gigabyte."""
    dit = DiTConfig(
        layers=layers,
        heads=heads,
        head_dim=128,
        ffn_dim=ffn,
        text_dim=4096,
        in_channels=channels,
        out_channels=channels,
    )
    return Network(dit=dit, stride=stride, experts=experts, beside=12 * GIB)


RELEASES = {
    "wan-1.3b": wan(30, 12, 8960),
    "wan-14b": wan(40, 40, 13824),
    "wan-5b": wan(30, 24, 14336, channels=48, stride=(4, 16, 16)),
    "wan-a14b": wan(40, 40, 13824, experts=2),
}


# --- what a clip takes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Clips that are alike."""

    size: ClipShape
    steps: int
    guided: bool
    clips: int = 1
    made: int = 0  # frames that go through the transformer, where those are not the size's own
    window: int = 0  # most of them at once; 0: all

    @property
    def at_once(self) -> ClipShape:
        """The part of a clip that the transformer sees at a time."""
        made = self.made or self.size.frames
        return replace(self.size, frames=min(made, self.window or made))

    @property
    def turns(self) -> float:
        """How many times it is denoised: once, or in so many windows."""
        return (self.made or self.size.frames) / self.at_once.frames

    def peta(self, network: Network) -> float:
        """10^15 operations of one clip's denoising."""
        return self.turns * self.steps * (1 + self.guided) * network.operations(self.at_once) / PETA

    @property
    def walked(self) -> float:
        """Denoising steps, of all windows. The two halves of guidance go through one step together."""
        return self.turns * self.steps

    @property
    def megapixels(self) -> float:
        """Of one clip, all frames together: what decoding, encoding and storing grow with."""
        return self.size.width * self.size.height * self.size.frames / MEGA


class Measured(NamedTuple):
    """A clip that was timed on so many GPUs."""

    work: Work
    gpus: int
    seconds: float


class Staged(NamedTuple):
    """The same, its seconds by stage: text, denoise, decode, encode, put."""

    work: Work
    gpus: int
    stages: Mapping[str, float]


class Predictor(Protocol):
    """A rule that says how long a clip takes on so many GPUs."""

    def seconds(self, work: Work, network: Network, gpus: int = 1) -> float: ...


LEAST = 1e-9  # seconds that a stage takes, if any
PRIOR = 0.01  # how much an assumed rate weighs, where a measured clip weighs 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Seconds that things take.

    On one GPU: a petaflop of denoising, and a megapixel of what else divides (decoding). On any number of them: a
    megapixel of what does not divide, a denoising step (kernels begin, ranks wait for each other), and a clip.
    """

    petaflop: float
    megapixel: float
    undivided: float
    step: float = 0.0
    clip: float = 0.0

    def seconds(self, work: Work, network: Network, gpus: int = 1) -> float:
        """Predicted seconds of one clip."""
        divided = self.petaflop * work.peta(network) + self.megapixel * work.megapixels
        return divided / gpus + self.undivided * work.megapixels + self.step * work.walked + self.clip

    @classmethod
    def of(cls, gpu: Gpu) -> Rates:
        """The rates to assume before anything was measured.

        Half of the stated speed; and for a megapixel on an H100 the 0.38 seconds that by Wan 2.2's table no GPU
        shortens, and half a second that they do (a guess: there a single GPU, offloading, takes four).
        On a CPU, where mini is what one renders, what mini took of two cores.
        """
        if gpu == GPUS["cpu"]:
            return MINI
        slower = GPUS["h100"].flops / gpu.flops
        return cls(petaflop=2 * PETA / gpu.flops, megapixel=0.5 * slower, undivided=0.38 * slower)

    @classmethod
    def fit(cls, measured: Sequence[Measured], network: Network) -> Rates:
        """From seconds of whole clips, which tell three rates apart and no more.

        The rates above or at zero with the least squared relative error. Raises ValueError without measurements.
        """
        if not measured:
            raise ValueError("there is nothing to fit rates to: at least one measured clip is needed")
        rows = [(m.work.peta(network) / m.gpus, m.work.megapixels / m.gpus, m.work.megapixels) for m in measured]
        petaflop, megapixel, undivided = _fit(rows, [m.seconds for m in measured])
        return cls(petaflop=petaflop, megapixel=megapixel, undivided=undivided)

    @classmethod
    def fit_stages(cls, measured: Sequence[Staged], network: Network, assumed: Rates) -> Rates:
        """From seconds of stages, each fitted by itself.

        What they do not tell is as `assumed`, scaled as a whole to what they do tell: after one clip, a larger one is
        predicted with the assumed shares of operations and of steps.
        """

        def taken(*names: str) -> list[float]:
            return [sum(stages.get(name, 0.0) for name in names) for _, _, stages in measured]

        petaflop, step = _fit(
            [(work.peta(network) / gpus, work.walked) for work, gpus, _ in measured],
            taken("denoise"),
            (assumed.petaflop, assumed.step),
        )
        megapixel, fixed, begun = _fit(
            [(work.megapixels / gpus, work.megapixels, 1.0) for work, gpus, _ in measured],
            taken("decode"),
            (assumed.megapixel, assumed.undivided / 2, assumed.clip / 2),
        )
        undivided, clip = _fit(
            [(work.megapixels, 1.0) for work, _, _ in measured],
            taken("text", "encode", "put"),
            (assumed.undivided / 2, assumed.clip / 2),
        )
        return cls(petaflop=petaflop, megapixel=megapixel, undivided=fixed + undivided, step=step, clip=begun + clip)


# mini on ranks of one thread each, on a server with two cores: see tests/bench/planner.py
MINI = Rates(petaflop=2.2e4, megapixel=1.5, undivided=0.6, step=0.02, clip=0.08)


def _fit(
    rows: Sequence[tuple[float, ...]], seconds: Sequence[float], assumed: Sequence[float] | None = None
) -> tuple[float, ...]:
    """Factors of the columns, none below zero, with the least squared relative error.

    A clip that took far too long is far off any prediction, and so pulls little: relative to what it took, all
    predictions are near nothing. `assumed` factors hold, scaled to the measurements, for what these do not tell.
    """
    import numpy as np  # here, since a prompt file is checked and submitted without it

    kept = [(row, s) for row, s in zip(rows, seconds, strict=True) if LEAST < s < math.inf]
    if not kept:
        return tuple(assumed or ())
    count = len(rows[0])
    lines = [[value / s for value in row] for row, s in kept]
    wanted = [1.0] * len(lines)
    if assumed is not None:
        guesses = [sum(a * value for a, value in zip(assumed, line, strict=True)) for line in lines]
        scale = 1 / (median(guesses) or 1.0)
        for place, factor in enumerate(assumed):
            usual = PRIOR * median(line[place] for line in lines)
            lines.append([usual * (place == k) for k in range(count)])
            wanted.append(usual * scale * factor)
    matrix, target = np.array(lines), np.array(wanted)
    best, least = np.zeros(count), math.inf
    for chosen in (c for n in range(1, count + 1) for c in combinations(range(count), n)):
        part, *_ = np.linalg.lstsq(matrix[:, chosen], target, rcond=None)  # few enough for every choice to be tried
        factors = np.zeros(count)
        factors[list(chosen)] = part
        error = float(((matrix @ factors - target) ** 2).sum())
        if (part >= 0).all() and error < least - 1e-12:
            best, least = factors, error
    return tuple(map(float, best))


# --- what fits --------------------------------------------------------------------------------------------------------


def partition_of(network: Network, size: ClipShape, gpus: int, gpu: Gpu, guided: bool) -> Partition | None:
    """How so many GPUs divide one clip: as little tensor parallelism as memory asks for, then the two halves of
    guidance, then the sequence, in the order of what they cost on the wire. None where it does not fit or divide."""
    room, heads = (1 - SPARE) * gpu.memory, network.dit.heads
    for tp in (n for n in range(1, gpus + 1) if gpus % n == 0 and network.dit.ffn_dim % n == 0):
        rest = gpus // tp
        cfg = 2 if guided and rest % 2 == 0 else 1
        partition = Partition(cfg=cfg, sp=rest // cfg, tp=tp)
        if heads % (partition.sp * tp) == 0 and network.memory(size, partition, guided) <= room:
            return partition
    return None


def shared_partition(network: Network, work: Sequence[Work], gpus: int, gpu: Gpu) -> Partition | None:
    """One way for so many GPUs to divide clips of several shapes, so that one engine may render all of them.

    The way of the shape that needs most tensor parallelism, which asks guidance's halves apart only where all shapes
    have two. None where it does not fit or divide all of them.
    """
    guided = all(each.guided for each in work)
    ways = [partition_of(network, each.at_once, gpus, gpu, guided) for each in work]
    narrow = max((way for way in ways if way is not None), key=lambda way: way.tp, default=None)
    room = (1 - SPARE) * gpu.memory
    if narrow is None or any(network.memory(each.at_once, narrow, each.guided) > room for each in work):
        return None
    return narrow


# --- layouts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Replicas of one size at work until their share of the clips is done."""

    gpus: int  # of one replica
    replicas: int
    work: tuple[Work, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A batch, phase after phase."""

    phases: tuple[Phase, ...]
    gpus: int  # all of them
    pause: float = 0.0  # seconds between two phases, in which replicas of another size start

    @property
    def seconds(self) -> float:
        """From the first clip's beginning to the last one's end."""
        return sum(phase.seconds for phase in self.phases) + self.pause * (len(self.phases) - 1)

    @property
    def gpu_hours(self) -> float:
        return self.gpus * self.seconds / 3600


def cheapest_layout(
    work: Sequence[Work],
    network: Network,
    rates: Predictor,
    gpu: Gpu,
    gpus: int,
    deadline: float,
    *,
    pause: float = 0.0,
) -> Layout:
    """The layout of least GPU-hours, on as many of the GPUs as it takes, that has all clips done after `deadline`
    seconds; where none has, the one that is done soonest. Raises CannotFit when no replica holds one of the shapes."""
    layouts = [best_layout(work, network, rates, gpu, gpus, pause=pause)]
    for fewer in (1 << k for k in range(gpus.bit_length()) if 1 << k < gpus):
        with suppress(CannotFit):
            layouts.append(best_layout(work, network, rates, gpu, fewer, pause=pause))
    in_time = [layout for layout in layouts if layout.seconds <= deadline]
    soonest = min(layouts, key=lambda layout: layout.seconds)
    return min(in_time, key=lambda layout: (layout.gpu_hours, layout.seconds), default=soonest)


def best_layout(
    work: Sequence[Work],
    network: Network,
    rates: Predictor,
    gpu: Gpu,
    gpus: int,
    degrees: Iterable[int] | None = None,
    *,
    pause: float = 0.0,
) -> Layout:
    """The layout that has all clips done soonest: replicas of one size throughout, or of two, small ones first.

    degrees: the replicas' sizes to choose from; by default the powers of two, and all GPUs together.
    pause: seconds that it takes to go from replicas of one size to those of another.
    Raises CannotFit when no replica holds one of the shapes.
    """
    clips = [each for each in work if each.clips > 0]
    sizes = sorted({n for n in degrees or (*(1 << k for k in range(10)), gpus) if 1 <= n <= gpus})
    fitting = [n for n in sizes if all(partition_of(network, w.at_once, n, gpu, w.guided) for w in clips)]
    if not fitting:
        raise CannotFit(_why(clips, network, gpu, gpus))
    layouts = [Layout(phases=(_phase(clips, n, gpus, network, rates),), gpus=gpus) for n in fitting]
    for small, large in combinations(fitting, 2):
        layouts += [replace(both, pause=pause) for both in _in_two(clips, small, large, gpus, network, rates)]
    return min(layouts, key=lambda layout: layout.seconds)


def _phase(work: Sequence[Work], n: int, gpus: int, network: Network, rates: Predictor) -> Phase:
    """All of it on replicas of n GPUs: the longest clip first, each to the replica that is free first (Graham 1969)."""
    replicas = gpus // n
    free = [0.0] * replicas
    for each in sorted(work, key=lambda w: -rates.seconds(w, network, n)):
        seconds = rates.seconds(each, network, n)
        rounds = max(0, each.clips // replicas - 2)  # rounds of one for every replica change nothing in who is first
        free = [busy + rounds * seconds for busy in free]
        heapq.heapify(free)
        for _ in range(each.clips - rounds * replicas):
            heapq.heapreplace(free, free[0] + seconds)
    return Phase(gpus=n, replicas=replicas, work=tuple(work), seconds=max(free))


def _in_two(
    work: Sequence[Work], small: int, large: int, gpus: int, network: Network, rates: Predictor
) -> Iterable[Layout]:
    """Small replicas until whole rounds of them are done, large ones for what is left: up to two rounds' worth."""
    replicas = gpus // small
    total = sum(each.clips for each in work)
    longest_first = sorted(work, key=lambda w: -rates.seconds(w, network, small))
    for rounds in {total // replicas - k for k in range(3)}:
        if rounds < 1 or rounds * replicas >= total:
            continue
        first, second = _split(longest_first, rounds * replicas)
        phases = (_phase(first, small, gpus, network, rates), _phase(second, large, gpus, network, rates))
        yield Layout(phases=phases, gpus=gpus)


def _split(work: Sequence[Work], count: int) -> tuple[list[Work], list[Work]]:
    """The first `count` clips, and the others."""
    first: list[Work] = []
    second: list[Work] = []
    for each in work:
        taken = min(count, each.clips)
        count -= taken
        for part, clips in ((first, taken), (second, each.clips - taken)):
            if clips:
                part.append(replace(each, clips=clips))
    return first, second


def _why(work: Sequence[Work], network: Network, gpu: Gpu, gpus: int) -> str:
    for each in work:
        if not any(partition_of(network, each.at_once, n, gpu, each.guided) for n in range(1, gpus + 1)):
            widest = Partition(sp=1, tp=max(n for n in range(1, gpus + 1) if network.dit.heads % n == 0))
            needed = network.memory(each.at_once, widest, each.guided)
            return (
                f"{each.size} does not fit: divided over {widest.world} of {gpus} GPUs it still takes "
                f"{needed / GIB:.0f} GiB of each, which have {(1 - SPARE) * gpu.memory / GIB:.0f} to spare: use more "
                "or larger GPUs, or smaller clips"
            )
    return "no size of replica holds all of these shapes: plan them apart"
