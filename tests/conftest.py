"""What tests share: one Postgres a test process, and a fresh ledger for every test that asks for one."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.orm import Session, sessionmaker

    from infra.stack.postgres import Postgres

# A law that holds slowly holds: how long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("rushes", deadline=None)
hypothesis.settings.register_profile("chaos", deadline=None, max_examples=10_000)  # what `make chaos` fuzzes with
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "rushes"))

_numbers = itertools.count()


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """A server for this test process, gone with everything in it when the process is done."""
    from infra.stack.postgres import start_postgres, stop_postgres

    folder = tmp_path_factory.mktemp("postgres")
    in_memory = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "shared_buffers": "64MB"}
    server = start_postgres(folder, settings={**in_memory, "autovacuum": "off"})
    yield server
    stop_postgres(folder)


@pytest.fixture(scope="session")
def migrated_template(postgres: Postgres) -> str:
    """The name of a database with the schema and nothing in it, to be cloned."""
    from db.session import upgrade

    name = "template_ledger"
    _run(postgres, f"create database {name}")
    upgrade(_url(postgres, name))
    return name


@pytest.fixture(scope="session")
def clone(postgres: Postgres) -> Callable[[str], AbstractContextManager[str]]:
    """`with clone(template) as url:` is a database like `template`, for as long as the block."""

    @contextmanager
    def cloned(template: str) -> Generator[str]:
        name = f"{template}_{next(_numbers)}"
        _run(postgres, f"create database {name} template {template}")
        try:
            yield _url(postgres, name)
        finally:
            _run(postgres, f"drop database {name} with (force)")

    return cloned


@pytest.fixture
def empty_database_url(clone: Callable[[str], AbstractContextManager[str]]) -> Iterator[str]:
    """A database without any schema."""
    with clone("template1") as url:
        yield url


@pytest.fixture
def database_url(clone: Callable[[str], AbstractContextManager[str]], migrated_template: str) -> Iterator[str]:
    """A ledger of the newest schema, empty."""
    with clone(migrated_template) as url:
        yield url


@pytest.fixture
def database(database_url: str) -> Iterator[Engine]:
    from db.session import connect

    engine = connect(database_url, application="tests")
    yield engine
    engine.dispose()


@pytest.fixture
def ledger(database: Engine) -> sessionmaker[Session]:
    """Sessions on a ledger of the test's own: `with ledger.begin() as session:` is one transaction."""
    from db.session import sessions

    return sessions(database)


def _url(server: Postgres, database: str) -> str:
    return server.url.rsplit("/", 1)[0] + f"/{database}"


def _run(server: Postgres, statement: str) -> None:
    import psycopg

    with psycopg.connect(server.libpq_url, autocommit=True) as connection:
        connection.execute(statement.encode())
