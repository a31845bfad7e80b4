"""A small procedural world: solids on a floor, ray traced, with the exact description of what happens in every clip.

`sample_scene` draws a `Scene`, `render` turns it into pixels, `describe` into one true caption, `labels` into the class
indices a checker compares. All of it follows from the scene alone, so the truth about a training clip is never guessed.
The world knows nothing about models or tokenizers.

Left and right are as the viewer sees them. x points right, y up, z towards the viewer; the floor is y = 0.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
RGB = tuple[float, float, float]
# No white, black or brown: white vanishes on a day sky, black at night, and brown is orange in the shade.
COLOURS: dict[str, RGB] = {
    "red": (0.86, 0.05, 0.07),
    "green": (0.04, 0.62, 0.16),
    "blue": (0.07, 0.20, 0.92),
    "yellow": (0.98, 0.88, 0.06),
    "orange": (1.00, 0.46, 0.02),
    "purple": (0.48, 0.10, 0.74),
    "pink": (1.00, 0.48, 0.72),
    "cyan": (0.05, 0.80, 0.86),
}
SHAPES = ("sphere", "cube", "cylinder", "cone")
# The two tones of each pattern. No floor is plain: on one, a panning camera would look like a sliding solid.
FLOORS: dict[str, tuple[RGB, RGB]] = {
    "checkered": ((0.22, 0.22, 0.25), (0.82, 0.82, 0.80)),
    "grey": ((0.38, 0.38, 0.40), (0.62, 0.62, 0.63)),
    "sand": ((0.60, 0.49, 0.32), (0.88, 0.79, 0.61)),
    "grass": ((0.19, 0.31, 0.09), (0.43, 0.56, 0.26)),
}
SKIES = ("day", "sunset", "night")
MOTIONS = ("still", "left", "right", "bounce", "spin", "closer", "away", "behind")
CAMERAS = ("static", "orbit left", "orbit right", "pan left", "pan right", "dolly in", "dolly out")
# What each label of `labels` counts through; "colour2" and "shape2" are those of the second solid.
CLASSES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "motion": MOTIONS,
    "camera": CAMERAS,
    "count": ("one", "two"),
    "colour2": tuple(COLOURS),
    "shape2": SHAPES,
    "floor": tuple(FLOORS),
    "sky": SKIES,
    "direction": ("left", "right"),
}
# Colour, shape and motion never trained on together: 14 of the 232 possible triples (6 %). Every colour loses at most
# two triples, every shape at most four and every motion at most two, so each word alone is still seen all the time.
# They are listed in held_out.json.
HELD_OUT: frozenset[tuple[str, str, str]] = frozenset(
    (colour, shape, motion)
    for colour, shape, motion in json.loads(Path(__file__).with_name("held_out.json").read_text(encoding="utf-8"))
)


class Jitter(NamedTuple):
    """The free choices of a scene that no caption mentions, each in [-1, 1]."""

    sideways: float = 0.0  # where the first solid stands; mirrored with the scene, as the next four
    side: float = 0.0  # which of two solids is on the left, where the motion leaves that open
    turn: float = 0.0  # how the first solid is turned about the vertical
    turn2: float = 0.0  # and the second
    view: float = 0.0  # from where the camera looks
    light: float = 0.0  # from where the light comes
    depth: float = 0.0  # how near the first solid stands
    depth2: float = 0.0  # and the second
    reach: float = 0.0  # how far, fast or often the motion goes
    phase: float = 0.0  # where in its bounce a solid begins
    lift: float = 0.0  # how high it bounces
    moment: float = 0.0  # which moment an image shows


CALM = Jitter()
SIDED = ("sideways", "side", "turn", "turn2", "view", "light")  # these change sign in a mirror


@dataclass(frozen=True, slots=True)
class Solid:
    colour: str
    shape: str
    radius: float  # world units; half the height is HALF_HEIGHT[shape] times this

    def __post_init__(self) -> None:
        _check("colour", self.colour, COLOURS)
        _check("shape", self.shape, SHAPES)
        if not 0.1 <= self.radius <= 2.0:
            raise ValueError(f"radius {self.radius} of a {self.shape} must be between 0.1 and 2.0")


@dataclass(frozen=True, slots=True)
class Scene:
    """One clip, exactly. The first solid is the one that moves, or the left one of two that stand still."""

    solids: tuple[Solid, ...]  # one or two
    motion: str
    camera: str = "static"
    floor: str = "checkered"
    sky: str = "day"
    direction: int = 1  # -1 left, 1 right: where "behind" goes and how "spin" turns
    jitter: Jitter = CALM

    def __post_init__(self) -> None:
        _check("motion", self.motion, MOTIONS)
        _check("camera", self.camera, CAMERAS)
        _check("floor", self.floor, FLOORS)
        _check("sky", self.sky, SKIES)
        if self.direction not in (-1, 1):
            raise ValueError(f"direction {self.direction} must be -1 (left) or 1 (right)")
        counts = {"behind": (2,), "still": (1, 2), "bounce": (1, 2)}.get(self.motion, (1,))
        if len(self.solids) not in counts:
            raise ValueError(f"motion {self.motion!r} with {len(self.solids)} solids must have {counts[0]}")

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"jitter": self.jitter._asdict()})

    @classmethod
    def from_json(cls, text: str) -> Scene:
        fields: dict[str, Any] = json.loads(text)
        fields["solids"] = tuple(Solid(**solid) for solid in fields["solids"])
        fields["jitter"] = Jitter(**fields["jitter"])
        return cls(**fields)


def _check(what: str, value: str, known: Sequence[str] | dict[str, Any]) -> None:
    if value not in known:
        raise ValueError(f"{what} {value!r} must be one of: {', '.join(known)}")


# How often each motion is drawn, for one solid (75 % of clips, 25 % of all clips slide) and for two.
ONE = {"left": 0.125, "right": 0.125, "still": 0.17, "bounce": 0.09, "spin": 0.08, "closer": 0.08, "away": 0.08}
TWO = {"still": 0.10, "behind": 0.09, "bounce": 0.06}
# One mover at a time, or "slides left" and "pans right" would look alike. A bounce is plain under any camera; a spin is
# not: at 64x64 a cube that turns and one that the camera turns around could not be told apart, even by their judge.
MOVING_CAMERA = {"still": 0.8, "bounce": 0.25}


def sample_scene(rng: random.Random, *, unseen: bool | None = None) -> Scene:
    """Draw a scene. unseen=False draws none of the held-out combinations, True only those, None from all."""
    while True:
        scene = _draw(rng)
        if unseen is None or held_out(scene) == unseen:
            return scene


def _draw(rng: random.Random) -> Scene:
    kinds = [(1, motion) for motion in ONE] + [(2, motion) for motion in TWO]
    count, motion = rng.choices(kinds, [*ONE.values(), *TWO.values()])[0]
    colours = rng.sample(tuple(COLOURS), count)
    shapes = ["cube" if motion == "spin" else rng.choice(SHAPES)]
    if count == 2:  # mostly another shape than the first
        shapes.append(rng.choice(SHAPES if rng.random() < 0.25 else [shape for shape in SHAPES if shape != shapes[0]]))
    low, high = {1: (0.78, 1.02), 2: (0.72, 0.88)}[count] if motion != "behind" else (0.66, 0.78)
    moves = rng.random() < MOVING_CAMERA.get(motion, 0.0)
    return Scene(
        solids=tuple(Solid(colours[i], shapes[i], round(rng.uniform(low, high), 4)) for i in range(count)),
        motion=motion,
        camera=rng.choice(CAMERAS[1:]) if moves else "static",
        floor="checkered" if rng.random() < (0.6 if moves else 0.3) else rng.choice(tuple(FLOORS)),
        sky=rng.choice(SKIES),
        direction=rng.choice((-1, 1)),
        jitter=Jitter(*(round(rng.uniform(-1, 1), 4) for _ in Jitter._fields)),
    )


def held_out(scene: Scene) -> bool:
    """Does a solid of the scene show a combination of HELD_OUT? Only the first of two solids ever moves."""
    motions = (scene.motion, "still")
    pairs = zip(scene.solids, motions, strict=False)
    return any((solid.colour, solid.shape, motion) in HELD_OUT for solid, motion in pairs)


def mirrored(scene: Scene) -> Scene:
    """The scene that renders to the mirror image of this one."""
    swap = {"left": "right", "right": "left"}
    motion = swap.get(scene.motion, scene.motion)
    camera = " ".join(swap.get(word, word) for word in scene.camera.split())
    pair_at_rest = motion == "still" and len(scene.solids) == 2  # named from left to right
    jitter = scene.jitter._replace(**{name: -getattr(scene.jitter, name) for name in SIDED})
    if pair_at_rest:
        jitter = jitter._replace(turn=jitter.turn2, turn2=jitter.turn, depth=jitter.depth2, depth2=jitter.depth)
    solids = scene.solids[::-1] if pair_at_rest else scene.solids
    return replace(scene, solids=solids, motion=motion, camera=camera, direction=-scene.direction, jitter=jitter)


def labels(scene: Scene, frames: int = 17) -> dict[str, int]:
    """The index of the scene's value in each of CLASSES; -1 where it has none, as an image (frames=1) has no motion."""
    first, second = scene.solids[0], scene.solids[1] if len(scene.solids) == 2 else None
    moving = frames > 1
    values: dict[str, str | None] = {
        "colour": first.colour,
        "shape": first.shape,
        "motion": scene.motion if moving else None,
        "camera": scene.camera if moving else None,
        "count": "two" if second else "one",
        "colour2": second.colour if second else None,
        "shape2": second.shape if second else None,
        "floor": scene.floor,
        "sky": scene.sky,
        # A spin turns one way or the other too, but no caption says which.
        "direction": ("left" if scene.direction < 0 else "right") if moving and scene.motion == "behind" else None,
    }
    return {name: -1 if value is None else CLASSES[name].index(value) for name, value in values.items()}
