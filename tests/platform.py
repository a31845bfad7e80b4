"""The platform in one process: a real ledger, a real folder store, the real planner, shards and workers; no Prefect.

A request is made by `make_clips` in a thread, beside engines (`run_engine`) in threads of their own whose renderer is a
`FakeRenderer`. Pages are recorded. What waits for a second in production waits for hundredths here.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

import db.leases
from db import watching
from db.requests import cancel_request
from flows.clients.retry import never
from flows.generate import watch
from flows.generate.make import make_clips
from flows.generate.outcome import Outcome
from flows.generate.page import Button, Row
from flows.generate.watch import EnginePool, Room, unbounded
from flows.operate.audit import AuditReport, audit
from flows.render import engine, shard
from flows.render.engine import EngineTotals, run_engine
from flows.render.shard import Shard
from flows.request.form import GenerationRequest
from flows.settings import Settings
from infra.store.contract import Store
from model.config import Partition
from model.loading.card import ModelCard
from tests.fake_renderer import FakeRenderer, Script

SMALL: dict[str, Any] = {"width": 48, "height": 32, "frames": 5, "steps": 4, "rewrite": False}
PATIENCE = 240.0  # seconds: what waits here ends within one of them where the machine is idle

T = TypeVar("T")


def wait_for(look: Callable[[], T | None], what: str, *, seconds: float = PATIENCE) -> T:
    """The answer of `look` as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.01)
    return seen


class RecordedPage:
    """A page that keeps the newest of what was shown under each key, without the request's id, and the lines."""

    web = "http://127.0.0.1:8400"

    def __init__(self) -> None:
        self.shown: dict[str, Any] = {}
        self.descriptions: dict[str, str | None] = {}  # of what is Markdown
        self.lines: list[str] = []
        self.warnings: list[str] = []
        self.suspend_pressed = False

    def suspended(self) -> bool:
        return self.suspend_pressed

    def info(self, message: str) -> None:
        self.lines.append(message)

    def warn(self, message: str) -> None:
        self.lines.append(message)
        self.warnings.append(message)

    def markdown(self, key: str, text: str, description: str | None = None) -> None:
        self._show(key, text)
        self.descriptions[key.split("-", 2)[-1]] = description

    def table(self, key: str, rows: Sequence[Row], description: str) -> None:
        self._show(key, list(rows))

    def image(self, key: str, address: str, description: str) -> None:
        self._show(key, address)

    def _show(self, key: str, value: Any) -> None:
        assert set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789-"), f"Prefect refuses the key {key}"
        self.shown[key.split("-", 2)[2] if key.startswith("req-") else key] = value


class NoPool:
    """Engines are the test's own: none is started, and none is known to have ended."""

    def ensure(
        self, request_id: str, *, model: str, model_digest: str, gpus: int | None, room: Room = unbounded
    ) -> str | None:
        return None

    def dead_owners(self, owners: object) -> list[str]:
        return []


@dataclass(slots=True)
class Run:
    """One run of `make_clips`."""

    id: str
    page: RecordedPage
    future: Future[Outcome]

    def outcome(self) -> Outcome:
        return self.future.result(PATIENCE)


@dataclass(slots=True)
class UntilStopped:
    """Runs shards until it is told to stop, which the engine hears between two of them."""

    stopped: threading.Event
    made: int = 0

    @property
    def used_up(self) -> bool:
        return self.stopped.is_set()

    def __call__(self, shard: Shard) -> int:
        self.made += 1
        return shard.run()


