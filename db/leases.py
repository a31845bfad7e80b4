"""Claiming work, keeping it, and every write an engine makes.

An engine that stalls for longer than its lease does not know that it lost it. So every write goes through `held`: it
names the attempt under which the shard was claimed, and the shard's attempt goes up with every claim. Expiry alone does
not end a lease; somebody taking the shard (claim_shard), putting it back (expire_leases) or closing it does.

All functions take a session and leave commit to the caller; none may be called in a transaction that stays open while
pixels render. Rows are always locked in the order request, shard, clip, which is what keeps engines, planners and
cancellers from waiting for each other in a circle. Time is the database's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, Select, case, func, insert, select, true, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session, aliased

from db.session import UNSYNCED, change
from db.tables import (
    MAX_TRIES,
    Artifact,
    Attempt,
    AttemptStatus,
    Clip,
    ClipDirection,
    ClipMode,
    ClipStatus,
    Request,
    RequestStatus,
    Shard,
    ShardStatus,
    Take,
)

STAGES = ("text", "denoise", "decode", "encode", "put")

_AS_STORED = (
    *("negative_prompt", "seed", "width", "height", "frames", "fps"),
    *("steps", "guidance", "solver", "shift", "recipe"),
    *("mode", "direction", "strength", "window", "overlap", "step_cache"),
)

_ERROR_CHARACTERS = 10_000  # a traceback's end is of use, a log is not


class LeaseLost(Exception):
    """The shard is no longer ours: the lease ran out and somebody took it or put it back. Drop the work, claim anew."""


@dataclass(frozen=True, slots=True)
class Lease:
    """One claim of one shard."""

    shard_id: int
    owner: str
    attempt: int  # the fence: goes up by one with every claim
    request_id: str
    carrier: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewArtifact:
    """Bytes that lie in the store already."""

    sha256: str
    key: str
    bytes: int
    media_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LeasedClip:
    """All an engine needs to render one clip."""

    clip_id: str
    attempt_no: int  # the number its next attempt will have
    prompt: str  # the rewritten one where there is one
    negative_prompt: str | None
    seed: int
    width: int
    height: int
    frames: int
    fps: int
    steps: int
    guidance: float
    solver: str
    shift: float
    recipe: str
    mode: ClipMode
    direction: ClipDirection | None
    strength: float | None
    window: int | None
    overlap: int | None
    step_cache: float | None
    source: NewArtifact | None  # what it is made from
    end_source: NewArtifact | None


def held(lease: Lease) -> ColumnElement[bool]:
    """True for the shard's row only while this very claim still owns it.

    A cancelled shard stays with its last claim: whoever holds it is told what was cancelled, not that it was stolen.
    """
    return (
        (Shard.id == lease.shard_id)
        & (Shard.attempt == lease.attempt)
        & Shard.status.in_((ShardStatus.LEASED, ShardStatus.CANCELLED))
    )


def claim_shard(
    session: Session, owner: str, *, seconds: float, model_digest: str, partition: str | None = None
) -> tuple[Lease, list[LeasedClip]] | None:
    """Lease the next shard for `seconds` and return it with the clips still to render; None when there is no work.

    `partition`: the engine's own; shards that were planned for another one are left. None takes any.
    Priority first, then the tenant and the request with the fewest leases, then age. A shard whose lease ran out is
    taken over: the clip that was running counts one attempt lost, and at the third is quarantined.
    """
    while (lease := _take_next(session, owner, seconds, model_digest, partition)) is not None:
        _end_running(session, [lease.shard_id], AttemptStatus.LOST)
        _adopt_in_shard(session, lease.shard_id)
        clips = _clips_to_render(session, lease.shard_id)
        if clips:
            return lease, clips
        complete_shard(session, lease)
    return None


def renew(session: Session, lease: Lease, seconds: float) -> set[str]:
    """Keep the lease for `seconds` from now. Returns the clips of the shard that were cancelled meanwhile.

    Raises LeaseLost when the shard is no longer ours.
    """
    until = case((Shard.status == ShardStatus.LEASED, _from_now(seconds)), else_=None)
    renewed = update(Shard).where(held(lease)).values(leased_until=until).returning(Shard.id)
    if session.execute(renewed, execution_options=UNSYNCED).one_or_none() is None:
        raise _lost(lease)
    cancelled = select(Clip.id).where(Clip.shard_id == lease.shard_id, Clip.status == ClipStatus.CANCELLED)
    return set(session.scalars(cancelled))


def start_clip(session: Session, lease: Lease, clip_id: str, *, engine: str, partition: str, code_version: str) -> int:
    """Open the clip's next attempt and return its number; 0 when there is nothing to render (cancelled, or ended).

    Called twice under one lease it returns the attempt that runs. Raises LeaseLost.
    """
    _hold(session, lease)
    clip = _lock_clip(session, lease, clip_id)
    if clip is None or clip.status not in (ClipStatus.QUEUED, ClipStatus.RUNNING):
        return 0
    if clip.status == ClipStatus.RUNNING:
        return clip.attempts
    number = clip.attempts + 1
    running = {"status": ClipStatus.RUNNING, "attempts": number, "started_at": _now(), "error": None, "seconds": None}
    change(session, update(Clip).where(Clip.id == clip_id).values(running))
    change(
        session,
        insert(Attempt).values(
            clip_id=clip_id,
            number=number,
            shard_id=lease.shard_id,
            shard_attempt=lease.attempt,
            owner=lease.owner,
            engine=engine,
            partition=partition,
            code_version=code_version,
            started_at=_now(),
        ),
    )
    return number


def record_clip(
    session: Session,
    lease: Lease,
    clip_id: str,
    *,
    artifact: NewArtifact,
    seconds: Mapping[str, float],
    trace_id: str | None = None,
    drift: float | None = None,
    skipped_steps: int | None = None,
    peak_bytes: int | None = None,
) -> bool:
    """The clip is done: its bytes are stored, now they count. `seconds` by stage (STAGES).

    True when the clip is done by us, also when that was recorded before. False when it no longer waits for us: it was
    cancelled, or its attempt was failed. Raises LeaseLost.
    """
    if unknown := set(seconds) - set(STAGES):
        raise ValueError(f"stage {sorted(unknown)[0]!r} of clip {clip_id}: known are {', '.join(STAGES)}")
    _hold(session, lease)
    clip = _lock_clip(session, lease, clip_id)
    if clip is None or clip.status != ClipStatus.RUNNING:
        return clip is not None and clip.status == ClipStatus.DONE
    stored = {
        "sha256": artifact.sha256,
        "key": artifact.key,
        "bytes": artifact.bytes,
        "media_type": artifact.media_type,
    }
    change(session, upsert(Artifact).values(stored).on_conflict_do_nothing(index_elements=[Artifact.sha256]))
    take = {"recipe": clip.recipe, "sha256": artifact.sha256, "clip_id": clip_id}
    change(session, upsert(Take).values(take).on_conflict_do_nothing(index_elements=[Take.recipe]))
    change(
        session,
        update(Attempt)
        .where(Attempt.clip_id == clip_id, Attempt.status == AttemptStatus.RUNNING)
        .values(status=AttemptStatus.DONE, finished_at=_now(), trace_id=trace_id, drift=drift)
        .values(skipped_steps=skipped_steps, peak_bytes=peak_bytes)
        .values({f"{stage}_seconds": spent for stage, spent in seconds.items()}),
    )
    change(
        session,
        update(Clip)
        .where(Clip.id == clip_id, Take.recipe == Clip.recipe)
        .values(
            status=ClipStatus.DONE,
            artifact=Take.sha256,  # the take's, so that one recipe has one answer whatever happened
            seconds=sum(seconds.values()),
            finished_at=_now(),
        ),
    )
    return True


def fail_clip(
    session: Session,
    lease: Lease,
    clip_id: str,
    error: str,
    *,
    error_class: str = "unknown",
    permanent: bool = False,
) -> ClipStatus:
    """The running attempt failed. The clip is queued again, quarantined after the third, or failed when `permanent`.

    Returns what became of it; a clip that does not run (cancelled, failed before) is left as it is. Raises LeaseLost.
    """
    error = error.replace("\0", "")[:_ERROR_CHARACTERS] or "failed without a reason"
    _hold(session, lease)
    clip = _lock_clip(session, lease, clip_id)
    if clip is None:
        return ClipStatus.CANCELLED
    if clip.status != ClipStatus.RUNNING:
        return clip.status
    change(
        session,
        update(Attempt)
        .where(Attempt.clip_id == clip_id, Attempt.status == AttemptStatus.RUNNING)
        .values(status=AttemptStatus.FAILED, error=error, error_class=error_class, finished_at=_now()),
    )
    failed = update(Clip).where(Clip.id == clip_id).returning(Clip.status)
    if permanent:
        failed = failed.values(status=ClipStatus.FAILED, error=error, finished_at=_now())
    else:
        failed = failed.values(_one_try_more(error))
    return session.execute(failed, execution_options=UNSYNCED).scalar_one()


def complete_shard(session: Session, lease: Lease) -> None:
    """The shard is worked off. Clips that went back to the queue leave it, to be planned again. Raises LeaseLost."""
    _hold(session, lease)
    _end_running(session, [lease.shard_id], AttemptStatus.LOST)  # started and never told of again
    waiting = (Clip.shard_id == lease.shard_id) & (Clip.status == ClipStatus.QUEUED)
    change(session, update(Clip).where(waiting).values(shard_id=None))
    leased = update(Shard).where(held(lease), Shard.status == ShardStatus.LEASED)
    change(session, leased.values(status=ShardStatus.DONE, owner=None, leased_until=None, finished_at=_now()))


def release_shard(session: Session, lease: Lease) -> None:
    """Give the shard back early: the next claim takes it, and no clip is charged with an attempt. Raises LeaseLost."""
    _hold(session, lease)
    _end_running(session, [lease.shard_id], AttemptStatus.RELEASED)
    leased = update(Shard).where(held(lease), Shard.status == ShardStatus.LEASED)
    change(session, leased.values(status=ShardStatus.QUEUED, owner=None, leased_until=None))


def expire_owner(session: Session, owner: str) -> int:
    """End every lease of an engine that is known to be dead. Returns how many there were."""
    return _put_back(session, Shard.owner == owner)


def expire_leases(session: Session) -> int:
    """Put back every shard whose lease ran out (its running clip counts an attempt). Returns how many there were."""
    return _put_back(session, Shard.leased_until < _now())


def others_wait(session: Session, *, model_digest: str, partition: str) -> bool:
    """True when shards of this model are queued that an engine of this partition may not claim."""
    queued = select(Shard.id).join(Request, Request.id == Shard.request_id)
    queued = queued.where(Shard.status == ShardStatus.QUEUED, Shard.partition != partition)
    queued = queued.where(Request.status == RequestStatus.OPEN, Request.model_digest == model_digest)
    return session.scalar(select(queued.exists())) or False


# The claim


def _take_next(session: Session, owner: str, seconds: float, model_digest: str, partition: str | None) -> Lease | None:
    for request_id in session.scalars(_requests_in_turn(model_digest, partition)):
        first = (
            select(Shard.id)
            .where(Shard.request_id == request_id, _claimable(Shard, partition))
            .order_by(Shard.priority.desc(), Shard.id)
            .limit(1)
            .with_for_update(skip_locked=True, key_share=True)
            .cte("first")
            .prefix_with("materialized")
        )
        claim = (
            update(Shard)
            .where(Shard.id == first.c.id)
            .values(
                status=ShardStatus.LEASED,
                owner=owner,
                attempt=Shard.attempt + 1,
                leased_until=_from_now(seconds),
                claimed_at=_now(),
            )
            .returning(Shard.id, Shard.attempt, Shard.request_id, Shard.carrier)
        )
        row = session.execute(claim, execution_options=UNSYNCED).one_or_none()
        if row is not None:  # else another claim was faster
            return Lease(row.id, owner, row.attempt, row.request_id, row.carrier)
    return None


def _requests_in_turn(model_digest: str, partition: str | None) -> Select[tuple[str]]:
    """The requests that have work, the one whose turn it is first."""
    live = select(Shard.request_id, Request.tenant).join(Request, Request.id == Shard.request_id)
    live = live.where(Shard.status == ShardStatus.LEASED, Shard.leased_until >= _now()).cte("live")
    of_tenant = select(func.count()).where(live.c.tenant == Request.tenant).correlate(Request).scalar_subquery()
    of_request = select(func.count()).where(live.c.request_id == Request.id).correlate(Request).scalar_subquery()
    oldest = select(Shard.id).where(Shard.request_id == Request.id, _claimable(Shard, partition))
    oldest = oldest.order_by(Shard.priority.desc(), Shard.id).limit(1).correlate(Request).lateral("oldest")
    return (
        select(Request.id)
        .join(oldest, true())
        .where(Request.status == RequestStatus.OPEN, Request.model_digest == model_digest)
        .order_by(Request.priority.desc(), of_tenant, of_request, oldest.c.id)
    )


def _claimable(shard: Any, partition: str | None) -> ColumnElement[bool]:
    ours = true() if partition is None else shard.partition.is_(None) | (shard.partition == partition)
    ran_out = (shard.status == ShardStatus.LEASED) & (shard.leased_until < _now())
    # The first line repeats what the index ix_shards_active holds, so that it is used.
    active = shard.status.in_((ShardStatus.QUEUED, ShardStatus.LEASED))
    return active & ((shard.status == ShardStatus.QUEUED) | ran_out) & ours


def _adopt_in_shard(session: Session, shard_id: int) -> None:
    """Clips planned before a take of their recipe was there need no rendering."""
    same = (Clip.shard_id == shard_id) & (Clip.status == ClipStatus.QUEUED) & (Clip.recipe == Take.recipe)
    change(session, update(Clip).where(same).values(adopted()))


def adopted() -> dict[str, Any]:
    """What a clip becomes when the take of its recipe is there already."""
    return {
        "status": ClipStatus.DONE,
        "artifact": Take.sha256,
        "found": True,
        "error": None,
        "finished_at": _now(),
    }


def _clips_to_render(session: Session, shard_id: int) -> list[LeasedClip]:
    return clips_where(session, (Clip.shard_id == shard_id) & (Clip.status == ClipStatus.QUEUED))


def clips_where(session: Session, which: ColumnElement[bool]) -> list[LeasedClip]:
    """All that is needed to render these clips, in file order."""
    sources = aliased(Artifact), aliased(Artifact)
    wanted = (
        select(
            Clip.id.label("clip_id"),
            (Clip.attempts + 1).label("attempt_no"),
            func.coalesce(Clip.rewritten_prompt, Clip.prompt).label("prompt"),
            *(getattr(Clip, name) for name in _AS_STORED),
            *sources,
        )
        .outerjoin(sources[0], sources[0].sha256 == Clip.source)
        .outerjoin(sources[1], sources[1].sha256 == Clip.end_source)
        .where(which)
        .order_by(Clip.index, Clip.sample)
    )
    clips: list[LeasedClip] = []
    for *values, source, end_source in session.execute(wanted):
        names = ("clip_id", "attempt_no", "prompt", *_AS_STORED)
        row = dict(zip(names, values, strict=True))
        clips.append(LeasedClip(**row, source=_as_value(source), end_source=_as_value(end_source)))
    return clips


def _as_value(stored: Artifact | None) -> NewArtifact | None:
    if stored is None:
        return None
    return NewArtifact(sha256=stored.sha256, key=stored.key, bytes=stored.bytes, media_type=stored.media_type)


# The fence and what it guards


def _hold(session: Session, lease: Lease) -> None:
    """Keeps the shard ours until the end of this transaction: a claim skips or waits for a row that is locked."""
    mine = select(Shard.id).where(held(lease)).with_for_update(key_share=True)
    if session.execute(mine).one_or_none() is None:
        raise _lost(lease)


def _lost(lease: Lease) -> LeaseLost:
    return LeaseLost(f"shard {lease.shard_id}: attempt {lease.attempt} by {lease.owner} no longer holds the lease")


@dataclass(frozen=True, slots=True)
class _Locked:
    status: ClipStatus
    attempts: int
    recipe: str


def _lock_clip(session: Session, lease: Lease, clip_id: str) -> _Locked | None:
    """The clip while it belongs to the leased shard; None once it was cancelled away from it."""
    row = session.execute(
        select(Clip.status, Clip.attempts, Clip.recipe)
        .where(Clip.id == clip_id, Clip.shard_id == lease.shard_id)
        .with_for_update(key_share=True)
    ).one_or_none()
    return None if row is None else _Locked(row.status, row.attempts, row.recipe or "")


def _end_running(session: Session, shard_ids: Sequence[int], outcome: AttemptStatus) -> None:
    """What runs in these shards does so no longer: attempts end, clips are queued again or, at last, quarantined."""
    running = Clip.shard_id.in_(shard_ids) & (Clip.status == ClipStatus.RUNNING)
    ended = update(Attempt).where(Attempt.clip_id == Clip.id, running, Attempt.status == AttemptStatus.RUNNING)
    error = "the engine died or stalled while rendering this clip" if outcome == AttemptStatus.LOST else None
    if change(session, ended.values(status=outcome, error=error, finished_at=_now())):
        changes = {"status": ClipStatus.QUEUED} if error is None else _one_try_more(error)
        change(session, update(Clip).where(running).values(changes))


def _one_try_more(error: str) -> dict[str, Any]:
    last = Clip.tries + 1 >= MAX_TRIES
    return {
        "tries": Clip.tries + 1,
        "error": error,
        "status": case((last, ClipStatus.QUARANTINED), else_=ClipStatus.QUEUED).cast(Clip.status.type),
        "finished_at": case((last, _now()), else_=None),
    }


def _put_back(session: Session, which: ColumnElement[bool]) -> int:
    overdue = select(Shard.id).where(Shard.status == ShardStatus.LEASED, which).order_by(Shard.id)
    shard_ids = list(session.scalars(overdue.with_for_update(key_share=True)))
    if shard_ids:
        _end_running(session, shard_ids, AttemptStatus.LOST)
        back = update(Shard).where(Shard.id.in_(shard_ids))
        change(session, back.values(status=ShardStatus.QUEUED, owner=None, leased_until=None))
    return len(shard_ids)


def _now() -> ColumnElement[Any]:
    """The time of the statement: not the transaction's, which may be older, and stable, so that indexes serve it."""
    return func.statement_timestamp()


def _from_now(seconds: float) -> ColumnElement[Any]:
    return _now() + timedelta(seconds=seconds)
