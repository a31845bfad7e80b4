"""Maintenance: rescues the work of what has crashed and prunes the store, every few minutes.

Every step is safe to repeat and to run beside living engines, since each asks the ledger, and the ledger's own time.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
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
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.deployments import run_deployment
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed, Crashed, Failed, Running, Suspended
from prefect.types import DateTime
from sqlalchemy.orm import Session, sessionmaker

from db import watching
from db.engines import ALIVE, QUIET, EngineRow, close_engine, silent_engines
from db.leases import expire_leases, expire_owner
from db.requests import SIGN, cancel_request, count_try, hand_over, is_watched, pause_request
from flows.clients.ledger import ledger as ledger_of
from flows.clients.ownership import ForeignStore, check_owner
from flows.clients.prefect import PrefectRefused, PrefectUnavailable
from flows.operate.audit import ORPHAN_AGE, REFERENCES
from flows.operate.forms import refresh_forms
from flows.render import pool
from flows.settings import load_settings
from infra.stack.deploy import read_deployments
from infra.stack.home import DEPLOYMENTS
from infra.stack.prefect import BEAT_SECONDS
from infra.store.contract import Store
from infra.tracing import flush, setup_tracing

CRASHED_AGE = timedelta(days=1)  # of runs that crashed before the ledger knew of their request: theirs is not forgotten
MAX_TRIES = 5  # runs of a recorded request, one after the other, under which no clip came to an end
MAX_RUNS = 3  # of such a request, one after the other
GENERATE = "generate/default"
RESTART_OF = "restart-of-"  # begins the idempotency key of a run that goes on in place of another
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
    "ForeignStore",
    "Crashed",
    "Cancelled",
    "Cancelling",
    "Paused",
    "Suspended",
)


@dataclass(slots=True)
class MaintenanceReport:
    """Counts of one round's repairs."""

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


@flow(name="maintenance", description="Expired leases, silent engines, abandoned requests, orphan objects.")
def maintenance() -> State[Any]:
    """Repair the state that crashes leave behind."""
    settings = load_settings()
    setup_tracing("rushes-maintenance")
    log = get_run_logger()
    report = MaintenanceReport()
    try:
        with ledger_of(settings) as ledgers, get_client(sync_client=True) as client:
            rescue(client, ledgers, report)
            prune(ledgers, settings.open_store(), report)
        with suppress(PrefectUnavailable, PrefectRefused):  # the next round will do
            refresh_forms(settings)
    except ForeignStore as error:
        log.error("%s", error)
        return Failed(message=f"{report}; nothing was swept: {error}")
    finally:
        flush()
    log.info("%s", report)
    if any((report.leases, report.engines, report.runs, report.requests, report.objects)):
        create_markdown_artifact(f"{report}", key="maintenance")
    return Completed(message=str(report))


def rescue(client: SyncPrefectClient, ledgers: sessionmaker[Session], report: MaintenanceReport) -> None:
    """Return the work of dead engines, workers and flow runs to the queue, and restart requests without a run."""
    ensure_heartbeat_automation(client)
    with ledgers.begin() as session:
        for owner in pool.dead_owners(watching.lease_owners(session)):
            report.leases += expire_owner(session, owner)
        report.leases += expire_leases(session)
    report.engines = close_silent_engines(client, ledgers)
    report.runs = end_stuck_runs(client)
    report.requests = restart_abandoned_requests(client, ledgers) + restart_unrecorded_requests(client, ledgers)


def prune(ledgers: sessionmaker[Session], store: Store, report: MaintenanceReport) -> None:
    """Delete from the store what nothing refers to any more, and uploads that were never finished.

    Raises ForeignStore, and deletes nothing, where the store is another ledger's.
    """
    check_owner(ledgers, store)
    report.objects, report.bytes = sweep_orphans(ledgers, store)
    store.sweep_unfinished(ORPHAN_AGE["blobs/"].total_seconds())


def ensure_heartbeat_automation(client: SyncPrefectClient) -> None:
    """Create the automation that marks a run as crashed when its host is gone; Prefect has no such rule itself.

    One that matches other runs than those of our deployments, which a server may share with other teams, is changed.
    """
    wanted = heartbeat_automation(our_deployments(client))
    there = client.read_automations_by_name(HEARTBEATS)
    if not there:
        client.create_automation(wanted)
    for automation in there:
        if _watches(automation) != _watches(wanted):
            client.update_automation(automation.id, wanted.model_copy(update={"enabled": automation.enabled}))


