"""Least privilege: what those may do who log in as members of the platform's roles, and what they may not."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest
from psycopg import errors, sql
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session, sessionmaker

from db.history import QUERIES
from db.ledger import cancel_request, finish_request, progress
from db.session import connect, sessions
from db.tables import Base
from tests.ledger import batch, claim, render


@contextmanager
def member(database_url: str, role: str) -> Iterator[str]:
    """The address for somebody who is in this role and in no other."""
    name, password = f"tester_{uuid.uuid4().hex[:12]}", uuid.uuid4().hex
    plain = database_url.replace("+psycopg", "")
    with psycopg.connect(plain, autocommit=True) as owner:
        made = sql.SQL("create role {} login password {} in role {}")
        owner.execute(made.format(sql.Identifier(name), sql.Literal(password), sql.Identifier(role)))
    head, _, place = plain.partition("://")[2].partition("@")
    assert head
    try:
        yield f"postgresql://{name}:{password}@{place}"
    finally:
        with psycopg.connect(plain, autocommit=True) as owner:
            owner.execute(sql.SQL("drop owned by {}").format(sql.Identifier(name)))
            owner.execute(sql.SQL("drop role {}").format(sql.Identifier(name)))


@pytest.fixture
def request_id(ledger: sessionmaker[Session]) -> str:
    with ledger.begin() as session:
        found = batch(session, "kept", 2)
        lease, clips = claim(session)
        render(session, lease, clips[0].clip_id)
        return found


def test_a_reader_sees_history_and_nothing_else(database_url: str, request_id: str) -> None:
    with member(database_url, "rushes_reader") as url, psycopg.connect(url, autocommit=True) as reader:
        rows = reader.execute("select status from history where request_id = %s order by 1", [request_id]).fetchall()
        assert rows == [("done",), ("queued",)]
        for question in QUERIES.values():
            reader.execute(question.encode())
        for table in Base.metadata.tables:
            with pytest.raises(errors.InsufficientPrivilege):
                reader.execute(sql.SQL("select 1 from {}").format(sql.Identifier(table)))


@pytest.mark.parametrize(
    "statement",
    [
        "update history set prompt = ''",
        "delete from history",
        "insert into clips (id) values ('a')",
        "update shards set owner = null",
        "create table mine (a int)",
        "create function f() returns int language sql as 'select 1'",
        "drop view history",
        "grant select on clips to public",
        "alter role current_user superuser",
        "copy history to '/tmp/history'",
        "select pg_read_file('/etc/passwd')",
    ],
)
def test_a_reader_changes_nothing(database_url: str, request_id: str, statement: str) -> None:
    refusals = (errors.InsufficientPrivilege, errors.ObjectNotInPrerequisiteState, errors.FeatureNotSupported)
    with (
        member(database_url, "rushes_reader") as url,
        psycopg.connect(url, autocommit=True) as reader,
        pytest.raises(refusals),
    ):
        reader.execute(statement.encode())


def test_the_app_runs_a_request_and_may_not_change_the_schema(database_url: str, request_id: str) -> None:
    with member(database_url, "rushes_app") as url:
        engine = connect(url)
        ledger = sessions(engine)
        with ledger.begin() as session:
            mine = batch(session, "mine", 2000)  # so many that statistics are taken, which is a right of its own
            lease, clips = claim(session)
            render(session, lease, clips[0].clip_id)
            assert progress(session, request_id).waiting == 1 and progress(session, mine).total == 2000
            cancel_request(session, mine)
            finish_request(session, mine)
        refused(engine, "create table mine (a int)", "drop table clips", "alter table clips add column a int",
                "truncate clips", "update alembic_version set version_num = '0001'", "drop view history")  # fmt: skip
        engine.dispose()


def refused(engine: Engine, *statements: str) -> None:
    for statement in statements:
        with pytest.raises(Exception, match=r"InsufficientPrivilege") as caught, engine.begin() as connection:
            connection.execute(text(statement))
        assert isinstance(caught.value.__cause__, errors.InsufficientPrivilege), statement
