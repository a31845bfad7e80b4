"""Questions of those who watch over requests: which are open, whose leases live, what clips cost so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Text, cast, func, select
from sqlalchemy.orm import Session

from db.engines import ALIVE, FailedStart, failed_starts
from db.leases import STAGES
from db.tables import (
    UNENDED,
    Attempt,
    AttemptStatus,
    Clip,
    ClipMode,
    ClipStatus,
    Engine,
    Request,
    RequestStatus,
    Shard,
    ShardStatus,
)


@dataclass(frozen=True, slots=True)
class OpenRequest:
    id: str
    flow_run_id: str | None  # the run that watches it
    paused: bool


def open_requests(session: Session, *, flow_run_id: str | None = None) -> list[OpenRequest]:
    """Requests that have not ended, paused ones too, oldest first; with `flow_run_id` those that this run watches."""
    paused = Request.status == RequestStatus.PAUSED
    wanted = select(Request.id, Request.flow_run_id, paused.label("paused")).where(Request.status.in_(UNENDED))
    if flow_run_id is not None:
        wanted = wanted.where(Request.flow_run_id == flow_run_id)
    return [OpenRequest(*row) for row in session.execute(wanted.order_by(Request.created_at))]


def watched_by(session: Session, flow_run_ids: Sequence[str]) -> set[str]:
    """Those of the runs that watch a request, or watched one until it ended."""
    found = session.scalars(select(Request.flow_run_id).where(Request.flow_run_id.in_(flow_run_ids)))
    return {run for run in found if run is not None}


@dataclass(frozen=True, slots=True)
class OpenShards:
    """Shards of a request that are queued or leased, by the partition that they were planned for."""

    partition: str | None  # any
    count: int
    queued: int
    seconds: float  # predicted, of those for which somebody did


def open_shards(session: Session, request_id: str) -> list[OpenShards]:
    """Those planned first come first."""
    rows = session.execute(
        select(
            Shard.partition,
            func.count(),
            func.count().filter(Shard.status == ShardStatus.QUEUED),
            func.coalesce(func.sum(Shard.predicted_seconds), 0.0),
        )
        .where(Shard.request_id == request_id, Shard.status.in_((ShardStatus.QUEUED, ShardStatus.LEASED)))
        .group_by(Shard.partition)
        .order_by(func.min(Shard.id))
    )
    return [OpenShards(*row) for row in rows]


def work_ahead(session: Session, model_digest: str, priority: int) -> dict[str | None, float]:
    """Predicted engine seconds of shards that are queued or leased, by the partition that they were planned for.

    Those of open requests of this model that have at least this priority. A shard that nobody predicted counts nothing.
    """
    rows = session.execute(
        select(Shard.partition, func.coalesce(func.sum(Shard.predicted_seconds), 0.0))
        .join(Request, Request.id == Shard.request_id)
        .where(Request.status == RequestStatus.OPEN, Request.model_digest == model_digest)
        .where(Shard.status.in_((ShardStatus.QUEUED, ShardStatus.LEASED)), Shard.priority >= priority)
        .group_by(Shard.partition)
    )
    return {partition: seconds for partition, seconds in rows}


def lease_owners(session: Session) -> list[str]:
    """Who holds leases now."""
    owners = session.scalars(select(Shard.owner).where(Shard.status == ShardStatus.LEASED).distinct())
    return [owner for owner in owners if owner is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineNow:
    """An engine that lives, and the shard that it has; an engine with two of them is there twice."""

    id: str
    host: str
    device: str
    partition: str
    flow_run_id: str | None
    request_id: str | None  # of the shard; None: it has none
    shard_id: int | None
    width: int | None
    height: int | None
    frames: int | None
    size: int | None  # clips of the shard
    clip_id: str | None  # that it renders, one of them


def engines_now(session: Session, request_id: str, *, limit: int = 50) -> list[EngineNow]:
    """The living engines with a request's model, those at work for it first."""
    wanted = select(Request.model_digest).where(Request.id == request_id).scalar_subquery()
    rendered = (
        select(func.min(Clip.id))
        .where(Clip.shard_id == Shard.id, Clip.status == ClipStatus.RUNNING)
        .correlate(Shard)
        .scalar_subquery()
    )
    of_engine = [getattr(Engine, name) for name in ("id", "host", "device", "partition", "flow_run_id")]
    of_shard = [getattr(Shard, name) for name in ("request_id", "width", "height", "frames", "size")]
    silent = func.extract("epoch", func.statement_timestamp() - Engine.heartbeat_at)
    rows = session.execute(
        select(*of_engine, *of_shard, Shard.id.label("shard_id"), rendered.label("clip_id"))
        .outerjoin_from(Engine, Shard, (Shard.owner == Engine.id) & (Shard.status == ShardStatus.LEASED))
        .where(Engine.closed_at.is_(None), silent <= ALIVE, Engine.model_digest == wanted)
        .order_by(func.coalesce(Shard.request_id == request_id, False).desc(), Engine.started_at, Engine.id, Shard.id)
        .limit(limit)
    )
    return [EngineNow(**row) for row in rows.mappings()]


