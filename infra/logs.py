"""Logs: lines for people, or a JSON object a line; with what a line is about, and without secrets.

`setup_logs` is called once at the start of a process. Afterwards any module logs as Python does. `about` and `note` say
for which request, shard and clip the lines are that follow; the trace is OpenTelemetry's. Processes of Prefect come
here by PREFECT_SETTINGS, whose file names `console`. In JSON, what is printed, raised or warned becomes records too,
and so does what children write that know nothing of this (`relay`).

It knows the names of the ids and nothing else of requests and clips.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, TextIO
from urllib.parse import quote, unquote

from opentelemetry import trace

Kind = Literal["text", "json"]
ABOUT = ("request_id", "shard_id", "clip_id", "trace_id", "rank", "flow_run_id", "task_run_id")  # as in `history`
LEVELS = {"flows": "INFO", "infra": "INFO", "db": "INFO", "rushes": "INFO", "alembic.runtime.migration": "INFO"}
# Of a line, in bytes: Docker and Kubernetes cut longer ones in two, and so may a pipe that several write into.
LONGEST = 16_000
SHORTEST_SECRET = 6  # characters: hiding shorter ones would spoil every line and protect nothing
HIDDEN = "***"
FLOW_RUN = "PREFECT__FLOW_RUN_ID"  # in the environment of a process that executes a flow run
PREFECT_SETTINGS = {"PREFECT_LOGGING_SETTINGS_PATH": str(Path(__file__).with_name("logging.yaml"))}
_IDS = re.compile(r"\b(req_[0-9a-f]{12})(-[0-9]{6,10}-[0-9]{1,5})?\b")
_PLAIN_SECRETS = (
    (re.compile(r"(://[^\s:/@'\"]*):[^\s@'\"]+@"), rf"\1:{HIDDEN}@"),
    (re.compile(r"\b(authorization\W{1,4}(?:bearer|basic)) +[\w.~+/=-]{4,}", re.I), rf"\1 {HIDDEN}"),
    (
        re.compile(r"\b(password|passwd|secret(?:_key)?|api_?key|token)(['\"]?(?:=|: ?)['\"]?)[^\s'\",;&]{3,}", re.I),
        rf"\1\2{HIDDEN}",
    ),
)

_about: ContextVar[Mapping[str, str | int]] = ContextVar("about")
_secrets: set[str] = set()
_secret: re.Pattern[str] | None = None


# ------------------------------------------------------------------------------------------------ what a line is about


@contextmanager
def about(**fields: str | int | None) -> Generator[None]:
    """Says what the lines within are about, beside what holds already: ABOUT's names. None: nothing is said."""
    token = _about.set(_with(fields))
    try:
        yield
    finally:
        _about.reset(token)


def note(**fields: str | int | None) -> None:
    """Says what all lines from here on are about, in this thread or task."""
    _about.set(_with(fields))


def _with(fields: Mapping[str, str | int | None]) -> Mapping[str, str | int]:
    return {**_about.get({}), **{name: value for name, value in fields.items() if value is not None}}


def _known(record: logging.LogRecord) -> dict[str, str | int]:
    """The ids of a record: its own, then those of its context."""
    context = trace.get_current_span().get_span_context()
    said = {"trace_id": trace.format_trace_id(context.trace_id)} if context.is_valid else {}
    given = {name: value for name in ABOUT if (value := getattr(record, name, None)) is not None}
    known = {**said, **_about.get({}), **given}
    return {name: value if isinstance(value, int) else str(value) for name in ABOUT if (value := known.get(name))}


# ------------------------------------------------------------------------------------------------------------- secrets


def hide(secrets: Iterable[str]) -> None:
    """Keeps these passwords and keys out of every log of this process, also as addresses write them."""
    global _secret
    for secret in secrets:
        written = (secret, unquote(secret), quote(secret, safe=""))
        _secrets.update(each for each in written if len(each) >= SHORTEST_SECRET)
    if _secrets:
        _secret = re.compile("|".join(sorted(map(re.escape, _secrets), key=len, reverse=True)))
    _hide_in_records()


def without_secrets(text: str) -> str:
    """The text with every known secret, and what looks like a password or key, replaced."""
    if _secret is not None:
        text = _secret.sub(HIDDEN, text)
    for pattern, instead in _PLAIN_SECRETS:
        text = pattern.sub(instead, text)
    return text


