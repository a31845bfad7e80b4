"""Which of a host's GPUs an engine may use, when several engines share them.

A number of a GPU is a file that is locked for as long as its engine lives: however that ends, the number is free again.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import takewhile
from pathlib import Path

from filelock import FileLock, Timeout

from flows.plan.layout import parse_gpus
from flows.settings import AUTO, Settings
from model.config import Partition

FOLDER = "devices"  # in the home folder
POLL = 1.0  # seconds between two looks for free ones


class NoDevices(RuntimeError):
    """Other engines of this host kept its GPUs. The work is still queued: an engine that starts later will find it."""

    exit_code = 1


class TooFewDevices(RuntimeError):
    """A partition needs more GPUs than this host has."""

    exit_code = 2


def visible_gpus(folder: Path = Path("/dev")) -> list[str]:
    """Names of the GPUs that this process may use, in CUDA's order; found without CUDA, which takes memory on each."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:  # CUDA itself stops at the first that it does not know
        return list(takewhile(lambda name: name not in ("", "-1"), map(str.strip, shown.split(","))))
    return [str(k) for k in range(sum(re.fullmatch(r"nvidia\d+", each.name) is not None for each in folder.iterdir()))]


def known_gpus(settings: Settings) -> int | None:
    """How many GPUs this host's engines have, by the settings and by what is seen; None where neither tells."""
    said = parse_gpus(settings.gpus)[0] if settings.gpus else 0
    seen = len(visible_gpus()) if settings.device == "cuda" else 0
    return min(filter(None, (said, seen)), default=None)


def engines_here(settings: Settings, limit: int | None = None) -> int:
    """Engines that this host's worker takes at once: `limit`, else the setting, and never more than devices hold.

    One where nothing is known of devices, as on a CPU. Raises TooFewDevices where not even one fits.
    """
    asked, total = limit or settings.host_engines, known_gpus(settings)
    if total is None:
        return asked or 1
    each = 1 if settings.partition == AUTO else Partition.parse(settings.partition).world
    if total < each:
        raise TooFewDevices(
            f"an engine of partition {settings.partition} needs {each} GPUs, and this host has {total}: set "
            "RUSHES_PARTITION to fewer ranks, or show it more GPUs (RUSHES_GPUS, CUDA_VISIBLE_DEVICES)"
        )
    return min(asked or total, total // each)


@contextmanager
def hold_devices(
    home: Path, total: int, wanted: int, seconds: float, names: Sequence[str] | None = None
) -> Generator[tuple[int, ...]]:
    """Numbers of `wanted` of the host's `total` GPUs, which nobody else gets before the context ends.

    names: of all of them, by which engines with other numbers for them know them; None: their numbers.
    Waits for all of them at once, holding none meanwhile, so that two engines never wait for each other.
    Raises NoDevices after `seconds`.
    """
    folder = home / FOLDER
    folder.mkdir(exist_ok=True)
    until = time.monotonic() + seconds
    files = [name.replace("/", "-") for name in names or map(str, range(total))][:total]
    while (found := _take(folder, files, wanted)) is None:
        if time.monotonic() > until:
            raise NoDevices(f"{wanted} of this host's {total} GPUs were never free at once for {seconds:g} s")
        time.sleep(POLL)
    numbers, held = found
    with held:
        yield numbers


def _take(folder: Path, files: Sequence[str], wanted: int) -> tuple[tuple[int, ...], ExitStack] | None:
    with FileLock(folder / "turn"), ExitStack() as held:
        numbers: list[int] = []
        for number, file in enumerate(files):
            if len(numbers) == wanted:
                break
            with suppress(Timeout):
                # Whichever thread ends the engine gives the device back.
                held.enter_context(FileLock(folder / file, timeout=0, thread_local=False))
                numbers.append(number)
        return (tuple(numbers), held.pop_all()) if len(numbers) == wanted else None
