"""What Prefect is shown of an engine's shards: so many by a flow run, and about one a second by all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

from db.engines import register_engine
from flows.render.engine import EngineTotals, run_engine
from flows.render.flow import TaskRuns
from flows.render.shard import Shard
from flows.settings import load_settings
from model.loading.card import find_model
from tests.bench import prefect as bench_prefect
from tests.bench.prefect import Sleeper, Sleeping
from tests.factories import batch

Engine = Callable[..., tuple[EngineTotals, list[int]]]


@pytest.fixture
def engine(tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Runs an engine that sleeps in place of rendering; what it did, and the shards that it showed."""

    def run(most: int, seconds: float) -> tuple[EngineTotals, list[int]]:
        monkeypatch.setattr(bench_prefect, "SLEEP", seconds)
        shown: list[int] = []

        def show(shard: Shard) -> int:
            shown.append(shard.lease.shard_id)
            return shard.run()

        class Work(TaskRuns):
            def __call__(self, shard: Shard) -> int:
                return TaskRuns.__call__(self, Sleeping(shard.worker, shard.lease, shard.clips))

        settings = load_settings(home=tmp_path / "home", database_url=database_url, linger=1)
        work = Work(most=most, show=show)
        done = run_engine(settings, flow_run_id="mine", runner=work, build=lambda *_: Sleeper())
        return done, shown

    return run


def others(session: Session, count: int, flow_run_id: str | None) -> None:
    """Engines of which the ledger has just heard."""
    for k in range(count):
        register_engine(
            session, f"other/{k}", host="other", pid=k, device="cpu", partition="cfg1xsp1xtp1",
            model_digest=find_model("mini").digest, code_version="1", flow_run_id=flow_run_id and f"{flow_run_id}-{k}",
        )  # fmt: skip


def test_a_flow_run_ends_after_so_many_task_runs(ledger: sessionmaker[Session], engine: Engine) -> None:
    """Its shards stay for the next one, and nothing is shown twice."""
    with ledger.begin() as session:
        batch(session, "batch", 5, model_digest=find_model("mini").digest)
    done, first = engine(most=2, seconds=1.1)
    assert (done.shards, done.clips, len(first)) == (2, 2, 2)
    with ledger() as session:
        assert session.scalar(text("select count(*) from shards where status = 'queued'")) == 3
    done, then = engine(most=100, seconds=1.1)
    assert (done.shards, len(then), len({*first, *then})) == (3, 3, 5)


def test_many_engines_show_few_of_their_short_shards(ledger: sessionmaker[Session], engine: Engine) -> None:
    """Six hundred engines begin one each in ten minutes; all shards are rendered none the less."""
    with ledger.begin() as session:
        batch(session, "batch", 6, model_digest=find_model("mini").digest)
        others(session, 600, "theirs")
    done, shown = engine(most=100, seconds=0.0)
    assert (done.shards, done.clips, len(shown)) == (6, 6, 1)
    with ledger() as session:
        found = session.execute(text("select status::text, attempts, host, seconds from history")).all()
        assert {(status, attempts) for status, attempts, *_ in found} == {("done", 1)} and len(found) == 6


def test_engines_outside_prefect_show_nothing_and_do_not_count(ledger: sessionmaker[Session], engine: Engine) -> None:
    with ledger.begin() as session:
        batch(session, "batch", 3, model_digest=find_model("mini").digest)
        others(session, 600, None)
    done, shown = engine(most=100, seconds=1.1)
    assert done.shards == len(shown) == 3
