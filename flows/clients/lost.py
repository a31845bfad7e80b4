"""Whether the store still has the bytes that the ledger knows."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

from db.artifacts import ArtifactRow
from infra.store.contract import Store

AT_ONCE = 16  # requests to the store


def missing(store: Store, artifacts: Sequence[ArtifactRow]) -> list[ArtifactRow]:
    """Those of which the store has no object, or one of another size. Reads no bytes. Raises StoreUnavailable."""
    if not artifacts:
        return []
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="stat") as pool:
        there = list(pool.map(lambda each: store.stat(each.key), artifacts))
    return [row for row, found in zip(artifacts, there, strict=True) if found is None or found.bytes != row.bytes]


def discard(store: Store, artifacts: Sequence[ArtifactRow], seen: datetime) -> None:
    """Remove objects that have other bytes than their name says: else they would stand in the way of the right ones.

    seen: when they were found wrong. What was put since then stays: an engine may have stored the right bytes.
    """
    for each in artifacts:
        store.delete_stale(each.key, seen)
