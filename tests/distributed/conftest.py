"""Engines of a tiny model that run from test to test: to start ranks takes seconds, in which they import torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from model.config import Partition
from model.engine.engine import Engine
from tests.tiny import tiny_model

MOST = 4  # engines that run at once


@dataclass
class Engines:
    """One engine for each way to divide the model; the one that was used longest ago ends for a new one."""

    model: Path
    running: dict[tuple[Partition, int], Engine] = field(default_factory=dict[tuple[Partition, int], Engine])

    def get(self, partition: Partition, *, micro_batch: int = 1) -> Engine:
        """An engine that is ready, whatever tests before have done to its ranks. It stays open."""
        key = partition, micro_batch
        engine = self.running.pop(key, None)
        if engine is None:
            engine = Engine(self.model, partition, micro_batch=micro_batch, log=self.model.parent / "ranks.log")
        self.running[key] = engine
        while len(self.running) > MOST:
            self.running.pop(next(iter(self.running))).close()
        engine.step_timeout = 180.0
        engine.start()
        return engine


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, so that a step cache has something to skip between the first and the last."""
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny", layers=3)


@pytest.fixture(scope="session")
def engines(model: Path) -> Iterator[Engines]:
    pool = Engines(model)
    yield pool
    for engine in pool.running.values():
        engine.close()
