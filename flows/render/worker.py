"""The process behind an engine: its renderer's restarts, and what it asks of the ledger."""

from __future__ import annotations

import logging
import platform
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TypeVar

from sqlalchemy.orm import Session, sessionmaker

from db import claim as claims
from db.claim import LeasedClip, claim_shard, others_wait
from db.engines import ALIVE, engine_heartbeat, live_engines
from db.fence import Lease
from db.requests import is_paused
from flows.clients.ledger import Ledger
from flows.clients.retry import best_effort
from flows.render.clip import video
from flows.render.renderer import Renderer
from flows.settings import AUTO, Settings
from infra.store.contract import Store
from model.config import Partition
from model.engine.clip import ClipSpec, DeviceFailed, EngineError, RankDied, RenderFailed
from model.loading.card import ModelCard

MAX_RESTARTS = 5  # of the ranks in a row without one finished clip, after which the engine gives up
MAX_DEVICE_RESTARTS = 2  # of those: after errors of a device
log = logging.getLogger("rushes.engine")
T = TypeVar("T")


class EngineUnfit(RuntimeError):
    """The engine cannot render, clips aside: its machine or its model is at fault. No clip is charged with it."""

    exit_code = 1


def owner_name(flow_run_id: str | None) -> str:
    """The name under which an engine leases shards: host, and its flow run or a random id."""
    return f"{socket.gethostname()}/{flow_run_id or uuid.uuid4()}"


def code_version() -> str:
    """The package's version, recorded with every clip that it rendered."""
    return f"rushes {version('rushes')}"


def machine(settings: Settings) -> str:
    """The machine as recorded with a clip: all beside recipe and partition that its last bits depend on."""
    # A sum is added up in another order by several threads, and over a batch of another size.
    several = (
        (settings.threads, "threads a rank", settings.device == "cpu"),
        (settings.micro_batch, "clips at a time", True),
    )
    said = [f"{count} {what}" for count, what, counts in several if counts and count > 1]
    if settings.compile:
        said.append("compiled" if settings.compile is True else f"compiled for {settings.compile}")
    return ", ".join([f"{settings.device} {platform.machine()}", *said])


@dataclass(slots=True)
class Worker:
    """A renderer with all it needs to work on shards: an engine, as the ledger knows it."""

    settings: Settings
    ledgers: sessionmaker[Session]
    store: Store
    renderer: Renderer
    card: ModelCard
    partition: Partition
    owner: str
    say: Callable[[str], None]
    by_hand: bool = True  # nobody would start another in its place
    restarts: int = 0  # in a row without a finished clip
    gave_way: int | None = None  # with which shard, a moment ago
    looks_from: float = 0.0  # the time from which it would give way again
    alive: int = 1  # engines, when it last looked
    # Held by the shard whose clips the ranks are at; the one before may still be publishing, and may doubt the ranks.
    ranks: threading.Lock = field(default_factory=threading.Lock)

    def engines_alive(self) -> int:
        """Engines of Prefect that the ledger hears of, of any model; while it is away, what was last known."""

        def look() -> None:
            with self.ledgers() as session:
                living = live_engines(session, ALIVE)
            self.alive = max(1, sum(engine.flow_run_id is not None for engine in living))

        best_effort(look)
        return self.alive

    def claim(self) -> tuple[Lease, list[LeasedClip]] | None:
        """A shard that is for any engine or for this partition; to an engine started by hand, at last, any at all."""
        for partition in (str(self.partition), None) if self.by_hand else (str(self.partition),):
            claimed = Ledger(self.ledgers).write(lambda session, planned=partition: self.claim_of(session, planned))
            if claimed is not None:
                return claimed
        return None

    def claim_of(self, session: Session, partition: str | None) -> tuple[Lease, list[LeasedClip]] | None:
        engine_heartbeat(session, self.owner)  # so that one thought dead is alive before it has a lease
        return claim_shard(
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
            return claims.outranked(session, lease, partition=None if self.by_hand else str(self.partition))

    def paused(self, lease: Lease) -> bool:
        """True when the request of this lease is held."""
        with self.ledgers() as session:
            return is_paused(session, lease.request_id)

    def in_the_way(self) -> bool:
        """True when this engine, which has no work, has GPUs that engines of another partition are waiting for."""
        if self.by_hand or self.settings.partition != AUTO:
            return False
        digest, partition = self.card.digest, str(self.partition)
        return Ledger(self.ledgers).read(lambda session: others_wait(session, model_digest=digest, partition=partition))

    def restart_ranks(self, failure: Exception) -> None:
        """Starts the ranks after `failure`. Raises RankDied when they die again and again without a clip between, and
        EngineUnfit where a device fails so.
        """
        self.restarts += 1
        if isinstance(failure, DeviceFailed) and self.restarts > MAX_DEVICE_RESTARTS:
            raise EngineUnfit(
                f"engine {self.owner} stops: its devices failed {self.restarts} times without one finished clip, the "
                f"last time: {failure}. Look at them (nvidia-smi -q, dmesg) before it is started again"
            )
        if self.restarts > MAX_RESTARTS:
            raise RankDied(f"the ranks ended {self.restarts} times without one finished clip; the last time: {failure}")
        self.say(f"engine {self.owner}: {failure}; starting the ranks again")
        self.renderer.start()

    def trial(self) -> str | None:
        """Renders and encodes a plain clip. Returns what went wrong; None: the engine can render."""
        spec, failed = plain_clip(self.card), list[RenderFailed]()
        try:
            with self.ranks:
                for rendered in self.renderer.render([spec], on_failure=failed.append):
                    video(rendered.frames, spec.fps, {})
        except EngineError as error:
            return str(error)
        except Exception as error:
            return f"encoding failed: {error}"
        return failed[0].reason if failed else None


def plain_clip(card: ModelCard) -> ClipSpec:
    """A clip that any engine of the model can make, of its own size and of few frames and steps."""
    return ClipSpec(
        clip_id="trial",
        prompt="a red ball",
        negative_prompt="",
        seed=0,
        width=card.width,
        height=card.height,
        frames=card.frame_step + 1,
        fps=card.fps,
        steps=2,
        guidance=card.guidance,
        solver=card.solver,
        shift=card.shift,
    )
