"""Pictures and videos that people bring, as frames: read whole or refused, within bounds, at a clip's size and rate.

Frames are uint8 [T, H, W, 3], sRGB. A picture is a video of one frame. Other sizes are scaled until they cover the clip
and cut around the centre; other rates are met by taking, for each moment of the clip, the nearest frame.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from PIL import Image, ImageOps, UnidentifiedImageError

from model.conditioning import Frames

MAX_BYTES = 256_000_000
MAX_FRAMES = 4096  # decoded, whatever is kept of them
MAX_PIXELS = 2**26  # of one frame
PICTURES = ("PNG", "JPEG", "WEBP")
# Demuxers that read one file and nothing else: a playlist could name any file or address.
VIDEOS = {
    "mov,mp4,m4a,3gp,3g2,mj2": "video/mp4",
    "matroska,webm": "video/webm",
    "avi": "video/x-msvideo",
    "mpegts": "video/mp2t",
}


class BadMedia(ValueError):
    """The bytes are no picture or video that can be used. The message says why, in words that follow a file's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Media:
    """What a file holds."""

    media_type: str
    width: int
    height: int
    frames: int
    fps: float  # 0: a picture


def probe(data: bytes) -> Media:
    """Looks at all of it: what it finds can be read. Raises BadMedia."""
    if len(data) > MAX_BYTES:
        raise BadMedia(f"has {len(data):,} bytes, the most is {MAX_BYTES:,}")
    if (picture := _picture(data)) is not None:
        mime = Image.MIME[picture.format or "PNG"]
        return Media(media_type=mime, width=picture.width, height=picture.height, frames=1, fps=0.0)
    count, size = 0, (0, 0)
    with _video(data) as container:
        media_type = VIDEOS[container.format.name]
        rate = container.streams.video[0].average_rate
        for frame in _decode(container):
            count, size = count + 1, (frame.width, frame.height)
    if not count or not rate:
        raise BadMedia("holds no video")
    return Media(media_type=media_type, width=size[0], height=size[1], frames=count, fps=float(rate))


def read_frames(data: bytes, *, width: int, height: int, fps: float, most: int) -> Frames:
    """The first frames, at most `most`, at the size and rate of a clip: [T, height, width, 3]. Raises BadMedia."""
    if (picture := _picture(data)) is not None:
        return _fit(picture, width, height)[None]
    kept: list[Frames] = []
    with _video(data) as container:
        rate = float(container.streams.video[0].average_rate or 0)
        if not rate:
            raise BadMedia("does not say its frame rate")
        for number, frame in enumerate(_decode(container)):
            # Moment k of the clip is nearest to frame k * rate / fps.
            while len(kept) < most and int(len(kept) * rate / fps + 0.5) == number:
                kept.append(_fit(frame.to_image(), width, height))
            if len(kept) == most:
                break
    if not kept:
        raise BadMedia("holds no video")
    return np.stack(kept)


def _picture(data: bytes) -> Image.Image | None:
    """The picture in the bytes, turned upright; None where they are no picture but may be a video."""
    try:
        picture = Image.open(io.BytesIO(data), formats=PICTURES)
        if picture.width * picture.height > MAX_PIXELS:
            raise BadMedia(f"is {picture.width}x{picture.height}, the most is {MAX_PIXELS:,} pixels")
        picture.load()
    except UnidentifiedImageError:
        return None
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, BadMedia):
            raise
        raise BadMedia(f"is a picture that cannot be read ({error})") from None
    upright = ImageOps.exif_transpose(picture)
    upright.format = picture.format
    return upright


def _video(data: bytes) -> Any:
    """The bytes opened as a video. Raises BadMedia."""
    options = {"format_whitelist": ",".join(VIDEOS)}
    try:
        container = av.open(io.BytesIO(data), "r", container_options=options)
    except (FFmpegError, ValueError):
        raise BadMedia("is neither a picture (PNG, JPEG, WebP) nor a video (MP4, WebM, Matroska, AVI)") from None
    if not container.streams.video:
        container.close()
        raise BadMedia("holds no video")
    container.streams.video[0].codec_context.thread_count = 1
    return container


def _decode(container: Any) -> Iterator[Any]:
    try:
        for number, frame in enumerate(container.decode(container.streams.video[0])):
            if number == MAX_FRAMES:
                raise BadMedia(f"has more than {MAX_FRAMES:,} frames")
            if frame.width * frame.height > MAX_PIXELS:
                raise BadMedia(f"is {frame.width}x{frame.height}, the most is {MAX_PIXELS:,} pixels")
            yield frame
    except FFmpegError as error:
        raise BadMedia(f"is a video that cannot be read to its end ({error})") from None


def _fit(picture: Image.Image, width: int, height: int) -> Any:
    """[height, width, 3]"""
    return np.asarray(ImageOps.fit(picture.convert("RGB"), (width, height), Image.Resampling.BICUBIC), np.uint8)
