"""A clip under which the ranks die every time, as when memory runs out, does not hold up the others."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path

import pytest

from tests.end_to_end.house import SLOW, House, wait_for

pytestmark = [pytest.mark.xdist_group("stack"), pytest.mark.timeout(900), pytest.mark.slow]


def test_a_poison_clip_is_quarantined_and_can_be_tried_again(house: House, tmp_path: Path) -> None:
    seed = house.seed()
    lines = [
        {"prompt": "a red ball", "custom_id": "poison", "steps": SLOW, "seed": seed},
        {"prompt": "a green ball", "seed": seed},
        {"prompt": "a blue ball", "seed": seed},
    ]
    (tmp_path / "poison.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    poisonous, killed = threading.Event(), list[int]()

    def poison() -> None:
        """Kills a rank in every attempt at the clip."""
        query = (
            "select number from attempts a join clips c on c.id = a.clip_id where recipe = %s and a.status = 'running'"
        )
        recipe = wait_for(
            lambda: house.sql("select recipe from clips where custom_id = 'poison' and seed = %s", seed), ""
        )
        while poisonous.is_set():
            for attempt in house.sql(query, recipe[0]["recipe"]):
                if attempt["number"] not in killed and (ranks := house.ranks()):
                    killed.append(attempt["number"])
                    house.kill(ranks[:1])
            time.sleep(0.05)

    poisonous.set()
    poisoner = threading.Thread(target=poison)
    poisoner.start()
    try:
        said = house.rushes("submit", str(tmp_path / "poison.jsonl"), "--watch", code=1)
    finally:
        poisonous.clear()
        poisoner.join()
    (request,) = set(re.findall(r"req_[0-9a-f]{12}", said))
    assert f"{request} completed with gaps: 2 done, 1 quarantined" in said
    assert killed == [1, 2, 3]
    assert house.status_of(request) == "completed_with_gaps"
    poison_clip, *others = house.clips(request)
    assert poison_clip["status"] == "quarantined"
    assert "died (killed by SIGKILL)" in poison_clip["error"]
    assert [clip["status"] for clip in others] == ["done", "done"]
    assert [clip["attempts"] for clip in others] == [1, 1]
    (run,) = re.findall(r"/runs/flow-run/([0-9a-f-]{36})", said)
    house.ended(run, state="CompletedWithGaps")

    said = house.rushes("retry", request, "--watch")
    assert f"{request}: 1 clip queued again" in said
    assert f"{request} completed: 3 done" in said
    assert [clip["attempts"] for clip in house.clips(request)] == [4, 1, 1]
    assert "nothing to retry" in house.rushes("retry", request)
