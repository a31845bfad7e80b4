"""Whatever dies in the middle of a batch: it ends by itself, with every clip once, and the audit finds no fault.

`make chaos` strikes with every fault, many times, and writes the table of docs/reliability.md.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from tests.chaos.faults import FAULTS, campaign, fault_rig

pytestmark = [pytest.mark.xdist_group("campaign"), pytest.mark.timeout(1800), pytest.mark.slow]

# As many as two cores strike with in a minute and a half; the order of all of them is drawn, so that each has its turn.
STRUCK = 4


@pytest.mark.parametrize(
    "number", [STRUCK, pytest.param(len(FAULTS), marks=pytest.mark.chaos)], ids=["four faults", "every fault"]
)
def test_anything_may_be_killed(number: int, tmp_path: Path) -> None:
    """Faults of different kinds, in an order and at moments drawn from the printed seed."""
    seed = int(os.environ.get("RUSHES_TEST_SEED") or time.time())
    print(f"RUSHES_TEST_SEED={seed}")
    drawn = random.Random(seed).sample(FAULTS, number)
    with fault_rig(tmp_path, seed) as rig:
        struck = campaign(rig, drawn, clips=6 * number)
        counted = rig.check()
    assert [each.what for each in struck] == [fault.what for fault in drawn]
    assert counted["attempts"] <= counted["clips"] + sum(each.repeated for each in struck)
