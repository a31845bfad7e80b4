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
from datetime import timedelta
from typing import Any

from sqlalchemy import ARRAY, BigInteger, ColumnElement, Interval, any_, bindparam, case, func, insert, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from db.artifacts import NewArtifact
from db.engines import beats
from db.fence import HELD, Lease, held_params, hold, lock_clip, lost, now
from db.lost import found_again
from db.renders import NO_RESUME_STATE
from db.session import UNSYNCED, change
from db.tables import (
    MAX_FAILURES,
    MAX_LOST_ATTEMPTS,
    Artifact,
    Attempt,
    AttemptStatus,
    Clip,
    ClipStatus,
    Render,
    Shard,
    ShardStatus,
)
from db.usage import end, end_leases

STAGES = ("text", "denoise", "decode", "encode", "put")
BACKOFF = 2.0  # seconds before a second try, times two before each further one; less or more by half, so that
BACKOFF_MOST = 60.0  # clips that failed together do not come back together
ENGINE_LOST = "engine_lost"  # the error class of an attempt whose engine died or stalled
_MINUTE = timedelta(minutes=1)
_ERROR_CHARACTERS = 10_000  # a traceback's end is of use, a log is not


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeState:
    """Unfinished latents that lie in the store already."""

    key: str
    step: int  # denoising steps that they have had
    fingerprint: str  # of the engine and clip: equal where going on from there comes to the same bits


def renew(session: Session, lease: Lease, seconds: float, claimed: Sequence[str] = ()) -> set[str]:
    """Keep the lease for `seconds` from now. Returns the clips of the shard that were cancelled meanwhile.

    claimed: all that came with the lease. Of a shard that was cancelled all of them are, also where they have been
    queued again since and are no longer in it. Raises LeaseLost when the shard is no longer ours.
    """
    renewed = session.execute(
        _RENEW, {**held_params(lease), "by": timedelta(seconds=seconds)}, execution_options=UNSYNCED
    ).one_or_none()
    if renewed is None:
        raise lost(lease)
    if renewed.status == ShardStatus.CANCELLED and claimed:
        return set(claimed)
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
    trace_id: str | None = None,
) -> int:
    """Open the clip's next attempt and return its number; 0 when there is nothing to render (cancelled, or ended).

    `resumed_step`: that it goes on from, where an earlier attempt left a resume state.
    Called twice under one lease it returns the attempt that runs. Raises LeaseLost.
    """
    hold(session, lease)
    clip = lock_clip(session, lease, clip_id)
    if clip is None or clip.status not in (ClipStatus.QUEUED, ClipStatus.RUNNING):
        return 0
    if clip.status == ClipStatus.RUNNING:
        return clip.attempts
    number = clip.attempts + 1
    running = {"status": ClipStatus.RUNNING, "attempts": number, "started_at": now(), "error": None, "seconds": None}
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
            trace_id=trace_id,
            started_at=now(),
        ),
    )
    return number


def save_resume_state(session: Session, lease: Lease, clip_id: str, state: ResumeState) -> str | None:
    """Record how far the clip has come: its unfinished latents are stored.

    Returns the key of an object that nothing refers to now: the one before, or this one itself where the clip no longer
    runs (it was cancelled, or has ended). Raises LeaseLost.
    """
    hold(session, lease)
    clip = lock_clip(session, lease, clip_id)
    if clip is None or clip.status != ClipStatus.RUNNING:
        return state.key
    kept = {"resume_key": state.key, "resume_step": state.step, "resume_fingerprint": state.fingerprint}
    change(session, update(Clip).where(Clip.id == clip_id).values(kept))
    return clip.resume_key if clip.resume_key != state.key else None


