"""The embedded stack, for real: every process, every port, in homes of the test's own."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
import pytest

from infra.stack.doctor import Check, doctor
from infra.stack.down import down
from infra.stack.home import PARTS, Stack, StackFailed
from infra.stack.postgres import PostgresFailed, is_running, running_postgres
from infra.stack.up import status, up

pytestmark = [pytest.mark.xdist_group("stack"), pytest.mark.timeout(900), pytest.mark.slow]

FLOWS = '''
import os, subprocess, sys, time
from pathlib import Path
from prefect import flow

@flow
def nap(note: str, seconds: float = 0.0) -> None:
    with open(note, "a") as file:
        print(os.environ["RUSHES_HOME"], os.getcwd(), file=file)
    time.sleep(seconds)

@flow
def brood(note: str) -> None:
    """An engine, as far as processes go: it has a child with the command line of a rank."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "model.engine.rank"])
    Path(note).write_text(str(child.pid))
    child.wait()
'''
WEB = """
async def app(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"well"})

def create():
    return app
"""
DEPLOYMENTS = """
name: scratch
deployments:
  - {name: default, flow_name: nap, entrypoint: scratch.flows.nap, work_pool: {name: control}}
  - {name: engine, flow_name: brood, entrypoint: scratch.flows.brood, work_pool: {name: gpu}}
"""


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with two flows."""
    repo = tmp_path_factory.mktemp("repo")
    (repo / "scratch").mkdir()
    (repo / "scratch" / "__init__.py").touch()
    (repo / "scratch" / "flows.py").write_text(FLOWS)
    (repo / "scratch" / "web.py").write_text(WEB)
    (repo / "prefect.yaml").write_text(DEPLOYMENTS)
    return repo


@pytest.fixture(scope="module")
def start(repo: Path) -> Callable[..., Stack]:
    def start(home: Path, **changes: Any) -> Stack:
        own = {"repo": repo, "deployments": repo / "prefect.yaml", "migrate": migrate, "web": "scratch.web:create"}
        return up(home, **own | changes)

    return start


@pytest.fixture(scope="module")
def stack(start: Callable[..., Stack], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One running stack for all tests that leave it as it was."""
    home = tmp_path_factory.mktemp("stack") / "home"
    try:
        yield start(home, engines=2)
    finally:
        down(home)
    assert_nothing_runs(home)


def migrate(url: str, reader_url: str) -> None:
    with psycopg.connect(url.replace("+psycopg", "")) as connection:
        connection.execute("create table if not exists migrated ()")


def test_everything_is_there(stack: Stack) -> None:
    assert stack.started == PARTS
    assert stat.S_IMODE(stack.home.stat().st_mode) == 0o700
    assert stat.S_IMODE((stack.home / "stack.json").stat().st_mode) == 0o600
    told = json.loads((stack.home / "stack.json").read_text())
    assert told["prefect_api_url"] == stack.prefect_api_url
    with psycopg.connect(told["database_url"].replace("+psycopg", "")) as connection:
        connection.execute("select from migrated")
    assert {d["name"] for d in api(stack, "/deployments/filter")} == {"default", "engine"}
    server = running_postgres(stack.home / "postgres")
    assert server is not None and server.port == told["ports"]["postgres"]
    with psycopg.connect(server.url_of("prefect").replace("+psycopg", "")) as connection:
        assert connection.execute("select count(*) from deployment").fetchone() == (2,)
    assert server.password_of("prefect") not in (stack.home / "stack.json").read_text()
    assert {p["name"]: p["concurrency_limit"] for p in api(stack, "/work_pools/filter")} == {"control": 8, "gpu": 2}
    assert httpx.get(stack.prefect_ui_url, follow_redirects=True).text.lower().startswith("<!doctype html")
    assert stack.web_url == told["web_url"] and httpx.get(f"{stack.web_url}/healthz").text == "well"
    assert status(stack.home).running


def test_it_listens_on_loopback_only(stack: Stack) -> None:
    for pid in stack.pids.values():
        for connection in psutil.Process(pid).net_connections():
            assert connection.status != psutil.CONN_LISTEN or connection.laddr[0] == "127.0.0.1", connection


def test_a_second_up_starts_nothing(stack: Stack, start: Callable[..., Stack]) -> None:
    began = time.monotonic()
    again = start(stack.home, engines=2)
    assert time.monotonic() - began < 5  # half a second on an idle machine
    assert (again.started, again.pids) == ((), stack.pids)


def test_a_flow_run_knows_its_home(stack: Stack, repo: Path, tmp_path: Path) -> None:
    run = submit(stack, "nap/default", note=str(tmp_path / "note"))
    wait_for(lambda: state(stack, run) == "COMPLETED", "the run to complete")
    assert (tmp_path / "note").read_text().split() == [str(stack.home), str(repo)]


def test_a_killed_worker_is_started_again(stack: Stack, start: Callable[..., Stack]) -> None:
    os.kill(stack.pids["gpu"], signal.SIGKILL)
    wait_for(lambda: not status(stack.home).running, "the worker to be missed")
    mended = start(stack.home, engines=2)
    assert mended.started == ("gpu",)
    assert {part for part in PARTS if mended.pids[part] != stack.pids[part]} == {"gpu"}
    assert status(stack.home).running


def test_a_changed_limit_is_taken_over(stack: Stack, start: Callable[..., Stack]) -> None:
    assert start(stack.home, engines=3).started == ()
    assert {p["name"]: p["concurrency_limit"] for p in api(stack, "/work_pools/filter")}["gpu"] == 3


def test_doctor_finds_nothing_wrong_and_then_what_is(stack: Stack, repo: Path) -> None:
    def broken() -> str:
        raise OSError("no such bucket")

    def examine(home: Path, store: Callable[[], str] = lambda: "fine") -> dict[str, Check]:
        file = repo / "prefect.yaml"
        checks = doctor(home, schema=lambda _: "fine", store=store, weights=lambda: "fine", deployments=file)
        return {check.name: check for check in checks}

    assert [check for check in examine(stack.home).values() if not check.ok] == []
    check = examine(stack.home, broken)["store"]
    assert (check.ok, check.detail) == (False, "no such bucket")
    assert "RUSHES_STORE_URL" in check.mend
    api(stack, "/work_pools/gpu", "PATCH", is_paused=True)
    assert "gpu is paused" in examine(stack.home)["work pools"].detail
    api(stack, "/work_pools/gpu", "PATCH", is_paused=False)
    nowhere = examine(stack.home / "nowhere")
    missing = [nowhere[name] for name in ("postgres", "prefect", "workers")]
    assert all(not check.ok and "rushes up" in check.mend for check in missing)


@pytest.mark.chaos
def test_two_homes_run_side_by_side_and_down_ends_one(
    stack: Stack, start: Callable[..., Stack], tmp_path: Path, empty_database_url: str
) -> None:
    """Work is under way at `down`: an engine with its rank ends, a request goes on after the next `up`.

    The other one's Prefect lives on another Postgres, and an earlier version left a database of its own there.
    """
    home, note, pid = tmp_path / "home", tmp_path / "note", tmp_path / "pid"
    elsewhere = {"prefect_database": empty_database_url.replace("+psycopg", "+asyncpg")}
    (home / "prefect").mkdir(parents=True)
    (home / "prefect" / "prefect.db").write_text("flow runs of long ago")
    told: list[str] = []
    stranger = subprocess.Popen(["sleep", "600"], env={**os.environ, "RUSHES_HOME": str(home)})
    try:
        other = start(home, **elsewhere, say=told.append)
        assert [line for line in told if "prefect.db is an earlier version's: its flow runs are not taken over" in line]
        with psycopg.connect(empty_database_url.replace("+psycopg", "")) as connection:
            assert connection.execute("select count(*) from deployment").fetchone() == (2,)
        assert not set(other.ports.values()) & set(stack.ports.values())
        request = submit(other, "nap/default", note=str(note), seconds=300)
        engine = submit(other, "brood/engine", note=str(pid))
        wait_for(lambda: note.exists() and pid.exists() and pid.read_text(), "both runs to start")
        rank = psutil.Process(int(pid.read_text()))
        (home / "stack.json").unlink()

        assert down(home) == PARTS
        assert_nothing_runs(home, other)
        assert not rank.is_running()
        assert stranger.poll() is None
        assert down(home) == ()
        assert status(stack.home).running

        again = start(home, **elsewhere)
        assert (home / "prefect" / "prefect.db").read_text() == "flow runs of long ago"
        assert again.ports == other.ports
        assert state(again, engine) == "CRASHED"
        wait_for(lambda: len(note.read_text().splitlines()) == 2, "the request to be taken up again")
        assert state(again, request) == "RUNNING"
    finally:
        stranger.kill()
        stranger.wait()
        down(home)
    assert_nothing_runs(home)


def test_an_earlier_versions_home_is_refused(start: Callable[..., Stack], tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "postgres" / "data").mkdir(parents=True)
    (home / "postgres" / "data" / "PG_VERSION").write_text("18\n")
    (home / "postgres" / "server.json").write_text('{"name": "rushes-0", "password": "x", "port": 1}')
    with pytest.raises(PostgresFailed, match="was made by an earlier version of Rushes"):
        start(home)
    assert {path.name for path in (home / "postgres").rglob("*")} == {"data", "PG_VERSION", "server.json", "lock"}
    assert_nothing_runs(home)


def test_a_failed_start_leaves_nothing(start: Callable[..., Stack], repo: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"

    def broken(url: str, reader_url: str) -> None:
        raise StackFailed("no migration")

    with pytest.raises(StackFailed, match="no migration"):
        start(home, migrate=broken)
    assert_nothing_runs(home)

    (tmp_path / "prefect.yaml").write_text(DEPLOYMENTS.replace("scratch.flows.brood", "scratch.flows.missing"))
    with pytest.raises(StackFailed, match="'missing'"):
        start(home, deployments=tmp_path / "prefect.yaml")
    assert_nothing_runs(home)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_start_leaves_nothing(how: signal.Signals, repo: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    program = (
        "import sys; from pathlib import Path; from infra.stack.up import up\n"
        "home, repo = map(Path, sys.argv[1:])\n"
        "up(home, repo=repo, migrate=lambda *_: print('migrating', flush=True), deployments=repo / 'prefect.yaml')"
    )
    command = [sys.executable, "-c", program, str(home), str(repo)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=Path.cwd()) as starting:
        assert starting.stdout is not None
        assert starting.stdout.readline() == b"migrating\n"
        wait_for(lambda: processes(home), "the server to be started")
        starting.send_signal(how)
        assert starting.wait(60) != 0
    assert_nothing_runs(home)


# Helpers


def api(stack: Stack, path: str, method: str = "POST", **body: Any) -> Any:
    answer = httpx.request(method, stack.prefect_api_url + path, json=None if method == "GET" else body, timeout=120)
    answer.raise_for_status()
    return answer.json() if answer.content else None


def submit(stack: Stack, deployment: str, **parameters: Any) -> str:
    found = api(stack, f"/deployments/name/{deployment}", "GET")
    return str(api(stack, f"/deployments/{found['id']}/create_flow_run", parameters=parameters)["id"])


def state(stack: Stack, run: str) -> str:
    return str(api(stack, f"/flow_runs/{run}", "GET")["state_type"])


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.1)


def processes(home: Path) -> list[str]:
    """Every living process that belongs to the stack of `home`, found without help from the code under test."""
    found: list[str] = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RUSHES_STACK") == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def assert_nothing_runs(home: Path, stack: Stack | None = None) -> None:
    assert processes(home) == []
    assert not is_running(home / "postgres")
    assert not (home / "stack.json").exists()
    for port in stack.ports.values() if stack else ():
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0, f"port {port} is still open"
