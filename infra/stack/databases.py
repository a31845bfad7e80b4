"""The two databases of the local stack on its one Postgres: the ledger's and Prefect's."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from infra.libpq import without_libpq
from infra.stack.home import StackFailed
from infra.stack.postgres import Database, Postgres, client_command, client_program, connect

PREFECT_POOL = 15  # connections of a Prefect server at most, the default of its settings

# Its owner makes the platform's roles and the login of those who ask.
LEDGER = Database(name="rushes", makes_roles=True, keeps_locks=True)
# Prefect's rows are not the truth about any clip, and it writes them without end (events, signs of life). So none of
# its commits waits for the disk, where the ledger's commits would queue behind it; a crash of the machine may cost it
# its last half second. Twice its pool: when it is killed and started anew, the server still holds what it left behind.
PREFECT = Database(name="prefect", most_connections=2 * PREFECT_POOL + 5, settings={"synchronous_commit": "off"})

# Counted at a request with its engine: 10 connections, 7 to 9 of them Prefect's. At most there can be 35 of Prefect
# and 15 (SQLAlchemy's pools) of each process of ours: with 8 flow runs of the control pool and 9 engines 290.
POSTGRES_SETTINGS = {"max_connections": "300"}


def prefect_url(postgres: Postgres) -> str:
    """The address of Prefect's database as its server wants it."""
    return postgres.url_of(PREFECT.name).replace("+psycopg", "+asyncpg", 1)


def supply_prefect(postgres: Postgres, migrate: Callable[[], None]) -> None:
    """Give an empty database of Prefect's its tables: from a dump kept in the virtual environment, since `migrate`,
    which makes them, takes 5 s. Where no dump can be kept, the server makes them at its start.
    """
    if sys.prefix == sys.base_prefix or not os.access(sys.prefix, os.W_OK):
        return
    address = postgres.url_of(PREFECT.name)
    with connect(address) as session:
        if session.execute("select to_regclass('alembic_version')").fetchone() != (None,):
            return
        major = session.info.server_version // 10000
    dump = Path(sys.prefix, "share", "rushes", f"prefect-{metadata.version('prefect')}-postgres-{major}.sql")
    if dump.exists():
        _run("psql", address, "--no-psqlrc", "--single-transaction", "--set=ON_ERROR_STOP=1", f"--file={dump}")
        return
    migrate()
    dump.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dump.parent) as scratch:
        made = Path(scratch, "prefect.sql")
        _run("pg_dump", address, "--no-owner", "--no-privileges", "--no-comments", f"--file={made}")
        made.replace(dump)


def _run(program: str, address: str, *options: str) -> None:
    command, environment = client_command(client_program(program), address, *options)
    own = {**without_libpq(os.environ), **environment}
    done = subprocess.run(command, env=own, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise StackFailed(f"the Prefect server's database could not be made: {program}: {said[-2000:]}")
