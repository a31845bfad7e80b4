"""Phrases by composition: a verb, its aspect, a side or a way, from where to where, and the order of it all.

Every choice belongs to a family. Those of HELD_OUT are never trained on, so that the rewriter can be measured on ways
to speak that it has not seen; with `held_out` only phrases that need one of them are made.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from model.world.moves import (
    BOUNCES,
    COMES,
    RECEDES,
    SIDES,
    SPINS,
    STILL,
    TRAVELS,
    inflect,
)
from model.world.words import OBSERVER, mirror, phrases

Families = Mapping[str, Sequence[str]]

# To the left; each family is mirrored for the right. {of} is a SIDES.
LEFTWARDS: Families = {
    "to": phrases("to the left {of}, towards the left {of}, toward the left {of}, over to the left {of}"),
    "ward": phrases("leftward, leftwards, further leftward, off leftwards"),
    "bare": phrases("left, left, off left, further left, over left"),
    "from to": phrases(
        """from right to left, from the right to the left, from the right {of} to the left {of}, right to left, from
        the right all the way to the left, from the right {of} over to the left {of}"""
    ),
    "across": phrases(
        """across the screen from right to left, from the right across the frame to the left, across the picture
        from the right to the left, across from right to left, past from the right to the left"""
    ),
    "off": phrases(
        "off to the left, away to the left, out of the frame on the left, off the left edge, out to the left"
    ),
    "for": phrases("for the left {of}, in the direction of the left {of}, on the way to the left {of}"),
    "from": phrases("in from the right, into view from the right {of}, from beyond the right edge, out of the right"),
}
CLOSER: Families = {
    "closer": phrases(
        "closer, nearer, closer and closer, nearer and nearer, ever closer, closer to {us}, nearer to {us}"
    ),
    "towards": phrases("towards {us}, toward {us}, straight at {us}, right at {us}, directly towards {us}, up to {us}"),
    "forward": phrases("forward, forwards, to the front, into the foreground, in our direction, our way"),
}
AWAY: Families = {
    "away": phrases("away, away from {us}, further away, farther and farther away, further and further away from {us}"),
    "distance": phrases("into the distance, off into the distance, to the horizon, towards the horizon, far away"),
    "back": phrases("into the background, out of sight over the horizon, backwards away from {us}, off to the horizon"),
}
# The verbs of a motion that have a way of their own, and what may follow.
DOES: dict[str, Families] = {
    "bounce": {
        "bounce": tuple(
            f"{verb} {then}" for verb in BOUNCES for then in phrases("-, up and down, in place, on the spot")
        ),
        "up and down": phrases("go up and down, move up and down, travel up and down, shoot up and down"),
        "air": phrases("jump into the air, leap into the air again and again, spring up again and again, hop about"),
    },
    "spin": {
        "spin": tuple(
            f"{verb} {then}" for verb in SPINS for then in phrases("-, around, in place, on the spot, round")
        ),
        "turn": phrases("turn around, turn round and round, turn in place, turn on the spot, turn about itself"),
        "axis": phrases("turn on its axis, turn around its own axis, revolve around its axis, rotate about its axis"),
    },
    "still": {
        "stand": tuple(f"{verb} {still}" for verb in phrases("stand, sit, stay, remain, lie, keep") for still in STILL),
        "not": phrases("not move, not budge, not stir, not go anywhere, not move at all, not move an inch, never move"),
        "where": phrases(
            "stay where it is, remain in one place, stay in the same spot, stand in its place, stay there"
        ),
        "be": tuple(f"be {still}" for still in STILL),
    },
    "closer": {
        "near": phrases("approach, approach {us}, near {us}, come near, come near {us}, draw near, close in on {us}"),
        "grow": phrases("grow larger, get bigger, get larger and larger, become bigger, grow bigger and bigger"),
    },
    "away": {
        "recede": tuple(f"{verb} {then}" for verb in RECEDES for then in phrases("-, into the distance, from {us}")),
        "grow": phrases("grow smaller, get smaller and smaller, become tiny, become smaller, get smaller"),
        "back": phrases("back away, back away from {us}, back off from {us}, leave {us} behind"),
    },
}
_FILMED: dict[str, Families] = {  # after "the camera"; to the left, mirrored for the right
    "static": {
        "still": tuple(f"{verb} {how}" for verb in phrases("be, stay, remain, keep, stand") for how in STILL[:9]),
        "not": phrases("not move, not move at all, never move, not follow, not budge"),
        "place": phrases(
            "stay where it is, stay put, hold its position, remain in place, rest on a tripod, hold still"
        ),
    },
    "pan left": {
        "pan": phrases("pan left, pan to the left, pan from right to left, pan leftwards, pan across to the left"),
        "turn": phrases("turn left, turn to the left, swivel to the left, rotate left, swing left, turn leftwards"),
        "look": phrases("look to the left, look left, sweep to the left, sweep from right to left, whip left"),
    },
    "orbit left": {
        "orbit": phrases(
            "orbit left, orbit to the left, orbit it to the left, orbit leftwards, orbit around it to the left"
        ),
        "circle": phrases("circle left, circle it to the left, circle around it to the left, circle to the left"),
        "around": tuple(
            f"{verb} {then}"
            for verb in phrases("move, go, travel, swing, arc, fly, drift")
            for then in phrases("around it to the left, around to the left, round it to the left, leftwards around it")
        ),
    },
    "dolly in": {
        "dolly": phrases("dolly in, push in, zoom in, dolly forward, push forward, zoom in on it, push in on it"),
        "closer": tuple(
            f"{verb} {how}" for verb in COMES for how in phrases("closer, nearer, closer to it, in, towards it")
        ),
        "forward": tuple(f"{verb} {how}" for verb in COMES[:1] + COMES[4:] for how in ("forward", "forwards", "ahead")),
        "near": phrases("approach, approach it, near it, close in, close in on it, advance, advance on it"),
    },
    "dolly out": {
        "dolly": phrases("dolly out, pull back, pull out, zoom out, dolly back, pull away, zoom out from it"),
        "away": tuple(
            f"{verb} {how}"
            for verb in ("move", "creep", "inch", "glide", "drift", "travel", "draw", "ease")
            for how in phrases("away, back, backwards, backward, away from it, out, further away, further back")
        ),
        "recede": phrases("recede, retreat, withdraw, back off, back away, back up, retreat from it, withdraw from it"),
    },
}
FILMED = _FILMED | {
    mirror(move): {name: tuple(map(mirror, said)) for name, said in families.items()}
    for move, families in _FILMED.items()
    if "left" in move
}
# Families of the rewriter's test: verbs, ways and orders that training has no phrase of.
HELD_OUT = frozenset(
    {"water", "moved", "for", "from", "forward", "back", "air", "axis", "where", "look", "around", "recede", "first"}
)
ORDERS = ("plain", "plain", "that", "participle", "it", "before", "keeps", "begins", "seen", "past", "first")


def motion(rng: random.Random, subject: str, said: str, *, held_out: bool = False) -> str:
    """A sentence without its full stop: what the subject does (any motion but "behind")."""
    families = dict(DOES.get(said, {}))
    ways = {"left": LEFTWARDS, "right": LEFTWARDS, "closer": CLOSER, "away": AWAY}.get(said, {})
    if ways and (not families or rng.random() < 0.65):
        verbs = TRAVELS if said in ("left", "right") else {"come": COMES, "go": TRAVELS["go"]}
        verb = _choose(rng, verbs, held_out and rng.random() < 0.5)
        way = sideways(rng, said, held_out=held_out) if ways is LEFTWARDS else _choose(rng, ways, held_out)
    else:
        phrase = _choose(rng, families, held_out)
        verb, _, way = phrase.partition(" ")
        if verb in ("not", "never"):
            verb, way = phrase, ""
    way = way.replace("{us}", rng.choice(OBSERVER))
    return _ordered(rng, subject, verb, " ".join(way.split()), held_out)


def sideways(rng: random.Random, side: str, *, held_out: bool = False) -> str:
    """A way to the left or the right."""
    way = _choose(rng, LEFTWARDS, held_out)
    while "{of}" in way:
        way = way.replace("{of}", rng.choice(SIDES), 1)
    return " ".join((mirror(way) if side == "right" else way).split())


def _choose(rng: random.Random, families: Families, held_out: bool) -> str:
    names = [name for name in families if (name in HELD_OUT) == held_out] or list(families)
    return rng.choice(families[rng.choice(names)])


def _ordered(rng: random.Random, subject: str, verb: str, way: str, held_out: bool) -> str:
    order = rng.choice([order for order in ORDERS if held_out or order not in HELD_OUT])
    if verb.startswith("never "):
        return f"{subject} never {inflect(verb.removeprefix('never '), 's')} {way}".strip()
    bare = verb.startswith("not ")
    does = inflect(verb, "s")
    match order:
        case "that":
            said = f"{subject} {rng.choice(('that', 'which', ', which'))} {does} {way}"
        case "participle":
            said = f"{subject} {rng.choice(('', 'is', ',', ', which is'))} {inflect(verb, 'ing')} {way}"
        case "it":
            said = f"{subject} {rng.choice(('. It', '; it', ', and it', '. This one'))} {does} {way}"
        case "before":
            said = f"{inflect(verb, 'ing')} {way}{rng.choice((',', ':', ' is'))} {subject}"
        case "keeps" if not bare:
            said = f"{subject} {rng.choice(('keeps', 'keeps on', 'goes on', 'continues'))} {inflect(verb, 'ing')} {way}"
        case "begins" if not bare:
            said = f"{subject} {rng.choice(('begins to', 'starts to', 'continues to', 'can be seen to'))} {verb} {way}"
        case "seen" if not bare:
            said = f"{rng.choice(('we see', 'watch', 'there is', 'we watch'))} {subject} {inflect(verb, 'ing')} {way}"
        case "past" if not bare:
            said = f"{subject} {inflect(verb, 'ed')} {way}"
        case "first" if way and not bare:
            said = f"{way} {does} {subject}"
        case _:
            said = f"{subject} {does} {way}"
    return " ".join(said.split()).replace(" ,", ",").replace(" .", ".").replace(" ;", ";")


def filmed(rng: random.Random, camera: str, *, held_out: bool = False) -> tuple[str, str]:
    """A move of the camera as a clause with a verb, and the same with its participle, to follow "with"."""
    verb, _, way = _choose(rng, FILMED[camera], held_out).partition(" ")
    who = rng.choice(("the camera", "the camera", "the camera", "camera", "our view", "the shot"))
    slow = rng.choice(("", "", "slowly", "gently", "gradually"))
    if verb == "never":
        return f"{who} never {inflect(way, 's')}", f"{who} never {inflect(way, 'ing')}"
    if verb == "not":
        verb, way = f"{verb} {way}", ""
    does, doing = inflect(verb, "s"), inflect(verb, "ing")
    clause = rng.choice((f"{who} {slow} {does} {way}", f"{who} {does} {way} {slow}", f"{who} is {doing} {way}"))
    return " ".join(clause.split()), " ".join(f"{who} {slow} {doing} {way}".split())
