"""Open requests whose run has ended are taken up when a worker starts, once, and living ones are left alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, cast

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

from flows.clients.prefect import PrefectApi, Run
from flows.operate.take_up import take_up
from tests.factories import new_clip, opened

RUN = "11111111-1111-1111-1111-111111111111"


@dataclass
class Prefect:
    """A server as far as `take_up` asks it."""

    states: dict[str, str]
    submitted: list[str] = field(default_factory=list[str])

    def run(self, run_id: str) -> Run | None:
        state = self.states.get(run_id)
        return (state and Run(run_id, "", state, state.title(), "", {}, now=datetime.now(UTC))) or None

    def submit(self, deployment: str, parameters: Mapping[str, Any], *, once: str) -> None:
        assert deployment == "maintenance/scheduled"
        self.submitted.append(once)


@pytest.mark.parametrize(
    ("state", "watched", "clear", "submitted"),
    [
        ("RUNNING", True, True, 0),
        ("RUNNING", False, False, 0),  # its host may be gone, which Prefect says within 90 seconds
        ("SCHEDULED", False, True, 0),
        ("CRASHED", False, True, 1),
        ("FAILED", False, True, 1),
        (None, False, True, 1),  # Prefect has forgotten it
    ],
)
def test_what_is_open_is_taken_up_at_a_start(
    ledger: sessionmaker[Session],
    monkeypatch: pytest.MonkeyPatch,
    state: str | None,
    watched: bool,
    clear: bool,
    submitted: int,
) -> None:
    monkeypatch.setattr("db.requests.server_age", lambda _: 3600.0)  # so that it could hear of the run
    server = Prefect({RUN: state} if state else {})
    api = cast(PrefectApi, server)
    assert take_up(ledger, api), "nothing is open"
    with ledger.begin() as session:
        request = opened(session, [new_clip(0)])
        ago = "0 seconds" if watched else "1 hour"
        beat = f"update requests set flow_run_id = :run, watched_at = now() - interval '{ago}' where id = :id"
        session.execute(text(beat), {"run": RUN, "id": request})
    assert take_up(ledger, api) is clear
    assert take_up(ledger, api) is clear
    assert len(set(server.submitted)) == submitted, "two workers that start at once ask for one"
