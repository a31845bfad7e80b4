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
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import (
    ColumnElement,
    DateTime,
    Integer,
    Row,
    Select,
    Text,
    and_,
    any_,
    case,
    column,
    func,
    insert,
    literal,
    or_,
    select,
    true,
    update,
    values,
)
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session, aliased

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
    Tenant,
    Usage,
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
    turn = _Turn(model_digest, partition, owner, window, ageing)
    while (taken := _take_next(session, turn, seconds, ranks)) is not None:
        lease, before = taken
        if before.status == ShardStatus.LEASED:  # else whoever ended the last lease has put things right
            _end_running(session, [lease.shard_id], AttemptStatus.LOST)
        clips = _clips_to_render(session, lease.shard_id)
        if before.status == ShardStatus.LEASED:
            _charge(session, _Ended.of(before))
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
    status = _hold(session, lease)
    _end_running(session, [lease.shard_id], AttemptStatus.LOST)  # started and never told of again
    waiting = (Clip.shard_id == lease.shard_id) & (Clip.status == ClipStatus.QUEUED)
    change(session, update(Clip).where(waiting).values(shard_id=None))
    if status == ShardStatus.LEASED:  # else it was cancelled, which has ended the lease
        done = {"status": ShardStatus.DONE, "owner": None, "leased_until": None, "finished_at": _now()}
        end_leases(session, [lease.shard_id], done)


def release_shard(session: Session, lease: Lease) -> None:
    """Give the shard back early: the next claim takes it, and no clip is charged with an attempt. Raises LeaseLost.

    Checkpoints stay: whoever claims it goes on from there.
    """
    status = _hold(session, lease)
    _end_running(session, [lease.shard_id], AttemptStatus.RELEASED)
    if status == ShardStatus.LEASED:
        end_leases(session, [lease.shard_id], _BACK)


def outranked(session: Session, lease: Lease, *, partition: str | None = None) -> bool:
    """True when this lease should give way: shards of a higher priority of the same tenant and model wait for a GPU.

    `partition`: of the engine, which can do nothing for shards that are for another one. None takes any.

    As many leases give way as shards wait, those of the lowest priority first, and of these the youngest. Priorities
    are taken as they were given: a request that has waited long goes first when a GPU is free, but takes none away.
    """
    mine = (
        select(Shard.priority, Shard.claimed_at, Shard.id, Request.tenant, Request.model_digest)
        .join(Request, Request.id == Shard.request_id)
        .where(held(lease))
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
    return session.scalar(select(first < waiting)) or False


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
    window: float
    ageing: float


def _take_next(session: Session, turn: _Turn, seconds: float, ranks: int) -> tuple[Lease, Row[Any]] | None:
    """The lease, and how the shard was before: its status, and whose GPUs were used for how long if it was leased."""
    for request_id in session.scalars(_requests_in_turn(turn)):
        first = (
            select(Shard.id, Shard.status, Shard.request_id, Shard.ranks, Shard.claimed_at, Shard.leased_until)
            .where(Shard.request_id == request_id, _claimable(Shard, turn))
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
                owner=turn.owner,
                ranks=ranks,
                attempt=Shard.attempt + 1,
                leased_until=_from_now(seconds),
                claimed_at=_now(),
            )
            .returning(Shard.attempt, Shard.carrier, *first.c)
        )
        row = session.execute(claim, execution_options=UNSYNCED).one_or_none()
        if row is not None:  # else another claim was faster
            return Lease(row.id, turn.owner, row.attempt, request_id, row.carrier), row
    return None


