"""Least privilege: what those may do who log in as members of the platform's roles, and what they may not."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg import errors, sql
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session, sessionmaker
from typer.testing import CliRunner

from db.ask import VIEWS
from db.history import SqlFailed, run_sql
from db.requests import cancel_request, finish_request, progress
from db.roles import make_reader
from db.session import connect, sessions, upgrade
from db.tables import Base
from flows.cli.main import app
from infra.stack.postgres import start_postgres, stop_postgres
from tests.documents import QUESTIONS
from tests.factories import batch, claim, new_clip, opened, planned, render


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


def test_a_reader_sees_the_views_and_nothing_else(database_url: str, request_id: str) -> None:
    with member(database_url, "rushes_reader") as url, psycopg.connect(url, autocommit=True) as reader:
        rows = reader.execute("select status from history where request_id = %s order by 1", [request_id]).fetchall()
        assert rows == [("done",), ("queued",)]
        for question in QUESTIONS.values():
            reader.execute(question.encode())
        for table in Base.metadata.tables:
            with pytest.raises(errors.InsufficientPrivilege):
                reader.execute(sql.SQL("select 1 from public.{}").format(sql.Identifier(table)))


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
        "select pg_advisory_lock(0x506c616e)",  # that planners wait for
        "select pg_try_advisory_xact_lock_shared(1, 2)",
        "select lo_create(0)",
        "select lo_from_bytea(0, 'x')",
        "create temporary table mine (a int)",
    ],
)
def test_a_reader_changes_nothing(database_url: str, request_id: str, statement: str) -> None:
    upgrade(database_url)  # a database's own grants do not come with a template
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
            mine = opened(session, [new_clip(k, recipe=("mine", k)) for k in range(2000)], key="mine", name="mine")
            planned(session, mine, size=1000)  # of so many clips statistics are taken, which is a right of its own
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


# What a statement may try that is one statement and changes nothing. `ts_stat` runs another one, which it is given as a
# text, and that is looked at only when the first is under way.
RETURN = "with free as materialized (select set_config('role', 'none', true) as role) "
WAYS_BACK = {
    "reset role": "result",
    "set role none": "result",
    "set session authorization default": "result",
    "select 1; reset role; select * from clips": "multiple commands",
    "select * from clips; reset role": "multiple commands",
    f"{RETURN}select count(*) from free, clips": "permission denied for table clips",
    f"{RETURN}select ts_stat('select to_tsvector(prompt) from clips' || left(role, 0)) from free": "permission denied",
    f"{RETURN}select ts_stat('select to_tsvector(pg_read_file(''/etc/passwd''))' || left(role, 0)) from free": (
        "permission denied"
    ),
}


@pytest.mark.parametrize("statement", WAYS_BACK)
def test_a_statement_does_not_get_back_to_more_rights(database_url: str, request_id: str, statement: str) -> None:
    """Asked through a reader's login there is nothing to get back to."""
    with member(database_url, "rushes_reader") as url:
        engine = connect(url)
        assert run_sql(engine, "select current_user").rows == [("rushes_reader",)]
        with pytest.raises(SqlFailed, match=WAYS_BACK[statement]):
            run_sql(engine, statement)
        assert run_sql(engine, "select current_user, count(*) from history").rows == [("rushes_reader", 2)]
        engine.dispose()


def test_a_login_that_may_not_become_the_reader_asks_with_its_own_rights(database_url: str, request_id: str) -> None:
    with member(database_url, "rushes_app") as url:
        engine = connect(url)
        assert run_sql(engine, "select count(*) from clips").rows == [(2,)]
        with pytest.raises(SqlFailed, match="read-only transaction"):
            run_sql(engine, "delete from clips")
        engine.dispose()


# Every privilege there is on every table, view and sequence of the schema that a role has, by whatever way it has it.
PRIVILEGES = """
select c.relname::text, p.name from pg_class c, unnest(cast(:names as text[])) as p (name)
where c.relnamespace = to_regnamespace(:schema) and case
    when c.relkind = 'S' then p.name in ('usage', 'select', 'update') and has_sequence_privilege(:role, c.oid, p.name)
    when c.relkind in ('r', 'v') then p.name <> 'usage' and (has_table_privilege(:role, c.oid, p.name)
        or p.name in ('select', 'insert', 'update', 'references') and has_any_column_privilege(:role, c.oid, p.name))
    else false end
"""
NAMES = ["select", "insert", "update", "delete", "truncate", "references", "trigger", "usage"]


