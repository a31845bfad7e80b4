"""A compiled engine makes the clips that an eager one makes, having compared its network with an eager one first."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model.compiled import COMPILERS
from model.config import Partition
from model.engine import Engine, StartFailed
from tests.tiny import CLIP, tiny_model

pytestmark = [pytest.mark.xdist_group("ranks"), pytest.mark.timeout(900)]


@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("partition", [Partition(), Partition(tp=2)], ids=str)
def test_a_compiled_engine_makes_the_same_clips_within_a_level(partition: Partition, tmp_path: Path) -> None:
    model, cache = tiny_model(tmp_path / "tiny"), tmp_path / "compiled"
    clips = [CLIP, replace(CLIP, clip_id="longer", frames=13)]
    with Engine(model, partition, log=tmp_path / "ranks.log") as engine:
        wanted = list(engine.render(clips))
    with Engine(model, partition, compile=True, cache=cache, log=tmp_path / "ranks.log") as engine:
        assert all(0 < rank.self_test <= 1e-5 for rank in engine.ready), "nothing was compared"
        found = list(engine.render(clips))
    assert any(cache.iterdir()), "nothing was kept for the next start"
    for a, b in zip(wanted, found, strict=True):
        assert np.abs(a.frames.astype(int) - b.frames).max() <= 1


def test_without_a_compiler_the_start_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    engine = Engine(tiny_model(tmp_path / "tiny"), Partition(), compile=True, log=tmp_path / "ranks.log")
    with pytest.raises(StartFailed, match=r"needs a C\+\+ compiler on a CPU, and there is no no-such-compiler"):
        engine.start()
    assert not engine.running
