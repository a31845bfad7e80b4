"""What the audit says of a ledger that was tampered with: each rule finds its own breach, and in a sound one none.

What it finds of ledger and store, test_cli_ledger asks the command; what maintenance deletes there is here.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

from db.artifacts import NewArtifact, add_artifacts
from db.audit import RULES, contradictions
from db.claim import claim_shard
from db.leases import complete_shard, start_clip
from db.requests import finish_request
from flows.operate.audit import AuditReport, audit
from flows.operate.maintenance import MaintenanceReport, prune, sweep_orphans
from infra.store.folder import FolderStore
from tests.factories import ENGINE, MODEL, new_clip, opened, planned, render

# What breaks each rule, in a ledger of one closed request of two clips and of an open one whose first clip runs.
TAMPER = {
    "a clip of a closed request is not over": "update requests set status = 'completed', finished_at = now()"
    " where status = 'open'",
    "a sealed request has another number of clips": "update requests set total = total + 1 where status = 'open'",
    "the kept counts are not those of the clips": "update tallies set clips = clips + 1 where id ="
    " (select min(id) from tallies)",
    "a request ended otherwise than its clips": "update requests set status = 'failed' where status = 'completed'",
    "a recipe was rendered twice": "update clips set recipe = (select min(recipe) from clips where status = 'done')"
    " where status = 'done'",
    "a clip was finished twice": "insert into attempts (clip_id, number, shard_id, shard_attempt, owner, engine,"
    " partition, code_version, status, finished_at) select clip_id, 2, shard_id, shard_attempt, owner, engine,"
    " partition, code_version, status, finished_at from attempts where status = 'done' limit 1",
    "a done clip has other bytes than its recipe's render": "delete from renders",
    "an attempt runs and its clip does not, or the other way": "update attempts set status = 'lost',"
    " finished_at = now() where status = 'running'",
    "a clip has another number of attempts than it counts": "update clips set attempts = 7 where status = 'done'",
    "a clip counts more failures and lost attempts than it has attempts that ended so": "update clips"
    " set lost_attempts = 1 where status = 'queued'",
    "an unfinished clip lies in a shard that is over": "update shards set status = 'cancelled', owner = null,"
    " leased_until = null, finished_at = now() where status = 'leased'",
    "a clip runs in a shard that nobody leases": "update shards set status = 'queued', owner = null,"
    " leased_until = null where status = 'leased'",
    "an engine that has left holds a lease": "insert into engines (id, host, pid, device, partition, model_digest,"
    " code_version, closed_at) values ('b', 'h', 1, 'cpu', 'tp=2', 'm', '1', now())",
}


def fill(session: Session) -> None:
    first = opened(session, [new_clip(0), new_clip(1)], key="closed")
    planned(session, first)
    lease, clips = claim_shard(session, "a", seconds=600, model_digest=MODEL) or pytest.fail("nothing to claim")
    for clip in clips:
        render(session, lease, clip.clip_id)
    complete_shard(session, lease)
    finish_request(session, first)
    second = opened(session, [new_clip(5), new_clip(6)], key="open")
    planned(session, second)
    lease, clips = claim_shard(session, "b", seconds=600, model_digest=MODEL) or pytest.fail("nothing to claim")
    start_clip(session, lease, clips[0].clip_id, **ENGINE)


def test_every_rule_has_a_breach_to_find() -> None:
    assert TAMPER.keys() == RULES.keys()


@pytest.mark.parametrize("rule", RULES)
def test_a_breach_is_found(ledger: sessionmaker[Session], rule: str) -> None:
    with ledger.begin() as session:
        fill(session)
        assert list(contradictions(session)) == []
        session.execute(text(TAMPER[rule]))
        assert rule in {found.rule for found in contradictions(session)}


def test_maintenance_deletes_old_objects_that_no_row_knows_and_old_halves_of_uploads(
    ledger: sessionmaker[Session], tmp_path: Path
) -> None:
    """As an engine leaves them that is killed between put and record, or while it puts."""
    store, day = FolderStore(tmp_path), 86400.0
    kept, old, young = (store.put(data, "video/mp4") for data in (b"kept", b"old", b"young"))
    old_half, young_half = (tmp_path / ".incoming" / name for name in ("old", "young"))
    for path, age in (
        *((tmp_path / kept.key, 2 * day), (tmp_path / old.key, 1.1 * day), (tmp_path / young.key, 0.9 * day)),
        *((old_half, 2 * day), (young_half, 0.9 * day)),
    ):
        if not path.exists():
            path.write_bytes(b"half")
        os.utime(path, (time.time() - age, time.time() - age))
    with ledger.begin() as session:
        row = NewArtifact(sha256=kept.sha256, key=kept.key, bytes=4, media_type="video/mp4")
        add_artifacts(session, [row])
    report = MaintenanceReport()
    prune(ledger, store, report)
    assert (report.objects, report.bytes) == (1, 3) and "1 orphan objects deleted" in str(report)
    assert {item.key for item in store.list("blobs/")} == {kept.key, young.key}
    assert not old_half.exists() and young_half.exists()


def test_maintenance_sweeps_old_checkpoints_of_no_clip(ledger: sessionmaker[Session], tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    for key, hours in (("checkpoints/a/1-2", 2), ("checkpoints/a/1-4", 2), ("checkpoints/b/1-2", 0.5)):
        store.put_at(key, b"latents")
        os.utime(tmp_path / key, (0, time.time() - 3600 * hours))
    with ledger.begin() as session:
        run = opened(session, [new_clip(0)])
        kept = "update clips set resume_key = 'checkpoints/a/1-4', resume_step = 4, resume_fingerprint = 'x'"
        session.execute(text(kept + " where request_id = :id"), {"id": run})
    assert sweep_orphans(ledger, store) == (1, len(b"latents"))
    assert [item.key for item in store.list("checkpoints/")] == ["checkpoints/a/1-4", "checkpoints/b/1-2"]


def test_checkpoints_are_looked_for(ledger: sessionmaker[Session], tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    for key in ("checkpoints/kept", "checkpoints/nobodys"):
        store.put_at(key, b"latents")
        os.utime(tmp_path / key, (0, 0))
    with ledger.begin() as session:
        run = opened(session, [new_clip(0), new_clip(1)])
        name = "update clips set resume_key = :key, resume_step = 2, resume_fingerprint = 'x' where request_id = :id"
        for index, key in enumerate(("checkpoints/kept", "checkpoints/gone")):
            session.execute(text(name + " and index = :at"), {"key": key, "id": run, "at": index})
    with ledger() as session:
        found = {(breach.problem, breach.key) for breach in audit(session, store, AuditReport())}
    assert found == {("missing", "checkpoints/gone"), ("orphan", "checkpoints/nobodys")}
