"""The platform's metrics: the ledger's numbers and how soon it and the store answer; Prometheus text, and OTLP.

Each is an instrument of OpenTelemetry, so that both say the same. They are read anew when somebody collects them, at
most every FRESH seconds; counters and histograms begin when the service does, as Prometheus expects.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from datetime import datetime

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import CallbackOptions, Observation
from prometheus_client import CollectorRegistry, generate_latest
from sqlalchemy.orm import Session

from db.metrics import Count, Standing, ended_since, standing
from infra.metrics import setup_metrics
from infra.store.contract import Store

FRESH = 2.0  # seconds for which numbers are not asked for again
TEXT = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600)  # bounds of stages


class Metrics:
    """Instruments over a ledger and a store."""

    def __init__(self, asking: Callable[[], AbstractContextManager[Session]], store: Store) -> None:
        self.asking, self.store = asking, store
        self.lock = threading.Lock()
        self.read_at = -FRESH
        self.since: datetime | None = None
        self.now = Standing((), (), (), (), ())
        self.took: Sequence[Count] = ()
        self.registry = CollectorRegistry()
        reader = PrometheusMetricReader(disable_target_info=True, scope_info_enabled=False, registry=self.registry)
        self.provider = setup_metrics("rushes-web", reader)
        meter = self.provider.get_meter("rushes")
        self.attempts = meter.create_counter("rushes.attempts", "{attempt}", "attempts that ended")
        self.stages = meter.create_histogram(
            "rushes.stage.duration",
            "s",
            "seconds of a stage of an attempt that is done",
            explicit_bucket_boundaries_advisory=SECONDS,
        )
        for name, unit, means, read in (
            ("rushes.clips", "{clip}", "clips by state", lambda: self.now.clips),
            ("rushes.queue.depth", "{clip}", "clips that wait", lambda: self.now.queued),
            ("rushes.queue.oldest", "s", "age of the oldest request with clips that wait", lambda: self.now.oldest),
            ("rushes.engines", "{engine}", "engines that have not left, by state", lambda: self.now.engines),
            ("rushes.engines.busy", "", "share of their lives that engines were at work", lambda: self.now.busy),
            ("rushes.answer.duration", "s", "how soon ledger and store answer", lambda: self.took),
        ):
            meter.create_observable_gauge(name, [self.observer(read)], unit, means)

    def observer(self, read: Callable[[], Sequence[Count]]) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(_: CallbackOptions) -> Iterable[Observation]:
            self.refresh()
            return [Observation(count.value, count.labels) for count in read()]

        return observe

    def text(self) -> bytes:
        """All of them as Prometheus reads them. Raises what ledger or store raise: a scrape that fails is seen."""
        self.refresh()
        return generate_latest(self.registry)

    def refresh(self) -> None:
        """Asks ledger and store, if nobody did just now."""
        with self.lock:
            if time.monotonic() - self.read_at < FRESH:
                return
            began = time.perf_counter()
            with self.asking() as session:
                self.now = standing(session)
                ended = ended_since(session, self.since)
            answered = time.perf_counter()
            self.store.exists("healthz")
            stored = time.perf_counter()
            self.took = [Count({"of": "ledger"}, answered - began), Count({"of": "store"}, stored - answered)]
            for count in ended.attempts:
                self.attempts.add(int(count.value), count.labels)
            for count in ended.stages:
                self.stages.record(count.value, count.labels)
            self.since, self.read_at = ended.until, time.monotonic()

    def close(self) -> None:
        """Sends the last ones."""
        self.provider.shutdown()
