"""The words that sentences about motion are made of: every form of the verbs by what they tell, and small words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import lru_cache

from model.world.moves import BOUNCES, NEARS, OBSERVERS, RECEDES, RESTS, SPINS, STILL, TRAVELS, forms
from model.world.words import DECOR, phrases

_MORE = {
    "spring": ("sprung",), "shrink": ("shrunk",), "leap": ("leaped",), "swim": ("swum",), "drive": ("driven",),
    "be": ("are", "am", "been", "were"), "draw": ("drawn",), "travel": ("travelled", "travelling"), "blow": ("blown",),
    "spin": ("spinned",), "lead": ("led",), "throw": ("thrown",), "send": ("sent",),
}  # fmt: skip


def _forms(verbs: Iterable[str]) -> dict[str, str]:
    """Every form of the verbs that are one word, and the verb that it is of; "left" is a side."""
    single = [verb for verb in verbs if " " not in verb]
    return {form: verb for verb in single for form in (*forms(verb), *_MORE.get(verb, ())) if form != "left"}


# What a solid does
TRAVEL = _forms(
    (
        *(verb for family in TRAVELS.values() for verb in family if verb != "barrel"),
        *phrases("""make, work, wend, come, bring, push, pull, drag, carry, tow, shove, nudge, haul, send, lead, blow,
        draw, get, pass, bear, set, take, lurch, jerk, propel, press, worm, wriggle, squirm, snake, wind, weave, lope,
        prowl,
        stalk, hike, trek, plough, flit, flutter, soar, swoop, plunge, careen, jolt, clatter, bustle, traipse, tread,
        toddle, waddle, wobble, skitter, flee, escape, follow, transport, relocate, migrate, motor, pelt, scramble,
        sledge, throw, gravitate, aim, point, move, shuttle, ferry, displace, depart, stray, nose, hustle, pace, troop,
        trudge, tend, roam"""),
    )
)
BOUNCE, SPIN, RECEDE, REST = _forms(BOUNCES), _forms(SPINS), _forms(RECEDES), _forms(RESTS)
NEAR = {form: verb for form, verb in _forms(NEARS).items() if form != "near"}  # a red ball near a cube
TURN = _forms(phrases("turn, reel, roll, pivot"))
ENTER = _forms(phrases("enter, appear, emerge, start, begin, originate, arrive, pop, peek, materialise"))
EXIT = _forms(phrases("exit, leave, end, vanish, disappear, finish, stop, quit, wind, depart"))
GROW = _forms(phrases("grow, get, become, look, loom, turn, swell"))
BUDGE = frozenset({*TRAVEL, *_forms(phrases("budge, stir, move, roll, change, shake, wobble"))})
# What the camera does
CAMERA_TURN = _forms(
    phrases("pan, turn, rotate, swivel, sweep, swing, look, whip, pivot, yaw, swish, twist, pirouette, spin")
)
CAMERA_ROUND = {"orbital": "orbit"} | _forms(
    phrases("circle, orbit, arc, revolve, encircle, loop, curve, round, circumnavigate, spiral")
)
CAMERA_ONLY = _forms(phrases("pan, dolly, zoom, tilt, truck, track, orbit, crane, pedestal"))
CAMERA_GO = _forms(
    phrases("dolly, push, pull, zoom, track, truck, close, lean, press, back, trolley, jump, ramp, scale")
)
CAMERA_NEAR = _forms(phrases("approach, near, advance"))
CAMERA_STAY = _forms(phrases("hold, keep, stay, remain, rest, stand, be, sit, lock, fix, park"))

BEING = frozenset(_forms(phrases("be, have, do, see, show, film, continue, begin, start")))
VERBS = frozenset(
    {*TRAVEL, *BOUNCE, *SPIN, *RECEDE, *REST, *NEAR, *TURN, *ENTER, *EXIT, *GROW, *BUDGE, *BEING}
    | {*CAMERA_TURN, *CAMERA_ROUND, *CAMERA_ONLY, *CAMERA_GO}
)
TRANSITIVE = frozenset(
    _forms(
        phrases("circle, orbit, approach, near, follow, pass, round, face, leave, encircle, reach, chase, touch, meet")
    )
)
AUXILIARY = frozenset(
    phrases("""is, are, was, were, has, have, had, does, did, do, can, will, would, not, keeps, never, just, s, been,
    could, being""")
)

STILL_WORDS = frozenset(still for still in STILL if " " not in still) | {"freeze", "steady"}
SIZES = frozenset(phrases("big, small, huge, tiny, enormous, little, giant, large"))
SMALL = frozenset(
    (
        *(word for word in DECOR if word not in SIZES),
        *phrases("""very, just, quite, really, all, way, far, slow, gentle, smooth, soft, bit, ever, so, now, simply,
        own, whole, entire, again, completely, perfectly, exactly, then, more, also, too, seen, fast, quick, straight,
        directly, COLOUR, constant, calm, time, please, nice, swift, sudden, majestic, lazy"""),
    )
)
ARTICLES = frozenset(
    phrases("a, an, the, this, these, those, one, single, two, some, another, my, your, our, their, his, her")
)
JOINS = frozenset(
    phrases("""while, as, whereas, and, but, when, where, whilst, then, until, whose, with, because, so, before, after,
    meanwhile""")
)
THING = frozenset(phrases("thing, object, solid, shape, subject, figure, one, other"))
SIDEWAYS = frozenset(phrases("left, right, leftward, rightward, leftwards, rightwards"))
OF_OBJECTS = frozenset(
    phrases("""to, towards, toward, around, round, past, behind, beside, by, near, over, under, on, onto, from, after,
    into, against, through, about, at, alongside, for, beyond, along, across, above, below, between, off, than, like,
    upon""")
)
SUBJECT_AFTER = frozenset(  # "we see a ball": the ball does what follows
    phrases(
        "see, sees, watch, watching, film, show, shows, showing, let, make, have, of, is, are, with, me, want, there"
    )
)
CAMERAS = frozenset(
    phrases("camera, cam, camcorder, viewpoint, view, shot, perspective, drone, cameraman, framing, tripod, vantage")
)

_KNOWN = frozenset(
    {*SMALL, *ARTICLES, *JOINS, *OF_OBJECTS, *CAMERAS, *STILL_WORDS, *SIDEWAYS, *OBSERVERS}
    | {
        *phrases("""closer, nearer, forward, forwards, backward, backwards, horizon, distance, further, farther, larger,
        bigger, smaller, place, nothing, neither, where, border, margin, ground, things, thing, sides, which, other,
        there, these, those, their, about, world, ahead, alone, again, along, between, below, above, after, before,
        under, upward, upwards, downward, downwards, inwards, outwards, beyond, inside, outside, scene, seems, middle,
        centre, center, being, light, night, water, white, black, brown, small, large""")
    }
)
_MEANT = sorted({*VERBS, "camera", "towards", "behind", *SIDEWAYS, *(word for word in STILL_WORDS if len(word) > 5)})


@lru_cache(maxsize=1 << 14)
def spelt(word: str) -> str:
    """The verb or camera that a word of five letters or more may be meant for; else the word."""
    if len(word) < 5 or word in VERBS or word in _KNOWN or not (word.isalpha() and word.islower()):
        return word
    return next(iter(difflib.get_close_matches(word, _MEANT, n=1, cutoff=0.84)), word)


def is_unknown(word: str) -> bool:
    """Is a word none of these, so that it may name something that is not of the world?"""
    known = (VERBS, SMALL, SIZES, _KNOWN, THING, AUXILIARY, SUBJECT_AFTER, {"up", "down", "in", "of", "i", "we", "it"})
    return word.isalpha() and word.islower() and not any(word in some for some in known) and not is_ing(word)


def is_known(word: str) -> bool:
    """Is a word a small one, or one of the ways and sides?"""
    return word in _KNOWN


def is_ing(word: str) -> bool:
    """Does a word end as participles do?"""
    return word.endswith("ing") and len(word) > 4
