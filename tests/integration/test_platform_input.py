"""What is asked for and what comes of it: N prompts in, N clips out; bad input is refused as a whole, or skipped."""

from __future__ import annotations

import hashlib
import json
import re
from html import unescape
from typing import Any

import pytest
from markdown_it import MarkdownIt

from db.history import show_clip
from db.tenants import set_tenant
from flows.cli.clips import line_of
from flows.generate.outcome import Ending
from flows.show import printable
from tests.platform import Platform

HOSTILE = [
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
]
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
SAID = [  # place, value and bound of every error in it
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


def test_pasted_prompts_are_a_file_of_their_own(platform: Platform) -> None:
    """What is wrong in one is said in the words of a file; what is good is kept in the store, to be read again."""
    refused, page = platform.make(prompts_text='{"prompt": "a red ball"}\n{"prompt": "a blue cone", "frames": 50}')
    assert refused.ending is Ending.REFUSED
    assert "prompts:2: frames=50 must be 4n+1 (49 or 53)" in page.lines
    with platform.engines():
        outcome, _ = platform.make(prompts_text="a red ball\n\na blue cone\n", name="pasted")
    clips = platform.clips(outcome.request_id)
    assert [(clip["prompt"], clip["line"], clip["status"]) for clip in clips] == [
        ("a red ball", 1, "done"),
        ("a blue cone", 3, "done"),
    ]
    (row,) = platform.sql("select source, name from requests where id = :id", id=outcome.request_id)
    key = row["source"].removeprefix("store:")
    assert row["name"] == "pasted" and platform.store.get(key) == b"a red ball\n\na blue cone\n"


def test_another_take_differs_in_what_was_changed_and_knows_its_parent(platform: Platform) -> None:
    def asked_again(clip_id: str) -> dict[str, Any]:
        with platform.sessions() as session:
            story = show_clip(session, clip_id)
        assert story is not None
        return line_of(platform.settings, story)

    with platform.engines():
        first, _ = platform.make([{"prompt": "a red ball", "negative_prompt": "blue", "seed": 3, "guidance": 2.0}])
        (clip,) = platform.clips(first.request_id)
        extended, _ = platform.make([{"prompt": "b", "mode": "extend", "clip": clip["clip_id"], "frames": 9}])
        (longer,) = platform.clips(extended.request_id)
        line = asked_again(clip["clip_id"])
        other, _ = platform.make([line | {"seed": 4}, line | {"prompt": "a blue ball"}, line])
        takes = platform.clips(other.request_id)
        once_more, _ = platform.make([asked_again(longer["clip_id"]) | {"seed": 9}])
        (longer_take,) = platform.clips(once_more.request_id)
    assert [take["status"] for take in (*takes, longer_take)] == ["done"] * 4
    assert [(take["prompt"], take["seed"], take["guidance"], take["negative_prompt"]) for take in takes] == [
        ("a red ball", 4, 2.0, "blue"),
        ("a blue ball", 3, 2.0, "blue"),
        ("a red ball", 3, 2.0, "blue"),
    ]
    assert takes[2]["reused"] and takes[2]["recipe"] == clip["recipe"], "being a take decides no pixel"
    assert longer_take["parents"] == [clip["clip_id"], longer["clip_id"]]
    family = platform.sql("select child, kind from ask.lineage where parent = :id and depth = 1", id=clip["clip_id"])
    assert {row["child"]: row["kind"] for row in family} == {
        **{take["clip_id"]: "take" for take in takes},
        longer["clip_id"]: "extend",
        longer_take["clip_id"]: "extend",
    }
    with platform.engines():
        stray, _ = platform.make([{"prompt": "c", "take_of": "req_000000000000-000000-0"}])
    assert stray.ending is Ending.COMPLETED, "of a clip that is not there it is a clip without a parent"


def test_a_clip_for_every_prompt_and_sample(platform: Platform) -> None:
    """In the order of the prompts, each with bytes that are what the ledger says; nothing of it contradicts itself."""
    lines = [
        {"prompt": "a red ball moves left", "custom_id": "two", "samples": 2, "seed": 3},
        {"prompt": "a blue cube", "negative_prompt": "green", "width": 64, "height": 48, "frames": 9},
        {"prompt": "a green ball", "custom_id": "still", "frames": 1, "steps": 2},
    ]
    with platform.engines(2):
        outcome, page = platform.make(lines, name="a batch")
    request = outcome.request_id
    assert outcome.message == f"{request}: 4 done (0 found, not rendered again)"
    clips = platform.clips(request)
    places = ("000000-0", "000000-1", "000001-0", "000002-0")  # line, sample
    assert [clip["clip_id"] for clip in clips] == [f"{request}-{place}" for place in places]
    assert [clip["custom_id"] for clip in clips] == ["two", "two", None, "still"]
    assert [clip["seed"] for clip in clips[:2]] == [3, 4]
    assert [(clip["status"], clip["attempts"]) for clip in clips] == [("done", 1)] * 4
    assert len({clip["recipe"] for clip in clips}) == len({clip["sha256"] for clip in clips}) == 4
    for clip in clips:
        data = platform.store.get(clip["object_key"])
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (clip["sha256"], clip["bytes"])
        assert clip["media_type"] == ("image/png" if clip["frames"] == 1 else "video/mp4")
        assert clip["queued_at"] < clip["started_at"] < clip["finished_at"]
        stages = [clip[f"{stage}_seconds"] for stage in ("text", "denoise", "decode", "encode", "put")]
        assert min(stages) >= 0 and sum(stages) == pytest.approx(clip["seconds"])
    manifest = platform.store.get(f"requests/{request}/manifest.jsonl").decode().splitlines()
    for line, clip in zip(map(json.loads, manifest), clips, strict=True):
        for name in ("clip_id", "prompt", "seed", "recipe", "status", "object_key", "sha256", "trace_id"):
            assert line[name] == clip[name]
    assert set(page.shown) == {"0-status", "shards", "clips", "summary", "outputs", "contact-sheet"}
    assert page.shown["clips"].startswith("# 4 of 4 clips\n")
    for clip in clips:
        assert re.search(
            rf"^\| !\[{clip['clip_id']}\]\(data:image/webp;base64,\S+\) \| {clip['prompt']} \| {clip['seed']} "
            rf"\| \[{clip['clip_id']}\]\(http://\S+/clips/{clip['clip_id']}\.(mp4|png)\) \|",
            page.shown["clips"],
            re.MULTILINE,
        )
    assert f"](http://127.0.0.1:8400/requests/{request}/manifest.jsonl)" in page.shown["outputs"]
    assert not any("file:" in str(shown) for shown in page.shown.values())
    assert page.descriptions["0-status"] == "4 of 4 clips."
    assert f"`{'█' * 40}` 100 %" in page.shown["0-status"]
    assert any(line.startswith("first clip after ") for line in page.lines)
    assert sum(int(row["done"]) for row in page.shown["shards"]) == 4
    assert {row["status"] for row in page.shown["shards"]} == {"done"}
    assert platform.breaches() == []


def test_prompts_are_shown_as_themselves(platform: Platform) -> None:
    """SQL, shell, HTML and Markdown: in ledger, files and manifest to the letter, and on pages nothing but text."""
    with platform.engines():
        outcome, page = platform.make(
            [{"prompt": prompt, "frames": 1, "steps": 1} for prompt in HOSTILE], name="<b>'; drop table clips; --</b>"
        )
    assert outcome.ending is Ending.COMPLETED
    clips = platform.clips(outcome.request_id)
    assert [clip["prompt"] for clip in clips] == HOSTILE
    assert {clip["status"] for clip in clips} == {"done"}
    assert set(platform.script.attempts) == set(HOSTILE), "renderers were given the very words"
    manifest = platform.store.get(f"requests/{outcome.request_id}/manifest.jsonl").decode().splitlines()
    assert [json.loads(line)["prompt"] for line in manifest] == HOSTILE
    for shown in page.shown.values():
        assert not any(part in str(shown) for part in ("<script>", "javascript:", "<b>"))
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(page.shown["clips"])
    cells = re.findall(r"<td>(.*?)</td>", html, re.DOTALL)
    assert [unescape(cell) for cell in cells[1::6]] == [printable(prompt) for prompt in HOSTILE]
    known = {"h1", "p", "table", "thead", "tbody", "tr", "th", "td", "img", "code", "a"}
    assert set(re.findall(r"<(\w+)", html)) == known
    assert all(link.startswith(f"{page.web}/") for link in re.findall(r'href="([^"]*)"', html)), "links are ours alone"
    assert re.findall(r'<img src="(.{22})', html) == ["data:image/webp;base64"] * len(HOSTILE)
    assert platform.breaches() == []


def test_every_error_of_a_file_is_said_at_once_and_nothing_is_recorded(platform: Platform) -> None:
    platform.settings.prompts.mkdir(parents=True)
    (platform.settings.prompts / "bad.jsonl").write_bytes(BAD_FILE)
    outcome, page = platform.make(prompts_uri="bad.jsonl")
    assert (outcome.ending, outcome.reason, outcome.request_id) == (Ending.REFUSED, "BadInput", None)
    first, *lines = outcome.message.splitlines()
    assert first == f"{len(SAID)} errors: nothing was submitted"
    for place, bound in SAID:
        assert any(line.startswith(place) and bound in line for line in lines), (place, bound, lines)
    assert page.shown["bad-input"].startswith("# Bad input: nothing was submitted\n```\n")
    assert page.lines == [f"Bad input: nothing was submitted. {len(SAID)} errors:", *lines], "first in the log"
    assert all(bound in page.shown["bad-input"] for _, bound in SAID)
    assert platform.sql("select id from requests") == []


def test_what_is_wrong_for_all_lines_is_refused_even_where_bad_ones_are_skipped(platform: Platform) -> None:
    lines = ["a red ball", {"prompt": "a blue ball", "frames": 50}]
    for skip in (False, True):
        outcome, page = platform.make(lines, width=72, skip_invalid=skip)
        assert outcome.reason == "BadInput"
        assert "prompts:2: frames=50 must be 4n+1 (49 or 53)" in outcome.message
        assert "width=72 must be a multiple of 16 (64 or 80)" in outcome.message, "of the request, not of a line"
        assert page.shown["bad-input"].count("frames=50") == 1
    assert platform.sql("select id from requests") == []


def test_files_that_are_not_to_be_had(platform: Platform) -> None:
    platform.settings.prompts.mkdir(parents=True)
    (platform.settings.home / "secret.jsonl").write_text('{"prompt": "a secret"}\n')
    outside, _ = platform.make(prompts_uri="../secret.jsonl")
    assert outside.reason == "BadInput" and "prompts folder" in outside.message
    assert "a secret" not in outside.message, "nothing of the file itself"
    gone, _ = platform.make(prompts_uri="store:prompts/nothing")
    assert gone.reason == "BadInput" and "prompts/nothing" in gone.message
    clip, _ = platform.make([{"prompt": "a ball", "mode": "extend", "clip": "req_000000000000-000000-0"}])
    assert "prompts:1: clip=req_000000000000-000000-0 is no clip of the ledger" in clip.message
    assert platform.sql("select id from requests") == []


def test_bad_lines_can_be_skipped(platform: Platform) -> None:
    lines = ["a ball", {"prompt": "a ball", "frames": 50}, "a cube"]
    with platform.engines():
        outcome, _ = platform.make(lines, skip_invalid=True)
    assert outcome.ending is Ending.COMPLETED_WITH_GAPS
    assert platform.sql("select status::text from requests") == [{"status": "completed_with_gaps"}]
    clips = platform.clips(outcome.request_id)
    assert [clip["status"] for clip in clips] == ["done", "rejected", "done"]
    assert clips[1]["error"] == "frames=50 must be 4n+1 (49 or 53)"
    assert (clips[1]["line"], clips[1]["attempts"], clips[1]["object_key"]) == (2, 0, None)
    assert platform.breaches() == []


def test_a_quota_refuses_until_it_is_raised(platform: Platform) -> None:
    with platform.sessions.begin() as session:
        set_tenant(session, "small", max_clips=1)
    asked = [{"prompt": "a blue cube", "samples": 2}]
    for _ in range(2):
        outcome, page = platform.make(asked, tenant="small")
        assert (outcome.ending, outcome.reason) == (Ending.REFUSED, "QuotaExceeded")
        assert "tenant small may have 1 clips waiting" in outcome.message
        assert page.shown["bad-input"].startswith("# Too much at once: nothing was submitted")
        assert platform.sql("select id from requests") == []
    with platform.sessions.begin() as session:
        set_tenant(session, "small", max_clips=2)
    with platform.engines():
        outcome, _ = platform.make(asked, tenant="small")
    assert outcome.message.endswith(": 2 done (0 found, not rendered again)")


def test_a_deadline_that_cannot_be_met_is_told_and_the_clips_are_made(platform: Platform) -> None:
    with platform.engines():
        late, page = platform.make([{"prompt": "a red ball", "samples": 3}], deadline=0.01)
        assert any("the deadline of 0s cannot be met: all is done in about " in line for line in page.warnings)
        assert "# The deadline will not be met" in page.shown["deadline"]
        assert platform.statuses(late.request_id) == ["done"] * 3
        early, page = platform.make(["a blue ball"], deadline=86400)
        assert early.ending is Ending.COMPLETED
        assert "deadline" not in page.shown and not any("deadline" in line for line in page.warnings)
        assert any(line.endswith("in time") for line in page.lines)


def test_settings_without_effect_are_told_and_refused_when_strict(platform: Platform) -> None:
    """Two clips that differ in them alone are one rendering."""
    lines = [{"prompt": "a red ball", "seed": 1, "guidance": 1, "negative_prompt": words} for words in ("fog", "rain")]
    outcome, _ = platform.make(lines, strict=True)
    assert outcome.ending is Ending.REFUSED and 'negative_prompt="fog" has no effect' in outcome.message
    with platform.engines(1):
        outcome, page = platform.make(lines)
    assert any('negative_prompt="fog" has no effect (2 prompts' in line for line in page.warnings)
    clips = platform.clips(outcome.request_id)
    assert len(clips) == 2 and len({clip["recipe"] for clip in clips}) == 1