def our_deployments(client: SyncPrefectClient) -> list[UUID]:
    """The ids that the server gave to the deployments of prefect.yaml."""
    found: list[UUID] = []
    for deployment in read_deployments(DEPLOYMENTS):
        with suppress(ObjectNotFound):
            found.append(client.read_deployment_by_name(deployment.full_name).id)
    return found


def heartbeat_automation(deployments: Sequence[UUID]) -> AutomationCore:
    """An automation: 90 seconds after a heartbeat without another one or an ending, a run of these has crashed."""
    return AutomationCore(
        name=HEARTBEATS,
        description=f"Flow runs of Rushes beat every {BEAT_SECONDS} seconds; one that falls silent lost its host.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{name}" for name in ENDINGS)},
            match={"prefect.resource.id": ["prefect.flow-run.*"]},
            match_related={"prefect.resource.id": sorted(f"prefect.deployment.{each}" for each in deployments)},
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


def _watches(automation: AutomationCore) -> dict[str, Any]:
    """The runs and the silence that its trigger waits for, in a form in which two can be compared."""
    return automation.trigger.model_dump(mode="json", include={"match_related", "within"})


def close_silent_engines(client: SyncPrefectClient, ledgers: sessionmaker[Session]) -> int:
    """Close the rows of silent engines, and their runs if Prefect still calls them running."""
    with ledgers.begin() as session:
        silent = silent_engines(session, ALIVE * 4)
        for engine in silent:
            close_engine(session, engine.id, f"it gave no sign of life since {engine.heartbeat_at:%H:%M:%S}")
            expire_owner(session, engine.id)
    for engine in silent:
        if engine.flow_run_id is None:
            continue
        kill_if_hung(engine)
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


def kill_if_hung(engine: EngineRow) -> None:
    """Kill an engine's process if it hangs on this host: it keeps its memory and GPUs. Its ranks follow it."""
    if engine.host != socket.gethostname():
        return
    with suppress(psutil.Error):
        process = psutil.Process(engine.pid)
        if process.environ().get("PREFECT__FLOW_RUN_ID") == engine.flow_run_id:  # else the number is another's now
            process.kill()


def restart_abandoned_requests(client: SyncPrefectClient, ledgers: sessionmaker[Session]) -> int:
    """Give open requests whose run has ended a new run with the same input; cancel those whose run was cancelled.

    A run has ended that Prefect calls so and that is silent in the ledger: of others it waits for QUIET seconds to see
    which it is. Returns how many requests.
    """
    done, until = 0, time.monotonic() + QUIET + SIGN
    with ledgers() as session:
        left = watching.open_requests(session)
    while left:
        last, unclear = time.monotonic() >= until, list[watching.OpenRequest]()
        for request in left:
            outcome = rescue_request(client, ledgers, request, last=last)
            done += outcome is True
            unclear += [request] * (outcome is None)
        if left := unclear:
            time.sleep(1.0)
    return done


def rescue_request(
    client: SyncPrefectClient, ledgers: sessionmaker[Session], request: watching.OpenRequest, *, last: bool
) -> bool | None:
    """Rescue one open request. True when it was, False when its run lives, None when that is not known yet.

    One that is paused waits for a person. last: it is to be decided now.
    """
    if request.flow_run_id is None:
        return False
    try:
        run = client.read_flow_run(UUID(request.flow_run_id))
    except ObjectNotFound:
        return False
    if run.state is not None and run.state.is_cancelled():
        with ledgers.begin() as session:
            cancel_request(session, request.id)
        return True
    if request.paused:
        return hold(client, request, run)
    if run.state is not None and run.state.is_paused():
        return pause(ledgers, request)
    if run.state is None or not run.state.is_final():
        return False
    with ledgers() as session:
        watched = is_watched(session, request.id, request.flow_run_id)
    if watched and not last:
        return None
    if watched:  # it gave signs of life for longer than one that ended just before could have left one
        if run.state.is_crashed():
            state = Running(message="The ledger hears of this run: it had not crashed.")
            client.set_flow_run_state(run.id, state, force=True)
        return False
    take_up(client, ledgers, request.id, run)
    return True


def hold(client: SyncPrefectClient, request: watching.OpenRequest, run: FlowRun) -> bool:
    """Show the run of a paused request as such, where Prefect says that it crashed or was never resumed in time."""
    if run.state is None or not run.state.is_final():
        return False
    said = f"{request.id} is paused, for as long as you like. Resume goes on, here or by `rushes resume {request.id}`"
    client.set_flow_run_state(run.id, Suspended(message=said), force=True)
    return True


