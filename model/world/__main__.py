"""Contact strips of the world: `python -m model.world`."""

from __future__ import annotations

import random
import sys

import numpy as np
from numpy.typing import NDArray

from model.world.captions import describe
from model.world.render import render
from model.world.scene import sample_scene


def contact_strip(clip: NDArray[np.uint8], count: int = 5) -> NDArray[np.uint8]:
    """`count` frames of a clip [T, H, W, 3] side by side, a white line between them: [H, count * (W + 1) - 1, 3]."""
    picks = np.linspace(0, len(clip) - 1, count).round().astype(int)
    gap = np.full((clip.shape[1], 1, 3), 255, np.uint8)
    parts = [part for pick in picks for part in (clip[pick], gap)]
    return np.concatenate(parts[:-1], axis=1)


def main(path: str, count: int = 36) -> None:
    """Draw clips of the world, three beside each other, with their captions."""
    from PIL import Image, ImageDraw

    rng = random.Random(0)
    scenes = [sample_scene(rng) for _ in range(count)]
    strips = [contact_strip(render(scene)) for scene in scenes]
    high, wide = strips[0].shape[:2]
    sheet = Image.new("RGB", (3 * (wide + 8), -(-count // 3) * (high + 30)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (scene, strip) in enumerate(zip(scenes, strips, strict=True)):
        left, top = (i % 3) * (wide + 8), (i // 3) * (high + 30)
        sheet.paste(Image.fromarray(strip), (left, top))
        caption = describe(scene, rng).split()
        half = len(caption) // 2 if len(caption) > 9 else len(caption)
        pen.text((left, top + high + 1), " ".join(caption[:half]), "black")
        pen.text((left, top + high + 13), " ".join(caption[half:]), "black")
    sheet.save(path)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "world.png")
