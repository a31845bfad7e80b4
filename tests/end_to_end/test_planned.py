"""Engines follow the plan: two CPU ranks, which may be one engine of two ranks or two engines of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.stack import Stack, wait_for
from tests.tiny import tiny_model

pytestmark = [pytest.mark.chaos, pytest.mark.xdist_group("stack"), pytest.mark.timeout(900), pytest.mark.slow]

WHOLE, HALVES = "cfg1xsp1xtp1", "cfg2xsp1xtp1"


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack of its own, since what its engines are is a setting."""
    folder: Path = tmp_path_factory.mktemp("planned")
    stack = Stack(
        home=folder / "home",
        model=tiny_model(folder / "tiny"),
        settings={
            "RUSHES_PARTITION": "auto",
            "RUSHES_GPUS": "2xcpu",
            "RUSHES_LINGER": "600",  # so that an engine that leaves does so for another one
            "RUSHES_SHARD_SECONDS": "1",
        },
    )
    with stack.up():
        yield stack


def planned_for(stack: Stack, request: str) -> set[str | None]:
    return {row["partition"] for row in stack.sql("select partition from shards where request_id = %s", request)}


def test_one_clip_gets_all_ranks_many_get_one_each_and_nothing_waits_for_ever(planned: Stack) -> None:
    run = planned.submit(request=planned.request(["a red ball"], seed=planned.seed()))
    one = planned.request_of(run)
    planned.ended(run)
    (clip,) = planned.clips(one)
    assert planned_for(planned, one) == {clip["partition"]} == {HALVES}
    assert clip["predicted_seconds"] > 0 and clip["predicted_bytes"] > 0

    # The engine of two ranks, which would linger, leaves for two of one rank each.
    lines = [{"prompt": "a red ball", "samples": 64, "seed": planned.seed() + 64 * k} for k in range(20)]
    long_run = planned.submit(request=planned.request(lines, steps=200, seed=planned.seed()))
    many = planned.request_of(long_run)
    owners = "select count(distinct owner) as n from shards where request_id = %s and status = 'leased'"
    wait_for(lambda: planned.sql(owners, many)[0]["n"] == 2, "two engines at work")
    assert planned_for(planned, many) == {WHOLE}
    assert len(planned.ranks()) == 2

    # By history one rank is slow, but two for one clip cannot be had now: it is rendered by one after all, between the
    # shards of the other request.
    done = "select id from clips where request_id = %s and status = 'done'"
    wait_for(lambda: len(planned.sql(done, many)) >= 30, "a history")
    planned.sql(f"update attempts set denoise_seconds = 100 where clip_id in ({done}) returning clip_id", many)
    planned.sql(f"update clips set seconds = 100 where id in ({done}) returning id", many)
    run = planned.submit(request=planned.request(["a blue cube"], steps=200, seed=planned.seed()))
    late = planned.request_of(run)
    wait_for(lambda: planned_for(planned, late) == {HALVES}, "the plan")
    planned.ended(run)
    (clip,) = planned.clips(late)
    assert (clip["status"], clip["partition"], planned_for(planned, late)) == ("done", WHOLE, {None})
    assert planned.status_of(many) == "open"
    planned.cancel(long_run)
    planned.ended(long_run, state="Cancelled")
