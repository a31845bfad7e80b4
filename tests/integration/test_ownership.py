"""A store is one ledger's: others neither sweep it nor render into it, until they take it over on purpose."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

from db.artifacts import NewArtifact, add_artifacts
from db.session import connect, sessions
from flows.clients.ownership import MARK, ForeignStore, check_owner, take_over
from flows.operate.maintenance import MaintenanceReport, prune
from infra.store.folder import FolderStore

WEEK = 7 * 86400


def kept(ledger: sessionmaker[Session], store: FolderStore, data: bytes) -> str:
    """The key of bytes that a ledger has recorded, a week ago."""
    stored = store.put(data)
    with ledger.begin() as session:
        row = NewArtifact(sha256=stored.sha256, key=stored.key, bytes=len(data), media_type="video/mp4")
        add_artifacts(session, [row])
    os.utime(store.root / stored.key, (0, time.time() - WEEK))
    return stored.key


def test_a_second_ledger_deletes_nothing_of_the_first(
    ledger: sessionmaker[Session],
    database: Engine,
    database_url: str,
    clone: Callable[[str], AbstractContextManager[str]],
    tmp_path: Path,
) -> None:
    """Neither one that is new nor one that was restored from a dump and knows what was there then."""
    store = FolderStore(tmp_path)
    before = kept(ledger, store, b"before the dump")
    prune(ledger, store, MaintenanceReport())  # it is the first one's now
    database.dispose()  # which a database must be left by to be copied
    with clone(database_url.rpartition("/")[2]) as restored:
        engine = connect(restored)
        copy = sessions(engine)
        after = kept(ledger, store, b"after the dump")
        for refused in (lambda: prune(copy, store, MaintenanceReport()), lambda: check_owner(copy, store)):
            with pytest.raises(ForeignStore, match="rushes adopt"):
                refused()
        assert store.exists(before) and store.exists(after)
        prune(ledger, store, MaintenanceReport())

        assert take_over(copy, store) is not None
        assert take_over(copy, store) is None
        with pytest.raises(ForeignStore):
            check_owner(ledger, store)
        prune(copy, store, MaintenanceReport())
        assert store.exists(before) and not store.exists(after)
        engine.dispose()


def test_a_store_without_a_mark_is_not_taken_by_one_who_knows_nothing_in_it(
    ledger: sessionmaker[Session],
    migrated_template: str,
    clone: Callable[[str], AbstractContextManager[str]],
    tmp_path: Path,
) -> None:
    store = FolderStore(tmp_path)
    key = kept(ledger, store, b"made before there were marks")
    with clone(migrated_template) as other:
        engine = connect(other)
        with pytest.raises(ForeignStore, match="another ledger"):
            prune(sessions(engine), store, MaintenanceReport())
        engine.dispose()
    assert store.exists(key) and not store.exists(MARK)
    check_owner(ledger, store)
    assert store.exists(MARK)
