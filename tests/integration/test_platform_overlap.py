"""An engine's next shard is rendered while the last clips of the one before are still encoded, stored and recorded."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from flows.generate.outcome import Ending
from flows.render import shard
from flows.render.shard import Shard
from flows.render.worker import EngineUnfit, Worker
from infra.store.contract import Stored, StoreUnavailable
from infra.store.folder import FolderStore
from model.engine.clip import RenderedClip
from tests.platform import Platform, Run, wait_for

CUBE, BALL = "a blue cube", "a green ball"


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "AT_ONCE", 0.01)
    monkeypatch.setattr(shard, "HEARD", 0.1)


@pytest.fixture
def slow_put(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Clips get into the store as soon as it is set."""
    door, put = threading.Event(), FolderStore.put

    def waits(self: FolderStore, data: bytes, media_type: str) -> Stored:
        if media_type == "video/mp4" and not door.wait(0.3):
            raise StoreUnavailable("the store is away")
        return put(self, data, media_type)

    monkeypatch.setattr(FolderStore, "put", waits)
    yield door
    door.set()


def planned_in_order(platform: Platform, *requests: list[Any]) -> list[Run]:
    """They are claimed in this order, and none comes too late for an engine that has nothing else."""
    runs: list[Run] = []
    for lines in requests:
        runs.append(platform.submit(lines))
        wait_for(lambda: len(platform.sql("select id from shards")) == len(runs), "the plan")
    return runs


def leases(platform: Platform) -> list[int]:
    return [row["size"] for row in platform.sql("select size from shards where status = 'leased'")]


def test_the_next_shard_is_claimed_and_rendered_while_the_last_clip_is_published(
    platform: Platform, slow_put: threading.Event
) -> None:
    """With one lease more at most, and none of which no clip is rendered or published."""
    runs = [platform.submit([{"prompt": CUBE, "seed": seed}]) for seed in range(3)]
    for run in runs:
        platform.request_of(run)
    wait_for(lambda: len(platform.sql("select id from shards")) == 3, "the plans")
    with platform.engines():
        wait_for(lambda: platform.script.attempts[CUBE] == 2 and platform.script.steps[CUBE] == 8, "the second one")
        assert len(leases(platform)) == 2, "the third is left to others until the first is published"
        assert [row["status"] for row in platform.sql("select status::text from clips where status = 'done'")] == []
        slow_put.set()
        assert {run.outcome().ending for run in runs} == {Ending.COMPLETED}
    assert platform.script.attempts[CUBE] == 3
    assert leases(platform) == []
    assert platform.breaches() == []


def test_the_seconds_of_publishing_are_charged_to_nobody(platform: Platform, slow_put: threading.Event) -> None:
    run = platform.submit([CUBE])
    with platform.engines():
        wait_for(lambda: platform.script.steps[CUBE] == 4, "it to be rendered")
        threading.Event().wait(1.5)
        slow_put.set()
        assert run.outcome().ending is Ending.COMPLETED
    (spent,) = platform.sql("select sum(gpu_seconds) as seconds from usage")
    assert 0 < spent["seconds"] < 2 * 1.5, "two GPUs, which were free meanwhile"


@pytest.mark.parametrize("step", [2, 4])
def test_a_stopped_engine_gives_both_leases_back(
    step: int, platform: Platform, slow_put: threading.Event, told_by_usr1: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that it renders is kept, those that the store does not take go back: nothing is charged.

    At step 4 the second is rendered too, and the engine waits for the first.
    """
    monkeypatch.setattr(shard, "ENDING", 1.0)
    monkeypatch.setattr(shard, "KEEPING", 2.0)
    waiting, finish = threading.Event(), Shard.finish

    def noted(self: Shard) -> int:
        waiting.set()
        return finish(self)

    monkeypatch.setattr(Shard, "finish", noted)
    if step < 4:
        platform.script.held[BALL] = step
        waiting.set()
    first, second = planned_in_order(platform, [CUBE], [BALL])

    def stop() -> None:
        try:
            wait_for(lambda: platform.script.steps[BALL] == step and len(leases(platform)) == 2, "both to be leased")
            wait_for(waiting.is_set, "the engine to wait for the first")
        finally:
            os.kill(os.getpid(), signal.SIGUSR1)

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(SystemExit):
        platform.engine()
    stopper.join()
    assert leases(platform) == []
    assert platform.sql("select sum(failures + lost_attempts) as n from clips") == [{"n": 0}]
    slow_put.set()
    platform.script.held.clear()
    with platform.engines():
        assert {run.outcome().ending for run in (first, second)} == {Ending.COMPLETED}
    assert [each["ended"] for each in platform.attempts(platform.request_of(second))] == ["released", "done"]
    assert platform.breaches() == []


def test_a_clip_that_cannot_be_encoded_is_judged_once_the_ranks_are_free(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not while another is at the ranks, for a plain clip; if that cannot be encoded either, both shards go back."""
    publish, trial = Shard.publish, Worker.trial

    def broken(self: Shard, rendered: RenderedClip, failed_before: Sequence[str]) -> None:
        if platform.script.steps[BALL] < 4:  # this is the first shard's clip
            wait_for(lambda: platform.script.steps[BALL] == 2, "the next clip to be at the ranks")
            threading.Timer(0.3, platform.script.held.clear).start()
        self.settle_failed(rendered.clip_id, "encoding failed: no encoder", ValueError("no encoder"))

    def as_broken(self: Worker) -> str:
        assert trial(self) is None
        assert platform.script.steps[BALL] == 4, "the ranks were at another clip"
        return "encoding failed: no encoder"

    monkeypatch.setattr(Shard, "publish", broken)
    monkeypatch.setattr(Worker, "trial", as_broken)
    platform.script.held[BALL] = 2
    first, second = planned_in_order(platform, [CUBE], [BALL])
    with pytest.raises(EngineUnfit):
        platform.engine()
    assert leases(platform) == []
    assert platform.sql("select sum(failures + lost_attempts) as n from clips") == [{"n": 0}]
    monkeypatch.setattr(Shard, "publish", publish)
    monkeypatch.setattr(Worker, "trial", trial)
    with platform.engines():
        assert {run.outcome().ending for run in (first, second)} == {Ending.COMPLETED}
    assert platform.breaches() == []
