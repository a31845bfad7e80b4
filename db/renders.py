"""Cached renders by recipe: which may be reused in place of rendering again."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, or_

from db.fence import now
from db.tables import ClipStatus, Render

NO_RESUME_STATE: dict[str, Any] = dict.fromkeys(("resume_key", "resume_step", "resume_fingerprint"))


def reused() -> dict[str, Any]:
    """Column values of a clip that is done by the cached render of its recipe."""
    return {
        "status": ClipStatus.DONE,
        "artifact": Render.sha256,
        "reused": True,
        "rendered_by": Render.clip_id,
        "error": None,
        "finished_at": now(),
        **NO_RESUME_STATE,
    }


def reusable(clip: Any) -> ColumnElement[bool]:
    """True of a render that does for a clip: of its recipe and, where it is to be fresh, made since it was queued."""
    return (Render.recipe == clip.recipe) & or_(~clip.fresh, Render.created_at >= clip.queued_at)
