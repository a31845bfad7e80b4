"""Measures the ledger under a million clips, and prints Markdown: opening, claiming, progress, the twenty questions.

Everything is real (the embedded Postgres, the prompt reader, the ledger's functions) but the engines: they claim
shards, sleep a tenth of a second and give them back. Clips of the past are made by the database itself. All of it lies
in a folder that is removed after.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles

from sqlalchemy import Engine, text
from sqlalchemy.orm import Session, sessionmaker

from db.claim import claim_shard
from db.leases import release_shard
from db.requests import progress
from db.session import connect, sessions, upgrade
from flows.request.form import GenerationRequest
from flows.settings import load_settings
from infra.stack.postgres import start_postgres, stop_postgres
from tests.documents import QUESTIONS

SHARD = 50  # clips: so many that a million of them are 20,000 shards to claim from
SLEEP = 0.1  # seconds that an engine of the bench spends on a shard
WARM = 3.0  # seconds before claims are counted: all engines at once, and no statement planned yet, is the bench's doing
PROCESSES = 4  # of clients: threads of one Python would measure Python
SERVER = {"shared_buffers": "512MB", "max_connections": "200", "max_wal_size": "8GB"}
REQUEST = "req_0000000000aa"  # of the clips of the past
YEAR = 365.0  # days over which they lie: ten millions are 27,000 a day
PART = 1_000_000  # of them in one transaction


@dataclass(frozen=True, slots=True)
class Opened:
    """What reading, checking, opening and sealing a request took of one process."""

    seconds: float
    peak: int  # bytes
    request_id: str


def ledger_bench(clips: int = 1_000_000, past: int = 10_000_000, workers: int = 64, seconds: int = 15) -> Iterator[str]:
    """The ledger at a million: engines sleep, all else is real."""
    with tempfile.TemporaryDirectory(prefix="rushes-bench-") as name:
        home = Path(name)
        server = start_postgres(home / "postgres", settings=SERVER)
        try:
            upgrade(server.url)
            yield from _measured(home, server.url, clips, past, workers, seconds)
        finally:
            stop_postgres(home / "postgres")


def _measured(home: Path, url: str, clips: int, past: int, workers: int, seconds: float) -> Iterator[str]:
    engine = connect(url)
    ledgers = sessions(engine)
    yield "| what | measured | target |"
    yield "|---|---|---|"
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:  # a process's peak is its own
        opened = apart.submit(open_request, str(home), url, clips).result()
    yield f"| read, check and open {clips:,} prompts | {opened.seconds:.0f} s | 120 s |"
    yield f"| peak memory of that process | {opened.peak / 1e6:.0f} MB | 500 MB |"
    with ledgers.begin() as session:
        digest = make_shards(session, opened.request_id)
    _vacuum(engine)
    yield from _claims(url, digest, workers, seconds, f"{clips:,} clips queued")
    for first in range(0, past, PART):
        with ledgers.begin() as session:
            _past(session, digest, first, min(PART, past - first), past)
    _vacuum(engine)
    yield from _claims(url, digest, workers, seconds, f"and {past:,} finished ones beside them")
    for what, ask in (
        (f"progress of a request of {clips:,} clips", lambda session: progress(session, opened.request_id)),
        *((f"“{question.rstrip('?')}?”", _asks(sql)) for question, sql in QUESTIONS.items()),
    ):
        target = "50 ms" if what.startswith("progress") else "200 ms"
        yield f"| {what}, p95 of 20 | {_p95(ledgers, ask):.0f} ms | {target} |"
    engine.dispose()


def _vacuum(engine: Engine) -> None:
    """What the server does in its own time after so many writes."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("vacuum analyze"))
        connection.execute(text("checkpoint"))


def _asks(sql: str) -> Callable[[Session], object]:
    return lambda session: session.execute(text(sql.replace(":", "\\:"))).all()


def _p95(ledgers: sessionmaker[Session], ask: Callable[[Session], object], rounds: int = 20) -> float:
    """Milliseconds."""
    taken: list[float] = []
    for _ in range(rounds):
        began = time.perf_counter()
        with ledgers() as session:
            ask(session)
        taken.append(1000 * (time.perf_counter() - began))
    return quantiles(taken, n=20)[-1]


def open_request(home: str, url: str, clips: int) -> Opened:
    """In a process of its own: what the flow `generate` does before anything is planned."""
    from flows.generate.request import find_source, record

    settings = load_settings(home=Path(home) / "home", database_url=url, store_url=(Path(home) / "store").as_uri())
    settings.prompts.mkdir(parents=True, exist_ok=True)
    with (settings.prompts / "prompts.jsonl").open("w") as file:
        for k in range(clips):
            file.write(json.dumps({"prompt": f"a red ball slides to the left on grass, take {k}"}) + "\n")
    began = time.monotonic()
    engine = connect(url)
    request = GenerationRequest(prompts_uri="prompts.jsonl", rewrite=False)
    source = find_source(settings, sessions(engine), settings.open_store(), request)
    opened = record(settings, sessions(engine), settings.open_store(), source, request, None, run_id=None, say=print)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Opened(time.monotonic() - began, peak, opened.id)


