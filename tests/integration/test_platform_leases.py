"""Who renders when: priorities, engines that stop or are killed, checkpoints, several engines at one request."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flows.generate.outcome import Ending
from tests.platform import Platform, wait_for

STEPS = 40
LONG = "a red ball moves left"


def stopped_at(platform: Platform, step: int, **changes: object) -> None:
    """An engine in this thread, which is told to stop when it has come to this step of the clip."""
    platform.script.held[LONG] = step

    def stop() -> None:
        wait_for(lambda: platform.script.steps[LONG] == step, "the clip to come to its step")
        os.kill(os.getpid(), signal.SIGUSR1)

    teller = threading.Thread(target=stop)
    teller.start()
    with pytest.raises(SystemExit):
        platform.engine(**changes)
    teller.join()


def test_a_stopped_engine_gives_its_shard_back_and_another_goes_on(platform: Platform, told_by_usr1: None) -> None:
    """With what it was at kept at its next step, though it keeps nothing at other times. Twice, and no try is spent."""
    run = platform.submit([LONG, "a blue cube"], steps=STEPS)
    request = platform.request_of(run)
    kept: list[int] = []
    for step in (3, 10):
        stopped_at(platform, step, checkpoint_steps=0, checkpoint_seconds=0)
        shards = platform.sql("select status::text, owner, leased_until from shards where status <> 'done'")
        assert shards and all(tuple(row.values()) == ("queued", None, None) for row in shards)
        (row,) = platform.sql("select resume_step as step from clips where prompt = :prompt", prompt=LONG)
        kept.append(int(row["step"]))
        assert kept[-1] == platform.script.steps[LONG] == step + 1, "it was kept at its next step"
    platform.script.held.clear()
    with platform.engines():
        outcome = run.outcome()
    assert outcome.ending is Ending.COMPLETED
    attempts = [each for each in platform.attempts(request) if each["clip_id"] == f"{request}-000000-0"]
    assert [each["ended"] for each in attempts] == ["released", "released", "done"]
    assert [each["resumed_step"] for each in attempts] == [None, *kept]
    assert len({each["owner"] for each in attempts}) == 3
    assert platform.script.steps[LONG] == STEPS, "no step was computed twice"
    spent = platform.sql("select failures, lost_attempts from clips where request_id = :id", id=request)
    assert [tuple(row.values()) for row in spent] == [(0, 0)] * 2
    assert platform.checkpoints() == [] and platform.breaches() == []


def test_a_higher_priority_goes_first_and_the_lower_one_loses_nothing(platform: Platform) -> None:
    platform.script.held[LONG] = 3
    low = platform.submit([LONG], steps=STEPS, priority=1)
    low_request = platform.request_of(low)
    with platform.engines(checkpoint_steps=0, checkpoint_seconds=0):
        wait_for(lambda: platform.script.steps[LONG] == 3, "the long clip to be under way")
        high = platform.submit(["a green ball"], priority=9)
        outcome = high.outcome()
        assert outcome.ending is Ending.COMPLETED
        assert platform.statuses(low_request) != ["done"], "it did not wait for the long clip"
        platform.script.held.clear()
        assert low.outcome().ending is Ending.COMPLETED
    (first,) = platform.attempts(outcome.request_id)
    given_way, *between, went_on = platform.attempts(low_request)
    assert not between
    assert given_way["finished_at"] <= first["started_at"] < went_on["started_at"]
    assert (given_way["ended"], given_way["error"], went_on["ended"]) == ("released", None, "done")
    assert went_on["resumed_step"] == 4
    assert platform.script.steps[LONG] == STEPS, "no step was computed twice"
    assert platform.sql("select failures, lost_attempts from clips where id = :id", id=went_on["clip_id"]) == [
        {"failures": 0, "lost_attempts": 0}
    ]
    assert platform.checkpoints() == [] and platform.breaches() == []


def test_the_higher_of_two_waiting_priorities_is_rendered_first(platform: Platform) -> None:
    low, high = platform.submit(["a low ball"], priority=2), platform.submit(["a high ball"], priority=7)
    wait_for(lambda: len(platform.sql("select id from shards where status = 'queued'")) == 2, "both plans")
    with platform.engines():
        requests = [run.outcome().request_id for run in (low, high)]
    (later,), (sooner,) = (platform.attempts(request) for request in requests)
    assert sooner["started_at"] < later["started_at"]  # its last moments may be published while the other is begun


KILLED = """
import sys
from sqlalchemy import text
from db.session import connect, sessions
from flows.settings import Settings
from tests.fake_renderer import Script
from tests.platform import Platform

