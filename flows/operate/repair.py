"""The mend of bytes that the audit finds lost: the loss is noted, and what can be rendered again is queued."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeAlias

from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from db import lost
from db.artifacts import ArtifactRow
from db.tables import UNENDED, Request
from flows.clients.ledger import Ledger
from flows.clients.lost import discard, missing
from flows.operate.audit import CHECKPOINTS, PUBLISHED, Breach, is_sound
from infra.store.contract import Store

Publish: TypeAlias = Callable[[Session, Store, str], str | None]  # of a request by its id; the key of what it wrote


@dataclass(slots=True)
class Repairs:
    """Counts of a repair, and a sentence for each thing that it cannot bring back."""

    queued: dict[str, int] = field(default_factory=dict[str, int])  # clips of each request
    anew: int = 0  # clips that lost the checkpoint from which they would have gone on
    published: int = 0  # manifests and contact sheets made again
    beyond: list[str] = field(default_factory=list[str])


def repair(
    ledgers: sessionmaker[Session], store: Store, breaches: Iterable[Breach], publish: Sequence[Publish]
) -> Repairs:
    """Mend what an audit found missing or spoilt in the store; each is looked at again first.

    publish: the writers of a request's manifest, and its contact sheet. Safe beside engines and requests at work, and
    to repeat. Contradictions and orphans are left as they are.
    """
    seen = datetime.now(UTC)
    done, wrong = Repairs(), [breach for breach in breaches if breach.repairable]
    keys = [breach.key for breach in wrong]
    with ledgers() as session:
        rows = lost.artifacts_at(session, [key for key in keys if not key.startswith((CHECKPOINTS, PUBLISHED))])
    if gone := [row for row in rows if not is_sound(store, row)]:
        _forget(ledgers, store, gone, done, seen)
    checkpoints = [key for key in keys if key.startswith(CHECKPOINTS) and not store.exists(key)]
    if checkpoints:
        done.anew = Ledger(ledgers).write(lambda session: lost.forget_checkpoints(session, checkpoints))
    for key in keys:
        if key.startswith(PUBLISHED) and not store.exists(key):
            done.published += _publish(ledgers, store, key, publish)
    return done


def queue_missing(ledgers: sessionmaker[Session], store: Store, request_id: str) -> int:
    """Queue those done clips of a request again whose bytes the store has no longer. Returns how many."""
    seen = datetime.now(UTC)
    made = Ledger(ledgers).read(lambda session: lost.rendered_by(session, request_id))
    gone = missing(store, made)
    discard(store, gone, seen)
    digests = [row.sha256 for row in gone]

    def queue(session: Session) -> int:
        lost.forget(session, digests)
        return sum(lost.queue_lost(session, digests, request_id).values())

    return Ledger(ledgers).write(queue) if digests else 0


def _forget(
    ledgers: sessionmaker[Session], store: Store, gone: Sequence[ArtifactRow], done: Repairs, seen: datetime
) -> None:
    with ledgers() as session:
        for row in gone:
            users = lost.users(session, row.sha256)
            if not users.rendered:
                done.beyond.append(_beyond(row, users))
    discard(store, gone, seen)  # before any engine may store them again
    digests = [row.sha256 for row in gone]

    def queue(session: Session) -> dict[str, int]:
        lost.forget(session, digests)
        return lost.queue_lost(session, digests)

    done.queued = Ledger(ledgers).write(queue)


def _beyond(row: ArtifactRow, users: lost.Users) -> str:
    """A sentence about a source that was brought by somebody: nothing here can make it again."""
    if users.waiting:
        return f"{row.key} is a source of {users.waiting} unfinished clips, such as {users.example}: submit it again"
    kept = f"{users.made_from} clips, such as {users.example}, were made from it and are there"
    return f"{row.key} was a source: {kept}" if users.made_from else f"{row.key} is of no use to any clip"


def _publish(ledgers: sessionmaker[Session], store: Store, key: str, publish: Sequence[Publish]) -> bool:
    with ledgers() as session:
        theirs = select(Request.id).where((Request.manifest_key == key) | (Request.sheet_key == key))
        request_id = session.scalar(theirs.where(Request.status.not_in(UNENDED)))
        if request_id is None:  # it is at work again, and will be published
            return False
        return any(each(session, store, request_id) == key for each in publish)
