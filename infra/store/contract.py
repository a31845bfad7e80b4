"""Keeps bytes, under their own digest, in an S3 bucket or in a folder: one contract, two kinds.

It knows nothing of clips, requests or the ledger. What the ledger relies on:

- A key under `blobs/` is the sha256 of its bytes, so it never changes and identical bytes are sent once.
- An object is there whole or not at all, also where the process that writes it is killed.
- When `put` returns, the bytes survive a crash of this machine (folder) or are acknowledged by the server (S3).
- `put` of bytes that are already there makes them young again (`Listed.modified`), so that a sweep of old objects
  without a row cannot take bytes that somebody is about to record. Sweep only what is older than a day.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Protocol

BLOBS = "blobs/sha256/"
OCTETS = "application/octet-stream"
LINK_SECONDS = 900  # that a signed link lives at most: whoever has it may read the object, and links get about
CHUNK = 1 << 20  # bytes read at a time: bounds memory, large enough to keep the disk and the hash busy
Data = bytes | Path | BinaryIO


class NoSuchKey(KeyError):
    """The store answered, and it has no such object. Nothing to retry; the key is wrong or was deleted."""

    exit_code = 1

    def __str__(self) -> str:  # KeyError shows the repr of its argument, which doubles the quotes
        return str(self.args[0]) if self.args else ""


class StoreUnavailable(Exception):
    """The store did not answer, or refused us. Says nothing about the object: try again, or mend what it names."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Stored:
    """An object in the store. `sha256` may be '' when asked by `stat` of a key that is no digest."""

    key: str
    sha256: str
    bytes: int
    media_type: str


@dataclass(frozen=True, slots=True)
class Listed:
    """One line of a listing; `modified` is the store's clock, in UTC."""

    key: str
    bytes: int
    modified: datetime


class Store(Protocol):
    """The contract of both kinds. Raises StoreUnavailable when the store does not answer, ValueError on a bad key."""

    def put(self, data: Data, media_type: str = OCTETS) -> Stored:
        """Store bytes under their digest; bytes that are there already are not sent again.

        A BinaryIO is read from where it stands to its end; nothing is ever held in memory whole.
        """
        ...

    def put_at(self, key: str, data: Data, media_type: str = OCTETS) -> Stored:
        """Store bytes under a name, over what was there. Not under `blobs/`, and never both `x` and `x/y`."""
        ...

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """The bytes [start, start + length) as a slice would give them. Raises NoSuchKey."""
        ...

    def open(self, key: str) -> BinaryIO:
        """The bytes as a stream to read forwards and close. Raises NoSuchKey."""
        ...

    def stat(self, key: str) -> Stored | None:
        """The entry of a key, without reading the bytes; None when there is no such object."""
        ...

    def exists(self, key: str) -> bool: ...

    def list(self, prefix: str = "") -> Iterator[Listed]:
        """All objects whose key begins with `prefix`, in the order of their keys."""
        ...

    def link(self, key: str, seconds: int = LINK_SECONDS) -> str:
        """A URL that a browser can open for that long (a folder's is a file:// one). Does not look for the object."""
        ...

    def delete(self, key: str) -> None:
        """Remove the object; nothing happens when there is none."""
        ...

    def delete_stale(self, key: str, before: datetime) -> bool:
        """Remove the object unless it was put (again) at or after `before`; True when it was removed."""
        ...

    def sweep_unfinished(self, seconds: float) -> int:
        """Remove what killed writers left half-written, if older than that; how many there were."""
        ...


def blob_key(sha256: str) -> str:
    """Where bytes of that digest (64 hex digits) live."""
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise ValueError(f"{sha256!r} is no sha256: 64 lower-case hex digits")
    return f"{BLOBS}{sha256[:2]}/{sha256[2:4]}/{sha256}"


MAX_KEY = 1024  # bytes: S3's own bound


def check_key(key: str) -> str:
    """The key itself, when every kind of store can hold it; ValueError otherwise.

    That is what S3 can: up to 1024 bytes of UTF-8, spaces, accents and control characters among them. But no parts `.`
    and `..`, which HTTP takes out of addresses, no NUL, and not white space alone.
    """
    shown = repr(key if len(key) <= 120 else f"{key[:119]}…")
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        raise ValueError(f"store key {shown} must be text: half a surrogate pair has no UTF-8") from None
    if not 1 <= size <= MAX_KEY:
        raise ValueError(f"store key {shown} has {size} bytes: it must have 1 to {MAX_KEY}")
    if not {".", ".."}.isdisjoint(key.split("/")) or "\0" in key or not key.strip():
        raise ValueError(f"store key {shown} must have no part '.' or '..', no NUL, and not be blank")
    return key


def check_name(key: str) -> None:
    if check_key(key).split("/")[0] == "blobs":
        raise ValueError(f"store key {key!r}: what lies under blobs/ is named by its digest; use put")


def check_range(start: int, length: int | None) -> None:
    if start < 0 or (length is not None and length < 0):
        raise ValueError(f"range start={start} length={length} must not be negative")
