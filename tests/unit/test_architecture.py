"""The house rules that no other test would notice. Who may import whom is import-linter's (pyproject.toml)."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from infra.stack.deploy import read_deployments
from infra.stack.home import DEPLOYMENTS, POOLS

REPOSITORY = Path(__file__).parents[2]
ARCHITECTURE = (REPOSITORY / "ARCHITECTURE.md").read_text(encoding="utf-8")
PACKAGES = ("flows", "model", "db", "infra")
# alembic's own command line has no other way to be told where the ledger is
READERS = {"flows/settings.py", "db/migrations/env.py"}


def modules() -> Iterator[Path]:
    for package in PACKAGES:
        yield from (REPOSITORY / package).rglob("*.py")


def names_read(tree: ast.AST) -> Iterator[str]:
    """Every name that code reads from the environment, as far as it is written out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            where, key = node.value, node.slice
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            where, key = node.func if node.func.attr == "getenv" else node.func.value, node.args[0]
        else:
            continue
        if ast.unparse(where) in ("os.environ", "os.getenv") and isinstance(key, ast.Constant):
            yield str(key.value)


def test_settings_are_read_in_one_place() -> None:
    readers = {
        f"{path.relative_to(REPOSITORY)} reads {name}"
        for path in modules()
        if str(path.relative_to(REPOSITORY)) not in READERS
        for name in names_read(ast.parse(path.read_text()))
        if name.startswith("RUSHES_")
    }
    assert readers == set()


def test_the_search_for_readers_finds_them() -> None:
    tree = ast.parse("import os\nos.environ['A']\nos.environ.get('B', 1)\nos.getenv('C')\nos.environ['D'] = ''")
    assert sorted(names_read(tree)) == ["A", "B", "C"]


def test_only_engines_and_training_load_torch() -> None:
    modules = "flows.cli.main, flows.generate.flow, flows.operate.maintenance"
    program = f"import json, sys, {modules}; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert {"torch", "deepspeed", "diffusers", "transformers"} & set(json.loads(done.stdout.splitlines()[-1])) == set()


def test_deployments_name_flows_that_exist() -> None:
    for deployment in read_deployments(DEPLOYMENTS):
        module, _, function = deployment.entrypoint.rpartition(".")
        tree = ast.parse((REPOSITORY / f"{module.replace('.', '/')}.py").read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert function in functions, f"{deployment.full_name}: no {function} in {module}"
        assert deployment.pool in POOLS


def test_the_map_names_every_file() -> None:
    rows = re.findall(r"^\| `([\w/]+)` \| (.*) \|$", ARCHITECTURE, re.M)
    said = {f"{room}/{file}" for room, text in rows for file in re.findall(r"`(\w+)`", text)}
    said |= {f"{room.partition('/')[0]}/{file}" for room, text in rows for file in beside(text)}
    there = {str(path.relative_to(REPOSITORY).with_suffix("")) for path in modules()}
    there = {name for name in there if not re.search(r"__\w+__$|^db/migrations/", name)}
    assert there - said == set(), "ARCHITECTURE.md's map lacks files"
    rooms = {name.rpartition("/")[0] for name in there}
    assert {room for room, _ in rows if room in rooms} == rooms - {"flows", "model", "infra"}
    gone = {f"{room}/{file}" for room, text in rows if room in rooms for file in own(text)} - there
    assert gone == set(), "ARCHITECTURE.md's map names files that are not there"


def own(row: str) -> list[str]:
    """Files that a row of the map names of its own room: `file`, as opposed to `a.b` or `A B`."""
    return re.findall(r"`([a-z][a-z0-9_]*)`", row.partition("Beside it")[0])


def beside(row: str) -> list[str]:
    """Files that a row of the map names beside its room, in the package itself."""
    return re.findall(r"`([a-z][a-z0-9_]*)`", row.partition("Beside it")[2])


def docstrings() -> Iterator[tuple[str, str]]:
    """Every docstring of the packages, with its place."""
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = getattr(node, "name", "the module")
                yield f"{path.relative_to(REPOSITORY)}: {name}", ast.get_docstring(node) or ""


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    said = list(docstrings())
    assert len(said) > 1000
    dialect = re.compile(r"\AWhat\b|\b(?:who|what|whom)ever\b", re.I)
    assert [place for place, text in said if dialect.search(text)] == []


def test_the_first_reading_names_what_is_there() -> None:
    (reading,) = re.findall(r"^## A first reading\n(.*?)^## ", ARCHITECTURE, re.M | re.S)
    found = 0
    for path, names in re.findall(r"`([\w/]+\.py)`((?:(?!`[\w/]+\.py`).)*)", reading, re.S):
        source = (REPOSITORY / path).read_text()
        for name in re.findall(r"`([A-Z]\w*\.\w+|\w+)`", names):
            found += 1
            for part in name.split("."):
                assert re.search(rf"^ *(def |class )?{part}\b( =|\(|:)", source, re.M), f"{path} has no {name}"
    assert found > 5
