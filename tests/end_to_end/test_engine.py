"""A host is lost with its worker and its engine: `rushes engine` takes its place without Prefect."""

from __future__ import annotations

import pytest

from tests.end_to_end.stack import Stack, wait_for

pytestmark = [pytest.mark.xdist_group("stack"), pytest.mark.timeout(900), pytest.mark.slow]


def test_an_engine_without_a_worker(stack: Stack) -> None:
    stack.kill(stack.of_pool("gpu"))
    wait_for(lambda: not stack.ranks(), "the ranks to follow")
    stack.rushes("status", code=1)

    lines = ["a red ball slowly", "a blue cube"]
    run = stack.submit(request=stack.request(lines, seed=stack.seed()))
    request = stack.request_of(run)
    said = stack.rushes("engine", "--linger", "3")
    assert " clips in " in said
    stack.ended(run)
    assert stack.statuses(request) == ["done", "done"]
    (engine,) = {attempt["engine"] for attempt in stack.attempts(request)}
    row = stack.sql("select flow_run_id, closed_at from engines where id = %s", engine)[0]
    assert row["flow_run_id"] is None and row["closed_at"] is not None
    assert not stack.ranks(), "it ended its ranks when it left"

    assert "gpu" in stack.rushes("up")
    stack.rushes("status")
