"""Models in the ledger: listing them, and those that were added by name, whose files lie in the store.

Plain functions: they take a session, return values, and leave the transaction to the caller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from db.ledger import FILES, register_model
from db.tables import Model

_NAMING = 0x4E616D65  # advisory lock: "Name"


class NameTaken(ValueError):
    """Another model was added under this name. Choose another one."""


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
    is given once."""
    session.execute(select(func.pg_advisory_xact_lock(_NAMING)))
    check_name(session, name, digest)
    register_model(session, digest, name, path, card)


def _added(session: Session, which: ColumnElement[bool]) -> list[ModelRow]:
    found = select(Model).where(which, Model.card.has_key(FILES)).order_by(Model.created_at.desc())
    return [_row(each) for each in session.scalars(found, execution_options={"populate_existing": True})]


def _row(found: Model) -> ModelRow:
    return ModelRow(**{f.name: getattr(found, f.name) for f in fields(ModelRow)})
