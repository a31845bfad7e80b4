"""Stored bytes: what lies in the store, under which key, with which digest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from datetime import datetime

from sqlalchemy import select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from db.session import change
from db.tables import Artifact, Request


@dataclass(frozen=True, slots=True, kw_only=True)
class NewArtifact:
    """Bytes that lie in the store already."""

    sha256: str
    key: str
    bytes: int
    media_type: str


CHUNK = 1000  # rows that go to or come from the server at a time


def add_artifacts(session: Session, stored: Iterable[NewArtifact]) -> None:
    """Note objects that lie in the store already and that clips are made from."""
    if rows := [asdict(artifact) for artifact in stored]:
        change(session, upsert(Artifact).values(rows).on_conflict_do_nothing(index_elements=[Artifact.sha256]))
        again = Artifact.sha256.in_([row["sha256"] for row in rows]) & Artifact.lost_at.is_not(None)
        change(session, update(Artifact).where(again).values(lost_at=None))


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactRow:
    sha256: str
    key: str
    bytes: int
    media_type: str
    created_at: datetime


COLUMNS = tuple(getattr(Artifact, field.name) for field in fields(ArtifactRow))


def artifacts(session: Session) -> Iterator[ArtifactRow]:
    """Every stored object the ledger knows, by key, through a server-side cursor: for the audit."""
    stored = select(*COLUMNS).order_by(Artifact.key)
    with closing(session.execute(stored, execution_options={"yield_per": CHUNK})) as rows:
        for row in rows.mappings():
            yield ArtifactRow(**row)


def known_keys(session: Session, keys: Sequence[str]) -> set[str]:
    """Those of the object keys that a clip or a request refers to: the others are orphans."""
    of_requests = [Request.manifest_key, Request.sheet_key]
    found = set(session.scalars(select(Artifact.key).where(Artifact.key.in_(keys))))
    for name in of_requests:
        found.update(key for key in session.scalars(select(name).where(name.in_(keys))) if key is not None)
    return found
