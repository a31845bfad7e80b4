"""Requests, from their opening to their end: progress, cancelling, retrying, quotas.

Plain functions: they take a session, return values, and leave the transaction to the caller. What engines write is in
leases.py; what people read is in history.py. None of them costs more statements for a million clips than for ten."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Boolean, Row, case, delete, distinct, func, insert, literal, or_, select, text, true, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from db.engines import QUIET, server_age
from db.renders import NO_RESUME_STATE
from db.session import ANALYZE_FROM, change
from db.tables import (
    ACTIVE,
    PRIORITY,
    TERMINAL,
    UNENDED,
    Attempt,
    AttemptStatus,
    Clip,
    ClipStatus,
    Model,
    Request,
    RequestStatus,
    Shard,
    ShardStatus,
    Tally,
    Tenant,
)
from db.tenants import clips_waiting, gpu_seconds_of
from db.usage import end_leases

SIGN = 5.0  # seconds between two signs of life of a request's run


class RequestNotFound(LookupError):
    """No request has this id; `rushes requests` lists the ids there are."""

    exit_code = 2


class QuotaExceeded(RuntimeError):
    """The tenant may not ask for so much now; the message gives its bound, what it has, and what it asked for."""


class RequestNotReady(RuntimeError):
    """The request is not in the state this step needs; the message says which, and what to do first."""

    exit_code = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRequest:
    key: str  # two requests with one key are one request
    name: str
    tenant: str
    model: str
    model_digest: str
    settings: Mapping[str, Any]
    source: str  # where the prompts came from: an uri, or "inline"
    source_sha256: str
    priority: int = PRIORITY
    deadline: datetime | None = None  # when all should be done
    clips: int | None = None  # that it will have: what a quota counts until they are in
    gpu_seconds: float = 0.0  # that they are expected to take
    flow_run_id: str | None = None
    carrier: Mapping[str, str] = field(default_factory=dict)
    trace_id: str | None = None
    tags: Sequence[str] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class OpenedRequest:
    id: str
    created: bool  # False: this key was known
    status: RequestStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a request stands. `counts` holds every clip status, also those with no clip."""

    request_id: str
    status: RequestStatus
    total: int | None  # None while clips are still being added
    counts: Mapping[ClipStatus, int]
    reused: int  # done without rendering
    seconds_done: float  # engine seconds of the clips rendered
    mean_seconds: float | None  # of one rendered clip
    first_started: datetime | None
    engines: int  # with a live lease on a shard of this request
    now: datetime

    @property
    def added(self) -> int:
        return sum(self.counts.values())

    @property
    def waiting(self) -> int:
        """Clips that are not terminal yet."""
        return sum(self.counts[status] for status in ACTIVE)

    @property
    def finished(self) -> bool:
        return self.total is not None and self.waiting == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRow:
    id: str
    key: str
    name: str
    tenant: str
    model: str
    model_digest: str
    settings: dict[str, Any]
    source: str
    source_sha256: str
    priority: int
    status: RequestStatus
    total: int | None
    flow_run_id: str | None
    carrier: dict[str, Any]
    trace_id: str | None
    manifest_key: str | None
    sheet_key: str | None
    created_at: datetime
    finished_at: datetime | None


def request_id(key: str) -> str:
    """The id that belongs to an idempotency key."""
    return "req_" + hashlib.sha256(key.encode()).hexdigest()[:12]


def open_request(session: Session, new: NewRequest) -> OpenedRequest:
    """Open the request, or find the one that was opened with this key. Raises QuotaExceeded for a new one.

    A cancelled one is opened again, its cancelled clips queued, when another flow run asks for it. An open or paused
    one goes over to the flow run that asks.
    """
    known_model = upsert(Model).values(digest=new.model_digest, name=new.model)
    change(session, known_model.on_conflict_do_nothing(index_elements=[Model.digest]))
    change(session, upsert(Tenant).values(name=new.tenant).on_conflict_do_nothing(index_elements=[Tenant.name]))
    values: dict[str, Any] = {**asdict(new), "id": request_id(new.key), "asked": new.clips}
    # SQLAlchemy's classes have a `metadata` of their own; none given is null, so that only labels that there are cost.
    values |= {"tags": list(new.tags) or None, "metadata_": values["metadata"] or None}
    del values["clips"], values["gpu_seconds"], values["metadata"]
    created = upsert(Request).values(values).on_conflict_do_nothing(index_elements=[Request.key])
    if session.execute(created.returning(Request.id)).one_or_none() is not None:
        _check_quota(session, values["id"], new)
        return OpenedRequest(values["id"], True, RequestStatus.OPEN)
    found = lock_request(session, values["id"])
    status = found.status
    if status == RequestStatus.CANCELLED and found.flow_run_id != new.flow_run_id:
        _queue_again(session, found.id, [ClipStatus.CANCELLED])
        status = RequestStatus.OPEN
    if status in UNENDED:
        asking: dict[str, Any] = {"flow_run_id": new.flow_run_id, "carrier": dict(new.carrier), "watched_at": None}
        asking["trace_id"] = new.trace_id
        change(session, update(Request).where(Request.id == found.id).values(asking))
    return OpenedRequest(found.id, False, status)


