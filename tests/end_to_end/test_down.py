"""`rushes down` in the middle of a batch ends everything, and `rushes up` goes on where it stopped."""

from __future__ import annotations

import socket

import psutil
import pytest

from tests.end_to_end.stack import SLOW, House, wait_for

pytestmark = [pytest.mark.xdist_group("stack"), pytest.mark.timeout(900), pytest.mark.slow]


def test_down_leaves_nothing_and_up_goes_on(house: House) -> None:
    lines = [f"a green cube moves {k}" for k in range(4)]
    run = house.submit(request=house.request(lines, steps=SLOW, seed=house.seed()))
    request = house.request_of(run)
    wait_for(lambda: "done" in house.statuses(request), "the first clip")
    made = [attempt for attempt in house.attempts(request) if attempt["status"] == "done"]
    running = house.processes()
    ports = {
        connection.laddr.port
        for process in running
        for connection in process.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    ports |= set(house.stack()["ports"].values())
    assert len(house.ranks()) == 2 and len(ports) >= 2

    house.rushes("down")
    assert house.processes() == []
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in running)
    assert not (house.home / "stack.json").exists()
    for port in ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0, f"port {port} still listens"

    house.rushes("up")
    house.ended(run)
    attempts = house.attempts(request)
    assert house.statuses(request) == ["done"] * 4
    assert [attempt for attempt in attempts if attempt in made] == made
    assert sum(attempt["status"] == "done" for attempt in attempts) == 4
    assert sum(attempt["clip_id"] in {m["clip_id"] for m in made} for attempt in attempts) == len(made)
