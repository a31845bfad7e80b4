"""Planning: reuse what was rendered before, cut the rest into shards, and take shards apart again.

Plain functions: they take a session, return values, and leave the transaction to the caller. None of them costs more
statements for a million clips than for ten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ARRAY, BigInteger, Text, any_, exists, func, insert, literal, or_, select, text, tuple_, update
from sqlalchemy.orm import Session, aliased

from db.engines import ALIVE, live_engines
from db.fence import take_turn
from db.renders import reusable, reused
from db.requests import lock_request
from db.session import ANALYZE_FROM, change
from db.tables import (
    ACTIVE,
    Attempt,
    AttemptStatus,
    Clip,
    ClipMode,
    ClipStatus,
    Request,
    RequestStatus,
    Shard,
    ShardStatus,
)

_PLANNING = 0x506C616E  # advisory lock: "Plan"
_SHAPE = ("width", "height", "frames")  # that the clips of a shard have in common


@dataclass(frozen=True, slots=True, kw_only=True)
class Unplanned:
    """A clip that waits for a shard, with what its cost depends on."""

    clip_id: str
    index: int
    sample: int
    width: int
    height: int
    frames: int
    steps: int
    guidance: float
    solver: str
    recipe: str
    mode: ClipMode
    strength: float | None
    window: int | None
    made_frames: int | None
    failures: int
    lost_attempts: int

    @property
    def suspect(self) -> bool:
        """Something went wrong with it before: it should be alone in its shard."""
        return self.failures + self.lost_attempts > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRow:
    id: int
    status: ShardStatus
    owner: str | None
    attempt: int
    leased_until: datetime | None
    width: int
    height: int
    frames: int
    size: int
    done: int
    running: int
    failed: int  # failed or quarantined
    seconds: float
    created_at: datetime
    claimed_at: datetime | None
    finished_at: datetime | None


def reuse_renders(session: Session, request_id: str, *, within: float | None = None) -> int:
    """Finish every unplanned clip whose recipe has a cached render. Returns how many there were.

    within: only where that was so many seconds ago at most, which spares reading all unplanned clips.
    """
    lock_request(session, request_id)
    reuse = update(Clip).where(_unplanned(Clip), Clip.request_id == request_id, reusable(Clip)).values(reused())
    if within is not None:
        made = aliased(Clip)
        recent = select(made.recipe).where(made.status == ClipStatus.DONE)
        recent = recent.where(made.finished_at > func.statement_timestamp() - timedelta(seconds=within))
        reuse = reuse.where(Clip.recipe.in_(recent))
    return change(session, reuse)


def unplanned(session: Session, request_id: str, limit: int) -> list[Unplanned]:
    """The next clips to plan, in file order: of each recipe the first one, and only where nobody renders it or has.

    The others wait, and reuse the render when it is there; what failed waits for its next attempt. Empty until the
    request is sealed.
    """
    twin = aliased(Clip)
    earlier = exists().where(
        twin.request_id == Clip.request_id,
        twin.recipe == Clip.recipe,
        _unplanned(twin),
        tuple_(twin.index, twin.sample) < tuple_(Clip.index, Clip.sample),
    )
    rows = session.execute(
        select(Clip.id.label("clip_id"), *(getattr(Clip, f.name) for f in fields(Unplanned)[1:]))
        .join(Request, Request.id == Clip.request_id)
        .where(Clip.request_id == request_id, _unplanned(Clip), Request.total.is_not(None))
        .where(~earlier, *_nobody_renders(), _its_time_has_come())
        .order_by(Clip.index, Clip.sample)
        .limit(limit)
    )
    return [Unplanned(**row) for row in rows.mappings()]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewShard:
    """Clips of one width, height and frames for one engine to lease together."""

    clip_ids: Sequence[str]
    partition: str | None = None  # the only one whose engines may claim it
    predicted_seconds: float | None = None  # an engine's for all of `clip_ids`; the shard keeps those of its own clips
    predicted_bytes: int | None = None  # of its fullest rank


def create_shards(
    session: Session,
    request_id: str,
    shards: Sequence[NewShard],
    *,
    carrier: Mapping[str, str] | None = None,
    priority: int | None = None,
) -> list[int]:
    """Put clips into new shards, in this order, and return the shards' ids.

    A clip that meanwhile was taken, cancelled, or whose recipe somebody else renders or has rendered, stays out; a
    shard of which none is left is not made. Engines on which one of its clips failed before leave a shard to others for
    a while. `priority` is the request's when not given. Planners of all requests take turns from here to the end of the
    transaction, so commit soon.

    All shards in as many statements as one takes: whether nobody renders its clips, asked of each shard alone, reads
    all clips that are planned for every one of them, as long as the statistics do not know that there are any.
    """
    request = lock_request(session, request_id)
    if request.status != RequestStatus.OPEN or request.total is None:
        return []
    take_turn(session, _PLANNING)
    asked = [clip_id for shard in shards for clip_id in shard.clip_ids]
    takable = select(Clip.id, *(getattr(Clip, name) for name in _SHAPE), Clip.attempts).distinct(Clip.recipe)
    takable = takable.where(
        Clip.id == any_(literal(asked, ARRAY(Text))),
        Clip.request_id == request_id,
        _unplanned(Clip),
        *_nobody_renders(),
    )
    rows = {row.id: row for row in session.execute(takable.order_by(Clip.recipe, Clip.index, Clip.sample))}
    new: list[dict[str, Any]] = []
    taken: list[list[str]] = []
    for shard in shards:
        theirs = [rows.pop(clip_id) for clip_id in shard.clip_ids if clip_id in rows]
        if not theirs:
            continue
        shapes = {tuple(getattr(row, name) for name in _SHAPE) for row in theirs}
        if len(shapes) > 1:
            said = f"these clips of {request_id} have {len(shapes)}: {sorted(shapes)}"
            raise ValueError(f"a shard renders one shape; {said}")
        (shape,) = shapes
        tried = [row.id for row in theirs if row.attempts]
        seconds = shard.predicted_seconds
        new.append(
            {
                "request_id": request_id,
                "priority": request.priority if priority is None else priority,
                **dict(zip(_SHAPE, shape, strict=True)),
                "size": len(theirs),
                "partition": shard.partition,
                "predicted_seconds": seconds and seconds * len(theirs) / len(shard.clip_ids),
                "predicted_bytes": shard.predicted_bytes,
                "avoid": _failed_on(session, tried, request.model_digest) if tried else None,
                "carrier": dict(carrier or {}),
            }
        )
        taken.append([row.id for row in theirs])
    if not new:
        return []
    made = list(session.scalars(insert(Shard).returning(Shard.id, sort_by_parameter_order=True), new))
    placed = select(
        func.unnest(literal([clip_id for part in taken for clip_id in part], ARRAY(Text))).label("id"),
        func.unnest(
            literal([shard for shard, part in zip(made, taken, strict=True) for _ in part], ARRAY(BigInteger))
        ).label("shard_id"),
    ).cte("placed")
    change(session, update(Clip).where(Clip.id == placed.c.id).values(shard_id=placed.c.shard_id))
    if len(asked) >= ANALYZE_FROM:  # or the next wave asks of each clip whether any planned one is its twin
        session.execute(text("analyze clips"))
    return made


def free_recipes(session: Session, request_id: str, *, outrank: bool = True) -> int:
    """Queued clips of other requests leave their shards where this request is to render the same. How many did.

    Those of paused requests, so that nothing waits for what is held. With `outrank` also those for which this request
    would wait too long: of a lower priority, or of the same one and another tenant's that has other work, where this
    request has none. They reuse what it renders. What an engine has leased stays where it is.
    """
    paused = select(Request.id).where(Request.status == RequestStatus.PAUSED)
    if not outrank and not session.scalar(select(paused.exists())):
        return 0
    mine, theirs, of_mine, of_theirs = aliased(Clip), aliased(Clip), aliased(Shard), aliased(Shard)
    this = lock_request(session, request_id)
    at_work = (ShardStatus.QUEUED, ShardStatus.LEASED)
    idle = ~exists().where(of_mine.request_id == request_id, of_mine.status.in_(at_work))
    busy = exists().where(of_theirs.request_id == Request.id, of_theirs.status.in_(at_work), of_theirs.id != Shard.id)
    leave = Request.status == RequestStatus.PAUSED
    if outrank:
        # Of these two alone one may take from the other, or both would by turns.
        theirs_first = (Shard.priority > this.priority) | (Request.tenant == this.tenant)
        leave |= (Shard.priority < this.priority) | (~theirs_first & idle & busy)
    held = (
        select(theirs.id)
        .join_from(mine, theirs, (theirs.recipe == mine.recipe) & theirs.shard_id.is_not(None))
        .join(Request, Request.id == theirs.request_id)
        .join(Shard, (Shard.id == theirs.shard_id) & (Shard.status == ShardStatus.QUEUED))
        .where(mine.request_id == request_id, _unplanned(mine), theirs.status == ClipStatus.QUEUED, leave)
        .where(theirs.request_id != request_id)
        .order_by(Shard.id)
        .with_for_update(of=Shard, key_share=True, skip_locked=True)
    )
    if this.status != RequestStatus.OPEN or not (clip_ids := list(session.scalars(held))):
        return 0
    return change(session, update(Clip).where(Clip.id == any_(literal(clip_ids, ARRAY(Text)))).values(shard_id=None))


def _failed_on(session: Session, clip_ids: Sequence[str], model_digest: str) -> list[str] | None:
    """The engines on which one of these clips failed, where there is another one to leave it to."""
    failed = select(Attempt.owner).distinct().where(Attempt.clip_id.in_(clip_ids))
    failed = failed.where(Attempt.status.in_((AttemptStatus.FAILED, AttemptStatus.LOST))).order_by(Attempt.owner)
    owners = list(session.scalars(failed))
    if owners and any(engine.id not in owners for engine in live_engines(session, ALIVE, model_digest=model_digest)):
        return owners
    return None


def unbind_shards(session: Session, request_id: str, partitions: Sequence[str] | None = None) -> int:
    """Queued shards of these partitions, by default of all, may now be claimed by every engine. How many there were."""
    bound = (Shard.request_id == request_id) & (Shard.status == ShardStatus.QUEUED) & Shard.partition.is_not(None)
    if partitions is not None:
        bound &= Shard.partition.in_(partitions)
    return change(session, update(Shard).where(bound).values(partition=None))


def _unplanned(clip: Any) -> Any:
    return (clip.status == ClipStatus.QUEUED) & clip.shard_id.is_(None)


def _its_time_has_come() -> Any:
    return or_(Clip.not_before.is_(None), Clip.not_before <= func.statement_timestamp())


def _nobody_renders() -> tuple[Any, Any]:
    active = aliased(Clip)
    planned = active.status.in_(ACTIVE) & active.shard_id.is_not(None)
    return ~exists().where(active.recipe == Clip.recipe, planned), ~exists().where(reusable(Clip))


def shard_table(session: Session, request_id: str, *, limit: int | None = None) -> list[ShardRow]:
    """The request's shards, oldest first; with `limit` the newest ones only."""
    ended_badly = Clip.status.in_((ClipStatus.FAILED, ClipStatus.QUARANTINED))
    newest = select(Shard).where(Shard.request_id == request_id).order_by(Shard.id.desc()).limit(limit).subquery()
    shard = aliased(Shard, newest)
    clips = (
        select(
            func.count().filter(Clip.status == ClipStatus.DONE).label("done"),
            func.count().filter(Clip.status == ClipStatus.RUNNING).label("running"),
            func.count().filter(ended_badly).label("failed"),
            func.coalesce(func.sum(Clip.seconds), 0.0).label("seconds"),
        )
        .where(Clip.shard_id == shard.id)
        .lateral("its_clips")
    )
    own = [f.name for f in fields(ShardRow) if f.name not in clips.c]
    rows = session.execute(select(*(getattr(shard, name) for name in own), *clips.c).order_by(shard.id))
    return [ShardRow(**row) for row in rows.mappings()]