def _requests_in_turn(turn: _Turn) -> Select[tuple[str]]:
    """The requests that have work, the one whose turn it is first."""
    live = _live(turn.window)
    taken = select(live.c.tenant, live.c.gpu_seconds)
    ended = select(Usage.tenant, Usage.gpu_seconds).where(Usage.minute > _now() - timedelta(seconds=turn.window))
    both = taken.union_all(ended).subquery("both")
    used = select(both.c.tenant, func.sum(both.c.gpu_seconds).label("gpu_seconds")).group_by(both.c.tenant).cte("used")
    of_request = select(func.count()).where(live.c.request_id == Request.id).correlate(Request).scalar_subquery()
    served = select(func.max(Shard.claimed_at)).where(Shard.request_id == Request.id).correlate(Request)
    waited = _seconds(_now() - func.greatest(Request.created_at, served.scalar_subquery()))
    oldest = select(Shard.id).where(Shard.request_id == Request.id, _claimable(Shard, turn))
    oldest = oldest.order_by(Shard.priority.desc(), Shard.id).limit(1).correlate(Request).lateral("oldest")
    return (
        select(Request.id)
        .join(Tenant, Tenant.name == Request.tenant)
        .join(oldest, true())
        .outerjoin(used, used.c.tenant == Request.tenant)
        .where(Request.status == RequestStatus.OPEN, Request.model_digest == turn.model_digest)
        .order_by(
            func.coalesce(used.c.gpu_seconds, 0.0) / Tenant.weight,
            (Request.priority + func.floor(waited / turn.ageing)).desc(),
            Request.deadline.asc().nulls_last(),
            of_request,
            oldest.c.id,
        )
    )


def _live(window: float) -> Any:
    """The leases there are, and the GPU-seconds that each takes within the window, as was predicted or is seen."""
    so_far = _seconds(_now() - func.greatest(Shard.claimed_at, _now() - timedelta(seconds=window)))
    expected = func.least(func.coalesce(Shard.predicted_seconds, Shard.size), window)
    return (
        select(Shard.request_id, Request.tenant, (func.greatest(so_far, expected) * Shard.ranks).label("gpu_seconds"))
        .join(Request, Request.id == Shard.request_id)
        .where(Shard.status == ShardStatus.LEASED, Shard.leased_until >= _now())
        .cte("live")
    )


def _claimable(shard: Any, turn: _Turn) -> ColumnElement[bool]:
    ours = true() if turn.partition is None else shard.partition.is_(None) | (shard.partition == turn.partition)
    ran_out = (shard.status == ShardStatus.LEASED) & (shard.leased_until < _now())
    failed_here = literal(turn.owner) == any_(shard.avoid)
    left_to_others = func.coalesce(failed_here, False) & (shard.created_at > _now() - timedelta(seconds=AVOID))
    # The first line repeats what the index ix_shards_active holds, so that it is used.
    active = shard.status.in_((ShardStatus.QUEUED, ShardStatus.LEASED))
    return active & ((shard.status == ShardStatus.QUEUED) | ran_out) & ours & ~left_to_others


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
    queued = (Clip.shard_id == shard_id) & (Clip.status == ClipStatus.QUEUED)
    there = session.scalar(select(select(Clip.id).join(Take, adoptable(Clip)).where(queued).exists()))
    if there:
        change(session, update(Clip).where(queued, adoptable(Clip)).values(adopted()))
    return clips_where(session, queued)


def clips_where(session: Session, which: ColumnElement[bool]) -> list[LeasedClip]:
    """All that is needed to render these clips, in file order."""
    sources = aliased(Artifact), aliased(Artifact)
    checkpoint = (Clip.checkpoint, Clip.checkpoint_step, Clip.checkpoint_of)
    wanted = (
        select(
            Clip.id.label("clip_id"),
            (Clip.attempts + 1).label("attempt_no"),
            func.coalesce(Clip.rewritten_prompt, Clip.prompt).label("prompt"),
            *(getattr(Clip, name) for name in _AS_STORED),
            *checkpoint,
            *sources,
        )
        .outerjoin(sources[0], sources[0].sha256 == Clip.source)
        .outerjoin(sources[1], sources[1].sha256 == Clip.end_source)
        .where(which)
        .order_by(Clip.index, Clip.sample)
    )
    clips: list[LeasedClip] = []
    for *stored, key, step, of, source, end_source in session.execute(wanted):
        names = ("clip_id", "attempt_no", "prompt", *_AS_STORED)
        row = dict(zip(names, stored, strict=True))
        begun = None if key is None else Checkpoint(key=key, step=step, of=of)
        clips.append(LeasedClip(**row, source=_as_value(source), end_source=_as_value(end_source), checkpoint=begun))
    return clips


def _as_value(stored: Artifact | None) -> NewArtifact | None:
    if stored is None:
        return None
    return NewArtifact(sha256=stored.sha256, key=stored.key, bytes=stored.bytes, media_type=stored.media_type)


# The fence and what it guards


