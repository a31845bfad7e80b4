"""Claiming work, keeping it, and every write an engine makes.

An engine that stalls for longer than its lease does not know that it lost it. So every write goes through `held`: it
names the attempt under which the shard was claimed, and the shard's attempt goes up with every claim. Expiry alone does
not end a lease; somebody taking the shard (claim_shard), putting it back (expire_leases) or closing it does.

A lease takes GPUs from somebody else, so what it took is charged to the tenant (`usage`) when it ends, however it ends.

All functions take a session and leave commit to the caller; none may be called in a transaction that stays open while
pixels render. Rows are always locked in the order request, shard, clip, which is what keeps engines, planners and
cancellers from waiting for each other in a circle. Time is the database's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Interval,
    Row,
    Select,
    and_,
    any_,
    bindparam,
    case,
    exists,
    func,
    insert,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from db.session import UNSYNCED, change
from db.tables import (
    MAX_LOSSES,
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

WINDOW = 600.0  # seconds over which tenants share the GPUs by weight
AGEING = 600.0  # seconds without a lease that lift a request's priority by one: nothing waits for ever
BACKOFF = 2.0  # seconds before a second try, times two before each further one; less or more by half, so that
BACKOFF_MOST = 60.0  # clips that failed together do not come back together
AVOID = 30.0  # seconds for which a clip waits for another engine than those on which it failed
ENGINE_LOST = "engine_lost"  # the error class of an attempt whose engine died or stalled
_MINUTE = timedelta(minutes=1)
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
class Checkpoint:
    """Unfinished latents that lie in the store already."""

    key: str
    step: int  # denoising steps that they have had
    of: str  # digest of what must be alike for an engine to go on from there to the same bits


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
    checkpoint: Checkpoint | None = None  # where an earlier attempt had come to


def _now() -> ColumnElement[Any]:
    """The time of the statement: not the transaction's, which may be older, and stable, so that indexes serve it."""
    return func.statement_timestamp()


# True for the shard's row only while the claim that `of` names still owns it. A cancelled shard stays with its last
# claim: whoever holds it is told what was cancelled, not that it was stolen.
HELD = (
    (Shard.id == bindparam("held_shard"))
    & (Shard.attempt == bindparam("held_attempt"))
    & Shard.status.in_((ShardStatus.LEASED, ShardStatus.CANCELLED))
)


def of(lease: Lease) -> dict[str, Any]:
    """What HELD is asked about."""
    return {"held_shard": lease.shard_id, "held_attempt": lease.attempt}


def claim_shard(
    session: Session,
    owner: str,
    *,
    seconds: float,
    model_digest: str,
    partition: str | None = None,
    ranks: int = 1,
    window: float = WINDOW,
    ageing: float = AGEING,
) -> tuple[Lease, list[LeasedClip]] | None:
    """Lease the next shard for `seconds` and return it with the clips still to render; None when there is no work.

    `partition`: the engine's own; shards that were planned for another one are left. None takes any. `ranks`: its GPUs.

    First the tenant that had the fewest GPU-seconds for its weight within `window` seconds; of its requests the one of
    the highest priority, which grows by one with every `ageing` seconds that a request gets no lease; then the earliest
    deadline, the fewest leases, age. A shard whose lease ran out is taken over: what was running in it counts one
    attempt lost, and at the sixth is quarantined.
    """
    turn = _Turn(model_digest, partition, owner, ranks, seconds, window, ageing)
    while (taken := _take_next(session, turn)) is not None:
        lease, before = taken
        if before.status == ShardStatus.LEASED:  # else whoever ended the last lease has put things right
            _end_running(session, [lease.shard_id], AttemptStatus.LOST)
        clips = _clips_to_render(session, lease.shard_id)
        if before.status == ShardStatus.LEASED:
            _charge(session, before)
        if clips:
            return lease, clips
        complete_shard(session, lease)
    return None


def renew(session: Session, lease: Lease, seconds: float) -> set[str]:
    """Keep the lease for `seconds` from now. Returns the clips of the shard that were cancelled meanwhile.

    Raises LeaseLost when the shard is no longer ours.
    """
    renewed = session.execute(_RENEW, {**of(lease), "by": timedelta(seconds=seconds)}, execution_options=UNSYNCED)
    if renewed.one_or_none() is None:
        raise _lost(lease)
    return set(session.scalars(_CANCELLED, {"shard_id": lease.shard_id}))


