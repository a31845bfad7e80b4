"""Frames on their way from rank 0 to the engine: anonymous memory files, inherited by the rank.

They have no name, so nothing is left behind when either process is killed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np

from model.media.windows import Frames


def create(count: int) -> list[int]:
    """Descriptors of so many empty memory files."""
    return [os.memfd_create(f"rushes-frames-{k}") for k in range(count)]


def close(files: Iterable[int]) -> None:
    for file in files:
        os.close(file)


def write(file: int, frames: Frames) -> None:
    """Replaces the contents of a memory file by frames [T, H, W, 3]."""
    os.ftruncate(file, 0)
    view, offset = np.ascontiguousarray(frames).reshape(-1).data, 0
    while view:
        count = os.pwrite(file, view, offset)
        view, offset = view[count:], offset + count


def read(file: int, shape: tuple[int, ...]) -> Frames | int:
    """A copy of the frames in a memory file, or where there are fewer bytes of them, how many there are."""
    frames, offset = np.empty(shape, np.uint8), 0
    view = frames.reshape(-1).data
    while view:
        count = os.preadv(file, [view], offset)
        if not count:
            return offset
        view, offset = view[count:], offset + count
    return frames
