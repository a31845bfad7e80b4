"""`rushes down` in the middle of a batch ends everything, and `rushes up` goes on where it stopped."""

from __future__ import annotations

import psutil
import pytest

from tests.end_to_end.stack import SLOW, Stack, wait_for

pytestmark = [pytest.mark.xdist_group("stack two"), pytest.mark.timeout(900), pytest.mark.slow]


def test_down_leaves_nothing_and_up_goes_on(stack: Stack) -> None:
    lines = [f"a green cube moves {k}" for k in range(4)]
    run = stack.submit(request=stack.request(lines, steps=SLOW, seed=stack.seed()))
    request = stack.request_of(run)
    wait_for(lambda: "done" in stack.statuses(request), "the first clip")
    made = [attempt for attempt in stack.attempts(request) if attempt["status"] == "done"]
    running = stack.processes()
    ports = {
        connection.laddr.port
        for process in running
        for connection in process.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    ports |= set(stack.info()["ports"].values())
    assert len(stack.ranks()) == 2 and len(ports) >= 2

    stack.rushes("down")
    assert stack.processes() == []
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in running)
    assert not (stack.home / "stack.json").exists()
    listening = [each for each in psutil.net_connections(kind="tcp") if each.status == psutil.CONN_LISTEN]
    ours = {process.pid for process in running}  # another test's server may have got such a port by now
    assert not [each for each in listening if each.laddr.port in ports and each.pid in {None, *ours}]

    stack.rushes("up")
    stack.ended(run)
    attempts = stack.attempts(request)
    assert stack.statuses(request) == ["done"] * 4
    assert [attempt for attempt in attempts if attempt in made] == made
    assert sum(attempt["status"] == "done" for attempt in attempts) == 4
    assert sum(attempt["clip_id"] in {m["clip_id"] for m in made} for attempt in attempts) == len(made)
