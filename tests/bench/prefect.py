"""Measures what a request of a million prompts leaves in Prefect, and what watching it costs; prints Markdown.

Everything is real (the embedded stack, the flows behind their deployments, shards and
leases) but the ranks: an engine sleeps two seconds a shard, whatever is in it, and records all clips of it in three
statements, as one file that they share. So a million clips take as long as a thousand task runs may, and Prefect sees
what it would see of clips that are rendered. All of it lies in a folder that is removed after.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import tempfile
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

import numpy as np
import psutil
import psycopg
from prefect import flow, get_run_logger
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run as this_run
from prefect.states import Completed
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

from db.planning import reuse_renders, shard_table, unplanned
from db.requests import progress
from db.session import connect, sessions
from flows.clients.ledger import prepare_ledger
from flows.generate.page import TABLE_ROWS
from flows.render.engine import run_engine
from flows.render.flow import TaskRuns
from flows.render.shard import Shard
from flows.settings import Settings, load_settings
from infra.stack.databases import PREFECT
from infra.stack.down import down
from infra.stack.home import DEPLOYMENTS, POSTGRES, Stack
from infra.stack.postgres import running_postgres
from infra.stack.prefect import BEAT_SECONDS
from infra.stack.processes import RUN
from infra.stack.up import up
from model.config import Partition
from model.engine.clip import ClipSpec, RenderedClip
from model.loading.card import ModelCard
from model.media.encode import encode_mp4

ENGINES = 2
SLEEP = 2.0  # seconds of a shard: with two engines nearly one task run a second
FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
HEARTBEAT = "prefect.flow-run.heartbeat"
KINDS = {  # of what Prefect's tables hold
    "task runs": r"task_run.*",
    "events": r"event.*",
    "logs": r"log",
    "artifacts": r"artifact.*",
    "flow runs": r"flow_run.*",
}


# --- an engine without ranks ------------------------------------------------------------------------------------------


class Sleeper:
    """A renderer without ranks, whose shards never ask it for a clip."""

    def start(self) -> None:
        pass

    def close(self) -> None:
        pass

    def kill(self) -> None:
        pass

    def fingerprint(self, spec: ClipSpec) -> str:
        raise NotImplementedError(f"{spec.clip_id} is not rendered")

    def render(self, specs: Sequence[ClipSpec], **how: Any) -> Generator[RenderedClip]:
        raise NotImplementedError(f"{len(specs)} clips are not rendered")


class Sleeping(Shard):
    """A shard whose clips are recorded all at once, after a while."""

    def render_all(self, publisher: ThreadPoolExecutor) -> None:
        time.sleep(SLEEP)
        store = self.worker.store
        stored = store.put(encode_mp4(np.zeros((5, 32, 48, 3), np.uint8), 8, {"title": "nothing"}), "video/mp4")
        values = {
            "shard": self.lease.shard_id,
            "attempt": self.lease.attempt,
            "owner": self.lease.owner,
            "partition": str(self.worker.partition),
            "each": SLEEP / len(self.clips),
            **{name: getattr(stored, name) for name in ("sha256", "key", "bytes", "media_type")},
        }
        self.write(lambda session: _record(session, values))
        self.finished = len(self.clips)


def _record(session: Session, values: Mapping[str, Any]) -> None:
    """What start_clip and record_clip do, for all clips of a shard that its lease still holds."""
    for statement in (
        """insert into artifacts (sha256, key, bytes, media_type) values (:sha256, :key, :bytes, :media_type)
           on conflict do nothing""",
        """insert into attempts (clip_id, number, shard_id, shard_attempt, owner, engine, partition, code_version,
                                 status, started_at, finished_at, denoise_seconds)
           select c.id, c.attempts + 1, :shard, :attempt, :owner, :owner, :partition, 'bench', 'done',
                  statement_timestamp(), statement_timestamp(), :each
           from clips c join shards s on s.id = c.shard_id
           where s.id = :shard and s.attempt = :attempt and c.status = 'queued'""",
        """insert into renders (recipe, sha256, clip_id) select c.recipe, :sha256, c.id
           from clips c join shards s on s.id = c.shard_id
           where s.id = :shard and s.attempt = :attempt and c.status = 'queued' on conflict do nothing""",
        """update clips c set status = 'done', artifact = :sha256, attempts = c.attempts + 1, seconds = :each,
                              started_at = statement_timestamp(), finished_at = statement_timestamp()
           from shards s
           where s.id = c.shard_id and s.id = :shard and s.attempt = :attempt and c.status = 'queued'""",
    ):
        session.execute(text(statement), dict(values))


@flow(name="render")
def render(model: str | None = None, linger: float | None = None, partition: str | None = None) -> State[Any]:
    """What the flow of flows/render/flow.py does, with Sleeper in place of the ranks."""

    def build(settings: Settings, card: ModelCard, by: Partition, gpus: tuple[int, ...] | None) -> Sleeper:
        return Sleeper()

    class Shown(TaskRuns):
        def __call__(self, shard: Shard) -> int:
            return TaskRuns.__call__(self, Sleeping(shard.worker, shard.lease, shard.clips))

    say = get_run_logger().info
    settings = load_settings(**({} if model is None else {"model": model}))
    done = run_engine(settings, planned=partition, flow_run_id=str(this_run.id), runner=Shown(), say=say, build=build)
    return Completed(message=f"{done.clips} clips in {done.shards} shards")


# --- the bench --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kept:
    """What Prefect's database holds."""

    bytes: int  # in all
    of: dict[str, int]  # bytes of tables and their indexes, by kind
    rows: dict[str, int]

    @classmethod
    def of_database(cls, url: str) -> Kept:
        with psycopg.connect(url) as database:
            (size,) = _one(database, "select pg_database_size(current_database())")
            tables = database.execute(
                "select relname::text, pg_total_relation_size(oid) from pg_class"
                " where relkind = 'r' and relnamespace = 'public'::regnamespace"
            ).fetchall()
            rows = {name: _one(database, f'select count(*) from "{name}"')[0] for name, _ in tables}
        sizes: Counter[str] = Counter({"the rest": size - sum(size for _, size in tables)})
        for table, size_of_table in tables:
            sizes[next((kind for kind, name in KINDS.items() if re.fullmatch(name, table)), "the rest")] += (
                size_of_table
            )
        return cls(size, dict(sizes), rows)