def _check_quota(session: Session, request_id: str, new: NewRequest) -> None:
    """Raises QuotaExceeded where this request is one too many. Submitters of one tenant take turns from here."""
    tenant = session.execute(
        select(Tenant.max_clips, Tenant.max_gpu_seconds)
        .where(Tenant.name == new.tenant)
        .with_for_update(key_share=True)
    ).one()
    if tenant.max_clips is not None:
        waiting = clips_waiting(session, new.tenant, apart_from=request_id)
        if waiting + (new.clips or 0) > tenant.max_clips:
            raise QuotaExceeded(
                f"tenant {new.tenant} may have {tenant.max_clips:,} clips waiting, has {waiting:,} and asks for "
                f"{new.clips or 0:,} more: wait until some are done, or have the bound raised (`rushes tenants`)"
            )
    if tenant.max_gpu_seconds is not None:
        used = gpu_seconds_of(session, new.tenant, 86400.0)
        if used + new.gpu_seconds > tenant.max_gpu_seconds:
            raise QuotaExceeded(
                f"tenant {new.tenant} may use {tenant.max_gpu_seconds:,.0f} GPU-seconds in 24 hours, has used "
                f"{used:,.0f} and asks for about {new.gpu_seconds:,.0f} more: wait, or have the bound raised "
                "(`rushes tenants`)"
            )


def count_try(session: Session, request_id: str, flow_run_id: str) -> int:
    """Note that the run of an open request has ended without it: how many did, one after the other, for nothing.

    For something was a run under which a clip came to an end. 0: the request has another run by now, or has ended.
    """
    request = lock_request(session, request_id)
    if request.status != RequestStatus.OPEN or request.flow_run_id != flow_run_id:
        return 0
    counted = _counted(session, request_id)
    ended = sum(counted.get(status, 0) for status in TERMINAL)
    tries = case((Request.ended_before < ended, 1), else_=Request.tries + 1)
    noted = update(Request).where(Request.id == request_id).values(tries=tries, ended_before=ended)
    return session.execute(noted.returning(Request.tries)).scalar_one()


def hand_over(session: Session, request_id: str, flow_run_id: str | None) -> None:
    """Note the flow run that works on an open or paused request from now on."""
    change(
        session,
        update(Request)
        .where(Request.id == request_id, Request.status.in_(UNENDED))
        .values(flow_run_id=flow_run_id, watched_at=None),
    )


def note_watched(session: Session, request_id: str, flow_run_id: str | None) -> None:
    """Note a sign of life of the flow run that works on a request, every few seconds at most; no other run's counts."""
    stale = func.coalesce(func.statement_timestamp() - Request.watched_at > timedelta(seconds=SIGN), true())
    change(
        session,
        update(Request)
        .where(Request.id == request_id, Request.flow_run_id == flow_run_id, stale)
        .values(watched_at=func.statement_timestamp()),
    )


def is_watched(session: Session, request_id: str, flow_run_id: str) -> bool:
    """True when this flow run, the request's own, gave a sign of life in the last QUIET seconds or has just ended.

    While the server was down none could be given, so silence counts from its start at the earliest.
    """
    ago = func.extract("epoch", func.statement_timestamp() - Request.watched_at)
    silent = session.scalar(select(ago).where(Request.id == request_id, Request.flow_run_id == flow_run_id))
    return silent is not None and min(float(silent), server_age(session)) <= QUIET


def seconds_left(session: Session, request_id: str) -> float | None:
    """Seconds until the request's deadline, less than 0 after it; None where it has none."""
    left = func.extract("epoch", Request.deadline - func.statement_timestamp())
    found = session.scalar(select(left).where(Request.id == request_id))
    return None if found is None else float(found)


def seal_request(session: Session, request_id: str, total: int) -> None:
    """All clips are in, `total` of them: planning may begin. Said again with the same total it changes nothing."""
    request = lock_request(session, request_id)
    there = sum(_counted(session, request_id).values())
    if there != total or request.total not in (None, total):
        said = f"; it was sealed with {request.total}" if request.total is not None else ""
        raise ValueError(
            f"{request_id} has {there} clips, not {total}{said}: add_clips must bring every line exactly once"
        )
    change(session, update(Request).where(Request.id == request_id).values(total=total))
    if request.status == RequestStatus.CANCELLED:  # while its clips were being added
        _end_clips(session, request_id)
    if total >= ANALYZE_FROM:
        session.execute(text("analyze clips"))


