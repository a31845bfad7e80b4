"""A step cache, from the prompt file to the history: an ordinary setting, and another rendering."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.stack import Stack

pytestmark = [pytest.mark.xdist_group("stack"), pytest.mark.timeout(900), pytest.mark.slow]


@pytest.mark.chaos
def test_a_step_cache_is_asked_for_in_the_file_or_for_all_of_it_and_history_tells_what_it_did(
    stack: Stack, tmp_path: Path
) -> None:
    """A line's own goes before that of the file."""
    line: dict[str, Any] = {"prompt": "a red ball moves left", "seed": stack.seed(), "steps": 8}
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps({**line, **more}) + "\n" for more in ({}, {"step_cache": 1e-9})))
    said = stack.rushes("submit", str(file), "--step-cache", "1", "--watch")
    (request,) = set(re.findall(r"req_[0-9a-f]{12}", said))
    clips = stack.clips(request)
    assert [(clip["step_cache"], clip["skipped_steps"]) for clip in clips] == [(1.0, 6), (1e-9, 0)]
    assert len({clip["recipe"] for clip in clips}) == len({clip["sha256"] for clip in clips}) == 2
    told = json.loads(stack.rushes("show", clips[0]["clip_id"], "--format", "json"))
    assert (told["step_cache"], told["skipped_steps"]) == (1.0, 6)

    wrong = stack.rushes("submit", str(file), "--step-cache", "2", code=2)
    assert re.search(r"step.cache", wrong)
