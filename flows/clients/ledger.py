"""Short visits to the ledger from the command line. Importing this loads neither Prefect nor torch."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

from db.requests import RequestNotFound, RequestRow, request_by
from db.roles import make_reader
from db.session import connect, sessions, upgrade
from flows.settings import Settings


def settle(url: str, reader_url: str) -> None:
    """The ledger at `url` as this version wants it, and the login of `reader_url`, which may look at it."""
    upgrade(url)
    make_reader(url, reader_url)


@contextmanager
def database(settings: Settings, *, url: str | None = None, **how: Any) -> Generator[Engine]:
    """The ledger's database, connected to as `connect` has it, closed at the end. Raises NotRunning.

    url: another login than ours.
    """
    engine = connect(url or settings.database, **how)
    try:
        yield engine
    finally:
        engine.dispose()


@contextmanager
def ledger(settings: Settings, **how: Any) -> Generator[sessionmaker[Session]]:
    """Sessions on the ledger, for several transactions, connected to as `connect` has it. Raises NotRunning."""
    with database(settings, **how) as engine:
        yield sessions(engine)


@contextmanager
def reading(settings: Settings) -> Generator[Session]:
    """One session, for looking only. Raises NotRunning."""
    with ledger(settings) as open_session, open_session() as session:
        yield session


def the_request(session: Session, name: str) -> RequestRow:
    """The request of this id, name or flow run. Raises RequestNotFound."""
    row = request_by(session, name)
    if row is None:
        raise RequestNotFound(f"no request {name!r} in the ledger: `rushes history` lists those there are")
    return row
