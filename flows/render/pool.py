"""How many engines run, and starting more: the one place that asks Prefect about engine runs.

An engine is a flow run of `render/engine`. Its owner name in the ledger ends in its flow run's id, so that a lease can
be given back when Prefect says that its engine has ended and the ledger hears of it no more, instead of when it runs
out. What Prefect says alone decides nothing: runs that live are called crashed where its server was away, and an engine
that still gives signs of life keeps its leases and its place, until that opinion is withdrawn.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, cast

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Crashed, Running
from sqlalchemy.orm import Session, sessionmaker

from db import watching
from db.engines import (
    ALIVE,
    FORGET,
    QUIET,
    closed_engines,
    live_engines,
    note_failed_start,
    open_engines,
    server_age,
    silent_engines,
)
from db.requests import progress
from flows.clients.prefect import TAKEN, date_of
from flows.library.models import gpus_of
from flows.plan import shards as plan
from flows.settings import AUTO, Settings
from model.config import Partition

DEPLOYMENT = "render/engine"
# One that is paused has left the ledger, and keeps its place: nobody paused it to have another started.
ACTIVE = (StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED)
STARTING = timedelta(minutes=2)  # that an engine may take until the ledger hears of it: before it fetches its weights
NEWEST = 20  # runs among which it looks for those that failed
PAGE = 200  # runs that the server lists at once, at most
LEAVING = 3600.0  # seconds for which an engine that has closed its row may still be at telling Prefect so

log = logging.getLogger(__name__)


def run_of(owner: str) -> uuid.UUID | None:
    """The flow run in an owner's name."""
    try:
        return uuid.UUID(owner.rpartition("/")[2])
    except ValueError:
        return None


def dead_owners(owners: Iterable[str]) -> list[str]:
    """Those of `owners` whose flow run has ended, as Prefect says: the ledger has the last word (`expire_owner`)."""
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


@dataclass(frozen=True, slots=True)
class PrefectPool:
    """The engines that Prefect runs: `flows.generate.watch.EnginePool`."""

    settings: Settings
    ledgers: sessionmaker[Session]

    def ensure(
        self,
        request_id: str,
        *,
        model: str,
        model_digest: str,
        gpus: int | None,
        room: Callable[[str], int | None] = lambda _: None,
    ) -> str | None:
        return ensure(
            self.settings, self.ledgers, request_id, model=model, model_digest=model_digest, gpus=gpus, room=room
        )

    def dead_owners(self, owners: Iterable[str]) -> list[str]:
        return dead_owners(owners)


