"""Files that appear whole or not at all, so that a training that is killed goes on from true ones."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: Path) -> Generator[Path]:
    """A path to write to, in the same folder, that is renamed to `path` at the end; after an error it is deleted.

    One process at a time may write a file; what a killed one has left is overwritten by the next.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        written = os.open(part, os.O_RDONLY)
        try:
            os.fsync(written)
        finally:
            os.close(written)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
