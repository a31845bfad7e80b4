"""One stack for all tests of this folder: Postgres, Prefect, workers, engines of two ranks, a tiny random model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.collector import Collector
from tests.end_to_end.house import House


@pytest.fixture(scope="session")
def spans() -> Iterator[Collector]:
    """The OpenTelemetry collector that the stack sends its traces to."""
    with Collector() as running:
        yield running
        running.shutdown()


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory, spans: Collector) -> Iterator[House]:
    from tests.tiny import tiny_model

    folder: Path = tmp_path_factory.mktemp("house")
    house = House(
        home=folder / "home",
        model=tiny_model(folder / "tiny"),
        settings={
            "RUSHES_PARTITION": "tp=2",
            "RUSHES_MICRO_BATCH": "1",  # clips end one by one, so that there is a middle of a batch
            "RUSHES_LINGER": "600",  # one engine stays warm from test to test
            "RUSHES_LEASE_SECONDS": "15",
            "OTEL_EXPORTER_OTLP_ENDPOINT": spans.endpoint,
            "OTEL_BSP_SCHEDULE_DELAY": "200",
        },
    )
    try:
        house.rushes("up")
        yield house
    finally:
        house.rushes("down")
    assert house.processes() == []
