"""Measures whether mini takes as long as is predicted, and prints Markdown (`make bench`).

An engine renders a few shapes, the cost model learns from them as it does from history, and then predicts shapes that
it has never seen, of other sizes, lengths, steps and guidance, which are rendered too. `paper` renders nothing: it
prints what the planner assumes of GPUs that nobody has measured.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import NamedTuple

from flows.library.models import gpu_of, network_of, partition_for
from flows.plan.layout import GPUS, RELEASES, Rates, Work, best_layout, partition_of
from flows.plan.shards import CostModel, WorkShape
from flows.settings import Settings, load_settings
from model.config import ClipShape
from model.engine.clip import ClipSpec
from model.engine.engine import Engine
from model.loading.card import ModelCard, find_model
from model.media.encode import encode_mp4, encode_png


class Asked(NamedTuple):
    """A shape to render."""

    width: int
    height: int
    frames: int
    steps: int
    guidance: float

    def __str__(self) -> str:
        guided = "guided" if self.guidance != 1 else "not guided"
        return f"{self.width}x{self.height}x{self.frames}, {self.steps} steps, {guided}"


FITTED = (
    Asked(64, 64, 17, 25, 4.0),
    Asked(64, 64, 1, 12, 4.0),
    Asked(96, 64, 9, 16, 1.0),
    Asked(128, 128, 17, 8, 4.0),
    Asked(64, 64, 33, 12, 1.0),
)
UNSEEN = (
    Asked(96, 64, 17, 20, 4.0),
    Asked(64, 96, 9, 30, 4.0),
    Asked(128, 64, 33, 8, 4.0),
    Asked(96, 96, 17, 12, 1.0),
    Asked(128, 96, 1, 25, 4.0),
    Asked(64, 64, 17, 40, 1.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """A clip as the ledger would tell of it (flows.plan.Finished)."""

    width: int
    height: int
    frames: int
    steps: int
    guidance: float
    partition: str
    stages: dict[str, float]
    mode: str = "text-to-video"
    strength: float | None = None
    window: int | None = None
    made_frames: int | None = None

    @property
    def seconds(self) -> float:
        return sum(self.stages.values())


def accuracy(settings: Settings | None = None, rounds: int = 5) -> Iterator[str]:
    """Predicted and actual engine seconds of mini: shapes that the cost model learnt from, and shapes it never saw."""
    settings = settings or load_settings()
    card = find_model("mini")
    partition = partition_for(settings, card)
    with Engine(card.path, partition, device=settings.device, threads_per_rank=settings.threads) as engine:
        clips = list(rendered(engine, card, [*FITTED, *UNSEEN], rounds))
    learnt = [clip for clip in clips if asked(clip) in FITTED]
    cost = CostModel.from_history(learnt, network_of(card, settings.bytes_each), Rates.of(gpu_of(settings)))
    yield f"mini on {partition}, {settings.device}, {settings.threads} threads a rank, medians of {rounds} clips.\n"
    yield "| shape | seen before | predicted, s | actual, s | error |"
    yield "|---|---|---|---|---|"
    for shape in (*FITTED, *UNSEEN):
        actual = median(clip.seconds for clip in clips if asked(clip) == shape)
        predicted = cost.formula(WorkShape.of(next(c for c in clips if asked(c) == shape)).work, partition)
        seen = "yes" if shape in FITTED else "no"
        yield f"| {shape} | {seen} | {predicted:.2f} | {actual:.2f} | {predicted / actual - 1:+.0%} |"


def asked(clip: Timed) -> Asked:
    return Asked(clip.width, clip.height, clip.frames, clip.steps, clip.guidance)


def rendered(engine: Engine, card: ModelCard, shapes: Sequence[Asked], rounds: int) -> Iterator[Timed]:
    """Every shape once a round, so that a busy minute of the machine hits all alike; the first round only warms up."""
    for number, shape in ((k, shape) for k in range(rounds + 1) for shape in shapes):
        spec = ClipSpec(
            clip_id=f"{number}",
            prompt="a red ball slides to the left",
            negative_prompt="",
            seed=number,
            fps=card.fps,
            solver=card.solver,
            shift=card.shift,
            **shape._asdict(),
        )
        (clip,) = engine.render([spec])
        began = time.perf_counter()
        encode_png(clip.frames[0], {}) if shape.frames == 1 else encode_mp4(clip.frames, card.fps, {})
        stages = {**clip.seconds, "encode": time.perf_counter() - began}
        if number:
            yield Timed(**shape._asdict(), partition=str(engine.partition), stages=stages)


NODE = 8  # GPUs of a machine: an engine's ranks are all on one


def paper(kind: str = "h200", steps: int = 50) -> Iterator[str]:
    """Predicted, not measured: one clip at a time on as many GPUs as can share it, and a long batch."""
    gpu = GPUS[kind]
    rates = Rates.of(gpu)
    yield (
        f"Assumed of one {kind}: half of the stated {gpu.flops / 1e12:.0f} teraflops in bfloat16, {steps} guided "
        f"steps, for every megapixel of a clip {rates.megapixel:.2f} s that divide and {rates.undivided:.2f} s that do "
        f"not; messages between GPUs cost nothing; at most the {NODE} GPUs of one machine share a clip. The batch has "
        "100 clips for every GPU and is rendered in the best layout.\n"
    )
    yield (
        "| model | shape | GPUs | partition for one clip | its seconds | clips a GPU-hour so | "
        "a batch: replicas of GPUs | clips a GPU-hour | clips an hour |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for name in ("wan-1.3b", "wan-14b"):
        network = RELEASES[name]
        for width, height in ((832, 480), (1280, 720)):
            work = Work(size=ClipShape(width, height, 81), steps=steps, guided=True)
            for gpus in (1, 2, 4, 8, 64, 512):
                clips = 100 * gpus
                most = min(gpus, NODE)
                batch = best_layout([replace(work, clips=clips)], network, rates, gpu, gpus, range(1, most + 1))
                together = partition_of(network, work.size, most, gpu, True)
                alone = rates.seconds(work, network, most)
                phases = ", then ".join(f"{phase.replicas} of {phase.gpus}" for phase in batch.phases)
                yield (
                    f"| {name} | {work.size} | {gpus} | {together} | {alone:.0f} | {3600 / alone / most:.1f} "
                    f"| {phases} | {clips / batch.gpu_hours:.1f} | {3600 * clips / batch.seconds:.0f} |"
                )


BENCHES = {"accuracy": accuracy, "paper": paper}
