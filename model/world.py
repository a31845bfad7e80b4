"""A small procedural world: solids on a floor, ray traced, with the exact description of what happens in every clip.

`sample_scene` draws a `Scene`, `render` turns it into pixels, `describe` into one true caption, `labels` into the class
indices a checker compares. All of it follows from the scene alone, so the truth about a training clip is never guessed.
The world knows nothing about models or tokenizers.

Left and right are as the viewer sees them. x points right, y up, z towards the viewer; the floor is y = 0.
"""

import json
import math
import random
import sys
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
    def from_json(cls, text: str) -> "Scene":
        fields: dict[str, Any] = json.loads(text)
        fields["solids"] = tuple(Solid(**solid) for solid in fields["solids"])
        fields["jitter"] = Jitter(**fields["jitter"])
        return cls(**fields)


def _check(what: str, value: str, known: Sequence[str] | dict[str, Any]) -> None:
    if value not in known:
        raise ValueError(f"{what} {value!r} must be one of: {', '.join(known)}")


# ---- drawing scenes --------------------------------------------------------------------------------------------------

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


# ---- captions --------------------------------------------------------------------------------------------------------

NOUNS = {"sphere": ("sphere", "ball"), "cube": ("cube", "box"), "cylinder": ("cylinder", "can"), "cone": ("cone",)}
# Each verb as a sentence says it, as "a video of" says it, and what follows. A direction is always said as a word.
DOES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "still": (
        ("stands", "standing", "still"),
        ("is", "", "at rest"),
        ("does not move", "not moving", ""),
        ("sits", "sitting", "on the ground"),
    ),
    "left": (
        ("slides", "sliding", "to the left"),
        ("moves", "moving", "left"),
        ("moves", "moving", "to the left"),
        ("glides", "gliding", "left"),
        ("travels", "travelling", "from right to left"),
    ),
    "right": (
        ("slides", "sliding", "to the right"),
        ("moves", "moving", "right"),
        ("moves", "moving", "to the right"),
        ("glides", "gliding", "right"),
        ("travels", "travelling", "from left to right"),
    ),
    "bounce": (
        ("bounces", "bouncing", "up and down"),
        ("bounces", "bouncing", ""),
        ("jumps", "jumping", "up and down"),
        ("hops", "hopping", "in place"),
    ),
    "spin": (
        ("spins", "spinning", ""),
        ("rotates", "rotating", "in place"),
        ("turns", "turning", "around"),
        ("spins", "spinning", "around"),
    ),
    "closer": (
        ("comes", "coming", "closer"),
        ("moves", "moving", "towards the camera"),
        ("approaches", "approaching", "the viewer"),
        ("slides", "sliding", "towards us"),
    ),
    "away": (
        ("moves", "moving", "away"),
        ("slides", "sliding", "away from the camera"),
        ("recedes", "receding", "into the distance"),
        ("goes", "going", "away from us"),
    ),
    "behind": (
        ("passes", "passing", "behind"),
        ("moves", "moving", "behind"),
        ("slides", "sliding", "behind"),
        ("goes", "going", "behind"),
    ),
}
TOWARDS = {
    -1: ("to the left", "towards the left", "moving left"),
    1: ("to the right", "towards the right", "moving right"),
}
BESIDE = ("next to", "beside")
AT_REST = (
    "{left} to the left of {right}",
    "{right} to the right of {left}",
    "{left} on the left and {right} on the right",
)
TOGETHER = ("{left} and {right}", "{right} and {left}")
FILMED: dict[str, tuple[str, ...]] = {
    "static": ("the camera is static", "the camera does not move", "static shot", "a fixed camera"),
    "orbit left": ("the camera orbits to the left", "the camera circles left", "the camera orbits left"),
    "orbit right": ("the camera orbits to the right", "the camera circles right", "the camera orbits right"),
    "pan left": ("the camera pans left", "the camera turns to the left", "the camera pans to the left"),
    "pan right": ("the camera pans right", "the camera turns to the right", "the camera pans to the right"),
    "dolly in": ("the camera dollies in", "the camera moves in", "the camera pushes in"),
    "dolly out": ("the camera dollies out", "the camera moves back", "the camera pulls back"),
}
GROUND = {
    "checkered": ("on a checkered floor", "on a chessboard floor", "on tiles"),
    "grey": ("on a grey floor", "on grey ground", "on concrete"),
    "sand": ("on a sandy floor", "on sand", "in the desert"),
    "grass": ("on a lawn", "on grass", "in a meadow"),
}
HEAVEN = {
    "day": ("under a clear sky", "on a sunny day", "in daylight", "by day"),
    "sunset": ("at sunset", "under an evening sky", "in the evening", "at dusk"),
    "night": ("at night", "under a dark sky", "in the dark"),
}
CLIP_OF = ("a video of", "a 3d animation of", "a short clip of")
IMAGE_OF = ("a picture of", "a 3d image of", "an image of")
WE_SEE = "we see"
LONGEST = 31  # words, commas and full stops of a caption: with a mark for its end, 32


