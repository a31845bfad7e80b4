"""Spacetime patches: a latent video as a sequence of tokens, and back.

Two patterns, used both ways, so that one function is the inverse of the other. Letters, here and in `dit.py`:
B batch, C channels, T/H/W latent frames/rows/columns, N tokens, D width, p* the patch's size on an axis.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

VIDEO = "b c (t pt) (h ph) (w pw)"
INPUT = "b (t h w) (c pt ph pw)"  # the layout of a Conv3d kernel's weight, flattened
OUTPUT = "b (t h w) (pt ph pw c)"  # Wan's output head puts the channel last
Patch = tuple[int, int, int]


def grid(video: Tensor, patch: Patch) -> tuple[int, int, int]:
    """Tokens along time, height and width of a latent [B, C, T, H, W]."""
    sizes = video.shape[-3:]
    for axis, size, step in zip("THW", sizes, patch, strict=True):
        if size % step:
            raise ValueError(f"latent {axis}={size} does not divide into patches of {step}")
    return sizes[0] // patch[0], sizes[1] // patch[1], sizes[2] // patch[2]


def patchify(video: Tensor, patch: Patch, layout: str = INPUT) -> Tensor:  # [B, C, T, H, W] -> [B, N, C*p]
    return rearrange(video, f"{VIDEO} -> {layout}", pt=patch[0], ph=patch[1], pw=patch[2])


def unpatchify(tokens: Tensor, cells: tuple[int, int, int], patch: Patch, layout: str = OUTPUT) -> Tensor:
    """[B, N, C*p] -> [B, C, T, H, W]; `cells` is what `grid` returned."""
    t, h, w = cells
    return rearrange(tokens, f"{layout} -> {VIDEO}", t=t, h=h, w=w, pt=patch[0], ph=patch[1], pw=patch[2])
