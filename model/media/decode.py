"""Pictures and videos that people bring, as frames: read whole or refused, within bounds, at a clip's size and rate.

Frames are uint8 [T, H, W, 3], sRGB. A picture is a video of one frame. Other sizes are scaled until they cover the clip
and cut around the centre; other rates are met by taking, for each moment of the clip, the nearest frame.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av import VideoFrame
from av.container import InputContainer
from av.error import FFmpegError
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.Image import Resampling

from model.media.windows import Frames

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
    count, last = 0, None
    with open_video(io.BytesIO(data)) as container:
        media_type = VIDEOS[container.format.name]
        rate = container.streams.video[0].average_rate
        for frame in _decode(container):
            count, last = count + 1, frame
    if last is None or not rate:
        raise BadMedia("holds no video")
    width, height = upright(last).size
    return Media(media_type=media_type, width=width, height=height, frames=count, fps=float(rate))


def read_frames(data: bytes, *, width: int, height: int, fps: float, most: int) -> Frames:
    """The first frames, at most `most`, at the size and rate of a clip: [T, height, width, 3]. Raises BadMedia."""
    if (picture := _picture(data)) is not None:
        return fit(picture, width, height)[None]
    kept: list[Frames] = []
    with open_video(io.BytesIO(data)) as container:
        rate = float(container.streams.video[0].average_rate or 0)
        if not rate:
            raise BadMedia("does not say its frame rate")
        for number, frame in enumerate(_decode(container)):
            # Moment k of the clip is nearest to frame k * rate / fps.
            while len(kept) < most and int(len(kept) * rate / fps + 0.5) == number:
                kept.append(fit(upright(frame), width, height))
            if len(kept) == most:
                break
    if not kept:
        raise BadMedia("holds no video")
    return np.stack(kept)


def every_frame(data: bytes) -> Iterator[Frames]:
    """All frames as they are, one by one: [H, W, 3]. Raises BadMedia, also after some that could be read."""
    if (picture := _picture(data)) is not None:
        yield np.asarray(picture.convert("RGB"), np.uint8)
        return
    with open_video(io.BytesIO(data)) as container:
        for frame in _decode(container):
            yield np.asarray(upright(frame), np.uint8)


def open_video(file: Path | io.BytesIO, formats: Iterable[str] = VIDEOS) -> InputContainer:
    """A file opened as a video, by one of these demuxers. Raises BadMedia."""
    try:
        container = av.open(file, "r", container_options={"format_whitelist": ",".join(formats)})
    except (FFmpegError, ValueError):
        raise BadMedia("is neither a picture (PNG, JPEG, WebP) nor a video (MP4, WebM, Matroska, AVI)") from None
    if not container.streams.video:
        container.close()
        raise BadMedia("holds no video")
    container.streams.video[0].codec_context.thread_count = 1
    return container


def upright(frame: VideoFrame) -> Image.Image:
    """The frame as it is to be shown: who films with a phone on its side has only a note of that in the file."""
    return frame.to_image().rotate(frame.rotation, expand=True)


def fit(picture: Image.Image, width: int, height: int, sampled: Resampling = Resampling.BICUBIC) -> Frames:
    """[height, width, 3]: the largest middle part of these proportions, resized."""
    return np.asarray(ImageOps.fit(picture.convert("RGB"), (width, height), sampled), np.uint8)


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
    turned = ImageOps.exif_transpose(picture)
    turned.format = picture.format
    return turned


def _decode(container: InputContainer) -> Iterator[VideoFrame]:
    try:
        for number, frame in enumerate(container.decode(container.streams.video[0])):
            if number == MAX_FRAMES:
                raise BadMedia(f"has more than {MAX_FRAMES:,} frames")
            if frame.width * frame.height > MAX_PIXELS:
                raise BadMedia(f"is {frame.width}x{frame.height}, the most is {MAX_PIXELS:,} pixels")
            yield frame
    except FFmpegError as error:
        raise BadMedia(f"is a video that cannot be read to its end ({error})") from None
