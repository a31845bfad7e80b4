"""Engines as the ledger hears of them: registration, heartbeats, and which have fallen silent."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import func, or_, select, true, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session, aliased

from db.session import change
from db.tables import Engine

ALIVE = 45.0  # seconds since its last sign of life after which an engine counts as gone
FORGET = 3600.0  # seconds after which a failed start says nothing any more
_ERROR_CHARACTERS = 2000
QUIET = 15.0  # the same for one that Prefect calls ended: three heartbeats. It may have been away itself, and be wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRow:
    id: str
    host: str
    pid: int
    device: str
    partition: str
    model_digest: str
    code_version: str
    flow_run_id: str | None
    started_at: datetime
    heartbeat_at: datetime
    closed_at: datetime | None
    ready_at: datetime | None


def register_engine(
    session: Session,
    owner: str,
    *,
    host: str,
    pid: int,
    device: str,
    partition: str,
    model_digest: str,
    code_version: str,
    flow_run_id: str | None = None,
) -> None:
    """Note an engine that is about to lease shards as `owner`."""
    values = {
        "id": owner,
        "host": host,
        "pid": pid,
        "device": device,
        "partition": partition,
        "model_digest": model_digest,
        "code_version": code_version,
        "flow_run_id": flow_run_id,
        "started_at": func.statement_timestamp(),
        "heartbeat_at": func.statement_timestamp(),
        "closed_at": None,
        "ready_at": None,
        "error": None,
    }
    change(session, upsert(Engine).values(values).on_conflict_do_update(index_elements=[Engine.id], set_=values))


def engine_heartbeat(session: Session, owner: str) -> None:
    """The engine lives: also one that was closed since it was silent for long, and has come back."""
    alive = {"heartbeat_at": func.statement_timestamp(), "closed_at": None}
    change(session, update(Engine).where(Engine.id == owner).values(alive))


def engine_ready(session: Session, owner: str) -> None:
    """The engine has loaded its model: it can start."""
    change(session, update(Engine).where(Engine.id == owner).values(ready_at=func.statement_timestamp()))


def close_engine(session: Session, owner: str, error: str | None = None, *, useless: bool = False) -> None:
    """The engine has left: in order, or for an error. Its leases are its own to release (or `leases.expire_owner`).

    useless: it ended by that error without one finished clip, which is no better than one that could not start.
    """
    left = {"closed_at": func.statement_timestamp(), "error": _cut(error)} | ({"ready_at": None} if useless else {})
    change(session, update(Engine).where(Engine.id == owner, Engine.closed_at.is_(None)).values(left))


def note_failed_start(
    session: Session,
    flow_run_id: str,
    error: str,
    *,
    model_digest: str,
    partition: str,
    host: str,
    began: float,
    ended: float,
) -> None:
    """Note an engine whose run ended before the ledger had heard of it, or while it loaded, without a word from it.

    began, ended: of its run, in seconds before now. One that got ready, gives signs of life or has left itself is left
    as it is.
    """
    since, until = (func.statement_timestamp() - ago * timedelta(seconds=1) for ago in (began, ended))
    known = select(Engine.id).where(Engine.flow_run_id == flow_run_id)
    if session.scalar(known) is None:
        values = {"id": f"{host}/{flow_run_id}", "host": host, "pid": 0, "device": "", "code_version": ""}
        values |= {"partition": partition, "model_digest": model_digest, "flow_run_id": flow_run_id}
        values |= {"started_at": since, "heartbeat_at": until, "closed_at": until, "error": _cut(error)}
        change(session, upsert(Engine).values(values).on_conflict_do_nothing())
        return
    silent = func.least(_silent_for(), _server_age()) > QUIET
    there = update(Engine).where(Engine.flow_run_id == flow_run_id, Engine.closed_at.is_(None), silent)
    change(session, there.where(Engine.ready_at.is_(None)).values(closed_at=Engine.heartbeat_at, error=_cut(error)))


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedStart:
    """An engine of Prefect's that could not start, or failed without one clip; times in seconds before now."""

    id: str
    host: str
    model_digest: str
    partition: str  # "": it ended before that was known
    error: str
    began: float
    ended: float