def start_clip(
    session: Session,
    lease: Lease,
    clip_id: str,
    *,
    engine: str,
    partition: str,
    code_version: str,
    host: str | None = None,
    resumed_step: int | None = None,
) -> int:
    """Open the clip's next attempt and return its number; 0 when there is nothing to render (cancelled, or ended).

    `resumed_step`: that it goes on from, where an earlier attempt left a checkpoint.
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
            host=host,
            resumed_step=resumed_step,
            started_at=_now(),
        ),
    )
    return number


def save_checkpoint(session: Session, lease: Lease, clip_id: str, checkpoint: Checkpoint) -> str | None:
    """The clip has come so far, and its unfinished latents are stored.

    Returns the key of an object that nothing refers to now: the one before, or this one itself where the clip no longer
    runs (it was cancelled, or has ended). Raises LeaseLost.
    """
    _hold(session, lease)
    clip = _lock_clip(session, lease, clip_id)
    if clip is None or clip.status != ClipStatus.RUNNING:
        return checkpoint.key
    kept = {"checkpoint": checkpoint.key, "checkpoint_step": checkpoint.step, "checkpoint_of": checkpoint.of}
    change(session, update(Clip).where(Clip.id == clip_id).values(kept))
    return clip.checkpoint if clip.checkpoint != checkpoint.key else None


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
    take = upsert(Take).values(recipe=clip.recipe, sha256=artifact.sha256, clip_id=clip_id, created_at=_now())
    if clip.fresh:  # asked for in place of the take there is
        anew = {name: take.excluded[name] for name in ("sha256", "clip_id", "created_at")}
        take = take.on_conflict_do_update(index_elements=[Take.recipe], set_=anew)
    else:
        take = take.on_conflict_do_nothing(index_elements=[Take.recipe])
    change(session, take)
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
            **NO_CHECKPOINT,
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

    `error_class`: what kind of failure it was, in one word. A clip that is queued again waits a little, and is left to
    another engine for a while. Where something went wrong before, it begins anew: the fault may lie in its checkpoint.
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
        failed = failed.values(status=ClipStatus.FAILED, error=error, finished_at=_now(), **NO_CHECKPOINT)
    else:
        failed = failed.values(_one_more(Clip.tries, MAX_TRIES, error, anew=Clip.tries + Clip.losses > 0))
    return session.execute(failed, execution_options=UNSYNCED).scalar_one()


def complete_shard(session: Session, lease: Lease) -> None:
    """The shard is worked off. Clips that went back to the queue leave it, to be planned again. Raises LeaseLost."""
    shard = _end(session, lease, ShardStatus.DONE)
    if shard.running:  # started and never told of again
        _end_running(session, [lease.shard_id], AttemptStatus.LOST)
    if shard.waiting or shard.running:
        change(session, _LEAVE, {"left": lease.shard_id})
    if shard.open:
        end_leases(session, [lease.shard_id], ShardStatus.DONE)


def release_shard(session: Session, lease: Lease) -> None:
    """Give the shard back early: the next claim takes it, and no clip is charged with an attempt. Raises LeaseLost.

    Checkpoints stay: whoever claims it goes on from there.
    """
    shard = _end(session, lease, ShardStatus.QUEUED)
    if shard.running:
        _end_running(session, [lease.shard_id], AttemptStatus.RELEASED)
    if shard.open:
        end_leases(session, [lease.shard_id], ShardStatus.QUEUED)


def outranked(session: Session, lease: Lease, *, partition: str | None = None) -> bool:
    """True when this lease should give way: shards of a higher priority of the same tenant and model wait for a GPU.

    `partition`: of the engine, which can do nothing for shards that are for another one. None takes any.

    As many leases give way as shards wait, those of the lowest priority first, and of these the youngest. Priorities
    are taken as they were given: a request that has waited long goes first when a GPU is free, but takes none away.
    """
    mine = (
        select(Shard.priority, Shard.claimed_at, Shard.id, Request.tenant, Request.model_digest)
        .join(Request, Request.id == Shard.request_id)
        .where(HELD)
        .cte("mine")
    )
    same = (Request.tenant == mine.c.tenant) & (Request.model_digest == mine.c.model_digest)
    theirs = select(func.count()).select_from(Shard).join(Request, Request.id == Shard.request_id).join(mine, same)
    waiting = theirs.where(Shard.status == ShardStatus.QUEUED, Request.status == RequestStatus.OPEN)
    if partition is not None:
        waiting = waiting.where(Shard.partition.is_(None) | (Shard.partition == partition))
    waiting = waiting.where(Shard.priority > mine.c.priority).scalar_subquery()
    younger = or_(
        Shard.priority < mine.c.priority,
        and_(Shard.priority == mine.c.priority, Shard.claimed_at > mine.c.claimed_at),
        and_(Shard.priority == mine.c.priority, Shard.claimed_at == mine.c.claimed_at, Shard.id > mine.c.id),
    )
    leased = theirs.where(Shard.status == ShardStatus.LEASED, Shard.leased_until >= _now())
    first = leased.where(younger).scalar_subquery()
    return session.scalar(select(first < waiting), of(lease)) or False


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


@dataclass(frozen=True, slots=True)
class _Turn:
    """Who asks for work, and by which rules it is shared."""

    model_digest: str
    partition: str | None
    owner: str
    ranks: int
    seconds: float
    window: float
    ageing: float


_CLAIMABLE = """shard.request_id = {request}
          -- what the index ix_shards_active holds, said once more so that it is used
          and shard.status in ('queued', 'leased')
          and (shard.status = 'queued' or shard.leased_until < statement_timestamp())
          and (shard.partition is null or shard.partition = coalesce(:partition, shard.partition))
          and not (coalesce(:owner = any (shard.avoid), false)
                   and shard.created_at > statement_timestamp() - make_interval(secs => :avoid))
        order by shard.priority desc, shard.id
        limit 1"""

# One statement, always the same words: built once here, parsed and planned once by the server for each connection.
CLAIM = text(f"""
with live as materialized (
    -- the leases there are, and the GPU-seconds that each takes within the window, as was predicted or is seen
    select shard.request_id, request.tenant,
           shard.ranks * least(:window, greatest(
               extract(epoch from statement_timestamp() - shard.claimed_at)::float8,
               coalesce(shard.predicted_seconds, shard.size)
           )) as gpu_seconds
    from shards shard join requests request on request.id = shard.request_id
    where shard.status = 'leased' and shard.leased_until >= statement_timestamp()
), used as (
    select tenant, sum(gpu_seconds) as gpu_seconds
    from (
        select tenant, gpu_seconds from live
        union all
        select tenant, gpu_seconds from usage where minute > statement_timestamp() - make_interval(secs => :window)
    ) as both_of_them
    group by tenant
), turn as materialized (
    -- the requests that have work, the one whose turn it is first
    select request.id
    from requests request
    join tenants tenant on tenant.name = request.tenant
    left join used on used.tenant = request.tenant
    cross join lateral (
        select shard.id from shards shard
        where {_CLAIMABLE.format(request="request.id")}
    ) oldest
    cross join lateral (
        select extract(epoch from statement_timestamp() - greatest(request.created_at, max(shard.claimed_at)))::float8
        from shards shard where shard.request_id = request.id
    ) waited (seconds)
    where request.status = 'open' and request.model_digest = :model_digest
    order by coalesce(used.gpu_seconds, 0) / tenant.weight,
             request.priority + floor(waited.seconds / :ageing) desc,
             request.deadline nulls last,
             (select count(*) from live where live.request_id = request.id),
             oldest.id
), first as materialized (
    -- of the first of them that another claim has not emptied meanwhile
    select before.*
    from turn cross join lateral (
        select shard.id, shard.status, shard.request_id, shard.ranks, shard.claimed_at, shard.leased_until
        from shards shard
        where {_CLAIMABLE.format(request="turn.id")}
        for no key update skip locked
    ) before
    limit 1
)
update shards
set status = 'leased', owner = :owner, ranks = :ranks, attempt = shards.attempt + 1,
    leased_until = statement_timestamp() + make_interval(secs => :seconds), claimed_at = statement_timestamp()
