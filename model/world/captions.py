"""Captions of scenes: true by construction, in the 127 words that mini knows."""

from __future__ import annotations

import random

from model.world.scene import COLOURS, Scene, Solid

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
