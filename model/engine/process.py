"""A rank as a process: its inbox, its side thread, its memory, and how it ends."""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import threading
from collections.abc import Callable, Sequence

from model.engine.wire import Message, Wire

PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class Inbox:
    """The parent's messages, read by a thread of its own, which hears them inside a long step too."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def _read(self) -> None:
        try:
            while True:
                self.messages.put(self.wire.receive())
        except (EOFError, OSError):
            os._exit(1)


class Side:
    """A thread that does one thing after the other, on a GPU's stream of its own. What it raises ends the process."""

    def __init__(self, fatal: Callable[[BaseException, Sequence[str]], None]) -> None:
        self.work: queue.SimpleQueue[tuple[Callable[[], None], str]] = queue.SimpleQueue()
        self.fatal = fatal
        threading.Thread(target=self._run, name="side", daemon=True).start()

    def do(self, work: Callable[[], None], clip_id: str) -> None:
        """Something for this clip."""
        self.work.put((work, clip_id))

    def _run(self) -> None:
        import torch

        torch.set_grad_enabled(False)  # which every thread must say for itself
        with torch.cuda.stream(torch.cuda.Stream()):
            while True:
                work, clip_id = self.work.get()
                try:
                    work()
                except BaseException as problem:
                    self.fatal(problem, [clip_id])


def end_with(parent: int) -> None:
    """From now on the kernel kills this process when the thread that started it ends (prctl(2), PR_SET_PDEATHSIG).

    That needs no turn of this process: one that computes is ended, and one that somebody stopped, which no closed
    socket can tell anything.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) is refused: a rank could outlive its engine")
    if os.getppid() != parent:  # it ended before that
        os._exit(1)


def out_of_memory(problem: BaseException) -> bool:
    """Whether fewer clips at once could have helped."""
    import torch

    of_cpu = ("can't allocate memory", "not enough memory", "could not create a primitive")  # the last is oneDNN's
    said = isinstance(problem, RuntimeError) and any(words in str(problem) for words in of_cpu)
    return said or isinstance(problem, MemoryError | torch.OutOfMemoryError)


class Peak:
    """The most memory that any rank has had, in bytes: allocated on its GPU, else resident."""

    def __init__(self, device: str, world: int) -> None:
        self.device, self.world = device, world

    def own(self) -> int:
        """Of this rank alone."""
        import torch

        from model.parallel.memory import resident_peak

        return torch.cuda.max_memory_allocated() if self.device == "cuda" else resident_peak()

    def __call__(self) -> int:
        import torch
        import torch.distributed as dist

        most = torch.tensor(self.own())
        if self.world > 1:
            dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)


def write_all(file: int, data: bytes | memoryview) -> None:
    """Lays bytes into a memory file, from its beginning."""
    view, offset = memoryview(data), 0
    while view:
        count = os.pwrite(file, view, offset)
        view, offset = view[count:], offset + count


def cpu_kind() -> str:
    """What decides in which order a CPU's sums are added up."""
    import platform

    import torch

    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
