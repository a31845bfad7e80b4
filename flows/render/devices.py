"""Which of a host's GPUs an engine may use, when several engines share them.

A number of a GPU is a file that is locked for as long as its engine lives: however that ends, the number is free again.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

FOLDER = "devices"  # in the home folder
POLL = 1.0  # seconds between two looks for free ones


class NoDevices(RuntimeError):
    """Other engines of this host kept its GPUs. The work is still queued: an engine that starts later will find it."""

    exit_code = 1


@contextmanager
def hold_devices(home: Path, total: int, wanted: int, seconds: float) -> Generator[tuple[int, ...]]:
    """Numbers of `wanted` of the host's `total` GPUs, which nobody else gets before the context ends.

    Waits for all of them at once, holding none meanwhile, so that two engines never wait for each other.
    Raises NoDevices after `seconds`.
    """
    folder = home / FOLDER
    folder.mkdir(exist_ok=True)
    until = time.monotonic() + seconds
    while (found := _take(folder, total, wanted)) is None:
        if time.monotonic() > until:
            raise NoDevices(f"{wanted} of this host's {total} GPUs were never free at once for {seconds:g} s")
        time.sleep(POLL)
    numbers, held = found
    with held:
        yield numbers


def _take(folder: Path, total: int, wanted: int) -> tuple[tuple[int, ...], ExitStack] | None:
    with FileLock(folder / "turn"), ExitStack() as held:
        numbers: list[int] = []
        for number in range(total):
            if len(numbers) == wanted:
                break
            with suppress(Timeout):
                # Whichever thread ends the engine gives the device back.
                held.enter_context(FileLock(folder / str(number), timeout=0, thread_local=False))
                numbers.append(number)
        return (tuple(numbers), held.pop_all()) if len(numbers) == wanted else None
