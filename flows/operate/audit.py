"""The audit: compares the ledger with itself and with the store.

No row contradicts another, every row has its bytes, every object has its row, every digest is true.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import islice

from sqlalchemy import select
from sqlalchemy.orm import Session

from db.artifacts import ArtifactRow, known_keys
from db.audit import contradictions, resume_keys
from db.lost import Users, needed, users
from db.tables import UNENDED, Artifact, Request
from infra.store.contract import Listed, NoSuchKey, Store

CHUNK = 1 << 20
BATCH = 500  # rows of one statement
# Bytes are stored before their row is written, so young bytes may have none yet; a cancel or a kill leaves such behind.
# Maintenance deletes objects of this age that no row knows. Checkpoints are many, and of no use to another clip.
CHECKPOINTS, PUBLISHED = "checkpoints/", "requests/"  # what begins their keys
ORPHAN_AGE = {"blobs/": timedelta(days=1), CHECKPOINTS: timedelta(hours=1)}
REFERENCES = {"blobs/": known_keys, CHECKPOINTS: resume_keys}  # which of some keys rows refer to
MISSING, WRONG_SIZE, WRONG_DIGEST = "missing", "wrong size", "wrong digest"
OVERDUE = timedelta(hours=1)  # for which maintenance, which comes every ten minutes, may be late


@dataclass(frozen=True, slots=True)
class Breach:
    """A fault found: missing, wrong size, wrong digest, orphan, or a rule of `db.audit`."""

    problem: str
    key: str
    detail: str

    @property
    def repairable(self) -> bool:
        """`rushes audit --repair` mends it: the store lacks or spoilt what the ledger knows."""
        return self.problem in (MISSING, WRONG_SIZE, WRONG_DIGEST)


@dataclass(slots=True)
class AuditReport:
    """Counts of what was compared; complete when `audit` has been read to its end."""

    rows: int = 0
    blobs: int = 0  # objects, of checkpoints too
    unclaimed: int = 0  # objects without a row that are too young to be a breach
    hashed: int = 0  # bytes


def audit(
    session: Session, store: Store, report: AuditReport, *, hash_bytes: bool = True, sample: int | None = None
) -> Iterator[Breach]:
    """Yields every breach as it is found and counts in `report`. Raises StoreUnavailable.

    `hash_bytes=False` compares existence and size only; `sample` hashes so many objects, drawn at random, of the others
    size and existence. Works while engines run: an object's bytes come first and its row second, so rows are
    looked at before objects, and an object without a row is an orphan when maintenance should have deleted it.
    """
    for found in contradictions(session):
        yield Breach(found.rule, found.key, "the ledger contradicts itself")
    session.rollback()
    drawn = None if sample is None or not hash_bytes else _draw(session, sample)
    for row in _rows(session):
        report.rows += 1
        if breach := _look_at(row, store, report, hash_bytes and (drawn is None or row.key in drawn)):
            yield replace(breach, detail=f"{breach.detail}; {_whose(users(session, row.sha256))}")
            session.rollback()
    yield from _checkpoints(session, store, report)
    yield from _published(session, store, report)
    for prefix, known in REFERENCES.items():
        listed, overdue = store.list(prefix), datetime.now(UTC) - ORPHAN_AGE[prefix] - OVERDUE
        while batch := list(islice(listed, BATCH)):
            report.blobs += len(batch)
            keys = known(session, [item.key for item in batch])
            session.rollback()
            for item in batch:
                if item.key in keys:
                    continue
                if item.modified < overdue:
                    yield _orphan(item)
                else:
                    report.unclaimed += 1


def _whose(found: Users) -> str:
    count = found.rendered + found.waiting + found.made_from
    return f"of clip {found.example}" if count == 1 else f"{count} clips have it, such as {found.example}"


def _draw(session: Session, count: int) -> set[str]:
    """Draw the keys of so many artifacts: a reservoir, since the ledger may hold millions."""
    drawn: list[str] = []
    for seen, row in enumerate(_rows(session)):
        if seen < count:
            drawn.append(row.key)
        elif (place := random.randrange(seen + 1)) < count:
            drawn[place] = row.key
    return set(drawn)


def _checkpoints(session: Session, store: Store, report: AuditReport) -> Iterator[Breach]:
    """Breaches of clips whose checkpoint is not there, unless they have finished or moved on meanwhile."""
    named = resume_keys(session)
    session.rollback()
    report.rows += len(named)
    gone = {key for key in named if not store.exists(key)}
    if gone:
        gone = resume_keys(session, sorted(gone))
        session.rollback()
    for key in sorted(gone):
        yield Breach(MISSING, key, "a clip is to go on from this checkpoint, the store has no such object")


def _published(session: Session, store: Store, report: AuditReport) -> Iterator[Breach]:
    """Breaches of ended requests whose manifest or contact sheet is not there."""
    last = ""
    while True:
        wanted = select(Request.id, Request.manifest_key, Request.sheet_key).where(Request.id > last)
        ended = wanted.where(Request.status.not_in(UNENDED)).order_by(Request.id).limit(BATCH)
        page = session.execute(ended).all()
        session.rollback()
        for request_id, *keys in page:
            for key in filter(None, keys):
                report.rows += 1
                if not store.exists(key):
                    yield Breach(MISSING, key, f"{request_id} was published with it, the store has no such object")
        if len(page) < BATCH:
            return
        last = page[-1].id


def _rows(session: Session) -> Iterator[Artifact]:
    """Read the artifacts that should be there by key, a page at a time: no transaction stays open meanwhile."""
    last = ""
    while True:
        wanted = select(Artifact).where(Artifact.key > last, needed()).order_by(Artifact.key).limit(BATCH)
        page = session.scalars(wanted).all()
        session.expunge_all()
        session.rollback()
        yield from page
        if len(page) < BATCH:
            return
        last = page[-1].key


def is_sound(store: Store, row: ArtifactRow) -> bool:
    """The store has these very bytes. Raises StoreUnavailable."""
    return _look_at(row, store, AuditReport(), True) is None


def _look_at(row: Artifact | ArtifactRow, store: Store, report: AuditReport, hash_bytes: bool) -> Breach | None:
    there = store.stat(row.key)
    if there is None:
        return Breach(MISSING, row.key, "the ledger has the row, the store has no such object")
    if there.bytes != row.bytes:
        return Breach(WRONG_SIZE, row.key, f"{there.bytes} bytes in the store, {row.bytes} in the ledger")
    if not hash_bytes:
        return None
    digest = hashlib.sha256()
    try:
        with store.open(row.key) as stream:
            while chunk := stream.read(CHUNK):
                report.hashed += len(chunk)
                digest.update(chunk)
    except NoSuchKey:
        return Breach(MISSING, row.key, "it went away while it was being read")
    if digest.hexdigest() != row.sha256:
        return Breach(WRONG_DIGEST, row.key, f"its bytes have the sha256 {digest.hexdigest()}")
    return None


def _orphan(item: Listed) -> Breach:
    return Breach("orphan", item.key, f"{item.bytes} bytes since {item.modified:%Y-%m-%d %H:%M}, and no row")
