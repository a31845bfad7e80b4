"""Clips with a step cache through real ranks: what was skipped is told, and nothing depends on rank or neighbour."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model.config import Partition
from model.engine.clip import ClipSpec, RenderedClip
from model.engine.engine import Engine
from tests.distributed.conftest import Engines
from tests.tiny import CLIP, tiny_wan

pytestmark = pytest.mark.xdist_group("ranks")

WHOLE = replace(CLIP, steps=8)
IN_WINDOWS = replace(WHOLE, clip_id="windows", frames=18, window=9, overlap=5)


@pytest.fixture
def engine(engines: Engines) -> Engine:
    return engines.get(Partition(), micro_batch=3)


def rendered(engine: Engine, *specs: ClipSpec) -> list[RenderedClip]:
    return list(engine.render(specs))


def same(one: RenderedClip, other: RenderedClip) -> bool:
    return np.array_equal(one.frames, other.frames)


def test_every_window_is_computed_at_its_ends_and_what_it_skipped_is_told(engine: Engine) -> None:
    off = rendered(engine, WHOLE, IN_WINDOWS)
    never = rendered(engine, *(replace(spec, step_cache=1e-12) for spec in (WHOLE, IN_WINDOWS)))
    always = rendered(engine, *(replace(spec, step_cache=1.0) for spec in (WHOLE, IN_WINDOWS)))
    assert [clip.skipped_steps for clip in off] == [None, None]
    assert [clip.skipped_steps for clip in never] == [0, 0] and all(map(same, never, off))
    windows = len(off[1].steps) // 8
    assert windows > 1 and [clip.skipped_steps for clip in always] == [6, 6 * windows]
    assert not same(always[0], off[0])
    assert all(map(same, rendered(engine, WHOLE, IN_WINDOWS), off)), "a cache outlived its clip"


def test_a_clip_with_a_step_cache_is_rendered_alone_whatever_comes_with_it(engine: Engine) -> None:
    """In one batch the neighbour's changes would be weighed with its own, and it would skip other steps."""
    cached = replace(WHOLE, step_cache=0.1)
    near = [replace(cached, clip_id=f"near {seed}", seed=seed, prompt="a blue cube") for seed in range(2)]
    (alone,) = rendered(engine, cached)
    together = rendered(engine, near[0], cached, near[1], replace(WHOLE, clip_id="exact"))
    assert same(together[1], alone) and together[1].skipped_steps == alone.skipped_steps
    assert 0 < (alone.skipped_steps or 0) < 6, "a threshold that never or always skips proves nothing"
    assert len({clip.started for clip in together}) == 4


def test_a_divided_engine_skips_the_same_steps(engines: Engines, engine: Engine) -> None:
    specs = [replace(spec, step_cache=0.1) for spec in (WHOLE, IN_WINDOWS)]
    divided = engines.get(Partition(sp=2))
    for mine, whole in zip(rendered(divided, *specs), rendered(engine, *specs), strict=True):
        assert mine.skipped_steps == whole.skipped_steps
        assert np.abs(mine.frames.astype(int) - whole.frames).max() <= 2


def test_the_second_expert_begins_with_a_computed_step(tmp_path: Path) -> None:
    folder = tiny_wan(tmp_path, "2.2-a14b")
    spec = replace(CLIP, width=32, height=48, frames=5, steps=8, solver="unipc", step_cache=1.0)
    with Engine(folder, Partition(), log=tmp_path / "ranks.log") as engine:
        (clip,) = rendered(engine, spec)
    assert clip.skipped_steps == 8 - 3


@pytest.mark.parametrize("wrong", [0.0, -0.1, 1.5, float("nan")])
def test_a_threshold_that_means_nothing_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"step_cache=.* of clip one must be in \(0, 1\], or None"):
        replace(CLIP, step_cache=wrong)
