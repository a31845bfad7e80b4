"""What a person's command does while the Prefect server is busy, drops a connection or is not there."""

from __future__ import annotations

import base64
import json
import socket
import struct
import threading
import time
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from flows.clients import prefect as prefect_api
from flows.clients.prefect import PrefectApi, PrefectRefused, PrefectUnavailable
from infra.stack.home import StackFailed
from infra.stack.prefect import Api, reason_to_wait

RUN = {"id": "a-run", "name": "keen-otter", "state_type": "SCHEDULED", "state_name": "Scheduled"}


class Server(ThreadingHTTPServer):
    """Answers as it is told to, one word a request, and then as Prefect does; keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.to_do: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self.password: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/api"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        asked = self.headers["Authorization"]
        if self.server.password and asked != f"Basic {base64.b64encode(self.server.password.encode()).decode()}":
            self.say(401, {"exception_message": "Unauthorized"})
            return
        self.say(200, {"id": "a-deployment"})

    def do_POST(self) -> None:
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        match self.server.to_do.pop(0) if self.server.to_do else "":
            case "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
            case "hang up":
                self.close_connection = True
            case "broken":
                self.say(500, {"exception_message": "Internal Server Error"})
            case "busy":
                self.say(503, {"exception_message": "Service Unavailable"})
            case "no":
                self.say(409, {"detail": "'steps' is not a number"})
            case _:
                self.say(201, RUN)

    def say(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Generator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_busy_server_is_asked_until_it_answers_and_always_for_the_same_run(server: Server) -> None:
    server.to_do = ["busy", "reset", "broken", "hang up", "busy"]
    with PrefectApi(server.url) as api:
        run = api.submit("generate/default", {"request": {}})
    assert (run.id, run.new) == ("a-run", True)
    assert len(server.asked) == 6
    assert len({asked["idempotency_key"] for asked in server.asked}) == 1


@pytest.mark.parametrize(("trouble", "said"), [("busy", "is too busy (503)"), ("reset", "does not answer (")])
def test_patience_ends(server: Server, trouble: str, said: str) -> None:
    server.to_do = [trouble] * 1000
    with PrefectApi(server.url, patience=0.5) as api, pytest.raises(PrefectUnavailable) as caught:
        api.submit("generate/default", {})
    assert str(caught.value).startswith(f"the Prefect server at {server.url} {said}")
    assert len(server.asked) > 1


def test_who_waits_long_is_told_once(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prefect_api, "QUIET", 0.1)
    server.to_do = ["busy"] * 5
    with PrefectApi(server.url) as api:
        api.submit("generate/default", {})
    assert caplog.messages == ["the Prefect server is too busy (503): asking again, for 30 s at most"]


def test_a_refusal_is_one(server: Server) -> None:
    server.to_do = ["no"]
    with PrefectApi(server.url) as api, pytest.raises(PrefectRefused, match="409: 'steps' is not a number"):
        api.submit("generate/default", {})
    assert len(server.asked) == 1


def test_a_fault_that_stays_is_told(server: Server) -> None:
    server.to_do = ["broken"] * 1000
    with PrefectApi(server.url) as api, pytest.raises(PrefectRefused, match="Internal Server Error"):
        api.submit("generate/default", {})
    assert len(server.asked) == prefect_api.FAULTS + 1


def test_a_server_that_is_not_there_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    began = time.monotonic()
    with PrefectApi(f"http://127.0.0.1:{port}/api") as api, pytest.raises(PrefectUnavailable, match="rushes up"):
        api.tagged("any")
    assert time.monotonic() - began < 120


POOL = {"name": "gpu", "is_paused": False, "concurrency_limit": 1, "default_queue_id": "q"}
QUEUE = {"id": "q", "name": "default", "is_paused": False, "concurrency_limit": None}


@pytest.mark.parametrize(
    ("pool", "queue", "said"),
    [
        ({}, {}, None),
        ({"concurrency_limit": None}, {"concurrency_limit": 3}, None),
        ({"is_paused": True}, {}, "the work pool gpu is paused"),
        ({"concurrency_limit": 0}, {}, "the work pool gpu may run 0 flow runs"),
        ({}, {"is_paused": True}, "the queue default of the work pool gpu is paused"),
        ({}, {"concurrency_limit": 0}, "the queue default of the work pool gpu may run 0 flow runs"),
        ({}, {"id": "of others", "is_paused": True}, None),
        (None, {}, "its work pool is missing"),
    ],
)
def test_why_no_run_begins(pool: dict[str, Any] | None, queue: dict[str, Any], said: str | None) -> None:
    found = reason_to_wait(None if pool is None else POOL | pool, [QUEUE | queue])
    assert found is None if said is None else (found or "").startswith(said)


def test_both_clients_log_in_and_a_refusal_names_the_setting(server: Server) -> None:
    server.password = "rushes:s3cret:with-colons"
    with PrefectApi(server.url, server.password) as api:
        assert api.version()
    assert Api(server.url, server.password).get("/admin/version")
    for wrong in (None, "rushes:wrong"):
        with PrefectApi(server.url, wrong) as api, pytest.raises(PrefectRefused, match="RUSHES_PREFECT_AUTH") as caught:
            api.version()
        with pytest.raises(StackFailed, match="RUSHES_PREFECT_AUTH"):
            Api(server.url, wrong).version()
        assert "wrong" not in str(caught.value).replace(server.url, "")
