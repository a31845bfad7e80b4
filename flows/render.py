"""The long-lived engine: load the model once, then lease shard after shard until no work is left for a while.

`render` is the flow behind the deployment `render/engine`; `rushes engine` runs the same loop without Prefect. A shard
is one Prefect task run and never more, and of very short ones only some are shown (TaskRuns): Prefect's records are for
people, the ledger is for counting.

A clip goes: ranks denoise and decode it ▶ MP4 ▶ object store ▶ ledger. The last three happen in a thread of their own
while the ranks are already at the next clip. Bytes first, row second: what the ledger calls done can be downloaded.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import platform
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from itertools import count
from typing import Any, TypeVar

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run as this_run
from prefect.states import Completed
from sqlalchemy.orm import Session, sessionmaker

from db import leases, ledger
from db.audit import checkpoints
from db.leases import Checkpoint, Lease, LeasedClip, LeaseLost, NewArtifact
from db.tables import ClipDirection, ClipMode
from flows.devices import hold_devices
from flows.engines import owner_name
from flows.ledgers import ledger as ledger_of
from flows.models import card_of, gpus_of, partition_for, resolve
from flows.patience import away, if_there, once, patiently, transact
from flows.settings import AUTO, Settings, load_settings
from infra.store import NoSuchKey, Store
from infra.tracing import Event, carrier, continued, current_trace_id, flush, setup_tracing, span_between
from model.conditioning import Frames
from model.config import Partition
from model.encode import encode_mp4, encode_png
from model.engine import ClipSpec, Engine, OutOfMemory, RankDied, RankHung, RenderedClip, RenderFailed, UnfinishedClip
from model.media import BadMedia, read_frames
from model.weights import ModelCard

BEAT = 1.0  # seconds between two renewals of a lease: also how soon a cancelled clip is noticed
LOOK = 2  # beats between two looks whether work of a higher priority waits
SAME_AGAIN = 60.0  # seconds without such a look for an engine that gave way and then got the same shard
IDLE = 1.0  # seconds between two looks for work
DEVICES_WAIT = 120.0  # seconds for GPUs to become free, after which the engine leaves
IDLE_MOST = 30.0  # seconds that a transaction of an engine may do nothing
KEEPING = 8.0  # seconds that an engine that is told to stop has to keep what it is at
ENDING = 3.0  # seconds in which work comes to an end whose ranks are gone
LEAVING = 30.0  # seconds that an engine on its way out waits for the ledger: `tidy` closes it as well
TASK_RUNS = 1000  # of one flow run, which then ends: pages and queries of Prefect bear so many
MAX_RESTARTS = 5  # of the ranks in a row without one finished clip, after which the engine gives up

log = logging.getLogger("rushes.engine")
T = TypeVar("T")


def code_version() -> str:
    """What rendered a clip: package version."""
    return f"rushes {version('rushes')}"


def machine(settings: Settings) -> str:
    """On what it was rendered: all beside recipe and partition that the last bits of a clip depend on."""
    # A sum is added up in another order by several threads, and over a batch of another size.
    several = (
        (settings.threads, "threads a rank", settings.device == "cpu"),
        (settings.micro_batch, "clips at a time", True),
    )
    said = [f"{count} {what}" for count, what, counts in several if counts and count > 1]
    if settings.compile:
        said.append("compiled" if settings.compile is True else f"compiled for {settings.compile}")
    return ", ".join([f"{settings.device} {platform.machine()}", *said])


@flow(name="render", description="An engine: keeps a model loaded and renders shards until no work is left.")
def render(model: str | None = None, linger: float | None = None, partition: str | None = None) -> State[Any]:
    """Load the model, lease shards, render them; leave after `linger` seconds without work.

    partition: how to divide the model, where a plan says it and not the settings.
    """
    given = {"model": model, "linger": linger}
    settings = load_settings(**{name: value for name, value in given.items() if value is not None})
    setup_tracing("rushes-engine")
    run_logger = get_run_logger()
    try:
        done = run_engine(
            settings, planned=partition, flow_run_id=str(this_run.id), work=TaskRuns(), say=run_logger.info
        )
    finally:
        flush()
    return Completed(message=f"{done.clips} clips in {done.shards} shards; busy {done.busy:.0f} of {done.alive:.0f} s")


def as_task(shard: Shard) -> int:
    """Runs a shard as a Prefect task, named so that a person understands it."""
    first, lease = shard.clips[0], shard.lease
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
        self.not_before = time.monotonic() + shard.crew.engines_alive()
        self.made += 1
        return self.show(shard)


@dataclass(slots=True)
class Done:
    """What an engine did in its life."""

    clips: int = 0
    shards: int = 0
    busy: float = 0.0  # seconds with a shard in hand
    alive: float = 0.0


def run_engine(
    settings: Settings,
    *,
    planned: str | None = None,
    flow_run_id: str | None = None,
    work: TaskRuns | None = None,
    say: Callable[[str], None] = log.info,
    build: Callable[[Settings, ModelCard, Partition, tuple[int, ...] | None], Engine] | None = None,
) -> Done:
    """Renders until there is no work for `settings.linger` seconds, or `work` is used up. Ends its ranks in any case.

    planned: the partition for which a plan wants it, in place of the settings'. work: how shards are run; None: as they
    are. build: what makes the engine, by default `engine_of`.
    """
    owner, done, born = owner_name(flow_run_id), Done(), time.monotonic()
    digest = patiently(lambda: card_of(settings, settings.model)).digest
    # An engine that stalls in the middle of a transaction must not lock others out for longer than its lease.
    idle = min(IDLE_MOST, settings.lease_seconds)
    with ledger_of(settings, application="rushes-engine", idle=idle, keep_plans=True) as ledgers:
        # To fetch weights may take an hour, and whom the ledger does not hear of within minutes counts as dead.
        register(ledgers, settings, digest, planned or "", owner, flow_run_id)

        def begin() -> None:
            card = patiently(lambda: resolve(settings, settings.model))
            partition = Partition.parse(planned) if planned else partition_for(settings, card)
            partition.check_heads(card.heads)
            with devices_of(settings, partition) as gpus:
                transact(ledgers, partial(register_model, card=card))
                register(ledgers, settings, card.digest, str(partition), owner, flow_run_id)
                engine = (build or engine_of)(settings, card, partition, gpus)
                by_hand = flow_run_id is None
                crew = Crew(settings, ledgers, settings.open_store(), engine, card, partition, owner, say, by_hand)
                try:
                    engine.start()
                    say(f"engine {owner}: {card.name} on {partition} is ready after {time.monotonic() - born:.1f} s")
                    crew.serve(done, work)
                finally:
                    engine.close()

        try:
            with Heart(ledgers, owner):
                begin()
        finally:
            transact(ledgers, lambda session: ledger.close_engine(session, owner), seconds=LEAVING)
    done.alive = time.monotonic() - born
    return done


def engine_of(settings: Settings, card: ModelCard, partition: Partition, gpus: tuple[int, ...] | None = None) -> Engine:
    """An engine as the settings want it, not started. `gpus`: the numbers of those that its ranks may use."""
    return Engine(
        card.path,
        partition,
        device=settings.device,
        threads_per_rank=settings.threads,
        micro_batch=settings.micro_batch,
        compile=settings.compile,
        cache=settings.compiled,
        gpus=gpus,
    )


def devices_of(settings: Settings, partition: Partition) -> AbstractContextManager[tuple[int, ...] | None]:
    """The GPUs of an engine, where several share the host's: held until it ends. Raises NoDevices."""
    if settings.partition != AUTO:
        return nullcontext()
    return hold_devices(settings.home, gpus_of(settings)[1], partition.world, DEVICES_WAIT)


