"""Checks of `rushes doctor` inside the ledger, the store and the model; infra checks the processes.

Each returns its finding as a phrase, and raises when that is wrong.
"""

from __future__ import annotations

import uuid

from sqlalchemy import func, select

from db.engines import FailedStart, failed_starts
from db.session import REVISION, connect
from flows.clients.ledger import ledger, reading
from flows.clients.ownership import check_owner
from flows.library.models import card_of, partition_for
from flows.plan import starts
from flows.settings import Settings


def schema(url: str) -> str:
    """Check that the ledger's tables are those that this code was written for."""
    engine = connect(url, application="rushes-doctor", check=True)
    try:
        with engine.connect():
            return f"revision {REVISION} at {engine.url.host}"
    finally:
        engine.dispose()


def store(settings: Settings) -> str:
    """Check that bytes can be put, read back and deleted, and that the store is this ledger's or nobody's."""
    store = settings.open_store()
    key, data = f"doctor/{uuid.uuid4()}", b"Rushes was here."
    store.put_at(key, data, "text/plain")
    try:
        if store.get(key) != data:
            raise RuntimeError(f"{settings.store} gave back other bytes than it was given")
    finally:
        store.delete(key)
    if settings.database_url is not None:
        with ledger(settings) as ledgers:
            check_owner(ledgers, store)
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
