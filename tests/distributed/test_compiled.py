"""A compiled engine makes the clips that an eager one makes, having compared its network with an eager one first."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.config import Partition
from model.engine.clip import ClipSpec, StartFailed
from model.engine.engine import Compile, Device, Engine
from model.loading.load import load_dit
from model.network.compiled import COMPILERS, compile_blocks
from tests.distributed.partition_worker import inputs
from tests.tiny import CLIP, tiny_model

pytestmark = pytest.mark.xdist_group("ranks")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all of them: much of what is compiled is the same."""
    return tmp_path_factory.mktemp("compiled")


COMPILER = pytest.mark.skipif(
    not any(map(shutil.which, COMPILERS)), reason="torch.compile needs a C++ compiler on a CPU"
)


@COMPILER
@pytest.mark.filterwarnings("default")  # torch's compiler warns of other parts of torch
def test_a_compiled_network_computes_what_an_eager_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    dit = load_dit(tiny_model(tmp_path / "tiny", layers=1), torch.float32)
    latents, times, text, _ = inputs("divides")
    with torch.inference_mode():
        wanted = dit(latents, times, text)
        compile_blocks(dit)
        assert (dit(latents, times, text) - wanted).abs().max() <= 1e-5
    assert any((tmp_path / "cache").iterdir()), "nothing was compiled"


@pytest.mark.chaos
@COMPILER
@pytest.mark.parametrize(
    ("partition", "how"),
    [
        (Partition(), True),
        (Partition(tp=2), True),
        (Partition(), "reduce-overhead"),
    ],
    ids=str,
)
def test_a_compiled_engine_makes_the_same_clips_within_a_level(
    partition: Partition, how: Compile, tmp_path: Path, cache: Path
) -> None:
    clips = [CLIP, replace(CLIP, clip_id="longer", frames=13)]
    compare(tiny_model(tmp_path / "tiny"), partition, how, "cpu", clips, cache)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU replays CUDA graphs")
@pytest.mark.parametrize("how", [True, "reduce-overhead"])
def test_a_compiled_engine_makes_the_same_clips_on_a_gpu(how: Compile, tmp_path: Path, cache: Path) -> None:
    """Shapes come back after others, guided and not, with a step cache and without: each has a graph of its own."""
    others = [
        replace(CLIP, clip_id="longer", frames=13),
        replace(CLIP, clip_id="cached", step_cache=0.1),
        replace(CLIP, clip_id="unguided", guidance=1.0),
    ]
    clips = [CLIP, *others, *(replace(clip, clip_id=f"{clip.clip_id} again", seed=7) for clip in (CLIP, *others))]
    compare(tiny_model(tmp_path / "tiny"), Partition(), how, "cuda", clips, cache)


def compare(
    model: Path, partition: Partition, how: Compile, device: Device, clips: list[ClipSpec], cache: Path
) -> None:
    """A compiled engine with an eager one, both in float32, which a level of a pixel must not show."""
    log = model.parent / "ranks.log"
    with Engine(model, partition, device=device, dtype="float32", log=log) as engine:
        wanted = list(engine.render(clips))
    with Engine(model, partition, device=device, dtype="float32", compile=how, cache=cache, log=log) as engine:
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