@dataclass(slots=True)
class Watched:
    """What was seen of a request while it ran."""

    seconds: float = 0.0
    peak: int = 0  # bytes of the process of `generate`
    looks: dict[str, list[float]] = field(default_factory=dict[str, list[float]])  # seconds of each


def prefect_bench(clips: int = 1_000_000) -> Iterator[str]:
    """Prefect under a million clips: engines sleep, all else is real."""
    with tempfile.TemporaryDirectory(prefix="rushes-bench-") as name:
        home, deployments = Path(name) / "home", Path(name) / "prefect.yaml"
        settings = load_settings(home=home)
        if settings.database_url or settings.prefect_api_url or settings.store_url:
            raise RuntimeError(
                "the bench has a stack of its own: unset RUSHES_DATABASE_URL, _PREFECT_API_URL, _STORE_URL"
            )
        deployments.write_text(DEPLOYMENTS.read_text().replace("flows.render.flow.render", f"{__name__}.render"))
        repository = Path(__file__).parents[2]
        try:
            stack = up(home, repo=repository, migrate=prepare_ledger, engines=ENGINES, deployments=deployments)
            yield from _measured(home, stack, clips)
        finally:
            down(home)


def _measured(home: Path, stack: Stack, clips: int) -> Iterator[str]:
    prompts = home / "prompts" / "prompts.jsonl"
    prompts.parent.mkdir()
    with prompts.open("w") as file:
        for k in range(clips):
            file.write(json.dumps({"prompt": f"a red ball slides to the left on grass, take {k}"}) + "\n")
    server = running_postgres(home / POSTGRES)
    if server is None:
        raise RuntimeError(f"no Postgres runs in {home / POSTGRES}")
    url = server.url_of(PREFECT.name).replace("+psycopg", "")
    engine = connect(stack.database_url)
    with SyncPrefectClient(stack.prefect_api_url) as client:
        before = Kept.of_database(url)
        watched = _watch(client, sessions(engine), {"prompts_uri": "prompts.jsonl", "rewrite": False})
    with engine.connect() as connection:
        (row,) = connection.execute(text(TIMES)).mappings().all()
    engine.dispose()
    if row["done"] != clips:
        raise RuntimeError(f"{row['done']} of {clips} clips are done: nothing can be said")
    _settled(url)
    after = Kept.of_database(url)
    runs = _task_runs(url)
    yield f"| {clips:,} prompts | measured | target |"
    yield "|---|---|---|"
    yield f"| in all | {watched.seconds:.0f} s | |"
    yield f"| to read, check and open them | {row['opened']:.0f} s | |"
    yield f"| to plan {row['shards']:,} shards | {row['planned']:.0f} s | |"
    yield f"| to write a manifest of {row['done']:,} lines and the sheet | {row['published']:.0f} s | |"
    yield f"| peak memory of `generate` | {watched.peak / 1e6:.0f} MB | 500 MB |"
    for what, taken in watched.looks.items():
        yield f"| {what}, p95 | {1000 * quantiles(taken, n=20)[-1]:.0f} ms | |"
    yield f"| flow runs of engines | {len(runs)} | |"
    yield f"| task runs | {sum(map(len, runs))} | |"
    yield f"| task runs of the fullest flow run | {max(map(len, runs))} | 1,000 |"
    yield f"| task runs begun in a minute, most | {_most(runs, 60.0)} | 60 |"
    yield f"| task runs begun in ten seconds, most | {_most(runs, 10.0)} | 10 |"
    yield f"| Prefect's database before | {before.bytes / 1e6:.1f} MB | |"
    yield f"| it grew by | {(after.bytes - before.bytes) / 1e6:.1f} MB | 50 MB |"
    for kind in sorted(after.of, key=lambda kind: before.of.get(kind, 0) - after.of[kind]):
        yield f"| … of it {kind} | {(after.of[kind] - before.of.get(kind, 0)) / 1e6:.2f} MB | |"
    for table in ("events", "log", "artifact"):
        yield f"| rows in `{table}` | {after.rows[table] - before.rows[table]:,} more | |"
    said, beat, row = _events(url)
    for kind in ("task-run", "flow-run", "artifact"):
        count, size = said.get(kind, (0, 0))
        yield f"| events of {kind}s, and what they say | {count:,}: {size / 1e6:.2f} MB | |"
    beats = 3600 / BEAT_SECONDS
    yield f"| an hour of a flow run: {beats:.0f} heartbeats | {beats * beat / 1e6:.2f} MB | |"
    table = said.get("table", (0, 0))
    each = table[1] / max(1, table[0]) + row
    yield f"| an hour of reports, one a minute, each {each / 1e3:.0f} kB | {60 * each / 1e6:.2f} MB | |"


