"""A request that another run takes up is the one that was opened, whatever has become of what it was opened from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, State, StateType

import db.requests
from db.requests import count_try, hand_over, is_watched, note_watched, request_by, seconds_left
from flows.generate.outcome import Ending
from flows.generate.request import opened_with
from flows.library.models import card_of
from flows.operate import maintenance
from flows.operate.maintenance import MAX_TRIES, restart_abandoned_requests, take_up
from model.loading.card import ModelNotFound
from tests.platform import Platform, wait_for

LINE = "a red ball moves left"


def written(platform: Platform, text: str) -> Path:
    platform.settings.prompts.mkdir(parents=True, exist_ok=True)
    path = platform.settings.prompts / "prompts.txt"
    path.write_text(text)
    return path


@pytest.mark.parametrize("became", [None, "a blue cube\na green cone\n", "\udcff"], ids=["gone", "another", "broken"])
def test_a_sealed_request_needs_its_file_no_more(platform: Platform, became: str | None) -> None:
    path = written(platform, f"{LINE}\n")
    asked: dict[str, Any] = {"prompts_uri": "prompts.txt", "deadline": 3600}
    first = platform.submit(**asked)
    request = platform.request_of(first)
    with platform.sessions() as session:
        left = seconds_left(session, request)
    path.unlink() if became is None else path.write_text(became, errors="surrogateescape")
    again = platform.submit(resumes=request, **asked)
    with platform.engines():
        outcome = again.outcome()
    assert (outcome.ending, outcome.request_id) == (Ending.COMPLETED, request)
    assert [row["id"] for row in platform.sql("select id from requests")] == [request]
    assert platform.statuses(request) == ["done"]
    with platform.sessions() as session:
        now_left = seconds_left(session, request)
    assert left is not None and now_left is not None and now_left < left, "the deadline did not begin anew"


def test_a_request_that_was_killed_while_it_was_opened_goes_on_or_says_what_changed(platform: Platform) -> None:
    written(platform, f"{LINE}\n")
    request = platform.request_of(first := platform.submit(prompts_uri="prompts.txt", fresh=True))
    with platform.sessions.begin() as session:  # as if it had been killed before it sealed it
        session.connection().exec_driver_sql("update requests set total = null")
    written(platform, "a blue cube\n")
    changed = platform.submit(prompts_uri="prompts.txt", fresh=True, resumes=request).outcome()
    assert changed.ending is Ending.FAILED and "its prompts changed" in changed.message
    written(platform, f"{LINE}\n")
    again = platform.submit(prompts_uri="prompts.txt", fresh=True, resumes=request)
    with platform.engines():
        assert again.outcome().request_id == first.outcome().request_id == request, "though it is fresh"
    assert [row["id"] for row in platform.sql("select id from requests")] == [request]


def test_a_request_goes_on_with_the_model_it_was_opened_with(platform: Platform) -> None:
    request = platform.request_of(run := platform.submit([LINE]))
    with platform.sessions() as session:
        row = request_by(session, request)
    assert row is not None
    mini = card_of(platform.settings, row.model)
    assert opened_with(platform.settings, row, None) == (row.model, mini)
    renamed = replace(row, model="another")
    assert opened_with(platform.settings, renamed, str(mini.path))[1].digest == row.model_digest
    with pytest.raises(ModelNotFound, match=f"{request} was opened with the model 'another' of digest"):
        opened_with(platform.settings, renamed, None)
    with pytest.raises(ModelNotFound):  # the same name means another model by now
        opened_with(platform.settings, replace(row, model_digest="0" * 64), str(mini.path))
    with platform.engines():
        assert run.outcome().ending is Ending.COMPLETED


class Told:
    """Prefect's client, as far as giving up needs it."""

    def __init__(self) -> None:
        self.states: list[State[Any]] = []

    def set_flow_run_state(self, flow_run_id: UUID, state: State[Any], force: bool = False) -> None:
        self.states.append(state)


def test_runs_for_nothing_are_bounded_and_the_last_one_says_why(platform: Platform) -> None:
    run = platform.submit([LINE])
    request = platform.request_of(run)
    with platform.sessions.begin() as session:
        assert count_try(session, request, "another run") == 0
        assert [count_try(session, request, run.id) for _ in range(3)] == [1, 2, 3]
        session.connection().exec_driver_sql("update requests set ended_before = -1")
        assert count_try(session, request, run.id) == 1, "a clip had ended under the last one"
        assert [count_try(session, request, run.id) for _ in range(MAX_TRIES - 1)][-1] == MAX_TRIES
    client, message = Told(), "ValueError: the disk is read-only"
    ended = FlowRun(id=UUID(run.id), flow_id=uuid4(), state=State(type=StateType.FAILED, message=message))
    take_up(client, platform.sessions, request, ended)  # type: ignore[arg-type]
    (state,) = client.states
    assert state.type is StateType.FAILED and state.message is not None
    assert f"{MAX_TRIES + 1} runs" in state.message and message in state.message
    assert run.outcome().ending is Ending.CANCELLED
    assert platform.statuses(request) == ["cancelled"]


class Mistaken:
    """A Prefect that calls every run crashed, until it is told otherwise."""

    def __init__(self) -> None:
        self.states: list[State[Any]] = []

    def read_flow_run(self, run: UUID) -> FlowRun:
        return FlowRun(id=run, flow_id=uuid4(), state=State(type=StateType.CRASHED), state_type=StateType.CRASHED)

    def set_flow_run_state(self, flow_run_id: UUID, state: State[Any], force: bool = False) -> None:
        self.states.append(state)


def test_a_living_run_that_is_called_crashed_is_not_doubled_but_called_running_again(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db.requests, "SIGN", 0.1)
    monkeypatch.setattr(maintenance, "SIGN", 0.5)
    monkeypatch.setattr(maintenance, "QUIET", 1.0)
    run = platform.submit([LINE])
    request = platform.request_of(run)
    wait_for(lambda: platform.sql("select 1 from requests where watched_at is not null"), "a sign of life")
    client = Mistaken()
    assert restart_abandoned_requests(client, platform.sessions) == 0  # type: ignore[arg-type]
    assert [state.type for state in client.states] == [StateType.RUNNING]
    assert platform.sql("select id, tries, flow_run_id from requests") == [
        {"id": request, "tries": 0, "flow_run_id": run.id}
    ]
    with platform.engines():
        assert run.outcome().ending is Ending.COMPLETED


def test_only_the_request_s_own_run_gives_signs_of_life(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    run = platform.submit([LINE])
    request = platform.request_of(run)
    with platform.sessions.begin() as session:
        hand_over(session, request, "another")
    with platform.sessions.begin() as session:
        assert not is_watched(session, request, "another")
        note_watched(session, request, run.id)
        assert not is_watched(session, request, "another")
        note_watched(session, request, "another")
        assert is_watched(session, request, "another") and not is_watched(session, request, run.id)
        monkeypatch.setattr(db.requests, "QUIET", 0.1)  # of which the server is older
        session.connection().exec_driver_sql("update requests set watched_at = now() - interval '1 second'")
        assert not is_watched(session, request, "another")
    with platform.engines():
        assert run.outcome().ending is Ending.COMPLETED
