"""Bad input, as the form and the command show it; every other error of it is told in test_platform_input."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.stack import Stack

pytestmark = [pytest.mark.xdist_group("stack"), pytest.mark.timeout(900), pytest.mark.slow]


def test_the_run_says_everything_that_is_wrong_at_once_and_nothing_reaches_the_ledger(stack: Stack) -> None:
    lines = ["a red ball", {"prompt": "a blue ball", "frames": 50}, {"prompt": "a cube", "width": 72}]
    run = stack.submit(request=stack.request(lines))
    ended = stack.ended(run, state="BadInput")
    assert ended["state_type"] == "FAILED"
    said = ended["state"]["message"]
    assert "prompts:2: frames=50 must be 4n+1 (49 or 53)" in said
    assert "prompts:3: width=72 must be a multiple of 16 (64 or 80)" in said
    assert stack.artifacts(run)["bad-input"]["data"].count("frames=50") == 1
    assert stack.sql("select id from requests where flow_run_id = %s", run) == []


@pytest.mark.parametrize(
    "request_",
    [
        {"prompts": ["a ball"], "steps": 0},
        {"prompts": ["a ball"], "width": 72},
        {"prompts": ["a ball"], "guidance": "much"},
        {"prompts": ["a ball"], "solver": "magic"},
        {"prompts": ["a ball"], "colour": "red"},
    ],
    ids=lambda request: list(request)[1],
)
def test_the_form_itself_refuses(stack: Stack, request_: dict[str, Any]) -> None:
    """What the schema can tell is refused before there is a run."""
    with pytest.raises(AssertionError, match=r"create_flow_run: 4\d\d"):
        stack.submit(request={"model": str(stack.model), **request_})


@pytest.mark.chaos
def test_bad_lines_can_be_skipped(stack: Stack, tmp_path: Path) -> None:
    seed = stack.seed()
    mixed = [{"prompt": "a ball", "seed": seed}, {"prompt": "a ball", "frames": 50}, {"prompt": "a cube", "seed": seed}]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in mixed))
    said = stack.rushes("submit", str(tmp_path / "mixed.jsonl"), "--skip-invalid", "--watch", code=1)
    (request,) = set(re.findall(r"req_[0-9a-f]{12}", said))
    (run,) = set(re.findall(r"/runs/flow-run/([0-9a-f-]{36})", said))
    assert f"{request} completed with gaps: 2 done, 1 rejected" in said
    assert stack.ended(run, state="CompletedWithGaps")["state_type"] == "COMPLETED"
    assert stack.status_of(request) == "completed_with_gaps"
    clips = stack.clips(request)
    assert [clip["status"] for clip in clips] == ["done", "rejected", "done"]
    assert clips[1]["error"] == "frames=50 must be 4n+1 (49 or 53)"
    assert (clips[1]["line"], clips[1]["attempts"], clips[1]["object_key"]) == (2, 0, None)
