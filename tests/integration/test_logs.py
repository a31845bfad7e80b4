"""The logs of our processes in JSON: whatever writes there, every line is a record, with what it is about."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider

import infra.tracing
from infra.logs import PREFECT_SETTINGS, JsonLines, PlainLines, about
from infra.stack.worker import run_worker
from tests.fake_renderer import Fault, Trouble
from tests.platform import Platform

REPOSITORY = Path(__file__).parents[2]
OWN = {name: value for name, value in os.environ.items() if not name.startswith(("RUSHES_", "PREFECT_", "OTEL_"))}


def ended(*command: str, **environment: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and records of a process; a line that is none fails."""
    done = subprocess.run(
        [sys.executable, *command], cwd=REPOSITORY, env=OWN | environment, capture_output=True, text=True, timeout=240
    )
    return done.returncode, [json.loads(line) for line in (done.stdout + done.stderr).splitlines()]


SPEAKS = """
import logging, os, sys, threading, warnings
from infra.logs import about, setup_logs
setup_logs("json", "tried")
print("printed\\r50 %\\rof", "two\\nlines"); print("begun", end="", file=sys.stderr)
print(' {"time": 1, "level": "INFO", "message": "forged"}')
warnings.warn("careful")
logging.getLogger("flows.a").info("to %s", "few")
with about(request_id="req_0123456789ab"):
    logging.getLogger("flows.a").info("wrong arguments %d", "x")
    logging.getLogger("other.library").info("is not heard")
thread = threading.Thread(target=lambda: 1 / 0); thread.start(); thread.join()
raise RuntimeError("the\\nend")
"""


def test_everything_that_a_process_writes_is_a_record() -> None:
    code, said = ended("-c", SPEAKS)
    messages = [each["message"] for each in said]
    assert code == 1
    for expected in ("printed", "50 %", "of two", "lines", "begun", "to few", "RuntimeError: the\nend"):
        assert expected in messages
    assert any("forged" in message for message in messages) and all(each["message"] != "forged" for each in said)
    assert any("careful" in message for message in messages) and "is not heard" not in messages
    (wrong,) = [each for each in said if "wrong arguments" in each["message"]]
    assert wrong["request_id"] == "req_0123456789ab" and wrong["service"] == "tried"
    failed = {each["message"].partition(":")[0]: each for each in said if "exception" in each}
    assert failed.keys() == {"ZeroDivisionError", "RuntimeError"}
    assert "Traceback" in failed["RuntimeError"]["exception"] and failed["RuntimeError"]["level"] == "CRITICAL"


@pytest.mark.parametrize(
    ("command", "environment", "says"),
    [
        ("migrate", {"RUSHES_DATABASE_URL": "postgresql://me:planted-7c@127.0.0.1:1/x"}, "the ledger does not answer"),
        ("worker control", {"RUSHES_LEASE_SECONDS": "0"}, "RUSHES_LEASE_SECONDS=0"),
    ],
)
def test_services_say_in_a_record_why_they_do_not_start(
    command: str, environment: Mapping[str, str], says: str, tmp_path: Path
) -> None:
    home = {"RUSHES_HOME": str(tmp_path / "home"), "RUSHES_LOG": "json"}
    code, said = ended("-m", "flows.cli.main", *command.split(), **home, **environment)
    assert code in (1, 2) and says in said[-1]["message"] and said[-1]["service"] == f"rushes-{command.split()[0]}"
    assert "planted" not in json.dumps(said)


PREFECTS = """
from prefect.logging.configuration import setup_logging
setup_logging()
from prefect.logging import get_logger
get_logger("worker").info("Worker begins\\nwith two lines")
from rich.console import Console
Console().print("Worker 'x' started!")
import logging
logging.getLogger("prefect.flow_runs").info("of a run", extra={"flow_run_id": "f1", "flow_run_name": "n"})
"""


def test_processes_of_prefect_log_so_too(tmp_path: Path) -> None:
    code, said = ended(
        "-c", PREFECTS, PREFECT_HOME=str(tmp_path), PREFECT_LOGGING_TO_API_ENABLED="false", **PREFECT_SETTINGS
    )
    assert code == 0
    told = {each["message"]: each for each in said}
    assert {"Worker begins\nwith two lines", "Worker 'x' started!"} <= told.keys()
    assert told["of a run"]["flow_run_id"] == "f1" and told["of a run"]["logger"] == "prefect.flow_runs"


def test_a_worker_passes_on_what_its_runs_say_and_makes_records_of_the_rest(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also of bytes that no Python wrote, of a process that was killed."""
    record = JsonLines("rushes-run").format(logging.makeLogRecord({"msg": "from a run", "shard_id": 7}))
    script = (
        f"import os; print({record!r}, flush=True); os.write(2, b'fatal \\xff\\nlast words'); os.kill(os.getpid(), 9)"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "__stderr__", sys.stderr)
        assert run_worker([sys.executable, "-c", script], OWN, tmp_path, relays=True) == -9
    said = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert said[0] == json.loads(record)
    assert [(each["logger"], each["message"]) for each in said[1:]] == [
        ("output", "fatal \ufffd"),
        ("output", "last words"),
    ]


def test_people_read_lines() -> None:
    record = logging.makeLogRecord({"msg": "clip %s waits", "args": ("c1",), "levelno": 30, "levelname": "WARNING"})
    with about(request_id="r1", clip_id="c1"):
        assert PlainLines().format(record)[8:] == " warning: clip c1 waits  [request r1]"


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What this process logs as JSON, of our own loggers."""
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(JsonLines("test"))
    ours = [logging.getLogger(name) for name in ("flows", "rushes")]
    before = [logger.level for logger in ours]
    for logger in ours:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    yield out
    for logger, level in zip(ours, before, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)


def test_every_line_about_a_clip_names_request_shard_clip_and_trace(
    platform: Platform, lines: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(infra.tracing, "_tracer", lambda: TracerProvider().get_tracer("rushes"))
    platform.script.trouble["a bad cube"] = Trouble(Fault.FAILS, times=9)
    with platform.engines():
        outcome, _ = platform.make(["a red ball", "a bad cube"])
    clips = {clip["clip_id"]: clip for clip in platform.clips(outcome.request_id)}
    said = [json.loads(line) for line in lines.getvalue().splitlines()]
    about = [each for each in said if any(clip in each["message"] for clip in clips)]
    done = [each for each in about if "is done" in each["message"]]
    failed = [each for each in about if "failed" in each["message"]]
    assert len(done) == 1 and len(failed) == 3
    for each in about:
        assert each["request_id"] == outcome.request_id and each["shard_id"] and each["clip_id"] in each["message"]
    assert done[0]["trace_id"] == clips[done[0]["clip_id"]]["trace_id"]
    assert failed[-1]["trace_id"] == clips[failed[-1]["clip_id"]]["trace_id"] and failed[-1]["level"] == "WARNING"
