"""Clips that go on in the middle: after a kill, after an engine was told to stop, and after they gave way to others.

All of them come to the bytes of an undisturbed rendering.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.stack import Stack, finished, wait_for
from tests.tiny import tiny_model

pytestmark = [pytest.mark.xdist_group("stack"), pytest.mark.timeout(900), pytest.mark.slow]

LONG = {"width": 192, "height": 192, "frames": 33, "guidance": 4.0, "steps": 120}  # a quarter of a minute
UNDER_WAY = "select checkpoint, checkpoint_step as step from clips where request_id = %s and checkpoint_step >= %s"


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


def objects(stack: Stack) -> list[Path]:
    """Checkpoints in the store."""
    return [path for path in (stack.home / "store" / "checkpoints").rglob("*") if path.is_file()]


def assert_as_if_undisturbed(stack: Stack, clip: dict[str, Any]) -> None:
    """The same bytes come of the clip when nobody disturbs it; nothing is left of its checkpoints; all is sound."""
    said = stack.rushes("reproduce", clip["clip_id"], "--json")
    (again,) = json.JSONDecoder().raw_decode(said)[0]
    assert again["verdict"].startswith("identical"), again
    wait_for(lambda: not objects(stack), "the checkpoints to be deleted", seconds=30)
    stack.rushes("audit")


def test_a_killed_engine_s_clip_goes_on_in_another(keeps: Stack) -> None:
    run = keeps.submit(request=keeps.request(["a red ball moves left"], **LONG, seed=keeps.seed()))
    request = keeps.request_of(run)
    (kept,) = wait_for(lambda: keeps.sql(UNDER_WAY, request, 20), "a checkpoint in the middle")
    engine = keeps.engine_run()
    keeps.kill(keeps.processes_of(engine))
    assert len(objects(keeps)) <= 2, "older ones are deleted"
    keeps.ended(run)
    (clip,) = keeps.clips(request)
    lost, done = keeps.attempts(request)
    assert (lost["status"], lost["resumed_step"], done["status"]) == ("lost", None, "done")
    assert lost["owner"] != done["owner"], "another engine went on"
    assert clip["status"] == "done" and kept["step"] <= clip["resumed_step"] == done["resumed_step"]
    assert clip["resumed_step"] % 2 == 0
    assert_as_if_undisturbed(keeps, clip)


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


def test_a_higher_priority_goes_first_and_the_lower_one_loses_nothing(keeps: Stack) -> None:
    low = keeps.submit(request=keeps.request(["a blue cube"], **LONG | {"frames": 65}, priority=1, seed=keeps.seed()))
    low_request = keeps.request_of(low)
    wait_for(lambda: keeps.sql(UNDER_WAY, low_request, 10), "the long clip to be under way")
    high = keeps.submit(request=keeps.request(["a green ball"], priority=9, seed=keeps.seed()))
    high_request = keeps.request_of(high)
    keeps.ended(high)
    assert keeps.statuses(low_request) != ["done"], "it waited for the long clip"
    keeps.ended(low)
    (first,), (given_way, went_on) = keeps.attempts(high_request), keeps.attempts(low_request)
    assert given_way["finished_at"] <= first["started_at"] <= first["finished_at"] <= went_on["started_at"]
    assert (given_way["status"], given_way["error"], went_on["status"]) == ("released", None, "done")
    (clip,) = keeps.clips(low_request)
    assert 10 <= clip["resumed_step"] == went_on["resumed_step"]
    (tried,) = keeps.sql("select tries from clips where id = %s", clip["clip_id"])
    assert tried["tries"] == 0, "to give way is no try"
    assert_as_if_undisturbed(keeps, clip)


# --- told to stop -----------------------------------------------------------------------------------------------------

STEP = "select coalesce(max(checkpoint_step), 0) as step from clips where request_id = %s"


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
    assert stack.sql("select tries from clips where id = %s", clip["clip_id"]) == [{"tries": 0}]
    assert_as_if_undisturbed(stack, clip)


def test_engines_of_prefect_that_are_stopped_keep_what_they_are_at(keeps_at_the_end: Stack) -> None:
    stack = keeps_at_the_end
    long = LONG | {"frames": 65}
    run = stack.submit(request=stack.request(["a red ball moves left"], **long, seed=stack.seed()))
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


def test_an_engine_started_by_hand_keeps_what_it_is_at(keeps_at_the_end: Stack) -> None:
    stack = keeps_at_the_end
    without_gpu(stack)
    run = stack.submit(request=stack.request(["a blue cube"], **LONG, seed=stack.seed()))
    request, kept = stack.request_of(run), list[int]()
    for attempt, told in enumerate((signal.SIGTERM, signal.SIGINT), 1):
        # A shell's background jobs, and so this test there, are deaf to SIGINT.
        with stack.start("engine", within=("env", "--default-signal=INT")) as engine:
            under_way(stack, request, attempt)
            engine.send_signal(told)
            kept.append(released_at(stack, request, attempt))
            engine.wait(timeout=60)
        assert engine.returncode == {signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGINT: 130}[told]
        assert not stack.ranks()
    assert " clips in " in finished(stack.start("engine", "--linger", "3"))
    stack.ended(run)
    assert_went_on(stack, request, kept)


def test_a_worker_that_is_stopped_lets_its_engine_keep_what_it_is_at(keeps_at_the_end: Stack) -> None:
    stack = keeps_at_the_end
    without_gpu(stack)
    with stack.start("worker", "gpu") as worker:
        run = stack.submit(request=stack.request(["a green ball"], **LONG, seed=stack.seed()))
        request = stack.request_of(run)
        under_way(stack, request, 1)
        worker.terminate()
        kept = [released_at(stack, request, 1)]
        worker.wait(timeout=60)
    assert worker.returncode == 128 + signal.SIGTERM
    assert not stack.ranks()
    stack.rushes("up")
    stack.ended(run)
    assert_went_on(stack, request, kept)