def _hide_in_records() -> None:
    """Has every record made without secrets, whichever handler takes it: Prefect's sends them to its server."""
    make = logging.getLogRecordFactory()
    if getattr(make, "hides", False):
        return

    def hiding(*args: Any, **more: Any) -> logging.LogRecord:
        record = make(*args, **more)
        said = _message(record)
        if (hidden := without_secrets(said)) != said:
            record.msg, record.args = hidden, ()
        if record.exc_info and record.exc_info[0] is not None:
            said = logging.Formatter().formatException(record.exc_info)
            if (hidden := without_secrets(said)) != said:
                record.exc_text, record.exc_info = hidden, None
        return record

    hiding.hides = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(hiding)


# --------------------------------------------------------------------------------------------------------------- lines


def _message(record: logging.LogRecord) -> str:
    """The words of a record, also where its arguments do not fit them."""
    try:
        return record.getMessage()
    except Exception:
        return f"{record.msg} {record.args!r}"


class JsonLines(logging.Formatter):
    """A record as one line: time, level, logger, message, ids, service, process, exception. ASCII, LONGEST at most."""

    def __init__(self, service: str = "") -> None:
        super().__init__()
        self.service = service

    def format(self, record: logging.LogRecord) -> str:
        error = record.exc_text
        if error is None and record.exc_info and record.exc_info[0] is not None:
            error = self.formatException(record.exc_info)
        return line_of(
            record.name,
            record.levelname,
            _message(record),
            record.created,
            service=self.service or None,
            process=record.process,
            **_known(record),
            exception=error,
            stack=record.stack_info,
        )


