"""Tags and metadata on the way from a request to whoever asks: ledger, views, manifest, file."""

from __future__ import annotations

import io
import json

import av
from sqlalchemy import text

from tests.platform import Platform

LINES = [
    {"prompt": "a red ball", "tags": ["hero", "night"], "metadata": {"shot": 7}},
    {"prompt": "a blue cube"},
    {"prompt": "a cone", "frames": 50, "tags": ["hero"]},
]
BY_INDEX = "select clip_id from history where tags @> array['hero'] and metadata @> '{\"shot\": 7}'"


def test_labels_reach_everything_that_people_ask(platform: Platform) -> None:
    with platform.engines():
        plain, _ = platform.make(["a red ball"])
        made, _ = platform.make(LINES, tags=["spring"], metadata={"shot": 1, "by": "Ada"}, skip_invalid=True)
    clips = platform.sql("select * from history where request_id = :id order by index", id=made.request_id)
    assert [clip["tags"] for clip in clips] == [["spring", "hero", "night"], ["spring"], ["spring", "hero"]]
    shots = [{"by": "Ada", "shot": 7}, {"by": "Ada", "shot": 1}, {"by": "Ada", "shot": 1}]
    assert [clip["metadata"] for clip in clips] == shots
    assert clips[0]["reused"] and clips[0]["sha256"] == platform.clips(plain.request_id)[0]["sha256"]
    assert platform.sql("select tags, metadata from ask.requests where request_id = :id", id=made.request_id) == [
        {"tags": ["spring"], "metadata": {"shot": 1, "by": "Ada"}}
    ]
    assert platform.sql("select tags, metadata from ask.requests where request_id = :id", id=plain.request_id) == [
        {"tags": None, "metadata": None}
    ]
    for view in ("attempts", "stages"):
        told = f"select distinct tags, metadata from ask.{view} where request_id = :id"
        assert platform.sql(told, id=made.request_id) == [{"tags": ["spring"], "metadata": {"shot": 1, "by": "Ada"}}]

    manifest = platform.store.get(f"requests/{made.request_id}/manifest.jsonl").splitlines()
    assert [json.loads(line)["metadata"] for line in manifest] == shots
    assert json.loads(manifest[1])["tags"] == ["spring"]
    with av.open(io.BytesIO(platform.store.get(clips[1]["object_key"]))) as file:
        assert file.metadata["tags"] == "spring"
        assert file.metadata["request"] == made.request_id and file.metadata["seed"].isdecimal()
        assert json.loads(file.metadata["metadata"]) == {"shot": 1, "by": "Ada"}

    assert platform.sql(BY_INDEX) == [{"clip_id": clips[0]["clip_id"]}]
    with platform.sessions() as session:  # so few rows are quicker read one after the other
        session.execute(text("set local enable_seqscan = off"))
        plan = " ".join(session.scalars(text(f"explain {BY_INDEX}")))
    assert "ix_clips_tags" in plan or "ix_clips_metadata" in plan, plan
    assert platform.breaches() == []
