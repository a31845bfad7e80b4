"""Prompts and what they were rewritten to, so that the same words become the same words again.

An endpoint may answer the same question twice in two ways, and a model's rewriter may round otherwise on another
machine: the first answer to be recorded is the one that all clips get.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from db.session import change
from db.tables import Rewrite


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """A prompt to be rewritten, and its rewriter."""

    rewriter: str
    prompt: str
    moving: bool  # False: for an image, which tells no motion

    @property
    def key(self) -> str:
        text = json.dumps([self.rewriter, self.prompt, self.moving], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def known(session: Session, words: Collection[Words]) -> dict[Words, str | None]:
    """Those of the words that were rewritten before, and to what; None where they were left as they are."""
    if not words:
        return {}
    keys = {each.key: each for each in words}
    found = session.execute(select(Rewrite.key, Rewrite.rewritten).where(Rewrite.key.in_(keys)))
    return {keys[row.key]: row.rewritten for row in found}


def remember(session: Session, rewritten: Iterable[tuple[Words, str | None]]) -> None:
    """Records what prompts were rewritten to; what is there already stays."""
    rows = [{"key": words.key, **asdict(words), "rewritten": text} for words, text in rewritten]
    if rows:
        change(session, upsert(Rewrite).values(rows).on_conflict_do_nothing())
