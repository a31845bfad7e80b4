"""Ranks that die, hang or run out of memory: what it costs the clip that they were at, and its neighbours nothing."""

from __future__ import annotations

import pytest

from db.requests import cancel_request, retry_request
from db.tables import MAX_LOST_ATTEMPTS, ClipStatus
from flows.generate.outcome import Ending
from flows.generate.publish import publish_cancelled
from flows.generate.status import as_text
from flows.render import clip as clips_to_files
from flows.render.worker import EngineUnfit
from model.engine.clip import RankDied
from tests.fake_renderer import Fault, Trouble
from tests.platform import Platform, RecordedPage, wait_for

LINES = ["a red ball", "a green ball", "a blue ball", "a blue cube"]


def failures(platform: Platform, request: str | None) -> list[tuple[str, str | None]]:
    """How each attempt that was not done has ended, and the kind of its error."""
    ended = [(each["ended"], each["error_class"]) for each in platform.attempts(request)]
    return [each for each in ended if each[0] != "done"]


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        (Fault.KILLS, "rank_died", "died (killed by SIGKILL)"),
        (Fault.HANGS, "rank_hung", "no step for 0.3 s"),
        (Fault.FAILS, "render_failed", "the pixels are not finite"),
    ],
)
def test_a_poison_clip_is_quarantined_and_its_neighbours_are_done(
    platform: Platform, fault: Fault, kind: str, said: str
) -> None:
    """One clip always ends the ranks, one of them once. Each time costs one attempt, of that clip alone."""
    platform.script.trouble = {LINES[0]: Trouble(fault, at=3), LINES[1]: Trouble(fault, times=1)}
    with platform.engines():
        outcome, page = platform.make(LINES)
        assert outcome.ending is Ending.COMPLETED_WITH_GAPS
        assert outcome.message == f"{outcome.request_id}: 3 done, 1 quarantined (0 found, not rendered again)"
        clips = platform.clips(outcome.request_id)
        assert [clip["status"] for clip in clips] == ["quarantined", "done", "done", "done"]
        assert [clip["attempts"] for clip in clips] == [3, 2, 1, 1]
        assert said in clips[0]["error"]
        assert failures(platform, outcome.request_id) == [("failed", kind)] * 4
        assert "completed with gaps" in page.shown["summary"]
        status = page.shown["0-status"]
        assert page.descriptions["0-status"] == "3 of 4 clips, 1 failed."
        cause = f"| 1 | {as_text(kind)} | {as_text(str(clips[0]['error']).splitlines()[0])} | "
        assert cause + f"[{clips[0]['clip_id']}](" in status and f"`rushes retry {outcome.request_id}`" in status
        if fault is not Fault.FAILS:
            assert platform.script.starts == 5, "one engine started its ranks again, each time"
        assert len({attempt["owner"] for attempt in platform.attempts(outcome.request_id)}) == 1

        with platform.sessions.begin() as session:
            assert retry_request(session, str(outcome.request_id), [ClipStatus.QUARANTINED]) == 1
        platform.script.trouble.clear()
        again, _ = platform.make(LINES)
    assert again.request_id == outcome.request_id and again.ending is Ending.COMPLETED
    assert [clip["attempts"] for clip in platform.clips(again.request_id)] == [4, 2, 1, 1]
    assert platform.breaches() == []


def test_out_of_memory_costs_no_attempt_while_fewer_clips_at_a_time_fit(platform: Platform) -> None:
    platform.script.trouble = {LINES[0]: Trouble(Fault.OUT_OF_MEMORY)}
    with platform.engines(micro_batch=4):
        outcome, _ = platform.make(LINES)
    assert outcome.ending is Ending.COMPLETED
    assert [clip["attempts"] for clip in platform.clips(outcome.request_id)] == [1] * 4
    assert platform.script.starts == 3, "four at a time, two, one"


def test_ranks_that_die_without_one_clip_between_end_their_engine(platform: Platform) -> None:
    """It gives up after five restarts in a row; what it had not begun is still there for another one."""
    lines = [f"a ball {k}" for k in range(7)]
    platform.script.trouble = {line: Trouble(Fault.KILLS, times=1) for line in lines}
    run = platform.submit(lines)
    platform.request_of(run)
    with pytest.raises(RankDied, match="the ranks ended 6 times without one finished clip"):
        platform.engine()
    with platform.engines():
        outcome = run.outcome()
    assert outcome.ending is Ending.COMPLETED
    assert failures(platform, outcome.request_id) == [("failed", "rank_died")] * 7, "one attempt each"
    assert platform.breaches() == []


def charged(platform: Platform, request: str | None) -> set[tuple[int, int]]:
    """The failures and lost attempts of a request's clips."""
    rows = platform.sql("select failures, lost_attempts from clips where request_id = :id", id=request)
    return {(row["failures"], row["lost_attempts"]) for row in rows}


@pytest.mark.parametrize(
    ("fault", "said"), [(Fault.FAILS, "the pixels are not finite"), (Fault.DEVICE, "uncorrectable ECC error")]
)
def test_an_engine_that_cannot_render_stops_and_charges_no_clip(platform: Platform, fault: Fault, said: str) -> None:
    """Whatever it is given fails. It tries three clips of many, and a plain one, then stops; others go on."""
    lines = [f"a ball {k}" for k in range(12)]
    platform.script.broken = fault
    run = platform.submit(lines)
    request = platform.request_of(run)
    for _ in range(MAX_LOST_ATTEMPTS + 1):
        before = platform.script.attempts.total()
        with pytest.raises(EngineUnfit, match=said):
            platform.engine()
        assert platform.script.attempts.total() - before <= 4
        assert charged(platform, request) == {(0, 0)}
    platform.script.broken = None
    with platform.engines():
        assert run.outcome().ending is Ending.COMPLETED
    assert {each["ended"] for each in platform.attempts(request)} == {"released", "done"}
    assert platform.breaches() == []


