"""An engine's life: load the model, register, claim shard after shard, leave when nothing is left."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from sqlalchemy.orm import Session, sessionmaker

from db import models
from db.claim import LeasedClip
from db.engines import close_engine, engine_heartbeat, engine_ready, register_engine
from db.fence import Lease
from flows.clients.ledger import Ledger
from flows.clients.ledger import ledger as ledger_of
from flows.clients.ownership import check_owner
from flows.clients.retry import never, with_retry
from flows.library.models import card_of, partition_for, resolve
from flows.render.devices import TooFewDevices, hold_devices, known_gpus, visible_gpus
from flows.render.renderer import Renderer
from flows.render.shard import Shard
from flows.render.worker import Worker, code_version, log, machine, owner_name
from flows.settings import AUTO, Settings
from infra.logs import print_record
from infra.tracing import continued
from model.config import Partition
from model.engine.engine import Engine
from model.loading.card import ModelCard

IDLE = 1.0  # seconds between two looks for work
DEVICES_WAIT = 120.0  # seconds for GPUs to become free, after which the engine leaves
SAME_AGAIN = 60.0  # seconds without such a look for an engine that gave way and then got the same shard
IDLE_MOST = 30.0  # seconds that a transaction of an engine may do nothing
LEAVING = 30.0  # seconds that an engine on its way out waits for the ledger: maintenance closes it as well


@dataclass(slots=True)
class EngineTotals:
    """The work of an engine over its life."""

    clips: int = 0
    shards: int = 0
    busy: float = 0.0  # seconds with a shard in hand
    alive: float = 0.0  # seconds


class ShardRunner(Protocol):
    """Runs an engine's shards, and shows them to those who watch."""

    made: int  # shards that were shown

    @property
    def used_up(self) -> bool:
        """No more of them can be shown: the engine should leave, and another take its place."""
        ...

    def __call__(self, shard: Shard) -> int:
        """Runs the shard until the ranks are free; the number of clips that were finished by then."""
        ...


def run_engine(
    settings: Settings,
    *,
    planned: str | None = None,
    flow_run_id: str | None = None,
    runner: ShardRunner | None = None,
    say: Callable[[str], None] = log.info,
    build: Callable[[Settings, ModelCard, Partition, tuple[int, ...] | None], Renderer] | None = None,
    replaced: Callable[[], bool] = never,
    held: Callable[[], bool] = never,
) -> EngineTotals:
    """Renders until there is no work for `settings.linger` seconds, or `runner` is used up. Ends its ranks in any case.

    planned: the partition for which a plan wants it, in place of the settings'. runner: None: shards are run and shown
    to nobody. build: makes the renderer, by default `engine_of`. replaced: asked when a lease was lost, whether
    this engine counts as ended elsewhere, so that another takes its place: then it leaves. held: asked between two
    shards whether its run is paused: then it leaves as well.
    """
    owner, totals, born = owner_name(flow_run_id), EngineTotals(), time.monotonic()
    digest = with_retry(lambda: card_of(settings, settings.model)).digest
    # An engine that stalls in the middle of a transaction must not lock others out for longer than its lease.
    idle = min(IDLE_MOST, settings.lease_seconds)
    with ledger_of(settings, application="rushes-engine", idle=idle, keep_plans=True) as ledgers:
        # To fetch weights may take an hour, and whom the ledger does not hear of within minutes counts as dead.
        register(ledgers, settings, digest, planned or "", owner, flow_run_id)

        def begin() -> None:
            store = settings.open_store()
            with_retry(lambda: check_owner(ledgers, store))
            card = with_retry(lambda: resolve(settings, settings.model))
            partition = Partition.parse(planned) if planned else partition_for(settings, card)
            partition.check_heads(card.heads)
            with devices_of(settings, partition) as gpus:
                Ledger(ledgers).write(partial(register_model, card=card))
                register(ledgers, settings, card.digest, str(partition), owner, flow_run_id)
                renderer = (build or engine_of)(settings, card, partition, gpus)
                by_hand = flow_run_id is None
                worker = Worker(settings, ledgers, store, renderer, card, partition, owner, say, by_hand)
                try:
                    with continued(None, "engine.start", **_of_engine(owner, card, partition)):
                        renderer.start()
                    Ledger(ledgers).write(lambda session: engine_ready(session, owner))
                    say(f"engine {owner}: {card.name} on {partition} is ready after {time.monotonic() - born:.1f} s")
                    render_shards(worker, totals, runner, replaced, held)
                finally:
                    renderer.close()

        error: str | None = None
        try:
            with Heartbeat(ledgers, owner):
                begin()
        except Exception as problem:  # what a signal raises is none: told to stop, it leaves in order
            error = str(problem) or type(problem).__name__
            raise
        finally:
            useless = error is not None and not totals.clips
            Ledger(ledgers).within(LEAVING).write(lambda session: close_engine(session, owner, error, useless=useless))
    totals.alive = time.monotonic() - born
    return totals


def _of_engine(owner: str, card: ModelCard, partition: Partition) -> dict[str, str]:
    """Attributes of a span about an engine."""
    return {"rushes.engine": owner, "gen_ai.request.model": card.name, "rushes.partition": str(partition)}


