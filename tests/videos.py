"""Small real videos and images for tests of data sets, with the clips they were made of."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.media.encode import encode_mp4, encode_png
from model.world.render import render
from model.world.scene import sample_scene


def clip_of(seed: int, width: int = 32, height: int = 32, frames: int = 9) -> NDArray[np.uint8]:
    """[T, H, W, 3]"""
    return render(sample_scene(random.Random(seed)), width=width, height=height, frames=frames)


def write_video(path: Path, clip: NDArray[np.uint8], fps: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(clip[0], {}) if path.suffix == ".png" else encode_mp4(clip, fps, {}))


def on_its_side(data: bytes) -> bytes:
    """The MP4 with the note in it that it is to be shown turned clockwise by a quarter."""
    at = data.index(b"tkhd") + 44  # the matrix of the track's header
    return data[:at] + struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30) + data[at + 36 :]


def write_folder(folder: Path, count: int = 12) -> Path:
    """Videos of nine frames, 32x32, each with a poor caption beside it."""
    for seed in range(count):
        write_video(folder / f"{seed:02d}.mp4", clip_of(seed))
        (folder / f"{seed:02d}.txt").write_text(f"something moves, take {seed}\n")
    return folder
