"""Bad input through the form: the run says everything that is wrong at once, and nothing of it reaches the ledger."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.end_to_end.stack import Stack

pytestmark = [pytest.mark.xdist_group("stack"), pytest.mark.timeout(900), pytest.mark.slow]

BAD_FILE = b"""{"prompt": "a red ball", "frames": 50}
{"prompt": "a red ball", "size": "65x64", "seed": -1}
{"prompt": " "}
{"prompt": "a red ball", "custom_id": "one"}
{"prompt": "a blue ball", "custom_id": "one"}
{"prompt": "a ball", "guidance": NaN}
{"prompt": "a ball", "colour": "red"}
{"prompt": "caf\xe9"}
{"prompt": 7}
"""
# Place, value and bound of every error in it.
SAID = [
    ("bad.jsonl:1: ", "frames=50 must be 4n+1 (49 or 53)"),
    ("bad.jsonl:2: ", "size=65x64: width 65 must be a multiple of 16 (64 or 80)"),
    ("bad.jsonl:2: ", "seed=-1 must be between 0 and 9223372036854775807"),
    ("bad.jsonl:3: ", "prompt is blank"),
    ("bad.jsonl:5: ", 'custom_id="one" is already the id of line 4'),
    ("bad.jsonl:6: ", "guidance=NaN must be a number between 1 and 30"),
    ("bad.jsonl:7: ", 'unknown key "colour": known are clip, custom_id,'),
    ("bad.jsonl:8: ", "byte 0xe9 at column 16 is not UTF-8"),
    ("bad.jsonl:9: ", "prompt=7 must be a text"),
]


@pytest.fixture(scope="module")
def refused(stack: Stack) -> dict[str, str]:
    """Flow runs of requests with something bad in them, all submitted at once."""
    folder = stack.home / "prompts"
    folder.mkdir(exist_ok=True)
    (folder / "bad.jsonl").write_bytes(BAD_FILE)
    seed = stack.seed()
    mixed = [{"prompt": "a ball", "seed": seed}, {"prompt": "a ball", "frames": 50}, {"prompt": "a cube", "seed": seed}]
    (folder / "mixed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in mixed))
    wanted = {
        "inline": stack.request(["a red ball", {"prompt": "a blue ball", "frames": 50}], width=72),
        "file": {"model": str(stack.model), "prompts_uri": "bad.jsonl"},
        "outside": {"model": str(stack.model), "prompts_uri": "../stack.json"},
        "gone": {"model": str(stack.model), "prompts_uri": "store:prompts/nothing"},
        "skipped": {"model": str(stack.model), "prompts_uri": "mixed.jsonl", "skip_invalid": True},
    }
    return {name: stack.submit(request=request) for name, request in wanted.items()}


def message(stack: Stack, run: str) -> str:
    """Why the run failed; asserts that it left nothing in the ledger."""
    ended = stack.ended(run, state="BadInput")
    assert ended["state_type"] == "FAILED"
    assert stack.sql("select id from requests where flow_run_id = %s", run) == []
    return str(ended["state"]["message"])


def test_inline_prompts(stack: Stack, refused: dict[str, str]) -> None:
    said = message(stack, refused["inline"])
    assert "prompts:2: frames=50 must be 4n+1 (49 or 53)" in said
    assert "width=72 must be a multiple of 16 (64 or 80)" in said, "of the request itself, not of a line"
    assert stack.artifacts(refused["inline"])["bad-input"]["data"].count("frames=50") == 1


def test_every_error_of_a_file(stack: Stack, refused: dict[str, str]) -> None:
    first, *lines = message(stack, refused["file"]).splitlines()
    assert first == f"{len(SAID)} errors: nothing was submitted"
    for place, bound in SAID:
        assert any(line.startswith(place) and bound in line for line in lines), (place, bound, lines)


def test_a_file_that_may_not_be_read(stack: Stack, refused: dict[str, str]) -> None:
    said = message(stack, refused["outside"])
    assert "prompts folder" in said
    assert "database_url" not in said, "nothing of the file itself"


def test_a_file_that_is_not_there(stack: Stack, refused: dict[str, str]) -> None:
    assert "prompts/nothing" in message(stack, refused["gone"])


@pytest.mark.parametrize(
    "request_",
    [
        {"prompts": ["a ball"], "steps": 0},
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


def test_bad_lines_can_be_skipped(stack: Stack, refused: dict[str, str]) -> None:
    run = stack.ended(refused["skipped"], state="CompletedWithGaps")
    assert run["state_type"] == "COMPLETED"
    request_id = stack.request_of(run["id"])
    assert stack.status_of(request_id) == "completed_with_gaps"
    clips = stack.clips(request_id)
    assert [clip["status"] for clip in clips] == ["done", "rejected", "done"]
    assert clips[1]["error"] == "frames=50 must be 4n+1 (49 or 53)"
    assert (clips[1]["line"], clips[1]["attempts"], clips[1]["object_key"]) == (2, 0, None)