def _hold(session: Session, lease: Lease) -> ShardStatus:
    """Keeps the shard ours until the end of this transaction: a claim skips or waits for a row that is locked."""
    mine = select(Shard.status).where(held(lease)).with_for_update(key_share=True)
    status = session.execute(mine).scalar_one_or_none()
    if status is None:
        raise _lost(lease)
    return status


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
    running = Clip.shard_id.in_(shard_ids) & (Clip.status == ClipStatus.RUNNING)
    ended = update(Attempt).where(Attempt.clip_id == Clip.id, running, Attempt.status == AttemptStatus.RUNNING)
    error = "the engine died or stalled while rendering this clip" if outcome == AttemptStatus.LOST else None
    kind = error and ENGINE_LOST
    if change(session, ended.values(status=outcome, error=error, error_class=kind, finished_at=_now())):
        changes: dict[str, Any] = {"status": ClipStatus.QUEUED}
        if error is not None:  # whatever it was at may be what ended it: it is planned anew, alone
            third = Clip.losses + 1 == MAX_LOSSES // 2  # once, since from there on its checkpoints are others
            changes = {**_one_more(Clip.losses, MAX_LOSSES, error, anew=third), "shard_id": None}
        change(session, update(Clip).where(running).values(changes))


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
        end_leases(session, shard_ids, _BACK)
    return len(shard_ids)


# What leases took

_BACK: dict[str, Any] = {"status": ShardStatus.QUEUED, "owner": None, "leased_until": None}


@dataclass(frozen=True, slots=True)
class _Ended:
    """A lease that has ended: of which request, on how many GPUs, from when to when."""

    request_id: str
    ranks: int
    claimed_at: datetime
    until: datetime | None  # its last moment; null where it gave up before

    @classmethod
    def of(cls, shard: Row[Any]) -> _Ended:
        return cls(shard.request_id, shard.ranks, shard.claimed_at, shard.leased_until)


def end_leases(session: Session, shard_ids: Sequence[int], change_to: Mapping[str, Any]) -> None:
    """Changes these shards, which the caller has locked, and charges their tenants for those that are leased."""
    before = select(Shard.id, Shard.status, Shard.request_id, Shard.ranks, Shard.claimed_at, Shard.leased_until)
    ended = [_Ended.of(row) for row in session.execute(before.where(Shard.id.in_(shard_ids))) if row.leased_until]
    change(session, update(Shard).where(Shard.id.in_(shard_ids)).values(change_to))
    _charge(session, *ended)


def _charge(session: Session, *ended: _Ended) -> None:
    """Adds what leases took to their tenants' usage, minute by minute. Call it last: tenants' rows are in demand."""
    if not ended:
        return
    rows = [(each.request_id, each.ranks, each.claimed_at, each.until) for each in ended]
    when = DateTime(timezone=True)
    of = [column("request_id", Text), column("ranks", Integer), column("began", when), column("until", when)]
    leases = values(*of, name="ended").data(rows).cte("leases")
    end = func.least(leases.c.until, _now())
    minutes = func.generate_series(func.date_trunc("minute", leases.c.began), end, _MINUTE)
    each = minutes.table_valued("minute", name="each_minute").render_derived()
    seconds = _seconds(func.least(each.c.minute + _MINUTE, end) - func.greatest(each.c.minute, leases.c.began))
    spent = (
        select(Request.tenant, each.c.minute, func.greatest(func.sum(seconds * leases.c.ranks), 0))
        .select_from(leases)
        .join(Request, Request.id == leases.c.request_id)
        .join(each, true())
        .group_by(Request.tenant, each.c.minute)
        .order_by(Request.tenant, each.c.minute)
    )
    added = upsert(Usage).from_select(["tenant", "minute", "gpu_seconds"], spent)
    total = {"gpu_seconds": Usage.gpu_seconds + added.excluded.gpu_seconds}
    change(session, added.on_conflict_do_update(index_elements=[Usage.tenant, Usage.minute], set_=total))


def _now() -> ColumnElement[Any]:
    """The time of the statement: not the transaction's, which may be older, and stable, so that indexes serve it."""
    return func.statement_timestamp()


def _seconds(interval: Any) -> ColumnElement[Any]:
    return func.extract("epoch", interval)


def _from_now(seconds: float) -> ColumnElement[Any]:
    return _now() + timedelta(seconds=seconds)
