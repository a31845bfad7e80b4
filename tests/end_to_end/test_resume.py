"""Clips that go on in the middle: after an engine was told to stop, and after they gave way to others.

All of them come to the bytes of an undisturbed rendering. What is killed is in test_crashes.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.stack import LONG, PATIENCE, Stack, assert_as_if_undisturbed, finished, wait_for
from tests.tiny import tiny_model

pytestmark = [pytest.mark.xdist_group("stack two"), pytest.mark.timeout(900), pytest.mark.slow]

MEDIUM, FILM = LONG | {"steps": 60}, LONG | {"frames": 65, "steps": 120}  # some seconds, and half a minute
UNDER_WAY = "select 1 from clips where request_id = %s and resume_step >= %s"


@pytest.fixture(scope="module")
def keeps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack of its own, since how often engines keep what they have is a setting."""
    folder: Path = tmp_path_factory.mktemp("keeps")
    stack = Stack(
        home=folder / "home",
        model=tiny_model(folder / "tiny"),
        settings={"RUSHES_LINGER": "600", "RUSHES_LEASE_SECONDS": "15", "RUSHES_CHECKPOINT_STEPS": "2"},
    )
    with stack.up():
        yield stack


@pytest.mark.chaos
def test_a_store_that_takes_no_checkpoints_costs_no_clip(keeps: Stack) -> None:
    folder = keeps.home / "store" / "checkpoints"
    if folder.exists():
        folder.rename(folder.with_name("aside"))
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("not a folder")
    try:
        run = keeps.submit(request=keeps.request(["a green cube"], steps=60, seed=keeps.seed()))
        keeps.ended(run)
    finally:
        folder.unlink()
    (clip,) = keeps.clips(keeps.request_of(run))
    assert (clip["status"], clip["attempts"], clip["resumed_step"]) == ("done", 1, None)
    keeps.rushes("audit")


@pytest.mark.chaos
def test_a_higher_priority_goes_first_and_the_lower_one_loses_nothing(keeps: Stack) -> None:
    low = keeps.submit(request=keeps.request(["a blue cube"], **FILM, priority=1, seed=keeps.seed()))
    low_request = keeps.request_of(low)
    wait_for(lambda: keeps.sql(UNDER_WAY, low_request, 10), "the long clip to be under way")
    high = keeps.submit(request=keeps.request(["a green ball"], priority=9, seed=keeps.seed()))
    high_request = keeps.request_of(high)
    keeps.ended(high)
    assert keeps.statuses(low_request) != ["done"], "it waited for the long clip"
    keeps.ended(low)
    (first,), (given_way, went_on) = keeps.attempts(high_request), keeps.attempts(low_request)
    assert given_way["finished_at"] <= first["started_at"] < went_on["started_at"]
    assert (given_way["status"], given_way["error"], went_on["status"]) == ("released", None, "done")
    (clip,) = keeps.clips(low_request)
    assert 10 <= clip["resumed_step"] == went_on["resumed_step"]
    (tried,) = keeps.sql("select failures from clips where id = %s", clip["clip_id"])
    assert tried["failures"] == 0, "to give way is no try"
    assert_as_if_undisturbed(keeps, clip)


# --- told to stop -----------------------------------------------------------------------------------------------------

STEP = "select coalesce(max(resume_step), 0) as step from clips where request_id = %s"


