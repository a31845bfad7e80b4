"""Processes of a local stack: which belong to it, and ending all of them."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from infra.stack.home import SERVER, WEB

MARK = "RUSHES_STACK"  # in the environment of every process of a stack: its home
PART = "RUSHES_STACK_PART"  # the part that it is or that started it
RUN = "PREFECT__FLOW_RUN_ID"  # Prefect's own: the flow run that a process executes


def end_processes(processes: Iterable[psutil.Process], *, grace: float) -> None:
    """SIGTERM, and after `grace` seconds SIGKILL; with no grace SIGKILL at once. Our own children are reaped."""
    processes = list(processes)
    living = [process for process in processes if lives(process)]
    for how, patience in ((psutil.Process.terminate, grace), (psutil.Process.kill, 5.0)):
        if patience and living:
            for process in living:
                with contextlib.suppress(psutil.NoSuchProcess):
                    how(process)
            # Not psutil's wait: where the init process is slow to reap, it would sit through that too.
            deadline = time.monotonic() + patience
            while (living := [process for process in living if lives(process)]) and time.monotonic() < deadline:
                time.sleep(0.02)
    for process in processes:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process.pid, os.WNOHANG)


@dataclass(frozen=True, slots=True)
class Member:
    """A living process of a stack."""

    process: psutil.Process
    part: str  # the part that it is or belongs to
    run: str | None  # the flow run that it works for
    command: tuple[str, ...]

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def is_part(self) -> bool:
        """It is the part itself, not something started by it."""
        named = {SERVER: "prefect.server.api.server:create_app", WEB: "uvicorn"}.get(self.part, "worker")
        return self.run is None and named in self.command

    @property
    def port(self) -> int:
        """The port in its command line."""
        return int(self.command[self.command.index("--port") + 1])

    @property
    def ancestors(self) -> set[int]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return {process.pid for process in self.process.parents()}
        return set()


def process_family(home: Path) -> list[Member]:
    """Every living process of the stack of `home`, oldest first (about 30 ms).

    Postgres is not among them: infra/stack/postgres.py knows its own.
    """
    found: list[Member] = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            marked = environment.get(MARK) == str(home)
            if not marked and environment.get("RUSHES_HOME") != str(home):
                continue
            command = tuple(process.cmdline())
            if (marked or _is_lost_rank(process, command, home)) and process.pid != os.getpid() and lives(process):
                found.append(Member(process, environment.get(PART, ""), environment.get(RUN), command))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return sorted(found, key=lambda member: member.process.create_time())


def _is_lost_rank(process: psutil.Process, command: Sequence[str], home: Path) -> bool:
    """A rank that a killed `rushes engine` left behind: nobody else would end it."""
    if "model.engine.rank" not in command:
        return False
    parent = process.parent()
    return parent is None or parent.environ().get("RUSHES_HOME") != str(home)


def part_of(family: Sequence[Member], part: str) -> Member | None:
    return next((member for member in family if member.part == part and member.is_part), None)


def runs_below(family: Sequence[Member], worker: Member) -> bool:
    return any(member.run and worker.pid in member.ancestors for member in family)


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def listens(process: psutil.Process, port: int) -> bool:
    try:
        connections = process.net_connections(kind="tcp")
    except psutil.NoSuchProcess:
        return False
    return any(c.status == psutil.CONN_LISTEN and c.laddr and c.laddr[1] == port for c in connections)


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