from first
where shards.id = first.id
returning shards.attempt, shards.carrier, first.*
""")


def _take_next(session: Session, turn: _Turn) -> tuple[Lease, Row[Any]] | None:
    """The lease, and how the shard was before: its status, and whose GPUs were used for how long if it was leased."""
    row = session.execute(CLAIM, {**asdict(turn), "avoid": AVOID}).one_or_none()
    if row is None:
        return None
    return Lease(row.id, turn.owner, row.attempt, row.request_id, row.carrier), row


NO_CHECKPOINT: dict[str, Any] = {"checkpoint": None, "checkpoint_step": None, "checkpoint_of": None}


def adopted() -> dict[str, Any]:
    """What a clip becomes when the take of its recipe is there already."""
    return {
        "status": ClipStatus.DONE,
        "artifact": Take.sha256,
        "found": True,
        "error": None,
        "finished_at": _now(),
        **NO_CHECKPOINT,
    }


def adoptable(clip: Any) -> ColumnElement[bool]:
    """True of a take that does for a clip: of its recipe and, where it is to be fresh, made since it was asked for."""
    return (Take.recipe == clip.recipe) & or_(~clip.fresh, Take.created_at >= clip.queued_at)


def _clips_to_render(session: Session, shard_id: int) -> list[LeasedClip]:
    """Those still to render. Clips that were planned before a take of their recipe was there need no rendering."""
    waiting = session.execute(_OF_SHARD, {"shard_id": shard_id}).all()
    if any(row.there for row in waiting):
        queued = (Clip.shard_id == shard_id) & (Clip.status == ClipStatus.QUEUED)
        change(session, update(Clip).where(queued, adoptable(Clip)).values(adopted()))
        waiting = session.execute(_OF_SHARD, {"shard_id": shard_id}).all()
    return [_leased_clip(row) for row in waiting]


def clip_to_render(session: Session, clip_id: str) -> LeasedClip:
    """All that is needed to render this clip, whatever became of it."""
    return _leased_clip(session.execute(_BY_ID, {"clip_id": clip_id}).one())


_SOURCES = Artifact.__table__.alias("source"), Artifact.__table__.alias("end_source")
_PLAIN = ("clip_id", "attempt_no", "prompt", *_AS_STORED)
_OF_ARTIFACT = tuple(field.name for field in fields(NewArtifact))


def _wanted(which: ColumnElement[bool]) -> Select[Any]:
    """All that is needed to render these clips, in file order; and whether a take of a clip's recipe is there."""
    clip = Clip.__table__.c  # columns and no attributes: the mapper would walk through every row once more
    return (
        select(
            clip.id,
            clip.attempts + 1,
            func.coalesce(clip.rewritten_prompt, clip.prompt),
            *(clip[name] for name in _AS_STORED),
            *(clip.checkpoint, clip.checkpoint_step, clip.checkpoint_of),
            *(source.c[name] for source in _SOURCES for name in _OF_ARTIFACT),
            exists().where(adoptable(Clip)).label("there"),
        )
        .outerjoin(_SOURCES[0], _SOURCES[0].c.sha256 == clip.source)
        .outerjoin(_SOURCES[1], _SOURCES[1].c.sha256 == clip.end_source)
        .where(which)
        .order_by(clip.index, clip.sample)
    )


