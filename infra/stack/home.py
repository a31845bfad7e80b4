"""The home folder of a local stack: its lock, its description, its logs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import threading
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from infra.files import atomic_path

DEPLOYMENTS = Path(__file__).parents[1] / "prefect.yaml"
POSTGRES, SERVER, WEB, CONTROL, GPU = "postgres", "prefect", "web", "control", "gpu"
PARTS = (POSTGRES, SERVER, WEB, CONTROL, GPU)
READER = "reader"  # the login of those who ask
POOLS = (CONTROL, GPU)
LOCK_SECONDS = 300.0
GRACE_SECONDS = 15.0  # what engines get to keep clips that are under way and to give back their shards
HEARTBEAT_SECONDS = 30.0  # between two signs of life of a worker; Prefect's default
LOG_BYTES = 16 * 2**20  # a longer log is moved aside at the next start
Say = Callable[[str], None]
T = TypeVar("T")


class StackFailed(RuntimeError):
    """The stack could not be started or ended. What the failed start had started has been ended again."""

    exit_code = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A running stack."""

    home: Path
    database_url: str
    reader_url: str
    store_url: str
    prefect_api_url: str
    prefect_ui_url: str
    web_url: str | None  # of the service that shows clips
    ports: Mapping[str, int]
    pids: Mapping[str, int]
    started: tuple[str, ...]  # the parts that this call of `up` had to start


class Log:
    """A log file of a process, and what has been written to it since we opened it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if path.exists() and path.stat().st_size > LOG_BYTES:
            path.replace(path.with_suffix(".log.1"))
        self.start = path.stat().st_size if path.exists() else 0

    def open(self) -> Any:
        return open(self.path, "ab")

    def said(self) -> str:
        with open(self.path, "rb") as file:
            file.seek(self.start)
            return file.read().decode(errors="replace")

    def __str__(self) -> str:
        return f"{self.path} ends with\n{self.said()[-2000:].strip() or '(nothing)'}"


def make_private(home: Path) -> None:
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        if home.stat().st_uid != os.geteuid():
            raise StackFailed(f"{home} belongs to another user: name a folder of your own in RUSHES_HOME")
        home.chmod(stat.S_IRWXU)
    except OSError as error:
        raise StackFailed(f"{home} cannot be used as RUSHES_HOME: {error.strerror}") from error


@contextlib.contextmanager
def locked(home: Path) -> Generator[None]:
    """One `up` or `down` at a time; a second one waits for the first."""
    try:
        with FileLock(home / "lock", timeout=LOCK_SECONDS):
            yield
    except Timeout:
        raise StackFailed(f"another `rushes up` or `down` has been at work in {home} for minutes") from None


def stack_file(home: Path) -> Path:
    return home / "stack.json"


def write_stack(stack: Stack, engines: int) -> None:
    content = {
        "database_url": stack.database_url,
        "reader_url": stack.reader_url,
        "store_url": stack.store_url,
        "prefect_api_url": stack.prefect_api_url,
        "prefect_ui_url": stack.prefect_ui_url,
        "web_url": stack.web_url,
        "ports": dict(stack.ports),
        "pids": dict(stack.pids),  # for people; no program trusts them
        "engines": engines,
    }
    with atomic_path(stack_file(stack.home), private=True) as path:
        path.write_text(json.dumps(content, indent=1))


def read_text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""


@contextlib.contextmanager
def signals_raise() -> Generator[None]:
    """SIGTERM and SIGHUP end us by an exception, as Ctrl-C does, so that what was started is ended.

    A shell starts background jobs with SIGINT ignored, and our children would inherit that: then no worker would ever
    stop for a signal, since Prefect's turn SIGTERM into SIGINT.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    signal.signal(signal.SIGTERM, leave)
    if before[signal.SIGHUP] is not signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, leave)
    if before[signal.SIGINT] is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def signals_wait() -> Generator[None]:
    """A second Ctrl-C does not interrupt the clearing up after the first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
