"""The processes of an engine's ranks: started, listened to, asked for the cause when one fails, and ended.

Knows processes and messages, no tensors and no clips: torch lives in the ranks (`model.engine.rank`).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, TypeAlias

from model.engine import buffers
from model.engine.clip import (
    DeviceFailed,
    EngineError,
    OutOfMemory,
    RankDied,
    RankHung,
    RankInfo,
    RenderFailed,
    StartFailed,
)
from model.engine.messages import Exit, FromRank, RankFailed, RankReady, RankSettings, ToRank
from model.engine.wire import Wire, encode, packed

POLL = 0.1  # seconds that `next_message` waits
LOOK = 1.0  # seconds between two looks at what ranks that load have read
READS = 1 << 16  # bytes between two looks that count: less is what any process reads now and then
PAGE = os.sysconf("SC_PAGE_SIZE")
EXIT = 2.0  # seconds that ranks have to leave
LAST_LINES = 1.0  # seconds for what a dead rank wrote; a process that it left behind may hold its pipe for longer
LINE = 1 << 16  # bytes after which a line without an end is taken as it is
Report: TypeAlias = RankFailed | None  # of a rank: its last message, or None where it is gone without one


@dataclass(slots=True)
class _Rank:
    process: subprocess.Popen[bytes]
    wire: Wire[ToRank, FromRank]


class Ranks:
    """The ranks of one engine, and the memory files that clips come back in.

    world: how many there are. settings: of each; what differs between them is filled in here. environment: variables
    beside this process's own. log: takes their standard output and error, a file, or a function line by line; None:
    this process's standard error. buffers: how many clips may be under way.
    """

    def __init__(
        self,
        world: int,
        settings: RankSettings,
        environment: Mapping[str, str],
        log: Path | Callable[[int, str], None] | None,
        buffers: int,
    ) -> None:
        self.world, self.settings, self.environment, self.log, self.count = world, settings, environment, log, buffers
        self.ready: tuple[RankInfo, ...] = ()
        self.buffers: list[int] = []
        self._ranks: list[_Rank] = []
        self._readers: list[threading.Thread] = []  # of what they write
        # The kernel ends a rank with the thread that started it: this one lasts, whichever thread calls `start`.
        self._starter = ThreadPoolExecutor(1, "ranks")

    def start(self, timeout: float) -> None:
        """Starts the ranks and waits until every one has loaded and tested its part.

        timeout: seconds without one that becomes ready or reads. Raises StartFailed, RankDied or RankHung; `end` must
        be called then.
        """
        self._starter.submit(self._spawn).result()
        self.ready = self._greetings(timeout)

    def tell(self, message: ToRank, rank: int = 0) -> None:
        """Raises RankDied, or the error that the rank reported, where it is gone."""
        try:
            self._ranks[rank].wire.send(message)
        except OSError:
            raise self._trouble(rank, None) from None

    def tell_all(self, message: ToRank) -> None:
        """Tells every rank; raises as `tell`."""
        with packed(message) as parcel:
            for number, rank in enumerate(self._ranks):
                try:
                    rank.wire.send_packed(parcel)
                except OSError:
                    raise self._trouble(number, None) from None

    def next_message(self) -> FromRank | None:
        """A message of rank 0, or None after a moment without one.

        Raises RankDied for a rank that died, or the error that a rank reported: OutOfMemory, DeviceFailed,
        RenderFailed, RankDied.
        """
        numbers = {rank.wire.connection: number for number, rank in enumerate(self._ranks)}
        for connection in sorted(wait(list(numbers), POLL), key=lambda c: numbers[c]):  # pyright: ignore
            number = numbers[connection]  # pyright: ignore
            message = self._listen(number)
            if message is None or isinstance(message, RankFailed):
                raise self._trouble(number, message)
            return message
        return None

    def kill(self) -> None:
        """Ends the ranks now, from any thread."""
        for rank in tuple(self._ranks):
            rank.process.kill()

    def close(self) -> None:
        """Asks the ranks to leave, and ends those that have not within two seconds."""
        for rank in self._ranks:
            with suppress(OSError):
                rank.wire.send(Exit())
        deadline = time.monotonic() + EXIT
        for rank in self._ranks:
            with suppress(subprocess.TimeoutExpired):
                rank.process.wait(max(0.0, deadline - time.monotonic()))
        self.end()

    def end(self) -> None:
        """Ends every rank now and takes back what belonged to them."""
        self._starter.shutdown()  # first, for an interrupt may have come while it still starts some
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            rank.process.wait()
            rank.wire.connection.close()
        for reader in self._readers:
            reader.join(LAST_LINES)
        buffers.close(self.buffers)
        self._ranks, self._readers, self.buffers, self.ready = [], [], [], ()

    def states(self) -> str:
        """The kernel's word on each rank."""
        states: list[str] = []
        for k, rank in enumerate(self._ranks):
            try:
                state = Path(f"/proc/{rank.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                state = "gone"
            names = {"R": "running", "S": "waiting", "D": "in the kernel", "T": "stopped", "Z": "dead"}
            states.append(f"rank {k} is {names.get(state, state)}")
        return ", ".join(states)

    def _spawn(self) -> None:
        """Every rank leads a process group of its own: a Ctrl-C for the engine must not reach it first.

        The engine binds the port that the ranks meet on and rank 0 inherits the socket, so that no other process can
        take it.
        """
        self.buffers = buffers.create(self.count)
        output = self.log.open("ab") if isinstance(self.log, Path) else None
        try:
            with socket.create_server(("127.0.0.1", 0), backlog=max(self.world, 16)) as listener:
                for rank in range(self.world):
                    ours, theirs = socket.socketpair()
                    with theirs:
                        settings = replace(
                            self.settings,
                            rank=rank,
                            parent=os.getpid(),
                            port=listener.getsockname()[1],
                            wire=theirs.fileno(),
                            listener=listener.fileno() if rank == 0 else None,
                            buffers=tuple(self.buffers) if rank == 0 else (),
                        )
                        inherited = [theirs.fileno(), *([listener.fileno(), *self.buffers] if rank == 0 else [])]
                        process = subprocess.Popen(
                            [sys.executable, "-m", "model.engine.rank", json.dumps(encode(settings)[0])],
                            stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE if callable(self.log) else output or 2,
                            stderr=subprocess.STDOUT if callable(self.log) else output or 2,
                            pass_fds=inherited,
                            process_group=0,
                            cwd=Path(__file__).resolve().parents[2],  # where `python -m` finds this very package
                            env={**os.environ, **self.environment},
                        )
                    self._ranks.append(_Rank(process, Wire(Connection(ours.detach()), FromRank)))
                    if process.stdout is not None and callable(self.log):
                        reader = threading.Thread(target=_read, args=(process.stdout, self.log, rank), daemon=True)
                        reader.start()
                        self._readers.append(reader)
        finally:
            if output is not None:
                output.close()

    def _greetings(self, timeout: float) -> tuple[RankInfo, ...]:
        ready: dict[int, RankInfo] = {}
        heard, read = time.monotonic(), self._bytes_read()
        while len(ready) < self.world:
            connections = [rank.wire.connection for rank in self._ranks]
            for connection in wait(connections, min(timeout, LOOK)):
                number = connections.index(connection)  # pyright: ignore
                message = self._listen(number)
                if not isinstance(message, RankReady):
                    raise self._trouble(number, message if isinstance(message, RankFailed) else None)
                ready[number], heard = message.info, time.monotonic()
            if (now := self._bytes_read()) > read + READS:  # weights on a slow disk or network
                heard, read = time.monotonic(), now
            elif time.monotonic() - heard > timeout and len(ready) < self.world:
                first = min(set(range(self.world)) - ready.keys())
                raise RankHung(f"rank {first} was not ready and read nothing for {timeout:g} s; {self.states()}")
        return tuple(ready[number] for number in range(self.world))

    def _bytes_read(self) -> int:
        """Bytes that the ranks have read so far, from files or by touching pages of mapped ones (proc(5))."""
        total = 0
        for rank in self._ranks:
            with suppress(OSError):  # it has ended
                process = Path(f"/proc/{rank.process.pid}")
                faults = int((process / "stat").read_text().rpartition(")")[2].split()[9])  # that read from a disk
                said = dict(line.split(": ") for line in (process / "io").read_text().splitlines())
                total += int(said["rchar"]) + faults * PAGE
        return total

    def _listen(self, number: int) -> FromRank | None:
        """The next message of a rank, None if it is gone."""
        try:
            return self._ranks[number].wire.receive()
        except (EOFError, OSError):
            return None

    def _trouble(self, number: int, report: Report) -> EngineError:
        """Finds the cause: the peers of a rank that died report broken collectives, which mean nothing."""
        reports: dict[int, Report] = {number: report}
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            others = {r.wire.connection: k for k, r in enumerate(self._ranks) if k not in reports}
            if not others:
                break
            for connection in wait(list(others), deadline - time.monotonic()):
                other = others[connection]  # pyright: ignore
                said = self._listen(other)
                if said is None or isinstance(said, RankFailed):
                    reports[other] = said
        for k, said in reports.items():
            if said is None:
                with suppress(subprocess.TimeoutExpired):
                    self._ranks[k].process.wait(1)
                return RankDied(f"rank {k} of {self.world} died ({_ending(self._ranks[k].process.poll())})")
        return self._error([said for said in reports.values() if said is not None])

    def _error(self, reports: Sequence[RankFailed]) -> EngineError:
        """The error that ranks reported: the first one's."""
        first = min(reports, key=lambda report: report.time)
        if not self.ready:
            return StartFailed(first.reason)
        if first.cause == "memory":
            return OutOfMemory(f"a rank ran out of memory ({self.settings.micro_batch} at a time): {first.reason}")
        if first.cause == "device":
            return DeviceFailed(f"a device failed under a rank: {first.reason}")
        if len(first.clips) == 1:
            return RenderFailed(first.clips[0], first.reason)
        return RankDied(f"a rank failed: {first.reason}")


def _read(pipe: IO[bytes], said: Callable[[int, str], None], rank: int) -> None:
    """Hands every line that a rank writes to `said`, until it ends."""
    with pipe:
        for line in iter(lambda: pipe.readline(LINE), b""):
            said(rank, line.decode("utf-8", "replace"))


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"
