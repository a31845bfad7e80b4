"""Prompts and what they were rewritten to, so that the same words become the same words again.

An endpoint may answer the same question twice in two ways, and a model's rewriter may round otherwise on another
machine: the first answer to be recorded is the one that all clips get.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import NamedTuple

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


class Answer(NamedTuple):
    """The outcome of rewriting a prompt."""

    text: str | None  # None: it was left as it is
    not_understood: str | None = None  # words and phrases of it that are left out


def known(session: Session, words: Collection[Words]) -> dict[Words, Answer]:
    """Those of the words that were rewritten before, and to what."""
    if not words:
        return {}
    keys = {each.key: each for each in words}
    asked = select(Rewrite.key, Rewrite.rewritten, Rewrite.not_understood).where(Rewrite.key.in_(keys))
    return {keys[row.key]: Answer(row.rewritten, row.not_understood) for row in session.execute(asked)}


def remember(session: Session, rewritten: Iterable[tuple[Words, Answer]]) -> None:
    """Records what prompts were rewritten to; what is there already stays."""
    rows = [
        {"key": words.key, **asdict(words), "rewritten": answer.text, "not_understood": answer.not_understood}
        for words, answer in rewritten
    ]
    if rows:
        change(session, upsert(Rewrite).values(rows).on_conflict_do_nothing())
