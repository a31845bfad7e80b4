"""Frames as files: H.264 in MP4 that any browser plays, PNG for single images, and a sheet of small pictures.

One clip always gives the same bytes: one encoder thread, fixed settings, no clock. Who made a file is written in it.
Frames are uint8 [T, H, W, 3], sRGB.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias

import av
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

Frame: TypeAlias = "npt.NDArray[np.uint8]"  # [H, W, 3]
PNG = b"\x89PNG\r\n\x1a\n"
CRF = 14  # constant quality: looks lossless at these sizes
BT709 = 1  # the number of primaries, transfer and matrix in the standards' tables


def encode_mp4(frames: npt.NDArray[np.uint8], fps: int, metadata: Mapping[str, str]) -> bytes:
    """frames [T, H, W, 3] -> H.264, 4:2:0, index first. Raises ValueError for odd sizes, which 4:2:0 does not have."""
    _check(frames, 4)
    count, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise ValueError(f"frames are {width}x{height}: width and height must be even (colour has half the resolution)")
    if fps < 1:
        raise ValueError(f"fps={fps} must be at least 1")
    options = {"movflags": "+faststart+use_metadata_tags", "fflags": "+bitexact"}
    # Putting the index first means reading the file again, which needs a file with a name.
    with tempfile.TemporaryDirectory(prefix="rushes-") as folder:
        path = Path(folder) / "clip.mp4"
        with av.open(str(path), "w", format="mp4", options=options) as container:
            container.metadata.update(metadata)
            stream = container.add_stream("libx264", rate=fps)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.time_base = Fraction(1, fps)
            context = stream.codec_context
            context.thread_count, context.gop_size = 1, 2 * fps
            # x264's macroblock tree reads memory that nobody has written: what it decides, and so the bytes, varied.
            context.options = {"crf": str(CRF), "preset": "medium", "x264-params": "threads=1:no-mbtree=1"}
            # Without a tag players guess the matrix from the size, and small clips come out in other colours.
            context.color_primaries, context.color_trc, context.colorspace = BT709, BT709, BT709
            context.color_range = 1  # limited
            for k in range(count):
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frames[k]), format="rgb24")
                picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
                picture.pts = k
                container.mux(stream.encode(picture))
            container.mux(stream.encode(None))
        return path.read_bytes()


def encode_png(frame: Frame, metadata: Mapping[str, str]) -> bytes:
    """One frame [H, W, 3], lossless."""
    _check(frame, 3)
    texts = PngInfo()
    for key, value in metadata.items():
        texts.add_text(key, value)  # tEXt, or iTXt where Latin-1 does not suffice
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG", pnginfo=texts, compress_level=6)
    return file.getvalue()


def decode_frames(data: bytes, count: int) -> list[Frame]:
    """`count` frames [H, W, 3] of an MP4, evenly spaced from the first to the last (all of them if it has fewer)."""
    if data.startswith(PNG):
        with Image.open(io.BytesIO(data)) as image:
            return [np.asarray(image.convert("RGB"))]
    kept: list[Frame] = []
    with av.open(io.BytesIO(data), "r") as container:
        stream = container.streams.video[0]
        count = min(count, stream.frames)
        wanted = {round(k * (stream.frames - 1) / max(1, count - 1)) for k in range(count)}
        for k, picture in enumerate(container.decode(stream)):
            if k in wanted:
                kept.append(np.asarray(picture.to_ndarray(format="rgb24"), np.uint8))
    return kept


@dataclass(frozen=True, slots=True, kw_only=True)
class SheetRow:
    """A clip on a contact sheet. One without frames gets an empty box."""

    clip_id: str
    prompt: str
    frames: Sequence[Frame] = ()
    note: str = ""  # beside the id: status, seconds, error


STRIP, HEIGHT, GAP, MARGIN = 760, 144, 4, 16  # pixels: width of a strip, its height at most
INK, PALE, PAPER, BOX = (24, 24, 27), (113, 113, 122), (255, 255, 255), (235, 235, 238)


def contact_sheet(rows: Sequence[SheetRow], title: str = "") -> bytes:
    """A PNG: each clip as a strip of its frames, its id and prompt below; in two columns from seven clips on."""
    font, small = ImageFont.load_default(17), ImageFont.load_default(14)
    columns = 2 if len(rows) > 6 else 1
    cells = [_cell(row, font, small) for row in rows]
    lines = [cells[k : k + columns] for k in range(0, len(cells), columns)]
    head = MARGIN + (40 if title else 0)
    width = MARGIN + columns * (STRIP + MARGIN)
    height = head + sum(max(cell.height for cell in line) + MARGIN for line in lines)
    sheet = Image.new("RGB", (width, max(height, head + MARGIN)), PAPER)
    if title:
        room = width - 2 * MARGIN
        big = ImageFont.load_default(24)
        ImageDraw.Draw(sheet).text((MARGIN, MARGIN), _wrap(title, big, room, 1)[0], font=big, fill=INK)
    y = head
    for line in lines:
        for k, cell in enumerate(line):
            sheet.paste(cell, (MARGIN + k * (STRIP + MARGIN), y))
        y += max(cell.height for cell in line) + MARGIN
    file = io.BytesIO()
    sheet.save(file, "PNG", optimize=True)
    return file.getvalue()


def _cell(row: SheetRow, font: Any, small: Any) -> Image.Image:
    pictures = _strip(row)
    texts = [(line, font, INK) for line in _wrap(row.prompt or "(no prompt)", font, STRIP, 2)]
    texts += [(line, small, PALE) for line in _wrap(" · ".join(filter(None, (row.clip_id, row.note))), small, STRIP, 2)]
    step = 22
    cell = Image.new("RGB", (STRIP, pictures.height + 6 + step * len(texts)), PAPER)
    cell.paste(pictures, (0, 0))
    draw = ImageDraw.Draw(cell)
    for k, (line, style, colour) in enumerate(texts):
        draw.text((0, pictures.height + 6 + step * k), line, font=style, fill=colour)
    return cell


def _strip(row: SheetRow) -> Image.Image:
    """The frames side by side, all as large as the strip allows."""
    if not row.frames:
        empty = Image.new("RGB", (STRIP, HEIGHT // 2), BOX)
        ImageDraw.Draw(empty).text((12, HEIGHT // 4 - 10), "no picture", font=ImageFont.load_default(17), fill=PALE)
        return empty
    height, width = row.frames[0].shape[:2]
    room = STRIP - GAP * (len(row.frames) - 1)
    scale = min(HEIGHT / height, room / len(row.frames) / width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    strip = Image.new("RGB", (STRIP, size[1]), PAPER)
    for k, frame in enumerate(row.frames):
        strip.paste(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC), (k * (size[0] + GAP), 0))
    return strip


def _wrap(text: str, font: Any, room: int, most: int) -> list[str]:
    """`text` in at most `most` lines of `room` pixels, the last with an ellipsis if some is left over."""
    words, lines = text.split(), list[str]()
    while words and len(lines) < most:
        line, last = words.pop(0), len(lines) == most - 1
        while words and font.getlength(f"{line} {words[0]}") <= room:
            line = f"{line} {words.pop(0)}"
        if font.getlength(line) > room or (last and words):
            while line and font.getlength(f"{line}...") > room:
                line = line[:-1]
            line = f"{line}..."
        lines.append(line)
    return lines or [""]


def _check(pixels: npt.NDArray[np.uint8], axes: int) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != axes or pixels.shape[-1] != 3 or 0 in pixels.shape:
        wanted = "[T, H, W, 3]" if axes == 4 else "[H, W, 3]"
        raise ValueError(f"pixels are {pixels.dtype} {list(pixels.shape)}, they must be uint8 {wanted} and not empty")
