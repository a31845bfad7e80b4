"""What those who watch over requests ask the ledger: which are open, whose leases live, what clips cost so far."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from db.tables import Clip, ClipMode, ClipStatus, Request, RequestStatus, Shard, ShardStatus


@dataclass(frozen=True, slots=True)
class OpenRequest:
    id: str
    flow_run_id: str | None  # the run that watches it


def open_requests(session: Session, *, flow_run_id: str | None = None) -> list[OpenRequest]:
    """Requests that have not ended, oldest first; with `flow_run_id` those that this run watches."""
    wanted = select(Request.id, Request.flow_run_id).where(Request.status == RequestStatus.OPEN)
    if flow_run_id is not None:
        wanted = wanted.where(Request.flow_run_id == flow_run_id)
    return [OpenRequest(row.id, row.flow_run_id) for row in session.execute(wanted.order_by(Request.created_at))]


def open_shards(session: Session, request_id: str) -> int:
    """Shards of the request that are queued or leased."""
    open_ones = Shard.status.in_((ShardStatus.QUEUED, ShardStatus.LEASED))
    return session.scalar(select(func.count()).where(Shard.request_id == request_id, open_ones)) or 0


def lease_owners(session: Session) -> list[str]:
    """Who holds leases now."""
    owners = session.scalars(select(Shard.owner).where(Shard.status == ShardStatus.LEASED).distinct())
    return [owner for owner in owners if owner is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a clip of some shape took of its engine, in seconds: the median."""

    width: int
    height: int
    frames: int
    steps: int
    guidance: float
    mode: ClipMode
    strength: float | None
    made_frames: int | None
    seconds: float


def measured_costs(session: Session, model_digest: str, *, newest: int = 2000) -> list[Cost]:
    """The median engine time for each shape, over the newest clips that this model rendered without a step cache."""
    rendered = (
        select(Clip)
        .join(Request, Request.id == Clip.request_id)
        .where(Request.model_digest == model_digest, Clip.status == ClipStatus.DONE, ~Clip.found, Clip.seconds > 0)
        .where(Clip.step_cache.is_(None))  # what it saves depends on the clip
        .order_by(Clip.finished_at.desc())
        .limit(newest)
        .subquery()
    )
    names = ("width", "height", "frames", "steps", "guidance", "mode", "strength", "made_frames")
    shape = [rendered.c[name] for name in names]
    median = func.percentile_cont(0.5).within_group(rendered.c.seconds).label("seconds")
    return [Cost(**row) for row in session.execute(select(*shape, median).group_by(*shape)).mappings()]
