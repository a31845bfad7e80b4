"""A host is lost with its worker and its engine: `rushes engine` takes its place without Prefect."""

from __future__ import annotations

import pytest

from tests.end_to_end.stack import House, wait_for

pytestmark = [pytest.mark.xdist_group("stack"), pytest.mark.timeout(900), pytest.mark.slow]


def test_an_engine_without_a_worker(house: House) -> None:
    house.kill(house.of_pool("gpu"))
    wait_for(lambda: not house.ranks(), "the ranks to follow")
    house.rushes("status", code=1)

    lines = ["a red ball slowly", "a blue cube"]
    run = house.submit(request=house.request(lines, seed=house.seed()))
    request = house.request_of(run)
    said = house.rushes("engine", "--linger", "3")
    assert " clips in " in said
    house.ended(run)
    assert house.statuses(request) == ["done", "done"]
    (engine,) = {attempt["engine"] for attempt in house.attempts(request)}
    row = house.sql("select flow_run_id, closed_at from engines where id = %s", engine)[0]
    assert row["flow_run_id"] is None and row["closed_at"] is not None
    assert not house.ranks(), "it ended its ranks when it left"

    assert "gpu" in house.rushes("up")
    house.rushes("status")
