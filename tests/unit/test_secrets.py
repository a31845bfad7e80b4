"""Secrets come from the environment or from files, and are never shown."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from flows.settings import SECRETS, WrongSetting, load_settings

PLANTED = "planted-7c1f"
VALUES = {
    "database_url": f"postgresql+psycopg://me:{PLANTED}@127.0.0.1/ledger",
    "reader_url": f"postgresql+psycopg://me:{PLANTED}@127.0.0.1/ledger",
    "prefect_database_url": f"postgresql+asyncpg://me:{PLANTED}@127.0.0.1/prefect",
    "prefect_auth": f"me:{PLANTED}",
}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("RUSHES_"):
            monkeypatch.delenv(name)


def plain(value: object) -> str:
    return value.get_secret_value() if hasattr(value, "get_secret_value") else str(value)  # pyright: ignore


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("way", ["value", "file"])
def test_a_secret_is_taken_and_never_shown(
    name: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = VALUES.get(name, PLANTED)
    (tmp_path / "secret").write_text(value + "\n")
    variable = f"RUSHES_{name.upper()}"
    monkeypatch.setenv(*((variable, value) if way == "value" else (f"{variable}_FILE", str(tmp_path / "secret"))))
    settings = load_settings(home=tmp_path / "home")
    assert plain(getattr(settings, name)) == value
    assert PLANTED not in f"{settings!r} {settings}"


@pytest.mark.parametrize("what", ["both", "missing", "empty", "binary"])
def test_a_file_that_cannot_be_the_secret_is_refused(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "secret"
    if what != "missing":
        file.write_bytes({"both": PLANTED.encode(), "empty": b" \n", "binary": b"\xff\xfe"}[what])
    monkeypatch.setenv("RUSHES_STORE_SECRET_KEY_FILE", str(file))
    if what == "both":
        monkeypatch.setenv("RUSHES_STORE_SECRET_KEY", PLANTED)
    with pytest.raises(WrongSetting, match="RUSHES_STORE_SECRET_KEY_FILE=") as caught:
        load_settings(home=tmp_path / "home")
    assert PLANTED not in str(caught.value)


def test_a_wrong_secret_is_not_repeated_in_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUSHES_DATABASE_URL", f"mysql://me:{PLANTED}@host/db")
    with pytest.raises(WrongSetting, match="RUSHES_DATABASE_URL") as caught:
        load_settings(home=tmp_path / "home")
    assert PLANTED not in str(caught.value)


def test_a_misspelt_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUSHES_STORE_SECRET_KEY_FIEL", str(tmp_path))
    with pytest.raises(WrongSetting, match="did you mean RUSHES_STORE_SECRET_KEY_FILE"):
        load_settings(home=tmp_path / "home")


def test_the_stacks_reader_does_not_ask_another_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, reader = (f"postgresql+psycopg://{login}:x@127.0.0.1/stack" for login in ("owner", "reader"))
    tmp_path.chmod(0o700)
    (tmp_path / "stack.json").write_text(json.dumps({"database_url": owner, "reader_url": reader}))
    assert load_settings(home=tmp_path).reader == reader
    elsewhere = VALUES["database_url"]
    monkeypatch.setenv("RUSHES_DATABASE_URL", elsewhere)
    assert load_settings(home=tmp_path).reader == elsewhere
    monkeypatch.setenv("RUSHES_READER_URL", VALUES["reader_url"])
    assert load_settings(home=tmp_path).reader == VALUES["reader_url"]