def line_of(logger: str, level: str, message: str, at: float | None = None, /, **more: str | int | None) -> str:
    """A record that is no record of Python's, as JsonLines writes them."""
    now = datetime.now(UTC) if at is None else datetime.fromtimestamp(at, UTC)
    told: dict[str, str | int] = {"time": now.isoformat(timespec="milliseconds").replace("+00:00", "Z")}
    told |= {"level": level, "logger": logger, "message": message}
    told |= {name: value for name, value in more.items() if value is not None}
    for name, value in told.items():
        if isinstance(value, str):  # half a surrogate pair is no text
            told[name] = without_secrets(value).encode("utf-8", "replace").decode()
    while (excess := len(line := json.dumps(told)) - LONGEST) > 0:
        size, name = max((len(json.dumps(value)), name) for name, value in told.items())
        # Of what went wrong the last lines say most.
        told[name] = _cut(str(told[name]), max(size - excess, size // 2), keep_end=name == "exception")
    return line


def _cut(text: str, size: int, *, keep_end: bool) -> str:
    """As much of the text's end or beginning as JSON needs `size` bytes for."""
    low, high = 0, len(text) - 1
    while low < high:
        middle = (low + high + 1) // 2
        piece = text[-middle:] if keep_end else text[:middle]
        low, high = (middle, high) if len(json.dumps(piece)) <= size - 7 else (low, middle - 1)
    return f"…{text[len(text) - low :]}" if keep_end else f"{text[:low]}…"


class PlainLines(logging.Formatter):
    """A record for people: time, level where it is a warning or worse, message, and ids that it does not name."""

    def format(self, record: logging.LogRecord) -> str:
        said = super().format(record)
        ids = [
            f"{name.removesuffix('_id')} {value}" for name, value in _known(record).items() if str(value) not in said
        ]
        at = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        first, *rest = said.split("\n")
        about = f"  [{', '.join(ids)}]" if ids else ""
        return without_secrets("\n".join([f"{at} {level}{first}{about}", *rest]))


# ------------------------------------------------------------------------------------------------------------ a process


def setup_logs(kind: Kind, service: str) -> None:
    """Has this process log in that way; again, nothing changes. Handlers that others gave to the root stay for text."""
    root = logging.getLogger()
    if any(isinstance(handler.formatter, JsonLines) for handler in root.handlers):
        return
    _hide_in_records()
    if kind == "json":
        root.handlers[:] = [console(service)]
        for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
            logging.getLogger(name).handlers.clear()
            logging.getLogger(name).propagate = True
    elif not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(PlainLines())
        root.addHandler(handler)
    for name, level in LEVELS.items() if kind == "json" else ():
        logging.getLogger(name).setLevel(level)


def console(service: str = "") -> logging.Handler:
    """The handler of JSON lines, to standard error. With it all that this process prints, raises or warns is one."""
    handler = logging.StreamHandler(sys.__stderr__)
    service = service or ("rushes-run" if FLOW_RUN in os.environ else "prefect")
    handler.setFormatter(JsonLines(service))
    # A worker passes on what its flow runs write; of a flow run itself every line that it prints is mere text, whatever
    # it looks like.
    passes = FLOW_RUN not in os.environ
    sys.stdout = _Printed(sys.stdout, "stdout", "INFO", service, passes)
    sys.stderr = _Printed(sys.stderr, "stderr", "WARNING", service, passes)
    logging.captureWarnings(True)
    sys.excepthook = _raised
    threading.excepthook = lambda raised: _raised(
        raised.exc_type, raised.exc_value or raised.exc_type(), raised.exc_traceback
    )
    return handler


def _raised(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    logging.getLogger("rushes").critical("%s: %s", kind.__name__, error, exc_info=(kind, error, where))


class _Printed(io.TextIOBase):
    """A stream that makes a record of every line that is printed. passes: those that are records stay as they are."""

    def __init__(self, below: TextIO, name: str, level: str, service: str, passes: bool) -> None:
        self.below, self.logger, self.level, self.service, self.passes = below, name, level, service, passes
        self.begun, self.lock = "", threading.RLock()

    def write(self, text: str) -> int:
        with self.lock:
            *lines, self.begun = re.split(r"\r\n|\n|\r", self.begun + text)
            if len(self.begun) > 4 * LONGEST:
                lines, self.begun = [*lines, self.begun], ""
            self._put(lines)
        return len(text)

    def _put(self, lines: Iterable[str]) -> None:
        known: dict[str, Any] = {"service": self.service, "process": os.getpid(), **_about.get({})}
        for line in lines:
            if record := as_record(line, self.logger, self.level, passes=self.passes, **known):
                self.below.write(record + "\n")  # one write each, so that pipes keep it whole
                self.below.flush()

    def close(self) -> None:
        """Writes what was begun; the stream below is not ours to close."""
        with self.lock:
            begun, self.begun = self.begun, ""
            self._put([begun])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.below, name)

    def fileno(self) -> int:
        return self.below.fileno()

    def isatty(self) -> bool:
        return False

    def flush(self) -> None:
        self.below.flush()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.below.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self.below.errors

    def writable(self) -> bool:
        return True


def as_record(line: str, logger: str, level: str, *, passes: bool = False, **known: str | int) -> str:
    """A line as a record, with the ids that it names; "" for an empty one. passes: one that is a record stays so."""
    line = line.rstrip()
    if not line:
        return ""
    if passes and _is_record(line):
        return line
    named = {(match[1], match[0] if match[2] else None) for match in _IDS.finditer(line)}
    if len(named) == 1:
        ((request, clip),) = named
        known = {"request_id": request, **({"clip_id": clip} if clip else {}), **known}
    return line_of(logger, level, line, **known)


def _is_record(line: str) -> bool:
    """True for a line that JsonLines made, and that holds no secret which its process did not know."""
    try:
        read = json.loads(line) if line.startswith("{") else None
    except ValueError:
        return False
    whole = isinstance(read, dict) and {"time", "level", "message"} <= read.keys()
    return whole and line.isascii() and len(line) <= LONGEST and without_secrets(line) == line


# ------------------------------------------------------------------------------------------------------------- children


def relay(pipe: IO[bytes], logger: str, level: str = "INFO", *, passes: bool = False, **known: str | int) -> None:
    """Writes all lines of a child's pipe to standard error as records, until it ends. passes: as of `as_record`."""
    with pipe:
        for line in iter(lambda: pipe.readline(4 * LONGEST), b""):
            print_record(line.decode("utf-8", "replace"), logger, level, passes=passes, **known)


def print_record(line: str, logger: str, level: str = "INFO", *, passes: bool = False, **known: str | int) -> None:
    """Writes what a child wrote to standard error, as a record or several. passes: as of `as_record`."""
    out = sys.__stderr__
    for part in re.split(r"[\r\n]+", line):
        if out is not None and (record := as_record(part, logger, level, passes=passes, **known)):
            out.write(record + "\n")  # one write each, so that pipes keep it whole
            out.flush()