def failed_starts(session: Session, model_digest: Any = None, partition: str | None = None) -> list[FailedStart]:
    """Starts that failed since the last engine of the same model and partition got ready, oldest first.

    model_digest, partition: None: of all. Those of FORGET seconds ago and before are forgotten.
    """
    good = aliased(Engine)
    same = (good.model_digest == Engine.model_digest) & (Engine.partition.in_(("", good.partition)))
    last_ready = select(func.max(good.ready_at)).where(same).correlate(Engine).scalar_subquery()
    ended = func.coalesce(Engine.closed_at, Engine.heartbeat_at)
    silent = Engine.closed_at.is_(None) & (func.least(_silent_for(), _server_age()) > ALIVE)
    found = (
        select(
            Engine,
            func.extract("epoch", func.statement_timestamp() - Engine.started_at).label("began"),
            func.extract("epoch", func.statement_timestamp() - ended).label("ended"),
        )
        .where(Engine.ready_at.is_(None), Engine.flow_run_id.is_not(None))
        .where(or_(silent, Engine.closed_at.is_not(None) & Engine.error.is_not(None)))
        .where(ended > func.statement_timestamp() - timedelta(seconds=FORGET))
        .where(ended > func.coalesce(last_ready, func.to_timestamp(0)))
        .order_by(ended, Engine.id)
    )
    if model_digest is not None:
        found = found.where(Engine.model_digest == model_digest)
    if partition is not None:
        found = found.where(Engine.partition.in_(("", partition)))
    return [
        FailedStart(
            id=engine.id,
            host=engine.host,
            model_digest=engine.model_digest,
            partition=engine.partition,
            error=engine.error or f"it gave no sign of life for {ALIVE:.0f} s while it loaded its model",
            began=float(began),
            ended=float(end),
        )
        for engine, began, end in session.execute(found, execution_options={"populate_existing": True})
    ]


def _cut(error: str | None) -> str | None:
    """An error as a row holds it."""
    return error and error.replace("\0", "")[:_ERROR_CHARACTERS]


def live_engines(session: Session, within_seconds: float, *, model_digest: str | None = None) -> list[EngineRow]:
    """Engines that have not left and gave a sign of life within the last seconds."""
    return _engines(session, _silent_for() <= within_seconds, model_digest)


def beats(session: Session, owner: str) -> bool:
    """True when the engine has not left, and gave a sign of life in the last QUIET seconds or could give none.

    While the server was down nobody could give one, so silence counts from its start at the earliest.
    """
    quiet = func.least(_silent_for(), _server_age()) > QUIET
    there = select(Engine.id).where(Engine.id == owner, Engine.closed_at.is_(None), ~quiet)
    return session.scalar(there) is not None


def open_engines(session: Session) -> list[EngineRow]:
    """Engines that have not left, whether they give signs of life or not."""
    return _engines(session, true(), None)


def server_age(session: Session) -> float:
    """Seconds since the ledger's server started: for longer than that it has heard of nobody."""
    return float(session.scalar(select(_server_age())) or 0.0)


def silent_engines(session: Session, for_seconds: float) -> list[EngineRow]:
    """Engines that have not left, but gave no sign of life for so long: for maintenance to end.

    While the server was down nobody could give one, so silence counts from its start at the earliest.
    """
    return _engines(session, func.least(_silent_for(), _server_age()) > for_seconds, None)


def closed_engines(session: Session, within_seconds: float) -> list[EngineRow]:
    """Engines that have left in the last seconds, or were closed as they were silent."""
    ago = func.extract("epoch", func.statement_timestamp() - Engine.closed_at)
    return _engines(session, ago <= within_seconds, None, left=True)


def _server_age() -> Any:
    return func.extract("epoch", func.statement_timestamp() - func.pg_postmaster_start_time())


def _silent_for() -> Any:
    return func.extract("epoch", func.statement_timestamp() - Engine.heartbeat_at)


def _engines(session: Session, which: Any, model_digest: str | None, *, left: bool = False) -> list[EngineRow]:
    there = Engine.closed_at.is_not(None) if left else Engine.closed_at.is_(None)
    found = select(Engine).where(there, which).order_by(Engine.started_at, Engine.id)
    if model_digest is not None:
        found = found.where(Engine.model_digest == model_digest)
    engines = session.scalars(found, execution_options={"populate_existing": True})
    return [EngineRow(**{f.name: getattr(engine, f.name) for f in fields(EngineRow)}) for engine in engines]
