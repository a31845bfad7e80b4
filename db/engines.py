"""Engines as the ledger hears of them: registration, heartbeats, and which have fallen silent."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from sqlalchemy import func, select, true, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from db.session import change
from db.tables import Engine

ALIVE = 45.0  # seconds since its last sign of life after which an engine counts as gone
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
    }
    change(session, upsert(Engine).values(values).on_conflict_do_update(index_elements=[Engine.id], set_=values))


def engine_heartbeat(session: Session, owner: str) -> None:
    """The engine lives: also one that was closed since it was silent for long, and has come back."""
    alive = {"heartbeat_at": func.statement_timestamp(), "closed_at": None}
    change(session, update(Engine).where(Engine.id == owner).values(alive))


def close_engine(session: Session, owner: str) -> None:
    """The engine has left in order. Its leases are its own to release (or end them with leases.expire_owner)."""
    change(
        session,
        update(Engine)
        .where(Engine.id == owner, Engine.closed_at.is_(None))
        .values(closed_at=func.statement_timestamp()),
    )


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