_OF_SHARD = _wanted((Clip.shard_id == bindparam("shard_id")) & (Clip.status == ClipStatus.QUEUED))
_BY_ID = _wanted(Clip.id == bindparam("clip_id"))


def _leased_clip(row: Row[Any]) -> LeasedClip:
    key, step, of = row[len(_PLAIN) : len(_PLAIN) + 3]
    return LeasedClip(
        **dict(zip(_PLAIN, row, strict=False)),
        source=_artifact(row, len(_PLAIN) + 3),
        end_source=_artifact(row, len(_PLAIN) + 3 + len(_OF_ARTIFACT)),
        checkpoint=None if key is None else Checkpoint(key=key, step=step, of=of),
    )


def _artifact(row: Row[Any], at: int) -> NewArtifact | None:
    """The one whose columns begin there."""
    if row[at] is None:
        return None
    return NewArtifact(**dict(zip(_OF_ARTIFACT, row[at : at + len(_OF_ARTIFACT)], strict=True)))


# The fence and what it guards


# Statements that engines say all the time are built once: that takes longer than the server needs to answer them.
_HOLD = select(Shard.status).where(HELD).with_for_update(key_share=True)
_RENEW = (
    update(Shard)
    .where(HELD)
    .values(
        leased_until=case((Shard.status == ShardStatus.LEASED, _now() + bindparam("by", type_=Interval)), else_=None)
    )
    .returning(Shard.id)
)
_CANCELLED = select(Clip.id).where(Clip.shard_id == bindparam("shard_id"), Clip.status == ClipStatus.CANCELLED)
_LEAVE = update(Clip).where(Clip.shard_id == bindparam("left"), Clip.status == ClipStatus.QUEUED).values(shard_id=None)


