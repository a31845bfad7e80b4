"""What was rendered once is never rendered again, whoever asks for it."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.stack import SLOW, Stack, finished

pytestmark = [pytest.mark.xdist_group("stack"), pytest.mark.timeout(900), pytest.mark.slow]


@pytest.fixture(scope="module")
def again(stack: Stack, runs: dict[str, str]) -> dict[str, str]:
    """Flow runs that ask for what is there already, or is being made; all submitted at once."""
    known = [json.loads(line) for line in stack.prompts(stack.request_of(runs["command"])).splitlines()]
    seed = stack.seed()
    one, two = ({"prompt": prompt, "seed": seed, "steps": SLOW} for prompt in ("a ball slowly", "a cube moves"))
    double_click = stack.request(["a red ball slowly"], steps=SLOW, seed=stack.seed())
    wanted: dict[str, dict[str, Any]] = {
        "the same": stack.run(runs["form"])["parameters"]["request"],
        "one line changed": stack.request([*known[:2], {**known[2], "prompt": "a green cube"}]),
        "first": stack.request([one, two, one], idempotency_key=f"{seed}-first"),
        "second": stack.request([one, two, one], key=f"{seed}-second"),
        "click": double_click,
        "click again": double_click,
    }
    return {name: stack.submit(request=request) for name, request in wanted.items()}


def request_in(message: str) -> str:
    (request,) = re.findall(r"req_[0-9a-f]{12}", message)
    return str(request)


def test_the_same_file_renders_nothing(
    stack: Stack, runs: dict[str, str], again: dict[str, str], tmp_path: Path
) -> None:
    form, command = stack.request_of(runs["form"]), stack.request_of(runs["command"])
    (tmp_path / "mine.jsonl").write_text(stack.prompts(command))
    said = stack.rushes("submit", str(tmp_path / "mine.jsonl"), "--watch")
    assert said == f"{command} is complete: all 4 clips were found, nothing is to be rendered\n"
    assert stack.ended(again["the same"])["state"]["message"] == f"{form}: 4 done (4 found, not rendered again)"
    assert stack.request_of(runs["form"]) == form, "the request is still known by the run that made it"
    for request in (form, command):
        assert [attempt["number"] for attempt in stack.attempts(request)] == [1] * 4


def test_a_changed_line_is_rendered(stack: Stack, runs: dict[str, str], again: dict[str, str]) -> None:
    message = stack.ended(again["one line changed"])["state"]["message"]
    request, before = request_in(message), stack.request_of(runs["command"])
    assert message == f"{request}: 4 done (3 found, not rendered again)"
    assert request != before
    clips, known = stack.clips(request), stack.clips(before)
    assert [clip["attempts"] for clip in clips] == [0, 0, 0, 1]
    assert [clip["found"] for clip in clips] == [True, True, True, False]
    assert [clip["sha256"] for clip in clips[:3]] == [clip["sha256"] for clip in known[:3]]
    assert clips[3]["sha256"] != known[3]["sha256"]


def test_one_recipe_is_rendered_once(stack: Stack, again: dict[str, str]) -> None:
    """Two requests at the same time with the same two clips, one of them twice in each."""
    requests = [request_in(stack.ended(again[name])["state"]["message"]) for name in ("first", "second")]
    assert len(set(requests)) == 2
    clips = [clip for request in requests for clip in stack.clips(request)]
    assert [clip["status"] for clip in clips] == ["done"] * 6
    recipes = {clip["recipe"] for clip in clips}
    assert len(recipes) == 2
    assert sum(clip["attempts"] for clip in clips) == 2
    assert sum(not clip["found"] for clip in clips) == 2
    for recipe in recipes:
        assert len({clip["sha256"] for clip in clips if clip["recipe"] == recipe}) == 1


def test_a_double_click_is_one_request(stack: Stack, again: dict[str, str]) -> None:
    requests = {request_in(stack.ended(again[name])["state"]["message"]) for name in ("click", "click again")}
    (request,) = requests
    assert [clip["attempts"] for clip in stack.clips(request)] == [1]


def run_in(said: str) -> str:
    (run,) = re.findall(r"/runs/flow-run/([0-9a-f-]{36})", said)
    return str(run)


@pytest.mark.parametrize("many", [4, pytest.param(20, marks=pytest.mark.chaos)])
def test_many_who_submit_at_once_share_one_flow_run(stack: Stack, tmp_path: Path, many: int) -> None:
    """Half of them cannot ask the ledger. No run begins before all have asked, however slow this machine is."""
    file = tmp_path / "shared.jsonl"
    file.write_text(json.dumps({"prompt": "a red ball moves left", "seed": stack.seed()}) + "\n")
    away = {"RUSHES_STORE_URL": (stack.home / "store").as_uri(), "RUSHES_PREFECT_UI_URL": "http://127.0.0.1:1"}
    away |= {"RUSHES_PREFECT_API_URL": stack.info()["prefect_api_url"], "RUSHES_HOME": str(tmp_path / "elsewhere")}
    stack.api("PATCH", "/work_pools/control", {"is_paused": True})
    try:
        given = ("submit", str(file), "--idempotency-key", f"shared-{stack.seed()}")
        with ExitStack() as theirs:  # one of them that fails leaves nothing of the others behind
            started = [theirs.enter_context(stack.start(*given, **(away if k % 2 else {}))) for k in range(many)]
            said = [finished(each) for each in started]
    finally:
        stack.api("PATCH", "/work_pools/control", {"is_paused": False})
    (run,) = {run_in(each) for each in said}
    assert sum("is under way already" in each for each in said) == many - 1
    stack.ended(run)
    request = stack.request_of(run)
    tagged = stack.api("POST", "/flow_runs/filter", {"flow_runs": {"tags": {"all_": [f"request:{request}"]}}})
    assert [each["id"] for each in tagged] == [run]
    assert [clip["attempts"] for clip in stack.clips(request)] == [1]

    # That run has ended, and so keeps nobody from asking again: here without a ledger that says it is complete.
    again = run_in(stack.rushes(*given, **away))
    assert again != run
    assert stack.ended(again)["state"]["message"] == f"{request}: 1 done (1 found, not rendered again)"


def test_what_was_refused_may_be_submitted_again(stack: Stack, tmp_path: Path) -> None:
    file = tmp_path / "much.jsonl"
    file.write_text(json.dumps({"prompt": "a blue cube", "frames": 1, "samples": 2, "seed": stack.seed()}) + "\n")
    stack.rushes("tenants", "small", "--max-clips", "1")
    given = ("submit", str(file), "--tenant", "small", "--watch")
    refused = [stack.rushes(*given, code=1) for _ in range(2)]
    for said in refused:
        assert re.search(r"rushes: req_[0-9a-f]{12} was refused: tenant small may have 1 clips waiting", said), said
        assert stack.ended(run_in(said), state="QuotaExceeded")
    assert run_in(refused[0]) != run_in(refused[1])
    stack.rushes("tenants", "small", "--max-clips", "2")
    said = stack.rushes(*given)
    assert "completed: 2 done" in said and run_in(said) not in map(run_in, refused)