def record_clip(
    session: Session,
    lease: Lease,
    clip_id: str,
    *,
    artifact: NewArtifact,
    seconds: Mapping[str, float],
    trace_id: str | None = None,
    skipped_steps: int | None = None,
    peak_bytes: int | None = None,
) -> bool:
    """The clip is done: its bytes are stored, now they count. `seconds` by stage (STAGES).

    True when the clip is done by us, also when that was recorded before. False when it no longer waits for us: it was
    cancelled, or its attempt was failed. Raises LeaseLost.
    """
    if unknown := set(seconds) - set(STAGES):
        raise ValueError(f"stage {sorted(unknown)[0]!r} of clip {clip_id}: known are {', '.join(STAGES)}")
    hold(session, lease)
    clip = lock_clip(session, lease, clip_id)
    if clip is None or clip.status != ClipStatus.RUNNING:
        return clip is not None and clip.status == ClipStatus.DONE
    stored = {
        "sha256": artifact.sha256,
        "key": artifact.key,
        "bytes": artifact.bytes,
        "media_type": artifact.media_type,
    }
    if not change(session, upsert(Artifact).values(stored).on_conflict_do_nothing(index_elements=[Artifact.sha256])):
        found_again(session, artifact.sha256, clip_id)
    render = upsert(Render).values(recipe=clip.recipe, sha256=artifact.sha256, clip_id=clip_id, created_at=now())
    if clip.fresh:  # asked for in place of the render there is
        anew = {name: render.excluded[name] for name in ("sha256", "clip_id", "created_at")}
        render = render.on_conflict_do_update(index_elements=[Render.recipe], set_=anew)
    else:
        render = render.on_conflict_do_nothing(index_elements=[Render.recipe])
    change(session, render)
    change(
        session,
        update(Attempt)
        .where(Attempt.clip_id == clip_id, Attempt.status == AttemptStatus.RUNNING)
        .values(status=AttemptStatus.DONE, finished_at=now(), trace_id=trace_id)
        .values(skipped_steps=skipped_steps, peak_bytes=peak_bytes)
        .values({f"{stage}_seconds": spent for stage, spent in seconds.items()}),
    )
    change(
        session,
        update(Clip)
        .where(Clip.id == clip_id, Render.recipe == Clip.recipe)
        .values(
            status=ClipStatus.DONE,
            artifact=Render.sha256,  # the cached one, so that one recipe has one answer whatever happened
            seconds=sum(seconds.values()),
            finished_at=now(),
            **NO_RESUME_STATE,
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
    of_machine: bool = False,
) -> ClipStatus:
    """The running attempt failed. The clip is queued again, quarantined after the third, or failed when `permanent`.

    `of_machine`: a device failed, which says as little of the clip as an engine that vanished: the attempt is lost.
    `error_class`: what kind of failure it was, in one word. A clip that is queued again waits a little, and is left to
    another engine for a while. Where something went wrong before, it begins anew: its resume state may be the fault.
    Returns what became of it; a clip that does not run (cancelled, failed before) is left as it is. Raises LeaseLost.
    """
    error = error.replace("\0", "")[:_ERROR_CHARACTERS] or "failed without a reason"
    hold(session, lease)
    clip = lock_clip(session, lease, clip_id)
    if clip is None:
        return ClipStatus.CANCELLED
    if clip.status != ClipStatus.RUNNING:
        return clip.status
    change(
        session,
        update(Attempt)
        .where(Attempt.clip_id == clip_id, Attempt.status == AttemptStatus.RUNNING)
        .values(status=AttemptStatus.LOST if of_machine else AttemptStatus.FAILED)
        .values(error=error, error_class=error_class, finished_at=now()),
    )
    failed = update(Clip).where(Clip.id == clip_id).returning(Clip.status)
    if permanent:
        failed = failed.values(status=ClipStatus.FAILED, error=error, finished_at=now(), **NO_RESUME_STATE)
    elif of_machine:
        failed = failed.values(_one_more_lost(error))
    else:
        anew = Clip.failures + Clip.lost_attempts > 0
        failed = failed.values(_one_more(Clip.failures, MAX_FAILURES, error, anew=anew))
    return session.execute(failed, execution_options=UNSYNCED).scalar_one()


def complete_shard(session: Session, lease: Lease, *, beside: float = 0.0) -> None:
    """The shard is worked off. Clips that went back to the queue leave it, to be planned again. Raises LeaseLost.

    beside: seconds of the end in which the GPUs were free for another shard, with which nobody is charged.
    """
    shard = end(session, lease, ShardStatus.DONE, beside)
    if shard.running:  # started and never told of again
        end_running(session, [lease.shard_id], AttemptStatus.LOST)
    if shard.waiting or shard.running:
        change(session, _LEAVE, {"left": lease.shard_id})
    if shard.open:
        end_leases(session, [lease.shard_id], ShardStatus.DONE)


def release_shard(session: Session, lease: Lease) -> None:
    """Give the shard back early: the next claim takes it, and no clip is charged with an attempt. Raises LeaseLost.

    Resume states stay: the engine that claims it goes on from there.
    """
    shard = end(session, lease, ShardStatus.QUEUED)
    if shard.running:
        end_running(session, [lease.shard_id], AttemptStatus.RELEASED)
    if shard.open:
        end_leases(session, [lease.shard_id], ShardStatus.QUEUED)


def expire_owner(session: Session, owner: str) -> int:
    """End every lease of an engine that is said to be dead. Returns how many there were.

    Of one that gives signs of life here none is ended: it was called dead by mistake.
    """
    return 0 if beats(session, owner) else _put_back(session, Shard.owner == owner)


def expire_leases(session: Session) -> int:
    """Put back every shard whose lease ran out (its running clip counts an attempt). Returns how many there were."""
    return _put_back(session, Shard.leased_until < now())


_RENEW = (
    update(Shard)
    .where(HELD)
    .values(
        leased_until=case((Shard.status == ShardStatus.LEASED, now() + bindparam("by", type_=Interval)), else_=None)
    )
    .returning(Shard.id, Shard.status)
)
_CANCELLED = select(Clip.id).where(Clip.shard_id == bindparam("shard_id"), Clip.status == ClipStatus.CANCELLED)
_LEAVE = update(Clip).where(Clip.shard_id == bindparam("left"), Clip.status == ClipStatus.QUEUED).values(shard_id=None)


def end_running(session: Session, shard_ids: Sequence[int], outcome: AttemptStatus) -> None:
    """Ends what runs in these shards: attempts end, clips are queued again or, at last, quarantined."""
    error = "the engine died or stalled while rendering this clip" if outcome == AttemptStatus.LOST else None
    told = {"outcome": outcome, "why": error, "kind": error and ENGINE_LOST, "shard_ids": list(shard_ids)}
    if change(session, _END_ATTEMPTS, told):
        changes: dict[str, Any] = {"status": ClipStatus.QUEUED}
        if error is not None:  # whatever it was at may be what ended it: it is planned anew, alone
            changes = {**_one_more_lost(error), "shard_id": None}
        running = Clip.shard_id.in_(shard_ids) & (Clip.status == ClipStatus.RUNNING)
        change(session, update(Clip).where(running).values(changes))


_END_ATTEMPTS = (
    update(Attempt)
    .where(Clip.shard_id == any_(bindparam("shard_ids", type_=ARRAY(BigInteger))), Clip.status == ClipStatus.RUNNING)
    .where(Attempt.clip_id == Clip.id, Attempt.status == AttemptStatus.RUNNING)
    .values(status=bindparam("outcome"), error=bindparam("why"), error_class=bindparam("kind"), finished_at=now())
)


def _one_more(count: Any, most: int, error: str, *, anew: ColumnElement[bool]) -> dict[str, Any]:
    """The clip is queued again, not before a while that doubles every time; or put aside where that makes `most`.

    `count`: of failures, or of lost attempts. A failure is known to be the clip's or its ranks'. A lost attempt says
    little: engines are killed, hosts vanish, leases run out under clips that have nothing to do with it; so it takes
    more of them.
    `anew`: where it leaves its resume state behind.
    """
    last = count + 1 >= most
    before = Clip.failures + Clip.lost_attempts
    wait = func.least(BACKOFF * func.power(2.0, before), BACKOFF_MOST) * (0.5 + func.random())
    return {
        **{name: case((anew | last, None), else_=getattr(Clip, name)) for name in NO_RESUME_STATE},
        "not_before": now() + wait * timedelta(seconds=1),
        count.key: count + 1,
        "error": error,
        "status": case((last, ClipStatus.QUARANTINED), else_=ClipStatus.QUEUED).cast(Clip.status.type),
        "finished_at": case((last, now()), else_=None),
    }


def _one_more_lost(error: str) -> dict[str, Any]:
    """One more lost attempt. The third begins anew; once, since from there on its resume states are others."""
    third = Clip.lost_attempts + 1 == MAX_LOST_ATTEMPTS // 2
    return _one_more(Clip.lost_attempts, MAX_LOST_ATTEMPTS, error, anew=third)


def _put_back(session: Session, which: ColumnElement[bool]) -> int:
    overdue = select(Shard.id).where(Shard.status == ShardStatus.LEASED, which).order_by(Shard.id)
    shard_ids = list(session.scalars(overdue.with_for_update(key_share=True)))
    if shard_ids:
        end_running(session, shard_ids, AttemptStatus.LOST)
        end_leases(session, shard_ids, ShardStatus.QUEUED)
    return len(shard_ids)
