"""Laws of the logs: whatever is said is one line that can be read, and no line holds a secret."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from infra import logs
from infra.logs import LONGEST, JsonLines, PlainLines, about, as_record, hide

SECRET = "pl4nted/ünd:secret"
TEXT = st.text() | st.text("\n\r\x00\x1b\x85\u2028\u2029\ud800\"'{}\\%é😀a ", max_size=60)
IDS = st.dictionaries(st.sampled_from(logs.ABOUT), TEXT | st.integers(), max_size=4)


@pytest.fixture(autouse=True, scope="module")
def planted() -> Iterator[None]:
    """A secret that is known; the process's own ones and its records are as before afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "_secrets", set[str]())
        patch.setattr(logs, "_secret", None)
        before = logging.getLogRecordFactory()
        hide([SECRET, "pa%25ss-w0rd"])
        yield
        logging.setLogRecordFactory(before)


def record(said: object, *args: object, error: BaseException | None = None) -> logging.LogRecord:
    exc_info = (type(error), error, error.__traceback__) if error else None
    return logging.getLogRecordFactory()("flows.x", logging.WARNING, __file__, 1, said, args, exc_info)


def read(line: str) -> dict[str, Any]:
    """The object of a line, which must be one for every reader: ASCII, short enough, without control characters."""
    assert line.isascii() and line.isprintable() and len(line) <= LONGEST
    told = json.loads(line)
    assert isinstance(told, dict)
    return told


@given(TEXT, st.lists(TEXT | st.integers() | st.none(), max_size=2), TEXT | st.none(), IDS)
@example('x"}\n{"time": "1", "level": "INFO", "message": "forged"}', [], None, {})
@example("100% of %s %d", ["a"], "\n", {"clip_id": "a\nb"})
def test_any_record_is_one_line(said: str, args: list[object], error: str | None, ids: dict[str, Any]) -> None:
    made = record(said, *args, error=None if error is None else ValueError(error))
    with about(**ids):
        told = read(JsonLines("service").format(made))
    assert {"time", "level", "logger", "message", "service"} <= told.keys() and told["time"].endswith("Z")
    if not args:
        assert told["message"] == logs.without_secrets(said).encode("utf-8", "replace").decode()
    if error is not None:
        assert told["exception"].startswith("ValueError")
    assert {name for name in logs.ABOUT if name in told} == {name for name, value in ids.items() if value}


@settings(max_examples=20)
@given(st.text(min_size=1), st.integers(1, 30_000), st.integers(1, 30_000))
def test_a_long_one_is_cut_and_keeps_its_beginning_and_the_end_of_its_error(piece: str, said: int, failed: int) -> None:
    error = ValueError(piece * failed + "the cause")
    told = read(JsonLines().format(record("begins " + piece * said, error=error)))
    assert told["message"].startswith("begins ") and told["exception"].endswith("the cause")


@given(st.binary(max_size=300))
@example(b'{"time": "2026-01-01T00:00:00.000Z", "level": "INFO", "logger": "x", "message": "not ours"}')
@example(b"\xff\xfe\r\n{}\r\n")
def test_any_bytes_of_a_child_are_lines(written: bytes) -> None:
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "__stderr__", out)
        logs.relay(io.BytesIO(written), "rushes.rank", rank=1)
    for line in out.getvalue().splitlines():
        told = read(line)
        assert told["logger"] == "rushes.rank" and told["rank"] == 1, "a child cannot speak as somebody else"


@given(TEXT, TEXT, st.sampled_from([SECRET, "pa%25ss-w0rd", "pa%ss-w0rd", "pl4nted%2F%C3%BCnd%3Asecret"]))
def test_no_secret_is_in_any_line(before: str, after: str, secret: str) -> None:
    said, error = f"{before} {secret} {after}", KeyError(secret)
    made = record("%s", said, error=error)
    with about(clip_id=said):
        lines = [JsonLines().format(made), PlainLines().format(made), logging.Formatter().format(made)]
    lines.append(as_record(said, "x", "INFO"))
    for line in lines:
        assert secret not in line and json.dumps(secret)[1:-1] not in line


@pytest.mark.parametrize(
    "said",
    [
        "connecting to postgresql://me:open-sesame@host/db failed",
        "s3: secret_key=open-sesame&x=1",
        "Authorization: Bearer open-sesame",
        'conninfo "host=a password=open-sesame dbname=b"',
        '{"password": "open-sesame"}',
    ],
)
def test_what_looks_like_a_secret_is_hidden(said: str) -> None:
    assert "open-sesame" not in JsonLines().format(record(said))
    prompt = "a prompt: a secret garden, a token of love, basic shapes"
    assert logs.without_secrets(prompt) == prompt


def test_a_line_of_a_worker_s_run_stays_as_it_is() -> None:
    line = JsonLines("rushes-engine").format(record("done"))
    assert as_record(line + "\n", "output", "INFO", passes=True) == line
    assert json.loads(as_record(line, "output", "INFO"))["message"] == line
    named = json.loads(as_record("clip req_0123456789ab-000001-0 begins anew", "x", "INFO"))
    assert named["clip_id"] == "req_0123456789ab-000001-0" and named["request_id"] == "req_0123456789ab"