def progress(session: Session, request_id: str) -> Progress:
    """Where the request stands, by the counts that are kept: a million clips are as quick as ten."""
    summed = [func.sum(getattr(Tally, name)).label(name) for name in ("clips", "reused", "rendered", "seconds")]
    rows = session.execute(
        select(Tally.status, *summed, func.min(Tally.started_at).label("started"))
        .where(Tally.request_id == request_id)
        .group_by(Tally.status)
    ).all()
    live = (Shard.status == ShardStatus.LEASED) & (Shard.leased_until >= func.statement_timestamp())
    engines = select(func.count(distinct(Shard.owner))).where(Shard.request_id == request_id, live).scalar_subquery()
    request = session.execute(
        select(Request.status, Request.total, engines.label("engines"), func.statement_timestamp().label("now")).where(
            Request.id == request_id
        )
    ).one_or_none()
    if request is None:
        raise _not_found(request_id)
    counted = {row.status: int(row.clips) for row in rows}
    rendered_clips = sum(int(row.rendered) for row in rows)
    seconds = sum(float(row.seconds) for row in rows)
    return Progress(
        request_id=request_id,
        status=request.status,
        total=request.total,
        counts={status: counted.get(status, 0) for status in ClipStatus},
        reused=sum(int(row.reused) for row in rows),
        seconds_done=seconds,
        mean_seconds=seconds / rendered_clips if rendered_clips else None,
        first_started=min((row.started for row in rows if row.started), default=None),
        engines=request.engines,
        now=request.now,
    )


def _counted(session: Session, request_id: str) -> dict[ClipStatus, int]:
    """How many clips of the request there are of every status, by the counts that are kept."""
    summed = select(Tally.status, func.sum(Tally.clips)).where(Tally.request_id == request_id).group_by(Tally.status)
    return {status: int(clips) for status, clips in session.execute(summed)}


def compact(session: Session, request_id: str) -> None:
    """Sums up the kept counts of a request, so that few rows answer for many changes. Safe beside writers."""
    names = ("clips", "reused", "rendered", "seconds", "bytes")
    gone = delete(Tally).where(Tally.request_id == request_id).returning(Tally.__table__).cte("gone")
    summed = select(
        gone.c.request_id, gone.c.status, *(func.sum(gone.c[name]) for name in names), func.min(gone.c.started_at)
    ).group_by(gone.c.request_id, gone.c.status)
    change(session, insert(Tally).from_select(["request_id", "status", *names, "started_at"], summed))


def request_by(session: Session, id_or_name: str) -> RequestRow | None:
    """The request of this id; else the latest of this name, or of this flow run."""
    mine = or_(Request.id == id_or_name, Request.name == id_or_name, Request.flow_run_id == id_or_name)
    first = select(Request).where(mine).order_by((Request.id == id_or_name).desc(), Request.created_at.desc()).limit(1)
    found = session.scalars(first, execution_options={"populate_existing": True}).one_or_none()
    return None if found is None else _request_row(found)


def _request_row(request: Request) -> RequestRow:
    return RequestRow(**{f.name: getattr(request, f.name) for f in fields(RequestRow)})


def finish_request(
    session: Session, request_id: str, *, manifest_key: str | None = None, sheet_key: str | None = None
) -> RequestStatus:
    """Close the request with the state its clips give it, and return that.

    All done: completed. None done: failed. Else completed with gaps. A cancelled one stays cancelled. Keys given
    replace those kept before. Raises RequestNotReady while a clip is still to come.
    """
    request = lock_request(session, request_id)
    counted = _counted(session, request_id)
    done, there = counted.get(ClipStatus.DONE, 0), sum(counted.values())
    ended = sum(counted.get(status, 0) for status in TERMINAL)
    status = request.status
    if status != RequestStatus.CANCELLED:
        if request.total is None:
            raise RequestNotReady(f"{request_id} is not sealed: add its clips and call seal_request first")
        if ended < there:
            raise RequestNotReady(f"{request_id} has {there - ended} of {there} clips still to come")
        status = RequestStatus.COMPLETED_WITH_GAPS if done else RequestStatus.FAILED
        status = RequestStatus.COMPLETED if done == there else status
    keys = {"manifest_key": manifest_key, "sheet_key": sheet_key}
    finished: dict[str, Any] = {"status": status, "finished_at": func.coalesce(Request.finished_at, func.now())}
    finished.update({name: key for name, key in keys.items() if key is not None})
    change(session, update(Request).where(Request.id == request_id).values(finished))
    return status


