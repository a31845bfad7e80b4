"""Engines that cannot start: how often they are tried, and that the first one that can ends all pauses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from flows.plan.starts import FIRST, MOST, pause, tell, tries

NOW = datetime(2026, 12, 1, 12, tzinfo=UTC)


@dataclass(frozen=True)
class Failed:
    began: float
    ended: float
    host: str = "gpu1"
    error: str = "no GPU."


@given(st.floats(0.1, 60), st.integers(1, 8), st.integers(10, 4000), st.floats(1, 10))
def test_starts_that_always_fail_are_made_more_and_more_seldom(
    lasts: float, wanted: int, seconds: int, every: float
) -> None:
    """Whatever a start takes until it fails, however many engines are wanted and however often one looks."""
    failed: list[tuple[float, float]] = []  # began, ended
    running: list[float] = []
    now, starts = 0.0, 0
    while now < seconds:
        failed += [(began, began + lasts) for began in running if began + lasts <= now]
        running = [began for began in running if began + lasts > now]
        paused = pause([Failed(now - began, now - ended) for began, ended in failed])
        room = wanted if paused is None else paused.room - len(running)
        for _ in range(min(room, wanted - len(running))):
            running.append(now)
            starts += 1
        now += every
    rounds = 1 + math.log2(1 + seconds / FIRST) + seconds / MOST
    assert starts <= wanted + rounds, "the first round, then one at a time"
    if seconds > 2 * (MOST + lasts + every):
        assert starts > wanted, "nothing is given up"


@given(st.lists(st.tuples(st.floats(0, 5000), st.floats(0, 5000)), max_size=30))
def test_a_pause_has_a_bound_and_ends_by_itself(spans: list[tuple[float, float]]) -> None:
    failed = [Failed(max(span), min(span)) for span in spans]
    paused = pause(failed)
    assert (paused is None) == (not failed)
    if paused is None:
        return
    assert 1 <= paused.tries <= len(failed) and paused.tries == tries(failed[::-1])
    assert 0 <= paused.left <= MOST
    assert paused.room == (paused.left == 0)
    later = pause([Failed(each.began + MOST, each.ended + MOST) for each in failed])
    assert later is not None and later.room == 1


def test_engines_that_were_started_together_and_failed_together_are_one_try() -> None:
    assert tries([Failed(20, 8 + k / 10) for k in range(8)]) == 1
    assert tries([Failed(20, 15), Failed(14, 9), Failed(8, 3)]) == 3


def test_the_reason_is_told_with_the_time_of_the_next_try() -> None:
    said = tell([Failed(30, 20), Failed(12, 4)], NOW)
    at = {seconds: f"{(NOW + timedelta(seconds=seconds)).astimezone():%H:%M:%S}" for seconds in (-4, 6)}
    assert "2 tries in a row failed, the last on gpu1" in said and "no GPU. The next one is made at" in said
    assert at[-4] in said and at[6] in said
    assert tell([Failed(900, 800)], NOW).endswith("The next one is made now")
