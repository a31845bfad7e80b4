"""What was rendered once is never rendered again, whoever asks for it; test_platform_cache proves the rest of it."""

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
    double_click = stack.request(["a red ball slowly"], steps=SLOW, seed=stack.seed())
    wanted: dict[str, dict[str, Any]] = {
        "the same": stack.run(runs["form"])["parameters"]["request"],
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


def test_a_double_click_is_one_request(stack: Stack, again: dict[str, str]) -> None:
    requests = {request_in(stack.ended(again[name])["state"]["message"]) for name in ("click", "click again")}
    (request,) = requests
    assert [clip["attempts"] for clip in stack.clips(request)] == [1]


def run_in(said: str) -> str:
    (run,) = re.findall(r"/runs/flow-run/([0-9a-f-]{36})", said)
    return str(run)


@pytest.mark.parametrize("many", [2, pytest.param(20, marks=pytest.mark.chaos)])
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


@pytest.mark.chaos
def test_what_was_refused_may_be_submitted_again(stack: Stack, tmp_path: Path) -> None:
    file = tmp_path / "much.jsonl"
    file.write_text(json.dumps({"prompt": "a blue cube", "frames": 1, "samples": 2, "seed": stack.seed()}) + "\n")
    stack.rushes("tenants", "small", "--max-clips", "1")
    given = ("submit", str(file), "--tenant", "small", "--watch")
    refused = stack.rushes(*given, code=1)
    assert re.search(r"rushes: req_[0-9a-f]{12} was refused: tenant small may have 1 clips waiting", refused), refused
    assert stack.ended(run_in(refused), state="QuotaExceeded")
    stack.rushes("tenants", "small", "--max-clips", "2")
    said = stack.rushes(*given)
    assert "completed: 2 done" in said and run_in(said) != run_in(refused)