home, url, prompt = sys.argv[1:]
script = Script()
script.held[prompt] = 13
settings = Settings(home=home, database_url=url, linger=600, lease_seconds=4, partition="tp=2", checkpoint_steps=2)
Platform(settings, sessions(connect(url)), settings.open_store(), None, script).engine()
"""


def test_a_killed_engine_s_clip_goes_on_in_another_from_its_last_checkpoint(
    platform: Platform, database_url: str, tmp_path: Path
) -> None:
    """The engine is a process of its own, and is killed: its lease runs out, and costs the clip no try."""
    run = platform.submit([LONG], steps=STEPS)
    request = platform.request_of(run)
    step = "select resume_step as step from clips where request_id = :id and resume_step > 0"
    program = [sys.executable, "-c", KILLED, str(platform.settings.home), database_url, LONG]
    with subprocess.Popen(program, cwd=Path(__file__).parents[2]) as process:
        try:
            (kept,) = wait_for(lambda: platform.sql(step, id=request), "a checkpoint in the middle")
        finally:
            process.kill()
    assert len(platform.checkpoints()) <= 2, "older ones are deleted"
    (clip,) = platform.clips(request)
    platform.store.put_at(f"checkpoints/{clip['clip_id']}/1-99.safetensors", b"killed before the row was written")
    with platform.engines():
        outcome = run.outcome()
    assert outcome.ending is Ending.COMPLETED
    lost, done = platform.attempts(request)
    assert (lost["ended"], lost["resumed_step"], done["ended"]) == ("lost", None, "done")
    assert lost["owner"] != done["owner"], "another engine went on"
    assert kept["step"] <= done["resumed_step"] and done["resumed_step"] % 2 == 0
    assert platform.script.steps[LONG] == STEPS - done["resumed_step"], "it computed what was left, and no more"
    assert platform.checkpoints() == [] and platform.breaches() == []


def test_a_checkpoint_of_another_partition_is_not_gone_on_from(platform: Platform, told_by_usr1: None) -> None:
    run = platform.submit([LONG], steps=STEPS)
    stopped_at(platform, 3)
    before = platform.script.steps[LONG]
    platform.script.held.clear()
    with platform.engines(partition="tp=1"):
        request = run.outcome().request_id
    assert [each["resumed_step"] for each in platform.attempts(request)] == [None, None]
    assert platform.script.steps[LONG] == before + STEPS
    assert platform.checkpoints() == [] and platform.breaches() == []


def test_a_store_that_takes_no_checkpoints_costs_no_clip(platform: Platform) -> None:
    folder = platform.settings.home / "store" / "checkpoints"
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("not a folder")
    try:
        with platform.engines(checkpoint_steps=2):
            outcome, _ = platform.make(["a green cube"], steps=20)
    finally:
        folder.unlink()
    (clip,) = platform.clips(outcome.request_id)
    assert (clip["status"], clip["attempts"], clip["resumed_step"]) == ("done", 1, None)
    assert platform.breaches() == []


def test_two_engines_share_one_request(platform: Platform) -> None:
    lines = [f"a ball {k}" for k in range(8)]
    platform.settings = platform.settings.model_copy(update={"engines": 2})
    platform.script.held = dict.fromkeys(lines, 1)
    run = platform.submit(lines)
    owners = "select count(distinct owner) as n from shards where status = 'leased'"
    with platform.engines(2):
        wait_for(lambda: platform.sql(owners)[0]["n"] == 2, "both to have a shard")
        platform.script.held.clear()
        outcome = run.outcome()
    assert outcome.ending is Ending.COMPLETED
    attempts = platform.attempts(outcome.request_id)
    assert [each["ended"] for each in attempts] == ["done"] * 8, "each was rendered once"
    assert len({each["owner"] for each in attempts}) == 2
    assert platform.breaches() == []