def describe(scene: Scene, rng: random.Random, *, frames: int = 17) -> str:
    """One true caption of at most LONGEST tokens. Of an image (frames=1) it claims no motion."""
    long = rng.random() < 0.6
    opening = rng.choice(("", "", *(CLIP_OF if frames > 1 else IMAGE_OF), WE_SEE)) if long else ""
    said = _happening(scene, rng, noun_phrase=bool(opening)) if frames > 1 else _shown(scene, rng)
    where = [rng.choice(phrases) for phrases in (GROUND[scene.floor], HEAVEN[scene.sky]) if long or rng.random() < 0.3]
    rng.shuffle(where)
    sentence = " ".join(part for part in (opening, said, *where) if part)
    if frames > 1 and (scene.camera != "static" or (long and rng.random() < 0.4)):
        filmed = rng.choice(FILMED[scene.camera])
        sentence = rng.choice((f"{sentence}, {filmed}", f"{sentence}. {filmed}"))
    sentence += "." if long else ""
    too_long = len(sentence.split()) + sentence.count(",") + sentence.count(".") > LONGEST
    return sentence.removeprefix(opening).lstrip() if too_long else sentence  # two at rest, a phrase of its own


def _happening(scene: Scene, rng: random.Random, *, noun_phrase: bool) -> str:
    first, *others = [_named(solid, rng) for solid in scene.solids]
    if scene.motion == "still" and others:
        return rng.choice(AT_REST).format(left=first, right=others[0])
    says, saying, then = rng.choice(DOES[scene.motion])
    words = [first, saying if noun_phrase else says, then]
    if scene.motion == "behind":
        words += [others[0], rng.choice(TOWARDS[scene.direction])]
    elif others:
        words += [rng.choice(BESIDE), others[0]]
    return " ".join(word for word in words if word)


def _shown(scene: Scene, rng: random.Random) -> str:
    first, *others = [_named(solid, rng) for solid in scene.solids]
    if not others:
        return first
    return rng.choice(AT_REST if scene.motion == "still" else TOGETHER).format(left=first, right=others[0])


def _named(solid: Solid, rng: random.Random) -> str:
    return f"{'an' if solid.colour[0] in 'aeiou' else 'a'} {solid.colour} {rng.choice(NOUNS[solid.shape])}"


def vocabulary() -> list[str]:
    """Every word a caption can contain, sorted, lower case, without punctuation."""
    phrases = ["a", "an", WE_SEE, *COLOURS, *AT_REST, *TOGETHER, *BESIDE, *CLIP_OF, *IMAGE_OF]
    for table in (NOUNS, FILMED, GROUND, HEAVEN, TOWARDS):
        phrases += [phrase for choices in table.values() for phrase in choices]
    phrases += [part for verbs in DOES.values() for verb in verbs for part in verb]
    return sorted({word for phrase in phrases for word in phrase.split() if not word.startswith("{")})


# ---- motion: where everything is at a moment of the clip, 0 its first frame and 1 its last ---------------------------

HALF_HEIGHT = {"sphere": 1.0, "cube": 0.8, "cylinder": 0.9, "cone": 1.0}  # in radii
BOUND = {"sphere": 1.001, "cube": 1.387, "cylinder": 1.192, "cone": 1.415}  # radius of the sphere around it, in radii
HALF_VIEW = math.tan(math.radians(19.5))  # half the shorter side of the picture, at distance 1


