"""From a leased clip to what the ranks are told to make."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from db.artifacts import NewArtifact
from db.claim import LeasedClip
from db.settings import SETTINGS, ClipSettings
from db.tables import ClipDirection, ClipMode
from flows.render.clip import spec_of
from flows.request.form import SETTINGS as PROMPT_SETTINGS
from model.media.encode import encode_mp4, encode_png
from model.media.errors import BadMedia

FRAMES = np.random.default_rng(0).integers(0, 255, (9, 32, 48, 3), np.uint8)
STORED = {
    "video": encode_mp4(FRAMES, 8, {}),
    "picture": encode_png(FRAMES[0], {}),
    "broken": b"nothing that can be seen",
}


def leased(mode: ClipMode, source: str | None = None, end: str | None = None, **changes: Any) -> LeasedClip:
    values: dict[str, Any] = {
        "clip_id": "clip",
        "attempt_no": 1,
        "prompt": "a red ball",
        "negative_prompt": None,
        "seed": 7,
        "width": 32,
        "height": 32,
        "frames": 17,
        "fps": 8,
        "steps": 4,
        "guidance": 3.0,
        "solver": "ab2",
        "shift": 3.0,
        "recipe": "r",
        "mode": mode,
        "direction": None,
        "strength": None,
        "window": None,
        "overlap": None,
        "step_cache": None,
        "source": artifact(source),
        "end_source": artifact(end),
        **changes,
    }
    settings = ClipSettings(**{name: values.pop(name) for name in SETTINGS if name in values})
    return LeasedClip(settings=settings, **values)


def artifact(name: str | None) -> NewArtifact | None:
    return name and NewArtifact(sha256=name, key=name, bytes=1, media_type="any/thing")  # pyright: ignore


def fetch(source: NewArtifact) -> bytes:
    return STORED[source.key]


@pytest.mark.parametrize(
    ("clip", "start", "end"),
    [
        (leased(ClipMode.TEXT_TO_VIDEO), 0, 0),
        (leased(ClipMode.IMAGE_TO_VIDEO, "picture"), 1, 0),
        (leased(ClipMode.IMAGE_TO_VIDEO, "video"), 1, 0),
        (leased(ClipMode.EXTEND, "video", direction=ClipDirection.FORWARD), 9, 0),
        (leased(ClipMode.EXTEND, "video", direction=ClipDirection.BACKWARD), 0, 9),
        (leased(ClipMode.CONNECT, "video", "picture"), 9, 1),
        (leased(ClipMode.LOOP, "video"), 9, 0),
    ],
)
def test_sources_become_what_a_clip_begins_and_ends_with(clip: LeasedClip, start: int, end: int) -> None:
    spec = spec_of(clip, fetch)
    assert (spec.given.start, spec.given.end, spec.loop) == (start, end, clip.mode is ClipMode.LOOP)
    for frames in (spec.start, spec.end):
        assert frames is None or frames.shape[1:] == (32, 32, 3)


def test_an_edit_keeps_nothing_but_starts_from_its_source() -> None:
    spec = spec_of(leased(ClipMode.EDIT, "video", strength=0.5, frames=5, window=9, overlap=5), fetch)
    assert spec.start is not None and len(spec.start) == 5
    assert (spec.given.start, spec.strength, spec.window, spec.overlap) == (0, 0.5, 9, 5)


def test_a_step_cache_is_the_clips_own() -> None:
    caches = [spec_of(leased(ClipMode.TEXT_TO_VIDEO, step_cache=each), fetch).step_cache for each in (None, 0.2)]
    assert caches == [None, 0.2]


def test_every_setting_of_a_prompt_comes_to_the_ranks_as_it_is() -> None:
    assert set(PROMPT_SETTINGS) - {"negative_prompt", "samples", "seed"} <= set(SETTINGS), "the ledger keeps them all"
    values: dict[str, Any] = {
        "guidance": 2.5,
        "guidance_2": 3.5,
        "shift": 1.5,
        "steps": 7,
        "fps": 9,
        "step_cache": 0.2,
        "window": 13,
        "overlap": 9,
    }
    clip = leased(ClipMode.EDIT, "video", strength=0.5, frames=5, width=48, height=16, solver="euler", **values)
    spec = spec_of(clip, fetch)
    assert {name: getattr(spec, name) for name in SETTINGS} == asdict(clip.settings)


def test_a_source_that_cannot_be_read_is_said_so() -> None:
    with pytest.raises(BadMedia, match="neither a picture"):
        spec_of(leased(ClipMode.EXTEND, "broken"), fetch)