def failed_starts_for(session: Session, request_id: str) -> list[FailedStart]:
    """Starts of engines with a request's model that failed since the last one got ready, oldest first."""
    return failed_starts(session, select(Request.model_digest).where(Request.id == request_id).scalar_subquery())


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureCause:
    """Clips of a request that ended badly for one reason."""

    kind: str  # rank_died, not_finite, bad_input …; of a bad line: rejected
    error: str  # the first line of one of them
    clips: int
    example: str  # a clip's id


def failure_causes(session: Session, request_id: str, *, limit: int = 10) -> list[FailureCause]:
    """The reasons for which clips of a request ended badly, the most frequent first.

    Numbers in an error are no part of its reason: ranks, steps and bytes differ from clip to clip.
    """
    first_line = func.split_part(Clip.error, "\n", 1)
    kind = func.coalesce(Attempt.error_class, cast(Clip.status, Text))
    reason = func.regexp_replace(first_line, "[0-9]+", "#", "g")
    ended = (ClipStatus.FAILED, ClipStatus.QUARANTINED, ClipStatus.REJECTED)
    rows = session.execute(
        select(
            kind.label("kind"),
            func.min(first_line).label("error"),
            func.count().label("clips"),
            func.min(Clip.id).label("example"),
        )
        .outerjoin_from(Clip, Attempt, (Attempt.clip_id == Clip.id) & (Attempt.number == Clip.attempts))
        .where(Clip.request_id == request_id, Clip.status.in_(ended))
        .group_by(kind, reason)
        .order_by(func.count().desc(), kind, func.min(Clip.id))
        .limit(limit)
    )
    return [FailureCause(**row) for row in rows.mappings()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The cost of clips of some shape on engines of one partition: medians, in seconds."""

    width: int
    height: int
    frames: int
    steps: int
    guidance: float
    mode: ClipMode
    strength: float | None
    window: int | None
    made_frames: int | None
    partition: str
    seconds: float
    text: float
    denoise: float
    decode: float
    encode: float
    put: float

    @property
    def stages(self) -> dict[str, float]:
        """The seconds of each stage."""
        return {stage: float(getattr(self, stage)) for stage in STAGES}


def measured_costs(
    session: Session, model_digest: str, device: str, *, compiled: bool = False, newest: int = 2000
) -> list[Cost]:
    """The median engine time for each shape and partition, over the newest clips that this model rendered on a device.

    `device`: cpu or cuda; with `compiled` only engines that compile, else only those that do not. Clips of which a step
    cache answered some steps, or that went on from a resume state, took less than their shape does, and are left out.
    """
    shape = ("width", "height", "frames", "steps", "guidance", "mode", "strength", "window", "made_frames")
    taken = {stage: func.coalesce(getattr(Attempt, f"{stage}_seconds"), 0.0).label(stage) for stage in STAGES}
    rendered = (
        select(*(getattr(Clip, name) for name in (*shape, "seconds")), Attempt.partition, *taken.values())
        .join(Request, Request.id == Clip.request_id)
        .join(Attempt, (Attempt.clip_id == Clip.id) & (Attempt.status == AttemptStatus.DONE))
        .join(Engine, Engine.id == Attempt.owner)
        .where(Request.model_digest == model_digest, Clip.status == ClipStatus.DONE, ~Clip.reused, Clip.seconds > 0)
        .where(func.split_part(Engine.device, " ", 1) == device, Engine.device.contains("compiled") == compiled)
        .where(func.coalesce(Attempt.skipped_steps, 0) == 0, Attempt.resumed_step.is_(None))
        .order_by(Clip.finished_at.desc())
        .limit(newest)
        .subquery()
    )
    alike = [rendered.c[name] for name in (*shape, "partition")]
    medians = [func.percentile_cont(0.5).within_group(rendered.c[name]).label(name) for name in ("seconds", *STAGES)]
    return [Cost(**row) for row in session.execute(select(*alike, *medians).group_by(*alike)).mappings()]