def moments(scene: Scene, frames: int) -> list[float]:
    """The times of the frames. An image shows some moment, but never one solid hidden behind the other."""
    if frames > 1:
        return [i / (frames - 1) for i in range(frames)]
    j = scene.jitter.moment
    return [0.5 + (math.copysign(0.35 + 0.15 * abs(j), j) if scene.motion == "behind" else 0.45 * j)]


class Pose(NamedTuple):
    x: float
    y: float
    z: float
    angle: float  # radians about the vertical; only a cube shows it


def poses(scene: Scene, time: float) -> list[Pose]:
    """Where the centre of each solid is, and how it is turned."""
    j = scene.jitter
    first = scene.solids[0]
    swing = 2 * time - 1  # -1 to 1 over the clip
    height = [HALF_HEIGHT[solid.shape] * solid.radius for solid in scene.solids]
    x, y, z, angle = 0.45 * j.sideways, height[0], 0.4 * j.depth, 0.75 * j.turn
    match scene.motion:
        case "left" | "right":
            x = 0.12 * j.sideways + (1 if scene.motion == "right" else -1) * swing * (1.2 + 0.08 * j.reach)
        case "closer" | "away":
            x *= 0.5
            z = (1 if scene.motion == "closer" else -1) * swing * (2.3 + 0.15 * j.reach) - 0.6
        case "spin":
            angle += scene.direction * time * (3.6 + 0.6 * j.reach)
        case "bounce":
            beats = time * (2.5 + 0.4 * j.reach) + 0.25 * (j.phase + 1)
            y += abs(math.sin(math.pi * beats)) * (1.0 + 0.1 * j.lift) * (1.9 / (1 + first.radius))
        case _:
            pass
    if len(scene.solids) == 1:
        return [Pose(x, y, z, angle)]
    if scene.motion == "behind":
        x, z = scene.direction * swing * (1.95 + 0.08 * j.reach) + 0.15 * j.sideways, z * 0.5 - 1.5
        return [Pose(x, y, z, angle), Pose(0.15 * j.sideways, height[1], 0.5, 0.75 * j.turn2)]
    side = 1 if scene.motion == "bounce" and j.side > 0 else -1
    gap = 1.0 + 0.06 * j.reach
    return [Pose(side * gap, y, 0.35 * j.depth, angle), Pose(-side * gap, height[1], 0.35 * j.depth2, 0.75 * j.turn2)]


class Eye(NamedTuple):
    position: RGB
    right: RGB
    up: RGB
    forward: RGB


def eye(scene: Scene, time: float) -> Eye:
    """The camera. It orbits right by travelling to the right around the scene, and pans right by turning right."""
    kind, _, way = scene.camera.partition(" ")
    sign = {"right": 1, "left": -1}.get(way, 0)
    pair = len(scene.solids) == 2
    around, turned, distance = 0.1 * scene.jitter.view, 0.0, 7.0 if pair else 6.4
    if kind == "orbit":
        around += sign * (time - 0.5) * 1.15
    if kind == "pan":
        turned = sign * (time - 0.5) * (0.20 if pair else 0.32)
    if kind == "dolly":
        distance = (5.5 if pair else 4.6) + 3.9 * (1 - time if way == "in" else time)
    height = 0.33 * distance + 0.1
    position = (distance * math.sin(around), height, distance * math.cos(around))
    fx, fy, fz = -math.sin(around - turned), (0.9 - height) / distance, -math.cos(around - turned)
    flat = math.hypot(fx, fz)
    norm = math.hypot(flat, fy)
    right = (-fz / flat, 0.0, fx / flat)
    forward = (fx / norm, fy / norm, fz / norm)
    up = (
        right[1] * forward[2] - right[2] * forward[1],
        right[2] * forward[0] - right[0] * forward[2],
        right[0] * forward[1] - right[1] * forward[0],
    )
    return Eye(position, right, up, forward)


# ---- rendering -------------------------------------------------------------------------------------------------------
# Letters: N rays of a frame, laid out [sub-sample, height, width] so that a pixel is the mean over the first axis;
# M the rays that can meet one solid. Vectors and colours are [3, N]: one contiguous row per axis.


