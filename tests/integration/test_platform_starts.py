"""Engines that cannot start: the request goes on trying with pauses, says why, and is made once one can."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from prefect.client.schemas.objects import FlowRun, State, StateType
from sqlalchemy import text

from db.engines import close_engine, engine_ready, failed_starts, register_engine
from flows.generate.outcome import Ending
from flows.generate.watch import Room, unbounded
from flows.operate import checks
from flows.plan import starts
from flows.render.engine import EngineTotals
from flows.render.pool import tell_of_failed
from model.engine.clip import StartFailed
from tests.fake_renderer import Fault
from tests.platform import Platform, wait_for

BALL = "a red ball moves left"
ENGINE: dict[str, Any] = {
    "host": "h",
    "pid": 1,
    "device": "cpu",
    "partition": "cfg1xsp1xtp2",
    "model_digest": "m",
    "code_version": "1",
}


@dataclass
class OneAtATime:
    """A pool of one engine, in a thread of this process, which Prefect might have started."""

    platform: Platform
    started: list[Future[EngineTotals]] = field(default_factory=list[Future[EngineTotals]])

    def ensure(
        self, request_id: str, *, model: str, model_digest: str, gpus: int | None, room: Room = unbounded
    ) -> str | None:
        if all(each.done() for each in self.started) and room("") != 0:
            run = str(uuid.uuid4())
            self.started.append(self.platform.threads.submit(self.platform.engine, flow_run_id=run, linger=0.3))
        return None

    def dead_owners(self, owners: Iterable[str]) -> list[str]:
        return []


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starts, "FIRST", 0.2)
    monkeypatch.setattr(starts, "MOST", 0.8)


def test_an_engine_that_cannot_start_is_tried_with_pauses_and_the_page_says_why(platform: Platform) -> None:
    platform.script.bad_starts = 3
    pool = OneAtATime(platform)
    run = platform.submit([BALL], pool=pool)
    assert run.outcome().ending is Ending.COMPLETED
    failures = [each.exception() for each in pool.started]
    assert [type(each) for each in failures] == [StartFailed] * 3 + [type(None)]
    ends = [
        row["closed_at"] for row in platform.sql("select * from engines where error is not null order by started_at")
    ]
    begins = [row["started_at"] for row in platform.sql("select started_at from engines order by started_at")]
    for ended, began, least in zip(ends, begins[1:], (0.2, 0.4, 0.8), strict=True):
        assert (began - ended).total_seconds() >= least
    warned = [line for line in run.page.warnings if "engines cannot start" in line]
    assert len(warned) == 3 and all("needs 2 GPUs" in line for line in warned)
    assert "engines cannot start" not in run.page.shown["0-status"], "it was the last word while it was so"
    with platform.sessions() as session:
        assert failed_starts(session) == []
    assert checks.engines(platform.settings) == "none failed to start"


def test_an_engine_that_fails_all_it_is_given_is_no_better_than_one_that_cannot_start(platform: Platform) -> None:
    """It got ready; but without one clip that says little."""
    platform.script.broken = Fault.DEVICE
    pool = OneAtATime(platform)
    run = platform.submit([BALL], pool=pool)
    wait_for(lambda: any("3 tries in a row" in line for line in run.page.warnings), "three tries")
    assert len(pool.started) <= 4
    with pytest.raises(
        RuntimeError, match=r"engines cannot start: \d tries in a row failed, the last on .*a plain one"
    ):
        checks.engines(platform.settings)
    assert "uncorrectable" in wait_for(
        lambda: shown if "Engines cannot start" in (shown := str(run.page.shown["0-status"])) else "", "the page"
    )
    platform.script.broken = None
    assert run.outcome().ending is Ending.COMPLETED
    assert platform.breaches() == []


def test_an_operator_s_engine_ends_the_pause(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starts, "FIRST", 3600.0)
    monkeypatch.setattr(starts, "MOST", 3600.0)
    platform.script.bad_starts = 1
    pool = OneAtATime(platform)
    run = platform.submit([BALL], pool=pool)
    wait_for(lambda: any("cannot start" in line for line in run.page.warnings), "the page to say it")
    assert len(pool.started) == 1
    platform.script.held[BALL] = 1
    with platform.engines():
        wait_for(lambda: len(pool.started) > 1, "another one to be started, since one can")
        platform.script.held.clear()
        assert run.outcome().ending is Ending.COMPLETED


def test_what_counts_as_a_failed_start(platform: Platform) -> None:
    """Of Prefect's engines, those with an error and no clip, and those that fell silent while they loaded."""

    def failed(partition: str | None = None) -> list[str]:
        with platform.sessions() as session:
            return [start.id for start in failed_starts(session, "m", partition)]

    with platform.sessions.begin() as session:
        for name in ("a", "stopped", "worked", "silent", "loading"):
            register_engine(session, name, flow_run_id=str(uuid.uuid4()), **ENGINE)
        register_engine(session, "by hand", **ENGINE)
        close_engine(session, "by hand", "no GPU", useless=True)
        close_engine(session, "a", "no GPU", useless=True)
        close_engine(session, "stopped")
        session.execute(text("update engines set heartbeat_at = now() - interval '50 seconds' where id = 'silent'"))
    old_server = platform.sql("select now() - pg_postmaster_start_time() > interval '46 seconds' as old")[0]["old"]
    assert failed() == (["silent"] if old_server else []) + ["a"]
    assert failed("cfg1xsp1xtp4") == [], "another partition's engines are others"
    with platform.sessions.begin() as session:
        engine_ready(session, "worked")
        close_engine(session, "worked", "a device failed after a thousand clips")
    assert failed() == [], "one that got ready and made clips ends them"
    with platform.sessions.begin() as session:
        register_engine(session, "again", flow_run_id=str(uuid.uuid4()), **ENGINE)
        engine_ready(session, "again")
        close_engine(session, "again", "its devices failed", useless=True)
    assert failed() == ["again"]


def flow_run(kind: StateType, ended: float, **parameters: Any) -> FlowRun:
    at = datetime.now(UTC) - timedelta(seconds=ended)
    state: State[object] = State(type=kind, timestamp=at, message="exited with code 1")  # pyright: ignore[reportArgumentType]
    return FlowRun(flow_id=uuid.uuid4(), state=state, state_type=kind, parameters=parameters)


def test_runs_that_ended_before_the_ledger_heard_of_them_are_told_to_it_once(platform: Platform) -> None:
    crashed, old = flow_run(StateType.CRASHED, 20, partition="cfg1xsp1xtp2"), flow_run(StateType.FAILED, 9000)
    stopped, living = flow_run(StateType.CANCELLED, 5), flow_run(StateType.CRASHED, 5)
    with platform.sessions.begin() as session:
        register_engine(session, "living", **{**ENGINE, "flow_run_id": str(living.id)})
        for _ in range(2):
            tell_of_failed(session, [crashed, old, stopped, living], datetime.now(UTC), "m")
    with platform.sessions() as session:
        (start,) = failed_starts(session)
    assert (start.host, start.error, start.partition) == ("unknown", "exited with code 1", "cfg1xsp1xtp2")
    assert 19 < start.ended < 120
    assert platform.sql("select closed_at from engines where id = 'living'") == [{"closed_at": None}]
