"""Disks that fill up and a network that is cut: the batch ends by itself, with every clip once, and the audit agrees.

These need a stack of another kind than the campaign: a folder as store, on a disk that can be filled; engines by hand.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.chaos.faults import (
    LEASE,
    cable,
    fill,
    may_make_namespaces,
    may_mount,
    relay,
    small_disk,
    stack_without_engines,
)
from tests.end_to_end.stack import PATIENCE, Stack, finished, wait_for

pytestmark = [pytest.mark.chaos, pytest.mark.xdist_group("kills"), pytest.mark.timeout(1800)]


def begin(stack: Stack, clips: int) -> tuple[str, str]:
    run = stack.submit(
        request=stack.request([f"a red ball moves left slow {k}" for k in range(clips)], steps=40, seed=stack.seed())
    )
    return run, stack.request_of(run)


def audited(stack: Stack, run: str, request: str) -> None:
    stack.ended(run)
    assert set(stack.statuses(request)) == {"done"}
    made = [attempt["clip_id"] for attempt in stack.attempts(request) if attempt["status"] == "done"]
    assert len(made) == len(set(made)) == len(stack.statuses(request))
    assert "no breaches" in stack.rushes("audit")


@pytest.mark.parametrize("where", ["store", "scratch"])
def test_a_disk_is_full(tmp_path: Path, where: str) -> None:
    """The engine waits for room, and no clip is blamed: not one attempt fails."""
    disk = tmp_path / "disk"
    if not may_mount(disk):
        pytest.skip("only root may mount a small disk")
    with small_disk(disk, 8):
        scratch = {"TMPDIR": str(disk)} if where == "scratch" else {}
        stored = {"RUSHES_STORE_URL": disk.as_uri()} if where == "store" else {}
        with stack_without_engines(tmp_path, **stored) as stack:
            run, request = begin(stack, 12)
            engine = stack.start("engine", "--linger", "5", **scratch)
            wait_for(lambda: "done" in stack.statuses(request), "the first clip")
            filler = fill(disk)
            done = stack.statuses(request).count("done")
            time.sleep(LEASE + 5)  # longer than a lease: it is renewed all the while
            assert stack.statuses(request).count("done") <= done + 1, "a clip was stored where there was no room"
            filler.unlink()
            audited(stack, run, request)
            assert len(stack.attempts(request)) == 12, "a clip was blamed for the disk"
            finished(engine)


def test_the_network_is_cut(tmp_path: Path) -> None:
    """An engine on another host loses the ledger: others take over, and what it made meanwhile is dropped."""
    if not may_make_namespaces():
        pytest.skip("only root may make a network namespace")
    with cable() as line, stack_without_engines(tmp_path) as stack:
        url = urlsplit(stack.info()["database_url"])
        assert url.port
        with relay(line, url.port) as port:
            there = url._replace(netloc=f"{url.username}:{url.password}@{line.ours}:{port}").geturl()
            run, request = begin(stack, 24)
            far = stack.start("engine", "--linger", "30", within=line.within, RUSHES_DATABASE_URL=there)
            wait_for(lambda: "done" in stack.statuses(request), "the first clip")
            (lease,) = stack.sql("select id, owner from shards where status = 'leased'")
            line.pull()
            near = stack.start("engine", "--linger", "5")
            taken = "select 1 from attempts where owner <> %s and status = 'done'"
            wait_for(lambda: stack.sql(taken, lease["owner"]), "another engine to go on")
            line.plug()
            audited(stack, run, request)
            assert len(stack.engines(request)) == 2
            finished(near)
            far.send_signal(signal.SIGTERM)
            far.communicate(timeout=PATIENCE)
