"""Ends engines of this host that hang: they keep its GPUs and a place in the pool, and would for hours.

An engine gives two signs of life: its heartbeat in the ledger, and processor time. One that gives either is never
ended, however slow it is. While the ledger cannot be asked nobody hangs, since nobody could give a sign there.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Generic, TypeVar

import psutil
from sqlalchemy.orm import Session, sessionmaker

from db.engines import EngineRow, close_engine, open_engines
from db.leases import expire_owner
from flows.clients.ledger import ledger
from flows.clients.retry import best_effort
from flows.settings import Settings
from infra.stack.worker import RUN, runs_of

LOOK = 5.0  # seconds between two looks
HUNG = 60.0  # seconds without any sign, of the engine or its ranks
LONGEST = 300.0  # seconds without a sign of the engine itself, while its ranks wait for it and may be busy at that
LATE = 30.0  # seconds between two looks after which this process was asleep itself, and what it knows says nothing

log = logging.getLogger(__name__)
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Signs:
    """The signs of an engine, as they were at one look: each is alive that changes."""

    beat: datetime | None  # its last heartbeat; None: the ledger does not know it, or not yet
    own: float  # processor seconds of the engine itself
    ranks: float  # and of all that it has started


@dataclass(slots=True)
class _Seen:
    signs: Signs
    any_since: float  # when any of its signs changed last
    own_since: float  # when one changed that only the engine itself gives


@dataclass(slots=True)
class Watchdog(Generic[K]):
    """Tells engines that hang from those that live, by what was seen of them at one look after the other."""

    seen: dict[K, _Seen] = field(default_factory=dict[K, _Seen])
    last_look: float | None = None

    def look(self, engines: Mapping[K, Signs] | None, now: float) -> list[K]:
        """The engines that hang. engines: all there are; None: the ledger could not be asked. now: in seconds."""
        late = self.last_look is not None and now - self.last_look > LATE
        self.last_look = now
        if engines is None or late:
            self.seen = {} if engines is None else {key: _Seen(signs, now, now) for key, signs in engines.items()}
            return []
        self.seen = {key: self._updated(key, signs, now) for key, signs in engines.items()}
        return [key for key, seen in self.seen.items() if now - seen.any_since > HUNG or now - seen.own_since > LONGEST]

    def _updated(self, key: K, signs: Signs, now: float) -> _Seen:
        before = self.seen.get(key)
        if before is None or (signs.beat, signs.own) != (before.signs.beat, before.signs.own):
            return _Seen(signs, now, now)
        return _Seen(signs, now if signs.ranks != before.signs.ranks else before.any_since, before.own_since)


def watch_beside(settings: Settings, worker: int | None = None) -> None:
    """Watches the engines that are started below process `worker` (None: this one), in a thread, until it ends."""
    threading.Thread(target=_watch, args=(settings, worker or os.getpid()), name="watchdog", daemon=True).start()


def _watch(settings: Settings, worker: int) -> None:
    dog, clock = Watchdog[psutil.Process](), threading.Event()
    while not clock.wait(LOOK):
        try:
            with ledger(settings, application="rushes-watchdog") as ledgers:
                while not clock.wait(LOOK):
                    look_once(dog, ledgers, worker)
        except Exception:  # whatever it was, engines that hang are still to be ended
            log.warning("the watchdog begins anew", exc_info=True)


def look_once(dog: Watchdog[psutil.Process], ledgers: sessionmaker[Session], worker: int) -> None:
    """One look at all engines below a worker; ends those that hang, and gives back what they had."""
    now, runs = time.monotonic(), {run: run_id(run) for run in runs_of(worker)}
    rows: dict[str | None, EngineRow] = {}

    def ask() -> None:
        with ledgers() as session:
            rows.update((row.flow_run_id, row) for row in open_engines(session))

    try:
        asked = best_effort(ask)
    except Exception:
        log.warning("the ledger could not be asked for engines of this host", exc_info=True)
        asked = False
    for run in dog.look({run: signs_of(run, rows.get(of)) for run, of in runs.items() if of} if asked else None, now):
        row = rows.get(runs[run])
        log.error(
            "engine run %s (process %s) hangs, and is ended", runs[run], run.pid, extra={"flow_run_id": runs[run]}
        )
        try:
            run.kill()  # its ranks follow it
        except psutil.Error as error:
            log.error("process %s could not be ended: %s", run.pid, error)
            continue
        if row is not None:
            best_effort(lambda row=row: give_back(ledgers, row))


def give_back(ledgers: sessionmaker[Session], row: EngineRow) -> None:
    """The engine is gone: others need not wait for its leases to run out."""
    with ledgers.begin() as session:
        close_engine(session, row.id, f"it hung on {row.host} from {row.heartbeat_at:%H:%M:%S} on, and was ended there")
        expire_owner(session, row.id)


def signs_of(run: psutil.Process, row: EngineRow | None) -> Signs:
    """The signs of the engine that this process is; of one that is gone they stay the same."""
    return Signs(row and row.heartbeat_at, _seconds(run), sum(map(_seconds, _below(run))))


def run_id(run: psutil.Process) -> str | None:
    """The flow run that a process executes; None where it is gone, or was hidden."""
    try:
        return run.environ().get(RUN)
    except psutil.Error:
        return None


def _below(run: psutil.Process) -> list[psutil.Process]:
    try:
        return run.children(recursive=True)
    except psutil.Error:
        return []


def _seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return times.user + times.system
