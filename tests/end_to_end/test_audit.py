"""Ledger against store: what `rushes audit` finds, and what maintenance sweeps away and what it leaves."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from tests.end_to_end.stack import Stack

pytestmark = [pytest.mark.xdist_group("stack"), pytest.mark.timeout(900), pytest.mark.slow]

DAY = 86400.0


def put_orphan(stack: Stack, data: bytes, age: float) -> str:
    """Bytes under their digest that no row knows, as an engine leaves them that is killed between put and record."""
    digest = hashlib.sha256(data).hexdigest()
    key = f"blobs/sha256/{digest[:2]}/{digest[2:4]}/{digest}"
    stack.blob(key).parent.mkdir(parents=True, exist_ok=True)
    stack.blob(key).write_bytes(data)
    grow_old(stack.blob(key), age)
    return key


def grow_old(path: Path, age: float) -> None:
    os.utime(path, (time.time() - age, time.time() - age))


def found(stack: Stack, *arguments: str, code: int) -> set[tuple[str, str]]:
    """(problem, key) of every breach."""
    said = stack.rushes("audit", "--format", "json", *arguments, code=code)
    breaches = json.JSONDecoder().raw_decode(said)[0]
    assert (code == 1) == bool(breaches)
    return {(breach["problem"], breach["key"]) for breach in breaches}


def test_audit_and_maintenance(stack: Stack, runs: dict[str, str]) -> None:
    clips = [clip["object_key"] for clip in stack.clips(stack.request_of(runs["form"]))][:3]
    # Killed engines of other tests may have left orphans: let them be old ones too.
    for blob in (stack.home / "store" / "blobs").rglob("*"):
        if blob.is_file() and blob.name not in {clip.rpartition("/")[2] for clip in clips}:
            grow_old(blob, 2 * DAY)
    half_written = stack.home / "store" / ".incoming" / "killed"
    half_written.write_bytes(b"half")
    grow_old(half_written, 2 * DAY)
    old, young = put_orphan(stack, b"old", 1.1 * DAY), put_orphan(stack, b"young", 0.9 * DAY)

    assert ("orphan", old) in found(stack, code=1)
    state = stack.ended(stack.submit("maintenance/scheduled"))["state"]
    assert "orphan objects deleted" in state["message"]
    assert not stack.blob(old).exists() and not half_written.exists()
    assert stack.blob(young).exists()
    assert all(stack.blob(key).exists() for key in clips)

    assert found(stack, code=0) == set(), "what maintenance is yet to delete is no breach"
    stack.blob(young).unlink()

    flipped, cut, gone = (stack.blob(key) for key in clips)
    kept = {path: path.read_bytes() for path in (flipped, cut, gone)}
    flipped.write_bytes(bytes([kept[flipped][0] ^ 1]) + kept[flipped][1:])
    cut.write_bytes(kept[cut][:-1])
    gone.unlink()
    breaches = {("wrong digest", clips[0]), ("wrong size", clips[1]), ("missing", clips[2])}
    try:
        assert found(stack, code=1) == breaches
        assert found(stack, "--quick", code=1) == breaches - {("wrong digest", clips[0])}
    finally:
        for path, data in kept.items():
            path.write_bytes(data)
    assert "no breaches" in stack.rushes("audit")
