"""Visits to the ledger: long ones that outlive its outages, and short ones from the command line.

Importing this loads neither Prefect nor torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

from db.roles import make_reader
from db.session import connect, sessions, upgrade
from flows.clients.retry import OUTAGE_SECONDS, never, with_retry
from flows.settings import Settings

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ledger:
    """Transactions that are begun again from their start while the ledger is away.

    A ledger that vanishes while it commits may have done so or not, so all work must be safe to repeat.
    """

    sessions: sessionmaker[Session]
    seconds: float = OUTAGE_SECONDS  # of waiting for a ledger that is away
    abandoned: Callable[[], bool] = never  # true once the answer is of no use any more

    def read(self, work: Callable[[Session], T]) -> T:
        """Run `work` in a transaction that is never committed; returns its result, raises its last error."""

        def once() -> T:
            with self.sessions() as session:
                return work(session)

        return with_retry(once, seconds=self.seconds, abandoned=self.abandoned)

    def write(self, work: Callable[[Session], T]) -> T:
        """Run `work` in one transaction and commit; returns its result, raises its last error."""

        def once() -> T:
            with self.sessions.begin() as session:
                return work(session)

        return with_retry(once, seconds=self.seconds, abandoned=self.abandoned)

    def within(self, seconds: float) -> Ledger:
        """A copy that waits for the ledger for at most so many seconds."""
        return replace(self, seconds=seconds)

    def until(self, abandoned: Callable[[], bool]) -> Ledger:
        """A copy that waits for the ledger until `abandoned` says that the answer is of no use any more."""
        return replace(self, seconds=math.inf, abandoned=abandoned)


def prepare_ledger(url: str, reader_url: str) -> None:
    """Migrate the ledger at `url` to this version, and create the login of `reader_url`, which may only read it."""
    upgrade(url)
    make_reader(url, reader_url)


@contextmanager
def database(settings: Settings, *, url: str | None = None, **how: Any) -> Generator[Engine]:
    """Connect to the ledger's database with the options of `connect`; disconnects at the end. Raises NotRunning.

    By our own login the schema is looked at, WrongSchema raised, and the address read again at every connection.
    url: another login than ours.
    """
    own: dict[str, Any] = {} if url else {"check": True, "again": settings.database_now}
    engine = connect(url or settings.database, **own, **how)
    try:
        yield engine
    finally:
        engine.dispose()


@contextmanager
def ledger(settings: Settings, **how: Any) -> Generator[sessionmaker[Session]]:
    """Connect to the ledger with the options of `connect`, for several transactions. Raises NotRunning."""
    with database(settings, **how) as engine:
        yield sessions(engine)


@contextmanager
def reading(settings: Settings) -> Generator[Session]:
    """Open one session, for reading only. Raises NotRunning."""
    with ledger(settings) as open_session, open_session() as session:
        yield session
