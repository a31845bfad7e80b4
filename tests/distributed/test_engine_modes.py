"""Clips that keep frames they are given, through real ranks: what is kept, what is made, and on every partition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from model.config import Partition
from model.engine.clip import RenderFailed
from model.engine.engine import Engine
from model.media.windows import Frames
from tests.distributed.conftest import Engines
from tests.tiny import CLIP

pytestmark = pytest.mark.xdist_group("ranks")


def video(seed: int, frames: int) -> Frames:
    """A soft pattern that moves."""
    random = np.random.default_rng(seed)
    x, y, t = np.meshgrid(np.arange(48), np.arange(32), np.arange(frames))
    waves = [np.sin(x * a + y * b + t * 0.4) for a, b in random.uniform(0.05, 0.3, (3, 2))]
    return np.ascontiguousarray(np.stack(waves, -1).transpose(2, 0, 1, 3) * 100 + 128).astype(np.uint8)


SPEC = replace(CLIP, clip_id="words", overlap=5)
START, END = video(1, 10), video(2, 11)
MODES: dict[str, dict[str, Any]] = {
    "image-to-video": {"start": START[:1]},
    "extend": {"start": START, "frames": 23, "window": 9},
    "extend backward": {"end": END, "frames": 19},
    "connect": {"start": START, "end": END, "frames": 28},
    "connect two images": {"start": START[:1], "end": END[:1]},
    "loop": {"loop": True, "frames": 17},
    "loop of a source": {"loop": True, "start": START, "frames": 18, "window": 17},
    "edit": {"start": START[:9], "strength": 0.5},
    "several windows": {"frames": 18, "window": 9},
}
SPECS = [replace(SPEC, clip_id=name, **values) for name, values in MODES.items()]


@pytest.fixture
def engine(engines: Engines) -> Engine:
    return engines.get(Partition())


@pytest.fixture(scope="module")
def made(engines: Engines) -> dict[str, Frames]:
    return {clip.clip_id: clip.frames for clip in engines.get(Partition()).render(SPECS)}


def test_every_mode_gives_the_frames_that_were_asked_for(made: dict[str, Frames]) -> None:
    for spec in SPECS:
        frames = made[spec.clip_id]
        assert frames.shape == (spec.frames, 32, 48, 3) and frames.std() > 1, spec.clip_id


def test_given_frames_are_kept_to_the_bit(made: dict[str, Frames]) -> None:
    assert np.array_equal(made["image-to-video"][:1], START[:1])
    assert np.array_equal(made["extend"][:10], START)
    assert np.array_equal(made["extend backward"][-11:], END)
    assert np.array_equal(made["connect"][:10], START)
    assert np.array_equal(made["connect"][-11:], END)
    assert np.array_equal(made["connect two images"][[0, -1]], np.concatenate((START[:1], END[:1])))
    assert np.array_equal(made["loop of a source"][:10], START)


def test_what_is_given_matters_and_so_do_words_and_seed(engine: Engine, made: dict[str, Frames]) -> None:
    (words,) = engine.render([SPEC])
    assert difference(words.frames, made["image-to-video"]) > 1
    others = [
        replace(SPEC, clip_id="image", start=END[:1]),
        replace(SPEC, clip_id="words", start=START[:1], prompt="a green cube"),
        replace(SPEC, clip_id="seed", start=START[:1], seed=8),
    ]
    for clip in engine.render(others):
        assert difference(clip.frames, made["image-to-video"]) > 1, clip.clip_id
    weaker, same = engine.render(
        [replace(SPECS[-2], clip_id="weaker", strength=0.2), replace(SPECS[-2], clip_id="same")]
    )
    assert np.array_equal(same.frames, made["edit"]) and difference(weaker.frames, same.frames) > 1
    (anew,) = engine.render([replace(SPECS[-2], clip_id="anew", strength=1.0)])
    assert np.array_equal(anew.frames, words.frames), "strength 1 keeps nothing"


def test_steps_are_counted_over_all_windows(engine: Engine) -> None:
    seen: list[tuple[str, int, int]] = []
    chosen = [SPECS[1], SPECS[-2]]
    list(engine.render(chosen, on_step=lambda *step: seen.append(step)))
    assert [step for step in seen if step[0] == "extend"][-1] == ("extend", 16, 16)
    last = [step for step in seen if step[0] == "edit"][-1]
    assert last[1] == last[2] < 4


def test_clips_that_keep_frames_are_made_together(engines: Engines, made: dict[str, Frames]) -> None:
    """Windows of one clip join the batch anew, those of clips with other time lines too."""
    several = engines.get(Partition(), micro_batch=3)
    for _ in range(2):
        for clip in several.render(SPECS):
            assert difference(clip.frames, made[clip.clip_id]) <= 1, clip.clip_id


def test_a_divided_engine_makes_the_same(engines: Engines, made: dict[str, Frames]) -> None:
    """Times differ from token to token here, so each rank must take the times of its own tokens."""
    for clip in engines.get(Partition(sp=2)).render(SPECS):
        assert difference(clip.frames, made[clip.clip_id]) <= 2, clip.clip_id


def test_frames_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"start of clip words is \(1, 32, 40, 3\), not frames of its size"):
        replace(SPEC, start=START[:1, :, :40])
    with pytest.raises(ValueError, match=r"strength=1.5 of clip words must be in \(0, 1\], with a start"):
        replace(SPEC, start=START, strength=1.5)


def test_a_clip_that_is_shorter_than_what_it_keeps_is_named(engine: Engine) -> None:
    with pytest.raises(RenderFailed, match="clip short") as failure:
        list(engine.render([replace(SPEC, clip_id="short", start=START, frames=5)]))
    assert failure.value.clip_id == "short"


def difference(one: Frames, other: Frames) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())
