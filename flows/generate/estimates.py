"""Estimates of the GPU time of clips and of when the last is there, from what such clips took.

Importing this loads neither Prefect nor torch, so that a command line may tell it at submission.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sqlalchemy.orm import Session

from db import watching
from db.engines import ALIVE, live_engines
from flows.library.models import gpu_of, gpus_of, network_like
from flows.plan import shards
from flows.plan.layout import CannotFit, Rates, best_layout
from flows.request.form import Defaults
from flows.settings import AUTO, Settings
from model.config import Partition
from model.loading.card import ModelCard


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Until a request that is submitted now has all of its clips, as if none of them was there already."""

    gpu_seconds: float  # that its own clips take
    ahead: float  # seconds until those that go before it are done
    seconds: float  # until its last clip is done, what goes before it included
    measured: bool  # by what clips of this model took here; else by data sheets

    def misses(self, deadline: float) -> str | None:
        """A warning that a deadline, in seconds from now, cannot be met; None where it can."""
        if self.seconds <= deadline:
            return None
        by = "what such clips took here" if self.measured else "data sheets, since none of its clips was rendered yet"
        return (
            f"the deadline of {as_duration(deadline)} cannot be met: all is done in about {as_duration(self.seconds)}, "
            f"of which {as_duration(self.ahead)} are for what goes before, by {by}. It goes on all the same: raise its "
            "priority, ask for fewer clips or steps, or add engines"
        )


def as_duration(seconds: float) -> str:
    """2h30m, 4m05s, 12s: what a person says, and `--deadline` understands."""
    whole = max(0, round(seconds))
    hours, minutes, left = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{left:02}s" if minutes else f"{left}s"


def cost_model(session: Session, settings: Settings, card: ModelCard) -> shards.CostModel:
    """The cost of clips of this model, from what they took so far on devices of this kind."""
    network = network_like(card, settings.bytes_each)
    measured = watching.measured_costs(session, card.digest, settings.device, compiled=bool(settings.compile))
    return shards.CostModel.from_history(measured, network, Rates.of(gpu_of(settings)))


def estimate(
    session: Session, settings: Settings, card: ModelCard, defaults: Defaults, shapes: Mapping[str, int], priority: int
) -> Estimate:
    """`shapes`: how many clips there are of each WIDTHxHEIGHTxFRAMES. All are taken to have the request's steps.

    What goes before: shards of open requests of this model that have at least this priority, of all tenants.
    """
    cost = cost_model(session, settings, card)
    asked: dict[shards.WorkShape, int] = {}
    for shape, clips in shapes.items():
        width, height, frames = map(int, shape.split("x"))
        asked[shards.WorkShape(width, height, frames, defaults.steps, defaults.guidance != 1)] = clips
    waiting = watching.work_ahead(session, card.digest, priority)
    start = 0.0 if live_engines(session, ALIVE, model_digest=card.digest) else shards.START_SECONDS
    fixed = Partition() if settings.partition == AUTO else Partition.parse(settings.partition)
    gpu_seconds = sum(clips * cost.seconds(shape, fixed) for shape, clips in asked.items()) * fixed.world
    if settings.partition == AUTO:
        gpu, gpus = gpus_of(settings)
        work = [replace(shape.work, clips=clips) for shape, clips in asked.items()]
        try:
            own = best_layout(
                work, cost.network, shards.ByReplica(cost, gpu), gpu, gpus, pause=shards.START_SECONDS
            ).seconds
        except CannotFit:
            own = gpu_seconds / gpus
        ahead = sum(seconds * Partition.parse(of).world for of, seconds in waiting.items() if of) / gpus
        ahead += sum(seconds for of, seconds in waiting.items() if not of)
    else:
        own = gpu_seconds / fixed.world / settings.engines_each
        ahead = sum(waiting.values()) / max(1, settings.most_engines)
    return Estimate(gpu_seconds=gpu_seconds, ahead=ahead, seconds=start + ahead + own, measured=bool(cost.measured))
