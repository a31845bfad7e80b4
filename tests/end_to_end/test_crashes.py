"""kill -9 in the middle of a batch: nothing is lost, nothing is rendered twice, and nobody has to do anything."""

from __future__ import annotations

import hashlib
import sqlite3
from contextlib import closing
from typing import Any

import pytest

from tests.end_to_end.stack import SLOW, House, wait_for

pytestmark = [pytest.mark.xdist_group("stack"), pytest.mark.timeout(900), pytest.mark.slow]

CLIPS = 4


def submit_batch(house: House) -> tuple[str, str]:
    """(flow run, request) of a batch that takes long enough to be killed in; one of its clips is done by now."""
    lines = [f"a red ball moves left slow {k}" for k in range(CLIPS)]
    run = house.submit(request=house.request(lines, steps=SLOW, seed=house.seed()))
    request = house.request_of(run)
    wait_for(lambda: "done" in house.statuses(request), "the first clip")
    assert {"queued", "running"} & set(house.statuses(request)), "the batch is too small to be killed in"
    return run, request


def done_attempts(house: House, request: str) -> dict[str, dict[str, Any]]:
    """The attempt that made each clip that is done."""
    done = [attempt for attempt in house.attempts(request) if attempt["status"] == "done"]
    assert len({attempt["clip_id"] for attempt in done}) == len(done), "a clip was made twice"
    return {attempt["clip_id"]: attempt for attempt in done}


def unfinished(house: House, request: str) -> list[dict[str, Any]]:
    return [attempt for attempt in house.attempts(request) if attempt["status"] != "done"]


def assert_complete(house: House, request: str, before: dict[str, dict[str, Any]]) -> None:
    """Every clip is there once. `before` are the attempts of the clips that were done before the kill."""
    assert house.status_of(request) == "completed"
    clips = house.clips(request)
    assert [clip["status"] for clip in clips] == ["done"] * CLIPS
    after = done_attempts(house, request)
    assert set(after) == {clip["clip_id"] for clip in clips}
    assert {clip_id: after[clip_id] for clip_id in before} == before
    tried = [attempt["clip_id"] for attempt in house.attempts(request)]
    assert all(tried.count(clip_id) == 1 for clip_id in before), "a clip that was done was tried again"
    assert len(tried) <= CLIPS + 2, "only what was under way was begun again: one clip on the ranks, one being stored"
    takes = house.sql("select * from takes where recipe = any(%s)", [clip["recipe"] for clip in clips])
    assert {take["recipe"]: take["sha256"] for take in takes} == {clip["recipe"]: clip["sha256"] for clip in clips}
    for clip in clips:
        assert hashlib.sha256(house.blob(clip["object_key"]).read_bytes()).hexdigest() == clip["sha256"]


def test_an_engine_is_killed(house: House) -> None:
    """Its ranks end themselves, its lease is given back, and the request starts another engine."""
    run, request = submit_batch(house)
    engine, ranks = house.engine_run(), house.ranks()
    before = done_attempts(house, request)
    house.kill(house.processes_of(engine))
    wait_for(lambda: not any(rank.is_running() for rank in ranks), "the ranks to follow their engine")
    house.ended(run)
    house.ended(engine, state="Crashed")
    assert_complete(house, request, before)
    assert {attempt["status"] for attempt in unfinished(house, request)} == {"lost"}
    assert house.engines(request) - {engine}, "another engine went on"


def test_the_flow_that_watches_is_killed(house: House) -> None:
    """The engine goes on; `tidy` sees that the request's run has ended without it, and starts another.

    Also where one that was started in its place has ended as well, before it came to the ledger.
    """
    run, request = submit_batch(house)
    before = done_attempts(house, request)
    house.kill(house.processes_of(run))
    house.ended(run, state="Crashed")
    assert house.status_of(request) == "open"
    crashed = {"idempotency_key": f"taken-up-{run}", "parameters": house.run(run)["parameters"]}
    second = house.created("generate/default", **crashed, state={"type": "CRASHED"})
    assert house.run(second)["state_type"] == "CRASHED"
    house.rushes("up")  # has `tidy` look at once
    wait_for(lambda: house.status_of(request) == "completed", "another run to take the request up")
    (row,) = house.sql("select flow_run_id from requests where id = %s", request)
    assert row["flow_run_id"] not in (run, second)
    house.ended(row["flow_run_id"])
    attempts = house.attempts(request)
    assert len(attempts) == CLIPS, "the engine did not notice"
    assert before.items() <= done_attempts(house, request).items()


def test_runs_that_a_worker_took_and_never_began(house: House) -> None:
    """They died with it before they could say anything: they keep no place in the pool, and no request is lost."""
    house.kill(house.of_pool("gpu"))
    pending = {"type": "PENDING"}  # as they are before their processes say anything
    engine = house.created("render/engine", parameters={"model": str(house.model)}, state=pending)
    wanted = house.request(["a red ball moves left"], seed=house.seed())
    first = house.created("generate/default", parameters={"request": wanted}, state=pending)
    an_hour_ago(house, engine, first)
    house.rushes("up")
    house.ended(house.submit("tidy/scheduled"))
    house.ended(first, state="Crashed")
    second = wait_for(lambda: house.runs(idempotency_key=f"taken-up-{first}"), "another run in its place")
    (clip,) = house.clips(house.request_of(second[0]["id"]))
    house.ended(second[0]["id"])
    house.ended(engine, state="Crashed")
    assert house.statuses(clip["request_id"]) == ["done"]
    house.ended(house.submit("tidy/scheduled"))
    house.rushes("audit")
    assert not house.runs(idempotency_key=f"taken-up-{second[0]['id']}")


def an_hour_ago(house: House, *runs: str) -> None:
    """They came into their state an hour before."""
    with closing(sqlite3.connect(house.home / "prefect" / "prefect.db", timeout=60)) as database:
        for run in runs:
            changed = database.execute(
                "update flow_run_state set timestamp = strftime('%Y-%m-%d %H:%M:%f000', timestamp, '-1 hour')"
                " where flow_run_id = ?",
                [run],
            )
            assert changed.rowcount == 1
        database.commit()
