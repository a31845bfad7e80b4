"""Clips of history rendered once more: what is to be made again, and what came of it.

Plain functions: they take a session, return values, and leave the transaction to the caller.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session, aliased

from db.artifacts import NewArtifact
from db.claim import LeasedClip, clip_to_render
from db.session import change
from db.tables import ACTIVE, Artifact, Attempt, Clip, ClipStatus, Engine, Render, Reproduction, Request


class NoOriginal(LookupError):
    """There is nothing that a clip could be compared with: it does not exist, or is not done. The message says what to
    do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Original:
    """The stored rendering of a clip, and how it was made."""

    clip_id: str
    artifact: NewArtifact
    made_for: LeasedClip  # the clip whose rendering it is: another of its recipe where that was reused
    partition: str
    code_version: str
    device: str | None  # None: its engine is no longer in the ledger
    model: str  # as the request names it
    model_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How a clip was rendered once more, and how far that was from what is stored; tables.py says what values mean."""

    partition: str
    device: str
    code_version: str
    step_cache: float | None
    sha256: str
    identical: bool
    psnr: float | None
    largest: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NewReproduction(Comparison):
    clip_id: str


def original(session: Session, clip_id: str) -> Original:
    """The stored render of a clip, with the settings of the clip that it was rendered for. Raises NoOriginal."""
    status = session.scalar(select(Clip.status).where(Clip.id == clip_id))
    if status is None:
        raise NoOriginal(f"no clip {clip_id!r} in the ledger: `rushes history` lists those there are")
    if status != ClipStatus.DONE:
        rest = "wait for its request to finish" if status in ACTIVE else f"`rushes show {clip_id}` says why"
        raise NoOriginal(f"clip {clip_id} is {status}, not done: there is nothing to compare with; {rest}")
    maker = aliased(Clip)
    row = session.execute(
        select(
            maker.id,
            Attempt.partition,
            Attempt.code_version,
            Engine.device,
            Request.model,
            Request.model_digest,
            Artifact,
        )
        .select_from(Clip)
        .join(Artifact, Artifact.sha256 == Clip.artifact)
        .join(Render, Render.recipe == Clip.recipe)
        .join(maker, maker.id == Render.clip_id)
        .join(Attempt, (Attempt.clip_id == maker.id) & (Attempt.number == maker.attempts))
        .join(Request, Request.id == maker.request_id)
        .outerjoin(Engine, Engine.id == Attempt.engine)
        .where(Clip.id == clip_id)
    ).one()
    made_for, partition, code_version, device, model, model_digest, stored = row
    return Original(
        clip_id=clip_id,
        artifact=NewArtifact(sha256=stored.sha256, key=stored.key, bytes=stored.bytes, media_type=stored.media_type),
        made_for=clip_to_render(session, made_for),
        partition=partition,
        code_version=code_version,
        device=device,
        model=model,
        model_digest=model_digest,
    )


def done_clips(session: Session, request_id: str, sample: int | None = None) -> list[str]:
    """The done clips of a request in file order; or `sample` of them, drawn at random."""
    done = select(Clip.id).where(Clip.request_id == request_id, Clip.status == ClipStatus.DONE)
    if sample is not None:
        done = done.order_by(func.random()).limit(sample)
    return sorted(session.scalars(done))


def add_reproduction(session: Session, new: NewReproduction) -> None:
    change(session, insert(Reproduction).values(asdict(new)))
