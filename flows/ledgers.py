"""Short visits to the ledger from the command line. Importing this loads neither Prefect nor torch."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

from db.ledger import RequestNotFound, RequestRow, request_by
from db.session import IDLE, connect, sessions
from flows.settings import Settings


@contextmanager
def database(
    settings: Settings, *, application: str = "rushes", idle: float = IDLE, url: str | None = None
) -> Generator[Engine]:
    """The ledger's database, closed at the end; with `url` through another login than ours. Raises NotRunning."""
    engine = connect(url or settings.database, application=application, idle=idle)
    try:
        yield engine
    finally:
        engine.dispose()


@contextmanager
def ledger(settings: Settings, *, application: str = "rushes", idle: float = IDLE) -> Generator[sessionmaker[Session]]:
    """Sessions on the ledger, for several transactions; `idle` as `connect` has it. Raises NotRunning."""
    with database(settings, application=application, idle=idle) as engine:
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