def test_an_engine_that_cannot_encode_stops_and_charges_no_clip(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> bytes:
        raise OSError("libx264 is not there")

    run = platform.submit(LINES)
    with monkeypatch.context() as without:
        without.setattr(clips_to_files, "encode_mp4", refuses)
        with pytest.raises(EngineUnfit, match=r"so did a plain one .*libx264 is not there"):
            platform.engine()
    assert charged(platform, platform.request_of(run)) == {(0, 0)}
    with platform.engines():
        assert run.outcome().ending is Ending.COMPLETED


def test_a_request_of_clips_that_the_model_refuses_ends_no_engine(platform: Platform) -> None:
    """All that it is given fails, and a plain clip does not: these clips are at fault."""
    lines = [f"a ball {k}" for k in range(7)]
    platform.script.trouble = dict.fromkeys(lines, Trouble(Fault.FAILS))
    with platform.engines():
        outcome, _ = platform.make(lines)
    assert platform.statuses(outcome.request_id) == ["quarantined"] * 7
    assert failures(platform, outcome.request_id) == [("failed", "render_failed")] * 21
    assert platform.breaches() == []


def test_a_device_error_is_a_lost_attempt_and_the_engine_goes_on(platform: Platform) -> None:
    platform.script.trouble = {LINES[1]: Trouble(Fault.DEVICE, times=2)}
    with platform.engines():
        outcome, _ = platform.make(LINES)
    assert outcome.ending is Ending.COMPLETED
    assert failures(platform, outcome.request_id) == [("lost", "device_error")] * 2
    assert charged(platform, outcome.request_id) == {(0, 0), (0, 2)}
    assert len({each["owner"] for each in platform.attempts(outcome.request_id)}) == 1
    assert platform.script.starts == 3 and platform.breaches() == []


def test_what_is_cancelled_and_retried_within_a_beat_is_not_rendered_twice(platform: Platform) -> None:
    """The engine lets go of the old shard, whose clips are in none by then; they are rendered once, in the new one."""
    lines = [f"a blue ball {k}" for k in range(3)]
    platform.script.held[lines[0]] = 3
    run = platform.submit(lines, steps=20)
    with platform.engines(micro_batch=1):
        request = platform.request_of(run)
        wait_for(lambda: platform.script.steps[lines[0]] == 3, "the first clip to be under way")
        with platform.sessions.begin() as session:
            assert cancel_request(session, request) == 3
            assert retry_request(session, request) == 3
        wait_for(lambda: platform.script.attempts[lines[0]] == 2, "it to be begun anew, and the old attempt left")
        platform.script.held.clear()
        assert run.outcome().ending is Ending.COMPLETED
    computed = [platform.script.steps[line] for line in lines]
    assert computed[0] in (23, 24) and computed[1:] == [20, 20], "at most the step that was under way"
    assert sorted(each["ended"] for each in platform.attempts(request)) == ["cancelled", "done", "done", "done"]
    assert platform.breaches() == []


def test_cancelled_clips_stop_at_their_next_step(platform: Platform) -> None:
    """What is done stays; the engine takes what comes next; submitted again, only the rest is made."""
    lines = [f"a blue ball {k}" for k in range(6)]
    platform.script.held[lines[1]] = 3
    run = platform.submit(lines, steps=20)
    with platform.engines():
        request = platform.request_of(run)
        wait_for(lambda: platform.script.steps[lines[1]] == 3, "the second clip to be under way")
        wait_for(lambda: "done" in platform.statuses(request), "the first one to be recorded")
        with platform.sessions.begin() as session:
            cancelled = cancel_request(session, request)
        outcome = run.outcome()
        assert outcome.ending is Ending.CANCELLED
        statuses = platform.statuses(request)
        page = RecordedPage()
        publish_cancelled(platform.sessions, platform.store, page, request)  # as where its run was killed
        for shown in (run.page.shown, page.shown):
            assert {"0-status", "clips", "summary", "contact-sheet"} <= set(shown)
            assert (
                shown["clips"].startswith("# 1 of 6 clips\n") and "| 1 | 0 | 0 | 5 | 0 | 0 | 6 |" in shown["0-status"]
            )
        assert page.lines == [outcome.message] == [f"{request}: 5 cancelled, 1 done (0 found, not rendered again)"]
        other, _ = platform.make(["a green cube"])
        assert other.ending is Ending.COMPLETED, "the same engine takes what comes next"
        computed = [platform.script.steps[line] for line in lines]
        assert computed in ([20, 3, 0, 0, 0, 0], [20, 4, 0, 0, 0, 0]), "at most the step that was under way"
        assert (statuses, cancelled) == (["done", *["cancelled"] * 5], 5)
        assert platform.statuses(request) == statuses, "nothing came of it later"
        assert {each["ended"] for each in platform.attempts(request)} <= {"done", "cancelled"}

        made = {each["clip_id"]: each for each in platform.attempts(request) if each["ended"] == "done"}
        platform.script.held.clear()
        again, _ = platform.make(lines, steps=20)
        assert (again.request_id, again.ending) == (request, Ending.COMPLETED)
        done = {each["clip_id"]: each for each in platform.attempts(request) if each["ended"] == "done"}
        assert len(done) == 6 and made.items() <= done.items(), "what was done before was not made again"
    assert platform.breaches() == []
