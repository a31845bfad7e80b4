"""The table of clips on a run's page: small whatever they show, made a few times, what failed first."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from db.requests import Progress
from db.view import COLUMNS, row_of
from flows.generate.gallery import ADDRESS, APART, CLIPS, MARKS, Occasions, clips_text, moving
from flows.web.links import Links
from model.media.windows import Frames
from tests.unit.test_status import at

HEAD = "data:image/webp;base64,"


def scene(frames: int, height: int, width: int) -> Frames:
    """A bright square that moves over a slope of colours."""
    y, x = np.mgrid[0:height, 0:width]
    ground = np.stack([y * 255 // height, x * 255 // width, (x + y) * 127 // (height + width)], -1).astype(np.uint8)
    made = np.repeat(ground[None], frames, 0)
    for k in range(frames):
        left = k * (width // 2) // frames
        made[k, height // 4 : height // 2, left : left + width // 4] = 250
    return made


def opened(address: str) -> Image.Image:
    assert address.startswith(HEAD) and len(address) <= ADDRESS
    return Image.open(io.BytesIO(base64.b64decode(address.removeprefix(HEAD))))


def test_a_clip_moves() -> None:
    picture = opened(moving(scene(24, 72, 128)))
    assert picture.size == (128, 72) and getattr(picture, "n_frames") == 24  # noqa: B009  (of animations alone)
    first = np.asarray(picture.convert("RGB"), np.int16)
    picture.seek(20)
    assert np.abs(first - np.asarray(picture.convert("RGB"), np.int16)).max() > 100
    assert getattr(opened(moving(scene(1, 64, 64))), "n_frames", 1) == 1


@pytest.mark.parametrize("shape", [(24, 128, 128), (24, 16, 128), (3, 128, 72)])
def test_noise_is_shown_smaller_and_never_longer(shape: tuple[int, int, int]) -> None:
    """Nothing compresses worse."""
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    opened(moving(noise)).load()


def times_made(looks: list[tuple[float, Progress]]) -> list[float]:
    occasions = Occasions()
    return [now for now, progress in looks if occasions.due(progress, now)]


def test_a_short_request_has_the_table_of_its_end_alone() -> None:
    assert times_made([(float(n), at(n, done=n, queued=59 - n)) for n in range(60)]) == []


@given(st.integers(1, 10_000), st.integers(100, 5_000))
def test_a_long_one_has_it_a_few_times(seconds: int, clips: int) -> None:
    """Clips at an even pace, looked at a hundred times."""
    looks = [
        (n * seconds / 100, at(n * seconds / 100, done=clips * n // 100, queued=clips - clips * n // 100))
        for n in range(101)
    ]
    made = times_made(looks)
    assert len(made) <= len(MARKS)
    assert all(after - before >= APART for before, after in zip([0.0, *made], made, strict=False))
    if seconds > 10 * APART:
        assert len(made) == len(MARKS)


def test_the_whole_table_is_bounded() -> None:
    """The longest words, of marks that each become five characters, and the largest pictures."""
    said = {"prompt": "|" * 5000, "error": "<" * 5000, "clip_id": "c" * 30, "seed": 2**63 - 1}
    row = row_of({**dict.fromkeys(COLUMNS), "status": "quarantined", "mode": "text-to-video", **said})
    picture, links = HEAD + "A" * (ADDRESS - len(HEAD)), Links("https://" + "h" * 200)
    text = clips_text([row] * CLIPS, at(600, done=9976, failed=24), lambda _: picture, links)
    assert text.startswith("# 24 of 10,000 clips\n") and len(text) <= 400_000
    assert all(len(line.split("|")) == 8 for line in text.splitlines() if line.startswith("|"))


def test_ids_lead_to_where_a_clip_plays_or_what_is_known_of_it() -> None:
    made = {"prompt": "p", "status": "done", "mode": "image", "media_type": "image/png", "object_key": "blobs/x"}
    rows = [
        row_of({**dict.fromkeys(COLUMNS), **made, "clip_id": "one"}),
        row_of({**dict.fromkeys(COLUMNS), **made, "clip_id": "two", "object_key": None, "status": "failed"}),
    ]
    text = clips_text(
        rows, at(1, done=1, failed=1), lambda row: "data:x" if row.object_key else None, Links("http://w")
    )
    assert "| ![one](data:x) |" in text and "[one](http://w/clips/one.png)" in text
    assert "[two](http://w/clips/two.json)" in text and "(http://w/requests/" in text
    assert "](http" not in clips_text(rows, at(1, done=1, failed=1), lambda _: None)
