"""How many engines run, and starting more: the one place that asks Prefect about engine runs.

An engine is a flow run of `render/engine`. Its owner name in the ledger ends in its flow run's id, so that a lease can
be given back as soon as Prefect knows that its engine has ended, instead of when it runs out.
"""

from __future__ import annotations

import logging
import socket
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import cast

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName, FlowFilter, FlowFilterName
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from sqlalchemy.orm import Session, sessionmaker

from db import ledger, watching
from flows import plan
from flows.settings import Settings

DEPLOYMENT = "render/engine"
ACTIVE = (StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING)
SILENT = 45.0  # seconds without a heartbeat in the ledger after which a running engine counts as gone
STARTING = 120.0  # seconds that an engine may take to load before its first heartbeat

log = logging.getLogger(__name__)


def owner_name(flow_run_id: str | None) -> str:
    """The name under which an engine leases shards: host, and its flow run or a random id."""
    return f"{socket.gethostname()}/{flow_run_id or uuid.uuid4()}"


def run_of(owner: str) -> uuid.UUID | None:
    """The flow run in an owner's name."""
    try:
        return uuid.UUID(owner.rpartition("/")[2])
    except ValueError:
        return None


def dead_owners(owners: Iterable[str]) -> list[str]:
    """Those of `owners` whose flow run has ended: they will never write again."""
    dead: list[str] = []
    with get_client(sync_client=True) as client:
        for owner in owners:
            run = run_of(owner)
            if run is None:
                continue
            try:
                state = client.read_flow_run(run).state
            except ObjectNotFound:
                continue  # an engine that was started without Prefect
            if state is not None and state.is_final():
                dead.append(owner)
    return dead


def ensure(
    settings: Settings, ledgers: sessionmaker[Session], request_id: str, *, model: str, model_digest: str
) -> int:
    """Starts as many engines of `model` as the work wants and the pool allows; returns how many it started.

    Several requests may call this at the same moment: each new run's idempotency key follows from the newest run there
    is, so that they create the same runs, not twice as many.
    """
    with ledgers() as session:
        work = ledger.progress(session, request_id)
        shards = watching.open_shards(session, request_id)
        living = ledger.live_engines(session, SILENT, model_digest=model_digest)
    alive = {engine.flow_run_id for engine in living}
    free = sum(engine.flow_run_id is None for engine in living)  # started by hand, outside Prefect
    each = work.mean_seconds or plan.CostModel().per_clip
    wanted = plan.engines_wanted(work.waiting * each, shards, settings.engines)
    with get_client(sync_client=True) as client:
        runs = engine_runs(client)
    ours = [run for run in runs if (run.parameters.get("model") or settings.model) == model]
    active = [run for run in ours if run.state_type in ACTIVE and not gone(run, alive)]
    missing = wanted - len(active) - free
    newest = str(runs[0].id) if runs else "none"
    for k in range(missing):
        run = cast(
            FlowRun,
            run_deployment(
                DEPLOYMENT,
                parameters={"model": model},
                timeout=0,
                as_subflow=False,
                flow_run_name=f"engine {Path(model).name} {settings.partition}",
                idempotency_key=f"engine-{model_digest[:12]}-{k}-after-{newest}",
            ),
        )
        log.info("started engine run %s", run.id)
    return max(0, missing)


def gone(run: FlowRun, alive: set[str | None]) -> bool:
    """True of a run that Prefect calls running while the ledger has not heard of it for long."""
    if run.state_type is not StateType.RUNNING or str(run.id) in alive:
        return False
    return run.total_run_time.total_seconds() > STARTING or run.estimated_run_time.total_seconds() > STARTING


def engine_runs(client: SyncPrefectClient, limit: int = 200) -> list[FlowRun]:
    """Flow runs of the engine's deployment, newest first."""
    flow_name, _, deployment = DEPLOYMENT.partition("/")
    return client.read_flow_runs(
        flow_filter=FlowFilter(name=FlowFilterName(any_=[flow_name])),
        deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=[deployment])),
        sort=FlowRunSort.EXPECTED_START_TIME_DESC,
        limit=limit,
    )
