"""Data on its way into a store: bytes, a file or a stream, digested as it is read."""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from infra.store.contract import CHUNK, Data

PART = 8 << 20  # S3: larger objects are sent in parts of this size; the client holds up to six of them in memory


class Source:
    """A rewound stream whose digest and size are known, and that must still be so when it is read again."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._start = stream, stream.tell()
        digest, self.size = hashlib.sha256(), 0
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            self.size += len(chunk)
        self.sha256 = digest.hexdigest()
        self.rewind()

    def rewind(self) -> None:
        self._stream.seek(self._start)
        self._again, self._left = hashlib.sha256(), self.size

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(self._left if size < 0 else min(size, self._left))
        self._again.update(data)
        self._left -= len(data)
        if (not data and self._left and size) or (not self._left and self._again.hexdigest() != self.sha256):
            raise ValueError(f"the source of {self.sha256[:12]}… ({self.size} bytes) changed while it was being stored")
        return data

    def chunks(self) -> Iterator[bytes]:
        while chunk := self.read(CHUNK):
            yield chunk


@contextmanager
def measured(data: Data) -> Generator[Source]:
    with ExitStack() as stack:
        if isinstance(data, Path):
            stream: BinaryIO = stack.enter_context(data.open("rb"))
        elif isinstance(data, bytes | bytearray | memoryview):
            stream = io.BytesIO(data)
        elif data.seekable():
            stream = data
        else:  # a pipe is read once, and its digest is known at its end only: keep it meanwhile, on disk when large
            stream = cast(BinaryIO, stack.enter_context(tempfile.SpooledTemporaryFile(max_size=PART)))
            while chunk := data.read(CHUNK):
                stream.write(chunk)
            stream.seek(0)
        yield Source(stream)
