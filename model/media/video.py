"""Videos that people bring, as a player shows them: frame by frame, each at its time, upright, in sRGB.

Time stamps rule, not an average rate. What the container says about the look is obeyed: rotation and mirroring, the
shape of a pixel, matrix, range and primaries of its colours, transparency; of several tracks the one that a player
takes, and never a cover picture. What cannot be shown right is refused in one sentence.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import median_low as median
from typing import Any, cast

import av
import numpy as np
from av import VideoFrame
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.reformatter import ColorPrimaries, ColorRange, ColorTrc
from av.video.stream import VideoStream
from PIL import Image
from PIL.Image import Transpose

from model.media.errors import BadMedia
from model.media.pictures import BLACK, MAX_FRAMES, MAX_PIXELS, Ground, flat

# Demuxers that read one file and nothing else: a playlist could name any file or address.
DEMUXERS = {
    "mov,mp4,m4a,3gp,3g2,mj2": "video/mp4",
    "matroska,webm": "video/webm",
    "avi": "video/x-msvideo",
    "mpegts": "video/mp2t",
}
HIGH = (1280, 576)  # a video that is wider or higher than this, and does not say its matrix, is in BT.709, else BT.601
HDR = {ColorTrc.SMPTE2084: "PQ", ColorTrc.ARIB_STD_B67: "HLG"}
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own decoders leave the second layer, alpha, away
# From linear light in other primaries to linear light in sRGB's (white D65 in all three): rows are R, G, B.
TO_SRGB = {
    ColorPrimaries.BT2020: ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187)),
    ColorPrimaries.SMPTE432: ((1.2249, -0.2247, 0.0), (-0.0420, 1.0419, 0.0), (-0.0197, -0.0786, 1.0979)),
}


@dataclass(frozen=True, slots=True)
class Timeline:
    """When the frames of a video are shown, told by its packets before anything is decoded."""

    times: dict[int, Fraction]  # by presentation stamp: seconds since the first frame; empty: no stamps
    packets: int
    typical: Fraction  # seconds for which a frame is shown, as a rule
    seconds: Fraction | None = None  # of all of it; None: every frame is shown as long as the typical one

    @property
    def duration(self) -> Fraction:
        """Seconds from the first frame's beginning to the last one's end."""
        return self.packets * self.typical if self.seconds is None else self.seconds


@dataclass
class Video:
    """An open video: its one track that is shown."""

    container: InputContainer
    stream: VideoStream

    @property
    def media_type(self) -> str:
        return DEMUXERS.get(self.container.format.name, "video/mp4")

    @cached_property
    def timeline(self) -> Timeline:
        """Reads all packets, none is decoded. Raises BadMedia."""
        try:
            return self._timeline()
        except BadMedia:
            raise
        except Exception as error:  # demuxers and their bindings raise what they like on damaged files
            raise BadMedia(f"is a video that cannot be read to its end ({error})") from None

    def _timeline(self) -> Timeline:
        unit = self.stream.time_base or Fraction(1, 1000)
        stamps, unknown, last, length = set[int](), 0, None, None
        for packet in self.container.demux(self.stream):
            if packet.size == 0 or packet.is_discard:
                continue
            if packet.pts is None:
                unknown += 1
                continue
            stamps.add(packet.pts)
            if last is None or packet.pts > last:
                last, length = packet.pts, packet.duration
            if len(stamps) + unknown > MAX_FRAMES:
                raise BadMedia(f"has more than {MAX_FRAMES:,} frames")
        self.container.seek(0)
        said, packets = self.stream.average_rate or self.stream.guessed_rate, len(stamps) + unknown
        if unknown or len(stamps) < 2:
            if not said:
                raise BadMedia("does not say its frame rate")
            return Timeline({}, packets, 1 / Fraction(said))
        order = sorted(stamps)
        own = (len(order) - 1) / ((order[-1] - order[0]) * unit)
        for rate in (Fraction(said), own) if said else (own,):  # the header's, where it is true
            if _is_steady(order, unit, rate):
                return Timeline({stamp: k / rate for k, stamp in enumerate(order)}, packets, 1 / rate)
        typical = median(after - before for before, after in pairwise(order)) * unit
        seconds = (order[-1] - order[0]) * unit + (length * unit if length else typical)
        return Timeline({stamp: (stamp - order[0]) * unit for stamp in order}, packets, Fraction(typical), seconds)

    def decode(self) -> Iterator[tuple[Fraction, VideoFrame]]:
        """Each frame with the seconds since the first at which it is shown. Raises BadMedia."""
        times, typical, first = self.timeline.times, self.timeline.typical, None
        number = -1
        try:
            for number, frame in enumerate(self._frames()):
                if number == MAX_FRAMES:
                    raise BadMedia(f"has more than {MAX_FRAMES:,} frames")
                if frame.width * frame.height > MAX_PIXELS:
                    raise BadMedia(f"is {frame.width}x{frame.height}, the most is {MAX_PIXELS:,} pixels")
                at = times.get(frame.pts) if frame.pts is not None else None
                at = number * typical if at is None else at
                first = at if first is None else first
                yield at - first, frame
        except BadMedia:
            raise
        except Exception as error:  # decoders raise what they like on damaged files
            raise BadMedia(f"is a video that cannot be read to its end ({error})") from None
        if number < 0:
            raise BadMedia("holds no video")

    def _frames(self) -> Iterator[VideoFrame]:
        name, notes = self.stream.codec_context.name, {k.lower(): v for k, v in self.stream.metadata.items()}
        if notes.get("alpha_mode") == "1" and name in ALPHA_DECODERS:
            decoder = cast(Any, av.CodecContext.create(ALPHA_DECODERS[name], "r"))
            for packet in self.container.demux(self.stream):
                yield from decoder.decode(packet if packet.size else None)
            return
        yield from self.container.decode(self.stream)

    def picture(self, frame: VideoFrame, ground: Ground = BLACK) -> Image.Image:
        """The frame as a player shows it. Raises BadMedia for colours that cannot be told."""
        if (curve := HDR.get(cast(ColorTrc, frame.color_trc))) is not None:
            raise BadMedia(f"is HDR video ({curve}), which is not read: convert it to SDR (BT.709) first")
        image = _in_rgb(frame, ground)
        return _turned(self._square(image), frame)

    def _square(self, image: Image.Image) -> Image.Image:
        """With square pixels: stretched one way, never shrunk."""
        ratio = self.stream.sample_aspect_ratio or self.stream.codec_context.sample_aspect_ratio
        if not ratio or ratio <= 0 or ratio == 1:
            return image
        width, height = image.size
        size = (round(width * ratio), height) if ratio > 1 else (width, round(height / ratio))
        if size[0] * size[1] > MAX_PIXELS:
            raise BadMedia(f"is {size[0]}x{size[1]} with square pixels, the most is {MAX_PIXELS:,} pixels")
        return image.resize(size, Image.Resampling.BICUBIC)


def open_video(file: Path | io.BytesIO, formats: Iterable[str] = DEMUXERS) -> Video:
    """A file opened as a video by one of these demuxers; close its container. Raises BadMedia."""
    try:
        container = av.open(file, "r", container_options={"format_whitelist": ",".join(formats)})
    except Exception:
        raise BadMedia(
            "is neither a picture (PNG, JPEG, WebP, GIF, BMP) nor a video (MP4, WebM, Matroska, AVI)"
        ) from None
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        covers = len(container.streams.video)
        container.close()
        raise BadMedia("holds no video" + (", only a cover picture" if covers else ""))
    best = container.streams.best("video")
    stream = best if best in streams else streams[0]
    assert isinstance(stream, VideoStream)
    if not stream.codec_context:
        container.close()
        raise BadMedia("is a video in a format that is not read")
    stream.codec_context.thread_count = 1
    return Video(container, stream)


def _is_steady(order: list[int], unit: Fraction, rate: Fraction) -> bool:
    """Whether all stamps lie where frames of this rate do, but for their rounding to whole units."""
    slack = max(unit, Fraction(1, 1000))
    return all(abs((stamp - order[0]) * unit - k / rate) <= slack for k, stamp in enumerate(order))


def _in_rgb(frame: VideoFrame, ground: Ground) -> Image.Image:
    """In sRGB, by the matrix, range and primaries that the frame says it has; flat."""
    clear = any(component.is_alpha for component in frame.format.components)
    matrix = frame.colorspace
    if matrix in (2, 3) and not frame.format.is_rgb:  # unsaid: what players suppose
        matrix = 1 if frame.width >= HIGH[0] or frame.height > HIGH[1] else 5
    said = {} if frame.format.is_rgb else {"src_colorspace": matrix}
    if frame.format.name.startswith("yuvj"):
        said["src_color_range"] = ColorRange.JPEG
    samples = frame.reformat(format="rgba" if clear else "rgb24", **said).to_ndarray()
    image = flat(Image.fromarray(samples, "RGBA"), ground) if clear else Image.fromarray(samples)
    towards = TO_SRGB.get(cast(ColorPrimaries, frame.color_primaries))
    return image if towards is None else _in_other_primaries(image, np.asarray(towards, np.float32))


def _in_other_primaries(image: Image.Image, towards: np.ndarray) -> Image.Image:
    samples = np.asarray(image, np.float32) / 255
    light = np.where(samples <= 0.04045, samples / 12.92, ((samples + 0.055) / 1.055) ** 2.4)
    light = (light @ towards.T).clip(0, 1)
    shown = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return Image.fromarray((255 * shown + 0.5).astype(np.uint8))


def _turned(image: Image.Image, frame: VideoFrame) -> Image.Image:
    """Upright: a phone held on its side notes a rotation, a front camera a mirror image, in a matrix of 3x3.

    A point (x, y) of the frame is shown at (a x + c y, b x + d y).
    """
    matrix = cast(Any, frame.side_data).get(SideData.DISPLAYMATRIX)
    if matrix is None:
        return image
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    if 0 not in (a, b, c, d):  # no quarter turn
        return image.rotate(frame.rotation, expand=True)
    if not a:
        image = image.transpose(Transpose.TRANSPOSE)
        a, d = c, b
    if a < 0:
        image = image.transpose(Transpose.FLIP_LEFT_RIGHT)
    return image.transpose(Transpose.FLIP_TOP_BOTTOM) if d < 0 else image