@pytest.fixture(scope="module")
def keeps_at_the_end(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack whose engines keep a clip when they are told to stop, and at no other time."""
    folder: Path = tmp_path_factory.mktemp("stops")
    stack = Stack(
        home=folder / "home",
        model=tiny_model(folder / "tiny"),
        settings={
            "RUSHES_LINGER": "600",
            "RUSHES_LEASE_SECONDS": "15",
            "RUSHES_CHECKPOINT_STEPS": "0",
            "RUSHES_CHECKPOINT_SECONDS": "0",
        },
    )
    with stack.up():
        yield stack


def under_way(stack: Stack, request: str, attempt: int) -> None:
    """The clip is being rendered for the nth time."""
    running = "select 1 from attempts a join clips c on c.id = a.clip_id where c.request_id = %s and a.number = %s"
    wait_for(lambda: stack.sql(running + " and a.status = 'running'", request, attempt), "the clip to be under way")


def released_at(stack: Stack, request: str, attempt: int) -> int:
    """The step at which an engine that stopped had kept the clip."""
    ended = "select a.status::text from attempts a join clips c on c.id = a.clip_id where c.request_id = %s"
    ended += " and a.number = %s and a.status <> 'running'"
    (row,) = wait_for(lambda: stack.sql(ended, request, attempt), "the engine to give the clip back")
    assert row["status"] == "released"
    return int(stack.sql(STEP, request)[0]["step"])


def without_gpu(stack: Stack) -> None:
    """No worker of the stack starts engines."""
    if workers := stack.of_pool("gpu"):
        stack.kill(workers)


def assert_went_on(stack: Stack, request: str, kept: list[int]) -> None:
    """Every attempt went on where the one before had been told to stop, and none of them is charged to the clip."""
    attempts = stack.attempts(request)
    assert [attempt["status"] for attempt in attempts] == ["released"] * len(kept) + ["done"]
    assert [attempt["resumed_step"] for attempt in attempts] == [None, *kept]
    assert kept[0] > 0 and kept == sorted(set(kept))
    assert len({attempt["owner"] for attempt in attempts}) == len(attempts)
    (clip,) = stack.clips(request)
    assert stack.sql("select failures from clips where id = %s", clip["clip_id"]) == [{"failures": 0}]
    assert_as_if_undisturbed(stack, clip)


@pytest.mark.chaos
def test_an_engine_without_a_worker_keeps_what_it_is_at(stack: Stack) -> None:
    """A host is lost with its worker and its engine: `rushes engine` takes its place without Prefect.

    It is told to stop in the middle of a clip, and the next one goes on there.
    """
    without_gpu(stack)
    wait_for(lambda: not stack.ranks(), "the ranks to follow")
    stack.rushes("status", code=1)

    run = stack.submit(request=stack.request(["a blue cube"], **MEDIUM, seed=stack.seed()))
    request = stack.request_of(run)
    with stack.start("engine") as engine:
        under_way(stack, request, 1)
        engine.terminate()
        kept = [released_at(stack, request, 1)]
        engine.wait(timeout=PATIENCE)
    assert engine.returncode == 128 + signal.SIGTERM
    assert not stack.ranks(), "it ended its ranks when it left"
    assert " clips in " in stack.rushes("engine", "--linger", "3")
    assert not stack.ranks(), "it ended its ranks when it left"
    stack.ended(run)
    engines = "select flow_run_id, closed_at from engines where id = any(%s)"
    rows = stack.sql(engines, [attempt["engine"] for attempt in stack.attempts(request)])
    assert len(rows) == 2 and all(row["flow_run_id"] is None and row["closed_at"] is not None for row in rows)

    assert "gpu" in stack.rushes("up")
    stack.rushes("status")
    assert_went_on(stack, request, kept)


@pytest.mark.chaos
def test_engines_of_prefect_that_are_stopped_keep_what_they_are_at(keeps_at_the_end: Stack) -> None:
    stack = keeps_at_the_end
    run = stack.submit(request=stack.request(["a red ball moves left"], **FILM, seed=stack.seed()))
    request, kept = stack.request_of(run), list[int]()

    under_way(stack, request, 1)
    engine = stack.engine_run()
    stack.cancel(engine)
    kept.append(released_at(stack, request, 1))
    stack.ended(engine, state="Cancelled")

    under_way(stack, request, 2)
    for process in stack.processes_of(stack.engine_run()):
        process.send_signal(signal.SIGTERM)
    kept.append(released_at(stack, request, 2))

    under_way(stack, request, 3)
    stack.rushes("down")
    stack.rushes("up")
    kept.append(released_at(stack, request, 3))

    stack.ended(run)
    assert_went_on(stack, request, kept)


@pytest.mark.chaos
def test_an_engine_started_by_hand_keeps_what_it_is_at(keeps_at_the_end: Stack) -> None:
    stack = keeps_at_the_end
    without_gpu(stack)
    run = stack.submit(request=stack.request(["a blue cube"], **MEDIUM, seed=stack.seed()))
    request, kept = stack.request_of(run), list[int]()
    for attempt, told in enumerate((signal.SIGTERM, signal.SIGINT), 1):
        # A shell's background jobs, and so this test there, are deaf to SIGINT.
        with stack.start("engine", within=("env", "--default-signal=INT")) as engine:
            under_way(stack, request, attempt)
            engine.send_signal(told)
            kept.append(released_at(stack, request, attempt))
            engine.wait(timeout=PATIENCE)
        assert engine.returncode == {signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGINT: 130}[told]
        assert not stack.ranks()
    assert " clips in " in finished(stack.start("engine", "--linger", "3"))
    stack.ended(run)
    assert_went_on(stack, request, kept)


@pytest.mark.chaos
def test_a_worker_that_is_stopped_lets_its_engine_keep_what_it_is_at(keeps_at_the_end: Stack) -> None:
    stack = keeps_at_the_end
    without_gpu(stack)
    with stack.start("worker", "gpu") as worker:
        run = stack.submit(request=stack.request(["a green ball"], **MEDIUM, seed=stack.seed()))
        request = stack.request_of(run)
        under_way(stack, request, 1)
        worker.terminate()
        kept = [released_at(stack, request, 1)]
        worker.wait(timeout=PATIENCE)
    assert worker.returncode == 128 + signal.SIGTERM
    assert not stack.ranks()
    stack.rushes("up")
    stack.ended(run)
    assert_went_on(stack, request, kept)
