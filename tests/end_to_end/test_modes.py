"""Clips made from pictures and from each other, in every way to submit, and what is known of where they came from."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.media.encode import encode_png
from tests.end_to_end.stack import Stack, decode

pytestmark = [pytest.mark.xdist_group("stack"), pytest.mark.timeout(900), pytest.mark.slow]


@pytest.fixture(scope="module")
def picture() -> bytes:
    return encode_png(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8), {})


@pytest.fixture(scope="module")
def submitted(stack: Stack, picture: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prompt file with the picture beside it."""
    folder: Path = tmp_path_factory.mktemp("modes")
    (folder / "ball.png").write_bytes(picture)
    line = {"prompt": "a red ball moves left", "mode": "image-to-video", "image": "ball.png", "seed": stack.seed()}
    (folder / "first.jsonl").write_text(json.dumps(line) + "\n")
    return folder / "first.jsonl"


@pytest.fixture(scope="module")
def first(stack: Stack, submitted: Path) -> dict[str, Any]:
    """The clip that begins with the picture."""
    return only_clip(stack, stack.rushes("submit", str(submitted), "--watch"))


@pytest.fixture(scope="module")
def longer(stack: Stack, first: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same clip, extended."""
    file: Path = tmp_path_factory.mktemp("longer") / "more.txt"
    file.write_text("a red ball moves right\n")
    return only_clip(
        stack, stack.rushes("submit", str(file), "--mode", "extend", "--clip", first["clip_id"], "--watch")
    )


def only_clip(stack: Stack, said: str) -> dict[str, Any]:
    (request,) = set(re.findall(r"req_[0-9a-f]{12}", said))
    assert f"{request} completed: 1 done" in said
    (clip,) = stack.clips(request)
    return clip


def test_a_clip_from_a_picture(stack: Stack, first: dict[str, Any], picture: bytes) -> None:
    digest = hashlib.sha256(picture).hexdigest()
    assert (first["mode"], first["source_sha256"], first["parents"]) == ("image-to-video", digest, [])
    (stored,) = stack.sql("select * from artifacts where sha256 = %s", digest)
    assert stack.blob(stored["key"]).read_bytes() == picture and stored["media_type"] == "image/png"
    assert decode(stack.blob(first["object_key"]).read_bytes())[0] == (9, 32, 48)
    assert stack.rushes("audit").endswith("no breaches\n"), "the picture belongs to the ledger"


def test_the_same_picture_is_the_same_request(stack: Stack, submitted: Path, first: dict[str, Any]) -> None:
    """That another picture under its name is another one is in unit/test_modes."""
    said = stack.rushes("submit", str(submitted), "--watch")
    assert said == f"{first['request_id']} is complete: all 1 clips were found, nothing is to be rendered\n"


def test_a_clip_is_extended_and_knows_its_parent(stack: Stack, first: dict[str, Any], longer: dict[str, Any]) -> None:
    assert (longer["mode"], longer["direction"], longer["overlap"]) == ("extend", "forward", 5)
    assert (longer["frames"], longer["width"], longer["height"]) == (13, 48, 32)
    assert (longer["parents"], longer["source_sha256"]) == ([first["clip_id"]], first["sha256"])
    assert decode(stack.blob(longer["object_key"]).read_bytes())[0] == (13, 32, 48)
    edges = stack.sql("select parent, kind::text as kind from edges where child = %s", longer["clip_id"])
    assert edges == [{"parent": first["clip_id"], "kind": "extend"}]
    story = json.loads(stack.rushes("show", longer["clip_id"], "--format", "json"))
    assert story["parents"] == [{"clip": first["clip_id"], "kind": "extend"}] and story["mode"] == "extend"
    assert first["clip_id"] in stack.rushes("show", longer["clip_id"]).partition("Made from")[2]
    assert longer["clip_id"] in stack.rushes("show", first["clip_id"]).partition("Led to")[2]


def test_the_form_makes_clips_from_clips(stack: Stack, first: dict[str, Any], longer: dict[str, Any]) -> None:
    known = {"clip": first["clip_id"]}
    asked = stack.request(
        [
            {"prompt": "a green ball", "mode": "edit", "strength": 0.5, **known},
            {"prompt": "a green ball", "mode": "connect", "end_clip": longer["clip_id"], **known},
            {"prompt": "a green ball", "mode": "loop", **known},
            {"prompt": "a green ball", "mode": "loop", "frames": 13},
            {"prompt": "a green ball", "mode": "extend", "direction": "backward", "frames": 21, **known},
        ],
        seed=stack.seed(),
    )
    run = stack.submit(request=asked)
    stack.ended(run)
    clips = stack.clips(stack.request_of(run))
    assert [clip["status"] for clip in clips] == ["done"] * 5
    assert [clip["mode"] for clip in clips] == ["edit", "connect", "loop", "loop", "extend"]
    for clip in clips:
        frames = decode(stack.blob(clip["object_key"]).read_bytes())[0][0]
        assert frames == clip["frames"], clip["mode"]
    edges = stack.sql(
        "select child, parent, kind::text as kind from edges where child like %s order by child, parent",
        f"{clips[0]['request_id']}%",
    )
    ids = [clip["clip_id"] for clip in clips]
    parents = sorted([first["clip_id"], longer["clip_id"]])
    assert [(edge["child"], edge["parent"], edge["kind"]) for edge in edges] == [
        (ids[0], first["clip_id"], "edit"),
        *((ids[1], parent, "connect") for parent in parents),
        (ids[2], first["clip_id"], "loop"),
        (ids[4], first["clip_id"], "extend"),
    ]


@pytest.mark.chaos
def test_a_source_that_is_not_there_is_bad_input(stack: Stack, tmp_path: Path) -> None:
    lines = [
        {"prompt": "a ball", "mode": "extend", "clip": "req_000000000000-000000-0"},
        {"prompt": "a ball", "mode": "edit", "video": "nothing.mp4"},
    ]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = stack.rushes("submit", str(tmp_path / "bad.jsonl"), code=2)
    assert "bad.jsonl:1: clip=req_000000000000-000000-0 is no clip of the ledger" in said
    assert "bad.jsonl:2: video=nothing.mp4 is no file" in said
    ended = stack.ended(stack.submit(request=stack.request(lines)), state="BadInput")
    assert "prompts:1: clip=req_000000000000-000000-0 is no clip of the ledger" in ended["state"]["message"]
    assert "prompts:2: video=nothing.mp4 cannot be used" in ended["state"]["message"]
