"""The long-lived engine: load the model once, then lease shard after shard until no work is left for a while.

`render` is the flow behind the deployment `render/engine`; `rushes engine` runs the same loop without Prefect. A shard
is one Prefect task run and never more, and of very short ones only some are shown (TaskRuns): Prefect's records are for
people, the ledger is for counting.

A clip goes: ranks denoise and decode it ▶ MP4 ▶ object store ▶ ledger. The last three happen in a thread of their own
while the ranks are already at the next clip. Bytes first, row second: what the ledger calls done can be downloaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run as this_run
from prefect.states import Completed, Suspended

from flows.clients.page import PrefectPage
from flows.clients.retry import best_effort
from flows.render.engine import run_engine
from flows.render.pool import dead_owners
from flows.render.shard import Shard
from flows.settings import load_settings
from infra.metrics import setup_metrics
from infra.tracing import flush, setup_tracing

TASK_RUNS = 1000  # of one flow run, which then ends: pages and queries of Prefect bear so many


@flow(name="render", description="An engine: keeps a model loaded and renders shards until no work is left.")
def render(model: str | None = None, linger: float | None = None, partition: str | None = None) -> State[Any]:
    """Load the model, lease shards, render them; leave after `linger` seconds without work.

    partition: how to divide the model, where a plan says it and not the settings.
    """
    given = {"model": model, "linger": linger}
    settings = load_settings(**{name: value for name, value in given.items() if value is not None})
    setup_tracing("rushes-engine")
    metrics = setup_metrics("rushes-engine")
    run_logger, page = get_run_logger(), PrefectPage()
    try:
        done = run_engine(
            settings,
            planned=partition,
            flow_run_id=str(this_run.id),
            runner=TaskRuns(),
            say=run_logger.info,
            replaced=partial(ended_in_prefect, str(this_run.id)),
            held=page.suspended,
        )
    finally:
        flush()
        metrics.shutdown()
    if page.suspended():
        said = "paused for as long as you like; Resume starts the engine again, and until then none takes its place"
        page.settle(Suspended(message=f"{done.clips} clips in {done.shards} shards; {said}"))
        page.leave()
    return Completed(message=f"{done.clips} clips in {done.shards} shards; busy {done.busy:.0f} of {done.alive:.0f} s")


def ended_in_prefect(flow_run_id: str) -> bool:
    """True when Prefect calls this engine's run ended; False where it cannot be asked."""
    dead: list[str] = []
    best_effort(lambda: dead.extend(dead_owners([flow_run_id])))
    return bool(dead)


def as_task(shard: Shard) -> int:
    """Runs a shard as a Prefect task, named so that a person understands it."""
    first, lease = shard.clips[0].settings, shard.lease
    shape = f"{first.width}x{first.height}x{first.frames}"
    clips = f"{len(shard.clips)} clip{'s' if len(shard.clips) > 1 else ''}"
    name = f"shard {lease.shard_id}: {clips} {shape} of {lease.request_id}"

    # A closure, since Prefect would walk through whatever a task is given.
    @task(name="shard", task_run_name=name, cache_policy=NO_CACHE, persist_result=False)
    def work() -> int:
        return shard.run()

    return work()


@dataclass(slots=True)
class TaskRuns:
    """Shards as task runs: no more of them than a flow run's page, Prefect's event queue and its database bear.

    Over all engines about one begins a second, since an engine begins one in as many seconds as engines live; a shard
    that it claims sooner is rendered all the same, and seen in the ledger alone. After `most` of them it should leave.
    """

    most: int = TASK_RUNS
    show: Callable[[Shard], int] = as_task
    made: int = 0
    not_before: float = 0.0

    @property
    def used_up(self) -> bool:
        return self.made >= self.most

    def __call__(self, shard: Shard) -> int:
        if time.monotonic() < self.not_before:
            return shard.run()
        self.not_before = time.monotonic() + shard.worker.engines_alive()
        self.made += 1
        return self.show(shard)
