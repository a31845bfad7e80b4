"""kill -9 in the middle of a batch: nothing is lost, nothing is rendered twice, and nobody has to do anything."""

from __future__ import annotations

import hashlib
import uuid
from typing import Any

import psycopg
import pytest

from infra.stack.postgres import running_postgres
from tests.end_to_end.stack import LONG, SLOW, Stack, assert_as_if_undisturbed, wait_for

pytestmark = [pytest.mark.xdist_group("stack two"), pytest.mark.timeout(900), pytest.mark.slow]

CLIPS = 3
UNDER_WAY = "select id, resume_step as step from clips where request_id = %s and resume_step >= 10"


def submit_batch(stack: Stack, **settings: Any) -> tuple[str, str]:
    """(flow run, request) of a batch that takes long enough to be killed in; one of its clips is done by now."""
    lines = [f"a red ball moves left slow {k}" for k in range(CLIPS)]
    run = stack.submit(request=stack.request(lines, steps=SLOW, seed=stack.seed(), **settings))
    request = stack.request_of(run)
    wait_for(lambda: "done" in stack.statuses(request), "the first clip")
    assert {"queued", "running"} & set(stack.statuses(request)), "the batch is too small to be killed in"
    return run, request


def done_attempts(stack: Stack, request: str) -> dict[str, dict[str, Any]]:
    """The attempt that made each clip that is done."""
    done = [attempt for attempt in stack.attempts(request) if attempt["status"] == "done"]
    assert len({attempt["clip_id"] for attempt in done}) == len(done), "a clip was made twice"
    return {attempt["clip_id"]: attempt for attempt in done}


def unfinished(stack: Stack, request: str) -> list[dict[str, Any]]:
    return [attempt for attempt in stack.attempts(request) if attempt["status"] != "done"]


def assert_complete(stack: Stack, request: str, before: dict[str, dict[str, Any]]) -> None:
    """Every clip is there once. `before` are the attempts of the clips that were done before the kill."""
    assert stack.status_of(request) == "completed"
    clips = stack.clips(request)
    assert [clip["status"] for clip in clips] == ["done"] * CLIPS
    after = done_attempts(stack, request)
    assert set(after) == {clip["clip_id"] for clip in clips}
    assert {clip_id: after[clip_id] for clip_id in before} == before
    tried = [attempt["clip_id"] for attempt in stack.attempts(request)]
    assert all(tried.count(clip_id) == 1 for clip_id in before), "a clip that was done was tried again"
    assert len(tried) <= CLIPS + 2, "only what was under way was begun again: one clip on the ranks, one being stored"
    takes = stack.sql("select * from renders where recipe = any(%s)", [clip["recipe"] for clip in clips])
    assert {take["recipe"]: take["sha256"] for take in takes} == {clip["recipe"]: clip["sha256"] for clip in clips}
    for clip in clips:
        assert hashlib.sha256(stack.blob(clip["object_key"]).read_bytes()).hexdigest() == clip["sha256"]


def test_an_engine_is_killed(stack: Stack) -> None:
    """Its ranks end themselves, its lease is given back, and the request starts another engine.

    There the clip that was under way goes on from its last checkpoint, and comes to the bytes of an undisturbed one.
    """
    run, request = submit_batch(stack, **LONG)
    (kept,) = wait_for(lambda: stack.sql(UNDER_WAY, request), "a checkpoint in the middle")
    engine, ranks = stack.engine_run(), stack.ranks()
    before = done_attempts(stack, request)
    stack.kill(stack.processes_of(engine))
    wait_for(lambda: not any(rank.is_running() for rank in ranks), "the ranks to follow their engine")
    assert len(stack.checkpoints()) <= 2, "older ones are deleted"
    stack.ended(run)
    stack.ended(engine, state="Crashed")
    assert_complete(stack, request, before)
    assert {attempt["status"] for attempt in unfinished(stack, request)} == {"lost"}
    assert stack.engines(request) - {engine}, "another engine went on"

    (clip,) = [clip for clip in stack.clips(request) if clip["clip_id"] == kept["id"]]
    lost, done = [attempt for attempt in stack.attempts(request) if attempt["clip_id"] == kept["id"]]
    assert (lost["status"], lost["resumed_step"], done["status"]) == ("lost", None, "done")
    assert lost["owner"] != done["owner"]
    assert kept["step"] <= clip["resumed_step"] == done["resumed_step"] and clip["resumed_step"] % 10 == 0
    assert_as_if_undisturbed(stack, clip)


def test_the_flow_that_watches_is_killed(stack: Stack) -> None:
    """The engine goes on; `maintenance` sees that the request's run has ended without it, and starts another.

    Also where one that was started in its place has ended as well, before it came to the ledger.
    """
    run, request = submit_batch(stack)
    before = done_attempts(stack, request)
    stack.kill(stack.processes_of(run))
    stack.ended(run, state="Crashed")
    assert stack.status_of(request) == "open"
    crashed = {"idempotency_key": f"restart-of-{run}", "parameters": stack.run(run)["parameters"]}
    second = stack.created("generate/default", **crashed, state={"type": "CRASHED"})
    assert stack.run(second)["state_type"] == "CRASHED"
    stack.rushes("up")  # has `maintenance` look at once
    wait_for(lambda: stack.status_of(request) == "completed", "another run to take the request up")
    (row,) = stack.sql("select flow_run_id from requests where id = %s", request)
    assert row["flow_run_id"] not in (run, second)
    stack.ended(row["flow_run_id"])
    attempts = stack.attempts(request)
    assert len(attempts) == CLIPS, "the engine did not notice"
    assert before.items() <= done_attempts(stack, request).items()


@pytest.mark.chaos
def test_runs_that_a_worker_took_and_never_began(stack: Stack) -> None:
    """They died with it before they could say anything: they keep no place in the pool, and no request is lost."""
    stack.kill(stack.of_pool("gpu"))
    pending = {"type": "PENDING"}  # as they are before their processes say anything
    engine = stack.created("render/engine", parameters={"model": str(stack.model)}, state=pending)
    wanted = stack.request(["a red ball moves left"], seed=stack.seed())
    first = stack.created("generate/default", parameters={"request": wanted}, state=pending)
    an_hour_ago(stack, engine, first)
    stack.rushes("up")
    stack.ended(stack.submit("maintenance/scheduled"))
    stack.ended(first, state="Crashed")
    second = wait_for(lambda: stack.runs(idempotency_key=f"restart-of-{first}"), "another run in its place")
    (clip,) = stack.clips(stack.request_of(second[0]["id"]))
    stack.ended(second[0]["id"])
    stack.ended(engine, state="Crashed")
    assert stack.statuses(clip["request_id"]) == ["done"]
    stack.ended(stack.submit("maintenance/scheduled"))
    stack.rushes("audit")
    assert not stack.runs(idempotency_key=f"restart-of-{second[0]['id']}")


def an_hour_ago(stack: Stack, *runs: str) -> None:
    """They came into their state an hour before."""
    server = running_postgres(stack.home / "postgres")
    assert server is not None
    earlier = "update flow_run_state set timestamp = timestamp - interval '1 hour' where flow_run_id = any(%s)"
    with psycopg.connect(server.url_of("prefect").replace("+psycopg", "")) as database:
        assert database.execute(earlier, [[uuid.UUID(run) for run in runs]]).rowcount == len(runs)
