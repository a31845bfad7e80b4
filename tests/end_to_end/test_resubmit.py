"""What was rendered once is never rendered again, whoever asks for it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.end_to_end.house import House

pytestmark = [pytest.mark.xdist_group("stack"), pytest.mark.timeout(900), pytest.mark.slow]


def test_the_same_again_and_almost_the_same(house: House, runs: dict[str, str], tmp_path: Path) -> None:
    """Submitted again, a file renders nothing; with one line changed, it renders that line."""
    form = house.run(runs["form"])["parameters"]["request"]
    request = house.request_of(runs["form"])
    before = house.attempts(request)
    command = house.request_of(runs["command"])
    lines = [json.loads(line) for line in house.prompts(command).splitlines()]
    changed = house.request([*lines[:2], {**lines[2], "prompt": "a green cube"}])

    again, almost = house.submit(request=form), house.submit(request=changed)
    (tmp_path / "mine.jsonl").write_text(house.prompts(command))
    said = house.rushes("submit", str(tmp_path / "mine.jsonl"), "--watch")
    assert said == f"{command} is complete: all 4 clips were found, nothing is to be rendered\n"

    assert house.ended(again)["state"]["message"] == f"{request}: 4 done (4 found, not rendered again)"
    assert house.request_of(runs["form"]) == request, "the request is still known by the run that made it"
    assert house.attempts(request) == before

    state = house.ended(almost)["state"]
    other = house.request_of(almost)
    assert other not in (request, command)
    assert state["message"] == f"{other}: 4 done (3 found, not rendered again)"
    clips, known = house.clips(other), house.clips(command)
    assert [clip["attempts"] for clip in clips] == [0, 0, 0, 1]
    assert [clip["found"] for clip in clips] == [True, True, True, False]
    assert [clip["sha256"] for clip in clips[:3]] == [clip["sha256"] for clip in known[:3]]
    assert clips[3]["sha256"] != known[3]["sha256"]


def test_one_recipe_is_rendered_once(house: House) -> None:
    """Two requests at the same time with the same clips, one of them twice in each: every recipe has one attempt."""
    seed = house.seed()
    one, two = ({"prompt": prompt, "seed": seed, "steps": 100} for prompt in ("a ball slowly", "a cube moves"))
    both = [house.submit(request=house.request([one, two, one], key=f"{seed}-{key}")) for key in ("a", "b")]
    for run in both:
        house.ended(run)
    requests = [house.request_of(run) for run in both]
    assert len(set(requests)) == 2
    clips = [clip for request in requests for clip in house.clips(request)]
    assert {clip["status"] for clip in clips} == {"done"}
    recipes = {clip["recipe"] for clip in clips}
    assert len(recipes) == 2
    assert sum(clip["attempts"] for clip in clips) == 2
    assert sum(not clip["found"] for clip in clips) == 2
    for recipe in recipes:
        assert len({clip["sha256"] for clip in clips if clip["recipe"] == recipe}) == 1


def test_the_same_run_twice_at_once(house: House) -> None:
    """A double click on Run: two flow runs, one request."""
    form = house.request(["a red ball slowly"], steps=50, seed=house.seed())
    both = [house.submit(request=form), house.submit(request=form)]
    said = {re.findall(r"req_[0-9a-f]{12}", house.ended(run)["state"]["message"])[0] for run in both}
    (request,) = said
    assert [clip["attempts"] for clip in house.clips(request)] == [1]
