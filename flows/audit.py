"""Compares the ledger with the store: every row has its bytes, every blob has its row, every digest is true."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from db.ledger import known_keys
from db.tables import Artifact
from infra.store import Listed, NoSuchKey, Store

CHUNK = 1 << 20
BATCH = 500  # rows of one statement
YOUNG = timedelta(minutes=1)  # bytes are stored before their row is written, so young bytes may have none yet

Problem = Literal["missing", "wrong size", "wrong digest", "orphan"]


@dataclass(frozen=True, slots=True)
class Breach:
    """One object about which ledger and store disagree."""

    problem: Problem
    key: str
    detail: str


@dataclass(slots=True)
class Audited:
    """What was compared. Complete when `audit` has been read to its end."""

    rows: int = 0
    blobs: int = 0
    hashed: int = 0  # bytes


def audit(session: Session, store: Store, audited: Audited, *, hash_bytes: bool = True) -> Iterator[Breach]:
    """Yields every breach as it is found and counts in `audited`. Raises StoreUnavailable.

    `hash_bytes=False` compares existence and size only. Works while engines run: an object's bytes come first and its
    row second, so rows are looked at before blobs, and blobs younger than a minute are left alone.
    """
    for row in _rows(session):
        audited.rows += 1
        if breach := _look_at(row, store, audited, hash_bytes):
            yield breach
    listed = (item for item in store.list("blobs/") if item.modified < datetime.now(UTC) - YOUNG)
    while batch := list(islice(listed, BATCH)):
        audited.blobs += len(batch)
        yield from _orphans(session, batch)


def _rows(session: Session) -> Iterator[Artifact]:
    """All artifacts by key, a page at a time: no transaction stays open while bytes are hashed."""
    last = ""
    while True:
        page = session.scalars(select(Artifact).where(Artifact.key > last).order_by(Artifact.key).limit(BATCH)).all()
        session.expunge_all()
        session.rollback()
        yield from page
        if len(page) < BATCH:
            return
        last = page[-1].key


def _look_at(row: Artifact, store: Store, audited: Audited, hash_bytes: bool) -> Breach | None:
    there = store.stat(row.key)
    if there is None:
        return Breach("missing", row.key, "the ledger has the row, the store has no such object")
    if there.bytes != row.bytes:
        return Breach("wrong size", row.key, f"{there.bytes} bytes in the store, {row.bytes} in the ledger")
    if not hash_bytes:
        return None
    digest = hashlib.sha256()
    try:
        with store.open(row.key) as stream:
            while chunk := stream.read(CHUNK):
                audited.hashed += len(chunk)
                digest.update(chunk)
    except NoSuchKey:
        return Breach("missing", row.key, "it went away while it was being read")
    if digest.hexdigest() != row.sha256:
        return Breach("wrong digest", row.key, f"its bytes have the sha256 {digest.hexdigest()}")
    return None


def _orphans(session: Session, batch: list[Listed]) -> Iterator[Breach]:
    known = known_keys(session, [item.key for item in batch])
    session.rollback()
    for item in batch:
        if item.key not in known:
            yield Breach("orphan", item.key, f"{item.bytes} bytes since {item.modified:%Y-%m-%d %H:%M}, and no row")
