"""Measures of clips that need no prompt: are they steady, of one rigid scene, and like the real thing.

Every measure is near its best on clips that `model.world.scene` rendered, where the judge is right about them, and the
tests hold it to that. Clips are [B, 3, T, H, W] in -1..1; `look` is a judge's, and says for each attribute the class
[B] that clips show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.score.judge import SHAPE
from model.world.render import HALF_VIEW, Eye, eye
from model.world.scene import COLOURS, Scene, Solid

Labels: TypeAlias = dict[str, Tensor]  # for each attribute of `world.CLASSES` the index [B] of a class, -1 for none


def share(right: Tensor, of: Tensor | None = None) -> float | None:
    """The share of clips that are right [B], of all or of those `of` [B]; None where there are none."""
    counted = right if of is None else right[of]
    return round(counted.float().mean().item(), 3) if len(counted) else None


# --- is it steady -----------------------------------------------------------------------------------------------------


def flicker(clips: Tensor) -> float:
    """Mean size of the second difference of pixels in time, in 8-bit steps: smooth motion has little of it."""
    return round((clips[:, :, 2:] - 2 * clips[:, :, 1:-1] + clips[:, :, :-2]).abs().mean().item() * 127.5, 2)


def frozen(clips: Tensor, frame: int | Tensor) -> Tensor:
    """Every clip held still at one frame, all at the same or each at its own [B]: what that frame alone shows."""
    return clips[torch.arange(len(clips)), :, frame, None].expand_as(clips)


def identity(look: Callable[[Tensor], Labels], clips: Tensor, scenes: Sequence[Scene]) -> dict[str, float | None]:
    """One solid: are its colour and shape at the last frame those of the first?"""
    alone = [k for k, scene in enumerate(scenes) if len(scene.solids) == 1]
    if not alone:
        return {"colour": None, "shape": None}
    first, last = (look(frozen(clips[alone], k)) for k in (0, SHAPE.frames - 1))
    return {name: share(first[name] == last[name]) for name in ("colour", "shape")}


def permanence(look: Callable[[Tensor], Labels], clips: Tensor, scenes: Sequence[Scene]) -> dict[str, float | None]:
    """A solid passes behind another: has it the same colour, shape and size after as before?

    Before and after are the frames of the clip's first and last third where most of it is to be seen. Two solids held
    still are named from left to right, so the one that goes right is the first before and the second after. Size: the
    pixels of its colour after, over before; within a quarter counts as the same.
    """
    before, after, ratio = _best_seen(clips, scenes)
    first, last = (look(frozen(clips, at)) for at in (before, after))
    rightwards = torch.tensor([scene.direction > 0 for scene in scenes])
    same: dict[str, Tensor] = {}
    for name in ("colour", "shape"):
        said = torch.where(rightwards, first[name], first[name + "2"])
        same[name] = said == torch.where(rightwards, last[name + "2"], last[name])
    same["size"] = (ratio - 1).abs() < 0.25
    same["all"] = torch.stack([*same.values()]).all(0)
    return {name: share(value) for name, value in same.items()}


def _best_seen(clips: Tensor, scenes: Sequence[Scene]) -> tuple[Tensor, Tensor, Tensor]:
    """For each clip [B]: the frame before and the one after passing that show most of the solid, and after over before.

    The camera stands, so what is much more of the solid's colour than the same pixel at the clip's other end is part of
    it, and floor, sky and the solid in front are not.
    """
    third = SHAPE.frames // 3
    tints = torch.stack([_tint(clip, scene.solids[0]) for clip, scene in zip(clips, scenes, strict=True)])
    before, after = (
        (here - there > MORE).sum((2, 3)).max(1)
        for here, there in ((tints[:, :third], tints[:, -1:]), (tints[:, -third:], tints[:, :1]))
    )
    ratio = after.values / before.values.clamp(min=1)
    return before.indices, SHAPE.frames - third + after.indices, ratio


MORE, DARK = 0.08, 0.15


def _tint(clip: Tensor, solid: Solid) -> Tensor:
    """[3, T, H, W] -> [T, H, W] how much of the solid's colour a pixel has, near 0 where it is grey or dark."""
    colour = torch.tensor(COLOURS[solid.colour])
    way = colour - colour.mean()
    pixels = (clip + 1) / 2
    return torch.einsum("c,cthw->thw", way / way.norm(), pixels - pixels.mean(0)) / (pixels.amax(0) + DARK)


def _saturation(picture: Tensor) -> Tensor:
    """[3, ...] in -1..1 -> [...] in 0..1."""
    pixels = ((picture + 1) / 2).clamp(min=1e-3)
    return 1 - pixels.amin(0) / pixels.amax(0)


# --- is it one rigid scene --------------------------------------------------------------------------------------------

PATCH = 4  # half the side of a floor patch, pixels
REACH = 4  # how far a patch is looked for, pixels


