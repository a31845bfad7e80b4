"""Asking a stack that has worked: every listing, one in every format, and the clips in a folder."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import stat
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.end_to_end.stack import Stack, decode, finished

pytestmark = [pytest.mark.xdist_group("stack"), pytest.mark.timeout(900), pytest.mark.slow]

FORMATS = ("table", "json", "csv")


def told(stack: Stack, *arguments: str) -> list[dict[str, Any]]:
    """The rows of a listing."""
    rows = json.loads(stack.rushes(*arguments, "--format", "json"))
    return rows if isinstance(rows, list) else [rows]


def listed(stack: Stack, *arguments: str, code: int = 0) -> list[dict[str, Any]]:
    """The rows of a listing, after a look at all three formats: they say the same."""
    started = {kind: stack.start(*arguments, "--format", kind) for kind in FORMATS}
    said = {kind: finished(process, code) for kind, process in started.items()}
    rows = json.loads(said["json"])
    rows = rows if isinstance(rows, list) else [rows]
    cells = list(csv.DictReader(io.StringIO(said["csv"])))
    assert len(cells) == len(rows)
    for row, cell in zip(rows, cells, strict=True):
        for name in set(row) & set(cell):
            if name != "detail" and isinstance(row[name], str | int) and not isinstance(row[name], bool):
                assert cell[name] == str(row[name])
    assert said["table"].strip() and not said["table"].lstrip().startswith(("[", "{"))
    return rows


def test_history(stack: Stack, runs: dict[str, str]) -> None:
    request = stack.request_of(runs["command"])
    rows = listed(stack, "history", "--request", request, "--status", "done")
    assert {row["clip_id"]: row["sha256"] for row in rows} == {c["clip_id"]: c["sha256"] for c in stack.clips(request)}
    promised = {"request_id", "clip_id", "custom_id", "prompt", "seed", "status", "attempts", "error", "object_key"}
    assert promised | {"sha256", "trace_id"} <= set(rows[0])


def test_show(stack: Stack, runs: dict[str, str]) -> None:
    clip = stack.clips(stack.request_of(runs["form"]))[0]
    (row,) = told(stack, "show", clip["clip_id"])
    assert (row["prompt"], row["seed"], row["sha256"]) == (clip["prompt"], clip["seed"], clip["sha256"])
    assert row["link"] == f"{stack.info()['web_url']}/clips/{clip['clip_id']}.mp4"
    assert httpx.get(row["link"], trust_env=False).content == stack.blob(clip["object_key"]).read_bytes()
    assert [attempt["status"] for attempt in row["tries"]] == ["done"]
    stack.rushes("show", "req_nowhere-000000-0", code=2)


def test_sql(stack: Stack, runs: dict[str, str]) -> None:
    request = stack.request_of(runs["prefect"])
    query = f"select status, count(*) from history where request_id = '{request}' group by 1"
    assert told(stack, "sql", query) == [{"status": "done", "count": 4}]
    assert "read-only" in stack.rushes("sql", "delete from renders", code=2)
    assert "permission denied" in stack.rushes("sql", "select * from renders", code=2)
    asked_by = "select distinct session_user::text as login, current_user::text as role from history"
    assert told(stack, "sql", asked_by) == [{"login": "reader", "role": "rushes_reader"}]
    assert stack.sql("select count(*) from renders")[0]["count"] > 0


def test_requests_and_the_parts(stack: Stack, runs: dict[str, str]) -> None:
    names = {row["name"]: row["status"] for row in told(stack, "requests", "--limit", "1000")}
    assert {names[name] for name in ("from the form", "from prefect", "mine.jsonl")} == {"completed"}
    assert all(row["state"] == "running" for row in told(stack, "status") if row["part"] != "flow runs")
    checks = told(stack, "doctor")
    assert {row["check"] for row in checks} == {"ok"}
    assert {"postgres", "ledger", "prefect", "workers", "store", "weights"} <= {row["part"] for row in checks}


def test_export(stack: Stack, runs: dict[str, str], tmp_path: Path) -> None:
    request = stack.request_of(runs["command"])
    folder = tmp_path / "clips"
    assert "4 clips copied and the contact sheet" in stack.rushes("export", request, str(folder))
    clips = {clip["clip_id"]: clip for clip in stack.clips(request)}
    manifest = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert [line["clip_id"] for line in manifest] == list(clips)
    names = ["two.mp4", "two-1.mp4", f"{request}-000001-0.mp4", "still.png"]
    assert [line["file"] for line in manifest] == names
    for line in manifest:
        data = (folder / line["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == clips[line["clip_id"]]["sha256"]
        assert decode(data)[0][0] == line["frames"]
    assert {path.name for path in folder.iterdir()} == {*names, "manifest.jsonl", "contact_sheet.png"}
    assert "4 there already" in stack.rushes("export", request, str(folder))


def test_the_home_is_the_owners_alone(stack: Stack) -> None:
    assert stat.S_IMODE(stack.home.stat().st_mode) == 0o700