def make_shards(session: Session, request_id: str) -> str:
    """Puts all clips into shards, by the database itself; the digest of their model."""
    session.execute(text("select setval(pg_get_serial_sequence('shards', 'id'), 1)"))
    made = """
        with numbered as (
            select id, width, height, frames, (row_number() over (order by "index", sample) - 1) / :size as part
            from clips where request_id = :request and status = 'queued'
        ), shapes as (
            select part, min(width) as width, min(height) as height, min(frames) as frames, count(*) as size
            from numbered group by part
        ), cut as (
            insert into shards (request_id, priority, width, height, frames, size, predicted_seconds)
            select :request, 5, width, height, frames, size, size from shapes order by part returning id
        ), placed as (select id as shard_id, row_number() over (order by id) - 1 as part from cut)
        update clips set shard_id = placed.shard_id
        from numbered join placed using (part) where clips.id = numbered.id"""
    session.execute(text(made), {"request": request_id, "size": SHARD})
    return str(session.scalar(text("select model_digest from requests where id = :id"), {"id": request_id}))


def _past(session: Session, digest: str, first: int, count: int, all_of_them: int) -> None:
    """So many clips that were rendered, evenly over the last year, each with its attempt; put in unchecked."""
    session.execute(text("set local session_replication_role = replica"))
    session.execute(
        text("""
        insert into requests (id, key, name, tenant, model, model_digest, settings, source, source_sha256, status,
                              total, finished_at)
        values (:request, 'past', 'past', 'default', 'mini', :digest, '{}', 'inline', repeat('a', 64), 'completed',
                :count, now()) on conflict do nothing"""),
        {"request": REQUEST, "digest": digest, "count": all_of_them},
    )
    artifact = "insert into artifacts (sha256, key, bytes, media_type) values (repeat('b', 64), 'past', 9, 'video/mp4')"
    session.execute(text(f"{artifact} on conflict do nothing"))
    values = {"request": REQUEST, "first": first + 1, "last": first + count, "when": YEAR / all_of_them}
    shard = """
        insert into shards (request_id, status, priority, width, height, frames, size, attempt, finished_at)
        values (:request, 'done', 5, 64, 64, 17, :last, 1, now()) returning id"""
    values["shard"] = session.scalar(text(shard), values)
    clips = """
        insert into clips (id, request_id, "index", sample, prompt, width, height, frames, fps, steps, guidance,
                           solver, shift, seed, recipe, status, attempts, artifact, seconds, queued_at, started_at,
                           finished_at)
        select :request || '-' || lpad(g::text, 8, '0') || '-0', :request, g, 0, 'a blue cube spins, take ' || g,
               64, 64, 17, 8, 25, 4, 'ab2', 3, g, lpad(to_hex(g), 64, '0'), 'done', 1, repeat('b', 64), 1 + g % 7,
               at, at, at
        from generate_series(cast(:first as bigint), :last) g,
             lateral (select now() - g * :when * interval '1 day' as at) t"""
    attempts = """
        insert into attempts (clip_id, number, shard_id, shard_attempt, owner, engine, partition, code_version, status,
                              started_at, finished_at, text_seconds, denoise_seconds, decode_seconds, encode_seconds,
                              put_seconds)
        select :request || '-' || lpad(g::text, 8, '0') || '-0', 1, :shard, 1, 'a', 'a', 'cfg1xsp1xtp2', '1', 'done',
               at, at, .1, 1 + g % 7, .1, .1, .1
        from generate_series(cast(:first as bigint), :last) g,
             lateral (select now() - g * :when * interval '1 day' as at) t"""
    for statement in (clips, attempts):
        session.execute(text(statement), values)


def _claims(url: str, digest: str, workers: int, seconds: float, what: str) -> Iterator[str]:
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        each = [pool.submit(claim_and_release, url, digest, workers // PROCESSES, seconds, k) for k in range(PROCESSES)]
        taken = sorted(spent for future in each for spent in future.result())
    rate, p99 = len(taken) / seconds, 1000 * quantiles(taken, n=100)[-1]
    yield f"| claims of {workers} engines, {what} | {rate:.0f} shards/s | 500 |"
    yield f"| the slowest of a hundred claims | {p99:.0f} ms | 50 ms |"


def claim_and_release(url: str, digest: str, threads: int, seconds: float, process: int) -> list[float]:
    """In a process of its own: threads that claim, sleep and give back; the seconds of each claim."""
    taken: list[float] = []
    ready = threading.Barrier(threads)

    def work(number: int) -> None:
        connection = connect(url, keep_plans=True)  # as engines do
        mine = sessions(connection)
        with mine() as session:
            session.execute(text("select 1"))
        ready.wait()
        warm = time.monotonic() + WARM
        while (began := time.monotonic()) < warm + seconds:
            with mine.begin() as session:
                claimed = claim_shard(session, f"bench/{process}-{number}", seconds=60, model_digest=digest)
            if began >= warm:
                taken.append(time.monotonic() - began)
            if claimed is None:
                break
            time.sleep(SLEEP)
            with mine.begin() as session:
                release_shard(session, claimed[0])
        connection.dispose()

    each = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for thread in each:
        thread.start()
    for thread in each:
        thread.join()
    return taken


BENCHES = {"ledger": ledger_bench}


def main(arguments: Sequence[str]) -> None:
    """python -m tests.bench.ledger [CLIPS [PAST [WORKERS [SECONDS]]]]"""
    for line in ledger_bench(*(int(each) for each in arguments)):
        print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
