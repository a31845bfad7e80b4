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

from db.requests import RequestNotFound, RequestRow, request_by
from db.roles import make_reader
from db.session import connect, sessions, upgrade
from flows.clients.retry import OUTAGE_SECONDS, never, with_retry
from flows.settings import Settings

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ledger:
    """The ledger, patient: what is read or written is begun again from its start while the ledger is away.

    A ledger that vanishes while it commits may have done so or not, so `work` must be of a kind that may be done twice.
    """

    sessions: sessionmaker[Session]
    seconds: float = OUTAGE_SECONDS  # for which it is waited for
    abandoned: Callable[[], bool] = never  # nobody wants the answer any more

    def read(self, work: Callable[[Session], T]) -> T:
        """What `work` finds, in a transaction that changes nothing. Raises what it raised last."""

        def once() -> T:
            with self.sessions() as session:
                return work(session)

        return with_retry(once, seconds=self.seconds, abandoned=self.abandoned)

    def write(self, work: Callable[[Session], T]) -> T:
        """What `work` returns, as one transaction. Raises what it raised last."""

        def once() -> T:
            with self.sessions.begin() as session:
                return work(session)

        return with_retry(once, seconds=self.seconds, abandoned=self.abandoned)

    def within(self, seconds: float) -> Ledger:
        """The same ledger, waited for no longer than this."""
        return replace(self, seconds=seconds)

    def until(self, abandoned: Callable[[], bool]) -> Ledger:
        """The same ledger, waited for until the answer is `abandoned`."""
        return replace(self, seconds=math.inf, abandoned=abandoned)


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
