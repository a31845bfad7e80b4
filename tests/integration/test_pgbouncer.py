"""The ledger behind PgBouncer with transaction pooling: migrations, settings, claims, locks, the laws of the leases."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session, sessionmaker

from db.claim import claim_shard
from db.clips import add_clips
from db.fence import take_turn
from db.history import SqlFailed, clips_of, run_sql
from db.leases import complete_shard
from db.requests import open_request, progress, seal_request
from db.roles import make_reader
from db.session import connect, sessions, upgrade
from tests.factories import MODEL, batch, new_clip, new_request, planned, render
from tests.generative.test_leases import Studio
from tests.integration.pgbouncer import pgbouncer

SHOWN = ("jit", "plan_cache_mode", "idle_in_transaction_session_timeout", "TimeZone", "DateStyle", "client_encoding")
Ledger = sessionmaker[Session]


@pytest.fixture
def pooled_url(database_url: str) -> Iterator[str]:
    """The address of a migrated ledger's PgBouncer, which has three connections to the server."""
    with pgbouncer(database_url) as url:
        yield url


@pytest.fixture
def pooled(pooled_url: str) -> Iterator[Engine]:
    engine = connect(pooled_url, application="tests")
    yield engine
    engine.dispose()


@pytest.fixture
def ledger(pooled: Engine) -> Ledger:
    return sessions(pooled)


def shown(session: Session) -> list[str]:
    return [session.execute(text(f"show {name}")).scalar_one() for name in SHOWN]


def test_an_empty_ledger_is_migrated_and_gets_its_reader(empty_database_url: str) -> None:
    with pgbouncer(empty_database_url) as url:
        assert upgrade(url) == upgrade(url) == ()
        reader = url.replace("postgres:", "pooled_reader:")
        make_reader(url, reader)
        make_reader(url, reader)
        engine = connect(url)
        try:
            assert run_sql(engine, "select count(*) from requests").rows == [(0,)]
            assert run_sql(engine, "select clip_id from history").columns == ("clip_id",)
            with pytest.raises(SqlFailed, match="cannot insert multiple commands"):
                run_sql(engine, "select 1; select 2")
            with engine.begin() as connection:
                connection.exec_driver_sql("drop role pooled_reader")
        finally:
            engine.dispose()


@pytest.mark.parametrize("more", ["", "ignore_startup_parameters = options"])
def test_transactions_have_their_settings_and_leave_none_behind(database_url: str, more: str) -> None:
    with pgbouncer(database_url, size=1, more=more) as url:
        engine, keeping = connect(url, idle=7), connect(url, keep_plans=True)
        with sessions(engine)() as session:
            assert shown(session) == ["off", "force_custom_plan", "7s", "UTC", "ISO, MDY", "UTF8"]
        with sessions(keeping)() as session:
            assert shown(session) == ["off", "auto", "10min", "UTC", "ISO, MDY", "UTF8"]
        with psycopg.connect(url.replace("+psycopg", ""), prepare_threshold=None) as other:  # by the same connection
            assert other.execute("show jit").fetchone() == ("on",)
            assert other.execute("select count(*) from pg_prepared_statements").fetchone() == (0,)
        for each in (engine, keeping):
            each.dispose()


def test_statements_said_again_and_again_by_many_do_not_collide(ledger: Ledger) -> None:
    with ledger.begin() as session:
        request = open_request(session, new_request()).id
        assert add_clips(session, request, [new_clip(index) for index in range(60)]) == 60  # a COPY
        seal_request(session, request, 60)
        planned(session, request, size=2)

    def engine(owner: int) -> list[str]:
        made: list[str] = []
        while True:
            with ledger.begin() as session:
                claimed = claim_shard(session, f"engine-{owner}", seconds=60, model_digest=MODEL)
            if claimed is None:
                return made
            lease, clips = claimed
            for clip in clips:
                with ledger.begin() as session:
                    assert render(session, lease, clip.clip_id)
                made.append(clip.clip_id)
            with ledger.begin() as session:
                complete_shard(session, lease)

    with ThreadPoolExecutor(5) as pool:
        made = Counter(clip for each in pool.map(engine, range(5)) for clip in each)
    assert len(made) == 60 and set(made.values()) == {1}
    with ledger() as session:
        assert progress(session, request).finished
        assert len(list(clips_of(session, request))) == 60  # by a cursor of the server's


def test_planners_take_turns(ledger: Ledger) -> None:
    order: list[str] = []

    def plan(name: str) -> None:
        with ledger.begin() as session:
            take_turn(session, 0x506F6F6C)
            order.append(f"{name} begins")
            time.sleep(0.05)
            order.append(f"{name} ends")

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(plan, "abc"))
    assert all(order[2 * k][0] == order[2 * k + 1][0] for k in range(3)), order
    with ledger() as session:
        held = "select count(*) from pg_locks where locktype = 'advisory' and pid <> pg_backend_pid()"
        assert session.execute(text(held)).scalar_one() == 0


def test_a_stalled_transaction_is_ended_and_its_work_undone(pooled_url: str, ledger: Ledger) -> None:
    engine = connect(pooled_url, idle=0.2)
    with ledger.begin() as session:
        batch(session, "batch", 1)
    with pytest.raises(Exception, match=r"idle|closed|terminat"), sessions(engine).begin() as session:
        assert claim_shard(session, "stalled", seconds=60, model_digest=MODEL)
        time.sleep(0.6)
        session.execute(text("select 1"))
    engine.dispose()
    with ledger.begin() as session:
        assert claim_shard(session, "living", seconds=60, model_digest=MODEL)


def test_leases_obey_their_laws(ledger: Ledger) -> None:
    few = settings(
        max_examples=2,
        stateful_step_count=12,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
    )
    run_state_machine_as_test(lambda: Studio(ledger), settings=few)