TIMES = """
select extract(epoch from (select min(created_at) from shards) - r.created_at) as opened,
       extract(epoch from (select max(created_at) - min(created_at) from shards)) as planned,
       extract(epoch from r.finished_at - (select max(finished_at) from clips)) as published,
       (select count(*) from shards) as shards,
       (select count(*) from clips where status = 'done') as done
from requests r"""


def _watch(client: SyncPrefectClient, ledgers: sessionmaker[Session], request: Mapping[str, Any]) -> Watched:
    """Submits the request as the form does and waits for its end, with a look now and then at what `generate` asks."""
    began, watched = time.monotonic(), Watched()
    deployment = client.read_deployment_by_name("generate/default")
    run = client.create_flow_run_from_deployment(deployment.id, parameters={"request": dict(request)})
    while True:
        state = client.read_flow_run(run.id).state
        if state is not None and state.is_final():
            break
        watched.peak = max(watched.peak, _peak_of(str(run.id)))
        with ledgers() as session:
            planned = session.scalar(text("select id from requests where total is not null"))
        if planned is not None:
            for what, look in _looks(str(planned)).items():
                since = time.perf_counter()
                with ledgers() as session:  # ended without a commit: it changes nothing
                    look(session)
                watched.looks.setdefault(what, []).append(time.perf_counter() - since)
        time.sleep(2)
    watched.seconds = time.monotonic() - began
    if not state.is_completed():
        raise RuntimeError(f"the request ended as {state.name}: {state.message}")
    return watched