def pause(ledgers: sessionmaker[Session], request: watching.OpenRequest) -> bool:
    """Pause a request whose run was suspended when its process had died: nobody else has heard of it."""
    with ledgers.begin() as session:
        alive = request.flow_run_id is not None and is_watched(session, request.id, request.flow_run_id)
        if not alive:
            pause_request(session, request.id)
    return not alive


def take_up(client: SyncPrefectClient, ledgers: sessionmaker[Session], request_id: str, run: FlowRun) -> None:
    """Give a request another run in place of one that has ended, MAX_TRIES for nothing at most; then cancel it."""
    with ledgers.begin() as session:
        tries = count_try(session, request_id, str(run.id))
        if tries > MAX_TRIES:
            cancel_request(session, request_id)
    if tries > MAX_TRIES:
        said = run.state.message if run.state else None
        reason = f"{request_id} was given up: {tries} runs ended without one finished clip; the last: {said}"
        client.set_flow_run_state(run.id, Failed(message=f"{reason}. `rushes retry {request_id}`"), force=True)
    elif tries:
        again = restart(run, request_id)
        with ledgers.begin() as session:
            hand_over(session, request_id, str(again.id))


def end_stuck_runs(client: SyncPrefectClient) -> int:
    """End runs that died with the worker that had taken them, before they could say so."""
    now, ended = pool.server_now(client), 0
    for run in pool.runs_where(client, pool.in_state(*UNDER_WAY)):
        if (state := pool.stuck(run, now)) is not None:
            client.set_flow_run_state(run.id, state, force=True)
            ended += 1
    return ended


def restart_unrecorded_requests(client: SyncPrefectClient, ledgers: sessionmaker[Session]) -> int:
    """Give requests whose run crashed before the ledger knew of them a new one, MAX_RUNS at most; returns how many."""
    since = cast(DateTime, pool.server_now(client) - CRASHED_AGE)
    only = pool.in_state(StateType.CRASHED)
    only.expected_start_time = FlowRunFilterExpectedStartTime(after_=since)
    crashed = pool.runs_of(client, GENERATE, only)
    with ledgers() as session:
        known = watching.watched_by(session, [str(run.id) for run in crashed])
    already = _restart_keys(client, crashed)
    restarted = 0
    for run in crashed:
        if str(run.id) in known or f"{RESTART_OF}{run.id}" in already:
            continue
        before, runs = _predecessor(client, run), 1
        while before is not None and runs < MAX_RUNS:
            before, runs = _predecessor(client, before), runs + 1
        if runs < MAX_RUNS:
            restart(run)
            restarted += 1
    return restarted


def _restart_keys(client: SyncPrefectClient, runs: list[FlowRun]) -> set[str | None]:
    """Idempotency keys of the runs that were started in place of these."""
    keys = FlowRunFilterIdempotencyKey(any_=[f"{RESTART_OF}{run.id}" for run in runs])
    found = pool.runs_where(client, FlowRunFilter(idempotency_key=keys)) if runs else []
    return {run.idempotency_key for run in found}


def _predecessor(client: SyncPrefectClient, run: FlowRun) -> FlowRun | None:
    """The run in whose place this one was started."""
    key = run.idempotency_key or ""
    if not key.startswith(RESTART_OF):
        return None
    with suppress(ObjectNotFound):
        return client.read_flow_run(UUID(key.removeprefix(RESTART_OF)))
    return None


def restart(run: FlowRun, request_id: str | None = None) -> FlowRun:
    """Start a run with the same input, once for all callers; in place of one that has ended as well, the next.

    request_id: that it goes on with, where the ledger knows it.
    """
    while run.state is not None and run.state.is_final():
        run = cast(
            FlowRun,
            run_deployment(
                GENERATE,
                parameters={"request": {**run.parameters["request"], "resumes": request_id}},
                timeout=0,
                as_subflow=False,
                flow_run_name=run.name,
                idempotency_key=f"{RESTART_OF}{run.id}",
            ),
        )
    return run


def sweep_orphans(ledgers: sessionmaker[Session], store: Store) -> tuple[int, int]:
    """Delete objects of ORPHAN_AGE that no row knows, as a killed engine leaves them. Returns (objects, bytes)."""
    objects = size = 0
    for prefix, names in REFERENCES.items():
        before = datetime.now(UTC) - ORPHAN_AGE[prefix]
        old = (listed for listed in store.list(prefix) if listed.modified < before)
        while batch := list(islice(old, 1000)):
            with ledgers() as session:
                known = names(session, [listed.key for listed in batch])
            for listed in batch:
                if listed.key not in known and store.delete_stale(listed.key, before):
                    objects, size = objects + 1, size + listed.bytes
    return objects, size
