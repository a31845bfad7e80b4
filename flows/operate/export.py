"""The export: copies a request's clips into a folder, under the names that people gave them, with a manifest.

Files arrive whole or not at all, and are checked against the digest in the ledger. Run again it copies what is missing.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from db.history import rows_of
from db.tables import ClipStatus
from db.view import HistoryRow, history
from flows.show import plain
from infra.files import atomic_path
from infra.store.contract import NoSuchKey, Store

CHUNK = 1 << 20
PAGE = 500  # rows of the ledger at a time
ENDING = {"video/mp4": ".mp4", "image/png": ".png"}
MANIFEST = "manifest.jsonl"
SHEET = "contact_sheet.png"
REPAIR = "`rushes audit --repair` has it rendered again"
DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\.|$)", re.IGNORECASE)  # of Windows, in every folder


@dataclass(slots=True)
class ExportReport:
    """Counts of an export, and what is wrong."""

    copied: int = 0
    there: int = 0  # already, with the right bytes
    missing: int = 0  # clips that are not done
    broken: list[str] = field(default_factory=list[str])  # one sentence for each clip whose bytes are gone or wrong


def export(
    session: Session, store: Store, request_id: str, folder: Path, *, on_clip: Callable[[str], None] = lambda _: None
) -> ExportReport:
    """Copy every done clip of the request and write `manifest.jsonl`, a line for every clip, done or not.

    The manifest's `file` is null where there is none. Raises StoreUnavailable, and OSError for a folder that cannot be
    written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = ExportReport()
    with atomic_path(folder / MANIFEST, sync=False) as part, part.open("wb") as manifest:
        for row, name in named(_rows(session, request_id)):
            file: str | None = None
            if row.status != ClipStatus.DONE:
                done.missing += 1
            elif wrong := _copy(store, row, folder / name, done):
                done.broken.append(wrong)
            else:
                file = name
                on_clip(name)
            line = {**{key: plain(value) for key, value in row.columns().items()}, "file": file}
            manifest.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    return done


def export_sheet(store: Store, key: str | None, folder: Path) -> bool:
    """Copy the request's contact sheet, if it has one, as `contact_sheet.png`."""
    if key is None:
        return False
    try:
        with store.open(key) as source, atomic_path(folder / SHEET, sync=False) as part, part.open("wb") as target:
            shutil.copyfileobj(source, target, CHUNK)
    except NoSuchKey:
        return False
    return True


def _rows(session: Session, request_id: str) -> Iterator[HistoryRow]:
    """Read the request's clips in order, a page at a time: no transaction stays open while bytes are copied."""
    last = ""
    while True:
        wanted = select(history).where(history.c.request_id == request_id, history.c.clip_id > last)
        page = list(rows_of(session, wanted.order_by(history.c.clip_id).limit(PAGE)))
        session.rollback()
        yield from page
        if len(page) < PAGE:
            return
        last = page[-1].clip_id


def named(rows: Iterator[HistoryRow]) -> Iterator[tuple[HistoryRow, str]]:
    """Each row with the name of its file, which no other row has on any file system, done or not."""
    taken = {Path(MANIFEST).stem, Path(SHEET).stem}
    for row in rows:
        stem = file_stem(row.clip_id, row.custom_id, row.sample, taken)
        yield row, f"{stem}{ENDING.get(row.media_type or '', '.bin')}"


def file_stem(clip_id: str, custom_id: str | None, sample: int, taken: set[str]) -> str:
    """A clip's file name without its ending: its custom_id and, from the second sample on, the sample; else its id.

    A name in `taken`, which holds them as the least discerning file system compares them, gets the clip's id behind it,
    then a number. Adds the name to `taken`.
    """
    stem = f"{portable(custom_id)}{f'-{sample}' if sample else ''}" if custom_id else clip_id
    distinct = stem if stem == clip_id else f"{stem}-{clip_id}"
    for name in chain((stem, distinct), (f"{distinct}-{number}" for number in count(2))):
        folded = unicodedata.normalize("NFKC", name).casefold()
        if folded not in taken:
            taken.add(folded)
            return name
    raise AssertionError("numbers do not end")


def portable(custom_id: str) -> str:
    """A custom_id as a file name on Linux, macOS and Windows: no folder, option, hidden file or device."""
    name = re.sub(r"[^\w.+=@-]+", "_", unicodedata.normalize("NFC", custom_id)).strip("._-")
    name = name.encode()[:150].decode(errors="ignore").rstrip(".") or "clip"
    return f"clip-{name}" if DEVICE.match(name) else name


def _copy(store: Store, row: HistoryRow, path: Path, done: ExportReport) -> str | None:
    """Copy one clip; a sentence if its bytes cannot be had."""
    assert row.object_key is not None and row.sha256 is not None
    if path.is_file() and _digest(path) == row.sha256:
        done.there += 1
        return None
    digest = hashlib.sha256()
    try:
        with store.open(row.object_key) as source, atomic_path(path, sync=False) as part, part.open("wb") as target:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                target.write(chunk)
            if digest.hexdigest() != row.sha256:
                raise _WrongBytes
    except NoSuchKey:
        return f"{row.clip_id}: its bytes are not in the store ({row.object_key}): {_again(row)}"
    except _WrongBytes:
        return f"{row.clip_id}: the store's bytes have another digest than the ledger ({row.object_key}): {REPAIR}"
    done.copied += 1
    return None


def _again(row: HistoryRow) -> str:
    return f"`rushes retry {row.request_id} --missing` has it rendered again"


class _WrongBytes(Exception):
    """The bytes of an object do not have the digest that names it."""


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
