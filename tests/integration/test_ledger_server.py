"""The embedded Postgres: private, findable again, unharmed by kill -9, and never half-started."""

from __future__ import annotations

import os
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest

from infra.stack.postgres import PostgresFailed, is_running, running_postgres, start_postgres, stop_postgres

QUICK = {"fsync": "off", "shared_buffers": "16MB"}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder for a server, below one that nobody else may enter."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    yield home / "postgres"
    stop_postgres(home / "postgres")


def processes_in(folder: Path) -> list[int]:
    """Whatever has its working directory in there: every process of a server has."""
    found: list[int] = []
    for process in psutil.process_iter(["cwd"]):
        if (process.info["cwd"] or "").startswith(str(folder)):
            found.append(process.pid)
    return found


def test_a_server_is_private_and_found_again(folder: Path) -> None:
    assert running_postgres(folder) is None
    assert stop_postgres(folder) is False
    server = start_postgres(folder, settings=QUICK)
    assert running_postgres(folder) == start_postgres(folder) == server
    with pytest.raises(PostgresFailed, match=f"runs already, on port {server.port}, not 1"):
        start_postgres(folder, port=1)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "server.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700  # nothing was opened up to let another user in
    with psycopg.connect(server.libpq_url, autocommit=True) as connection:
        assert connection.execute("show unix_socket_directories").fetchone() == ("",)
        assert connection.execute("show listen_addresses").fetchone() == ("127.0.0.1",)
        assert connection.execute("select current_database()").fetchone() == ("rushes",)
        methods = "select array_agg(distinct auth_method) from pg_hba_file_rules"
        assert connection.execute(methods).fetchone() == (["scram-sha-256"],)
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(f"postgresql://rushes:guess@127.0.0.1:{server.port}/rushes")
    assert stop_postgres(folder) is True
    assert processes_in(folder) == []
    assert not is_running(folder)


def test_kill_9_and_a_stale_pid_file_do_no_harm(folder: Path) -> None:
    server = start_postgres(folder, settings=QUICK)
    with psycopg.connect(server.libpq_url) as connection:
        connection.execute("create table kept as select 1 as one")
    sleeping = psycopg.connect(server.libpq_url)  # its back-end outlives the postmaster for a moment
    postmaster = psutil.Process(server.pid)
    postmaster.send_signal(signal.SIGKILL)
    postmaster.wait(30)
    again = start_postgres(folder, settings=QUICK)
    sleeping.close()
    assert (again.port, again.url) == (server.port, server.url)
    assert again.pid != server.pid
    with psycopg.connect(again.libpq_url) as connection:
        assert connection.execute("select one from kept").fetchone() == (1,)
    assert stop_postgres(folder)
    # The machine restarted, and the number in the pid file belongs to somebody else: to us.
    (folder / "data" / "postmaster.pid").write_text(f"{os.getpid()}\n/somewhere\n")
    assert not is_running(folder)
    assert stop_postgres(folder) is False  # and we are still here
    assert start_postgres(folder, settings=QUICK).port == server.port


def test_a_start_that_fails_leaves_nothing_running_and_says_why(folder: Path) -> None:
    with pytest.raises(PostgresFailed, match='unrecognized configuration parameter "no_such_thing"'):
        start_postgres(folder, settings={**QUICK, "no_such_thing": "1"})
    assert processes_in(folder) == []
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = int(taken.getsockname()[1])
        with pytest.raises(PostgresFailed, match=f"port {port} is in use"):
            start_postgres(folder, port=port, settings=QUICK)
        assert processes_in(folder) == []
        server = start_postgres(folder, settings=QUICK)
        assert server.port != port
        stop_postgres(folder)
    moved = folder.with_name("moved")
    (folder / "server.json").rename(moved)
    with pytest.raises(PostgresFailed, match=r"lacks its server\.json"):
        start_postgres(folder, settings=QUICK)
    moved.rename(folder / "server.json")
    (folder / "data" / "PG_VERSION").write_text("9\n")
    with pytest.raises(PostgresFailed, match="is of Postgres 9, installed is 18"):
        start_postgres(folder, settings=QUICK)
    assert processes_in(folder) == []
