"""Finished renders by recipe: which may be reused in place of rendering again."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, or_

from db.fence import now
from db.tables import ClipStatus, Take

NO_CHECKPOINT: dict[str, Any] = {"checkpoint": None, "checkpoint_step": None, "checkpoint_of": None}


def adopted() -> dict[str, Any]:
    """What a clip becomes when the take of its recipe is there already."""
    return {
        "status": ClipStatus.DONE,
        "artifact": Take.sha256,
        "found": True,
        "error": None,
        "finished_at": now(),
        **NO_CHECKPOINT,
    }


def adoptable(clip: Any) -> ColumnElement[bool]:
    """True of a take that does for a clip: of its recipe and, where it is to be fresh, made since it was asked for."""
    return (Take.recipe == clip.recipe) & or_(~clip.fresh, Take.created_at >= clip.queued_at)
