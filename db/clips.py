"""Clips of a request: written a batch at a time by COPY, and read one by one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, cast

import psycopg
from sqlalchemy import ARRAY, Column, Enum, Insert, MetaData, Table, Text, case, func, select, text
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session
from sqlalchemy.schema import CreateTable

from db.artifacts import NewArtifact
from db.session import change
from db.settings import SETTINGS, ClipSettings
from db.tables import Artifact, Clip, ClipDirection, ClipMode, ClipStatus, EdgeKind


@dataclass(frozen=True, slots=True, kw_only=True)
class NewClip:
    """A clip asked for. With `rejected` (the reason) it is kept for the record only, and may lack its settings."""

    index: int
    sample: int
    prompt: str
    custom_id: str | None = None
    rewritten_prompt: str | None = None
    not_understood: str | None = None
    unread_words: int | None = None  # at the end of the words that the model is given
    negative_prompt: str | None = None
    settings: ClipSettings | None = None
    seed: int | None = None
    recipe: str | None = None
    line: int | None = None
    mode: ClipMode = ClipMode.TEXT_TO_VIDEO
    source: str | None = None  # sha256 of an artifact that the ledger knows: see add_artifacts
    end_source: str | None = None
    direction: ClipDirection | None = None
    made_frames: int | None = None  # that go through the model, where that is not all of them once
    fresh: bool = False  # a cached render will not do
    parents: tuple[tuple[str, EdgeKind], ...] = ()  # clips it is made from, and how
    tags: Sequence[str] = ()  # its request's and its own
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])  # a JSON object, likewise
    rejected: str | None = None


def add_clips(session: Session, request_id: str, clips: Iterable[NewClip]) -> int:
    """Add the clips: one COPY stream into a table of this transaction, and from there in one go.

    Those that are there already are left as they are. Never more than a few are in memory, however many come; `clips`
    may not use this session. Returns how many were new. Nothing is planned before seal_request.
    """
    session.execute(CreateTable(_GIVEN, if_not_exists=True))
    with _driver(session).cursor() as cursor, cursor.copy(_COPY.encode()) as copy:
        for clip in clips:
            parents, kinds = [parent for parent, _ in clip.parents], [str(kind) for _, kind in clip.parents]
            row = (*_values_of(clip), *(_settings_of(clip.settings) if clip.settings else _NO_SETTINGS))
            labels = list(clip.tags) or None, json.dumps(clip.metadata) if clip.metadata else None
            copy.write_row((_clip_id(request_id, clip), request_id, clip.rejected, *row, *labels, parents, kinds))
    added = change(session, _TAKE_OVER)
    session.execute(_TAKE_OVER_EDGES)
    session.execute(text(f"truncate {_GIVEN.name}"))  # it may be used again before the transaction ends
    return added


_LABELS = ("tags", "metadata")
_OF_CLIP = tuple(name for name in NewClip.__slots__ if name not in ("settings", "rejected", "parents", *_LABELS))
_values_of = attrgetter(*_OF_CLIP)  # their values, in this order
_settings_of = attrgetter(*SETTINGS)
_NO_SETTINGS = (None,) * len(SETTINGS)
# Enums are words here: the type of a column of a table that is only passed through need not be the same.
_GIVEN = Table(
    "given_clips",
    MetaData(),
    *(Column(name, Text) for name in ("id", "request_id", "error")),
    *(
        Column(name, Text if isinstance(kind := Clip.__table__.c[name].type, Enum) else kind, nullable=True)
        for name in (*_OF_CLIP, *SETTINGS, *_LABELS)
    ),
    *(Column(name, ARRAY(Text)) for name in ("parents", "kinds")),
    prefixes=["temporary"],
    postgresql_on_commit="DROP",
)
_COPY = f"copy {_GIVEN.name} from stdin"


def _take_over() -> Insert:
    given = [each for each in _GIVEN.c if each.name not in ("parents", "kinds")]
    types = {"mode": Clip.mode.type, "direction": Clip.direction.type}
    taken = [each.cast(types[each.name]) if each.name in types else each for each in given]
    rejected = _GIVEN.c.error.is_not(None)
    status = case((rejected, ClipStatus.REJECTED), else_=ClipStatus.QUEUED).cast(Clip.status.type)
    source = select(*taken, status, case((rejected, func.now()), else_=None))
    into = [*(each.name for each in given), "status", "finished_at"]
    return upsert(Clip).from_select(into, source).on_conflict_do_nothing()


_TAKE_OVER = _take_over()
_TAKE_OVER_EDGES = text(f"""
    insert into edges (child, parent, kind)
    select given.id, made_from.parent, made_from.kind::edge_kind
    from {_GIVEN.name} given cross join unnest(given.parents, given.kinds) made_from (parent, kind)
    where exists (select from clips parent where parent.id = made_from.parent)
    on conflict do nothing""")


def _driver(session: Session) -> psycopg.Connection[Any]:
    """The connection of the session's transaction, for what SQLAlchemy has no words for."""
    return cast("psycopg.Connection[Any]", session.connection().connection.driver_connection)


def _clip_id(request_id: str, clip: NewClip) -> str:
    return f"{request_id}-{clip.index:06d}-{clip.sample}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedClip:
    """A clip of history that others may be made from."""

    clip_id: str
    status: ClipStatus
    settings: ClipSettings
    artifact: NewArtifact | None  # None: it is not done


def clip_by(session: Session, clip_id: str) -> FinishedClip | None:
    """A clip as a source; None when there is no such clip, or none that was accepted."""
    row = session.execute(
        select(Clip.status, *(getattr(Clip, name) for name in SETTINGS), *_ARTIFACT)
        .outerjoin(Artifact, Artifact.sha256 == Clip.artifact)
        .where(Clip.id == clip_id, Clip.recipe.is_not(None))
    ).one_or_none()
    if row is None:
        return None
    settings, stored = row[1 : 1 + len(SETTINGS)], row[1 + len(SETTINGS) :]
    names = (each.key for each in _ARTIFACT)
    return FinishedClip(
        clip_id=clip_id,
        status=row.status,
        settings=ClipSettings(**dict(zip(SETTINGS, settings, strict=True))),
        artifact=NewArtifact(**dict(zip(names, stored, strict=True))) if stored[0] else None,
    )


_ARTIFACT = (Artifact.sha256, Artifact.key, Artifact.bytes, Artifact.media_type)
