"""Measures what a busy Prefect costs the ledger that shares its Postgres, and prints Markdown.

Claims a second are counted with Prefect quiet and with Prefect busy: once while it keeps its tables on a Postgres of
its own, once on the ledger's. A busy Prefect takes processor time from the ledger wherever its tables are; what sharing
the server costs is between the two.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx

from db.session import connect, sessions
from flows.clients.ledger import prepare_ledger
from infra.stack.databases import PREFECT, prefect_url
from infra.stack.down import down
from infra.stack.postgres import start_postgres, stop_postgres
from infra.stack.up import up
from tests.bench.ledger import PROCESSES, WARM, claim_and_release, make_shards, open_request

CLIPS = 20_000
WORKERS = 64
SECONDS = 8.0
TURNS = 3  # of quiet and busy, of which the middle one counts
EVENTS, TASK_RUNS = 50, 2  # a second: signs of life of 1,500 flow runs, and twice the task runs of a full stack
ROUNDS = 2  # of them a second


def beside_bench() -> Iterator[str]:
    """The ledger beside a busy Prefect, on one Postgres and on two."""
    yield f"| claims of {WORKERS} engines | Prefect quiet | Prefect busy | left | slowest of a hundred, busy |"
    yield "|---|---|---|---|---|"
    with tempfile.TemporaryDirectory(prefix="rushes-bench-") as name:
        apart = Path(name) / "postgres"
        try:
            elsewhere = prefect_url(start_postgres(apart, databases=(PREFECT,)))
            for what, place in (("on a Postgres of its own", elsewhere), ("on the ledger's", None)):
                yield from _measured(Path(name) / ("apart" if place else "together"), what, place)
        finally:
            stop_postgres(apart)


def _measured(home: Path, what: str, place: str | None) -> Iterator[str]:
    try:
        stack = up(home, repo=Path(__file__).parents[2], migrate=prepare_ledger, prefect_database=place)
        engine = connect(stack.database_url)
        opened = open_request(str(home / "bench"), stack.database_url, CLIPS)
        with sessions(engine).begin() as session:
            digest = make_shards(session, opened.request_id)
        engine.dispose()
        quiet, busy, slowest = list[float](), list[float](), list[float]()
        for _ in range(TURNS):
            quiet.append(_claims(stack.database_url, digest, None)[0])
            rate, worst = _claims(stack.database_url, digest, stack.prefect_api_url)
            busy.append(rate)
            slowest.append(worst)
        before, beside, worst = median(quiet), median(busy), median(slowest)
        yield f"| Prefect {what} | {before:.0f}/s | {beside:.0f}/s | {beside / before:.0%} | {worst:.0f} ms |"
    finally:
        down(home)


def _claims(url: str, digest: str, prefect: str | None) -> tuple[float, float]:
    """Claims a second, and the milliseconds of the slowest of a hundred; beside the Prefect server at `prefect`."""
    with ProcessPoolExecutor(PROCESSES + 1, multiprocessing.get_context("spawn")) as pool:
        load = pool.submit(_burden, prefect, SECONDS + WARM + 5) if prefect else None
        share = WORKERS // PROCESSES
        each = [pool.submit(claim_and_release, url, digest, share, SECONDS, k) for k in range(PROCESSES)]
        taken = sorted(spent for future in each for spent in future.result())
        if load is not None:
            load.result()
    return len(taken) / SECONDS, 1000 * quantiles(taken, n=100)[-1]


def _burden(prefect: str, seconds: float) -> None:
    """Tells Prefect of so many events and task runs a second. Raises RuntimeError where it took fewer than half."""
    began, done = time.monotonic(), 0
    with httpx.Client(base_url=prefect, timeout=60, trust_env=False) as client:
        while time.monotonic() < began + seconds:
            client.post("/events", json=[_event() for _ in range(EVENTS // ROUNDS)]).raise_for_status()
            for _ in range(TASK_RUNS // ROUNDS):
                run = {"task_key": "bench", "dynamic_key": uuid.uuid4().hex, "state": {"type": "RUNNING"}}
                made = client.post("/task_runs/", json=run).raise_for_status().json()
                ended = {"state": {"type": "COMPLETED"}, "force": True}
                client.post(f"/task_runs/{made['id']}/set_state", json=ended).raise_for_status()
            done += 1
            time.sleep(max(0.0, began + done / ROUNDS - time.monotonic()))
    if done < seconds * ROUNDS / 2:
        raise RuntimeError(f"Prefect took {done} of {seconds * ROUNDS:.0f} rounds: it was not as busy as is said")


def _event() -> dict[str, Any]:
    run = f"prefect.flow-run.{uuid.uuid4()}"
    return {
        "id": str(uuid.uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": "prefect.flow-run.heartbeat",
        "resource": {"prefect.resource.id": run, "prefect.resource.name": "bench"},
        "related": [{"prefect.resource.id": f"prefect.flow.{k}", "prefect.resource.role": "flow"} for k in range(3)],
        "payload": {"note": "as long as one of its own " * 8},
    }


BENCHES = {"beside": beside_bench}


if __name__ == "__main__":
    for line in beside_bench():
        print(line, flush=True)
