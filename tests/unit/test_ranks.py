"""How long an engine waits for its ranks: while they load, as long as they read; then for signs of life."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from model.engine import ranks as module
from model.engine.clip import RankDied, RankHung
from model.engine.messages import ClipFailed, FromRank, RankAtWork, RankSettings, ToRank
from model.engine.ranks import Ranks
from model.engine.rendering import Callbacks, Rendering
from model.engine.wire import Wire
from tests.tiny import CLIP

SLEEPS = "import time; time.sleep(600)"
READS = """
import os, sys, time
file = os.open(sys.argv[1], os.O_RDONLY)
until = time.monotonic() + 8
while time.monotonic() < until:
    os.pread(file, 1 << 20, 0)
    time.sleep(0.05)
sys.exit(3)
"""
MAPPED = """
import mmap, os, sys, time
file = os.open(sys.argv[1], os.O_RDONLY)
until = time.monotonic() + 8
while time.monotonic() < until:
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    with mmap.mmap(file, 0, prot=mmap.PROT_READ) as weights:
        sum(weights[k] for k in range(0, len(weights), 4096))
    time.sleep(0.05)
sys.exit(3)
"""
SETTINGS = RankSettings(
    path="/models/tiny",
    partition="tp=2",
    device="cpu",
    dtype="float32",
    threads=1,
    micro_batch=1,
    compile=False,
    frame_step=4,
    boundary=None,
)


@contextmanager
def loading(*programs: str, file: Path) -> Generator[Ranks]:
    """Ranks whose processes run these programs."""
    ranks = Ranks(len(programs), SETTINGS, {}, None, 0)
    with ExitStack() as running:
        for program in programs:
            ours, theirs = socket.socketpair()
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-S", "-E", "-c", program, str(file)], pass_fds=[theirs.fileno()]
                )
            running.callback(process.wait)
            running.callback(process.kill)
            wire: Wire[ToRank, FromRank] = Wire(Connection(ours.detach()), FromRank)
            running.callback(wire.connection.close)
            ranks._ranks.append(module._Rank(process, wire))  # pyright: ignore[reportPrivateUsage]
        yield ranks


# On a busy machine a process may get no turn for seconds; which pages stay in memory is the kernel's: chaos.
@pytest.mark.parametrize(
    "reads", [pytest.param(READS, id="read"), pytest.param(MAPPED, id="mapped", marks=pytest.mark.chaos)]
)
def test_a_rank_that_reads_is_waited_for_and_one_that_does_not_is_hung(
    reads: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK", 0.1)
    weights = tmp_path / "weights"
    weights.write_bytes(np.random.default_rng(0).bytes(4 << 20))
    with weights.open("rb") as file:
        os.fsync(file.fileno())
    if reads is MAPPED and b"tmpfs" in subprocess.check_output(["stat", "-f", "-c", "%T", tmp_path]):
        pytest.skip("pages of a tmpfs are in memory: to touch them reads nothing")
    with (
        loading(SLEEPS, reads, file=weights) as ranks,
        pytest.raises(RankDied, match=r"rank 1 of 2 died \(exit code 3\)"),
    ):
        ranks._greetings(5.0)  # pyright: ignore[reportPrivateUsage]
    with (
        loading(SLEEPS, SLEEPS, file=weights) as ranks,
        pytest.raises(RankHung, match="rank 0 was not ready and read nothing for 5 s; rank 0 is"),
    ):
        ranks._greetings(5.0)  # pyright: ignore[reportPrivateUsage]


class SlowRanks:
    """Ranks that are at one step for so many seconds, and say so now and then, or not."""

    def __init__(self, seconds: float, says: bool) -> None:
        self.ends, self.says = time.monotonic() + seconds, says
        self.buffers = [0]

    def tell_all(self, message: ToRank) -> None:
        pass

    tell = tell_all

    def states(self) -> str:
        return "rank 0 is running"

    def next_message(self) -> FromRank | None:
        time.sleep(0.05)
        if time.monotonic() > self.ends:
            return ClipFailed(job=0, reason="at its end")
        return RankAtWork() if self.says else None


def test_a_rank_that_says_that_it_is_at_work_is_not_hung() -> None:
    callbacks = Callbacks(
        on_step=lambda clip_id, step, steps: None,
        cancelled=set,
        on_checkpoint=None,
        checkpoint_every=(0, 0.0),
        leave=lambda: False,
    )

    def rendered(says: bool) -> list[Any]:
        ranks = cast(Ranks, SlowRanks(1.5, says))
        return list(Rendering(ranks, lambda spec: "").clips({0: CLIP}, callbacks, lambda: 0.5))

    assert [str(made) for _, made in rendered(says=True)] == [f"clip {CLIP.clip_id}: at its end"]
    with pytest.raises(RankHung, match=r"no step for 0\.5 s; rank 0 is running"):
        rendered(says=False)
