"""Models in the ledger: listing them, and those that were added by name, whose files lie in the store.

Plain functions: they take a session, return values, and leave the transaction to the caller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, case, delete, func, literal, or_, select, update
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from db.fence import take_turn
from db.session import change
from db.tables import UNENDED, Artifact, Clip, Model, Render, Request

_NAMING = 0x4E616D65  # advisory lock: "Name"


class NameTaken(ValueError):
    """Another model was added under this name. Choose another one."""

    exit_code = 2


class ModelNeeded(ValueError):
    """A request that is open renders with this model. Wait until it is finished, or cancel it."""

    exit_code = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRow:
    digest: str
    name: str
    path: str | None
    card: Mapping[str, Any]
    dataset_id: str | None
    created_at: datetime


def latest_models(session: Session, limit: int = 50) -> list[ModelRow]:
    return [_row(each) for each in session.scalars(select(Model).order_by(Model.created_at.desc()).limit(limit))]


def added_model(session: Session, digest: str) -> ModelRow | None:
    """The model of this digest, if its files lie in the store."""
    return next(iter(_added(session, Model.digest == digest)), None)


def model_path(session: Session, digest: str) -> str | None:
    """The folder in which the model of this digest was, where one is known."""
    return session.scalar(select(Model.path).where(Model.digest == digest))


def added_models(session: Session, name: str) -> list[ModelRow]:
    """The model that was added under this name; without one, those whose digest begins with it."""
    named = _added(session, Model.name == name)
    return named or _added(session, Model.digest.startswith(name, autoescape=True))


def check_name(session: Session, name: str, digest: str) -> None:
    """Raises NameTaken when another model was added under this name."""
    for other in _added(session, Model.name == name):
        if other.digest != digest:
            raise NameTaken(
                f"the name {name!r} is taken by the model {other.digest[:12]}: give this one another with --name"
            )


def add_model(session: Session, digest: str, name: str, path: str, card: Mapping[str, Any]) -> None:
    """Note a model whose files, listed in `card`, lie in the store. Raises NameTaken. One at a time, so that a name
    is given once; note the files as artifacts after this, since until then another model may take them with it."""
    take_turn(session, _NAMING)
    check_name(session, name, digest)
    register_model(session, digest, name, path, card)


def remove_model(session: Session, digest: str) -> int:
    """Forget that a model's files lie in the store, and those of them that nothing else needs; their number.

    The row stays, since clips were rendered with it, its list of files as `removed`. The objects are orphans then, and
    go with a later round of maintenance. Raises ModelNeeded.
    """
    take_turn(session, _NAMING)
    # A request that is being opened refers to the row: this waits until it is, or makes it wait.
    row = session.scalars(select(Model).where(Model.digest == digest).with_for_update()).one()
    session.refresh(row)
    waiting = select(Request.id).where(Request.model_digest == digest, Request.status.in_(UNENDED))
    if needed := session.scalars(waiting.order_by(Request.created_at)).all():
        raise ModelNeeded(
            f"model {row.name} is needed by {len(needed)} open request{'s' * (len(needed) > 1)} ({needed[0]}): wait "
            "until they are finished, or cancel them"
        )
    files = row.card[FILES]
    row.card = {name: value for name, value in row.card.items() if name != FILES} | {"removed": files}
    session.flush()
    others = {file["sha256"] for other in _added(session, Model.digest != digest) for file in other.card[FILES]}
    alone = Artifact.sha256.in_({file["sha256"] for file in files} - others)
    of_clips = or_(*(column == Artifact.sha256 for column in (Clip.source, Clip.end_source, Clip.artifact)))
    used = (
        select(Clip.id).where(of_clips).exists()
        | select(Render.recipe).where(Render.sha256 == Artifact.sha256).exists()
    )
    return len(session.scalars(delete(Artifact).where(alone, ~used).returning(Artifact.sha256)).all())


def _added(session: Session, which: ColumnElement[bool]) -> list[ModelRow]:
    found = select(Model).where(which, Model.card.has_key(FILES)).order_by(Model.created_at.desc())
    return [_row(each) for each in session.scalars(found, execution_options={"populate_existing": True})]


def _row(found: Model) -> ModelRow:
    return ModelRow(**{f.name: getattr(found, f.name) for f in fields(ModelRow)})


FILES = "files"  # in a card: what of the model lies in the store


def register_model(session: Session, digest: str, name: str, path: str, card: Mapping[str, Any]) -> None:
    """Note the weights of this digest; said again it refreshes where they lie and adds to what is known of them.

    Weights that lie in the store (db/models.py) keep the name they were added under, not their folder's.
    """
    known = upsert(Model).values(digest=digest, name=name, path=path, card=dict(card))
    stays = case((Model.card.has_key(FILES), Model.name), else_=known.excluded.name)
    change(
        session,
        known.on_conflict_do_update(
            index_elements=[Model.digest],
            set_={"name": stays, "path": path, "card": Model.card.concat(known.excluded.card)},
        ),
    )


def record_scores(session: Session, digest: str, scores: Mapping[str, Any]) -> None:
    """Add to what was measured of the weights of this digest; what has the same name is replaced, all else stays."""
    known = func.coalesce(Model.card["scores"], literal({}, JSONB))
    card = Model.card.concat(func.jsonb_build_object("scores", known.concat(dict(scores)), type_=JSONB))
    change(session, update(Model).where(Model.digest == digest).values(card=card))