def cancel_request(session: Session, request_id: str) -> int:
    """Cancel what is not terminal yet. Returns how many clips that was; nothing happens to a request that has ended.

    Engines learn of it from leases.renew.
    """
    request = lock_request(session, request_id)
    if request.status not in UNENDED:
        return 0
    change(
        session,
        update(Request).where(Request.id == request_id).values(status=RequestStatus.CANCELLED, finished_at=func.now()),
    )
    return _end_clips(session, request_id)


def pause_request(session: Session, request_id: str) -> bool:
    """Hold an open request: nothing more of it is planned or claimed. False for one that has ended.

    Engines learn of it from `is_paused`, keep what they are at, and give its shards back.
    """
    return _turn_to(session, request_id, RequestStatus.PAUSED)


def resume_request(session: Session, request_id: str) -> bool:
    """Let a paused request go on from where its clips are. False for one that has ended."""
    return _turn_to(session, request_id, RequestStatus.OPEN)


def _turn_to(session: Session, request_id: str, status: RequestStatus) -> bool:
    request = lock_request(session, request_id)
    if request.status not in UNENDED:
        return False
    change(session, update(Request).where(Request.id == request_id).values(status=status))
    return True


def is_paused(session: Session, request_id: str) -> bool:
    """True for a paused request."""
    return session.scalar(select(Request.status).where(Request.id == request_id)) == RequestStatus.PAUSED


AGAIN = (ClipStatus.FAILED, ClipStatus.QUARANTINED, ClipStatus.CANCELLED)


def retry_request(
    session: Session, request_id: str, statuses: Sequence[ClipStatus] = AGAIN, *, unsealed: bool = False
) -> int:
    """Queue the failed, quarantined and cancelled clips again, or those of `statuses`, each with all tries anew.

    Opens the request again when there were any; a paused one stays paused. Returns how many. Raises RequestNotReady for
    a request that was cancelled before all of its clips were in, unless the caller will bring them (`unsealed`).
    """
    request = lock_request(session, request_id)
    if request.total is None and not unsealed:
        raise RequestNotReady(f"{request_id} lacks some of its clips: submit its prompts again")
    return _queue_again(session, request_id, statuses)


def _queue_again(session: Session, request_id: str, statuses: Sequence[ClipStatus]) -> int:
    queued = (
        update(Clip)
        .where(Clip.request_id == request_id, Clip.status.in_(statuses))
        .values(status=ClipStatus.QUEUED, failures=0, lost_attempts=0, shard_id=None)
        .values(error=None, finished_at=None, not_before=None)
    )
    count = change(session, queued)
    unsealed = Request.total.is_(None)  # cancelled so early that it may have no clip yet
    change(
        session,
        update(Request)
        .where(Request.id == request_id, or_(unsealed, literal(count > 0, Boolean)), Request.status.not_in(UNENDED))
        .values(status=RequestStatus.OPEN, finished_at=None),
    )
    return count


def _end_clips(session: Session, request_id: str) -> int:
    # Shards first: an engine that writes at this moment is waited for, one that comes later sees the cancelled shard.
    theirs = select(Shard.id).where(
        Shard.request_id == request_id, Shard.status.in_((ShardStatus.QUEUED, ShardStatus.LEASED))
    )
    shard_ids = list(session.scalars(theirs.order_by(Shard.id).with_for_update(key_share=True)))
    change(
        session,
        update(Attempt)
        .where(Attempt.clip_id == Clip.id, Clip.request_id == request_id, Clip.status == ClipStatus.RUNNING)
        .where(Attempt.status == AttemptStatus.RUNNING)
        .values(status=AttemptStatus.CANCELLED, finished_at=func.statement_timestamp()),
    )
    cancelled = (
        update(Clip)
        .where(Clip.request_id == request_id, Clip.status.in_(ACTIVE))
        .values(status=ClipStatus.CANCELLED, finished_at=func.statement_timestamp(), **NO_RESUME_STATE)
    )
    count = change(session, cancelled)
    if shard_ids:
        end_leases(session, shard_ids, ShardStatus.CANCELLED)
    return count


def lock_request(session: Session, request_id: str) -> Row[Any]:
    """The request's row, ours until the transaction ends: what concerns all clips of a request happens in turn."""
    row = session.execute(
        select(Request.id, Request.status, Request.total, Request.priority, Request.flow_run_id, Request.model_digest)
        .add_columns(Request.tenant)
        .where(Request.id == request_id)
        .with_for_update(key_share=True)
    ).one_or_none()
    if row is None:
        raise _not_found(request_id)
    return row


def _not_found(request_id: str) -> RequestNotFound:
    return RequestNotFound(f"no request {request_id!r} in the ledger: `rushes requests` lists those there are")
