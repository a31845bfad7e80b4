"""How often a request tells Prefect where it stands: each time leaves some 35 kB there."""

from __future__ import annotations

from itertools import pairwise

from flows.generate.page import REPORT_MOST, ROUND, pause


def reports(seconds: float) -> list[float]:
    """The ages at which a request reports that is watched for so long."""
    at, times = 0.0, list[float]()
    while at < seconds:
        times.append(at)
        at += pause(at)
    return times


def test_a_short_request_is_seen_to_move() -> None:
    assert {after - before for before, after in pairwise(reports(240))} == {ROUND}


def test_a_long_one_keeps_prefect_small() -> None:
    """Prefect keeps an hour of them, or two where its vacuum has just run: never more than ten megabytes an hour."""
    times = reports(7 * 86400.0)
    most = max(sum(begin <= at < begin + 3600 for at in times) for begin in range(0, 7 * 86400, 600))
    assert most * 35_000 <= 10_000_000
    assert all(after - before <= REPORT_MOST + 1e-3 for before, after in pairwise(times))