def _hold(session: Session, lease: Lease) -> None:
    """Keeps the shard ours until the end of this transaction: a claim skips or waits for a row that is locked."""
    if session.execute(_HOLD, of(lease)).one_or_none() is None:
        raise _lost(lease)


def _lost(lease: Lease) -> LeaseLost:
    return LeaseLost(f"shard {lease.shard_id}: attempt {lease.attempt} by {lease.owner} no longer holds the lease")


@dataclass(frozen=True, slots=True)
class _Locked:
    status: ClipStatus
    attempts: int
    recipe: str
    fresh: bool
    checkpoint: str | None


def _lock_clip(session: Session, lease: Lease, clip_id: str) -> _Locked | None:
    """The clip while it belongs to the leased shard; None once it was cancelled away from it."""
    row = session.execute(
        select(Clip.status, Clip.attempts, Clip.recipe, Clip.fresh, Clip.checkpoint)
        .where(Clip.id == clip_id, Clip.shard_id == lease.shard_id)
        .with_for_update(key_share=True)
    ).one_or_none()
    return None if row is None else _Locked(row.status, row.attempts, row.recipe or "", row.fresh, row.checkpoint)


def _end_running(session: Session, shard_ids: Sequence[int], outcome: AttemptStatus) -> None:
    """What runs in these shards does so no longer: attempts end, clips are queued again or, at last, quarantined."""
    error = "the engine died or stalled while rendering this clip" if outcome == AttemptStatus.LOST else None
    told = {"outcome": outcome, "why": error, "kind": error and ENGINE_LOST, "shard_ids": list(shard_ids)}
    if change(session, _END_ATTEMPTS, told):
        changes: dict[str, Any] = {"status": ClipStatus.QUEUED}
        if error is not None:  # whatever it was at may be what ended it: it is planned anew, alone
            third = Clip.losses + 1 == MAX_LOSSES // 2  # once, since from there on its checkpoints are others
            changes = {**_one_more(Clip.losses, MAX_LOSSES, error, anew=third), "shard_id": None}
        running = Clip.shard_id.in_(shard_ids) & (Clip.status == ClipStatus.RUNNING)
        change(session, update(Clip).where(running).values(changes))


_END_ATTEMPTS = (
    update(Attempt)
    .where(Clip.shard_id == any_(bindparam("shard_ids", type_=ARRAY(BigInteger))), Clip.status == ClipStatus.RUNNING)
    .where(Attempt.clip_id == Clip.id, Attempt.status == AttemptStatus.RUNNING)
    .values(status=bindparam("outcome"), error=bindparam("why"), error_class=bindparam("kind"), finished_at=_now())
)


def _one_more(count: Any, most: int, error: str, *, anew: ColumnElement[bool]) -> dict[str, Any]:
    """The clip is queued again, not before a while that doubles every time; or put aside where that makes `most`.

    `count`: of failures, or of losses. A failure is known to be the clip's or its ranks'. A loss says little: engines
    are killed, hosts vanish, leases run out under clips that have nothing to do with it; so it takes more of them.
    `anew`: where it leaves its checkpoint behind.
    """
    last = count + 1 >= most
    wait = func.least(BACKOFF * func.power(2.0, Clip.tries + Clip.losses), BACKOFF_MOST) * (0.5 + func.random())
    return {
        **{name: case((anew | last, None), else_=getattr(Clip, name)) for name in NO_CHECKPOINT},
        "not_before": _now() + wait * timedelta(seconds=1),
        count.key: count + 1,
        "error": error,
        "status": case((last, ClipStatus.QUARANTINED), else_=ClipStatus.QUEUED).cast(Clip.status.type),
        "finished_at": case((last, _now()), else_=None),
    }


