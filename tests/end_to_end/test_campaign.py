"""Whatever dies in the middle of a batch: it ends by itself, with every clip once, and the audit finds no fault.

`make chaos` strikes once with every fault here, then many times, and writes the table of docs/reliability.md.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from tests.chaos.faults import FAULTS, campaign, fault_rig

pytestmark = [pytest.mark.chaos, pytest.mark.xdist_group("campaign"), pytest.mark.timeout(1800), pytest.mark.slow]


def test_anything_may_be_killed(tmp_path: Path) -> None:
    """Faults of different kinds, in an order and at moments drawn from the printed seed."""
    seed = int(os.environ.get("RUSHES_TEST_SEED") or time.time())
    print(f"RUSHES_TEST_SEED={seed}")
    drawn = random.Random(seed).sample(FAULTS, len(FAULTS))
    with fault_rig(tmp_path, seed) as rig:
        struck = campaign(rig, drawn, clips=6 * len(FAULTS))
        counted = rig.check()
    assert [each.what for each in struck] == [fault.what for fault in drawn]
    assert counted["attempts"] <= counted["clips"] + sum(each.repeated for each in struck)
