"""How far two clips are from each other, value by value.

Frames are uint8 [H, W, 3]. They come one by one and are added up as whole numbers: clips of any length need the memory
of a frame, and the answer is the same to the bit whichever clip is named first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from model.config import ClipShape
from model.media.windows import Frames

WHITE = 255  # the largest difference there can be


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """By how much two clips differ. What only one of them has, in length or in size, counts as wrong by all of 255."""

    shapes: tuple[ClipShape, ClipShape]
    largest: int  # of any value, of 255
    psnr: float | None  # dB, over all frames; None where nothing differs
    first: int | None  # frame that differs, from 0

    @property
    def nothing(self) -> bool:
        return self.first is None


def compare(one: Iterable[Frames], other: Iterable[Frames]) -> Difference:
    """Frames of one clip and of the other, each [H, W, 3]."""
    shapes = ClipShape(0, 0, 0), ClipShape(0, 0, 0)
    largest, squares, values, first = 0, 0, 0, None
    for number, pair in enumerate(zip_longest(one, other)):
        worst, error, size = _compare(*pair)
        largest, squares, values = max(largest, worst), squares + error, values + size
        if worst and first is None:
            first = number
        shapes = _seen(shapes[0], pair[0]), _seen(shapes[1], pair[1])
    psnr = 10 * math.log10(WHITE**2 * values / squares) if squares else None
    return Difference(shapes=shapes, largest=largest, psnr=psnr, first=first)


def _compare(one: Frames | None, other: Frames | None) -> tuple[int, int, int]:
    """(largest difference, sum of squared differences, number of values) of one frame."""
    if one is None or other is None or one.shape != other.shape:
        size = max(0 if frame is None else frame.size for frame in (one, other))
        return WHITE, WHITE**2 * size, size
    apart = np.abs(one.astype(np.int32) - other)
    return int(apart.max()), int(np.square(apart).sum(dtype=np.int64)), apart.size


def _seen(shape: ClipShape, frame: Frames | None) -> ClipShape:
    return shape if frame is None else ClipShape(frame.shape[1], frame.shape[0], shape.frames + 1)