def render_shards(
    worker: Worker,
    totals: EngineTotals,
    runner: ShardRunner | None,
    replaced: Callable[[], bool] = never,
    held: Callable[[], bool] = never,
) -> None:
    """Claims and renders shard after shard, until there is no work for `linger` seconds, `runner` is used up or it is
    `held`.

    A shard is claimed as soon as the ranks are free, and not before: while they are at it, the last clips of the one
    before are encoded, stored and recorded. It also ends when it has lost a lease and is `replaced`: what it would
    claim then it might lose as well, try after try. When it is told to stop, all that it holds goes back.
    """
    publishing: list[Shard] = []  # whose last clips may still be published: one, and for a moment two
    try:
        idle_since = time.monotonic()
        while (why := _why_it_leaves(worker, runner, held, idle_since)) is None:
            claimed, began = worker.claim(), time.monotonic()
            if claimed is not None:
                before = publishing[:]
                publishing.append(_run(worker, totals, runner, claimed))
            elif publishing:
                before = [each for each in publishing if each.published(IDLE)]
                if not before:
                    continue  # there may be work by now
            elif worker.in_the_way():
                why = "makes room for engines of other partitions"
                break
            else:
                time.sleep(IDLE)
                continue
            for each in before:
                totals.clips += each.finish()
                publishing.remove(each)
            idle_since = time.monotonic()
            totals.busy += idle_since - began
            if any(each.lost is not None for each in (*before, *publishing)) and replaced():
                why = "its run has ended, as Prefect says, and its lease is lost: it leaves"
                break
        worker.say(f"engine {worker.owner}: {why}")
        for each in publishing[:]:
            totals.clips += each.finish()
            publishing.remove(each)
    except BaseException:
        for each in publishing:
            each.hurry()
            totals.clips += each.finished - each.told
        raise


def _why_it_leaves(
    worker: Worker, runner: ShardRunner | None, held: Callable[[], bool], idle_since: float
) -> str | None:
    """Why an engine that has nothing at the ranks claims no more; None where it should look for work."""
    if time.monotonic() - idle_since >= worker.settings.linger:
        return f"no work for {worker.settings.linger:.0f} s"
    if runner is not None and runner.used_up:
        return f"has shown {runner.made} shards; another one takes its place"
    if held():
        return "its run is paused, and it claims nothing until that is resumed"
    return None


def _run(
    worker: Worker, totals: EngineTotals, runner: ShardRunner | None, claimed: tuple[Lease, Sequence[LeasedClip]]
) -> Shard:
    """Runs a claimed shard until the ranks are free. If that is interrupted, others may have it at once."""
    if claimed[0].shard_id == worker.gave_way:  # what waits is not for this engine, or not yet
        worker.looks_from = time.monotonic() + SAME_AGAIN
    worker.gave_way = None
    shard = Shard(worker, *claimed)
    try:
        totals.clips += runner(shard) if runner else shard.run()
    except BaseException:
        totals.clips += shard.finished
        shard.give_back()
        raise
    totals.shards += 1
    return shard


def engine_of(settings: Settings, card: ModelCard, partition: Partition, gpus: tuple[int, ...] | None = None) -> Engine:
    """An engine as the settings want it, not started. `gpus`: the numbers of those that its ranks may use."""
    return Engine(
        card.path,
        partition,
        device=settings.device,
        threads_per_rank=settings.threads,
        micro_batch=settings.micro_batch,
        start_timeout=settings.start_timeout,
        compile=settings.compile,
        cache=settings.compiled,
        gpus=gpus,
        log=rank_said if settings.log == "json" else None,
    )


def rank_said(rank: int, line: str) -> None:
    """Passes on what a rank wrote, as a record."""
    print_record(line, "rushes.rank", rank=rank)


def devices_of(settings: Settings, partition: Partition) -> AbstractContextManager[tuple[int, ...] | None]:
    """The GPUs of an engine, which several may share: held until it ends. None on a CPU, unless a plan divides it.

    Raises NoDevices, and TooFewDevices.
    """
    if settings.device == "cpu" and settings.partition != AUTO:
        return nullcontext()
    names = visible_gpus() if settings.device == "cuda" else []
    total = known_gpus(settings) or partition.world  # where nothing is known, torch will say
    if partition.world > total:
        raise TooFewDevices(
            f"partition {partition} needs {partition.world} GPUs, and this host's engines have {total}: set "
            f"RUSHES_PARTITION to one of at most {total} ranks, such as tp={total}, or show them more GPUs "
            "(RUSHES_GPUS, CUDA_VISIBLE_DEVICES)"
        )
    return hold_devices(settings.home, total, partition.world, DEVICES_WAIT, names or None)


def register(
    ledgers: sessionmaker[Session],
    settings: Settings,
    digest: str,
    partition: str,
    owner: str,
    flow_run_id: str | None,
) -> None:
    """Tells the ledger of this engine, again where it knows it. `partition`: "" while it is not known yet."""
    Ledger(ledgers).write(
        lambda session: register_engine(
            session,
            owner,
            host=socket.gethostname(),
            pid=os.getpid(),
            device=machine(settings),
            partition=partition,
            model_digest=digest,
            code_version=code_version(),
            flow_run_id=flow_run_id,
        ),
    )


def register_model(session: Session, card: ModelCard) -> None:
    models.register_model(session, card.digest, card.name, str(card.path), card.to_json())


class Heartbeat:
    """Tells the ledger every few seconds that this engine lives, also while the main thread is busy."""

    def __init__(self, ledgers: sessionmaker[Session], owner: str, every: float = 5.0) -> None:
        self.ledgers, self.owner, self.every = ledgers, owner, every
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.beat, name="heartbeat", daemon=True)

    def beat(self) -> None:
        while not self.stopped.wait(self.every):
            try:
                with self.ledgers.begin() as session:
                    engine_heartbeat(session, self.owner)
            except Exception:  # the database may be away for a moment; the lease's own renewal decides what that means
                log.warning("heartbeat of %s failed", self.owner, exc_info=True)

    def __enter__(self) -> Heartbeat:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join(timeout=10)