class Weather(NamedTuple):
    zenith: RGB
    horizon: RGB  # also the colour of the fog
    tint: RGB
    ambient: float
    sun: float


WEATHER = {
    "day": Weather((0.30, 0.52, 0.92), (0.85, 0.92, 1.00), (1.00, 1.00, 1.00), 0.48, 0.60),
    "sunset": Weather((0.40, 0.22, 0.48), (0.98, 0.68, 0.46), (1.03, 0.95, 0.88), 0.48, 0.56),
    "night": Weather((0.01, 0.02, 0.08), (0.09, 0.11, 0.24), (0.90, 0.94, 1.06), 0.46, 0.54),
}
TILE = 2.0  # world units; smaller tiles alias in the distance, and an autoencoder then spends itself on them
FOG = 0.10  # per world unit beyond 5


def render(
    scene: Scene, *, width: int = 64, height: int = 64, frames: int = 17, supersample: int = 2
) -> NDArray[np.uint8]:
    """Pixels of the clip, [T, H, W, 3] in 0..255. Any size: the picture's shorter side always shows the same view."""
    if min(width, height, frames, supersample) < 1:
        raise ValueError(f"{width}x{height}x{frames} (supersample {supersample}) must all be at least 1")
    across, upward = _screen(width, height, supersample)
    clip = np.empty((frames, height, width, 3), np.uint8)
    view = backdrop = None
    for frame, time in enumerate(moments(scene, frames)):
        here = eye(scene, time)
        if backdrop is None or here != view:  # under a static camera the empty stage is drawn once
            view, backdrop = here, _backdrop(scene, here, across, upward)
        picture = _draw_solids(scene, poses(scene, time), here, backdrop)  # [3, N]
        picture = picture.reshape(3, supersample**2, height, width).mean(axis=1)
        clip[frame] = (picture.clip(0, 1) * 255 + 0.5).transpose(1, 2, 0)
    return clip


def _screen(width: int, height: int, supersample: int) -> tuple[Floats, Floats]:
    """How far each ray leans to the right and upwards: two [N]."""
    scale = HALF_VIEW / min(width, height)
    sub = (np.arange(supersample) + 0.5) / supersample
    u = (2 * (np.arange(width) + sub[:, None]) - width) * scale  # [S, W]
    v = (height - 2 * (np.arange(height) + sub[:, None])) * scale  # [S, H]
    grid = (supersample, supersample, height, width)
    across = np.broadcast_to(u[None, :, None, :], grid)
    upward = np.broadcast_to(v[:, None, :, None], grid)
    return across.reshape(-1).astype(np.float32), upward.reshape(-1).astype(np.float32)


class Backdrop(NamedTuple):
    rays: Floats  # [3, N], unit length
    lit: Floats  # [3, N], sky and floor without solids
    shaded: Floats  # [3, N], the same with the whole floor in shadow
    floor: NDArray[np.intp]  # [F], the rays that meet the floor
    spot: Floats  # [2, F], where they meet it: x and z


def _backdrop(scene: Scene, here: Eye, across: Floats, upward: Floats) -> Backdrop:
    weather = WEATHER[scene.sky]
    rays = np.stack([f + across * r + upward * u for r, u, f in zip(here.right, here.up, here.forward, strict=True)])
    rays /= np.sqrt((rays * rays).sum(axis=0))
    lit = _column(weather.horizon) + (_column(weather.zenith) - _column(weather.horizon)) * (rays[1] * 3.2).clip(0, 1)
    shaded = lit.copy()

    floor = np.flatnonzero(rays[1] < -1e-3)
    down = rays[:, floor]  # [3, F]
    distance = -here.position[1] / down[1]
    x, z = here.position[0] + distance * down[0], here.position[2] + distance * down[2]
    tones = [_column(tone) for tone in FLOORS[scene.floor]]
    pattern = np.cos(x * (math.pi / TILE)) * np.cos(z * (math.pi / TILE))
    if scene.floor == "checkered":  # hard edges near by, blurred where a pixel covers much of a tile
        pattern = (pattern * (160 / (distance * distance))).clip(-1, 1)
    ground = tones[0] + (tones[1] - tones[0]) * (0.5 + 0.5 * pattern)
    ground *= _column(weather.tint)
    clear = np.exp((5 - distance).clip(None, 0) * FOG)
    fog = _column(weather.horizon) * (1 - clear)
    sun = _sun(scene)
    lit[:, floor] = ground * (weather.ambient + weather.sun * sun[1]) * clear + fog
    shaded[:, floor] = ground * (weather.ambient * 0.9) * clear + fog
    return Backdrop(rays, lit, shaded, floor, np.stack([x, z]))


