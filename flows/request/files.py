"""Where prompt files lie: in the store or in the prompts folder, and under which digest."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from flows.request.fields import shown_value
from flows.request.form import PromptsFormat
from flows.request.unpack import CHUNK, BadFile
from infra.files import NO_ADDRESS


class BadUri(ValueError):
    """`prompts_uri` names something that a request may not read."""

    exit_code = 2


def digest_stream(stream: BinaryIO) -> tuple[str, int]:
    """(sha256 hex, bytes) of what is left in the stream."""
    digest, size = hashlib.sha256(), 0
    while chunk := stream.read(CHUNK):
        digest.update(chunk)
        size += len(chunk)
    return digest.hexdigest(), size


class _Opens(Protocol):
    """The part of a store that reading prompts needs."""

    def open(self, key: str) -> BinaryIO: ...


@dataclass(frozen=True, slots=True)
class InStore:
    """An object of the store."""

    key: str


@dataclass(frozen=True, slots=True)
class InFolder:
    """A file below the prompts folder, symlinks resolved."""

    path: Path


def locate(uri: str, folder: Path, name: str = "prompts_uri") -> InStore | InFolder:
    """The place that the key `name` names: `store:<key>`, or a file below `folder` (`file:<path>` or just the path).

    Nothing else can be named: no other file of this machine, through links or dots either, and no address of the
    network. Raises BadUri, and BadFile if the file does not exist.
    """
    shown = f"{name}={shown_value(uri)}"
    scheme, colon, rest = uri.partition(":")
    if colon and scheme == "store":
        if not rest or rest.startswith("/") or ".." in rest.split("/") or not rest.isprintable():
            raise BadUri(f"{shown} must name an object: store: and its key, without a leading / or ..")
        return InStore(rest)
    if colon and scheme == "file":
        path = rest.removeprefix("//") if rest.startswith("///") else rest
    elif colon and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        fetch = f": {NO_ADDRESS}" if rest.startswith("//") else ""
        raise BadUri(f"{shown} must be store:<key>, or a file below the prompts folder {folder}{fetch}")
    else:
        path = uri
    if not path or "\0" in path or ".." in Path(path).parts:
        raise BadUri(f"{shown} must name a file below the prompts folder {folder}, without ..")
    root = Path(os.path.realpath(folder))
    target = Path(os.path.realpath(root / path))
    if not target.is_relative_to(root):
        raise BadUri(f"{shown} leads out of the prompts folder {folder}: put the file there, or into the store")
    if not target.exists():
        raise BadFile(f"{path}: no such file below the prompts folder {folder}")
    return InFolder(target)


def open_uri(uri: str, *, folder: Path, store: _Opens) -> BinaryIO:
    """Opens what `prompts_uri` names. Raises BadUri and BadFile; a missing object raises what the store raises."""
    where = locate(uri, folder)
    return store.open(where.key) if isinstance(where, InStore) else open_file(where.path)


def prompts_key(sha256: str) -> str:
    """Where a prompt file lies in the store. Not under blobs/: no clip points at it, so a sweep would take it away."""
    return f"prompts/{sha256}"


def media_type_of(format: PromptsFormat) -> str:
    """The type under which the store keeps a prompt file."""
    return MEDIA_TYPE.get(format, "text/plain")


MEDIA_TYPE = {PromptsFormat.CSV: "text/csv", PromptsFormat.JSONL: "application/x-ndjson"}


def open_file(path: Path) -> BinaryIO:
    """Opens a regular file for reading. Raises BadFile in one line for anything else."""
    try:
        # Not blocking, so that a named pipe is refused and not waited for.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise BadFile(f"{path}: no such file") from None
    except OSError as error:
        raise BadFile(f"{path}: cannot be read ({(error.strerror or str(error)).lower()})") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise BadFile(f"{path}: is not a file")
    return open(handle, "rb", buffering=0)
