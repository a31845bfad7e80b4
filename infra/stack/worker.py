"""A Prefect worker whose flow runs, when it is told to stop, end in order before it does.

Prefect's own worker kills them at once, with no signal before, and an engine could keep nothing of what it is at.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Thread

import psutil

from infra.logs import relay

PYTHON = "python3"  # in commands of a work pool: the worker's own, which each looks up on its host
RUN = "PREFECT__FLOW_RUN_ID"  # in the environment of a process that executes a flow run, and of all it starts
RUNS_SECONDS = 20.0  # that flow runs get to end
LAST_LINES = 2.0  # seconds for lines on their way; what a lost child still writes is not waited for
WORKER_SECONDS = 10.0  # that the worker gets after them


def path_with_own_python(path: str | None) -> str:
    """A PATH on which PYTHON is the interpreter that runs this. path: the caller's."""
    return f"{Path(sys.executable).parent}{os.pathsep}{path or os.defpath}"


def run_worker(command: Sequence[str], environment: Mapping[str, str], folder: Path, *, relays: bool = False) -> int:
    """Runs a worker's command until it ends, and returns its exit code. Told to stop, it raises SystemExit.

    SIGTERM and SIGINT reach us alone: the worker leads a session of its own. A second one is not waited for.
    folder: where its flow runs work. relays: all that it and they write is made JSON lines, what libraries print too.
    """
    before = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGINT)}
    own = {**environment, "PATH": path_with_own_python(environment.get("PATH"))}
    out, error = (subprocess.PIPE, subprocess.STDOUT) if relays else (None, None)
    worker = subprocess.Popen(
        command,
        cwd=folder,
        env=own,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=error,
        start_new_session=True,
    )
    reader = Thread(target=relay, args=[worker.stdout, "output"], kwargs={"passes": True}, daemon=True)
    if relays:
        reader.start()
    try:
        return worker.wait()
    finally:
        try:
            if worker.poll() is None:
                end_runs(worker.pid, RUNS_SECONDS)
                worker.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.wait(WORKER_SECONDS)
        finally:
            worker.kill()
            worker.wait()
            if relays:
                reader.join(LAST_LINES)
            for number, handler in before.items():
                signal.signal(number, handler)


def end_runs(worker: int, seconds: float) -> None:
    """SIGTERM to every flow run of a worker, those that it starts meanwhile too; waits until none is left."""
    told: set[psutil.Process] = set()
    deadline = time.monotonic() + seconds
    while (runs := runs_of(worker)) and time.monotonic() < deadline:
        for run in runs:
            if run not in told:
                told.add(run)
                with contextlib.suppress(psutil.NoSuchProcess):
                    run.terminate()
        time.sleep(0.1)


def runs_of(worker: int) -> list[psutil.Process]:
    """The processes below a worker that execute a flow run. What these start is theirs to end."""
    runs: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        below = psutil.Process(worker).children(recursive=True)
        inside = {worker: False}  # whether a process belongs to a flow run
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                above = inside.get(process.ppid(), False)
                inside[process.pid] = above or RUN in process.environ()
                if inside[process.pid] and not above and process.status() != psutil.STATUS_ZOMBIE:
                    runs.append(process)
    return runs


def _leave(number: int, _: object) -> None:
    raise SystemExit(128 + number)
