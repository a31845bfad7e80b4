"""Logins: a wrong one is said at once, one that was changed is read again, and the schema is looked at first."""

from __future__ import annotations

import time
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError

from db.session import REVISION, WrongSchema, connect, is_refused, sessions
from flows.clients.ledger import Ledger, database, ledger
from flows.clients.retry import unavailable_service
from flows.settings import load_settings
from infra.store.s3 import S3Store

WRONG = {
    "password": ":not-the-password@",
    "login": "://nobody:secret@",
    "database": "/no-such-database",
}


@pytest.mark.parametrize("what", sorted(WRONG))
def test_a_wrong_login_is_no_ledger_that_is_away(what: str, database_url: str) -> None:
    scheme, _, rest = database_url.partition("://")
    account, _, place = rest.partition("@")
    wrong = {
        "password": f"{scheme}://{account.partition(':')[0]}{WRONG['password']}{place}",
        "login": f"{scheme}{WRONG['login']}{place}",
        "database": f"{database_url.rpartition('/')[0]}{WRONG['database']}",
    }[what]
    engine, began = connect(wrong), time.monotonic()
    with pytest.raises(OperationalError) as caught:
        Ledger(sessions(engine), seconds=900).read(lambda session: session.execute(text("select 1")))
    assert time.monotonic() - began < 60
    assert is_refused(caught.value) and unavailable_service(caught.value) is None
    engine.dispose()


def test_a_server_that_is_not_there_is_away() -> None:
    engine = connect("postgresql://a:b@127.0.0.1:1/c")
    with pytest.raises(OperationalError) as caught:
        engine.connect()
    assert unavailable_service(caught.value) == "the ledger" and not is_refused(caught.value)
    engine.dispose()


def test_a_changed_password_is_read_again_from_its_file(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    login, place = f"rotated_{tmp_path.name.replace('-', '_')}"[:60], database_url.rpartition("@")[2]
    file = tmp_path / "url"
    monkeypatch.setenv("RUSHES_DATABASE_URL_FILE", str(file))
    file.write_text(f"postgresql://{login}:first@{place}\n")
    with psycopg.connect(database_url.replace("+psycopg", ""), autocommit=True) as admin:
        admin.execute(f"create role {login} superuser login password 'first'".encode())
        try:
            settings = load_settings(home=tmp_path / "home")
            with database(settings) as engine:
                with engine.connect() as connection:
                    connection.execute(text("select 1"))
                engine.dispose()  # as the server's restart would end its connections
                admin.execute(f"alter role {login} password 'second'".encode())
                file.write_text(f"postgresql://{login}:second@{place}\n")
                with engine.connect() as connection:
                    assert connection.scalar(text("select current_user")) == login
                    assert connection.scalar(text("show jit")) == "off", "the other options stay"
        finally:
            admin.execute(f"drop role {login}".encode())


def test_keys_of_the_store_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "secret"
    file.write_text("first")
    monkeypatch.setenv("RUSHES_STORE_SECRET_KEY_FILE", str(file))
    told = {"store_url": "s3://bucket?endpoint=127.0.0.1:1&secure=false", "store_access_key": "rushes"}
    settings = load_settings(home=tmp_path / "home", **told)
    store = settings.open_store()
    assert isinstance(store, S3Store)
    first = store.link("a").rpartition("Signature=")[2]
    file.write_text("second")
    assert settings.store_keys() == ("rushes", "second")
    assert store.link("a").rpartition("Signature=")[2] != first
    file.write_text("")  # in the middle of being written
    assert settings.store_keys() == ("rushes", "first")


@pytest.mark.parametrize(
    ("there", "said"),
    [("9999", "newer than this program"), ("0000", "older than this program"), (None, "has no tables yet")],
)
def test_another_schema_is_refused_in_a_line(
    there: str | None, said: str, database: Engine, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("db.session.OLDER", ("0000",))
    with database.begin() as connection:
        change = f"update alembic_version set version_num = '{there}'" if there else "drop table alembic_version"
        connection.execute(text(change))
    settings = load_settings(home=tmp_path / "home", database_url=database_url)
    with ledger(settings) as ledgers, pytest.raises(WrongSchema, match=said) as caught, ledgers() as session:
        session.execute(text("select 1"))
    assert "\n" not in str(caught.value)
    if there:
        assert there in str(caught.value) and REVISION in str(caught.value)
