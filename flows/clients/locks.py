"""Locks on files. They go with the process that holds them, however it ends."""

from __future__ import annotations

import fcntl
from typing import IO


def locked(file: IO[str]) -> bool:
    """Takes the lock of an open file for this process alone, without waiting; False when others hold it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