def register(
    ledgers: sessionmaker[Session],
    settings: Settings,
    digest: str,
    partition: str,
    owner: str,
    flow_run_id: str | None,
) -> None:
    """The ledger knows this engine, again where it did. `partition`: "" while nobody knows."""
    transact(
        ledgers,
        lambda session: ledger.register_engine(
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
    ledger.register_model(session, card.digest, card.name, str(card.path), card.to_json())


class Heart:
    """Tells the ledger every few seconds that this engine lives, whatever the main thread is doing."""

    def __init__(self, ledgers: sessionmaker[Session], owner: str, every: float = 5.0) -> None:
        self.ledgers, self.owner, self.every = ledgers, owner, every
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.beat, name="heart", daemon=True)

    def beat(self) -> None:
        while not self.stopped.wait(self.every):
            try:
                with self.ledgers.begin() as session:
                    ledger.engine_heartbeat(session, self.owner)
            except Exception:  # the database may be away for a moment; the lease's own renewal decides what that means
                log.warning("heartbeat of %s failed", self.owner, exc_info=True)

    def __enter__(self) -> Heart:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join(timeout=10)


@dataclass(slots=True)
class Crew:
    """An engine with all it needs to work on shards."""

    settings: Settings
    ledgers: sessionmaker[Session]
    store: Store
    engine: Engine
    card: ModelCard
    partition: Partition
    owner: str
    say: Callable[[str], None]
    by_hand: bool = True  # nobody would start another in its place
    restarts: int = 0  # in a row without a finished clip
    gave_way: int | None = None  # with which shard, a moment ago
    looks_from: float = 0.0  # the time from which it would give way again
    alive: int = 1  # engines, when it last looked

    def serve(self, done: Done, work: TaskRuns | None) -> None:
        idle_since = time.monotonic()
        while time.monotonic() - idle_since < self.settings.linger:
            if work is not None and work.used_up:
                self.say(f"engine {self.owner}: has shown {work.made} shards; another one takes its place")
                return
            claimed = self.claim()
            if claimed is None and self.in_the_way():
                self.say(f"engine {self.owner}: makes room for engines of other partitions")
                return
            if claimed is None:
                time.sleep(IDLE)
                continue
            began = time.monotonic()
            if claimed[0].shard_id == self.gave_way:  # what waits is not for this engine, or not yet
                self.looks_from = began + SAME_AGAIN
            self.gave_way = None
            shard = Shard(self, *claimed)
            try:
                done.clips += work(shard) if work else shard.run()
            except BaseException:  # the engine is stopping or broken: others may have the shard at once
                shard.give_back()
                raise
            done.shards += 1
            idle_since = time.monotonic()
            done.busy += idle_since - began
        self.say(f"engine {self.owner}: no work for {self.settings.linger:.0f} s")

    def engines_alive(self) -> int:
        """Engines of Prefect that the ledger hears of, whatever their model; while it is away, what was last known."""

        def look() -> None:
            with self.ledgers() as session:
                living = ledger.live_engines(session, ledger.ALIVE)
            self.alive = max(1, sum(engine.flow_run_id is not None for engine in living))

        if_there(look)
        return self.alive

    def claim(self) -> tuple[Lease, list[LeasedClip]] | None:
        """A shard that is for any engine or for this partition; to an engine started by hand, at last, any at all."""
        for partition in (str(self.partition), None) if self.by_hand else (str(self.partition),):
            claimed = transact(self.ledgers, lambda session, planned=partition: self.claim_of(session, planned))
            if claimed is not None:
                return claimed
        return None

    def claim_of(self, session: Session, partition: str | None) -> tuple[Lease, list[LeasedClip]] | None:
        ledger.engine_heartbeat(session, self.owner)  # so that one thought dead is alive before it has a lease
        return leases.claim_shard(
            session,
            self.owner,
            seconds=self.settings.lease_seconds,
            model_digest=self.card.digest,
            partition=partition,
            ranks=self.partition.world,
        )

    def outranked(self, lease: Lease) -> bool:
        """True when work of a higher priority waits for an engine, and this is the one to take it."""
        if time.monotonic() < self.looks_from:
            return False
        with self.ledgers() as session:
            return leases.outranked(session, lease, partition=None if self.by_hand else str(self.partition))

    def in_the_way(self) -> bool:
        """True when this engine, which has no work, has GPUs that engines of another partition are waiting for."""
        if self.by_hand or self.settings.partition != AUTO:
            return False
        digest, partition = self.card.digest, str(self.partition)
        return transact(
            self.ledgers, lambda session: leases.others_wait(session, model_digest=digest, partition=partition)
        )

    def restart_ranks(self, reason: str) -> None:
        """Raises RankDied when the ranks die again and again without a clip between."""
        self.restarts += 1
        if self.restarts > MAX_RESTARTS:
            raise RankDied(f"the ranks ended {self.restarts} times without one finished clip; the last time: {reason}")
        self.say(f"engine {self.owner}: {reason}; starting the ranks again")
        self.engine.start()


@dataclass(slots=True)
class Shard:
    """One leased shard, from claim to completion."""

    crew: Crew
    lease: Lease
    clips: Sequence[LeasedClip]
    cancelled: set[str] = field(default_factory=set[str])
    lost: LeaseLost | None = None
    outranked: bool = False  # it is to give way
    stopped: bool = False  # the engine was told to stop
    started: dict[str, int] = field(default_factory=dict[str, int])  # the numbers of the attempts
    settled: set[str] = field(default_factory=set[str])  # recorded, failed or cancelled
    span: dict[str, str] = field(default_factory=dict[str, str])  # the carrier of the shard's span
    trace_id: str | None = None
    finished: int = 0
    saving: dict[str, Future[None]] = field(default_factory=dict[str, "Future[None]"])  # of each clip the last one
    objects: set[str] = field(default_factory=set[str])  # checkpoints that there may be of its clips

    def run(self) -> int:
        """Renders the clips and records them; returns how many were finished. A lost lease ends it without a word.

        That happens in a thread of its own. What a signal raises (SystemExit, KeyboardInterrupt, what Prefect makes of
        SIGTERM) is raised here, where nothing is interrupted by it. Clips under way are then kept at their next step,
        for at most `KEEPING` seconds; a second signal ends that too.
        """
        hand = ThreadPoolExecutor(1, thread_name_prefix="shard")
        working = hand.submit(copy_context().run, self.work)
        try:
            wait((working,))
        except BaseException:
            try:
                self.stopped = True
                wait((working,), KEEPING)
            finally:
                if not working.done():
                    self.abandon(working)
            raise
        finally:
            hand.shutdown(wait=False)
        return working.result()

    def abandon(self, working: Future[int]) -> None:
        """Ends the work, whatever ranks and store are at."""
        self.lost = LeaseLost(f"shard {self.lease.shard_id}: the engine had no time to keep what it was at")
        self.crew.engine.kill()
        wait((working,), ENDING)

    def work(self) -> int:
        """What `run` says, on whatever thread."""
        stop = threading.Event()
        keeper = threading.Thread(target=self.keep_lease, args=(stop,), name="lease", daemon=True)
        keeper.start()
        try:
            with (
                continued(self.lease.carrier, "shard", shard_id=self.lease.shard_id, request_id=self.lease.request_id),
                ThreadPoolExecutor(1, thread_name_prefix="publish") as publisher,
            ):
                self.span, self.trace_id = carrier(), current_trace_id()
                self.render_all(publisher)
            if self.leaves and self.left(self.clips):
                why = "is kept, since the engine stops" if self.stopped else "gives way to a higher priority"
                self.crew.say(f"shard {self.lease.shard_id}: {why}")
                self.crew.gave_way = self.lease.shard_id
                self.give_back()
            else:
                self.transact(lambda session: leases.complete_shard(session, self.lease))
        except LeaseLost as error:
            self.crew.say(f"shard {self.lease.shard_id}: {error}")
        finally:
            stop.set()
            keeper.join(timeout=10)
            self.sweep()
        return self.finished

    @property
    def leaves(self) -> bool:
        """What is under way is to be kept, and nothing else begun."""
        return self.outranked or self.stopped

    def left(self, clips: Sequence[LeasedClip]) -> list[LeasedClip]:
        """Those still to render."""
        return [clip for clip in clips if clip.clip_id not in self.settled | self.cancelled]

    def keep_lease(self, stop: threading.Event) -> None:
        """Renews the lease, learns what was cancelled and who goes first; the render loop looks at what it found."""
        until = time.monotonic() + self.crew.settings.lease_seconds
        for beat in count(1):
            if stop.wait(BEAT):
                return
            try:
                with self.crew.ledgers.begin() as session:
                    self.cancelled |= leases.renew(session, self.lease, self.crew.settings.lease_seconds)
                until = time.monotonic() + self.crew.settings.lease_seconds
                if beat % LOOK == 0 and not self.outranked:
                    self.outranked = self.crew.outranked(self.lease)
            except LeaseLost as error:
                self.lost = error
                return
            except Exception as error:
                log.warning("renewing the lease of shard %s failed: %s", self.lease.shard_id, error)
                if time.monotonic() > until:
                    self.lost = LeaseLost(
                        f"shard {self.lease.shard_id}: the ledger could not be reached for a whole lease"
                    )
                    return

    def give_back(self) -> None:
        """Another claim may have the shard at once."""
        try:
            with self.crew.ledgers.begin() as session:
                leases.release_shard(session, self.lease)
        except LeaseLost:
            pass  # somebody has it already
        except Exception:
            log.warning("shard %s could not be given back; its lease will run out", self.lease.shard_id, exc_info=True)

    def specs(self, clips: Sequence[LeasedClip]) -> list[ClipSpec]:
        """What the ranks are to make. A clip whose sources cannot be had is failed here, and left out."""
        specs: list[ClipSpec] = []
        for clip in clips:
            try:
                specs.append(self.gone_on(clip, spec_of(clip, self.fetch)))
            except (BadMedia, NoSuchKey, WrongDigest) as error:
                self.on_step(clip.clip_id, 0, clip.steps)
                self.settle_failed(clip.clip_id, f"its source {error}", error)
        return specs

    def gone_on(self, clip: LeasedClip, spec: ClipSpec) -> ClipSpec:
        """The clip with what an earlier attempt left, if it can be had and comes to the same bits on this engine."""
        if clip.checkpoint is None:
            return spec
        key = clip.checkpoint.key
        self.objects.add(key)
        if clip.checkpoint.of != self.crew.engine.alike(spec):
            log.info("clip %s begins anew: its checkpoint %s is of another kind of engine", clip.clip_id, key)
            return spec
        try:
            return replace(spec, unfinished=self.patiently(lambda: self.crew.store.get(key)))
        except Exception as error:
            log.warning("clip %s begins anew: its checkpoint %s cannot be had (%s)", clip.clip_id, key, error)
            return spec

    def fetch(self, source: NewArtifact) -> bytes:
        """The bytes of a source, proven by their digest. Waits for the store for as long as the lease is ours."""
        return proven(self.patiently(lambda: self.crew.store.get(source.key)), source)

    def render_all(self, publisher: ThreadPoolExecutor) -> None:
        """Every clip once. When the ranks end under some clips, these have failed; the others go on with new ranks.

        Which of them it was nobody knows, so whatever failed before is tried again alone: a clip that ends the ranks
        costs its neighbours one attempt and no more.
        """
        fresh = [clip for clip in self.clips if clip.attempt_no == 1]
        for some in (fresh, *([clip] for clip in self.clips if clip.attempt_no > 1)):
            if not self.leaves:
                self.render_some(some, publisher)

    def render_some(self, clips: Sequence[LeasedClip], publisher: ThreadPoolExecutor) -> None:
        settings = self.crew.settings
        while left := self.left(clips):
            pending: list[Future[None]] = []
            failure: Exception | None = None
            try:
                for rendered in self.crew.engine.render(
                    self.specs(left),
                    on_step=self.on_step,
                    cancelled=self.unwanted,
                    on_failure=self.fail,
                    on_checkpoint=lambda clip: self.on_checkpoint(clip, publisher),
                    checkpoint_every=(settings.checkpoint_steps, settings.checkpoint_seconds),
                    leave=lambda: self.leaves,
                ):
                    pending.append(publisher.submit(self.publish, rendered))
                    pending = [f for f in pending if not f.done() or f.result()]
            except (RankDied, RankHung, RenderFailed) as error:
                failure = error
            for future in (*pending, *self.saving.values()):
                future.result()
            if self.lost is not None:
                raise self.lost
            if failure is None:
                return  # what is left was cancelled, or gives way
            self.fail(failure)
            if self.stopped:
                return
            self.crew.restart_ranks(str(failure))

    def on_step(self, clip_id: str, step: int, steps: int) -> None:
        """The engine calls this with the step at which a clip begins, then after every denoising step."""
        if clip_id in self.started:
            return
        self.started[clip_id] = 0
        self.started[clip_id] = self.transact(
            lambda session: leases.start_clip(
                session,
                self.lease,
                clip_id,
                engine=self.crew.owner,
                partition=str(self.crew.partition),
                code_version=code_version(),
                host=socket.gethostname(),
                resumed_step=step or None,
            )
        )

    def on_checkpoint(self, clip: UnfinishedClip, publisher: ThreadPoolExecutor) -> None:
        """Has it stored beside the steps, unless the store, which may be slower than they, is still at the last one."""
        last = self.saving.get(clip.clip_id)
        if last is None or last.done() or self.leaves:
            self.saving[clip.clip_id] = publisher.submit(self.save, clip)

    def save(self, clip: UnfinishedClip) -> None:
        """Bytes first, row second. What goes wrong here costs some steps if the engine dies, and never the clip."""
        key = f"checkpoints/{clip.clip_id}/{self.started[clip.clip_id]}-{clip.step}.safetensors"
        self.objects.add(key)
        try:
            self.crew.store.put_at(key, clip.data)
            with self.crew.ledgers.begin() as session:
                kept = Checkpoint(key=key, step=clip.step, of=clip.of)
                leases.save_checkpoint(session, self.lease, clip.clip_id, kept)
        except Exception as error:
            log.warning("checkpoint %s was not kept: %s", key, error)
        else:
            self.sweep()

    def sweep(self) -> None:
        """Deletes the checkpoints of its clips to which none refers any more; what cannot be deleted, `tidy` will."""
        if not self.objects:
            return
        try:
            with self.crew.ledgers() as session:
                gone = self.objects - checkpoints(session, sorted(self.objects))
            for key in gone:
                self.crew.store.delete(key)
            self.objects -= gone
        except Exception as error:
            log.warning("checkpoints of shard %s were not deleted: %s", self.lease.shard_id, error)

    def unwanted(self) -> set[str]:
        """Clips that need not be rendered any further: cancelled ones, or all of them when the lease is lost."""
        return {clip.clip_id for clip in self.clips} if self.lost else self.cancelled

    def publish(self, rendered: RenderedClip) -> None:
        """Frames ▶ file ▶ store ▶ ledger."""
        clip = next(c for c in self.clips if c.clip_id == rendered.clip_id)
        began = time.time()
        try:
            data, media_type = self.patiently(lambda: as_file(clip, rendered.frames, self.crew.card.name))
        except LeaseLost:
            raise
        except Exception as error:  # this clip's trouble, not the engine's: the next may well encode
            self.settle_failed(clip.clip_id, f"encoding failed: {error}", error)
            return
        encoded = time.time()
        stored = self.patiently(lambda: self.crew.store.put(data, media_type))
        ended = time.time()
        kept = self.transact(
            lambda session: leases.record_clip(
                session,
                self.lease,
                clip.clip_id,
                artifact=leases.NewArtifact(
                    sha256=stored.sha256, key=stored.key, bytes=stored.bytes, media_type=stored.media_type
                ),
                seconds={**rendered.seconds, "encode": encoded - began, "put": ended - encoded},
                trace_id=self.trace_id,
                peak_bytes=rendered.peak_bytes,
                skipped_steps=rendered.skipped_steps,
            )
        )
        self.settled.add(clip.clip_id)
        self.sweep()
        self.finished += kept
        self.crew.restarts = 0
        self.trace(rendered, (("encode", began, encoded), ("put", encoded, ended), ("record", ended, time.time())))

    def trace(self, rendered: RenderedClip, after: Sequence[tuple[str, float, float]]) -> None:
        """One span for the clip; in it one for each stage, those of the ranks by what they timed."""
        clip = span_between("clip", rendered.started, after[-1][2], parent=self.span, clip_id=rendered.clip_id)
        steps = [Event(f"step {k}", when) for k, when in enumerate(rendered.steps, 1)]
        for stage, began, ended in (*rendered.spans, *after):
            within = [step for step in steps if stage == "denoise" and began <= step.at <= ended]
            span_between(stage, began, ended, parent=clip, events=within)

    def patiently(self, ask: Callable[[], T]) -> T:
        """What a server answers: a rendered clip is worth waiting while the lease is ours. Raises LeaseLost."""
        try:
            return patiently(ask, seconds=math.inf, abandoned=lambda: self.lost is not None)
        except Exception as error:
            if self.lost is not None and away(error):
                raise self.lost from error
            raise

    def transact(self, work: Callable[[Session], T]) -> T:
        """One transaction of the ledger, for whose return it waits as long as the lease is ours. Raises LeaseLost."""
        return self.patiently(partial(once, self.crew.ledgers, work))

    def fail(self, failure: Exception) -> None:
        """Blames the clip that the ranks were at: the named one, or those begun and not finished."""
        named = getattr(failure, "clip_id", None)
        guilty = {named} if named else self.started.keys() - self.settled - self.cancelled
        for clip_id in guilty:
            self.on_step(clip_id, 0, 0)  # one that failed before its turn has an attempt too
            self.settle_failed(clip_id, str(failure), failure)

    def settle_failed(self, clip_id: str, said: str, error: Exception) -> None:
        """Input that is bad stays bad, and is not tried again."""
        kind, permanent = class_of(error), isinstance(error, BadMedia)
        self.transact(
            lambda session: leases.fail_clip(session, self.lease, clip_id, said, error_class=kind, permanent=permanent)
        )
        self.settled.add(clip_id)


class WrongDigest(Exception):
    """Stored bytes are not those that the ledger knows. `rushes audit` looks at all of them."""


# The first that fits: OutOfMemory is a RankDied.
ERROR_CLASSES: tuple[tuple[type[Exception], str], ...] = (
    (OutOfMemory, "out_of_memory"),
    (RankDied, "rank_died"),
    (RankHung, "rank_hung"),
    (RenderFailed, "render_failed"),
    (BadMedia, "bad_input"),
    (NoSuchKey, "missing_bytes"),
    (WrongDigest, "wrong_bytes"),
)


def class_of(error: Exception) -> str:
    """What kind of failure it was, in the word that `attempts.error_class` holds; `encode_failed` for any other."""
    return next((name for kind, name in ERROR_CLASSES if isinstance(error, kind)), "encode_failed")


def proven(data: bytes, source: NewArtifact) -> bytes:
    """The bytes that were stored as `source`, if they are those. Raises WrongDigest."""
    if hashlib.sha256(data).hexdigest() != source.sha256:
        raise WrongDigest(f"{source.key} has other bytes than its digest says")
    return data


def as_file(clip: LeasedClip, frames: Frames, model: str) -> tuple[bytes, str]:
    """The clip's file and its media type: the same bytes for the same frames, clip and model's name."""
    metadata = {
        "title": clip.prompt,
        "clip_id": clip.clip_id,
        "recipe": clip.recipe,
        "comment": f"generated by Rushes with {model}",
    }
    if clip.frames == 1:
        return encode_png(frames[0], metadata), "image/png"
    return encode_mp4(frames, clip.fps, metadata), "video/mp4"


def spec_of(clip: LeasedClip, fetch: Callable[[NewArtifact], bytes]) -> ClipSpec:
    """What the ranks are to make of a clip, with the frames of its sources at its size and rate.

    Raises BadMedia, and what `fetch` raises.
    """

    def frames_of(source: NewArtifact | None) -> Frames | None:
        if source is None:
            return None
        most = 1 if clip.mode is ClipMode.IMAGE_TO_VIDEO else clip.frames
        return read_frames(fetch(source), width=clip.width, height=clip.height, fps=clip.fps, most=most)

    start, end = frames_of(clip.source), frames_of(clip.end_source)
    if clip.direction is ClipDirection.BACKWARD:
        start, end = None, start
    spec = ClipSpec(
        clip_id=clip.clip_id,
        prompt=clip.prompt,
        negative_prompt=clip.negative_prompt or "",
        seed=clip.seed,
        width=clip.width,
        height=clip.height,
        frames=clip.frames,
        fps=clip.fps,
        steps=clip.steps,
        guidance=clip.guidance,
        solver=clip.solver,
        shift=clip.shift,
        start=start,
        end=end,
        loop=clip.mode is ClipMode.LOOP,
        strength=clip.strength,
        window=clip.window or 0,
        step_cache=clip.step_cache,
    )
    return replace(spec, overlap=clip.overlap) if clip.overlap else spec
