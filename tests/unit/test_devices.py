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
import torch

from flows.render import engine
from flows.render.devices import NoDevices, TooFewDevices, engines_here, hold_devices, visible_gpus
from flows.render.engine import devices_of
from flows.settings import Settings
from model.config import Partition
from model.engine.loader import NotEnoughDevices, load
from model.engine.messages import RankSettings

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


def test_engines_of_one_host_hold_their_gpus_with_a_fixed_partition_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "DEVICES_WAIT", 0.0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    settings, other = Settings(home=tmp_path, device="cuda"), Settings(home=tmp_path, device="cuda", gpus="1xh100")
    one = Partition.parse(settings.partition)
    assert one.world == 1, "the default fits a host of one GPU"
    with devices_of(settings, one) as first, devices_of(settings, one) as second:
        assert (first, second) == ((0,), (1,))
        with pytest.raises(NoDevices, match="1 of this host's 2 GPUs"), devices_of(settings, one):
            pass
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")  # an engine that is shown others knows them by their names
        with devices_of(settings, one) as third, pytest.raises(NoDevices), devices_of(other, one):
            assert third == (1,)


def test_a_partition_that_needs_more_gpus_than_there_are_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    settings = Settings(home=tmp_path, device="cuda", partition="tp=2")
    with pytest.raises(TooFewDevices, match=r"cfg1xsp1xtp2 needs 2 GPUs, and this host's engines have 1: set RUSHES_"):
        devices_of(settings, Partition(tp=2))
    rank = RankSettings(
        path="/nowhere",
        partition=f"tp={torch.cuda.device_count() + 1}",
        device="cuda",
        dtype="bfloat16",
        threads=1,
        micro_batch=1,
        compile=False,
        frame_step=4,
        boundary=None,
    )
    with pytest.raises(NotEnoughDevices, match=f"and torch finds {torch.cuda.device_count()}: choose a smaller one"):
        load(rank, 0.0)


@pytest.mark.parametrize(("partition", "device"), [("tp=2", "cpu"), ("tp=1", "cuda")])
def test_the_default_partition_goes_by_the_device(tmp_path: Path, partition: str, device: str) -> None:
    settings = Settings.model_validate({"home": tmp_path, "device": device})
    assert settings.partition == partition
    assert Settings.model_validate({"home": tmp_path, "device": device, "partition": "tp=4"}).partition == "tp=4"
    if device == "cpu":
        with devices_of(settings, Partition(tp=2)) as numbers:
            assert numbers is None


def test_gpus_are_found_without_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus(tmp_path) == []
    for name in ("nvidia0", "nvidia3", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert visible_gpus(tmp_path) == ["0", "1"]
    for shown, names in (("", []), ("-1", []), ("3", ["3"]), ("GPU-8f, 1", ["GPU-8f", "1"]), ("0,-1,2", ["0"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        assert visible_gpus(tmp_path) == names


@pytest.mark.parametrize(
    ("said", "shown", "limit", "engines"),
    [
        ({}, "", None, 1),  # a CPU
        ({"host_engines": 3}, "", None, 3),
        ({"gpus": "4xcpu", "partition": "tp=2"}, "", None, 2),
        ({"gpus": "4xcpu", "partition": "tp=2", "host_engines": 3}, "", None, 2),
        ({"device": "cuda"}, "", None, 1),  # none is seen, as where drivers have no files for them: torch will say
        ({"device": "cuda", "gpus": "2xh200"}, "", None, 2),
        ({"device": "cuda"}, "0,1,2,3", None, 4),
        ({"device": "cuda", "host_engines": 3}, "0,1,2,3", None, 3),
        ({"device": "cuda", "partition": "cfg=2,tp=2"}, "0,1,2,3,4,5", None, 1),
        ({"device": "cuda", "gpus": "2xh200"}, "0,1,2,3", None, 2),
        ({"device": "cuda", "gpus": "8xh200"}, "0,1,2,3", None, 4),  # which is the fleet's
        ({"device": "cuda", "partition": "auto", "gpus": "8xh200"}, "0,1", None, 2),
        ({"device": "cuda", "engines": 50}, "0,1", None, 2),  # the fleet's bound is not this host's
        ({"device": "cuda"}, "0,1", 7, 2),
        ({"device": "cuda"}, "0,1", 1, 1),
        ({"engines": 5}, "", 2, 2),
    ],
)
def test_a_host_takes_no_more_engines_than_its_devices_hold(
    said: dict[str, object],
    shown: str,
    limit: int | None,
    engines: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert engines_here(Settings(home=tmp_path, **said), limit) == engines  # pyright: ignore[reportArgumentType]


def test_a_host_on_which_no_engine_fits_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(TooFewDevices, match="tp=2 needs 2 GPUs, and this host has 1"):
        engines_here(Settings(home=tmp_path, device="cuda", partition="tp=2"))


@pytest.mark.parametrize(
    ("said", "fleet", "each"),
    [
        ({}, 1, 1),
        ({"engines": 6}, 6, 6),
        ({"engines": 6, "request_engines": 2}, 6, 2),
        ({"engines": 2, "request_engines": 6}, 2, 2),
        ({"engines": 0}, 0, 1),  # those that are started by hand are planned for
        ({"partition": "auto", "gpus": "8xcpu"}, 8, 8),
        ({"partition": "auto", "gpus": "8xcpu", "engines": 20}, 20, 20),
    ],
)
def test_what_requests_may_start(said: dict[str, object], fleet: int, each: int, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, **said)  # pyright: ignore[reportArgumentType]
    assert (settings.most_engines, settings.engines_each) == (fleet, each)