@dataclass(slots=True)
class Platform:
    """All parts, and what a test asks of them."""

    settings: Settings
    sessions: sessionmaker[Session]
    store: Store
    threads: ThreadPoolExecutor
    script: Script = field(default_factory=Script)
    said: list[str] = field(default_factory=list[str])  # by engines
    runs: list[Run] = field(default_factory=list[Run])

    # --- requests

    def submit(
        self,
        prompts: Sequence[str | dict[str, Any]] = (),
        *,
        pool: EnginePool | None = None,
        resumes: str | None = None,
        again: Run | None = None,
        pressed: Button | None = None,
        **fields: Any,
    ) -> Run:
        """Begins a run of a request, in a thread of its own. resumes: the request that maintenance has it take up.

        again: the same flow run once more, as by the button `pressed` on its page.
        """
        asked = GenerationRequest.model_validate({**SMALL, "prompts": list(prompts), **fields})
        page, run_id = (again.page, again.id) if again else (RecordedPage(), str(uuid.uuid4()))
        page.suspend_pressed = False

        def make() -> Outcome:
            return make_clips(
                self.settings,
                self.sessions,
                self.store,
                asked,
                run_id=run_id,
                page=page,
                engines=pool or NoPool(),
                resumes=resumes,
                pressed=pressed,
            )

        self.runs.append(Run(run_id, page, self.threads.submit(make)))
        return self.runs[-1]

    def make(self, prompts: Sequence[str | dict[str, Any]] = (), **fields: Any) -> tuple[Outcome, RecordedPage]:
        """A request from its prompts to its end."""
        run = self.submit(prompts, **fields)
        return run.outcome(), run.page

    def request_of(self, run: Run) -> str:
        """The request that a run is making, as soon as it is in the ledger with all its clips."""

        def look() -> str | None:
            if run.future.done():
                return run.outcome().request_id
            rows = self.sql("select id from requests where flow_run_id = :run and total is not null", run=run.id)
            return str(rows[0]["id"]) if rows else None

        return wait_for(look, "the request to be opened")

    def end(self) -> None:
        """Cancels what a failed test has left behind, so that nothing waits for it for ever."""
        self.script.held.clear()

        def all_done() -> bool:
            with self.sessions.begin() as session:
                for request in watching.open_requests(session):
                    cancel_request(session, request.id)
            return all(run.future.done() for run in self.runs)

        wait_for(all_done, "the runs to end")

    # --- engines

    def engine(
        self,
        runner: UntilStopped | None = None,
        *,
        replaced: Callable[[], bool] = never,
        flow_run_id: str | None = None,
        held: Callable[[], bool] = never,
        **changes: Any,
    ) -> EngineTotals:
        """An engine's life, in this thread."""
        assert changes.keys() <= Settings.model_fields.keys(), changes
        settings = self.settings.model_copy(update=changes)

        def build(settings: Settings, card: ModelCard, partition: Partition, gpus: object) -> FakeRenderer:
            return FakeRenderer(self.script, card.digest, partition, micro_batch=settings.micro_batch)

        return run_engine(
            settings,
            runner=runner,
            say=self.said.append,
            build=build,
            replaced=replaced,
            held=held,
            flow_run_id=flow_run_id,
        )

    @contextmanager
    def engines(self, count: int = 1, **changes: Any) -> Generator[None]:
        """So many engines, each in a thread of its own, until the end of the block."""
        stopped = threading.Event()
        running = [self.threads.submit(self.engine, UntilStopped(stopped), **changes) for _ in range(count)]
        try:
            yield
        finally:
            stopped.set()
            for each in running:
                each.result(PATIENCE)

    # --- what came of it

    def sql(self, query: str, **values: Any) -> list[dict[str, Any]]:
        with self.sessions() as session:
            return [dict(row) for row in session.execute(text(query), values).mappings()]

    def clips(self, request_id: str | None) -> list[dict[str, Any]]:
        """The rows of history, in the order of the file."""
        return self.sql('select * from history where request_id = :id order by "index", sample', id=request_id)

    def statuses(self, request_id: str | None) -> list[str]:
        return [str(clip["status"]) for clip in self.clips(request_id)]

    def attempts(self, request_id: str | None) -> list[dict[str, Any]]:
        query = "select a.*, a.status::text as ended from attempts a join clips c on c.id = a.clip_id"
        return self.sql(f"{query} where c.request_id = :id order by a.clip_id, a.number", id=request_id)

    def breaches(self) -> list[tuple[str, str]]:
        """The problems that an audit of ledger and store finds, objects that no row knows among them, however young."""
        report = AuditReport()
        with self.sessions() as session:
            found = [(breach.problem, breach.key) for breach in audit(session, self.store, report)]
        return found + [("unclaimed", f"{report.unclaimed} objects")] * (report.unclaimed > 0)

    def checkpoints(self) -> list[str]:
        return [item.key for item in self.store.list("checkpoints/")]


@contextmanager
def running_platform(
    url: str, sessions: sessionmaker[Session], home: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Platform]:
    """A platform on an empty ledger; all of its threads have ended after."""
    monkeypatch.setattr(watch, "POLL", 0.05)
    monkeypatch.setattr(watch, "ROUND", 0.1)
    monkeypatch.setattr(engine, "IDLE", 0.02)
    monkeypatch.setattr(shard, "BEAT", 0.05)
    monkeypatch.setattr(db.leases, "BACKOFF", 0.01)
    settings = Settings(home=home, database_url=url, linger=600, lease_seconds=30, partition="tp=2")
    with ThreadPoolExecutor(64, thread_name_prefix="platform") as threads:
        platform = Platform(settings, sessions, settings.open_store(), threads)
        try:
            yield platform
        finally:
            platform.end()