def ensure(
    settings: Settings,
    ledgers: sessionmaker[Session],
    request_id: str,
    *,
    model: str,
    model_digest: str,
    gpus: int | None = None,
    room: Callable[[str], int | None] = lambda _: None,
) -> str | None:
    """Starts as many engines of `model` as the work wants, the pool allows and `room` leaves after failed starts.

    With partition auto these are engines of the partitions that shards were planned for, those planned first first, on
    at most `gpus` of the GPUs (None: all). Returns the partition whose turn it is where no engine of it is at work or
    could be started, since others have the GPUs; else None.

    Several requests may call this at the same moment: each new run's idempotency key follows from the newest run there
    is, so that they create the same runs, not twice as many.
    """
    with ledgers() as session:
        work = progress(session, request_id)
        shards = watching.open_shards(session, request_id)
        there = open_engines(session)
        silent, quiet = silent_engines(session, ALIVE), silent_engines(session, QUIET)
        beating = {engine.flow_run_id for engine in live_engines(session, QUIET)}
        left = {engine.flow_run_id for engine in closed_engines(session, LEAVING)}
        ledger_up = timedelta(seconds=server_age(session))
    known, gone = {engine.flow_run_id for engine in there}, {engine.flow_run_id for engine in silent}
    with get_client(sync_client=True) as client:
        now = server_now(client)
        newest = runs_of(client, DEPLOYMENT, limit=NEWEST)
        runs = runs_of(client, DEPLOYMENT, in_state(*ACTIVE, StateType.CANCELLING))
        ended: set[uuid.UUID] = set()
        for run in runs:  # nobody else says so where its worker died with it, and it would keep its place in the pool
            if (state := stuck(run, now) or unheard_of(run, now, known | left, gone, ledger_up)) is not None:
                client.set_flow_run_state(run.id, state, force=True)
                ended.add(run.id)
        for run in runs_by_id(client, beating - {str(run.id) for run in runs} - {None}):
            if (state := withdrawn(run, now, beating)) is not None:
                client.set_flow_run_state(run.id, state, force=True)
    ended_badly = [run for run in newest if (run.parameters.get("model") or settings.model) == model]
    with ledgers.begin() as session:
        tell_of_failed(session, ended_badly, now, model_digest)
    active = [run for run in runs if run.state_type in ACTIVE and run.id not in ended]
    active = [run for run in active if run.state_type is StateType.PAUSED or str(run.id) not in left]
    # Started outside Prefect, or called ended by it while they live: these have their GPUs too.
    shown = {str(run.id) for run in active}
    by_hand = [engine for engine in there if engine.flow_run_id is None and engine not in silent]
    by_hand += [engine for engine in there if engine.flow_run_id not in {None, *shown} and engine not in quiet]
    ours_by_hand = [engine for engine in by_hand if engine.model_digest == model_digest]
    ours = [run for run in active if (run.parameters.get("model") or settings.model) == model]
    ready = {str(engine.flow_run_id) for engine in there if engine.ready_at is not None}
    starter = Starter(model, model_digest, str(newest[0].id) if newest else "none", room, ready)
    if settings.most_engines == 0:
        return None
    if settings.partition != AUTO:
        seconds = work.waiting * work.mean_seconds if work.mean_seconds else sum(each.seconds for each in shards)
        wanted = plan.engines_wanted(seconds, sum(each.count for each in shards), settings.engines_each)
        starter.start(wanted - len(ours) - len(ours_by_hand), settings.partition, ours, told=False)
        return None
    _, count = gpus_of(settings)
    used = [run.parameters.get("partition") for run in active] + [engine.partition for engine in by_hand]
    free = min(count, gpus or count) - sum(Partition.parse(each).world if each else count for each in used)
    short: str | None = None
    for turn, each in enumerate(shards):
        if each.partition is None:  # any engine will do
            if not ours and not ours_by_hand and free > 0:
                starter.start(1, AUTO, ours, told=False)
                free = 0
            continue
        world = Partition.parse(each.partition).world
        at_work = [run for run in ours if run.parameters.get("partition") == each.partition]
        there_by_hand = [engine for engine in ours_by_hand if engine.partition == each.partition]
        wanted = plan.engines_wanted(each.seconds, each.count, count // world) - len(at_work) - len(there_by_hand)
        possible = starter.start(max(0, min(wanted, free // world)), each.partition, at_work, told=True)
        free -= possible * world
        if not turn and not at_work and not there_by_hand and not possible:
            short = each.partition
    return short


@dataclass(frozen=True, slots=True)
class Starter:
    """Starts engine runs of one model."""

    model: str
    model_digest: str
    newest: str  # the newest engine run there is
    room: Callable[[str], int | None]  # engines of a partition that may be starting; None: any number
    ready: Set[str]  # the runs of engines that have loaded their model

    def start(self, count: int, partition: str, there: Iterable[FlowRun], *, told: bool) -> int:
        """Starts so many engines beside those `there`, or as many as there is room for, and returns how many.

        `told`: the engine is to use this very partition; else it finds it in its settings.
        """
        if count > 0 and (room := self.room(partition if told else "")) is not None:
            count = min(count, room - sum(str(run.id) not in self.ready for run in there))
        parameters = {"model": self.model} | ({"partition": partition} if told else {})
        own = f"-{partition}" if told else ""
        for k in range(count):
            run = cast(
                FlowRun,
                run_deployment(
                    DEPLOYMENT,
                    parameters=parameters,
                    timeout=0,
                    as_subflow=False,
                    flow_run_name=f"engine {Path(self.model).name} {partition}",
                    idempotency_key=f"engine-{self.model_digest[:12]}{own}-{k}-after-{self.newest}",
                ),
            )
            log.info("started engine run %s", run.id)
        return max(0, count)


def tell_of_failed(session: Session, runs: Iterable[FlowRun], now: datetime, model_digest: str) -> None:
    """Tells the ledger of engines whose run has failed or crashed, of which it may not have heard why, or at all."""
    for run in runs:
        ended = _age(run, now).total_seconds()
        if run.state_type not in (StateType.FAILED, StateType.CRASHED) or ended > FORGET:
            continue
        began = (now - (run.start_time or run.state.timestamp)).total_seconds() if run.state else ended
        note_failed_start(
            session,
            str(run.id),
            (run.state and run.state.message) or "its run ended without a word",
            model_digest=model_digest,
            partition=run.parameters.get("partition") or "",
            host=(run.infrastructure_pid or "").rpartition(":")[0] or "unknown",
            began=max(began, ended),
            ended=ended,
        )


def stuck(run: FlowRun, now: datetime) -> State[Any] | None:
    """The state of a run that a worker took, or was to cancel, and never did: both have died. Else None."""
    if _age(run, now) <= TAKEN:
        return None
    if run.state_type is StateType.PENDING:
        return Crashed(message=f"A worker took it, and it has not begun within {TAKEN.seconds} s: both have died.")
    if run.state_type is StateType.CANCELLING:
        return Cancelled(message=f"It was to be cancelled, and no worker has done so within {TAKEN.seconds} s.")
    return None


def unheard_of(
    run: FlowRun, now: datetime, known: set[str | None], silent: set[str | None], ledger_up: timedelta
) -> State[Any] | None:
    """The state of an engine that Prefect calls running, where the ledger has not heard of it for long. Else None.

    known: flow runs of engines that have a row, whether they live or have left in order. silent: those of engines whose
    signs of life are missing. ledger_up: how long the ledger's server has been there to hear of anybody.
    """
    if run.state_type is not StateType.RUNNING:
        return None
    if str(run.id) in silent or (str(run.id) not in known and min(_age(run, now), ledger_up) > STARTING):
        return Crashed(message="The ledger has not heard of this engine for long.")
    return None


def withdrawn(run: FlowRun, now: datetime, beating: set[str | None]) -> State[Any] | None:
    """The state of an engine that Prefect calls crashed, and that gave a sign of life after that. Else None.

    beating: flow runs of engines of which the ledger heard within QUIET seconds.
    """
    if run.state_type is StateType.CRASHED and str(run.id) in beating and _age(run, now).total_seconds() > QUIET:
        return Running(message="The ledger hears of this engine: it had not crashed.")
    return None


def _age(run: FlowRun, now: datetime) -> timedelta:
    """How long a run has been in its state. now: of the server that has written the state's time."""
    return now - run.state.timestamp if run.state else timedelta()


def server_now(client: SyncPrefectClient) -> datetime:
    """The time on the Prefect server's clock, to the second, with which its times are compared: ours may be another."""
    return date_of(client.hello().headers)


def in_state(*types: StateType) -> FlowRunFilter:
    """A filter: runs in one of these states."""
    return FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(types))))


def runs_of(
    client: SyncPrefectClient, deployment: str, only: FlowRunFilter | None = None, limit: int | None = None
) -> list[FlowRun]:
    """Flow runs of a deployment ("flow/name"), newest first. limit: None: all of them."""
    flow_name, _, name = deployment.partition("/")
    return paged(
        lambda count, offset: client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[flow_name])),
            deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=[name])),
            flow_run_filter=only,
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
            limit=count,
            offset=offset,
        ),
        limit,
    )


def runs_where(client: SyncPrefectClient, only: FlowRunFilter) -> list[FlowRun]:
    """All flow runs for which the filter holds, of whichever deployment, newest first."""
    return paged(
        lambda count, offset: client.read_flow_runs(
            flow_run_filter=only, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=count, offset=offset
        )
    )


def runs_by_id(client: SyncPrefectClient, ids: Iterable[str | None]) -> list[FlowRun]:
    """The flow runs of these ids that the server still has."""
    wanted = [uuid.UUID(each) for each in ids if each is not None]
    return runs_where(client, FlowRunFilter(id=FlowRunFilterId(any_=wanted))) if wanted else []


def paged(ask: Callable[[int, int], list[FlowRun]], limit: int | None = None) -> list[FlowRun]:
    """The runs of a listing, asked for page by page. ask: the runs of a page, by its size and the offset of its first.

    A run that is on two pages, since others came before it meanwhile, is there once.
    """
    found: dict[uuid.UUID, FlowRun] = {}
    offset = 0
    while limit is None or offset < limit:
        count = PAGE if limit is None else min(PAGE, limit - offset)
        page = ask(count, offset)
        found |= {run.id: run for run in page}
        offset += count
        if len(page) < count:
            break
    return list(found.values())
