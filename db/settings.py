"""The settings of a clip, written once: columns, COPY, claims and the view `history` take them from here by name.

A new setting is one field of `ClipSettings` and one migration that adds its column.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipSettings:
    """How a clip is rendered, beside its words, its seed and what it is made from."""

    width: Annotated[int, "pixels"]
    height: Annotated[int, "pixels"]
    frames: Annotated[int, "1 is an image"]
    fps: Annotated[int, "frames a second"]
    steps: Annotated[int, "denoising steps"]
    guidance: Annotated[float, "scale of classifier-free guidance"]
    solver: Annotated[str, "the sampler"]
    shift: Annotated[float, "of the time steps towards noise"]
    step_cache: Annotated[float | None, "how little the first block may change for the others to be skipped"] = None
    guidance_2: Annotated[float | None, "scale of guidance for the second of two experts"] = None
    strength: Annotated[float | None, "of an edit: 1 keeps nothing of the source"] = None
    window: Annotated[int | None, "most frames made at once, where it is made in several windows"] = None
    overlap: Annotated[int | None, "frames that a window takes over from what is known"] = None


SETTINGS = tuple(field.name for field in fields(ClipSettings))
OF_SIZE = ("width", "height")
OF_SOURCES = ("strength", "window", "overlap")  # of clips that are made from others, or in windows
