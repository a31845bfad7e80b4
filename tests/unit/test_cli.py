"""The command line without a stack: help, bad input, exit codes, and what each command must not load."""

from __future__ import annotations

import csv
import io
import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from db.requests import RequestNotFound
from flows.cli.errors import exit_code_of
from flows.cli.main import app
from flows.cli.options import seconds_of
from flows.render.worker import machine
from flows.request.form import GenerationRequest
from flows.settings import WrongSetting, load_settings
from flows.show import plain, printable, show_one, show_rows
from infra.store.contract import StoreUnavailable
from model.engine.clip import RankDied

ROOT = Path(__file__).parents[2]
SHAPE = {"width": 64, "height": 64, "frames": 17, "fps": 8, "steps": 25, "guidance": 4.0, "solver": "ab2", "shift": 2.0}
TRANSFORMER = {
    "num_layers": 1,
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "ffn_dim": 16,
    "text_dim": 8,
    "in_channels": 16,
    "out_channels": 16,
    "freq_dim": 16,
    "patch_size": [1, 2, 2],
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home folder with a model folder beside it: submitting reads a model's configuration, never its weights."""
    model = tmp_path / "model"
    for name, config in {"transformer": TRANSFORMER, "vae": {"_class_name": "CausalVideoVAE"}}.items():
        (model / name).mkdir(parents=True)
        (model / name / "config.json").write_text(json.dumps(config))
    (model / "rushes.json").write_text(json.dumps({"name": "small", "max_prompt_tokens": 32, **SHAPE}))
    return tmp_path / "home"


@pytest.fixture(autouse=True)
def elsewhere(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run beside their files and with no settings of the machine's."""
    for name in os.environ:
        if name.startswith("RUSHES_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(home.parent)
    for name, value in settings_of(home).items():
        monkeypatch.setenv(name, value)


def settings_of(home: Path) -> dict[str, str]:
    return {"RUSHES_HOME": str(home), "RUSHES_MODEL": str(home.parent / "model"), "COLUMNS": "100"}


@dataclass(frozen=True)
class Done:
    code: int
    stdout: str
    stderr: str


def rushes(*arguments: str, input: str | bytes | None = None, env: dict[str, str] | None = None) -> Done:
    """Runs a command in this process."""
    done = CliRunner().invoke(app, arguments, input=input, env=env, prog_name="rushes")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception  # a traceback is what the user would have seen
    return Done(done.exit_code, done.stdout, done.stderr)


def rushes_process(*arguments: str) -> Done:
    """Runs a command as a person does."""
    command = [sys.executable, "-m", "flows.cli.main", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, env=env, timeout=120)
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


def loaded_after(code: str) -> set[str]:
    """Which of the heavy packages are in memory after running `code`."""
    heavy = ["torch", "prefect", "sqlalchemy", "pydantic", "httpx", "minio", "numpy", "deepspeed", "transformers"]
    script = f"{code}\nimport sys; print('LOADED', *[m for m in {heavy} if m in sys.modules])"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert "LOADED" in done.stdout, done.stderr
    return set(done.stdout.rpartition("LOADED")[2].split())


HELP = (
    "import flows.cli.main\ntry:\n    flows.cli.main.app({arguments}, prog_name='rushes')\nexcept SystemExit:\n    pass"
)


def test_help_is_a_manual_page(home: Path) -> None:
    done = rushes_process("--help")
    assert done.code == 0
    for word in (
        "The stack",
        "Requests",
        "Questions",
        "Training",
        "Operation",
        "Examples",
        "Exit codes",
        "RUSHES_HOME",
        "--watch",
    ):
        assert word in done.stdout
    commands = """up down status doctor demo submit watch cancel retry export requests history show sql audit worker
        engine migrate deploy train recaption eval datasets"""
    for command in commands.split():
        assert f"│ {command} " in done.stdout
    assert rushes().stdout.split() == done.stdout.split()  # no arguments: the same page
    assert not home.exists()  # asking for help makes nothing


def test_help_loads_nothing_heavy_and_answers_at_once(home: Path) -> None:
    assert loaded_after(HELP.format(arguments=["--help"])) == set()
    # Processor time, since the clock on the wall also tells of the neighbours; a slow machine is measured against an
    # interpreter that does nothing.
    best = min(processor_seconds("-m", "flows.cli.main", "--help") for _ in range(4))
    idle = min(processor_seconds("-c", "pass") for _ in range(4))
    assert best < max(0.5, 12 * idle), (best, idle)


def processor_seconds(*arguments: str) -> float:
    """What Python took for these arguments, in all its threads."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, *arguments], check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_checking_a_file_never_loads_torch_or_prefect(home: Path) -> None:
    (home.parent / "p.jsonl").write_text('{"prompt": "a red ball"}\n')
    loaded = loaded_after(HELP.format(arguments=["submit", "p.jsonl"]))
    assert not loaded & {"torch", "prefect", "deepspeed", "transformers", "numpy"}


def test_every_error_of_a_file_is_told_and_nothing_is_submitted(home: Path) -> None:
    (home.parent / "prompts.jsonl").write_text(
        '{"prompt": "fine"}\n' * 11
        + '{"prompt": "a", "frames": 50}\n{"prompt": ""}\n{"prompt": "b", "size": "65x64"}\n'
    )
    done = rushes_process("submit", "prompts.jsonl")
    assert done.code == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "prompts.jsonl:12: frames=50 must be 4n+1 (49 or 53)",
        "prompts.jsonl:13: prompt is blank",
        "prompts.jsonl:14: size=65x64: width 65 must be a multiple of 16 (64 or 80)",
        "rushes: 3 errors in 3 of 14 lines: nothing was submitted; --skip-invalid goes on without these lines",
    ]
    assert not (home / "store").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["submit", "missing.jsonl"], "rushes: missing.jsonl: no such file"),
        (["submit", "."], "rushes: .: is not a file"),
        (["submit", "empty.jsonl"], "rushes: empty.jsonl: holds no prompts: write one JSON object a line"),
        (["submit", "good.jsonl", "--frames", "50"], "frames=50 must be 4n+1 (49 or 53)"),
        (["submit", "good.jsonl", "--size", "65x64"], "width=65 must be a multiple of 16 (64 or 80)"),
        (["submit", "good.jsonl", "--size", "big"], "rushes: --size 'big' must be WIDTHxHEIGHT, like 96x64"),
        (["submit", "good.jsonl", "--guidance", "nan"], "rushes: --guidance nan: input should be"),
        (["submit", "good.jsonl", "--seed", "-1"], "rushes: --seed -1: input should be greater than or equal to 0"),
        (
            ["submit", "good.jsonl", "--priority", "10"],
            "rushes: --priority 10: input should be less than or equal to",
        ),
        (["submit", "good.jsonl", "--tenant", "a/b"], "rushes: --tenant a/b: string should match"),
        (["submit", "good.jsonl", "--model", "nothing"], "rushes: model 'nothing' is neither shipped"),
        (["submit", "bad.jsonl", "--skip-invalid"], "bad.jsonl:1: prompt is blank"),
        (["history", "--since", "yesterday"], "rushes: --since 'yesterday' must be a number and s, m, h, d or w"),
        (["history", "--columns", "statsu"], "rushes: --columns: no column 'statsu' in history: did you mean status?"),
        (["sql", " "], "rushes: the query is empty"),
        (["reproduce"], "rushes: name either clips or a --request"),
        (["reproduce", "req_0-000000-0", "--request", "mine"], "rushes: name either clips or a --request"),
        (["reproduce", "req_0-000000-0", "--sample", "3"], "rushes: --sample draws from the clips of a --request"),
    ],
)
def test_bad_input_is_exit_code_2_and_lines_without_a_traceback(home: Path, arguments: list[str], message: str) -> None:
    (home.parent / "good.jsonl").write_text('{"prompt": "a red ball"}\n')
    (home.parent / "bad.jsonl").write_text('{"prompt": ""}\n')
    (home.parent / "empty.jsonl").write_text("")
    done = rushes(*arguments, env={"RUSHES_DATABASE_URL": "postgresql://127.0.0.1:1/none"})
    assert done.code == 2, done
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["submit", "good.jsonl"],
        ["watch", "req_0123456789ab"],
        ["cancel", "req_0123456789ab"],
        ["retry", "req_0123456789ab"],
        ["export", "req_0123456789ab", "clips"],
        ["requests"],
        ["history"],
        ["show", "req_0123456789ab-000000-0"],
        ["sql", "select 1"],
        ["audit"],
        ["engine"],
        ["worker", "gpu"],
        ["migrate"],
        ["deploy"],
    ],
)
def test_without_a_stack_every_command_says_how_to_start_one(home: Path, arguments: list[str]) -> None:
    (home.parent / "good.jsonl").write_text('{"prompt": "a red ball"}\n')
    done = rushes(*arguments)
    assert done.code == 1, done
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"rushes: no stack is running under {home} and RUSHES_")
    assert line.endswith("is not set: start one with `rushes up`")


@pytest.mark.parametrize("arguments", [["sql", "select 1"], ["history"], ["migrate"]])
def test_a_ledger_that_does_not_answer_is_one_line(home: Path, arguments: list[str]) -> None:
    done = rushes(*arguments, env={"RUSHES_DATABASE_URL": "postgresql://rushes:secret@127.0.0.1:1/rushes"})
    assert done.code == 1, done
    (line,) = done.stderr.splitlines()
    assert line.startswith("rushes: the ledger does not answer (")
    assert "secret" not in line


def test_a_prefect_server_that_does_not_answer_is_one_line_and_leaves_nothing(home: Path) -> None:
    (home.parent / "good.jsonl").write_text('{"prompt": "a red ball"}\n')
    done = rushes("submit", "good.jsonl", env={"RUSHES_PREFECT_API_URL": "http://127.0.0.1:1/api"})
    assert done.code == 1, done
    (line,) = done.stderr.splitlines()
    assert line.startswith("rushes: the Prefect server at http://127.0.0.1:1/api does not answer")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RUSHES_LEASE_SECONDS", "soon", "RUSHES_LEASE_SECONDS=soon: input should be a valid number"),
        ("RUSHES_ENGINES", "-1", "RUSHES_ENGINES=-1: input should be greater than or equal to 0"),
        ("RUSHES_DEVICE", "tpu", "RUSHES_DEVICE=tpu: input should be 'cpu' or 'cuda'"),
        ("RUSHES_COMPILE", "fast", "RUSHES_COMPILE=fast: must be true, false or reduce-overhead"),
        ("RUSHES_PARTITION", "tp=x", "RUSHES_PARTITION=tp=x: partition 'tp=x' must look like tp=2"),
        ("RUSHES_PARTITION", "auto", "RUSHES_PARTITION=auto needs RUSHES_GPUS, like 8xh200 or 2xcpu, to plan for"),
        ("RUSHES_GPUS", "8xtpu", "RUSHES_GPUS=8xtpu: the GPUs '8xtpu' must be a number and a kind, like 8xh200"),
        ("RUSHES_GPUS", "8xh200", "RUSHES_GPUS=8xh200 does not go with RUSHES_DEVICE=cpu"),
        ("RUSHES_STORE_URL", "ftp://x", "RUSHES_STORE_URL=ftp://x: must begin with file:/// or s3://"),
        ("RUSHES_PREFECT_API_URL", "localhost:4200", "RUSHES_PREFECT_API_URL=localhost:4200: must be an http"),
        ("RUSHES_DATABASE_URL", "mysql://u:secret@h/d", "RUSHES_DATABASE_URL: must begin with postgresql+psycopg://"),
        ("RUSHES_LEASE_SECS", "3", "RUSHES_LEASE_SECS is not a setting: did you mean RUSHES_LEASE_SECONDS?"),
        ("RUSHES_HOME", "/dev/null", "RUSHES_HOME=/dev/null: is not a folder"),
        ("RUSHES_HOME", "/dev/null/x", "RUSHES_HOME=/dev/null/x: is not a folder"),
    ],
)
def test_a_wrong_setting_stops_the_program_and_is_named(home: Path, name: str, value: str, message: str) -> None:
    done = rushes("history", env={name: value})
    assert done.code == 2, done
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"rushes: {message}")
    assert "secret" not in line


def test_the_home_folder_is_the_owners_alone(home: Path) -> None:
    rushes("history")
    assert home.stat().st_mode & 0o777 == 0o700
    home.chmod(0o755)
    rushes("history")
    assert home.stat().st_mode & 0o777 == 0o700  # empty, so ours to tighten


def test_a_folder_that_holds_other_things_is_never_tightened(home: Path) -> None:
    home.mkdir(mode=0o755)
    home.chmod(0o755)
    (home / "letters.txt").touch()
    done = rushes("history")
    assert done.code == 2
    assert "others may enter it (mode 0755) and it holds other things" in done.stderr
    assert home.stat().st_mode & 0o777 == 0o755


def test_settings_come_from_the_environment_then_the_stack_then_the_default(home: Path) -> None:
    home.mkdir(mode=0o700)
    stack = {"prefect_api_url": "http://127.0.0.1:4/api", "store_url": "file:///there", "ports": {"x": 4}, "pids": {}}
    (home / "stack.json").write_text(json.dumps(stack))
    code = "from flows.settings import load_settings as l; s = l(); print(s.prefect_api, s.store, s.threads, s.prompts)"
    env = {**os.environ, "RUSHES_HOME": str(home), "PYTHONPATH": str(ROOT), "RUSHES_STORE_URL": "file:///here"}
    said = subprocess.check_output([sys.executable, "-c", code], env=env, text=True).split()
    assert said == ["http://127.0.0.1:4/api", "file:///here", "1", str(home / "prompts")]
    (home / "stack.json").write_text("{")
    assert "stack.json cannot be read" in rushes("history").stderr


@pytest.mark.parametrize(("said", "meant"), [("1", True), ("false", False), ("reduce-overhead", "reduce-overhead")])
def test_blocks_are_compiled_in_one_of_two_ways(
    home: Path, monkeypatch: pytest.MonkeyPatch, said: str, meant: bool | str
) -> None:
    monkeypatch.setenv("RUSHES_HOME", str(home))
    monkeypatch.setenv("RUSHES_COMPILE", said)
    settings = load_settings()
    assert settings.compile is meant or settings.compile == meant
    assert ("compiled" in machine(settings)) is bool(meant)
    assert ("reduce-overhead" in machine(settings)) is (said == "reduce-overhead")


def test_standard_input_and_csv_and_text_are_prompt_files(home: Path) -> None:
    done = rushes("submit", "-", input='{"prompt": "a", "frames": 2}\n')
    assert done.stderr.splitlines()[0] == "stdin:1: frames=2 must be 4n+1 (1 or 5)"
    (home.parent / "p.csv").write_text("prompt,seed\na,-1\n")
    assert rushes("submit", "p.csv").stderr.startswith("p.csv:2: seed=-1 must be between 0 and")
    (home.parent / "p.txt").write_bytes(b"fine\n\xff\n")
    done = rushes("submit", "p.txt")
    assert done.stderr.startswith("p.txt:2: byte 0xff at column 1 is not UTF-8")
    done = rushes("submit", "p.txt", "--prompts-format", "csv")
    assert done.stderr.startswith('rushes: p.txt:1: unknown column "fine"')


def test_wrong_usage_is_exit_code_2(home: Path) -> None:
    for arguments in (
        ["submit"],
        ["nonsense"],
        ["worker", "tpu"],
        ["history", "--limit", "0"],
        ["history", "-f", "xml"],
    ):
        done = rushes(*arguments)
        assert done.code == 2 and "Traceback" not in done.stderr, arguments


def test_a_recipe_that_is_no_object_is_refused(home: Path) -> None:
    Path("recipe.json").write_text("[1]")
    done = rushes("train", "--recipe", "recipe.json")
    assert done.code == 2 and "must be a JSON object" in done.stderr
    Path("recipe.json").write_text("{")
    done = rushes("train", "--recipe", "recipe.json")
    assert done.code == 2 and "is not JSON" in done.stderr


# --- printing --------------------------------------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [
    {
        "clip": "a",
        "status": "done",
        "seed": 2**63 - 1,
        "seconds": 1.23456789,
        "at": datetime(2026, 1, 2, tzinfo=UTC),
        "cost": Decimal("1.50"),
        "prompt": 'say "a, b"\n[red]x[/red] \x1b[2J',
    },
    {"clip": "b", "status": "failed", "seed": None, "seconds": None, "at": None, "cost": Decimal(3), "prompt": "é"},
]


def test_json_is_an_array_that_gives_the_values_back(capsys: pytest.CaptureFixture[str]) -> None:
    assert show_rows(iter(ROWS), list(ROWS[0]), "json") == 2
    said = capsys.readouterr().out
    first, second = json.loads(said)
    assert first["seed"] == 2**63 - 1 and first["prompt"] == ROWS[0]["prompt"] and first["cost"] == 1.5
    assert first["at"] == "2026-01-02T00:00:00+00:00" and second["seconds"] is None and second["cost"] == 3
    assert len(said.splitlines()) == 4  # an object a line
    show_rows([], ["a"], "json")
    assert json.loads(capsys.readouterr().out) == []


def test_csv_gives_the_values_back(capsys: pytest.CaptureFixture[str]) -> None:
    show_rows(iter(ROWS), list(ROWS[0]), "csv")
    first, second = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert first["prompt"] == ROWS[0]["prompt"] and first["seed"] == str(2**63 - 1) and second["seed"] == ""


def test_a_table_shows_data_and_obeys_none_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    show_rows(iter(ROWS), list(ROWS[0]), "table")
    said = capsys.readouterr().out
    assert "[red]x[/red]" in said  # markup in a prompt is a prompt
    assert "\x1b" not in said and "\\x1b[2J" in said
    assert str(2**63 - 1) in said  # never shortened, whatever the width
    assert all(line == line.rstrip() for line in said.splitlines())


def test_one_thing_is_printed_in_all_formats(capsys: pytest.CaptureFixture[str]) -> None:
    show_one(ROWS[0], "json")
    assert json.loads(capsys.readouterr().out)["seed"] == 2**63 - 1
    show_one(ROWS[0], "csv")
    assert len(list(csv.DictReader(io.StringIO(capsys.readouterr().out)))) == 1
    show_one(ROWS[0], "table")
    assert "seconds" in capsys.readouterr().out


def test_plain_values() -> None:
    assert plain({"a": (1, float("nan"), b"\x00")}) == {"a": [1, "nan", "00"]}
    assert printable("a\tb\nc\x07") == "a\\tb\nc\\x07"


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("1.5", 1.5), ("45m", 2700), ("2h30m", 9000), ("1d2h3m4s", 93784), (" 10s ", 10)]
)
def test_a_deadline_is_a_time_as_people_say_it(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["soon", "2h 30m", "30m2h", "m", "", "-"])
def test_another_deadline_is_refused(text: str, home: Path) -> None:
    (home.parent / "p.txt").write_text("a red ball\n")
    said = CliRunner().invoke(app, ["submit", "p.txt", "--deadline", text])
    assert said.exit_code == 2 and "must be a time like 45m or 2h30m" in said.output


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (WrongSetting("RUSHES_ENGINES=none must be a number"), 2),
        (RequestNotFound("no request req_0123456789ab"), 2),
        (StoreUnavailable("the store does not answer"), 1),
        (RankDied("rank 1 was killed"), 1),  # as EngineError, its base
        (PermissionError(13, "Permission denied", "prompts.txt"), 1),  # as OSError, which is not ours to mark
        (LookupError("of a dict"), None),  # a defect: RequestNotFound's base says nothing of itself
    ],
)
def test_what_a_person_can_mend_has_an_exit_code_that_subclasses_inherit(error: Exception, code: int | None) -> None:
    assert exit_code_of(error) == code


def test_every_field_of_the_form_is_an_option_of_submit() -> None:
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    submit = group.commands["submit"]
    with submit.make_context("submit", ["p.txt", "--step-cache", "0.2", "--key", "k", "--no-rewrite"]) as context:
        options = {param.name for param in submit.get_params(context)} - {"file", "watch", "help"}
    elsewhere = {"prompts", "prompts_text", "prompts_uri", "files", "resumes"}  # these are the file, and maintenance
    assert options == GenerationRequest.model_fields.keys() - elsewhere - {"width", "height"} | {"size"}
    given = {name: value for name, value in context.params.items() if value not in (None, False, ())}
    assert given == {"file": "p.txt", "step_cache": 0.2, "idempotency_key": "k", "prompts_format": "auto"}
    assert context.params["rewrite"] is False
