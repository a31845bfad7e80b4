"""A request that another run takes up is the one that was opened, whatever has become of what it was opened from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, State, StateType

from db.requests import count_try, request_by, seconds_left
from flows.generate.outcome import Ending
from flows.generate.request import opened_with
from flows.library.models import card_of
from flows.operate.maintenance import MAX_TRIES, take_up
from model.loading.card import ModelNotFound
from tests.platform import Platform

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
