"""Puts right what crashes leave behind: runs every few minutes, does nothing when there is nothing to do.

Every step is safe to repeat and to run beside living engines, since each asks the ledger, and the ledger's own time.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, cast
from uuid import UUID

import psutil
from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterIdempotencyKey,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.deployments import run_deployment
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed, Crashed
from prefect.types import DateTime
from sqlalchemy.orm import Session, sessionmaker

from db import watching
from db.artifacts import known_keys
from db.audit import checkpoints
from db.engines import ALIVE, EngineRow, close_engine, silent_engines
from db.leases import expire_leases, expire_owner
from db.requests import cancel_request
from flows.clients.ledger import ledger as ledger_of
from flows.render import pool
from flows.settings import load_settings
from infra.store.contract import Store
from infra.tracing import flush, setup_tracing

ORPHAN_AGE = timedelta(days=1)  # a blob without a row may belong to a clip that is being recorded right now
CHECKPOINT_AGE = timedelta(hours=1)  # the same of unfinished clips, which are many and of no use to anybody else
CRASHED_AGE = timedelta(days=1)  # of runs that crashed before the ledger knew of their request: theirs is not forgotten
TRIES = 3  # of such a request, by one run after the other
GENERATE = "generate/default"
TAKEN_UP = "taken-up-"  # begins the idempotency key of a run that goes on in place of another
UNDER_WAY = (StateType.PENDING, StateType.CANCELLING)
HEARTBEATS = "Runs without a heartbeat have crashed"
SILENCE = timedelta(seconds=90)
# A run in one of these states is over or was never started: silence then means nothing.
ENDINGS = (
    "Completed",
    "CompletedWithGaps",
    "Failed",
    "BadInput",
    "RewriterFailed",
    "QuotaExceeded",
    "Crashed",
    "Cancelled",
    "Cancelling",
    "Paused",
    "Suspended",
)


@dataclass(slots=True)
class Tidied:
    """What one round put right."""

    leases: int = 0  # expired, given back to the queue
    engines: int = 0  # rows closed whose process is gone
    runs: int = 0  # which Prefect took for under way, ended
    requests: int = 0  # whose run had ended without them: cancelled, or taken up again
    objects: int = 0  # orphans deleted
    bytes: int = 0

    def __str__(self) -> str:
        return (
            f"{self.leases} leases expired, {self.engines} engines closed, {self.runs} runs ended that had died, "
            f"{self.requests} requests taken up, "
            f"{self.objects} orphan objects deleted ({self.bytes:,} bytes)"
        )


@flow(name="tidy", description="Expired leases, silent engines, forsaken requests, orphan objects.")
def tidy() -> State[Any]:
    """Puts right what crashes left behind."""
    settings = load_settings()
    setup_tracing("rushes-tidy")
    log = get_run_logger()
    try:
        with ledger_of(settings) as ledgers, get_client(sync_client=True) as client:
            watch_heartbeats(client)
            done = Tidied()
            with ledgers.begin() as session:
                for owner in pool.dead_owners(watching.lease_owners(session)):
                    done.leases += expire_owner(session, owner)
                done.leases += expire_leases(session)
            done.engines = close_silent_engines(client, ledgers)
            done.runs = end_stuck_runs(client)
            done.requests = take_up_forsaken(client, ledgers) + take_up_unknown(client, ledgers)
            store = settings.open_store()
            done.objects, done.bytes = sweep_orphans(ledgers, store)
            store.sweep_unfinished(ORPHAN_AGE.total_seconds())
    finally:
        flush()
    log.info("%s", done)
    if any((done.leases, done.engines, done.runs, done.requests, done.objects)):
        create_markdown_artifact(f"{done}", key="tidy")
    return Completed(message=str(done))


def watch_heartbeats(client: SyncPrefectClient) -> None:
    """Creates the automation that marks a run as crashed when its host is gone; Prefect has no such rule of its own."""
    if not client.read_automations_by_name(HEARTBEATS):
        client.create_automation(heartbeat_automation())


def heartbeat_automation() -> AutomationCore:
    """After a heartbeat, 90 seconds without another one or an ending mean that the run has crashed."""
    return AutomationCore(
        name=HEARTBEATS,
        description="Flow runs send a heartbeat every 30 seconds; one that falls silent lost its host.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{name}" for name in ENDINGS)},
            match={"prefect.resource.id": ["prefect.flow-run.*"]},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=SILENCE,
        ),
        actions=[
            ChangeFlowRunState(
                name=None,
                state=StateType.CRASHED,
                message="No heartbeat for 90 seconds: its host is gone.",
                force=False,
            )
        ],
    )


def close_silent_engines(client: SyncPrefectClient, ledgers: sessionmaker[Session]) -> int:
    """Closes the rows of engines that have not been heard of, and their runs if Prefect still calls them running."""
    with ledgers.begin() as session:
        silent = silent_engines(session, ALIVE * 4)
        for engine in silent:
            close_engine(session, engine.id)
            expire_owner(session, engine.id)
    for engine in silent:
        if engine.flow_run_id is None:
            continue
        end_hung(engine)
        try:
            run = client.read_flow_run(UUID(engine.flow_run_id))
        except ObjectNotFound:
            continue
        if run.state_type is StateType.RUNNING:
            state = Crashed(
                message=f"The ledger has not heard of engine {engine.id} since {engine.heartbeat_at:%H:%M:%S}."
            )
            client.set_flow_run_state(run.id, state, force=True)
    return len(silent)


def end_hung(engine: EngineRow) -> None:
    """A process that hangs keeps its memory and GPUs: on this host it is ended, and its ranks follow it."""
    if engine.host != socket.gethostname():
        return
    with suppress(psutil.Error):
        process = psutil.Process(engine.pid)
        if process.environ().get("PREFECT__FLOW_RUN_ID") == engine.flow_run_id:  # else the number is another's now
            process.kill()


def take_up_forsaken(client: SyncPrefectClient, ledgers: sessionmaker[Session]) -> int:
    """Open requests whose run has ended: cancelled ones are cancelled, the others get a new run with the same input."""
    with ledgers() as session:
        open_requests = watching.open_requests(session)
    taken = 0
    for request in open_requests:
        if request.flow_run_id is None:
            continue
        try:
            run = client.read_flow_run(UUID(request.flow_run_id))
        except ObjectNotFound:
            continue
        if run.state is None or not run.state.is_final():
            continue
        if run.state.is_cancelled():
            with ledgers.begin() as session:
                cancel_request(session, request.id)
        else:
            take_up(run)
        taken += 1
    return taken


def end_stuck_runs(client: SyncPrefectClient) -> int:
    """Ends runs that died with the worker that had taken them, before they could say so."""
    under_way = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(UNDER_WAY))))
    ended = 0
    for run in client.read_flow_runs(flow_run_filter=under_way, limit=200):
        if (state := pool.stuck(run)) is not None:
            client.set_flow_run_state(run.id, state, force=True)
            ended += 1
    return ended


def take_up_unknown(client: SyncPrefectClient, ledgers: sessionmaker[Session]) -> int:
    """Requests whose run crashed before the ledger knew of them get a new one, a few times at most."""
    only = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CRASHED])),
        expected_start_time=FlowRunFilterExpectedStartTime(after_=cast(DateTime, datetime.now(UTC) - CRASHED_AGE)),
    )
    crashed = pool.runs_of(client, GENERATE, only)
    with ledgers() as session:
        known = watching.watched_by(session, [str(run.id) for run in crashed])
    taken_up = _taken_up(client, crashed)
    taken = 0
    for run in crashed:
        if str(run.id) in known or f"{TAKEN_UP}{run.id}" in taken_up:
            continue
        before, tries = _before(client, run), 1
        while before is not None and tries < TRIES:
            before, tries = _before(client, before), tries + 1
        if tries < TRIES:
            take_up(run)
            taken += 1
    return taken


def _taken_up(client: SyncPrefectClient, runs: list[FlowRun]) -> set[str | None]:
    """The idempotency keys of the runs that took up what these had left."""
    keys = FlowRunFilterIdempotencyKey(any_=[f"{TAKEN_UP}{run.id}" for run in runs])
    found = client.read_flow_runs(flow_run_filter=FlowRunFilter(idempotency_key=keys), limit=200)
    return {run.idempotency_key for run in found}


def _before(client: SyncPrefectClient, run: FlowRun) -> FlowRun | None:
    """The run that had left what this one took up."""
    key = run.idempotency_key or ""
    if not key.startswith(TAKEN_UP):
        return None
    with suppress(ObjectNotFound):
        return client.read_flow_run(UUID(key.removeprefix(TAKEN_UP)))
    return None


def take_up(run: FlowRun) -> None:
    """Starts a run with the same input, once whoever asks. One that ended before the ledger knew of it has a next."""
    while run.state is not None and run.state.is_final():
        run = cast(
            FlowRun,
            run_deployment(
                GENERATE,
                parameters=run.parameters,
                timeout=0,
                as_subflow=False,
                flow_run_name=run.name,
                idempotency_key=f"{TAKEN_UP}{run.id}",
            ),
        )


def sweep_orphans(ledgers: sessionmaker[Session], store: Store) -> tuple[int, int]:
    """Deletes old objects that no row knows; (objects, bytes). A killed engine leaves such a blob, or a checkpoint."""
    objects = size = 0
    for prefix, names, age in (
        ("blobs/", known_keys, ORPHAN_AGE),
        ("checkpoints/", checkpoints, CHECKPOINT_AGE),
    ):
        before = datetime.now(UTC) - age
        old = (listed for listed in store.list(prefix) if listed.modified < before)
        while batch := list(islice(old, 1000)):
            with ledgers() as session:
                known = names(session, [listed.key for listed in batch])
            for listed in batch:
                if listed.key not in known and store.delete_stale(listed.key, before):
                    objects, size = objects + 1, size + listed.bytes
    return objects, size
