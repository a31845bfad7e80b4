"""Watching a request until every clip has come to an end: plan, keep engines running, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeAlias

from sqlalchemy.orm import Session, sessionmaker

from db import requests, watching
from db.engines import failed_starts
from db.leases import expire_owner
from db.planning import NewShard, create_shards, free_recipes, reuse_renders, unbind_shards, unplanned
from db.requests import Progress, compact
from db.tables import ClipStatus, RequestStatus
from flows.clients.ledger import Ledger
from flows.clients.retry import best_effort
from flows.generate.estimates import cost_model
from flows.generate.gallery import Occasions
from flows.generate.page import ROUND, Page, Report, show_clips
from flows.library.models import gpus_of
from flows.plan import shards, starts
from flows.settings import AUTO, Settings
from infra.store.contract import Store
from infra.tracing import carrier
from model.config import Partition
from model.loading.card import ModelCard

POLL = 1.0  # seconds between two looks at the ledger
SHORT = 30.0  # seconds that shards wait for engines of their own partition when others have the GPUs
UNSEEN = 120.0  # seconds for which what a transaction has written may stay unseen: none of ours lasts so long
HOLD = 30.0  # seconds in which engines give back what is paused, so that the last report tells it
EVERY_OUTRANK = 5.0  # seconds between two looks at what waits for others that would go later
EVERY_TAKE = 300.0  # seconds between two looks at all takes and not at new ones alone, which should find nothing


Room: TypeAlias = Callable[[str], int | None]  # engines of a partition that may be starting now; None: any number


def unbounded(_: str) -> int | None:
    """Room for any number of engines."""
    return None


class EnginePool(Protocol):
    """Who starts engines, and knows which of them have ended."""

    def ensure(
        self, request_id: str, *, model: str, model_digest: str, gpus: int | None, room: Room = unbounded
    ) -> str | None:
        """Starts as many engines of `model` as the request's work wants and there is room for.

        gpus: that the plan needs; None: all there are. room: asked right before engines of a partition ("": of
        whichever the settings name) are started, when the ledger knows of those that failed. Returns the partition
        whose turn it is, where no engine of it is at work or could be started; else None. Several requests may call it
        at once.
        """
        ...

    def dead_owners(self, owners: Iterable[str]) -> list[str]:
        """Those of these engines, by the names under which they lease shards, that will never write again."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """An open request's model, as it was opened with it, and the seconds that are left."""

    run_id: str | None  # the flow run that works on it
    model: str  # under which engines find it
    card: ModelCard
    deadline: float | None  # seconds from now in which all should be done


def watch(
    settings: Settings,
    ledgers: sessionmaker[Session],
    store: Store,
    request_id: str,
    source: Watched,
    *,
    page: Page,
    engines: EnginePool,
) -> Progress:
    """Plans what is not planned, keeps engines running, reports.

    Returns when no clip is queued or running, or when the request is paused: in the ledger, or by Suspend on its page.
    """
    planner, report = Planner(settings, ledgers, request_id, source, page, engines), Report(page, request_id)
    occasions = Occasions()
    next_round = 0.0
    looked: float | None = None  # when it looked for cached renders
    every_take = time.monotonic() + EVERY_TAKE
    next_outrank = 0.0
    told, held_at = False, None  # that it was suspended; when it was first seen to be paused

    def look(session: Session) -> Progress:
        reuse_renders(session, request_id, within=looked and time.monotonic() - looked + UNSEEN)
        free_recipes(session, request_id, outrank=began >= next_outrank)
        planner.plan(session)
        compact(session, request_id)
        requests.note_watched(session, request_id, source.run_id)
        return requests.progress(session, request_id)

    while True:
        began = time.monotonic()
        if began >= every_take:
            looked, every_take = None, began + EVERY_TAKE
        if not told and page.suspended():
            told = Ledger(ledgers).write(lambda session: requests.pause_request(session, request_id))
        progress = Ledger(ledgers).write(look)
        looked = began
        if began >= next_outrank:
            next_outrank = began + EVERY_OUTRANK
        paused = progress.status is RequestStatus.PAUSED
        held_at = (held_at or began) if paused else None
        kept = held_at is not None and (not progress.counts[ClipStatus.RUNNING] or began - held_at >= HOLD)
        if progress.finished or kept:
            best_effort(partial(report.send, ledgers, progress, last=True))
            return progress
        if told and not paused:  # resumed meanwhile: another process of this run is at it
            return progress
        if time.monotonic() >= next_round:
            next_round = time.monotonic() + ROUND
            # Without Prefect engines go on, and what it is told and asked here waits for the next round.
            send = partial(report.send, ledgers, progress)
            end_leases = partial(end_leases_of_the_dead, ledgers, engines)
            all(best_effort(step) for step in (send, end_leases, planner.staff))
            if occasions.due(progress, began):
                best_effort(partial(show_clips, page, ledgers, store, progress))
        time.sleep(POLL)