def privileges(engine: Engine, role: str, schema: str = "public") -> set[tuple[str, str]]:
    with engine.connect() as connection:
        found = connection.execute(text(PRIVILEGES), {"role": role, "names": NAMES, "schema": schema})
        return {(row.relname, row.name) for row in found}


def rights(engine: Engine) -> None:
    """Asserts what each of the roles may do, no more and no less."""
    views = {(view.name.rpartition(".")[2], "select") for view in VIEWS}
    assert privileges(engine, "rushes_reader", "public") | privileges(engine, "rushes_reader", "ask") == views
    assert privileges(engine, "rushes_app", "ask") == views - {("history", "select")}
    tables = {name for name in Base.metadata.tables if name != "history"}
    of_app = privileges(engine, "rushes_app")
    assert {(name, way) for name, way in of_app if name in tables} == {
        (name, way) for name in tables for way in ("select", "insert", "update", "delete")
    }
    others = {(name, way) for name, way in of_app if name not in tables and way != "usage"}
    assert others == {("history", "select"), ("alembic_version", "select")}


# All that a login in rushes_reader may use beside what every database of Postgres gives: relations, schemas, functions
# of ours, and of Postgres' own the functions that leave something behind or hold somebody up.
REACHED = """
select 'relation', c.oid::regclass::text from pg_class c
where c.relnamespace not in ('pg_catalog'::regnamespace, 'information_schema'::regnamespace)
and c.relkind in ('r', 'v', 'm', 'p', 'f')
and has_any_column_privilege('rushes_reader', c.oid, 'select, insert, update')
union all
select 'schema', nspname from pg_namespace where nspname !~ '^pg_|^information_schema$'
and has_schema_privilege('rushes_reader', oid, 'usage')
union all
select 'creates in', nspname from pg_namespace where has_schema_privilege('rushes_reader', oid, 'create')
union all
select 'database', privilege from unnest(array['create', 'temporary']) privilege
where has_database_privilege('rushes_reader', current_database(), privilege)
union all
select 'function', p.oid::regprocedure::text from pg_proc p
where has_function_privilege('rushes_reader', p.oid, 'execute') and (
    pronamespace not in ('pg_catalog'::regnamespace, 'information_schema'::regnamespace)
    or proname ~ 'advisory|^lo_(creat|from|put|trunc|unlink|import|export)|^lowrite$|reload'
    or proname ~ '^pg_(read|ls|write)_.*(file|dir)')
-- likeness of words, which reads no table
and not exists (select from pg_depend d join pg_extension e on e.oid = d.refobjid
                where d.objid = p.oid and d.deptype = 'e' and extname = 'pg_trgm')
"""


def test_what_the_reader_reaches_is_what_is_promised(database: Engine, database_url: str) -> None:
    upgrade(database_url)
    with database.connect() as connection:
        reached = {tuple(row) for row in connection.execute(text(REACHED))}
    triggers = {("function", "tally(boolean,clips)"), ("function", "tally_clips()")}  # of tables it cannot read
    assert reached - triggers == {
        *(("relation", view.name) for view in VIEWS),
        ("schema", "public"),
        ("schema", "ask"),
    }


def test_the_roles_may_do_at_head_what_is_said_and_nothing_else(database: Engine) -> None:
    rights(database)


def test_a_view_or_table_that_a_migration_makes_anew_has_its_grants(database: Engine, database_url: str) -> None:
    with database.begin() as connection:
        said = connection.scalar(text("select pg_get_viewdef('history'::regclass)"))
        connection.execute(text("drop view history"))
        connection.exec_driver_sql(f"create view history as {said}".replace("%", "%%"))
        connection.execute(text("revoke all on attempts from rushes_app"))
    assert ("history", "select") not in privileges(database, "rushes_reader")
    assert ("history", "delete") in privileges(database, "rushes_app"), "the default for all that is made"
    assert upgrade(database_url) == ()
    rights(database)
    before = row_versions(database)
    assert upgrade(database_url) == ()
    assert row_versions(database) == before, "nothing lacked, and yet grants were written"


