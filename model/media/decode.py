"""Pictures, animations and videos that people bring, as frames: read whole or refused, at a clip's size and rate.

Frames are uint8 [T, H, W, 3], sRGB, as a viewer or a player shows them (`model.media.pictures`, `model.media.video`):
requests and training read with this one reader. A picture is a video of one frame, an animation is a video. Other sizes
are scaled until they cover the clip and cut around the centre; other rates are met by taking, for each moment of the
clip, the frame that is shown then, or begins within half a frame.
"""

from __future__ import annotations

import io
import math
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageOps
from PIL.Image import Resampling

from model.config import frames_at
from model.media import video
from model.media.errors import BadMedia
from model.media.pictures import BLACK, Ground, durations, is_animated, open_picture, shown_animation, shown_picture
from model.media.video import open_video
from model.media.windows import Frames

MAX_BYTES = 256_000_000
Shown: TypeAlias = Iterator[tuple[Fraction, Image.Image]]  # from how many seconds on which picture is shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Media:
    """The contents of a file: its kind, size, frames and rate."""

    media_type: str
    width: int
    height: int
    frames: int  # of a variable rate: as many as its usual rate would have in that time
    fps: float  # 0: a picture


def probe(data: bytes) -> Media:
    """Decodes all of it: what it finds can be read. Raises BadMedia."""
    _check_size(data)
    with opened(data) as file:
        width = height = 0
        for _, picture in file.shown():
            width, height = picture.size
        return Media(media_type=file.media_type, width=width, height=height, frames=file.frames, fps=float(file.rate))


def pixels_in(data: bytes) -> int:
    """How many pixels decoding all of it would give, told by its headers and packets alone. Raises BadMedia."""
    _check_size(data)
    with opened(data) as file:
        return file.pixels


def read_tags(path: Path) -> dict[str, str]:
    """The texts that a file has beside its pixels, as those that Rushes writes into its own; {} where it has none."""
    import av

    try:
        with Image.open(path) as picture:
            picture.load()  # texts may stand behind the pixels
            return {str(key): str(value) for key, value in picture.info.items()}
    except (OSError, ValueError, SyntaxError):
        pass
    try:
        with av.open(str(path), "r") as container:
            return dict(container.metadata)
    except (av.FFmpegError, OSError, ValueError):
        return {}


def read_frames(data: bytes, *, width: int, height: int, fps: float, most: int, ground: Ground = BLACK) -> Frames:
    """The first frames, at most `most`, at the size and rate of a clip: [T, height, width, 3]. Raises BadMedia.

    ground: the colour, red, green and blue of 0 to 255, on which what is transparent is shown.
    """
    with opened(data) as file:
        return np.stack([fit(picture, width, height) for picture in at_rate(file, fps, most, ground)])


def every_frame(data: bytes) -> Iterator[Frames]:
    """All frames as they are, one by one: [H, W, 3]. Raises BadMedia, also after some that could be read."""
    with opened(data) as file:
        for _, picture in file.shown():
            yield np.asarray(picture, np.uint8)


def fit(picture: Image.Image, width: int, height: int, sampled: Resampling = Resampling.BICUBIC) -> Frames:
    """[height, width, 3]: the largest middle part of these proportions, resized."""
    return np.asarray(ImageOps.fit(picture.convert("RGB"), (width, height), sampled), np.uint8)


def at_rate(file: OpenPicture | OpenVideo, fps: float, most: int, ground: Ground = BLACK) -> Iterator[Image.Image]:
    """The pictures that are shown at each 1/fps of a second, at most `most` of them, as many as `frames_at` says.

    A player changes to the next frame when its time has come; here it may come by half a frame sooner, so that each
    moment gets the nearest of two frames that follow each other closely, and none is late by more than half a frame.
    """
    if not file.moves:
        yield next(file.shown(ground))[1]
        return
    beat, given = 1 / Fraction(fps).limit_denominator(1_000_000), 0
    most = min(most, frames_at(file.frames, float(file.rate), fps))
    last: tuple[Fraction, Image.Image] | None = None
    for at, picture in file.shown(ground):
        if last is not None:
            early = min(at - last[0], file.typical) / 2
            while given < most and given * beat < at - early:
                yield last[1]
                given += 1
        last = at, picture
        if given == most:
            return
    assert last is not None
    for _ in range(given, most):
        yield last[1]


@dataclass(frozen=True, slots=True)
class OpenPicture:
    """A picture or an animation."""

    picture: Image.Image
    lengths: list[Fraction]  # seconds for which each frame is shown; empty: a picture

    @property
    def media_type(self) -> str:
        return Image.MIME[self.picture.format or "PNG"]

    @property
    def moves(self) -> bool:
        return bool(self.lengths)

    @property
    def stored(self) -> int:
        """Frames in the file."""
        return max(1, len(self.lengths))

    @property
    def frames(self) -> int:
        return math.ceil(self.seconds / self.typical) if self.moves else 1

    @property
    def pixels(self) -> int:
        """The pixels that decoding all of it gives."""
        return self.picture.width * self.picture.height * self.stored

    @property
    def typical(self) -> Fraction:
        """Seconds for which a frame is shown, as a rule."""
        return median(self.lengths)

    @property
    def seconds(self) -> Fraction:
        """How long it plays; 0: a picture."""
        return sum(self.lengths, Fraction())

    @property
    def rate(self) -> Fraction:
        """Usual frames a second; 0 for a picture."""
        return 1 / self.typical if self.moves else Fraction()

    def shown(self, ground: Ground = BLACK) -> Shown:
        """Raises BadMedia."""
        if not self.moves:
            yield Fraction(), shown_picture(self.picture, ground)
            return
        at = Fraction()
        for length, picture in zip(self.lengths, shown_animation(self.picture, ground), strict=True):
            yield at, picture
            at += length


@dataclass(frozen=True, slots=True)
class OpenVideo:
    """A video."""

    video: video.Video
    moves: bool = True

    @property
    def media_type(self) -> str:
        return self.video.media_type

    @property
    def frames(self) -> int:
        return math.ceil(self.seconds / self.typical)

    @property
    def pixels(self) -> int:
        """The pixels that decoding all of it gives."""
        stream = self.video.stream
        return stream.codec_context.width * stream.codec_context.height * self.video.timeline.packets

    @property
    def typical(self) -> Fraction:
        """Seconds for which a frame is shown, as a rule."""
        return self.video.timeline.typical

    @property
    def seconds(self) -> Fraction:
        """How long it plays."""
        return self.video.timeline.duration

    @property
    def rate(self) -> Fraction:
        """Usual frames a second."""
        return 1 / self.typical

    def shown(self, ground: Ground = BLACK) -> Shown:
        """Raises BadMedia."""
        for at, frame in self.video.decode():
            yield at, self.video.picture(frame, ground)


@contextmanager
def opened(file: Path | bytes) -> Generator[OpenPicture | OpenVideo]:
    """A file that holds a picture, an animation or a video. Raises BadMedia."""
    picture = open_picture(file if isinstance(file, Path) else io.BytesIO(file))
    if picture is not None:
        with picture:
            yield OpenPicture(picture, durations(file) if is_animated(picture) else [])
        return
    clip = open_video(file if isinstance(file, Path) else io.BytesIO(file))
    with closing(clip.container):
        yield OpenVideo(clip)


def _check_size(data: bytes) -> None:
    if len(data) > MAX_BYTES:
        raise BadMedia(f"has {len(data):,} bytes, the most is {MAX_BYTES:,}")