def reprojection(clips: Tensor, scenes: Sequence[Scene]) -> dict[str, float | None]:
    """Orbits over a checkered floor: how far each patch of it is from where the known camera would see it, in pixels.

    The middle frame is warped onto the others by the plane's homography, and each patch with corners in it is looked
    for around its place by normalised correlation. Nothing is fitted: the orbit's angle, height and distance are the
    world's own. Returns the median and the share of patches within one pixel.
    """
    errors: list[float] = []
    middle = SHAPE.frames // 2
    for clip, scene in zip(clips, scenes, strict=True):
        grey = clip.mean(0)  # [T, H, W]
        for frame in (middle - 3, middle + 3):
            times = [k / (SHAPE.frames - 1) for k in (middle, frame)]
            moved, seen = _warp(clip[:, middle], *(eye(scene, t) for t in times))
            plain = _saturation(moved) < 0.4  # a solid's own pixels are no floor
            errors += _offsets(moved.mean(0), grey[frame], seen & plain)
    if not errors:
        return {"median": None, "within one pixel": None, "patches": 0}
    array = np.array(errors)
    return {
        "median": round(float(np.median(array)), 2),
        "within one pixel": round(float((array < 1).mean()), 3),
        "patches": len(errors),
    }


def _warp(picture: Tensor, of: Eye, to: Eye) -> tuple[Tensor, Tensor]:
    """The floor in `picture` [3, H, W], seen from another place; and where that is known [H, W]."""
    height, width = picture.shape[1:]
    ys, xs = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    short = min(height, width)
    across, upward = (2 * xs - width) / short * HALF_VIEW, (height - 2 * ys) / short * HALF_VIEW
    axes = torch.tensor([to.right, to.up, to.forward])
    rays = across[..., None] * axes[0] + upward[..., None] * axes[1] + axes[2]  # [H, W, 3]
    here = torch.tensor(to.position)
    distance = -here[1] / rays[..., 1]
    spot = here + distance[..., None] * rays - torch.tensor(of.position)
    depth = spot @ torch.tensor(of.forward)
    u, v = (spot @ torch.tensor(axis) / depth / HALF_VIEW for axis in (of.right, of.up))
    place = torch.stack((u * short / width, -v * short / height), -1)
    seen = (distance > 0) & (distance < 12) & (depth > 0) & (place.abs() < 0.97).all(-1)
    return F.grid_sample(picture[None], place[None], align_corners=False)[0], seen


def _offsets(moved: Tensor, found: Tensor, seen: Tensor) -> list[float]:
    """For every patch with edges in two directions: how far its best match is from its place."""
    gy, gx = torch.gradient(moved)
    height, width = moved.shape
    edge = PATCH + REACH
    errors: list[float] = []
    for y in range(edge, height - edge, PATCH):
        for x in range(edge, width - edge, PATCH):
            box = slice(y - PATCH, y + PATCH + 1), slice(x - PATCH, x + PATCH + 1)
            if not seen[box].all():
                continue
            a, b, c = (gx[box] ** 2).sum(), (gx[box] * gy[box]).sum(), (gy[box] ** 2).sum()
            weakest = (a + c) / 2 - (((a - c) / 2) ** 2 + b**2).sqrt()  # Shi and Tomasi (1994): the lesser eigenvalue
            if weakest < 0.3:
                continue
            template = moved[box]
            around = found[y - edge : y + edge + 1, x - edge : x + edge + 1]
            windows = around.unfold(0, 2 * PATCH + 1, 1).unfold(1, 2 * PATCH + 1, 1)  # [2R+1, 2R+1, p, p]
            t, w = template - template.mean(), windows - windows.mean((-2, -1), keepdim=True)
            match = (w * t).sum((-2, -1)) / (w.norm(dim=(-2, -1)) * t.norm() + 1e-6)
            if match.max() < 0.6:  # hidden by a solid or its shadow
                continue
            dy, dx = divmod(int(match.argmax()), 2 * REACH + 1)
            errors.append(math.hypot(_between(match[:, dx], dy) - REACH, _between(match[dy], dx) - REACH))
    return errors


def _between(line: Tensor, peak: int) -> float:
    """The peak to a fraction of a sample, by the parabola through it and its neighbours."""
    if not 0 < peak < len(line) - 1:
        return peak
    left, here, right = (line[peak + k].item() for k in (-1, 0, 1))
    return peak + 0.5 * (left - right) / min(left - 2 * here + right, -1e-6)


# --- is it like the real thing ----------------------------------------------------------------------------------------


def frechet(left: Tensor, right: Tensor) -> float | None:
    """Fréchet distance (Heusel et al. 2017) between two sets of features [B, D], as Gaussians; None of single ones."""
    if min(len(left), len(right)) < 2:
        return None
    a, b = left.double(), right.double()
    ca, cb = torch.cov(a.T), torch.cov(b.T)
    root = torch.linalg.eigvals(ca @ cb).real.clamp(min=0).sqrt().sum()
    return round(((a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * root).item(), 2)
