"""Watching a request from a terminal until it has ended. Looks at the ledger, and at Prefect for runs that died."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from sqlalchemy.orm import Session

from db.requests import Progress, progress, request_by
from db.tables import UNENDED, ClipStatus, RequestStatus
from flows.cli.find import held_up, not_found, run_for
from flows.clients.ledger import ledger
from flows.clients.prefect import PrefectApi, PrefectUnavailable, Run, prefect_api
from flows.settings import Settings
from flows.show import printable, terminal_bars

POLL = 0.5  # seconds between two looks at the ledger
ASK_WHY = 5.0  # seconds between two looks at what keeps runs from beginning
ASK_PREFECT = 2.0  # seconds between two looks at the flow run
WAIT_PREFECT = 10.0  # seconds that a busy server is asked again for it
LINE_EVERY = 5.0  # seconds between two lines where there is no terminal to draw on
# How `generate` names what it does not even begin.
REFUSALS = ("BadInput", "QuotaExceeded", "RewriterFailed", "ForeignStore")
QUIET = 120.0  # seconds after which a run that has not begun is worth a word


@dataclass(frozen=True, slots=True)
class Ended:
    """How it ended. `request_id` is None when the run ended without ever opening its request."""

    request_id: str | None
    status: str
    message: str
    refused: bool = False  # the run did what it should: nothing was submitted, and the message says why


def watch(settings: Settings, name: str, *, flow_run_id: str | None = None) -> Ended:
    """Shows progress until the request `name` (id, name or flow run) and its flow run have ended.

    A request that is not in the ledger yet is waited for: `flow_run_id` says who will open it, else Prefect is asked.
    Raises RequestNotFound for one that nobody will open, NotRunning.
    """
    with ledger(settings) as open_session, _prefect(settings) as api, _display() as display:
        run: Run | None = None
        held: str | None = None
        asked, began = -ASK_PREFECT, time.monotonic()
        looked = began  # for what is in the way
        while True:
            with open_session() as session:
                row = request_by(session, name)
                if row is None and flow_run_id is None:
                    flow_run_id = _opener(session, api, name)
                now = progress(session, row.id) if row else None
            run_id = flow_run_id or (row.flow_run_id if row else None)
            if api and run_id and time.monotonic() - asked >= ASK_PREFECT:
                asked, run = time.monotonic(), api.run(run_id)
            over = row is not None and row.status not in UNENDED
            if api and time.monotonic() - looked >= ASK_WHY:
                looked, held = time.monotonic(), api.held_up(_pool_of(run, now))
            display.show(now, _waiting_for(run, time.monotonic() - began), held)
            # A request may have ended in an earlier run; then this one has still to look at it.
            if over and (flow_run_id is None or run is None or run.final):
                assert row is not None
                return Ended(row.id, str(row.status), _summary(now))
            if run is not None and run.final and not over:
                if row is None and run.state_name in REFUSALS:
                    return Ended(None, run.state_name, run.message.partition("\n")[2], refused=True)
                said = f"its flow run {run.name} ended as {run.state_name}: {run.message}".rstrip(": ")
                if run.state == "CRASHED":
                    said += "\nAnother run takes it up within ten minutes, and at once after `rushes up`"
                return Ended(row.id if row else None, run.state_name or run.state, said)
            time.sleep(POLL)


def _opener(session: Session, api: _Patient | None, name: str) -> str:
    """The flow run that will open the request of this name. Raises RequestNotFound."""
    run = api.run_for(name) if api else None
    if run is None:
        if (row := request_by(session, name)) is not None and row.flow_run_id:  # opened just now
            return row.flow_run_id
        raise not_found(name)
    return run.id


def _pool_of(run: Run | None, now: Progress | None) -> str | None:
    """The work pool that has to start a flow run before anything goes on; None where nothing waits for one."""
    if run is not None and run.state in ("SCHEDULED", "PENDING"):
        return "control"
    waits = now is not None and now.total is not None and now.waiting and not now.counts[ClipStatus.RUNNING]
    return "gpu" if waits else None


@contextmanager
def _prefect(settings: Settings) -> Generator[_Patient | None]:
    if settings.prefect_api_url is None:
        yield None
        return
    with prefect_api(settings, patience=WAIT_PREFECT) as api:
        yield _Patient(api)


class _Patient:
    """A Prefect server that is away or busy for a while is no reason to stop watching the ledger."""

    def __init__(self, api: PrefectApi) -> None:
        self._api = api

    def run(self, run_id: str) -> Run | None:
        with suppress(PrefectUnavailable):
            return self._api.run(run_id)
        return None

    def run_for(self, name: str) -> Run | None:
        with suppress(PrefectUnavailable):
            return run_for(self._api, name)
        return None

    def held_up(self, pool: str | None) -> str | None:
        return held_up(self._api, pool) if pool else None


def _waiting_for(run: Run | None, seconds: float) -> str:
    if run is None or run.state == "RUNNING":
        return "reading and checking the prompts"
    if run.state in ("SCHEDULED", "PENDING") and seconds > QUIET:
        return "the flow run has not begun: does a control worker run? (rushes doctor)"
    return "waiting for the flow run to begin"


def eta(now: Progress) -> float | None:
    """Seconds until all clips are there, going by what clips took so far and by the engines at work."""
    if not now.mean_seconds:
        return None
    return now.mean_seconds * now.waiting / max(1, now.engines)


def _counts(now: Progress) -> str:
    parts = [f"{count} {status.value}" for status, count in now.counts.items() if count]
    if now.reused:
        parts.append(f"{now.reused} of them found")
    if now.status is RequestStatus.PAUSED:
        parts.append("paused: `rushes resume` goes on")
    return ", ".join(parts)


def _summary(now: Progress | None) -> str:
    if now is None:
        return ""
    mean = f"; {now.mean_seconds:.2f} engine seconds a rendered clip" if now.mean_seconds else ""
    return f"{_counts(now)}{mean}"


class _Display(Protocol):
    def show(self, now: Progress | None, waiting_for: str, held: str | None) -> None: ...


@contextmanager
def _display() -> Generator[_Display]:
    with terminal_bars("left", "counts") as bars:
        yield _Lines() if bars is None else _Bar(bars)


class _Bar:
    def __init__(self, bars: Any) -> None:
        self._bars = bars
        self._task = bars.add_task("request", total=None, left="", counts="")

    def show(self, now: Progress | None, waiting_for: str, held: str | None) -> None:
        if now is None or now.total is None:
            self._bars.update(self._task, description=held or waiting_for, counts=_counts(now) if now else "")
            return
        seconds = eta(now)
        idle = not now.waiting or now.status is RequestStatus.PAUSED
        left = "" if idle else held or (f"about {clock(seconds)} left" if seconds else "engines are starting")
        self._bars.update(
            self._task,
            description=now.request_id,
            total=now.total,
            completed=now.total - now.waiting,
            left=left,
            counts=printable(_counts(now)),
        )


class _Lines:
    def __init__(self) -> None:
        self._said = ""
        self._when = -LINE_EVERY

    def show(self, now: Progress | None, waiting_for: str, held: str | None) -> None:
        line = f"{now.request_id}: {_counts(now)}" if now and now.total is not None else waiting_for
        line = f"{line}: {held}" if held else line
        if line != self._said and time.monotonic() - self._when >= LINE_EVERY:
            self._said, self._when = line, time.monotonic()
            print(line, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """90 as 1:30, 3700 as 1:01:40."""
    whole = int(seconds + 0.5)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
