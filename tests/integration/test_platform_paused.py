"""A request that is paused and resumed, and one that is retried, by the buttons of its run's page and by the ledger."""

from __future__ import annotations

from sqlalchemy import text

from db.requests import cancel_request, pause_request, resume_request
from flows.generate.outcome import Ending
from flows.generate.page import Button
from tests.fake_renderer import Fault, Trouble
from tests.platform import Platform, wait_for

STEPS = 12
LONG = "a red ball moves left"
FEW = "a blue cube"


def test_suspended_it_holds_with_what_is_under_way_kept_and_resumed_it_goes_on(platform: Platform) -> None:
    """Others go on meanwhile, one that asks for the same clip among them: nothing waits for what is held."""
    platform.script.held[LONG] = 3
    run = platform.submit([LONG, FEW], steps=STEPS, name="long")
    request = platform.request_of(run)
    with platform.engines(micro_batch=1, checkpoint_steps=0, checkpoint_seconds=0):
        wait_for(lambda: platform.script.steps[LONG] == 3, "the clip to be under way")
        run.page.suspend_pressed = True
        outcome = run.outcome()
        assert outcome.ending is Ending.PAUSED and "0 of 2 clips are done" in outcome.message
        assert outcome.message.count(request) == 2
        assert "paused" in str(run.page.descriptions["0-status"]) and "rushes resume" in run.page.shown["0-status"]
        assert platform.statuses(request) == ["queued"] * 2
        assert platform.sql("select resume_step from clips where resume_step is not null") == [{"resume_step": 4}]
        assert platform.sql("select status from ask.requests") == [{"status": "paused"}]

        other, _ = platform.make([FEW, "a green ball"], steps=STEPS)
        assert other.ending is Ending.COMPLETED and platform.statuses(request) == ["queued"] * 2
        assert platform.script.attempts[FEW] == 1

        platform.script.held.clear()
        again = platform.submit([LONG, FEW], steps=STEPS, name="long", again=run, pressed=Button.RESUME)
        assert again.outcome().ending is Ending.COMPLETED
    assert [clip["reused"] for clip in platform.clips(request)] == [False, True]
    assert platform.script.steps[LONG] == STEPS, "no step was computed twice"
    assert [each["ended"] for each in platform.attempts(request)] == ["released", "done"]
    assert platform.breaches() == [] and platform.checkpoints() == []


def test_a_run_that_begins_with_a_paused_request_leaves_it_paused(platform: Platform) -> None:
    """As after a restart of the stack. What the ledger holds is claimed by nobody until it says otherwise."""
    run = platform.submit([FEW])
    request = platform.request_of(run)
    with platform.sessions.begin() as session:
        assert pause_request(session, request)
    assert run.outcome().ending is Ending.PAUSED
    with platform.engines():
        assert platform.submit([FEW], again=run).outcome().ending is Ending.PAUSED
        assert platform.submit([FEW]).outcome().ending is Ending.PAUSED, "asked for once more it stays as it is"
        assert platform.make(["a green ball"])[0].ending is Ending.COMPLETED
        assert platform.statuses(request) == ["queued"] and platform.script.attempts[FEW] == 0
        with platform.sessions.begin() as session:
            assert resume_request(session, request)
        assert platform.submit([FEW]).outcome().ending is Ending.COMPLETED


def test_retry_on_the_page_makes_what_failed_was_set_aside_or_cancelled(platform: Platform) -> None:
    """And what was done stays. Nothing is shown twice."""
    platform.script.trouble[LONG] = Trouble(Fault.FAILS, times=3)
    with platform.engines():
        run = platform.submit([LONG, FEW])
        first = run.outcome()
        request = first.request_id
        assert first.ending is Ending.COMPLETED_WITH_GAPS and platform.statuses(request) == ["quarantined", "done"]
        shown = set(run.page.shown)
        again = platform.submit([LONG, FEW], again=run, pressed=Button.RETRY).outcome()
        assert again.ending is Ending.COMPLETED and again.request_id == request
        assert f"request {request}: 1 clip queued again" in run.page.lines
        assert set(run.page.shown) == shown and platform.script.attempts[FEW] == 1


def test_retry_of_a_cancelled_request_and_of_one_that_was_refused(platform: Platform) -> None:
    refused = platform.submit(["a green ball"], frames=6)
    assert refused.outcome().ending is Ending.REFUSED
    run = platform.submit([FEW])
    request = platform.request_of(run)
    with platform.sessions.begin() as session:
        cancel_request(session, request)
    assert run.outcome().ending is Ending.CANCELLED
    with platform.engines():
        assert platform.submit([FEW], again=run, pressed=Button.RETRY).outcome().ending is Ending.COMPLETED
        assert platform.statuses(request) == ["done"]
        again = platform.submit(["a green ball"], frames=6, again=refused, pressed=Button.RETRY)
        assert again.outcome().ending is Ending.REFUSED, "it is read anew, and no better"


def test_retry_of_a_run_whose_request_another_one_has_taken_over(platform: Platform) -> None:
    platform.script.trouble[LONG] = Trouble(Fault.FAILS, times=6)
    with platform.engines():
        first = platform.submit([LONG])
        assert first.outcome().ending is Ending.FAILED
        second = platform.submit([LONG], again=first, pressed=Button.RETRY)
        assert second.outcome().ending is Ending.FAILED
        with platform.sessions.begin() as session:
            session.execute(text("update requests set flow_run_id = 'another'"))
        third = platform.submit([LONG], again=first, pressed=Button.RETRY)
        assert third.outcome().ending is Ending.COMPLETED


def test_an_engine_whose_run_is_paused_finishes_its_shard_and_claims_no_other(platform: Platform) -> None:
    run = platform.submit([LONG, FEW], priority=9)
    platform.submit(["a green ball"], frames=9, name="another shape")
    request = platform.request_of(run)
    wait_for(lambda: len(platform.sql("select id from shards")) >= 2, "both plans")
    done = platform.engine(held=lambda: platform.script.attempts[LONG] > 0)
    assert (done.shards, platform.statuses(request)) == (1, ["done"] * 2)
    assert len(platform.sql("select id from shards where status = 'queued'")) == 1
    assert any("its run is paused" in line for line in platform.said)
