"""A rank as a process: its inbox, its side thread, its memory, and how it ends."""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import threading
from collections.abc import Callable, Sequence
from typing import TypeAlias

from model.engine.job import JobOver, JobReady
from model.engine.messages import FromRank, ToRank
from model.engine.wire import Wire

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
Fatal: TypeAlias = Callable[[BaseException, Sequence[str]], None]  # reports an error and the clips; does not return


class Inbox:
    """The engine's messages, read by a thread of their own, which receives inside a long step too.

    A rank puts messages to itself in between. When the engine's end is closed the process ends.
    """

    def __init__(self, wire: Wire[FromRank, ToRank], fatal: Fatal) -> None:
        self.wire, self.fatal = wire, fatal
        self.messages: queue.SimpleQueue[ToRank | JobReady | JobOver] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def _read(self) -> None:
        try:
            while True:
                self.messages.put(self.wire.receive())
        except (EOFError, OSError):
            os._exit(1)
        except Exception as problem:  # a message that cannot be read
            self.fatal(problem, ())


class SideThread:
    """Runs one task after the other, on a GPU stream of its own. A task that raises ends the process."""

    def __init__(self, fatal: Fatal) -> None:
        self.work: queue.SimpleQueue[tuple[Callable[[], None], str]] = queue.SimpleQueue()
        self.fatal = fatal
        threading.Thread(target=self._run, name="side", daemon=True).start()

    def do(self, work: Callable[[], None], clip_id: str) -> None:
        """Queues a task for this clip."""
        self.work.put((work, clip_id))

    def _run(self) -> None:
        import torch

        torch.set_grad_enabled(False)  # which is a setting of each thread
        with torch.cuda.stream(torch.cuda.Stream()):
            while True:
                work, clip_id = self.work.get()
                try:
                    work()
                except BaseException as problem:
                    self.fatal(problem, [clip_id])


def end_with(parent: int) -> None:
    """Has the kernel kill this process when the thread that started it ends (prctl(2), PR_SET_PDEATHSIG).

    That ends a process that computes, and one that is stopped, which would not see a closed socket. Raises OSError
    where the kernel refuses.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) is refused: a rank could outlive its engine")
    if os.getppid() != parent:  # it ended before that
        os._exit(1)


class PeakMemory:
    """Peak memory over all ranks since their start, in bytes: allocated on the GPU, else resident."""

    def __init__(self, device: str, world: int) -> None:
        self.device, self.world = device, world

    def own(self) -> int:
        """The peak of this rank alone."""
        import torch

        from model.parallel.memory import resident_peak

        return torch.cuda.max_memory_allocated() if self.device == "cuda" else resident_peak()

    def of_all(self) -> int:
        """The highest peak of all ranks; every rank must ask."""
        import torch
        import torch.distributed as dist

        most = torch.tensor(self.own())
        if self.world > 1:
            dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)


def cpu_kind() -> str:
    """The properties of a CPU on which the order of its sums depends."""
    import platform

    import torch

    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
