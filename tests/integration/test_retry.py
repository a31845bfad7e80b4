"""The ledger goes away, or one of those who write to it stalls: what is waited for, and for how long."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import httpx
import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from db.session import connect, sessions, upgrade
from flows.clients.ledger import Ledger
from flows.clients.retry import best_effort, unavailable_service, with_retry
from infra.stack.postgres import start_postgres, stop_postgres
from infra.store.contract import StoreUnavailable
from infra.store.folder import FolderStore

COUNT = "select count(*) from tenants"


def test_a_transaction_is_begun_again_when_the_ledger_comes_back(tmp_path: Path) -> None:
    """It is killed between two statements, and started again a moment later: what was done is done once."""
    folder = tmp_path / "postgres"
    server = start_postgres(folder, settings={"shared_buffers": "16MB"})
    engine = None
    try:
        upgrade(server.url)
        engine = connect(server.url)
        ledgers, tries = sessions(engine), list[float]()

        def work(session: object) -> int:
            tries.append(time.monotonic())
            session.execute(text("insert into tenants (name) values ('a')"))  # pyright: ignore
            if len(tries) == 1:
                stop_postgres(folder)
                threading.Timer(2.0, start_postgres, [folder], {"port": server.port}).start()
            return session.scalar(text(COUNT))  # pyright: ignore

        assert Ledger(ledgers, seconds=60).write(work) == 1
        assert len(tries) >= 2 and tries[-1] - tries[0] >= 1.5
        with ledgers() as session:
            assert session.scalar(text(COUNT)) == 1
    finally:
        if engine is not None:
            engine.dispose()
        stop_postgres(folder)


def test_an_error_of_the_statement_is_raised_at_once(database_url: str) -> None:
    engine = connect(database_url)
    tries: list[int] = []

    def work(session: object) -> None:
        tries.append(1)
        session.execute(text("select 1 / 0"))  # pyright: ignore

    with pytest.raises(DBAPIError, match="division by zero"):
        Ledger(sessions(engine), seconds=60).write(work)
    assert len(tries) == 1
    engine.dispose()


def test_who_stalls_in_a_transaction_loses_its_locks(database_url: str) -> None:
    """As an engine does that is stopped between two statements: maintenance and other engines must get past it."""
    stalled, other = connect(database_url, idle=1.0), connect(database_url)
    with stalled.connect() as one, other.begin() as two:
        one.execute(text("insert into tenants (name) values ('held')"))
        two.execute(text("set local lock_timeout = '300s'"))
        two.execute(text("insert into tenants (name) values ('held')"))  # waits for the other's outcome
        with pytest.raises(DBAPIError) as caught:
            one.execute(text(COUNT))
        assert unavailable_service(caught.value) == "the ledger", (
            "it may try again, and will find that its lease is lost"
        )
    stalled.dispose()
    other.dispose()


def test_patience_ends(tmp_path: Path) -> None:
    asked: list[float] = []

    def ask() -> None:
        asked.append(time.monotonic())
        raise StoreUnavailable("gone")

    with pytest.raises(StoreUnavailable):
        with_retry(ask, seconds=1.0)
    assert len(asked) >= 2
    asked.clear()
    with pytest.raises(StoreUnavailable):
        with_retry(ask, abandoned=lambda: True)
    assert len(asked) == 1


def test_what_can_wait_is_left_and_what_is_wrong_is_raised() -> None:
    def broken() -> None:
        raise KeyError("a mistake of ours")

    def refused() -> None:
        httpx.get("http://127.0.0.1:9/api", timeout=5, trust_env=False)

    assert best_effort(lambda: None)
    assert not best_effort(refused)
    with pytest.raises(KeyError):
        best_effort(broken)


@pytest.mark.parametrize("error", [KeyError("a"), ValueError("b"), OSError(2, "no such file"), psycopg.Error("c")])
def test_other_errors_are_nobodys_absence(error: Exception) -> None:
    assert unavailable_service(error) is None


def test_a_full_disk_is_nobodys_fault(tmp_path: Path) -> None:
    assert unavailable_service(OSError(28, "No space left on device")) == "the disk"
    store = FolderStore(tmp_path / "store")
    (tmp_path / "store" / ".incoming").rmdir()
    with pytest.raises(StoreUnavailable) as caught:
        store.put(b"pixels")
    assert unavailable_service(caught.value) == "the store"
