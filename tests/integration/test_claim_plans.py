"""How the server answers what engines ask all the time, by its own plans: by index, however much has ended before."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session, sessionmaker

from db.claim import CLAIM
from db.leases import complete_shard, fail_clip, renew, start_clip
from db.session import connect, sessions
from tests.factories import MODEL, claim, opened

ENDED, QUEUED = 20_000, 5_000  # shards, with a clip each
ASKED = {"model_digest": MODEL, "partition": "tp2", "owner": "a", "ranks": 2, "seconds": 60.0}
RULES = {"window": 600.0, "ageing": 600.0, "avoid": 30.0}

PAST = """
insert into requests (id, key, name, tenant, model, model_digest, settings, source, source_sha256, status, total,
                      finished_at)
select 'req_' || lpad(to_hex(n), 12, 'f'), 'past-' || n, 'past', 'studio', 'mini', :digest, '{}', 'inline', :digest,
       'completed', 0, now()
from generate_series(1, 200) n"""
SHARDS = """
with shard as (
    insert into shards (request_id, status, priority, width, height, frames, size, attempt, claimed_at, finished_at)
    select requests.id, (case when ended then 'done' else 'queued' end)::shard_status, 5, 64, 48, 5, 1, ended::integer,
           case when ended then now() end, case when ended then now() end
    from requests, lateral (select status <> 'open' as ended) as told,
         generate_series(1, case when ended then :ended / 200 else :queued / 2 end)
    returning id, request_id, finished_at
)
insert into clips (id, request_id, "index", sample, prompt, width, height, frames, fps, steps, guidance, solver, shift,
                   seed, recipe, status, error, shard_id, finished_at)
select 'clip-' || id, request_id, id, 0, 'a', 64, 48, 5, 8, 4, 3, 'euler', 3, 1, lpad(to_hex(id), 64, '0'),
       (case when finished_at is null then 'queued' else 'failed' end)::clip_status, 'x', id, finished_at
from shard"""


@pytest.fixture
def busy(database: Engine, ledger: sessionmaker[Session]) -> sessionmaker[Session]:
    """Much that has ended, two open requests with thousands of shards, twenty leases."""
    with ledger.begin() as session:
        for name in ("one", "another"):
            opened(session, [], key=name)
        session.execute(text(PAST), {"digest": MODEL})
        session.execute(text(SHARDS), {"ended": ENDED, "queued": QUEUED})
        for number in range(20):
            claim(session, f"engine-{number}")
    with database.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("vacuum analyze"))
    return ledger


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


def whole(plan: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return list(nodes(plan[0]["Plan"]))


def check(plan: list[dict[str, Any]], *indexes: str) -> None:
    """These indexes are used, and neither shards nor clips are read from end to end."""
    steps = whole(plan)
    assert set(indexes) <= {step.get("Index Name") for step in steps}, steps
    read = {step.get("Relation Name") for step in steps if step["Node Type"] == "Seq Scan"}
    assert not read & {"shards", "clips", "attempts", "renders"}, steps


def test_a_claim_reads_what_can_be_claimed_and_no_more(busy: sessionmaker[Session]) -> None:
    with busy() as session:
        plan = session.scalar(text(f"explain (analyze, format json) {CLAIM.text}"), {**ASKED, **RULES})
        check(plan, "ix_shards_active", "ix_shards_leased", "ix_shards_claimed_at")
        rows = sum(
            step["Actual Loops"] * (step["Actual Rows"] + step.get("Rows Removed by Filter", 0)) for step in whole(plan)
        )
        assert rows < 1000, f"{rows} rows read for one claim of {QUEUED} shards, beside {ENDED} that have ended"


def test_the_plan_that_the_server_keeps_does_so_too(busy: sessionmaker[Session]) -> None:
    """For parameters that it does not know: what an engine's connection gets after some claims."""
    names = list(dict.fromkeys(re.findall(r"(?<!:):(\w+)", CLAIM.text)))
    generic = re.sub(r"(?<!:):(\w+)", lambda found: f"${names.index(found[1]) + 1}", CLAIM.text)
    with busy() as session:
        plan = session.connection().exec_driver_sql(f"explain (generic_plan, format json) {generic}").scalar_one()
    check(plan, "ix_shards_active", "ix_shards_leased", "ix_shards_claimed_at")


def test_what_an_engine_says_about_its_shard_goes_by_keys(busy: sessionmaker[Session], database: Engine) -> None:
    """On a connection that keeps plans, after as many times as it takes for the server to keep one."""
    said: dict[str, int] = {}
    keeping = connect(database.url.render_as_string(hide_password=False), keep_plans=True)
    try:
        with sessions(keeping).begin() as session:
            before = _scans(session)
            for number in range(12):
                lease, (clip,) = claim(session, f"keeper-{number}")
                renew(session, lease, 60)
                start_clip(session, lease, clip.clip_id, engine="e", partition="p", code_version="1")
                fail_clip(session, lease, clip.clip_id, "no", permanent=True)
                complete_shard(session, lease)
            said = {name: count - before[name] for name, count in _scans(session).items()}
    finally:
        keeping.dispose()
    assert said == {name: 0 for name in said}, "tables read from end to end"


def _scans(session: Session) -> dict[str, int]:
    """How often this transaction has read each large table from end to end."""
    seen = text("select relname, seq_scan from pg_stat_xact_user_tables where relname = any (:names)")
    return {row.relname: row.seq_scan for row in session.execute(seen, {"names": ["shards", "clips"]})}
