"""What the documents say is so: names, commands and queries in them exist."""

import re
from pathlib import Path

import pytest
from typer.main import get_command

from db.history import COLUMNS, QUERIES
from flows.cli.main import app
from flows.settings import PREFIX, SECRETS, Settings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("question", QUERIES)
def test_readme_holds_the_queries_that_are_tested(question: str) -> None:
    assert f"**{question}**\n```sql\n{QUERIES[question]}\n```" in README


def test_settings_in_readme_exist() -> None:
    named = set(re.findall(rf"{PREFIX}[A-Z_]+", README))
    assert len(named) > 5
    files = {f"{PREFIX}{name.upper()}_FILE" for name in SECRETS}
    assert named <= {PREFIX + name.upper() for name in Settings.model_fields} | files


def test_commands_in_readme_exist() -> None:
    known = set(getattr(get_command(app), "commands"))  # noqa: B009  (a group has them, its type does not say so)
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S))
    said = set(re.findall(r"^rushes ([a-z]+)", blocks, re.M)) | set(re.findall(r"`rushes ([a-z]+)", README))
    assert {"up", "submit", "sql", "audit"} <= said <= known
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([a-z]+)", README)) <= targets


def test_files_named_in_the_documents_exist() -> None:
    paths = set(re.findall(r"`((?:flows|model|db|infra|tests|docs|examples)/[\w./]+)`", README + ARCHITECTURE))
    paths |= set(re.findall(r"\]\(((?!http)[\w./-]+)\)", README))
    assert len(paths) > 10
    assert [path for path in sorted(paths) if not (ROOT / path.partition(":")[0]).exists()] == []


def test_columns_that_others_rely_on() -> None:
    promised = "request_id clip_id custom_id prompt seed status attempts error object_key sha256 trace_id"
    assert set(promised.split()) <= set(COLUMNS)


def test_every_test_file_has_its_laws_in_the_table_and_every_name_in_the_table_is_a_test() -> None:
    named = re.findall(r"`(tests/\w+/\w+\.py)(?:::(\w+))?`", (ROOT / "docs" / "testing.md").read_text(encoding="utf-8"))
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("*/test_*.py")}
    assert files - {file for file, _ in named} == set(), "files without a law"
    for file, test in named:
        assert (ROOT / file).is_file(), file
        assert not test or f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{test}"
