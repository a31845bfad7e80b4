"""The embedded Postgres: private, findable again, unharmed by kill -9, and never half-started."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
from psycopg import errors, sql

from infra.stack.databases import LEDGER, PREFECT
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
        assert connection.execute("select current_database()").fetchone() == ("postgres",)
        methods = "select array_agg(distinct auth_method) from pg_hba_file_rules"
        assert connection.execute(methods).fetchone() == (["scram-sha-256"],)
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(f"postgresql://postgres:guess@127.0.0.1:{server.port}/postgres")
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


def test_what_another_version_made_is_refused_in_a_line_and_left_as_it_is(folder: Path) -> None:
    start_postgres(folder, settings=QUICK)
    stop_postgres(folder)
    version, known = folder / "data" / "PG_VERSION", folder / "server.json"
    before = known.read_text()
    version.write_text("9\n")
    refused(folder, r"is of Postgres 9, which the installed 18\.\d+ cannot take over: move it away, or name another")
    version.write_text("18\n")
    earlier = {name: value for name, value in json.loads(before).items() if name != "layout"}
    known.write_text(json.dumps(earlier))
    refused(folder, r"was made by an earlier version of Rushes, which this one cannot take over: move it away, or")
    known.write_text(json.dumps(earlier | {"layout": 99}))
    refused(folder, r"was made by a later version of Rushes")
    known.write_text(before)
    assert start_postgres(folder, settings=QUICK).port == earlier["port"]


def refused(folder: Path, why: str) -> None:
    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    before = content()
    with pytest.raises(PostgresFailed, match=why) as caught:
        start_postgres(folder, settings=QUICK)
    assert "\n" not in str(caught.value)
    assert content() == before
    assert processes_in(folder) == []


def test_a_login_enters_its_own_database_and_no_other(folder: Path) -> None:
    server = start_postgres(folder, settings=QUICK, databases=(LEDGER, PREFECT))
    names = (LEDGER.name, PREFECT.name)
    for own, other in (names, names[::-1]):
        with psycopg.connect(plain(server.url_of(own)), autocommit=True) as session:
            session.execute("create table mine as select 1 as one")
            for statement in (
                sql.SQL("alter role {} password 'known'").format(sql.Identifier(other)),
                sql.SQL("create role lent in role {}").format(sql.Identifier(other)),
                sql.SQL("drop database {}").format(sql.Identifier(other)),
                sql.SQL("set role {}").format(sql.Identifier(other)),
                sql.SQL("alter role current_user superuser"),
                sql.SQL("select pg_read_file('PG_VERSION')"),
            ):
                with pytest.raises((errors.InsufficientPrivilege, errors.InvalidGrantOperation)):
                    session.execute(statement)
        with pytest.raises(psycopg.OperationalError, match=f'permission denied for database "{other}"'):
            psycopg.connect(plain(server.url_of(own, other))).close()
        wrong_password = plain(server.url_of(other, own)).replace(f"//{other}:", f"//{own}:")
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(wrong_password).close()
    with psycopg.connect(plain(server.url_of(PREFECT.name)), autocommit=True) as session:
        session.execute("create extension pg_trgm")  # its server's tables need it
        assert session.execute("show synchronous_commit").fetchone() == ("off",)
        limit = session.execute("select rolconnlimit from pg_roles where rolname = current_user").fetchone()
        assert limit == (PREFECT.most_connections,)

    # What was made stays, whatever a second start finds missing.
    stop_postgres(folder)
    with psycopg.connect(plain(start_postgres(folder, databases=(LEDGER, PREFECT)).url_of(LEDGER.name))) as session:
        assert session.execute("select one from mine").fetchone() == (1,)
        assert session.execute("show synchronous_commit").fetchone() == ("on",)


def plain(url: str) -> str:
    return url.replace("+psycopg", "")
