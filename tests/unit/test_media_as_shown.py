"""Sources look to the model as they look to a person: timing, geometry, colour, transparency, tracks, animation.

Each file is made by a real encoder from pictures that are known, and read back: within ±4 levels and half a frame of
what a player or a viewer shows.
"""

from __future__ import annotations

import io
import random
import struct
import zlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
from av import VideoFrame
from av.stream import Disposition
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from model.config import frames_at
from model.media.decode import Media, pixels_in, probe, read_frames
from model.media.errors import BadMedia

Frames = np.ndarray
COLOURS = ((200, 40, 90), (30, 180, 60), (20, 60, 220), (240, 220, 40), (128, 128, 128), (12, 12, 12), (243, 243, 243))


def encoded(
    frames: Frames,
    *,
    codec: str = "libx264",
    container: str = "mp4",
    pix_fmt: str = "yuv444p",
    stamps: Sequence[int] | None = None,
    tick: Fraction = Fraction(1, 8),
    convert: dict[str, Any] | None = None,
    context: dict[str, Any] | None = None,
    stream: Callable[[Any], None] = lambda stream: None,
) -> bytes:
    """frames [T, H, W, 3 or 4] as a video; frame k is shown from stamps[k] ticks on."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        track = out.add_stream(codec, rate=1 / tick)
        track.width, track.height, track.pix_fmt = frames.shape[2], frames.shape[1], pix_fmt
        track.codec_context.time_base = track.time_base = tick
        for name, value in (context or {}).items():
            setattr(track.codec_context, name, value)
        stream(track)
        for k, frame in enumerate(frames):
            picture = VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgba" if frame.shape[2] == 4 else "rgb24")
            picture = picture.reformat(format=pix_fmt, **(convert or {}))
            picture.pts, picture.time_base = k if stamps is None else stamps[k], tick
            out.mux(track.encode(picture))
        out.mux(track.encode(None))
    return file.getvalue()


def numbered(count: int, size: int = 32) -> Frames:
    """Frame k is grey of 10 + 6 k all over."""
    return np.stack([np.full((size, size, 3), 10 + 6 * k, np.uint8) for k in range(count)])


def numbers(frames: Frames) -> list[int]:
    return [round((float(frame.mean()) - 10) / 6) for frame in frames]


def bars(height: int = 32, width: int = 112) -> Frames:
    """A picture of seven bars of one colour each."""
    bar = width // len(COLOURS)
    return np.repeat(np.asarray(COLOURS, np.uint8)[None], height, 0).repeat(bar, 1)


def seen(picture: Frames) -> list[tuple[int, int, int]]:
    """The colours in the middle of the seven bars."""
    height, width, _ = picture.shape
    bar = width // len(COLOURS)
    return [tuple(int(c) for c in picture[height // 2, bar * k + bar // 2]) for k in range(len(COLOURS))]


def near(found: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]], levels: int = 4) -> bool:
    return bool(np.abs(np.asarray(found, int) - np.asarray(wanted, int)).max() <= levels)


def still(picture: Frames, times: int = 2) -> Frames:
    return np.stack([picture] * times)


def read(data: bytes, width: int, height: int, fps: float = 8, most: int = 1000, **how: Any) -> Frames:
    return read_frames(data, width=width, height=height, fps=fps, most=most, **how)


# --- timing -----------------------------------------------------------------------------------------------------------


def shown_at(times: Sequence[float], moment: float) -> int:
    """The frame that a player shows at a moment: the last whose time has come."""
    return max(0, bisect_right(times, moment + 1e-9) - 1)


@settings(max_examples=25, deadline=None)
@given(
    gaps=st.lists(st.integers(1, 12), min_size=1, max_size=20),
    start=st.sampled_from((0, 7)),
    fps=st.sampled_from((4, 8, 15, 24)),
    container=st.sampled_from(("mp4", "matroska")),
)
def test_every_moment_gets_the_frame_that_a_player_shows(gaps: list[int], start: int, fps: int, container: str) -> None:
    """Variable rates and pauses included: within half of a frame as long as most are."""
    tick = Fraction(1, 24)
    stamps = [start + sum(gaps[:k]) for k in range(len(gaps) + 1)]
    data = encoded(numbered(len(stamps)), stamps=stamps, tick=tick, container=container)
    found = numbers(read(data, 32, 32, fps))
    times = [float((stamp - stamps[0]) * tick) for stamp in stamps]
    half = float(sorted(gaps)[len(gaps) // 2] * tick) / 2
    for k, number in enumerate(found):
        allowed = range(shown_at(times, k / fps - half), shown_at(times, k / fps + half) + 1)
        assert number in allowed, (k, number, list(allowed))
    media = probe(data)
    assert len(found) == frames_at(media.frames, media.fps, fps), "planning and rendering count alike"
    assert (len(found) + 1) / fps >= times[-1] - half, "the last frame is reached"


@pytest.mark.parametrize(
    ("codec", "container", "pix_fmt", "tick"),
    [
        ("libx264", "mp4", "yuv420p", Fraction(1001, 30000)),
        ("libx264", "matroska", "yuv420p", Fraction(1001, 24000)),
        ("libvpx-vp9", "webm", "yuv420p", Fraction(1, 24)),
        ("libx264", "mpegts", "yuv420p", Fraction(1, 25)),
        ("mpeg4", "avi", "yuv420p", Fraction(1, 25)),
        ("libx265", "mp4", "yuv420p10le", Fraction(1, 30)),
    ],
)
def test_a_steady_rate_is_found_in_every_container(codec: str, container: str, pix_fmt: str, tick: Fraction) -> None:
    context = {"options": {"x265-params": "log-level=none"}} if codec == "libx265" else {}
    data = encoded(numbered(25), codec=codec, container=container, pix_fmt=pix_fmt, tick=tick, context=context)
    media = probe(data)
    assert media.frames == 25 and media.fps == pytest.approx(float(1 / tick), rel=1e-3)
    wanted = [int(k / (8 * tick) + Fraction(1, 2)) for k in range(frames_at(25, float(1 / tick), 8))]
    assert numbers(read(data, 32, 32, 8)) == wanted


# --- geometry ---------------------------------------------------------------------------------------------------------

CORNERS = np.zeros((32, 48, 3), np.uint8)
CORNERS[:16, :24], CORNERS[:16, 24:], CORNERS[16:, :24] = (220, 30, 30), (30, 200, 30), (30, 30, 220)


def corners(picture: Frames) -> list[tuple[int, ...]]:
    height, width, _ = picture.shape
    places = ((height // 5, width // 5), (height // 5, -width // 5), (-height // 5, width // 5))
    return [tuple(int(c) for c in picture[place]) for place in places]


@pytest.mark.parametrize("container", ["mp4", "matroska"])
@pytest.mark.parametrize(
    ("ratio", "width", "height"), [(Fraction(2), 96, 32), (Fraction(1, 2), 48, 64), (Fraction(4, 3), 64, 32)]
)
def test_pixels_that_are_not_square_are_stretched(ratio: Fraction, width: int, height: int, container: str) -> None:
    data = encoded(still(CORNERS), container=container, context={"sample_aspect_ratio": ratio})
    assert probe(data) == Media(media_type=probe(data).media_type, width=width, height=height, frames=2, fps=8.0)
    assert near(corners(read(data, width, height)[0]), corners(CORNERS), 6)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
def test_rotations_and_mirror_images_are_undone(degrees: int, mirrored: bool) -> None:
    data = encoded(still(CORNERS), stream=lambda track: track.set_display_rotation(degrees, mirrored))
    wanted = np.rot90(CORNERS, degrees // 90)
    wanted = wanted[:, ::-1] if mirrored else wanted
    height, width, _ = wanted.shape
    assert (probe(data).width, probe(data).height) == (width, height)
    assert near(corners(read(data, width, height)[0]), corners(wanted), 6)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_as_their_exif_says(orientation: int, format: str) -> None:
    lies = {1: CORNERS, 2: CORNERS[:, ::-1], 3: CORNERS[::-1, ::-1], 4: CORNERS[::-1]}
    turned = CORNERS.transpose(1, 0, 2)
    lies |= {5: turned, 6: turned[::-1], 7: turned[::-1, ::-1], 8: turned[:, ::-1]}
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(lies[orientation])).save(file, format, exif=exif, quality=100)
    media = probe(file.getvalue())
    assert (media.width, media.height) == (48, 32)
    assert near(corners(read(file.getvalue(), 48, 32)[0]), corners(CORNERS), 6)


# --- colour -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pix_fmt", ["yuv444p", "yuv420p", "yuv422p10le", "yuv420p10le"])
@pytest.mark.parametrize("matrix", [1, 5])
@pytest.mark.parametrize("range_", ["MPEG", "JPEG"])
def test_matrix_and_range_are_those_that_the_file_says(pix_fmt: str, matrix: int, range_: str) -> None:
    convert = {"dst_colorspace": matrix, "dst_color_range": range_}
    context = {"colorspace": matrix, "color_range": 1 if range_ == "MPEG" else 2, "options": {"crf": "1"}}
    data = encoded(still(bars()), pix_fmt=pix_fmt, convert=convert, context=context)
    assert near(seen(read(data, 112, 32)[0]), COLOURS)


@pytest.mark.parametrize(("width", "height", "matrix"), [(112, 32, 5), (1288, 720, 1)])
def test_a_matrix_that_is_not_said_is_the_one_that_players_suppose(width: int, height: int, matrix: int) -> None:
    convert = {"dst_colorspace": matrix, "dst_color_range": "MPEG"}
    data = encoded(still(bars(height, width), 1), convert=convert, context={"options": {"crf": "1"}})
    assert near(seen(read(data, width, height)[0]), COLOURS)


def test_full_range_of_motion_jpeg_is_kept() -> None:
    data = encoded(
        still(bars()), codec="mjpeg", container="avi", pix_fmt="yuvj444p", convert={"dst_color_range": "JPEG"}
    )
    assert near(seen(read(data, 112, 32)[0]), COLOURS, 6)


@pytest.mark.parametrize(("curve", "name"), [(16, "PQ"), (18, "HLG")])
def test_hdr_is_refused_in_one_sentence(curve: int, name: str) -> None:
    context = {"color_primaries": 9, "color_trc": curve, "colorspace": 9}
    data = encoded(still(bars()), pix_fmt="yuv420p10le", context=context)
    with pytest.raises(BadMedia, match=rf"is HDR video \({name}\), which is not read: convert it to SDR"):
        probe(data)


def srgb_light(samples: Any) -> Any:
    samples = np.asarray(samples, float) / 255
    return np.where(samples <= 0.04045, samples / 12.92, ((samples + 0.055) / 1.055) ** 2.4)


def srgb_samples(light: Any) -> Any:
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


P3_TO_SRGB = np.array([[1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]])
INNER = (
    (150, 110, 120),
    (110, 150, 115),
    (105, 115, 160),
    (180, 170, 120),
    (128, 128, 128),
    (12, 12, 12),
    (243, 243, 243),
)


def in_p3() -> list[tuple[int, ...]]:
    """INNER, which all lie within both, as samples of Display P3."""
    light = srgb_light(INNER) @ np.linalg.inv(P3_TO_SRGB).T
    return [tuple(round(float(c)) for c in each) for each in srgb_samples(light)]


def bars_of(colours: Sequence[Sequence[int]]) -> Frames:
    return np.repeat(np.asarray(colours, np.uint8)[None], 32, 0).repeat(16, 1)


def test_a_video_in_wider_primaries_is_shown_in_srgb() -> None:
    context = {"color_primaries": 12, "color_trc": 1, "colorspace": 1, "options": {"crf": "1"}}
    data = encoded(still(bars_of(in_p3())), convert={"dst_colorspace": 1}, context=context)
    assert near(seen(read(data, 112, 32)[0]), INNER, 5)


def p3_profile() -> bytes:
    """An ICC profile of Display P3, as small as one can be: its three primaries (D50) and sRGB's curve."""

    def number(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def place(*xyz: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(map(number, xyz))

    curve = (
        b"para\0\0\0\0"
        + struct.pack(">HH", 3, 0)
        + b"".join(map(number, (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)))
    )
    text = b"desc\0\0\0\0" + struct.pack(">I", 3) + b"P3\0" + bytes(79)
    tags = {
        b"desc": text,
        b"wtpt": place(0.9642, 1.0, 0.8249),
        b"rXYZ": place(0.51512, 0.24120, -0.00105),
        b"gXYZ": place(0.29198, 0.69225, 0.04189),
        b"bXYZ": place(0.15710, 0.06657, 0.78407),
        b"rTRC": curve,
        b"gTRC": curve,
        b"bTRC": curve,
    }
    table, body, at = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data
    size = at + len(body)
    head = struct.pack(">I4sI4s4s4s", size, b"lcms", 0x02400000, b"mntr", b"RGB ", b"XYZ ") + bytes(12) + b"acsp"
    head = head.ljust(68, b"\0") + number(0.9642) + number(1.0) + number(0.8249)
    return head.ljust(128, b"\0") + table + body


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_colour_profile_is_obeyed(format: str) -> None:
    file = io.BytesIO()
    how: dict[str, Any] = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    Image.fromarray(bars_of(in_p3())).save(file, format, icc_profile=p3_profile(), **how)
    assert near(seen(read(file.getvalue(), 112, 32)[0]), INNER)


def test_a_damaged_profile_is_left_aside_as_viewers_do() -> None:
    file = io.BytesIO()
    Image.fromarray(bars()).save(file, "PNG", icc_profile=p3_profile()[:200])
    assert near(seen(read(file.getvalue(), 112, 32)[0]), COLOURS)


def test_a_png_s_gamma_is_obeyed() -> None:
    chunk, file = PngInfo(), io.BytesIO()
    chunk.add(b"gAMA", struct.pack(">I", 100_000))  # linear light
    linear = (255 * srgb_light(bars()) + 0.5).astype(np.uint8)
    Image.fromarray(linear).save(file, "PNG", pnginfo=chunk)
    assert near(seen(read(file.getvalue(), 112, 32)[0])[:5], COLOURS[:5], 6)  # darkest ones have too few samples


def grey_of_16_bits() -> Image.Image:
    return Image.fromarray(np.repeat(np.arange(7, dtype=np.uint16)[None] * 10_000, 32, 0).repeat(16, 1))


def test_sixteen_bits_a_sample_are_scaled_and_not_cut() -> None:
    file = io.BytesIO()
    grey_of_16_bits().save(file, "PNG")
    levels = [round(k * 10_000 / 257) for k in range(7)]
    assert near(seen(read(file.getvalue(), 112, 32)[0]), [(level,) * 3 for level in levels], 1)


def test_cmyk_is_shown_in_colours() -> None:
    file = io.BytesIO()
    Image.fromarray(bars()).convert("CMYK").save(file, "JPEG", quality=100, subsampling=0)
    assert near(seen(read(file.getvalue(), 112, 32)[0]), COLOURS, 6)


# --- transparency -----------------------------------------------------------------------------------------------------

GROUND = (20, 120, 220)


def half_clear() -> Frames:
    """Left: opaque red. Middle: half clear green. Right: clear, over white that nobody should see."""
    picture = np.zeros((32, 96, 4), np.uint8)
    picture[:, :32], picture[:, 32:64], picture[:, 64:] = (200, 40, 40, 255), (40, 200, 40, 128), (255, 255, 255, 0)
    return picture


def on_ground(ground: tuple[int, int, int]) -> list[tuple[int, ...]]:
    mixed = tuple(round((128 * c + 127 * g) / 255) for c, g in zip((40, 200, 40), ground, strict=True))
    return [(200, 40, 40), mixed, ground]


def thirds(picture: Frames) -> list[tuple[int, ...]]:
    return [tuple(int(c) for c in picture[16, x]) for x in (16, 48, 80)]


def as_file(picture: Image.Image, format: str, **how: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **how)
    return file.getvalue()


CLEAR: dict[str, Callable[[], bytes]] = {
    "png": lambda: as_file(Image.fromarray(half_clear()), "PNG"),
    "png with a profile": lambda: as_file(Image.fromarray(half_clear()), "PNG", icc_profile=b"none"),
    "webp": lambda: as_file(Image.fromarray(half_clear()), "WEBP", lossless=True, exact=True),
    "quicktime": lambda: encoded(still(half_clear()), codec="qtrle", container="mov", pix_fmt="argb"),
    "matroska": lambda: encoded(still(half_clear()), codec="ffv1", container="matroska", pix_fmt="bgra"),
    "webm": lambda: encoded(
        still(half_clear()),
        codec="libvpx-vp9",
        container="webm",
        pix_fmt="yuva420p",
        context={"options": {"crf": "4", "b": "0"}},
        stream=lambda track: track.metadata.update(alpha_mode="1"),
    ),
}


@pytest.mark.parametrize("ground", [(0, 0, 0), GROUND])
@pytest.mark.parametrize("kind", CLEAR)
def test_the_ground_is_seen_through_and_never_what_lies_under_it(kind: str, ground: tuple[int, int, int]) -> None:
    data = CLEAR[kind]()
    assert near(thirds(read(data, 96, 32, ground=ground)[0]), on_ground(ground), 6)
    if ground == (0, 0, 0):
        assert np.array_equal(read(data, 96, 32), read(data, 96, 32, ground=ground)), "black unless said"


def test_clear_palettes_and_greys_are_flat_too() -> None:
    palette = Image.new("P", (96, 32), 0)
    palette.putpalette([255, 255, 255, 200, 40, 40])
    palette.paste(1, (0, 0, 48, 32))
    shown = read(as_file(palette, "PNG", transparency=0), 96, 32)[0]
    assert near([shown[16, 20], shown[16, 80]], [(200, 40, 40), (0, 0, 0)])
    grey = Image.fromarray(half_clear()).convert("LA")
    assert near([read(as_file(grey, "PNG"), 96, 32)[0][16, 80]], [(0, 0, 0)])


# --- tracks and animations --------------------------------------------------------------------------------------------


def with_cover(film: bool) -> bytes:
    """A cover picture first, then sound, then, perhaps, a film."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        cover = out.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        sound = out.add_stream("aac", rate=8000, layout="mono")
        track = out.add_stream("libx264", rate=8) if film else None
        if track:
            track.width, track.height, track.pix_fmt = 32, 32, "yuv420p"
        packet = cover.encode(VideoFrame.from_ndarray(np.full((64, 64, 3), 255, np.uint8)).reformat(format="yuvj420p"))
        out.mux(packet)
        out.mux(cover.encode(None))
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        out.mux(sound.encode(silence))
        out.mux(sound.encode(None))
        for k, frame in enumerate(numbered(4)) if track else ():
            assert track is not None
            picture = VideoFrame.from_ndarray(frame).reformat(format="yuv420p")
            picture.pts = k
            out.mux(track.encode(picture))
        if track:
            out.mux(track.encode(None))
    return file.getvalue()


def test_a_cover_picture_is_no_film() -> None:
    assert numbers(read(with_cover(film=True), 32, 32)) == [0, 1, 2, 3]
    with pytest.raises(BadMedia, match="holds no video, only a cover picture"):
        probe(with_cover(film=False))


@pytest.mark.parametrize(("format", "how"), [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True})])
def test_an_animation_is_a_video_with_its_own_durations(format: str, how: dict[str, Any]) -> None:
    pictures = [Image.fromarray(frame) for frame in numbered(4)]
    lengths = [250, 250, 1000, 250]  # milliseconds
    data = as_file(pictures[0], format, save_all=True, append_images=pictures[1:], duration=lengths, loop=0, **how)
    media = probe(data)
    assert (media.media_type, media.frames) == (f"image/{format.lower()}", 7)
    assert media.fps == pytest.approx(4), "seven times as long as most frames are shown"
    assert numbers(read(data, 32, 32, 4)) == [0, 1, 2, 2, 2, 2, 3]


# --- what is wrong ----------------------------------------------------------------------------------------------------


def header_of(width: int, height: int) -> bytes:
    """A PNG that says it is this large and holds nothing."""
    data = as_file(Image.new("RGB", (1, 1)), "PNG")
    size = struct.pack(">II", width, height)
    chunk = b"IHDR" + size + data[24:29]
    return data[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


def with_damaged_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = as_file(Image.fromarray(CORNERS), "JPEG", exif=exif)
    at = data.index(b"Exif\0\0") + 6
    return data[: at + 4] + b"\xff\xff\xff\x7f" + data[at + 8 :]


@pytest.mark.parametrize("size", [(20_000, 20_000), (9_000, 9_000), (1, 2**31 - 1)])
def test_a_picture_that_says_it_is_huge_is_refused_before_it_is_decoded(size: tuple[int, int]) -> None:
    for look in (probe, pixels_in):
        with pytest.raises(BadMedia, match=r"the most is 67,108,864 pixels|cannot be read"):
            look(header_of(*size))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_is_left_aside_as_viewers_do() -> None:
    assert read(with_damaged_exif(), 48, 32).shape == (1, 32, 48, 3)


WHOLE: dict[str, Callable[[], bytes]] = {
    **CLEAR,
    "mp4": lambda: encoded(numbered(6)),
    "avi": lambda: encoded(numbered(6), codec="mpeg4", container="avi", pix_fmt="yuv420p"),
    "mpegts": lambda: encoded(numbered(6), container="mpegts", pix_fmt="yuv420p"),
    "jpeg": with_damaged_exif,
    "gif": lambda: as_file(
        Image.fromarray(numbered(2)[0]), "GIF", save_all=True, append_images=[Image.fromarray(numbered(2)[1])]
    ),
}


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it makes up for
@pytest.mark.parametrize("kind", WHOLE)
def test_damaged_files_are_read_or_refused_and_nothing_else(kind: str) -> None:
    """Whatever a decoder raises is BadMedia, so that it is that line's and never the submission's."""
    data, dice = WHOLE[kind](), random.Random(kind)
    for _ in range(40):
        broken = bytearray(data[: dice.randint(1, len(data))] if dice.random() < 0.3 else data)
        for _ in range(dice.randint(1, 8)):
            broken[dice.randrange(len(broken))] = dice.randrange(256)
        for look in (probe, pixels_in, lambda each: read_frames(each, width=16, height=16, fps=8, most=3)):
            try:
                look(bytes(broken))
            except BadMedia as error:
                assert "\n" not in str(error) and len(str(error)) < 300


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", WHOLE)
def test_what_decoding_costs_is_told_before(kind: str) -> None:
    data = WHOLE[kind]()
    media = probe(data)
    assert pixels_in(data) == media.width * media.height * media.frames
