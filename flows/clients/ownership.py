"""Whose a store is: one ledger's, which alone knows what in it may be deleted.

A second ledger on the same bucket (a staging system, a restored dump) knows nothing of the first one's newer clips, and
its maintenance would take them for orphans. So the store holds the mark of its owner, and others are refused.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from itertools import islice

from sqlalchemy.orm import Session, sessionmaker

from db.artifacts import known_keys
from db.session import identity
from infra.store.contract import BLOBS, NoSuchKey, Store

MARK = "owner.json"
LOOK = 1000  # objects of a store without a mark in which one of ours is looked for


class ForeignStore(RuntimeError):
    """The store belongs to another ledger. The message says to which, and how to take it over on purpose."""

    exit_code = 1


def check_owner(ledgers: sessionmaker[Session], store: Store) -> None:
    """Passes where the store is this ledger's; one that is nobody's becomes it. Raises ForeignStore.

    Nobody's is a store that is empty, or holds no mark and something that the ledger knows.
    """
    with ledgers() as session:
        own = identity(session)
    mark = _read_mark(store)
    if mark == own:
        return
    if mark is None and _is_known(ledgers, store):
        _write_mark(store, own)
        return
    raise ForeignStore(
        f"{store!r} belongs to {'another ledger' if mark is None else f'the ledger {mark}'}, and this is {own}: name a "
        "store of its own in RUSHES_STORE_URL, or, where the other ledger is gone for good, run `rushes adopt`"
    )


def take_over(ledgers: sessionmaker[Session], store: Store) -> str | None:
    """Makes the store this ledger's, and returns the owner before it where that was another.

    What that one alone knew of is swept then.
    """
    with ledgers() as session:
        own = identity(session)
    before = _read_mark(store)
    _write_mark(store, own)
    return before if before != own else None


def _read_mark(store: Store) -> str | None:
    try:
        return str(json.loads(store.get(MARK))["ledger"])
    except NoSuchKey:
        return None


def _write_mark(store: Store, own: str) -> None:
    mark = {"ledger": own, "since": datetime.now(UTC).isoformat(timespec="seconds")}
    store.put_at(MARK, json.dumps(mark).encode(), "application/json")


def _is_known(ledgers: sessionmaker[Session], store: Store) -> bool:
    """The store is empty, or holds something that the ledger knows."""
    keys = [listed.key for listed in islice(store.list(BLOBS), LOOK)]
    with ledgers() as session:
        return not keys or bool(known_keys(session, keys))
