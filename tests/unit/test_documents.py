"""Names, commands, files and queries in the documents exist, and the front page stays short."""

import re
from collections.abc import Iterator

import pytest
from typer.main import get_command

from db.view import COLUMNS
from flows.cli.main import app
from flows.settings import PREFIX, SECRETS, Settings
from tests.documents import DOCUMENTS, QUESTIONS, ROOT, sql_questions

README = DOCUMENTS["README.md"]
# The history of the project may name what is no longer there.
OF_TODAY = {name: text for name, text in DOCUMENTS.items() if name != "CHANGELOG.md"}
each_document = pytest.mark.parametrize("name", OF_TODAY)


def test_readme_is_read_in_three_minutes() -> None:
    assert len(README.splitlines()) <= 160


def test_readme_asks_two_of_the_twenty_questions() -> None:
    asked = sql_questions("README.md")
    assert len(asked) == 2 and asked.items() <= QUESTIONS.items()
    blocks = len(re.findall(r"^```sql$", DOCUMENTS["docs/questions.md"], re.M))
    assert len(QUESTIONS) == blocks == 20


def test_the_important_settings_are_explained() -> None:
    named = set(re.findall(rf"`({PREFIX}[A-Z_]+)`", DOCUMENTS["docs/production.md"]))
    assert {"RUSHES_HOME", "RUSHES_STORE_URL", "RUSHES_PARTITION", "RUSHES_MODEL"} <= named


@each_document
def test_settings_exist(name: str) -> None:
    known = {PREFIX + field.upper() for field in Settings.model_fields}
    known |= {f"{PREFIX}{secret.upper()}_FILE" for secret in SECRETS}
    assert set(re.findall(rf"`({PREFIX}[A-Z_]*[A-Z])(?:=[^`]*)?`", OF_TODAY[name])) - known == set()


@each_document
def test_commands_exist(name: str) -> None:
    known = set(getattr(get_command(app), "commands"))  # noqa: B009  (a group has them, its type does not say so)
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", OF_TODAY[name], re.S))
    said = set(re.findall(r"^rushes ([a-z]+)", blocks, re.M)) | set(re.findall(r"`rushes ([a-z]+)", OF_TODAY[name]))
    assert said - known == set()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    made = set(re.findall(r"`make ([a-z]+)", OF_TODAY[name])) | set(re.findall(r"^make ([a-z]+)", blocks, re.M))
    assert made - targets == set()


def test_readme_shows_the_way() -> None:
    for command in ("make demo", "make test", "rushes up", "rushes submit", "rushes audit"):
        assert re.search(rf"^{command}\b", README, re.M), command


def files_named(text: str) -> Iterator[str]:
    """Every path of the repository that stands in code quotes, braces expanded: `a/{b,c}.py` is two."""
    for path in re.findall(r"`((?:flows|model|db|infra|tests|docs|examples)/[\w./{},*-]*)", text):
        head, _, rest = path.partition("{")
        inner, _, tail = rest.partition("}")
        yield from (head + part + tail for part in inner.split(","))


@each_document
def test_files_exist(name: str) -> None:
    gone = [path for path in sorted(set(files_named(OF_TODAY[name]))) if not list(ROOT.glob(path.rstrip("/")))]
    folder = (ROOT / name).parent
    links = re.findall(r"\]\(((?!http)[\w./-]+)(?:#[\w-]*)?\)", OF_TODAY[name])
    assert gone + [link for link in links if not (folder / link).exists()] == []


def test_the_search_for_files_finds_them() -> None:
    assert list(files_named("`db/{a,b}.py` and `model/no.py`, not flows/c.py")) == ["db/a.py", "db/b.py", "model/no.py"]


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
