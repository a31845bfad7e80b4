"""The cache of fetched models: those in use stay, and of the others the last used, up to a bound.

Beside each model's folder lie two files that are only ever locked. `.lock` is held by the process that fetches the
model; `.use` is shared by all processes that use it, until they end, and its time says when one last began to.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import ExitStack
from pathlib import Path

from filelock import FileLock, Timeout, lock_descriptor

_used: dict[Path, int] = {}  # by this process: descriptors, never closed, whose locks go with it


def in_use(folder: Path) -> bool:
    """Keep the model here for as long as this process lives; False if it is not here."""
    lock = _beside(folder, "use")
    lock.parent.mkdir(parents=True, exist_ok=True)
    if folder not in _used:
        _used[folder] = os.open(lock, os.O_WRONLY | os.O_CREAT)
        fcntl.flock(_used[folder], fcntl.LOCK_SH)
    os.utime(lock)
    if not folder.is_dir():
        os.close(_used.pop(folder))
        return False
    return True


def make_room(folder: Path, needed: int, bound: int) -> int:
    """Delete other models of the cache, least recently used first, until `needed` bytes more keep within the bound.

    Those in use or being fetched stay, however large, and so does what is needed: a bound is no reason not to render.
    Returns how many were deleted.
    """
    others = [each for each in folder.parent.iterdir() if each.is_dir() and _digest(each) != _digest(folder)]
    sizes = {each: sum(file.stat().st_size for file in each.rglob("*") if file.is_file()) for each in others}
    kept, deleted = sum(sizes.values()), 0
    for old in sorted(others, key=_last_used):
        if kept + needed <= bound:
            break
        if _delete(old):
            kept, deleted = kept - sizes[old], deleted + 1
    return deleted


def _delete(folder: Path) -> bool:
    """Delete a model, or part of one, unless a process needs it; no process ever sees half of it."""
    with ExitStack() as locks:
        use = locks.enter_context(_beside(folder, "use").open("a"))
        if not lock_descriptor(use.fileno(), blocking=False):
            return False
        try:
            locks.enter_context(FileLock(_beside(folder, "lock"), timeout=0))
        except Timeout:
            return False
        part = _beside(folder, "part")  # what is left of it after a crash looks like a fetch that was killed
        shutil.rmtree(part, ignore_errors=True)
        if folder != part:
            folder.rename(part)
            shutil.rmtree(part)
    return True


def _last_used(folder: Path) -> float:
    lock = _beside(folder, "use")
    return lock.stat().st_mtime if lock.is_file() else 0.0


def _digest(folder: Path) -> str:
    return folder.name.partition(".")[0]


def _beside(folder: Path, name: str) -> Path:
    """A file of this model's in the cache. To be opened to append: to truncate it would change its time."""
    return folder.with_name(f"{_digest(folder)}.{name}")