def _column(colour: RGB) -> Floats:
    return np.array(colour, np.float32)[:, None]


def _sun(scene: Scene) -> RGB:
    x, y, z = 0.6 * scene.jitter.light, 0.8, 0.6
    norm = math.sqrt(x * x + y * y + z * z)
    return (x / norm, y / norm, z / norm)


def _draw_solids(scene: Scene, where: Sequence[Pose], here: Eye, backdrop: Backdrop) -> Floats:
    """The frame with shadows and solids on it, [3, N]. Solids cast shadows on the floor only."""
    picture = backdrop.lit.copy()
    sun = _sun(scene)
    for solid, pose in zip(scene.solids, where, strict=True):
        dark = backdrop.floor[_shadow(solid, pose, sun, backdrop.spot)]
        picture[:, dark] = backdrop.shaded.take(dark, axis=1)
    depth = np.full(picture.shape[1], np.inf, np.float32) if len(where) > 1 else None
    weather = WEATHER[scene.sky]
    for solid, pose in zip(scene.solids, where, strict=True):
        origin = (here.position[0] - pose.x, here.position[1] - pose.y, here.position[2] - pose.z)
        near = _near(origin, backdrop.rays, BOUND[solid.shape] * solid.radius)
        origin, rays = (
            _turned(np.array(origin, np.float32)[:, None], pose),
            _turned(backdrop.rays.take(near, axis=1), pose),
        )
        distance, normal = _meet(solid, origin, rays)
        seen = np.isfinite(distance)
        if depth is not None:
            seen &= distance < depth[near]
        at, rays, normal = near[seen], rays[:, seen], normal[:, seen]
        if depth is not None:
            depth[at] = distance[seen]
        light = _turned(_column(sun), pose)
        facing = (normal * light).sum(axis=0)
        bounced = (rays * light).sum(axis=0) - 2 * (normal * rays).sum(axis=0) * facing
        gloss = 0.22 * np.square(np.square(np.square(np.square(bounced.clip(0, None)))))  # a power is 10x slower
        shade = weather.ambient + weather.sun * facing.clip(0, None) + 0.12 * normal[1]
        picture[:, at] = _column(COLOURS[solid.colour]) * _column(weather.tint) * shade + gloss
    return picture


def _near(origin: RGB, rays: Floats, radius: float) -> NDArray[np.intp]:
    """[M], the rays from origin that pass the world's centre within the radius. Tracing only these is 5x faster."""
    along = origin[0] * rays[0] + origin[1] * rays[1] + origin[2] * rays[2]
    apart = origin[0] ** 2 + origin[1] ** 2 + origin[2] ** 2 - radius**2
    return np.flatnonzero((along < 0) & (along * along > apart))


def _shadow(solid: Solid, pose: Pose, sun: RGB, spot: Floats) -> NDArray[np.intp]:
    """The indices of the spots on the floor [2, F] that the solid keeps the sun from."""
    x, z = spot[0] - pose.x, spot[1] - pose.z
    along = x * sun[0] - pose.y * sun[1] + z * sun[2]
    away = x * x + pose.y**2 + z * z - along * along
    near = np.flatnonzero(away < (BOUND[solid.shape] * solid.radius) ** 2)
    origin = np.stack([x[near], np.full(len(near), -pose.y, np.float32), z[near]])
    ray = _turned(_column(sun), pose)
    distance, _ = _meet(solid, _turned(origin, pose), np.broadcast_to(ray, origin.shape))
    return near[np.isfinite(distance)]


def _turned(vectors: Floats, pose: Pose) -> Floats:
    """Vectors [3, M] as the turned solid sees them."""
    c, s = math.cos(pose.angle), math.sin(pose.angle)
    x, y, z = vectors
    return np.stack([x * c - z * s, y, x * s + z * c])


