"""A prompt file's bytes as plain ones: gzip is unpacked, and what is no text is named by how it begins.

A hostile file costs bounded memory and time: gzip is unpacked a chunk at a time, and no further than is sensible.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from typing import BinaryIO

CHUNK = 1 << 18
HEAD = 512  # bytes by which a kind of file is told
MAX_UNPACKED = 1 << 30  # bytes that a gzip file may hold
MAX_RATIO = 200  # times its own size that it may hold; prompts shrink to a fifth or a twentieth
FREE = 1 << 24  # bytes that any gzip file may hold, whatever its ratio

GZIP = b"\x1f\x8b"
AS_CSV = "save the sheet as CSV (UTF-8)"
AS_TEXT = "save it as plain text (UTF-8)"
UNPACK = "unpack it, or compress it with gzip"
# How files begin that are no prompts: what each is, and what to do.
MAGIC = (
    (b"\xff\xfe\0\0", "is written in UTF-32: save it as UTF-8"),
    (b"\0\0\xfe\xff", "is written in UTF-32: save it as UTF-8"),
    (b"\xff\xfe", "is written in UTF-16: save it as UTF-8"),
    (b"\xfe\xff", "is written in UTF-16: save it as UTF-8"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", f"is an old Office file (.xls, .doc): {AS_CSV}, or as plain text"),
    (b"%PDF-", f"is a PDF: {AS_TEXT}"),
    (b"{\\rtf", f"is rich text (RTF): {AS_TEXT}"),
    (b"\x28\xb5\x2f\xfd", f"is compressed with zstd, which is not read here: {UNPACK}"),
    (b"\xfd7zXZ\0", f"is compressed with xz, which is not read here: {UNPACK}"),
    (b"BZh", f"is compressed with bzip2, which is not read here: {UNPACK}"),
    (b"\x04\x22\x4d\x18", f"is compressed with lz4, which is not read here: {UNPACK}"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive: unpack it, and submit a file of it"),
    (b"Rar!\x1a\x07", "is a RAR archive: unpack it, and submit a file of it"),
    (b"PAR1", "is a Parquet file: write it as JSON lines or CSV"),
    (b"ARROW1", "is an Arrow file: write it as JSON lines or CSV"),
    (b"SQLite format 3\0", "is an SQLite database: write a table of it as CSV"),
    (b"\x89PNG\r\n", "is a picture (PNG): name it as the image of a prompt"),
    (b"\xff\xd8\xff", "is a picture (JPEG): name it as the image of a prompt"),
)
INSIDE = (  # of a ZIP archive: a name in it, and what the archive then is
    (b"xl/", f"is an Excel workbook (.xlsx): {AS_CSV}"),
    (b"opendocument.spreadsheet", f"is an OpenDocument spreadsheet (.ods): {AS_CSV}"),
    (b"word/", f"is a Word document (.docx): {AS_TEXT}"),
    (b"opendocument.text", f"is an OpenDocument text (.odt): {AS_TEXT}"),
)


class BadFile(ValueError):
    """The file as a whole cannot be read as prompts: missing, empty, no text, or without a usable header row."""

    exit_code = 2


def plain_chunks(stream: BinaryIO, source: str) -> Iterator[bytes]:
    """The bytes of `stream` (open at its beginning), unpacked where they are gzip. `source` names it in messages.

    Raises BadFile for a file of another kind, and for gzip that is damaged, cut short or unpacks to too much.
    """
    chunks = _with_head(iter(lambda: stream.read(CHUNK), b""))
    first = next(chunks, b"")
    if first.startswith(GZIP):
        chunks = _with_head(_unpacked(first, chunks, source))
        first = next(chunks, b"")
        if first.startswith(GZIP):
            raise BadFile(f"{source}: is compressed with gzip twice: unpack it")
    if kind := kind_of(first):
        raise BadFile(f"{source}: {kind}")
    yield first
    yield from chunks


def kind_of(head: bytes) -> str | None:
    """The kind of a file that begins so, and what to do with it, in words that follow its name; None of a text."""
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        inside = (said for name, said in INSIDE if name in head)
        return next(inside, "is a ZIP archive: unpack it, and submit a file of it")
    for magic, said in MAGIC:
        if head.startswith(magic):
            return said
    if head[257:262] == b"ustar":
        return "is a tar archive: unpack it, and submit a file of it"
    if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype html|html|\?xml)[\s>]", head, re.IGNORECASE):
        return f"is a web page or XML: {AS_TEXT}"
    pairs = head[:16]
    if len(pairs) >= 4 and any(not any(pairs[k::2]) and all(pairs[1 - k :: 2]) for k in (0, 1)):
        return "is written in UTF-16: save it as UTF-8"
    return None


def _with_head(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes, of which the first piece is long enough to tell the kind of the file."""
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= HEAD:
            break
    yield head
    yield from chunks


def _unpacked(first: bytes, rest: Iterator[bytes], source: str) -> Iterator[bytes]:
    """The contents of a gzip file, member after member, in pieces of at most CHUNK."""
    member, whole = zlib.decompressobj(wbits=31), False  # 31: with gzip's header and checksum
    read = written = 0
    for packed in _first_then(first, rest):
        read += len(packed)
        left = packed
        while left:
            if whole:
                if not left.strip(b"\0"):  # tapes and disks are padded so
                    break
                member, whole = zlib.decompressobj(wbits=31), False
            try:
                piece = member.decompress(left, CHUNK)
            except zlib.error:
                raise BadFile(f"{source}: is damaged: its gzip data cannot be unpacked") from None
            written += len(piece)
            if written > MAX_UNPACKED or (written > FREE and written > MAX_RATIO * read):
                bound = f"{MAX_UNPACKED:,} bytes, or {MAX_RATIO} times its size"
                raise BadFile(f"{source}: unpacks to more than {bound}: unpack it, and submit the plain file")
            if piece:
                yield piece
            whole = member.eof
            left = member.unused_data if whole else member.unconsumed_tail
    if not whole:
        raise BadFile(f"{source}: ends in the middle of its gzip data: it was cut short")


def _first_then(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest
