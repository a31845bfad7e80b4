"""What `rushes doctor` looks at inside the ledger, the store and the model; the parts themselves are infra's to check.

Each returns what it saw, and raises when that is wrong.
"""

from __future__ import annotations

import uuid
from pathlib import Path

from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

import db
from db.session import connect
from flows.library.models import card_of, partition_for
from flows.settings import Settings


def schema(url: str) -> str:
    """The ledger's tables are those that this code was written for."""
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
    """Bytes can be put, read back and deleted."""
    store = settings.open_store()
    key, data = f"doctor/{uuid.uuid4()}", b"Rushes was here."
    store.put_at(key, data, "text/plain")
    try:
        if store.get(key) != data:
            raise RuntimeError(f"{settings.store} gave back other bytes than it was given")
    finally:
        store.delete(key)
    return settings.store


def weights(settings: Settings) -> str:
    """The model that engines load is there, and can be divided as they are to divide it."""
    card = card_of(settings, settings.model)
    partition = partition_for(settings, card)
    partition.check_heads(card.heads)
    return f"{card.name} {card.digest[:12]} on {partition.world} ranks ({partition})"