def _meet(solid: Solid, origin: Floats, rays: Floats) -> tuple[Floats, Floats]:
    """Where rays [3, M] from origin [3, 1 or M] first meet a solid around 0: distance [M] (or inf), normal [3, M]."""
    size = solid.radius
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        match solid.shape:
            case "sphere":
                return _meet_sphere(size, origin, rays)
            case "cube":
                return _meet_cube(HALF_HEIGHT["cube"] * size, origin, rays)
            case "cylinder":
                return _meet_cylinder(0.78 * size, HALF_HEIGHT["cylinder"] * size, origin, rays)
            case _:
                return _meet_cone(size, HALF_HEIGHT["cone"] * size, origin, rays)


def _meet_sphere(radius: float, origin: Floats, rays: Floats) -> tuple[Floats, Floats]:
    b = (origin * rays).sum(axis=0)
    q = b * b - (origin * origin).sum(axis=0) + radius * radius
    distance = _if(q > 0, -b - np.sqrt(q))
    return distance, np.divide(origin + distance * rays, radius, dtype=np.float32)


def _meet_cube(half: float, origin: Floats, rays: Floats) -> tuple[Floats, Floats]:
    inverse = 1 / rays
    middle, reach = -origin * inverse, half * np.abs(inverse)
    enter, leave = middle - reach, (middle + reach).min(axis=0)  # [3, M], [M]
    last = enter.max(axis=0)
    return _if(last < leave, last), -np.sign(rays) * (enter == last)


def _meet_cylinder(radius: float, half: float, origin: Floats, rays: Floats) -> tuple[Floats, Floats]:
    ox, oy, oz = origin
    dx, dy, dz = rays
    a, b, c = dx * dx + dz * dz, ox * dx + oz * dz, ox * ox + oz * oz - radius * radius
    q = b * b - a * c
    wall = (-b - np.sqrt(q)) / a
    wall = _if((q > 0) & (np.abs(oy + wall * dy) < half), wall)
    up = -np.sign(dy)
    lid = _lid(radius, (up * half - oy) / dy, origin, rays)
    distance = np.minimum(wall, lid)
    on_wall = wall < lid
    normal = np.stack([on_wall * (ox + distance * dx) / radius, ~on_wall * up, on_wall * (oz + distance * dz) / radius])
    return distance, normal


def _meet_cone(radius: float, half: float, origin: Floats, rays: Floats) -> tuple[Floats, Floats]:
    ox, oy, oz = origin
    dx, dy, dz = rays
    slope = radius / (2 * half)  # at height y the cone is slope * (half - y) wide
    below = half - oy
    a = dx * dx + dz * dz - slope**2 * dy * dy
    b = ox * dx + oz * dz + slope**2 * below * dy
    q = b * b - a * (ox * ox + oz * oz - slope**2 * below * below)
    root = np.sqrt(q)
    walls = [(-b - root) / a, (-b + root) / a]
    wall = np.minimum(*[_if((q > 0) & (np.abs(oy + t * dy) < half), t) for t in walls])
    lid = _lid(radius, (-half - oy) / dy, origin, rays)
    distance = np.minimum(wall, lid)
    on_wall = wall < lid
    x, z = ox + distance * dx, oz + distance * dz
    lean = on_wall / (np.sqrt(x * x + z * z) * math.sqrt(1 + slope**2) + 1e-6)
    rise = np.where(on_wall, np.float32(slope / math.sqrt(1 + slope**2)), np.float32(-1))
    return distance, np.stack([x * lean, rise, z * lean])


def _lid(radius: float, distance: Floats, origin: Floats, rays: Floats) -> Floats:
    x, z = origin[0] + distance * rays[0], origin[2] + distance * rays[2]
    return _if(x * x + z * z < radius * radius, distance)


def _if(met: Bools, distance: Floats) -> Floats:
    """The distance of rays that meet what lies ahead of them, infinity for the others."""
    return np.where(met & (distance > 1e-3), distance, np.float32(np.inf))


# ---- looking at it ---------------------------------------------------------------------------------------------------


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
