"""Cancelling ends the ranks' work within a few steps, keeps what was done, and leaves the engine to other requests."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.stack import LONG, PATIENCE, Stack, wait_for

pytestmark = [pytest.mark.xdist_group("stack"), pytest.mark.timeout(900), pytest.mark.slow]

STEPS = 200


def seconds_of(ranks: list[psutil.Process]) -> float:
    """CPU seconds that these processes have spent."""
    return sum(sum(rank.cpu_times()[:2]) for rank in ranks)


def test_cancelled_in_the_ui(stack: Stack) -> None:
    lines = [f"a blue ball moves right {k}" for k in range(3)]
    run = stack.submit(request=stack.request(lines, **LONG, steps=STEPS, seed=stack.seed()))
    request = stack.request_of(run)
    wait_for(lambda: "running" in stack.statuses(request), "the first clip to begin")
    engine, ranks = stack.engine_run(), stack.ranks()

    stack.cancel(run)
    wait_for(lambda: stack.status_of(request) == "cancelled", "the ledger to learn of it", every=0.02)
    before = seconds_of(ranks)
    statuses = stack.statuses(request)
    assert "cancelled" in statuses and set(statuses) <= {"done", "cancelled"}

    def idle() -> bool:
        spent = seconds_of(ranks)
        time.sleep(1.5)
        return seconds_of(ranks) - spent < 0.1

    wait_for(idle, "the ranks to rest")
    after = seconds_of(ranks)
    stack.ended(run, state="Cancelled")
    assert stack.statuses(request) == statuses, "nothing came of it later"
    assert {"0-status", "clips", "summary", "contact-sheet"} <= set(stack.artifacts(run)), "what was finished is shown"
    assert {attempt["status"] for attempt in stack.attempts(request)} <= {"done", "cancelled"}

    # The same engine takes what comes next. By the way it shows what a step costs.
    few = 10
    ask = stack.request(["a green cube"], **LONG, steps=few, seed=stack.seed())
    spent = seconds_of(ranks)
    later = stack.submit(request=ask)
    stack.ended(later)
    per_step = (seconds_of(ranks) - spent) / few
    assert stack.engines(stack.request_of(later)) == {engine} == {engine_of(stack, request)}
    assert (after - before) / per_step < STEPS / 4, "a lease's beat of one second, and a step"


def engine_of(stack: Stack, request: str) -> str:
    (engine,) = stack.engines(request)
    return engine


@pytest.mark.chaos
def test_cancelled_and_retried_by_command(stack: Stack, tmp_path: Path) -> None:
    """By the way its deadline cannot be met: the command says so before anybody waits, and so does the run's page."""
    file = tmp_path / "again.jsonl"
    seed = stack.seed()
    # One that is soon done, and two that take longer than a command on a busy machine.
    lines = [
        {"prompt": f"a red cube moves {k}", "seed": seed + k, "steps": 80, **(LONG if k else {})} for k in range(3)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    process = stack.start("submit", str(file), "--deadline", "0.01")
    said, warned = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, warned
    assert "the deadline of 0s cannot be met: all is done in about " in warned
    (request,) = re.findall(r"req_[0-9a-f]{12}", said)
    (run,) = re.findall(r"/runs/flow-run/([0-9a-f-]{36})", said)
    wait_for(lambda: stack.request_of(run) and "done" in stack.statuses(request), "the first clip")
    assert "The deadline will not be met" in stack.artifacts(run)["deadline"]["data"]

    said = stack.rushes("cancel", request)
    assert re.fullmatch(rf"{request}: \d+ clips? cancelled\n", said)
    statuses = stack.statuses(request)
    assert set(statuses) == {"done", "cancelled"}
    cancelled = statuses.count("cancelled")
    assert said.split()[1] == str(cancelled)
    made = {a["clip_id"]: a for a in stack.attempts(request) if a["status"] == "done"}
    stack.ended(run, state="Cancelled")
    assert "nothing was left to cancel" in stack.rushes("cancel", request)

    said = stack.rushes("retry", request, "--watch")
    assert re.search(rf"{request}: {cancelled} clips? queued again", said)
    assert f"{request} completed: 3 done" in said
    again = {a["clip_id"]: a for a in stack.attempts(request) if a["status"] == "done"}
    assert len(again) == 3
    assert made.items() <= again.items(), "what was done before was not made again"
    assert "nothing to retry" in stack.rushes("retry", request)
