"""The wire between an engine and a rank: JSON over a socket pair, with frames and bytes in a memory file beside it.

A message is a dataclass. Its fields are written and read by name, those of the dataclasses in it too, so that a new
field needs no line here. uint8 arrays and bytes go into the memory file, one after the other; the JSON has their sizes.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from mmap import PROT_READ, mmap
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, Generic, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from model.engine.clip import ClipSpec, RankInfo

KIND, ARRAY, BYTES = "$kind", "$array", "$bytes"
INSIDE = (ClipSpec, RankInfo)  # dataclasses that stand in fields of messages
Sent = TypeVar("Sent")
Received = TypeVar("Received")


class WireError(ValueError):
    """A message that cannot be read: engine and rank must run the same code."""


class Wire(Generic[Sent, Received]):
    """One end of a socket pair. Several threads may send, one receives."""

    def __init__(self, connection: Connection, receives: Any) -> None:
        """receives: the union of the messages that come in."""
        self.connection, self.turn = connection, threading.Lock()
        self.receives: tuple[type, ...] = get_args(receives)

    def send(self, message: Sent) -> None:
        """Raises OSError when the other end is gone."""
        with packed(message) as parcel:
            self.send_packed(parcel)

    def send_packed(self, parcel: Parcel) -> None:
        """Sends a message that `packed` made. Raises OSError when the other end is gone."""
        with self.turn:
            self.connection.send_bytes(parcel.text)
            if parcel.file is not None:
                send_handle(self.connection, parcel.file, None)

    def receive(self) -> Received:
        """Waits for a message. Raises EOFError or OSError when the other end is gone, WireError for an unknown one."""
        envelope = json.loads(self.connection.recv_bytes())
        file = recv_handle(self.connection) if envelope["file"] else None
        message = decode(envelope["message"], _mapped(file), (*self.receives, *INSIDE))
        if not isinstance(message, self.receives):
            raise WireError(f"{type(message).__name__} is not among {_names(self.receives)}")
        return message  # pyright: ignore[reportReturnType]


@dataclass(frozen=True, slots=True)
class Parcel:
    """A message as it goes over a wire, or over several."""

    text: bytes
    file: int | None  # descriptor of the memory file with its frames and bytes; None where it has none


@contextmanager
def packed(message: object) -> Generator[Parcel]:
    """Encodes a message. Its memory file lives as long as the context; each receiver gets a descriptor of its own."""
    plain, blobs = encode(message)
    with ExitStack() as open_files:
        file = None
        if any(len(blob) for blob in blobs):
            file = os.memfd_create("rushes-message")
            open_files.callback(os.close, file)
            for blob in blobs:
                while blob:
                    blob = blob[os.write(file, blob) :]
        yield Parcel(json.dumps({"file": file is not None, "message": plain}).encode(), file)


def encode(message: object) -> tuple[Any, list[memoryview]]:
    """The part of a dataclass that JSON can hold, and its arrays and bytes in the order of their fields."""
    blobs: list[memoryview] = []
    return _plain(message, blobs), blobs


def decode(plain: Any, blobs: npt.NDArray[np.uint8], kinds: Iterable[type]) -> Any:
    """The dataclass that `encode` was given; lists become tuples, arrays are views of `blobs` [bytes].

    Raises WireError for a dataclass that is not among `kinds`, or has other fields.
    """
    return _value(plain, _Reader(blobs), {kind.__name__: kind for kind in kinds})


# Not functions inside these two: one that calls itself would keep a message's memory file open until the garbage
# collector comes by.


def _plain(value: Any, blobs: list[memoryview]) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8:
            raise TypeError(f"an array of {value.dtype} cannot be sent, only of uint8")
        blobs.append(np.ascontiguousarray(value).reshape(-1).data)
        return {ARRAY: value.shape}
    if isinstance(value, bytes):
        blobs.append(memoryview(value))
        return {BYTES: len(value)}
    if isinstance(value, tuple | list):
        return [_plain(each, blobs) for each in value]  # pyright: ignore[reportUnknownVariableType]
    if is_dataclass(value):
        named = {each.name: _plain(getattr(value, each.name), blobs) for each in fields(value)}
        return {KIND: type(value).__name__, **named}
    return value


class _Reader:
    """A memory file, read from its beginning."""

    def __init__(self, blobs: npt.NDArray[np.uint8]) -> None:
        self.blobs, self.place = blobs, 0

    def take(self, size: int) -> npt.NDArray[np.uint8]:
        self.place += size
        if self.place > len(self.blobs):
            raise WireError(f"its memory file has {len(self.blobs)} bytes, {self.place} were announced")
        return self.blobs[self.place - size : self.place]


def _value(raw: Any, reader: _Reader, known: Mapping[str, type]) -> Any:
    match raw:
        case list():
            return tuple(_value(each, reader, known) for each in raw)  # pyright: ignore[reportUnknownVariableType]
        case {"$array": shape}:
            return reader.take(math.prod(shape)).reshape(shape)
        case {"$bytes": size}:
            return reader.take(size).tobytes()
        case {"$kind": name, **rest}:
            if name not in known:
                raise WireError(f"{name!r} is not among {_names(known.values())}")
            if rest.keys() != (wanted := {each.name for each in fields(known[name])}):
                raise WireError(f"{name} has the fields {sorted(rest)}, and should have {sorted(wanted)}")
            return known[name](**{key: _value(each, reader, known) for key, each in rest.items()})
        case _:
            return raw


def _names(kinds: Iterable[type]) -> str:
    return ", ".join(sorted(kind.__name__ for kind in kinds))


def _mapped(file: int | None) -> npt.NDArray[np.uint8]:
    """The contents of a memory file, read only; the descriptor is closed."""
    if file is None:
        return np.zeros(0, np.uint8)
    with open(file, "rb") as stream:
        return np.frombuffer(mmap(stream.fileno(), 0, prot=PROT_READ), np.uint8)
