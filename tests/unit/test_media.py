"""Pictures and videos from outside: read whole or refused, at a clip's size and rate."""

from __future__ import annotations

import io
from collections.abc import Callable
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from model.config import frames_at
from model.media.decode import MAX_BYTES, Media, probe, read_frames
from model.media.encode import encode_mp4, encode_png
from model.media.errors import BadMedia
from tests.videos import on_its_side


def numbered(count: int, width: int = 48, height: int = 32) -> np.ndarray:
    """Frame k is grey of 10 + 5 k all over."""
    levels = np.arange(count, dtype=np.uint8) * 5 + 10
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def order(frames: np.ndarray) -> list[int]:
    return [round((float(frame.mean()) - 10) / 5) for frame in frames]


def test_what_we_write_is_read_back() -> None:
    frames = numbered(9)
    data = encode_mp4(frames, 8, {})
    assert probe(data) == Media(media_type="video/mp4", width=48, height=32, frames=9, fps=8.0)
    assert order(read_frames(data, width=48, height=32, fps=8, most=100)) == list(range(9))
    assert order(read_frames(data, width=48, height=32, fps=8, most=4)) == [0, 1, 2, 3]
    picture = np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)
    data = encode_png(picture, {})
    assert probe(data) == Media(media_type="image/png", width=48, height=32, frames=1, fps=0.0)
    assert np.array_equal(read_frames(data, width=48, height=32, fps=8, most=9), picture[None])


@pytest.mark.parametrize(
    ("fps", "expected"),
    [(8, [0, 3, 6, 9, 12, 15, 18, 21]), (24, list(range(24))), (48, [0, 1, 1, 2, 2]), (16, [0, 2, 3, 5, 6])],
)
def test_another_rate_is_met_by_the_nearest_frames(fps: int, expected: list[int]) -> None:
    data = encode_mp4(numbered(24), 24, {})
    frames = read_frames(data, width=48, height=32, fps=fps, most=1000)
    assert order(frames)[: len(expected)] == expected
    assert len(frames) == frames_at(24, 24.0, fps), "planning and rendering count alike"


def test_another_size_is_covered_and_cut_around_the_centre() -> None:
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = 200  # the middle third is what a square sees
    (square,) = read_frames(encode_png(wide, {}), width=16, height=16, fps=8, most=1)
    assert square.shape == (16, 16, 3) and square[:, 1:-1].min() > 180


def test_a_turned_picture_is_read_upright_and_transparency_does_not_hurt() -> None:
    picture, file = Image.new("RGB", (20, 10)), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by a quarter
    picture.save(file, "JPEG", exif=exif)
    found = probe(file.getvalue())
    assert (found.media_type, found.width, found.height) == ("image/jpeg", 10, 20)
    file = io.BytesIO()
    Image.new("RGBA", (16, 16), (10, 20, 30, 0)).save(file, "PNG")
    assert read_frames(file.getvalue(), width=16, height=16, fps=8, most=1).shape == (1, 16, 16, 3)


def test_a_turned_video_is_read_upright() -> None:
    frames = numbered(5)
    frames[:, :, 24:] = 200  # the right half, which becomes the lower one
    data = on_its_side(encode_mp4(frames, 8, {}))
    assert probe(data) == Media(media_type="video/mp4", width=32, height=48, frames=5, fps=8.0)
    read = read_frames(data, width=32, height=48, fps=8, most=9)
    assert np.abs(read.astype(int) - np.rot90(frames, -1, axes=(1, 2))).mean() < 3


def cut_off(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def sound_only() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.time_base = 8000, Fraction(1, 8000)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, shape, np.uint8)


UNREADABLE: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (bytes, "is neither a picture"),
    "text": (lambda: b"a red ball\n" * 50, "is neither a picture"),
    "playlist": (lambda: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "is neither a picture"),
    "half a picture": (lambda: cut_off(encode_png(noise(64, 64, 3), {})), "cannot be read"),
    "half a video": (lambda: cut_off(encode_mp4(noise(9, 64, 64, 3), 8, {})), "cannot be"),
    "sound": (sound_only, "holds no video"),
    "too large": (lambda: bytes(MAX_BYTES + 1), "has 256,000,001 bytes, the most is 256,000,000"),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_what_cannot_be_read_to_its_end_is_refused(what: str) -> None:
    make, message = UNREADABLE[what]
    data = make()
    with pytest.raises(BadMedia, match=message):
        probe(data)
