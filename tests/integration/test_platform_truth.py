"""What is true in the ledger is not overruled from outside: wrong opinions of engines and of their runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
from sqlalchemy import text

import db.engines
from db.claim import claim_shard
from db.engines import close_engine, register_engine
from db.leases import expire_owner
from flows.generate.outcome import Ending
from flows.generate.watch import Room, unbounded
from tests.platform import Platform, wait_for

LONG = "a red ball moves left"


@dataclass
class SaysAllAreDead:
    """A pool whose Prefect calls every engine ended, as it does after it was away itself."""

    asked: int = 0

    def ensure(
        self, request_id: str, *, model: str, model_digest: str, gpus: int | None, room: Room = unbounded
    ) -> str | None:
        return None

    def dead_owners(self, owners: Iterable[str]) -> list[str]:
        dead = list(owners)
        self.asked += len(dead)
        return dead


def test_an_engine_that_is_called_dead_and_beats_keeps_its_leases(platform: Platform) -> None:
    platform.script.held[LONG] = 2
    pool = SaysAllAreDead()
    run = platform.submit([LONG, "a blue cube"], pool=pool)
    request = platform.request_of(run)
    with platform.engines():
        wait_for(lambda: pool.asked >= 12, "twelve rounds that call it dead")
        platform.script.held.clear()
        assert run.outcome().ending is Ending.COMPLETED
    assert [each["ended"] for each in platform.attempts(request)] == ["done"] * 2
    assert platform.sql("select sum(lost_attempts) as lost from clips") == [{"lost": 0}]
    assert platform.breaches() == []


@pytest.mark.parametrize("silence", ["heartbeat_at = now() - interval '4 seconds'", "closed_at = now()"])
def test_an_engine_that_is_called_dead_and_is_silent_loses_its_leases(
    platform: Platform, silence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before they run out. One that beats loses none."""
    monkeypatch.setattr(db.engines, "QUIET", 3.0)
    wait_for(lambda: platform.sql("select where now() - pg_postmaster_start_time() > interval '4 seconds'"), "4 s")
    run = platform.submit([LONG])
    platform.request_of(run)
    wait_for(lambda: platform.sql("select id from shards"), "the plan")
    with platform.sessions.begin() as session:
        engine = {"host": "h", "pid": 1, "device": "cpu", "partition": "tp=2", "code_version": "1"}
        digest = platform.sql("select model_digest from requests")[0]["model_digest"]
        register_engine(session, "h/1", model_digest=digest, **engine)
        assert claim_shard(session, "h/1", seconds=3600, model_digest=digest, partition="tp=2")
        assert expire_owner(session, "h/1") == 0
        session.execute(text(f"update engines set {silence}"))
        assert expire_owner(session, "h/1") == 1
    with platform.engines():
        assert run.outcome().ending is Ending.COMPLETED


def test_an_engine_that_lost_its_lease_and_is_replaced_leaves_in_order(platform: Platform) -> None:
    """It claims nothing again, so that no clip is charged for more than what it lost."""
    platform.script.held[LONG] = 2
    run = platform.submit([LONG])
    request = platform.request_of(run)
    asked: list[bool] = []

    def replaced() -> bool:
        asked.append(True)
        return True

    first = platform.threads.submit(platform.engine, replaced=replaced)
    (shard,) = wait_for(lambda: platform.sql("select * from shards where status = 'leased'"), "a lease")
    wait_for(lambda: platform.script.steps[LONG] == 2, "the clip to be under way")
    with platform.sessions.begin() as session:  # as it was found silent, and dead
        close_engine(session, shard["owner"])
        assert expire_owner(session, shard["owner"]) == 1
    first.result(60)
    assert asked == [True]
    platform.script.held.clear()
    with platform.engines():
        assert run.outcome().ending is Ending.COMPLETED
    assert [each["ended"] for each in platform.attempts(request)] == ["lost", "done"]
    assert platform.sql("select count(*) as n from engines where closed_at is null") == [{"n": 0}]
    assert platform.breaches() == []
