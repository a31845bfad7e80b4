"""`rushes psql`: which psql it opens, on which login, and what it passes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from flows.clients.ledger import prepare_ledger
from infra.stack.databases import LEDGER
from infra.stack.home import POSTGRES, READER
from infra.stack.postgres import client_program, start_postgres, stop_postgres

Psql = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home whose embedded ledger runs, as its stack.json says."""
    home = tmp_path_factory.mktemp("psql") / "home"
    home.mkdir(mode=0o700)
    try:
        server = start_postgres(home / POSTGRES, settings={"fsync": "off"}, databases=(LEDGER,))
        url, reader = server.url_of(LEDGER.name), server.url_of(READER, LEDGER.name).replace("+psycopg", "", 1)
        prepare_ledger(url, reader)
        (home / "stack.json").write_text(json.dumps({"database_url": url, "reader_url": reader}))
        yield home
    finally:
        stop_postgres(home / POSTGRES)


@pytest.fixture
def psql(home: Path) -> Psql:
    def run(*arguments: str, told: str = "", **changes: str) -> subprocess.CompletedProcess[str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RUSHES_", "PG"))}
        environment = {**kept, "RUSHES_HOME": str(home), "PSQLRC": os.devnull, **changes}
        command = [sys.executable, "-m", "flows.cli.main", "psql", *arguments]
        return subprocess.run(command, env=environment, input=told, capture_output=True, text=True, timeout=120)

    return run


def test_it_asks_by_the_readers_login(psql: Psql) -> None:
    done = psql("-At", "-c", "select count(*), session_user, current_database() from history")
    assert (done.returncode, done.stdout) == (0, "0|reader|rushes\n"), done.stderr
    assert psql("-At", "-c", "show statement_timeout").stdout == "1min\n"
    refused = psql("-c", "select 1 from clips")
    assert refused.returncode == 1
    assert "permission denied for table clips" in refused.stderr


def test_arguments_input_and_exit_codes_are_psqls(psql: Psql) -> None:
    read = psql("-At", "-v", "word=it's", told="select :'word'; \\echo done")
    assert (read.returncode, read.stdout) == (0, "it's\ndone\n"), read.stderr
    assert psql("--set=ON_ERROR_STOP=1", "--file=-", told="select 1/0;").returncode == 3
    assert psql("--no-such-option").returncode == 1


def test_the_password_stands_in_no_command_line(psql: Psql, home: Path) -> None:
    reader = json.loads((home / "stack.json").read_text())["reader_url"]
    password = reader.partition("@")[0].rpartition(":")[2]
    seen = psql("-At", told="\\! tr '\\0' ' ' < /proc/$PPID/cmdline\n\\! printenv PGPASSWORD").stdout
    assert "dbname=rushes" in seen and seen.count(password) == 1, "in the environment alone"


def test_a_ledger_elsewhere_is_asked_with_the_psql_of_the_path(psql: Psql, home: Path, tmp_path: Path) -> None:
    own = tmp_path / "psql"
    own.write_text(f'#!/bin/sh\necho "of the PATH"\nexec {client_program("psql")} "$@"\n')
    own.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    reader = json.loads((home / "stack.json").read_text())["reader_url"]
    assert psql("-Atc", "select 1", PATH=path).stdout == "1\n", "the embedded ledger has a psql of its own"
    with psycopg.connect(reader.replace("+psycopg", "")) as connection:
        port = connection.info.port
    elsewhere = reader.replace(f"@127.0.0.1:{port}/", f"@localhost:{port}/")
    assert psql("-Atc", "select 1", PATH=path, RUSHES_DATABASE_URL=elsewhere).stdout == "of the PATH\n1\n"
    # Without one there, the wheel's does.
    assert psql("-Atc", "select 1", PATH="/nowhere", RUSHES_DATABASE_URL=elsewhere).stdout == "1\n"


def test_without_a_ledger_it_says_so(psql: Psql, tmp_path: Path) -> None:
    done = psql("-c", "select 1", RUSHES_HOME=str(tmp_path / "empty"))
    assert done.returncode == 1 and "no stack is running" in done.stderr
