"""Checks of `rushes doctor` inside the ledger, the store and the model; infra checks the processes.

Each returns its finding as a phrase, and raises when that is wrong.
"""

from __future__ import annotations

import uuid
from pathlib import Path

from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import func, select

import db
from db.engines import FailedStart, failed_starts
from db.session import connect
from flows.clients.ledger import reading
from flows.library.models import card_of, partition_for
from flows.plan import starts
from flows.settings import Settings


def schema(url: str) -> str:
    """Check that the ledger's tables are those that this code was written for."""
    engine = connect(url, application="rushes-doctor")
    try:
        with engine.connect() as connection:
            there = MigrationContext.configure(connection).get_current_revision()
    finally:
        engine.dispose()
    wanted = ScriptDirectory(str(Path(db.__path__[0]) / "migrations")).get_current_head()
    if there != wanted:
        raise RuntimeError(f"the tables are at revision {there or 'none'}, this code wants {wanted}")
    return f"revision {there}"


def store(settings: Settings) -> str:
    """Check that bytes can be put, read back and deleted."""
    store = settings.open_store()
    key, data = f"doctor/{uuid.uuid4()}", b"Rushes was here."
    store.put_at(key, data, "text/plain")
    try:
        if store.get(key) != data:
            raise RuntimeError(f"{settings.store} gave back other bytes than it was given")
    finally:
        store.delete(key)
    return settings.store


def failing(settings: Settings) -> list[str]:
    """A line for each model and partition whose engines cannot start, as far as the ledger has heard."""
    with reading(settings) as session:
        failed, now = failed_starts(session), session.execute(select(func.statement_timestamp())).scalar_one()
    groups: dict[tuple[str, str], list[FailedStart]] = {}
    for start in failed:
        groups.setdefault((start.model_digest, start.partition), []).append(start)
    return [
        f"{starts.tell(group, now)} (model {digest[:12]}{f', {partition}' if partition else ''})"
        for (digest, partition), group in sorted(groups.items())
    ]


def engines(settings: Settings) -> str:
    """Check that the engines that were started last could start."""
    if said := failing(settings):
        raise RuntimeError("; ".join(said))
    return "none failed to start"


def weights(settings: Settings) -> str:
    """Check that the model of the settings is there and divides as engines are to divide it."""
    card = card_of(settings, settings.model)
    partition = partition_for(settings, card)
    partition.check_heads(card.heads)
    return f"{card.name} {card.digest[:12]} on {partition.world} ranks ({partition})"