def row_versions(engine: Engine) -> set[tuple[str, str]]:
    with engine.connect() as connection:
        rows = connection.execute(text("select oid::text, xmin::text from pg_class union select oid::text, xmin::text "
                                       "from pg_namespace"))  # fmt: skip
        return {(row[0], row[1]) for row in rows}


@pytest.fixture
def plain_owner(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """A login that owns a database and may do nothing else, and its administrator; nobody has made a role there."""
    server = start_postgres(tmp_path / "postgres", settings={"fsync": "off"})
    try:
        with psycopg.connect(server.libpq_url, autocommit=True) as administrator:
            administrator.execute("create role studio login password 'plain'")
            administrator.execute("create database studio owner studio")
        place = f"@127.0.0.1:{server.port}/studio"
        yield f"postgresql://studio:plain{place}", server.url.rpartition("/")[0] + "/studio"
    finally:
        stop_postgres(tmp_path / "postgres")


def test_who_may_not_make_roles_migrates_and_is_told_what_an_administrator_must_do(
    plain_owner: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    owner, administrator = plain_owner
    monkeypatch.setenv("RUSHES_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RUSHES_DATABASE_URL", owner)
    told = CliRunner().invoke(app, ["migrate"], prog_name="rushes")
    assert told.exit_code == 0, told.output
    assert told.stdout == "The ledger is up to date.\n"
    statements = [line.strip() for line in told.stderr.splitlines()[1:]]
    assert statements[:2] == ["create role rushes_app nologin;", "create role rushes_reader nologin;"]
    grant, revoke = statements[2:]  # what Postgres gives to everybody, and an administrator alone can take
    assert grant.startswith("grant execute on function pg_advisory_lock(") and grant.endswith("with grant option;")
    assert revoke.startswith("revoke execute on function lo_creat(integer), ") and revoke.endswith(" from public;")
    assert "an administrator has to run this, and then `rushes migrate` again" in told.stderr

    engine = connect(administrator)
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
    assert privileges(engine, "rushes_reader") == set()
    told = CliRunner().invoke(app, ["migrate"], prog_name="rushes")
    assert (told.exit_code, told.stderr) == (0, "")
    rights(engine)
    engine.dispose()

    with member(administrator, "rushes_app") as url:
        app_login = connect(url)
        with sessions(app_login).begin() as session:
            batch(session, "theirs", 2)
            lease, clips = claim(session)
            render(session, lease, clips[0].clip_id)
        refused(app_login, "drop table clips")
        assert upgrade(url) == (), "nothing lacks, so nothing is tried that only the owner may do"
        app_login.dispose()
    with member(administrator, "rushes_reader") as url:
        reader = connect(url)
        assert sorted(run_sql(reader, "select status from history").rows) == [("done",), ("queued",)]
        reader.dispose()


def test_a_readers_login_is_made_and_its_password_changed(database_url: str) -> None:
    name = f"reader_{uuid.uuid4().hex[:12]}"
    place = database_url.partition("@")[2]
    try:
        for password in ("first", "first", "second"):
            url = f"postgresql+psycopg://{name}:{password}@{place}"
            make_reader(database_url, url)
            engine = connect(url)
            assert run_sql(engine, "select current_user, session_user").rows == [("rushes_reader", name)]
            engine.dispose()
            # As people and BI tools open it: a query that is forgotten ends, and short names do.
            with psycopg.connect(url.replace("+psycopg", "")) as reader:
                assert reader.execute("show statement_timeout").fetchone() == ("1min",)
                assert reader.execute("select count(*) from requests, usage, history").fetchone() == (0,)
        with pytest.raises(psycopg.OperationalError, match="password authentication"):
            psycopg.connect(f"postgresql://{name}:first@{place}").close()
    finally:
        with psycopg.connect(database_url.replace("+psycopg", ""), autocommit=True) as owner:
            owner.execute(sql.SQL("drop role {}").format(sql.Identifier(name)))
