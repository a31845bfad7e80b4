"""The schema: the migrations make what the models say, up and down, whoever else starts at the same time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import OperationalError
from sqlalchemy.types import to_instance

from db.session import connect, downgrade, upgrade
from db.tables import Base
from db.view import COLUMNS, HISTORY

ROOT = Path(__file__).parents[2]

# Everything a schema consists of, as the database itself spells it.
CATALOGS = {
    "columns": """
        select table_name, column_name, data_type, is_nullable, column_default, is_identity
        from information_schema.columns where table_schema = 'public' and table_name <> 'history'""",
    "constraints": """
        select conrelid::regclass::text, conname, pg_get_constraintdef(oid) from pg_constraint
        where connamespace = 'public'::regnamespace""",
    "indexes": "select tablename, indexname, indexdef from pg_indexes where schemaname = 'public'",
    "enums": "select t.typname, e.enumlabel, e.enumsortorder from pg_enum e join pg_type t on t.oid = e.enumtypid",
}


def catalogs(engine: Engine) -> dict[str, set[tuple[object, ...]]]:
    with engine.connect() as connection:
        found = {name: {tuple(row) for row in connection.execute(text(sql))} for name, sql in CATALOGS.items()}
    return {name: {row for row in rows if "alembic_version" not in row} for name, rows in found.items()}


def test_models_and_migrations_agree(database: Engine) -> None:
    with database.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []


def test_models_and_migrations_agree_in_what_alembic_does_not_compare(
    database: Engine, empty_database_url: str
) -> None:
    engine = connect(empty_database_url)
    Base.metadata.create_all(engine)
    modelled, migrated = catalogs(engine), catalogs(database)
    engine.dispose()
    for name in CATALOGS:
        assert migrated[name] == modelled[name], name


def test_up_down_and_up_again(empty_database_url: str) -> None:
    engine = connect(empty_database_url)
    upgrade(empty_database_url)
    first = catalogs(engine)
    downgrade(empty_database_url, "base")
    assert all(rows == set() for rows in catalogs(engine).values())
    upgrade(empty_database_url)
    assert catalogs(engine) == first
    engine.dispose()


def test_the_view_has_the_columns_that_are_documented(database: Engine) -> None:
    described = """
        select attname, format_type(atttypid, atttypmod) from pg_attribute
        where attrelid = to_regclass('history') and attnum > 0 order by attnum"""
    with database.connect() as connection:
        there = [tuple(row) for row in connection.execute(text(described))]
    dialect = postgresql.dialect()
    assert there == [(name, to_instance(column.kind).compile(dialect).lower()) for name, column in COLUMNS.items()]


def test_every_view_and_column_explains_itself(database: Engine) -> None:
    """In the words of the one list, so that psql's \\d+ and BI tools show them."""
    described = """
        select c.relname, a.attname, obj_description(c.oid, 'pg_class'), col_description(c.oid, a.attnum)
        from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attnum > 0
        where c.relkind = 'v' and c.relnamespace not in ('pg_catalog'::regnamespace, 'information_schema'::regnamespace)
    """
    with database.connect() as connection:
        rows = [tuple(row) for row in connection.execute(text(described))]
    assert [row for row in rows if not row[2] or not row[3]] == []
    assert {row[1]: row[3] for row in rows if row[0] == "history"} == {
        name: column.means for name, column in COLUMNS.items()
    }
    assert {row[2].rpartition(" [")[0] for row in rows if row[0] == "history"} == {HISTORY.means}


def test_a_view_is_made_anew_when_its_words_or_its_query_change(database: Engine, database_url: str) -> None:
    shown = text("select oid, obj_description(oid, 'pg_class') from pg_class where relname = 'history'")
    with database.begin() as connection:
        before = connection.execute(shown).one()
    upgrade(database_url)
    with database.begin() as connection:
        assert connection.execute(shown).one() == before, "as it should be, and yet made anew"
        connection.exec_driver_sql(f"comment on view history is '{HISTORY.means} [0123456789ab]'")
    upgrade(database_url)
    with database.begin() as connection:
        oid, comment = connection.execute(shown).one()
    assert oid != before.oid and comment == before[1]


def test_the_command_line_upgrades_from_nothing_and_two_starters_take_turns(
    empty_database_url: str, tmp_path: Path
) -> None:
    alembic = [sys.executable, "-m", "alembic", "-c", str(ROOT / "alembic.ini")]
    by_variable = {**os.environ, "RUSHES_DATABASE_URL": empty_database_url}
    without = {name: value for name, value in os.environ.items() if name != "RUSHES_DATABASE_URL"}
    starters = [
        subprocess.Popen([*alembic, "upgrade", "head"], cwd=tmp_path, env=by_variable, stderr=subprocess.PIPE),
        subprocess.Popen([*alembic, "-x", f"url={empty_database_url}", "upgrade", "head"], cwd=tmp_path, env=without,
                         stderr=subprocess.PIPE),
    ]  # fmt: skip
    said = [starter.communicate(timeout=300)[1].decode() for starter in starters]
    assert [starter.returncode for starter in starters] == [0, 0], said
    assert sum("Running upgrade" in text for text in said) == 1, said


def test_no_database_named_is_said_so(tmp_path: Path) -> None:
    without = {name: value for name, value in os.environ.items() if name != "RUSHES_DATABASE_URL"}
    command = [sys.executable, "-m", "alembic", "-c", str(ROOT / "alembic.ini"), "current"]
    done = subprocess.run(command, cwd=tmp_path, env=without, capture_output=True, text=True)
    assert done.returncode == 1
    assert "set RUSHES_DATABASE_URL" in done.stderr


def test_a_migration_gives_up_rather_than_queue_behind_a_lock(database: Engine, database_url: str) -> None:
    with database.connect() as reader, reader.begin():
        reader.execute(text("select count(*) from clips"))
        with pytest.raises(OperationalError, match="lock timeout"):
            downgrade(database_url, "base")
    with database.connect() as connection:
        assert connection.scalar(text("select count(*) from history")) == 0
