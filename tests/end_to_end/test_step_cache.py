"""A step cache, from the prompt file to the history: an ordinary setting, and another rendering."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.stack import Stack

pytestmark = [pytest.mark.xdist_group("stack"), pytest.mark.timeout(900), pytest.mark.slow]


def test_a_step_cache_is_asked_for_in_the_file_or_for_all_of_it_and_history_tells_what_it_did(
    stack: Stack, tmp_path: Path
) -> None:
    line: dict[str, Any] = {"prompt": "a red ball moves left", "seed": stack.seed(), "steps": 8}
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({**line, **more}) + "\n" for more in ({}, CACHED)))
    mixed = clips_of(stack, stack.rushes("submit", str(tmp_path / "lines.jsonl"), "--watch"))
    assert [(clip["step_cache"], clip["skipped_steps"]) for clip in mixed] == [(None, None), (1.0, 6)]
    assert len({clip["recipe"] for clip in mixed}) == len({clip["sha256"] for clip in mixed}) == 2

    (tmp_path / "plain.jsonl").write_text(json.dumps(line) + "\n")
    said = stack.rushes("submit", str(tmp_path / "plain.jsonl"), "--step-cache", "1", "--watch")
    assert "completed: 1 done, 1 of them found" in said, "the recipe is that of the second line"
    told = json.loads(stack.rushes("show", mixed[1]["clip_id"], "--format", "json"))
    assert (told["step_cache"], told["skipped_steps"]) == (1.0, 6)

    wrong = stack.rushes("submit", str(tmp_path / "plain.jsonl"), "--step-cache", "2", code=2)
    assert re.search(r"step.cache", wrong)


CACHED = {"step_cache": 1}


def clips_of(stack: Stack, said: str) -> list[dict[str, Any]]:
    (request,) = set(re.findall(r"req_[0-9a-f]{12}", said))
    return stack.clips(request)
