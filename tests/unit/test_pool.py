"""Prefect's opinions of runs beside what the ledger hears, ages on the server's clock, listings of many pages."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta

import pytest
from prefect.client.schemas.objects import FlowRun, State, StateType

from db.engines import QUIET
from flows.clients.prefect import TAKEN, Run, date_of
from flows.render.pool import PAGE, STARTING, paged, stuck, unheard_of, withdrawn

SERVER = datetime(2026, 12, 1, 12, tzinfo=UTC)  # the server's clock, which nothing binds to this host's
MONTH = timedelta(days=30)


def run(kind: StateType, age: float) -> FlowRun:
    state: State[object] = State(type=kind, timestamp=SERVER - timedelta(seconds=age))  # pyright: ignore[reportArgumentType]
    return FlowRun(flow_id=uuid.uuid4(), state=state, state_type=kind)


@pytest.mark.parametrize("kind", [StateType.PENDING, StateType.CANCELLING])
def test_a_run_is_stuck_by_the_server_s_clock_alone(kind: StateType) -> None:
    assert stuck(run(kind, TAKEN.total_seconds() - 1), SERVER) is None
    state = stuck(run(kind, TAKEN.total_seconds() + 1), SERVER)
    assert state is not None and state.is_final()


def test_who_asks_for_a_run_again_judges_it_by_the_server_s_clock() -> None:
    pending = Run("a", "a", "PENDING", "Pending", "", {}, since=SERVER - TAKEN / 2, now=SERVER)
    assert pending.under_way
    assert not Run("a", "a", "PENDING", "Pending", "", {}, since=SERVER - 2 * TAKEN, now=SERVER).under_way
    assert date_of({"date": "Tue, 01 Dec 2026 12:00:00 GMT"}) == SERVER


def test_a_silent_engine_has_crashed_and_one_that_the_ledger_knows_and_could_not_hear_has_not() -> None:
    running, old = run(StateType.RUNNING, 5 * STARTING.total_seconds()), MONTH
    here: set[str | None] = {str(running.id)}
    assert unheard_of(running, SERVER, here, here, old) is not None, "silent"
    assert unheard_of(running, SERVER, here, set(), old) is None
    assert unheard_of(running, SERVER, here, set(), timedelta(seconds=5)) is None, "the ledger was away"
    assert unheard_of(running, SERVER, set(), set(), old) is not None, "it never registered"
    assert unheard_of(running, SERVER, set(), set(), timedelta(seconds=5)) is None, "it could not register"
    assert unheard_of(run(StateType.RUNNING, 5), SERVER, set(), set(), old) is None, "it is yet to register"


def test_only_a_sign_of_life_after_it_was_called_crashed_withdraws_that() -> None:
    long_ago, just_now = run(StateType.CRASHED, QUIET + 5), run(StateType.CRASHED, QUIET - 5)
    cancelled = run(StateType.CANCELLED, QUIET + 5)
    beating: set[str | None] = {str(each.id) for each in (long_ago, just_now, cancelled)}
    state = withdrawn(long_ago, SERVER, beating)
    assert state is not None and state.type is StateType.RUNNING
    assert withdrawn(just_now, SERVER, beating) is None, "it may have beaten before it was killed"
    assert withdrawn(cancelled, SERVER, beating) is None, "a person wanted that"
    assert withdrawn(long_ago, SERVER, set()) is None


@pytest.mark.parametrize("there", [0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE])
def test_a_listing_is_read_to_its_end(there: int) -> None:
    runs = [run(StateType.RUNNING, k) for k in range(there)]
    assert paged(lambda count, offset: runs[offset : offset + min(count, PAGE)]) == runs
    assert paged(lambda count, offset: runs[offset : offset + count], limit=1) == runs[:1]


def test_runs_that_come_while_it_is_read_hide_and_double_none() -> None:
    runs = [run(StateType.RUNNING, k) for k in range(2 * PAGE + 7)]
    before = list(runs)

    def ask(count: int, offset: int) -> list[FlowRun]:
        page = runs[offset : offset + count]
        runs.insert(0, run(StateType.RUNNING, 0))
        return page

    found = paged(ask)
    assert len({each.id for each in found}) == len(found)
    assert {each.id for each in before} <= {each.id for each in found}