def _looks(request_id: str) -> dict[str, Callable[[Session], object]]:
    """What `generate` asks again and again."""
    return {
        "every 5 minutes: all renders to reuse": lambda session: reuse_renders(session, request_id),
        "every second: new takes to adopt": lambda session: reuse_renders(session, request_id, within=121),
        "every second: clips to plan": lambda session: unplanned(session, request_id, limit=50_000),
        "every second: progress": lambda session: progress(session, request_id),
        f"every 5 seconds: the newest {TABLE_ROWS} shards": lambda session: shard_table(
            session, request_id, limit=TABLE_ROWS
        ),
    }


def _peak_of(flow_run: str) -> int:
    """Most bytes that a flow run's process has had in memory; 0 while there is none."""
    peak = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(RUN) == flow_run:
                said = Path(f"/proc/{process.pid}/status").read_text()
                peak = max(peak, 1024 * int(said.partition("VmHWM:")[2].split()[0]))
    return peak


def _events(url: str) -> tuple[dict[str, tuple[int, int]], float, float]:
    """Events by what they are of, and those that changed a table, with the bytes of what they say.

    Then what a heartbeat takes, and what any event takes beside what it says: entries of related resources and indexes.
    """
    said = "length(payload::text) + length(related::text) + length(resource::text)"
    with psycopg.connect(url) as database:
        found = database.execute(f"select event, count(*), sum({said}) from events group by 1").fetchall()
        table = "event = 'prefect.artifact.updated' and length(payload::text) > 200"
        tables = _one(database, f"select count(*), coalesce(sum({said}), 0) from events where {table}")
    by: dict[str, tuple[int, int]] = {"table": (tables[0], tables[1])}
    for event, count, size in found:
        kind = "artifact" if "artifact" in event else event.split(".")[1]
        by[kind] = (by.get(kind, (0, 0))[0] + count, by.get(kind, (0, 0))[1] + size)
    count, size = sum(count for _, count, _ in found), sum(size for *_, size in found)
    beside = max(0, Kept.of_database(url).of["events"] - size) / max(1, count)
    beats = next(((count, size) for event, count, size in found if event == HEARTBEAT), (1, 0))
    return by, beats[1] / beats[0] + beside, beside


def _settled(url: str) -> None:
    """Waits until Prefect's recorders have written what they were told."""
    counted, same = -1, 0
    while same < 5:
        with psycopg.connect(url) as database:
            query = "select (select count(*) from task_run) + (select count(*) from events where event <> %s)"
            (now,) = _one(database, query, HEARTBEAT)
        same, counted = same + 1 if now == counted else 0, now
        time.sleep(1)


def _task_runs(url: str) -> list[list[float]]:
    """When each task run began, in seconds, by flow run."""
    found: dict[str, list[float]] = {}
    with psycopg.connect(url) as database:
        query = "select flow_run_id, start_time from task_run where start_time is not null order by start_time"
        for run, at in database.execute(query):
            found.setdefault(str(run), []).append(at.timestamp())
    return list(found.values())


def _one(database: psycopg.Connection, query: str, *values: str) -> tuple[Any, ...]:
    row = database.execute(query.encode(), values).fetchone()
    assert row is not None, query
    return row


def _most(runs: Sequence[Sequence[float]], seconds: float) -> int:
    """The most that began within so many seconds."""
    times = sorted(at for run in runs for at in run)
    return max(bisect_left(times, at + seconds) - k for k, at in enumerate(times))


BENCHES = {"prefect": prefect_bench}


def main(arguments: Sequence[str]) -> None:
    """python -m tests.bench.prefect [CLIPS]"""
    for line in prefect_bench(*(int(each) for each in arguments)):
        print(line, flush=True)


if __name__ == "__main__":
    from tests.bench import prefect as bench_prefect  # by the name under which its flow is imported

    bench_prefect.main(sys.argv[1:])
