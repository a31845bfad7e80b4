"""The fence: a lease, and the predicate by which every later write proves that it still holds.

An engine that stalls for longer than its lease does not know that it lost it. So every write names the attempt under
which the shard was claimed, and the shard's attempt goes up with every claim. Rows are always locked in the order
request, shard, clip, which is what keeps engines, planners and cancellers from waiting for each other in a circle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, bindparam, func, select, text
from sqlalchemy.orm import Session

from db.tables import Clip, ClipStatus, Shard, ShardStatus


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


def now() -> ColumnElement[Any]:
    """The time of the statement: not the transaction's, which may be older, and stable, so that indexes serve it."""
    return func.statement_timestamp()


# True for the shard's row only while the claim that `held_params` names still owns it. A cancelled shard stays with
# its last claim, whose holder is told what was cancelled, not that it was stolen.
HELD = (
    (Shard.id == bindparam("held_shard"))
    & (Shard.attempt == bindparam("held_attempt"))
    & Shard.status.in_((ShardStatus.LEASED, ShardStatus.CANCELLED))
)


def held_params(lease: Lease) -> dict[str, Any]:
    """Bind parameters of HELD."""
    return {"held_shard": lease.shard_id, "held_attempt": lease.attempt}


TURN_SECONDS = 60  # that a turn is waited for: longer than any transaction of ours that holds one


def take_turn(session: Session, key: int) -> None:
    """Waits until no other transaction has this advisory lock, and keeps it to the end of this one.

    A wait without a bound would let anybody who can take the lock stop all planning: after TURN_SECONDS it is an error,
    after which a caller begins again as after any other of the server's.
    """
    set_bound = text("select set_config('lock_timeout', :bound, true)")
    before = session.scalar(text("select current_setting('lock_timeout')"))
    session.execute(set_bound, {"bound": f"{TURN_SECONDS}s"})
    session.execute(select(func.pg_advisory_xact_lock(key)))
    session.execute(set_bound, {"bound": before})


# Statements that engines say all the time are built once: that takes longer than the server needs to answer them.
_HOLD = select(Shard.status).where(HELD).with_for_update(key_share=True)


def hold(session: Session, lease: Lease) -> None:
    """Keeps the shard ours until the end of this transaction: a claim skips or waits for a row that is locked."""
    if session.execute(_HOLD, held_params(lease)).one_or_none() is None:
        raise lost(lease)


def lost(lease: Lease) -> LeaseLost:
    return LeaseLost(f"shard {lease.shard_id}: attempt {lease.attempt} by {lease.owner} no longer holds the lease")


@dataclass(frozen=True, slots=True)
class _Locked:
    status: ClipStatus
    attempts: int
    recipe: str
    fresh: bool
    resume_key: str | None


def lock_clip(session: Session, lease: Lease, clip_id: str) -> _Locked | None:
    """The clip while it belongs to the leased shard; None once it was cancelled away from it."""
    row = session.execute(
        select(Clip.status, Clip.attempts, Clip.recipe, Clip.fresh, Clip.resume_key)
        .where(Clip.id == clip_id, Clip.shard_id == lease.shard_id)
        .with_for_update(key_share=True)
    ).one_or_none()
    return None if row is None else _Locked(row.status, row.attempts, row.recipe or "", row.fresh, row.resume_key)
