"""Files that appear whole or not at all, and what is no file's name."""

from __future__ import annotations

import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: Path, *, part: Path | None = None, private: bool = False, sync: bool = True) -> Generator[Path]:
    """A path to write to, in the same folder, that is renamed to `path` at the end; after an error it is deleted.

    part: this path in place of one of this process's own, where a lock keeps others away from it.
    private: only its owner may read it. sync: even a power cut leaves no file with other bytes under this name.
    """
    part = part or path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if private else 0o666))
        yield part
        if sync:
            written = os.open(part, os.O_RDONLY)
            try:
                os.fsync(written)
            finally:
                os.close(written)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


NO_ADDRESS = "nothing is fetched from the network"


def is_address(name: str) -> bool:
    """An address of the network, such as https://…, where a file is to be named."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", name) is not None
