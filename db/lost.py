"""Bytes that the store no longer has, or has others of, and how the ledger takes back that they are there.

A loss is noted on the artifact (`lost_at`) and its cached renders are forgotten, so that a request for the recipe
has it rendered again. Clips that had these bytes may be queued again. Bytes that come back end the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, delete, exists, func, or_, select, update
from sqlalchemy.orm import Session

from db.artifacts import COLUMNS, ArtifactRow
from db.fence import now
from db.renders import NO_RESUME_STATE, reusable
from db.requests import lock_request
from db.session import change
from db.tables import (
    ACTIVE,
    UNENDED,
    Artifact,
    Attempt,
    AttemptStatus,
    Clip,
    ClipStatus,
    Render,
    Request,
    RequestStatus,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Users:
    """Clips that need the bytes of one artifact."""

    rendered: int  # done clips whose video it is
    waiting: int  # unfinished clips that are to be made from it
    made_from: int  # finished clips that were
    example: str | None  # the first of them


def cached_for(session: Session, request_id: str) -> list[ArtifactRow]:
    """The cached renders that clips of the request would reuse now, each once."""
    wanted = (Clip.request_id == request_id) & (Clip.status == ClipStatus.QUEUED)
    return _rows(session, select(Render.sha256).join(Clip, reusable(Clip)).where(wanted))


def rendered_by(session: Session, request_id: str) -> list[ArtifactRow]:
    """The bytes of the request's done clips, each once."""
    done = select(Clip.artifact).where(Clip.request_id == request_id, Clip.status == ClipStatus.DONE)
    return _rows(session, done)


def _rows(session: Session, digests: Any) -> list[ArtifactRow]:
    found = session.execute(select(*COLUMNS).where(Artifact.sha256.in_(digests)).order_by(Artifact.key))
    return [ArtifactRow(**row) for row in found.mappings()]


def artifacts_at(session: Session, keys: Sequence[str]) -> list[ArtifactRow]:
    """The artifacts under these keys."""
    return _rows(session, select(Artifact.sha256).where(Artifact.key.in_(keys)))


def users(session: Session, sha256: str) -> Users:
    """Which clips the loss of these bytes concerns."""
    source = or_(Clip.source == sha256, Clip.end_source == sha256)
    waiting = source & Clip.status.in_(ACTIVE)
    found = session.execute(
        select(
            func.count().filter(Clip.artifact == sha256).label("rendered"),
            func.count().filter(waiting).label("waiting"),
            func.count().filter(source & ~waiting).label("made_from"),
            func.min(Clip.id).label("example"),
        ).where(or_(source, Clip.artifact == sha256))
    )
    return Users(**found.mappings().one())


def needed() -> ColumnElement[bool]:
    """True of an artifact that should be in the store: it is not known to be lost, or a clip has or waits for it."""
    waiting = or_(Clip.source == Artifact.sha256, Clip.end_source == Artifact.sha256) & Clip.status.in_(ACTIVE)
    used = exists().where(or_(Clip.artifact == Artifact.sha256, waiting))
    return or_(Artifact.lost_at.is_(None), used)


def forget(session: Session, digests: Sequence[str]) -> None:
    """Note that these bytes are lost: no clip reuses them from now on."""
    change(session, delete(Render).where(Render.sha256.in_(digests)))
    lost = update(Artifact).where(Artifact.sha256.in_(digests), Artifact.lost_at.is_(None))
    change(session, lost.values(lost_at=now()))


def found_again(session: Session, sha256: str, clip_id: str) -> None:
    """Note that lost bytes are stored again, by this clip: other clips that had them now reuse its render."""
    healed = update(Artifact).where(Artifact.sha256 == sha256, Artifact.lost_at.is_not(None)).values(lost_at=None)
    if change(session, healed):
        others = update(Clip).where(Clip.artifact == sha256, Clip.status == ClipStatus.DONE, Clip.id != clip_id)
        change(session, others.values(reused=True, rendered_by=clip_id))


def queue_lost(session: Session, digests: Sequence[str], request_id: str | None = None) -> dict[str, int]:
    """Queue the done clips that had these bytes again, of all requests or of one; how many of each request.

    Opens their requests again. The attempts that made them are gone with the bytes; all else that is known stays.
    """
    lost = Clip.artifact.in_(digests) & (Clip.status == ClipStatus.DONE)
    asked = select(Clip.request_id).join(Request, Request.id == Clip.request_id).where(lost, Request.total.is_not(None))
    if request_id is not None:
        asked = asked.where(Clip.request_id == request_id)
    queued: dict[str, int] = {}
    for each in sorted(set(session.scalars(asked))):
        lock_request(session, each)
        theirs = lost & (Clip.request_id == each)
        made = update(Attempt).where(Attempt.clip_id == Clip.id, theirs, Attempt.status == AttemptStatus.DONE)
        change(session, made.values(status=AttemptStatus.GONE))
        again = update(Clip).where(theirs).values(status=ClipStatus.QUEUED, failures=0, lost_attempts=0)
        again = again.values(dict.fromkeys(("artifact", "seconds", "rendered_by", "shard_id", "error"), None))
        count = change(session, again.values(reused=False, finished_at=None, not_before=None, **NO_RESUME_STATE))
        if count:
            queued[each] = count
            ended = update(Request).where(Request.id == each, Request.status.not_in(UNENDED))
            change(session, ended.values(status=RequestStatus.OPEN, finished_at=None))
    return queued


def forget_checkpoints(session: Session, keys: Sequence[str]) -> int:
    """Let clips that were to go on from these checkpoints begin anew. Returns how many."""
    return change(session, update(Clip).where(Clip.resume_key.in_(keys)).values(NO_RESUME_STATE))
