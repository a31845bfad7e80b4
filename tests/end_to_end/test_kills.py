"""Whatever dies in the middle of a batch: it ends by itself, with every clip once, and the audit finds no fault.

`make chaos` does the same for longer, and writes the table of docs/reliability.md.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.end_to_end.faults import (
    FAULTS,
    LEASE,
    cable,
    campaign,
    fill,
    ground,
    may_make_namespaces,
    may_mount,
    relay,
    small_disk,
    small_house,
)
from tests.end_to_end.stack import House, finished, wait_for

pytestmark = [pytest.mark.xdist_group("kills"), pytest.mark.timeout(1800), pytest.mark.slow]


def test_anything_may_be_killed(tmp_path: Path) -> None:
    """Every fault once, in an order and at moments drawn from the printed seed."""
    seed = int(os.environ.get("RUSHES_TEST_SEED") or time.time())
    print(f"RUSHES_TEST_SEED={seed}")
    order = random.Random(seed).sample(FAULTS, len(FAULTS))
    with ground(tmp_path, seed) as on:
        struck = campaign(on, order)
        counted = on.check()
    assert [each.what for each in struck] == [fault.what for fault in order]
    assert counted["attempts"] <= counted["clips"] + sum(each.repeated for each in struck)


# Two faults that need a stack of another kind: a folder as store, on a disk that can be filled; engines by hand.


def begin(house: House, clips: int) -> tuple[str, str]:
    run = house.submit(
        request=house.request([f"a red ball moves left slow {k}" for k in range(clips)], steps=40, seed=house.seed())
    )
    return run, house.request_of(run)


def audited(house: House, run: str, request: str) -> None:
    house.ended(run)
    assert set(house.statuses(request)) == {"done"}
    made = [attempt["clip_id"] for attempt in house.attempts(request) if attempt["status"] == "done"]
    assert len(made) == len(set(made)) == len(house.statuses(request))
    assert "no breaches" in house.rushes("audit")


@pytest.mark.parametrize("where", ["store", "scratch"])
def test_a_disk_is_full(tmp_path: Path, where: str) -> None:
    """The engine waits for room, and no clip is blamed: not one attempt fails."""
    disk = tmp_path / "disk"
    if not may_mount(disk):
        pytest.skip("only root may mount a small disk")
    with small_disk(disk, 8):
        scratch = {"TMPDIR": str(disk)} if where == "scratch" else {}
        stored = {"RUSHES_STORE_URL": disk.as_uri()} if where == "store" else {}
        with small_house(tmp_path, **stored) as house:
            run, request = begin(house, 12)
            engine = house.start("engine", "--linger", "5", **scratch)
            wait_for(lambda: "done" in house.statuses(request), "the first clip")
            filler = fill(disk)
            done = house.statuses(request).count("done")
            time.sleep(LEASE + 5)  # longer than a lease: it is renewed all the while
            assert house.statuses(request).count("done") <= done + 1, "a clip was stored where there was no room"
            filler.unlink()
            audited(house, run, request)
            assert len(house.attempts(request)) == 12, "a clip was blamed for the disk"
            finished(engine)


def test_the_network_is_cut(tmp_path: Path) -> None:
    """An engine on another host loses the ledger: others take over, and what it made meanwhile is dropped."""
    if not may_make_namespaces():
        pytest.skip("only root may make a network namespace")
    with cable() as line, small_house(tmp_path) as house:
        url = urlsplit(house.stack()["database_url"])
        assert url.port
        with relay(line, url.port) as port:
            there = url._replace(netloc=f"{url.username}:{url.password}@{line.ours}:{port}").geturl()
            run, request = begin(house, 24)
            far = house.start("engine", "--linger", "30", within=line.within, RUSHES_DATABASE_URL=there)
            wait_for(lambda: "done" in house.statuses(request), "the first clip")
            (lease,) = house.sql("select id, owner from shards where status = 'leased'")
            line.pull()
            near = house.start("engine", "--linger", "5")
            taken = "select 1 from attempts where owner <> %s and status = 'done'"
            wait_for(lambda: house.sql(taken, lease["owner"]), "another engine to go on")
            line.plug()
            audited(house, run, request)
            assert len(house.engines(request)) == 2
            finished(near)
            far.send_signal(signal.SIGTERM)
            far.communicate(timeout=60)
