"""A rank is killed, as when memory runs out: once under one clip, every time under another. The rest is not held up."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path

import pytest

from tests.end_to_end.stack import SLOW, Stack

pytestmark = [pytest.mark.chaos, pytest.mark.xdist_group("stack"), pytest.mark.timeout(900), pytest.mark.slow]

RUNNING = """
select c.custom_id, a.number from attempts a join clips c on c.id = a.clip_id
where a.status = 'running' and c.seed = %s and c.custom_id in ('poison', 'unlucky')
"""


class Killer(threading.Thread):
    """Kills a rank in the first attempt at the clip `unlucky`, and in every attempt at `poison`."""

    def __init__(self, stack: Stack, seed: int) -> None:
        super().__init__()
        self.stack, self.seed, self.done = stack, seed, threading.Event()
        self.killed: list[tuple[str, int]] = []

    def run(self) -> None:
        while not self.done.is_set():
            for row in self.stack.sql(RUNNING, self.seed):
                attempt = (row["custom_id"], row["number"])
                unlucky_again = attempt[0] == "unlucky" and attempt[1] > 1
                if attempt not in self.killed and not unlucky_again and (ranks := self.stack.ranks()):
                    self.killed.append(attempt)
                    self.stack.kill(ranks[-1:])
            time.sleep(0.05)


def test_ranks_are_killed_and_a_poison_clip_is_quarantined(stack: Stack, tmp_path: Path) -> None:
    seed = stack.seed()
    lines = [
        {"prompt": "a red ball", "custom_id": "poison", "steps": SLOW, "seed": seed},
        {"prompt": "a green ball", "custom_id": "unlucky", "steps": SLOW, "seed": seed},
        {"prompt": "a blue ball", "seed": seed},
        {"prompt": "a blue cube", "seed": seed},
    ]
    (tmp_path / "poison.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    killer = Killer(stack, seed)
    killer.start()
    try:
        said = stack.rushes("submit", str(tmp_path / "poison.jsonl"), "--watch", code=1)
    finally:
        killer.done.set()
        killer.join()
    (request,) = set(re.findall(r"req_[0-9a-f]{12}", said))
    assert f"{request} completed with gaps: 3 done, 1 quarantined" in said
    (run,) = re.findall(r"/runs/flow-run/([0-9a-f-]{36})", said)
    stack.ended(run, state="CompletedWithGaps")
    assert stack.status_of(request) == "completed_with_gaps"

    assert sorted(killer.killed) == [("poison", 1), ("poison", 2), ("poison", 3), ("unlucky", 1)]
    clips = stack.clips(request)
    assert [clip["status"] for clip in clips] == ["quarantined", "done", "done", "done"]
    assert [clip["attempts"] for clip in clips] == [3, 2, 1, 1]
    assert re.search(r"rank \d of 2 died \(killed by SIGKILL\)", clips[0]["error"])
    attempts = stack.attempts(request)
    assert [attempt["status"] for attempt in attempts].count("failed") == 4
    assert [attempt["status"] for attempt in attempts].count("done") == 3
    (engine,) = stack.engines(request)
    assert stack.run(engine)["state_type"] == "RUNNING", "the engine started its ranks again and again"
    assert len(stack.ranks()) == 2

    said = stack.rushes("retry", request, "--watch")
    assert f"{request}: 1 clip queued again" in said
    assert f"{request} completed: 4 done" in said
    assert [clip["attempts"] for clip in stack.clips(request)] == [4, 2, 1, 1]
    assert "nothing to retry" in stack.rushes("retry", request)