def _put_back(session: Session, which: ColumnElement[bool]) -> int:
    overdue = select(Shard.id).where(Shard.status == ShardStatus.LEASED, which).order_by(Shard.id)
    shard_ids = list(session.scalars(overdue.with_for_update(key_share=True)))
    if shard_ids:
        _end_running(session, shard_ids, AttemptStatus.LOST)
        end_leases(session, shard_ids, ShardStatus.QUEUED)
    return len(shard_ids)


# What leases took

_PARTS = 8  # rows in which a tenant's usage of a minute lies

# Adds to their tenants' usage what the leases in the table `ended` took, minute by minute.
_SPEND = f"""
insert into usage (tenant, minute, part, gpu_seconds)
select request.tenant, each.minute, min(ended.id) % {_PARTS}, greatest(0, sum(ended.ranks * extract(epoch from
           least(each.minute + interval '1 minute', ended.until) - greatest(each.minute, ended.claimed_at))::float8))
from (select *, least(leased_until, statement_timestamp()) as until from ended) ended
join requests request on request.id = ended.request_id
cross join generate_series(date_trunc('minute', ended.claimed_at), ended.until, interval '1 minute') each (minute)
group by request.tenant, each.minute
order by request.tenant, each.minute
on conflict (tenant, minute, part) do update set gpu_seconds = usage.gpu_seconds + excluded.gpu_seconds"""

_ENDS = """set status = cast(:status as shard_status), owner = null, leased_until = null,
        finished_at = case when :status <> 'queued' then statement_timestamp() end"""

_END = text(f"""
with ended as (
    select id, request_id, ranks, claimed_at, leased_until from shards
    where id = any (:shard_ids) and leased_until is not null
), changed as (
    update shards {_ENDS}
    where id = any (:shard_ids)
)
{_SPEND}""")

# The same of a lease that is still held, and of which nothing is left to be told: in one statement what is so nearly
# always. A cancellation that has come between has ended the lease; it ends clips, and begins none.
_END_HELD = text(f"""
with held as materialized (
    select id, request_id, ranks, claimed_at, leased_until, status,
           exists (select from clips where shard_id = shards.id and status = 'running') as running,
           exists (select from clips where shard_id = shards.id and status = 'queued') as waiting
    from shards
    where id = :held_shard and attempt = :held_attempt and status in ('leased', 'cancelled')
    for no key update
), ended as (
    select * from held
    where status = 'leased' and not running and (:status = 'queued' or not waiting) and leased_until is not null
), changed as (
    update shards {_ENDS}
    from ended where shards.id = ended.id
    returning shards.id
), spent as ({_SPEND})
select running, waiting, status = 'leased' and not exists (select from changed) as open from held""")

_CHARGE = text(f"""
with ended (id, request_id, ranks, claimed_at, leased_until) as (
    values (cast(:id as bigint), :request_id, cast(:ranks as integer), cast(:claimed_at as timestamptz),
            cast(:leased_until as timestamptz))
)
{_SPEND}""")


def _end(session: Session, lease: Lease, status: ShardStatus) -> Row[Any]:
    """Holds the shard, and ends the lease where none of its clips asks for more: it is no longer `open` then."""
    shard = session.execute(_END_HELD, {**of(lease), "status": str(status)}).one_or_none()
    if shard is None:
        raise _lost(lease)
    return shard


def end_leases(session: Session, shard_ids: Sequence[int], status: ShardStatus) -> None:
    """Gives these shards, which the caller has locked, another status, and charges what of them was leased.

    Call it last in a transaction: tenants' rows are in demand.
    """
    session.execute(_END, {"shard_ids": list(shard_ids), "status": str(status)})


def _charge(session: Session, before: Row[Any]) -> None:
    """Charges a lease that somebody else's has replaced: the shard as it was then. Call it last."""
    taken = {name: getattr(before, name) for name in ("id", "request_id", "ranks", "claimed_at", "leased_until")}
    session.execute(_CHARGE, taken)
