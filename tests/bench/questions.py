"""Asks every question of docs/questions.md among a million clips, as the reader does, and prints Markdown.

The clips are made by the database itself: forty requests of three tenants with two models over the last month, some
33,000 clips a day, with failures, second attempts, reused clips, extensions, tags, and a request that is under way.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import quantiles

from sqlalchemy import Engine, text

from db.history import run_sql
from db.session import connect, upgrade
from infra.stack.postgres import start_postgres, stop_postgres
from tests.documents import QUESTIONS

SERVER = {"shared_buffers": "512MB", "max_wal_size": "8GB", "synchronous_commit": "off"}
REQUESTS, DAYS, ROUNDS = 40, 30.0, 40
LEFT = 0.5  # of the newest request's clips wait

_REQUEST = "'req_' || lpad(to_hex({}), 12, '0')"
_CLIP = "'req_' || lpad(to_hex(r), 12, '0') || '-' || lpad(k::text, 6, '0') || '-0'"
_TENANT = "(array['agency', 'lab', 'studio'])[1 + r % 3]"
# r: a request, 0 the newest; k: its line; n: the clip's number; at: when it ended
_MADE = f"""from (
    select n, n / :each as r, n % :each as k, now() - n * :step * interval '1 second' as at
    from generate_series(0, :clips - 1) n
) g, lateral (select {_CLIP} as id, (r = 0 and k < :each * {LEFT}) as waits, n % 50 = 7 as fails,
                     n % 20 = 3 and not r = 0 as found, n % 33 = 5 as twice) of_it"""
MAKE = (
    "insert into tenants (name) values ('agency'), ('lab'), ('studio')",
    "insert into models (digest, name) values (repeat('a', 64), 'one'), (repeat('b', 64), 'two')",
    "insert into artifacts (sha256, key, bytes, media_type, created_at)"
    f" select lpad(to_hex(n), 64, '0'), 'blobs/' || n, 200000 + n % 9999, 'video/mp4', at {_MADE} where not waits"
    " and not fails and not found",
    """insert into engines (id, host, pid, device, partition, model_digest, code_version, started_at, heartbeat_at,
                            ready_at, closed_at)
       select 'engine-' || e, 'gpu' || e % 4, e, 'NVIDIA H200', 'cfg1xsp1xtp2', repeat('a', 64), '1',
              now() - (e + 1) * interval '3 hours', now() - e / 20 * interval '3 hours', now() - e * interval '3 hours',
              case when e >= 20 then now() - e * interval '3 hours' end from generate_series(0, 199) e""",
    f"""insert into requests (id, key, name, tenant, model, model_digest, settings, source, source_sha256, status,
                             total, created_at, finished_at, tags)
       select {_REQUEST.format("r")}, 'key ' || r, 'request ' || r, {_TENANT}, (array['one', 'two'])[1 + r % 2],
              repeat((array['a', 'b'])[1 + r % 2], 64), jsonb_build_object('steps', 20 + r), 'inline', repeat('c', 64),
              (case when r = 0 then 'open' else 'completed_with_gaps' end)::request_status, :each,
              now() - (r + 1) * :each * :step * interval '1 second',
              case when r > 0 then now() - r * :each * :step * interval '1 second' end,
              case when r % 8 = 1 then array['campaign'] end
       from generate_series(0, {REQUESTS} - 1) r""",
    f"""insert into shards (request_id, status, priority, width, height, frames, size, attempt, finished_at, claimed_at)
       select {_REQUEST.format("r")}, 'done', 5, 832, 480, 81, :each, 1, now(), now()
       from generate_series(0, {REQUESTS} - 1) r""",
    f"""insert into clips (id, request_id, "index", sample, line, prompt, width, height, frames, fps, steps, guidance,
                          solver, shift, seed, recipe, status, attempts, failures, error, reused, rendered_by, artifact,
                          seconds, shard_id, queued_at, started_at, finished_at, tags, metadata)
       select id, {_REQUEST.format("r")}, k, 0, k + 1, 'a ' || (array['red', 'blue', 'green'])[1 + k % 3]
              || ' ball rolls over the lawn at sunset, take ' || k, 832, 480, 81, 16, 25, 4, 'unipc', 5, k,
              lpad(to_hex(n), 64, '0'),
              (case when waits then 'queued' when fails then 'failed' else 'done' end)::clip_status,
              case when waits or found then 0 when fails or twice then 2 else 1 end, case when fails then 1 else 0 end,
              case when fails then 'out of memory at step ' || n % 7 end, found and not fails and not waits,
              case when found and not fails and not waits then
                  {_CLIP.replace("to_hex(r)", "to_hex((n - 1) / :each)").replace("k::text", "((n - 1) % :each)::text")}
              end,
              case when not waits and not fails then lpad(to_hex(n - found::int), 64, '0') end,
              case when waits or fails or found then null else 30 + n % 17 end, r + 1,
              at - interval '1 hour', case when not waits then at - interval '1 minute' end,
              case when not waits then at end,
              case when n % 100 = 1 then array['hero', 'shot ' || n % 700] end,
              case when n % 100 = 1 then jsonb_build_object('shot', n % 700) end {_MADE}""",
    f"""insert into attempts (clip_id, number, shard_id, shard_attempt, owner, engine, host, partition, code_version,
                             status, error, error_class, started_at, finished_at, text_seconds, denoise_seconds,
                             decode_seconds, encode_seconds, put_seconds)
       select id, t, r + 1, 1, 'a', 'engine-' || least(199, extract(epoch from now() - at)::int / 10800 * 20 + n % 20),
              'gpu' || n % 4, 'cfg1xsp1xtp2', '1',
              (case when fails or twice and t = 1 then 'failed' else 'done' end)::attempt_status,
              case when fails or twice and t = 1 then 'out of memory' end,
              case when fails or twice and t = 1 then 'out_of_memory' end, at - (3 - t) * interval '1 minute',
              at - (2 - t) * interval '1 minute', .1, 27 + n % 17, 2, .7, .2
       {_MADE}, generate_series(1, case when fails or twice then 2 else 1 end) t
       where not waits and (fails or not found) order by n desc""",
    """insert into tallies (request_id, status, clips, reused, rendered, seconds, bytes, started_at)
       select request_id, status, count(*), count(*) filter (where reused),
              count(*) filter (where status = 'done' and not reused), coalesce(sum(seconds), 0),
              coalesce(sum(bytes) filter (where not reused), 0), min(started_at)
       from clips left join artifacts on sha256 = artifact group by 1, 2""",
    # one that is extended, and what came of it extended again
    f"""insert into edges (child, parent, kind)
       select one.id, other.id, 'extend' from (select id, n {_MADE} where n % 100 in (2, 4) and not waits) one
       join (select id, n {_MADE} where n % 100 in (1, 2) and not waits) other
       on other.n = one.n - (one.n % 100) / 2""",
)


def questions_bench(clips: int = 1_000_000) -> Iterator[str]:
    """The questions of docs/questions.md among a million clips."""
    with tempfile.TemporaryDirectory(prefix="rushes-bench-") as name:
        server = start_postgres(Path(name) / "postgres", settings=SERVER)
        try:
            upgrade(server.url)
            engine = connect(server.url)
            began = time.monotonic()
            make(engine, clips)
            took = time.monotonic() - began
            yield f"{clips:,} clips of {REQUESTS} requests in {DAYS:.0f} days, made in {took:.0f} s."
            yield ""
            yield "| question | rows | median | p95 |"
            yield "|---|---|---|---|"
            for question, sql in QUESTIONS.items():
                rows, median, p95 = timed(engine, sql)
                yield f"| {question} | {rows} | {median:.0f} ms | {p95:.0f} ms |"
            engine.dispose()
        finally:
            stop_postgres(Path(name) / "postgres")


def make(engine: Engine, clips: int) -> None:
    """Puts so many clips into an empty ledger, unchecked, and tidies up as the server does in its own time."""
    each = clips // REQUESTS
    values = {"clips": each * REQUESTS, "each": each, "step": DAYS * 86400 / clips}
    with engine.begin() as connection:
        connection.execute(text("set local session_replication_role = replica"))
        for statement in MAKE:
            known = {name: value for name, value in values.items() if f":{name}" in statement}
            connection.execute(text(statement.replace("::", "\\:\\:")), known)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("vacuum analyze"))
        connection.execute(text("checkpoint"))


def timed(engine: Engine, sql: str) -> tuple[int, float, float]:
    """Rows of the answer; median and 95th percentile in milliseconds, after a first time that finds its pages."""
    taken: list[float] = []
    rows = len(run_sql(engine, sql).rows)
    for _ in range(ROUNDS):
        began = time.perf_counter()
        run_sql(engine, sql)
        taken.append(1000 * (time.perf_counter() - began))
    return rows, quantiles(taken, n=2)[0], quantiles(taken, n=20)[-1]


BENCHES = {"questions": questions_bench}


def main(arguments: Sequence[str]) -> None:
    """python -m tests.bench.questions [CLIPS]"""
    for line in questions_bench(*(int(each) for each in arguments)):
        print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
