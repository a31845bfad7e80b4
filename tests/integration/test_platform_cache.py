"""A recipe is rendered once, whoever asks for it, and however many ask at once."""

from __future__ import annotations

from collections import Counter

from flows.generate.outcome import Ending
from tests.platform import Platform, wait_for


def test_resubmission_renders_nothing_and_a_changed_line_once(platform: Platform) -> None:
    lines = ["a red ball", {"prompt": "a blue cube", "samples": 2}, "a green cone"]
    with platform.engines():
        first, page = platform.make(lines)
        assert (first.ending, first.cache_hits) == (Ending.COMPLETED, 0)
        assert first.message == f"{first.request_id}: 4 done (0 found, not rendered again)"
        assert "| 4 | 0 | 0 | 0 | 0 | 4 |" in page.shown["0-status"]
        made = platform.clips(first.request_id)

        again, _ = platform.make(lines)
        assert again.message == f"{first.request_id}: 4 done (4 found, not rendered again)"
        assert platform.clips(first.request_id) == made
        assert [attempt["number"] for attempt in platform.attempts(first.request_id)] == [1] * 4

        changed, page = platform.make([*lines[:2], "a yellow cone"])
        assert changed.message == f"{changed.request_id}: 4 done (3 found, not rendered again)"
        assert changed.request_id != first.request_id
        assert "3 of 4 clips were found, not rendered again" in page.shown["summary"]
        clips = platform.clips(changed.request_id)
        assert [clip["attempts"] for clip in clips] == [0, 0, 0, 1]
        assert [clip["sha256"] for clip in clips[:3]] == [clip["sha256"] for clip in made[:3]]
        assert clips[3]["sha256"] not in {clip["sha256"] for clip in made}
        assert platform.statuses(first.request_id) == ["done"] * 4
    expected = {"a red ball": 1, "a blue cube": 2, "a green cone": 1, "a yellow cone": 1}
    assert platform.script.attempts == Counter(expected)
    assert platform.breaches() == []


def test_two_requests_at_once_render_a_shared_recipe_once(platform: Platform) -> None:
    """Each has the same two recipes, one of them twice; two engines are at work."""
    lines = ["a ball slowly", "a cube moves", "a ball slowly"]
    platform.script.held = dict.fromkeys(lines, 1)
    runs = [platform.submit(lines, idempotency_key=key) for key in ("first", "second")]
    with platform.engines(2):
        wait_for(lambda: platform.script.attempts, "a clip to be under way")
        for run in runs:
            platform.request_of(run)
        platform.script.held.clear()
        outcomes = [run.outcome() for run in runs]
    assert len({outcome.request_id for outcome in outcomes}) == 2
    clips = [clip for outcome in outcomes for clip in platform.clips(outcome.request_id)]
    assert [clip["status"] for clip in clips] == ["done"] * 6
    recipes = {clip["recipe"] for clip in clips}
    assert len(recipes) == 2 and sum(clip["attempts"] for clip in clips) == 2
    for recipe in recipes:
        assert len({clip["sha256"] for clip in clips if clip["recipe"] == recipe}) == 1
    assert platform.script.attempts == Counter({"a ball slowly": 1, "a cube moves": 1})
    assert platform.breaches() == []


def test_twenty_makers_of_one_request_make_one_request(platform: Platform) -> None:
    runs = [platform.submit(["a red ball", "a blue cube"]) for _ in range(20)]
    with platform.engines(2):
        outcomes = [run.outcome() for run in runs]
    (request,) = {outcome.request_id for outcome in outcomes}
    assert {outcome.ending for outcome in outcomes} == {Ending.COMPLETED}
    assert platform.sql("select id from requests") == [{"id": request}]
    assert [clip["attempts"] for clip in platform.clips(request)] == [1, 1]
    assert sum(any("ask about it with" in line for line in run.page.lines) for run in runs) == 1, "one opened it"
    assert platform.breaches() == []


def test_a_fresh_request_is_rendered_again_and_once(platform: Platform) -> None:
    with platform.engines():
        first, _ = platform.make(["a red ball"])
        fresh, _ = platform.make(["a red ball"], fresh=True)
    assert fresh.request_id != first.request_id and fresh.cache_hits == 0
    assert platform.script.attempts["a red ball"] == 2
