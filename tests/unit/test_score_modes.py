"""What the measures of modes tell apart: what was kept from what was not, a join that shows from one that does not."""

import numpy as np
import pytest

from model.config import ClipShape
from model.media.windows import Frames
from model.score.modes import MOST_SEAM, closure, colour_drift, likeness, psnr, seam, steps_between, world_clips
from model.world.render import render
from model.world.scene import Scene, Solid


@pytest.fixture(scope="module")
def slide() -> Frames:
    """A solid that goes steadily to the right."""
    scene = Scene((Solid("red", "sphere", 0.9),), "right", floor="grass")
    return render(scene, width=64, height=64, frames=17)


def turning(frames: int) -> Frames:
    """A pattern that is back where it began after so many frames."""
    x, y, t = np.meshgrid(np.arange(32), np.arange(32), np.arange(frames), indexing="ij")
    wave = np.sin(2 * np.pi * (x / 16 + t / frames)) + np.cos(2 * np.pi * (y / 16 - t / frames))
    return np.repeat((wave * 60 + 128).astype(np.uint8).transpose(2, 1, 0)[..., None], 3, -1)


def test_psnr_of_known_errors(slide: Frames) -> None:
    assert psnr(slide, slide) == 99
    darker = np.clip(slide, 10, 245)
    one, two, four = (psnr(darker, darker + np.uint8(k)) for k in (1, 2, 4))
    assert one == pytest.approx(48.13, abs=0.01)  # 20 log10(255)
    assert one - two == two - four == pytest.approx(6.02, abs=0.01)
    assert psnr(darker + np.uint8(2), darker) == two


def test_a_seam_is_found_where_it_was_made(slide: Frames) -> None:
    assert all(seam(slide, join) <= MOST_SEAM for join in range(1, 17))
    cut = np.concatenate((slide[:6], slide[11:]))  # five frames are missing
    assert seam(cut, 6) > 2 and seam(cut, 4) <= MOST_SEAM and seam(cut, 9) <= MOST_SEAM
    brighter = slide.copy()
    brighter[8:] = np.clip(slide[8:].astype(int) + 12, 0, 255)
    assert seam(brighter, 8) > MOST_SEAM


def test_what_stands_still_has_no_seam(slide: Frames) -> None:
    still = np.repeat(slide[:1], 9, 0)
    assert steps_between(still) == [0.0] * 8
    assert seam(still, 4) == closure(still) == 1
    assert seam(np.concatenate((still, still + np.uint8(20))), 9) > 10


def test_a_loop_closes_and_a_clip_that_leads_away_does_not(slide: Frames) -> None:
    assert closure(turning(24)) == pytest.approx(1, abs=0.05)
    assert closure(turning(24)[:12]) > 3
    assert closure(slide) > 2
    assert closure(np.concatenate((slide, slide[-2:0:-1]))) < MOST_SEAM  # there and back


def test_likeness_is_of_layout_and_not_of_brightness(slide: Frames) -> None:
    assert likeness(slide, slide) == pytest.approx(1)
    assert likeness(slide, slide // 2 + np.uint8(60)) > 0.99
    assert likeness(slide, 255 - slide) == pytest.approx(-1)
    noise = np.random.default_rng(0).integers(0, 256, slide.shape, np.uint8)
    assert abs(likeness(slide, noise)) < 0.1
    assert likeness(slide, slide[:, :, ::-1]) < 0.95


def test_drift_is_the_largest_change_of_a_channel(slide: Frames) -> None:
    assert colour_drift(slide, slide) == 0
    redder = np.clip(slide, 0, 240)
    assert colour_drift(redder + np.array([9, 0, 4], np.uint8), redder) == pytest.approx(9)


def test_sources_are_clips_of_the_world_that_their_prompts_describe() -> None:
    prompts, clips = world_clips(2, ClipShape(32, 32, 5))
    again = world_clips(2, ClipShape(32, 32, 5))
    assert prompts == again[0] and all(np.array_equal(a, b) for a, b in zip(clips, again[1], strict=True))
    assert [clip.shape for clip in clips] == [(5, 32, 32, 3)] * 2
    assert world_clips(2, ClipShape(32, 32, 5), seed=1)[0] != prompts
