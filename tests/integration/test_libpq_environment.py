"""libpq's own variables are for other servers: none reaches the embedded Postgres, its tools, or its programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from psycopg.pq import Conninfo

from db.session import connect
from flows.clients.ledger import prepare_ledger
from infra.stack.databases import LEDGER
from infra.stack.home import POSTGRES, READER
from infra.stack.postgres import connect as connect_own
from infra.stack.postgres import start_postgres, stop_postgres
from infra.stack.prefect import prefect_environment

# Each of those that libpq reads would stop it: no such address, service, file, method, encoding …
HOSTILE = {
    **{option.envvar.decode(): "nonsense" for option in Conninfo.get_defaults() if option.envvar},
    **dict.fromkeys(("PGSERVICEFILE", "PGSYSCONFDIR", "PGDATESTYLE", "PGTZ", "PGGEQO", "PGLOCALEDIR"), "/nonsense"),
    "PGHOSTADDR": "203.0.113.1",
    "PGSSLMODE": "verify-full",
    "PGCHANNELBINDING": "require",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home whose embedded ledger was made and started with all of them set."""
    home = tmp_path_factory.mktemp("libpq") / "home"
    home.mkdir(mode=0o700)
    with pytest.MonkeyPatch.context() as environment:
        for name, value in HOSTILE.items():
            environment.setenv(name, value)
        server = start_postgres(home / POSTGRES, settings={"fsync": "off"}, databases=(LEDGER,))
        assert HOSTILE.items() <= os.environ.items(), "they are put back"
    try:
        url, reader = server.url_of(LEDGER.name), server.url_of(READER, LEDGER.name).replace("+psycopg", "", 1)
        prepare_ledger(url, reader)
        (home / "stack.json").write_text(json.dumps({"database_url": url, "reader_url": reader}))
        yield home
    finally:
        stop_postgres(home / POSTGRES)


def rushes(home: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RUSHES_")}
    environment = {**kept, **HOSTILE, "RUSHES_HOME": str(home), **changes}
    command = [sys.executable, "-m", "flows.cli.main", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_commands_and_psql_ask_the_embedded_ledger_as_ever(home: Path) -> None:
    asked = rushes(home, "sql", "select count(*) as clips from history", "--format", "csv")
    assert (asked.returncode, asked.stdout.split()) == (0, ["clips", "0"]), asked.stderr
    opened = rushes(home, "psql", "-Atc", "select session_user, current_setting('datestyle')")
    assert (opened.returncode, opened.stdout) == (0, "reader|ISO, MDY\n"), opened.stderr


def test_prefects_server_and_flow_runs_do_not_see_them(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGSSLMODE", "verify-full")
    monkeypatch.setenv("PG_OF_A_LATER_VERSION", "nonsense")
    assert not [name for name in prefect_environment(home, "server") if name.startswith("PG")]
    with connect_own(json.loads((home / "stack.json").read_text())["database_url"]) as connection:
        assert connection.execute("select 1").fetchone() == (1,)


def test_a_ledger_elsewhere_is_asked_with_them_and_an_error_is_one_line(home: Path) -> None:
    url = json.loads((home / "stack.json").read_text())["database_url"]
    done = rushes(home, "history", RUSHES_DATABASE_URL=url)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("rushes: the ledger does not answer (") and "PGSERVICE" in done.stderr


def test_how_dates_are_written_and_read_is_ours_elsewhere_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PGTZ": "Asia/Tokyo", "PGDATESTYLE": "German", "PGCLIENTENCODING": "LATIN1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PGOPTIONS", "-c jit=on")
    engine = connect(json.loads((home / "stack.json").read_text())["database_url"])
    try:
        with engine.connect() as connection:
            for name, value in {"timezone": "UTC", "datestyle": "ISO, %", "jit": "off"}.items():
                shown = connection.exec_driver_sql(f"show {name}").scalar_one()
                assert shown.startswith(value.rstrip("%")), name
            assert connection.exec_driver_sql("select 'Łódź'").scalar_one() == "Łódź"
    finally:
        engine.dispose()