def end_leases_of_the_dead(ledgers: sessionmaker[Session], engines: EnginePool) -> None:
    """An engine whose run has ended will never write again: others need not wait for its lease to run out."""
    with ledgers() as session:
        owners = watching.lease_owners(session)
    dead = engines.dead_owners(owners)
    with ledgers.begin() as session:
        for owner in dead:
            expire_owner(session, owner)


class Planner:
    """Cuts a request into shards, and sees to it that there are engines for them.

    With a fixed partition any engine may render any shard. With partition auto shards belong to the partition that the
    plan gives them, and are released from it when others keep the GPUs: nothing waits for a better engine for ever.
    """

    def __init__(
        self,
        settings: Settings,
        ledgers: sessionmaker[Session],
        request_id: str,
        source: Watched,
        page: Page,
        engines: EnginePool,
    ) -> None:
        self.settings, self.ledgers, self.request_id, self.source = settings, ledgers, request_id, source
        self.page, self.engines = page, engines
        self.began = time.monotonic()
        self.gpus: int | None = None  # that the plan needs; None: all there are
        self.short_since: float | None = None  # when no GPUs were left for the shards whose turn it is

    def plan(self, session: Session) -> None:
        """Puts clips that are in no shard yet into shards, and notes what each is expected to take."""
        if self.settings.partition != AUTO:
            unbind_shards(session, self.request_id)  # of a plan that was made under another setting
        waiting = unplanned(session, self.request_id, limit=50_000)
        if not waiting:
            return
        cost = cost_model(session, self.settings, self.source.card)
        remaining = requests.progress(session, self.request_id).counts[ClipStatus.QUEUED]
        new = [
            NewShard(
                clip_ids=shard.clip_ids,
                partition=str(group.partition) if bound else None,
                predicted_seconds=shard.seconds,
                predicted_bytes=cost.memory(shard.shape, group.partition, self.settings.micro_batch),
            )
            for group, bound in self.groups(waiting, cost)
            for shard in self.cut(group, cost, remaining)
        ]
        create_shards(session, self.request_id, new, carrier=carrier())

    def cut(self, group: shards.ReplicaGroup, cost: shards.CostModel, remaining: int) -> list[shards.PlannedShard]:
        """The group's shards. What failed before is alone in its own, so that it cannot harm other clips."""

        def seconds(shape: shards.WorkShape) -> float:
            return cost.seconds(shape, group.partition)

        failed = [(shards.WorkShape.of(clip), clip.clip_id) for clip in group.waiting if clip.suspect]
        return [shards.PlannedShard(shape, (clip_id,), seconds(shape)) for shape, clip_id in failed] + shards.shards(
            [clip for clip in group.waiting if not clip.suspect],
            seconds,
            seconds=self.settings.shard_seconds,
            engines=group.replicas,
            remaining=remaining,
            fewest=self.settings.micro_batch + 1,
        )

    def groups(
        self, waiting: Sequence[shards.Waiting], cost: shards.CostModel
    ) -> list[tuple[shards.ReplicaGroup, bool]]:
        """Who renders what, and whether others may not."""
        settings = self.settings
        if settings.partition != AUTO:
            partition = Partition.parse(settings.partition)
            return [(shards.ReplicaGroup(partition=partition, replicas=settings.engines_each, waiting=waiting), False)]
        left = self.source.deadline and self.source.deadline - (time.monotonic() - self.began)
        found = shards.arrange(waiting, cost, *gpus_of(settings), left)
        self.gpus = max(self.gpus or 0, found.gpus)
        for group in found.groups:
            self.page.info(f"{len(group.waiting)} clips on {group.replicas} x {group.partition}")
        if left is not None and found.seconds > left:
            self.page.warn(
                f"the deadline cannot be met: on {settings.gpus} all is done after {found.seconds:.0f} s at best, "
                f"{max(0.0, left):.0f} s are left"
            )
        return [(group, True) for group in found.groups]

    def staff(self) -> None:
        """Starts engines; shards that have waited too long for theirs may be rendered by any."""
        source = self.source
        short = self.engines.ensure(
            self.request_id, model=source.model, model_digest=source.card.digest, gpus=self.gpus, room=self.room
        )
        if short is None:
            self.short_since = None
            return
        self.short_since = self.short_since or time.monotonic()
        if time.monotonic() - self.short_since > SHORT:
            with self.ledgers.begin() as session:
                freed = unbind_shards(session, self.request_id, [short])
            self.page.info(f"no GPUs are free for {short}: {freed} shards may be rendered by any engine")

    def room(self, partition: str) -> int | None:
        """How many engines of this partition ("": of any) may be starting: after failed starts one, or none yet."""
        with self.ledgers() as session:
            paused = starts.pause(failed_starts(session, self.source.card.digest, partition or None))
        return None if paused is None else paused.room
