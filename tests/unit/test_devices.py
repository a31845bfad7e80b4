"""Engines that share a host's GPUs: nobody gets another's, nobody waits holding some, the dead hold none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flows.render.devices import NoDevices, hold_devices

HOLDER = """
import sys, time
from pathlib import Path
from flows.render.devices import hold_devices
with hold_devices(Path(sys.argv[1]), 4, 3, 0) as numbers:
    print(*numbers, flush=True)
    time.sleep(600)
"""


def test_devices_are_never_shared_and_no_two_engines_wait_for_each_other(tmp_path: Path) -> None:
    owners: dict[int, int] = {}
    most: list[int] = []

    def engine(k: int) -> None:
        with hold_devices(tmp_path, 4, 1 + k % 4, 60) as numbers:
            assert len(numbers) == 1 + k % 4 and not any(number in owners for number in numbers)
            owners.update(dict.fromkeys(numbers, k))
            most.append(len(owners))
            time.sleep(0.05)
            for number in numbers:
                assert owners.pop(number) == k

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(engine, range(8)))
    assert max(most) <= 4 and not owners


def test_a_killed_engine_gives_its_devices_back(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "0 1 2\n"
        with hold_devices(tmp_path, 4, 1, 0) as numbers:
            assert numbers == (3,)
        with pytest.raises(NoDevices, match="2 of this host's 4 GPUs"), hold_devices(tmp_path, 4, 2, 0):
            pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        with hold_devices(tmp_path, 4, 4, 5) as numbers:
            assert numbers == (0, 1, 2, 3)
