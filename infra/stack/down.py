"""Stopping the local stack, in an order in which nothing is lost."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx
import psutil

from infra.stack.home import (
    GRACE_SECONDS,
    PARTS,
    POOLS,
    POSTGRES,
    SERVER,
    Say,
    StackFailed,
    locked,
    signals_raise,
    stack_file,
)
from infra.stack.postgres import PostgresFailed, running_postgres, stop_postgres
from infra.stack.prefect import Api, api_of, settle_runs
from infra.stack.processes import end_processes, part_of, process_family


def down(home: Path, *, say: Say = lambda _: None) -> tuple[str, ...]:
    """Ends the stack of `home` with everything it started; returns the parts that ran.

    Engines get 15 seconds to keep the clips that are under way and to give back their shards. Runs of the control pool
    that were under way go back to Scheduled, so that the next `up` takes them up again. Raises StackFailed when
    something does not end.
    """
    home = home.absolute()
    if not home.is_dir():
        return ()
    with signals_raise(), locked(home):
        return _end(home, say)


def _end(home: Path, say: Say) -> tuple[str, ...]:
    family = process_family(home)
    postgres = running_postgres(home / POSTGRES)
    ran = tuple(p for p in PARTS if part_of(family, p) or (p == POSTGRES and postgres))
    server = part_of(family, SERVER)
    api = Api(api_of(server.port)) if server is not None else None
    if api is not None and not api.healthy():
        api = None
    under_way: dict[str, list[dict[str, Any]]] = {}
    if api is not None:
        with _prefect_may_fail(say):
            under_way = {pool: api.active_runs(pool) for pool in POOLS}

    stack_file(home).unlink(missing_ok=True)
    _end_flow_runs(home, say)
    end_processes([m.process for m in process_family(home) if m.is_part and m.part != SERVER], grace=2.0)
    end_processes([m.process for m in process_family(home) if m.part != SERVER or m.run], grace=0.0)
    if api is not None:
        with _prefect_may_fail(say):
            for pool, runs in under_way.items():
                settle_runs(api, pool, runs)
    end_processes([m.process for m in process_family(home)], grace=5.0)
    try:
        stop_postgres(home / POSTGRES)  # last: the Prefect server writes until it ends
    except PostgresFailed as error:
        raise StackFailed(str(error)) from error
    left = process_family(home)
    if left:
        raise StackFailed(f"processes {[member.pid for member in left]} of {home} do not end, not even by SIGKILL")
    return ran


@contextlib.contextmanager
def _prefect_may_fail(say: Say) -> Generator[None]:
    """A Prefect server in trouble must not keep the stack from ending; the next `up` settles what is open."""
    try:
        yield
    except (httpx.HTTPError, StackFailed) as error:
        say(f"Prefect does not answer as it should ({error or type(error).__name__}); ending the stack all the same")


def _end_flow_runs(home: Path, say: Say) -> None:
    """SIGTERM to every process that executes a flow run, while their workers still watch; waits until they are gone."""
    told: set[int] = set()
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline:
        runs = [member for member in process_family(home) if member.run]
        if not runs:
            return
        if not told:
            count = len({member.run for member in runs})
            say(f"Ending {count} flow {'run' if count == 1 else 'runs'}")
        for member in runs:
            # Only the top of each: an engine ends its own ranks.
            if member.pid not in told and not member.ancestors & {other.pid for other in runs}:
                told.add(member.pid)
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.process.terminate()
        time.sleep(0.1)
