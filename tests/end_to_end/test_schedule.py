"""Prefect's scheduler really makes runs: a database library it does not get along with stops it without a word."""

from __future__ import annotations

import pytest

from tests.end_to_end.stack import Stack, wait_for

pytestmark = [pytest.mark.xdist_group("stack"), pytest.mark.timeout(900), pytest.mark.slow]


def test_maintenance_runs_by_its_schedule(stack: Stack) -> None:
    of_maintenance = {"flows": {"name": {"any_": ["maintenance"]}}}

    def scheduled() -> bool:
        return any(run["auto_scheduled"] for run in stack.api("POST", "/flow_runs/filter", of_maintenance))

    wait_for(scheduled, "a scheduled run of maintenance", every=1)
