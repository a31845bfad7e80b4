"""A worker's watchdog beside real processes: the one that is stopped is ended, the one that lives is left."""

from __future__ import annotations

import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack

import psutil
import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

from db.claim import claim_shard
from db.engines import register_engine
from flows.render import watchdog
from flows.render.watchdog import Watchdog, look_once
from infra.stack.worker import RUN
from tests.factories import batch

ENGINE = """
import time
print("here", flush=True)
while True:
    sum(range(10**5))
    time.sleep(0.01)
"""


@pytest.fixture
def engines() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Two processes that execute a flow run each, and work a little."""
    with ExitStack() as stack:
        running: dict[str, subprocess.Popen[str]] = {}
        for _ in range(2):
            run = str(uuid.uuid4())
            command = [sys.executable, "-c", ENGINE]
            running[run] = stack.enter_context(
                subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={RUN: run})
            )
            stack.callback(running[run].kill)
        for process in running.values():
            assert process.stdout is not None and process.stdout.readline() == "here\n"
        yield running


def test_an_engine_that_is_stopped_is_ended_and_its_lease_given_back(
    ledger: sessionmaker[Session], engines: dict[str, subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "HUNG", 0.5)
    (hung, stopped), (alive, living) = engines.items()
    with ledger.begin() as session:
        for run in engines:
            register_engine(
                session, f"h/{run}", host="h", pid=engines[run].pid, device="cpu", partition="cfg1xsp1xtp2",
                model_digest="m", code_version="1", flow_run_id=run,
            )  # fmt: skip
        batch(session, "batch", 2, model_digest="m")
        assert claim_shard(session, f"h/{hung}", seconds=3600, model_digest="m")
        assert claim_shard(session, f"h/{alive}", seconds=3600, model_digest="m")
        session.execute(text("update engines set heartbeat_at = now() - interval '20 seconds'"))
    psutil.Process(stopped.pid).suspend()
    dog, until = Watchdog[psutil.Process](), time.monotonic() + 60
    while stopped.poll() is None and time.monotonic() < until:
        look_once(dog, ledger, psutil.Process().pid)
        time.sleep(0.1)
    assert stopped.poll() is not None, "it was left alone"
    for _ in range(10):
        look_once(dog, ledger, psutil.Process().pid)
        time.sleep(0.1)
    assert living.poll() is None, "it was working"
    with ledger() as session:
        left = session.execute(text("select owner, status::text from shards order by owner nulls first")).all()
        assert left == [(None, "queued"), (f"h/{alive}", "leased")]
        said = session.scalars(text("select error from engines where closed_at is not null")).all()
        assert len(said) == 1 and "it hung on h" in said[0]


def test_nobody_hangs_while_the_ledger_cannot_be_asked(
    engines: dict[str, subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "HUNG", 0.1)
    for process in engines.values():
        psutil.Process(process.pid).suspend()

    def away() -> Session:
        raise ConnectionError("no ledger")

    dog = Watchdog[psutil.Process]()
    for _ in range(5):
        look_once(dog, away, psutil.Process().pid)  # pyright: ignore[reportArgumentType]
        time.sleep(0.1)
    assert all(process.poll() is None for process in engines.values())
