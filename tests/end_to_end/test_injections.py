"""Prompts that are SQL, shell, HTML, Markdown or worse: stored and shown as themselves, everywhere."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from tests.end_to_end.stack import Stack, decode

pytestmark = [pytest.mark.xdist_group("stack"), pytest.mark.timeout(900), pytest.mark.slow]

PROMPTS = [
    "'); drop table clips; --",
    "' or '1'='1' union select * from pg_shadow --",
    "%s %(prompt)s :prompt {0} {prompt} ${HOME} %%",
    "$(touch /tmp/rushes-was-here) `id` ; rm -rf / & | > x",
    "<script>alert(1)</script><img src=x onerror=alert(2)>",
    "| a table | ``` [link](javascript:alert(1)) **bold** <!--",
    "=cmd|' /C calc'!A0",
    "\U0001f3a5\U0001f9d1\u200d\U0001f680 \u202eright to left\u202c \ufdfd 日本語 ẞ",
    "..\\..\\..\\etc\\passwd ../../../etc/passwd",
    '"quoted", with, commas\\ and \\n backslashes \\u0041',
    "[bold red]markup of the terminal[/bold red] \\[x]",
]


@pytest.mark.chaos
def test_a_prompt_is_shown_as_itself_everywhere(stack: Stack, tmp_path: Path) -> None:
    file = tmp_path / "hostile.jsonl"
    lines = [{"prompt": prompt, "frames": 1, "steps": 1, "seed": stack.seed() + k} for k, prompt in enumerate(PROMPTS)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = stack.rushes("submit", str(file), "--watch", "--no-rewrite", "--name", "<b>'; drop table clips; --</b>")
    request = said[said.index("req_") :][:16]
    clips = stack.clips(request)
    assert [clip["prompt"] for clip in clips] == PROMPTS
    assert {clip["status"] for clip in clips} == {"done"}
    assert not Path("/tmp/rushes-was-here").exists()

    for clip, prompt in zip(clips, PROMPTS, strict=True):
        _, metadata = decode(stack.blob(clip["object_key"]).read_bytes())
        assert metadata["title"] == prompt
    for clip in clips[-2:]:
        assert json.loads(stack.rushes("show", clip["clip_id"], "--format", "json"))["prompt"] == clip["prompt"]
    manifest = stack.blob(f"requests/{request}/manifest.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in manifest] == PROMPTS
    assert stack.blob(f"requests/{request}/contact_sheet.png").stat().st_size > 1000

    asked = ("history", "--request", request, "--columns", "prompt")
    assert [row["prompt"] for row in json.loads(stack.rushes(*asked, "--format", "json"))] == PROMPTS
    assert [row["prompt"] for row in csv.DictReader(io.StringIO(stack.rushes(*asked, "--format", "csv")))] == PROMPTS
    # What is searched for is a value too.
    found = json.loads(stack.rushes("history", "--request", request, "--prompt", PROMPTS[0], "--format", "json"))
    assert PROMPTS[0] in [row["prompt"] for row in found]
    exported = tmp_path / "out"
    stack.rushes("export", request, str(exported))
    assert len(list(exported.glob("*.png"))) >= len(PROMPTS)

    run = clips[0]["flow_run_id"]
    for artifact in stack.artifacts(run).values():
        data = artifact["data"] if isinstance(artifact["data"], str) else json.dumps(artifact["data"])
        assert "<script>" not in data and "javascript:" not in data and "<b>" not in data, artifact["key"]


def test_what_is_no_text_is_refused_with_its_place(stack: Stack, tmp_path: Path) -> None:
    file = tmp_path / "nul.jsonl"
    file.write_text('{"prompt": "a red ball"}\n{"prompt": "a\\u0000b"}\n{"prompt": "\\ud800"}\n')
    said = stack.rushes("submit", str(file), code=2)
    assert "nul.jsonl:2: " in said and "nul.jsonl:3: " in said and "nothing was submitted" in said
