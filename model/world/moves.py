"""How people say that a solid or the camera moves: verbs by what they tell, sides, ways towards and away, inflection.

`model.world.composed` makes phrases of these for the rewriter to learn from, and `model.world.clauses` reads them
out of any order that a sentence has them in.
"""

from __future__ import annotations

from model.world.words import DOUBLED, phrases

# Families of verbs; those of HELD_OUT in `composed` are never trained on.
TRAVELS = {
    "go": phrases("move, go, travel, pass, head, proceed, advance, progress, shift, wander, journey, transit"),
    "slide": phrases("slide, glide, skid, slip, skate, coast, slither, ease, edge, sidle, skim, slink, shuffle"),
    "roll": phrases("roll, trundle, bowl, tumble, wheel, rumble, tootle, lumber"),
    "run": phrases(
        """run, dash, race, rush, zip, shoot, dart, scurry, sprint, bolt, speed, hurry, hurtle, whizz, whiz, whoosh,
        scamper, scuttle, hasten, charge, fly, zoom, streak, tear, barrel"""
    ),
    "walk": phrases(
        """walk, stroll, amble, saunter, creep, crawl, inch, march, wander, meander, plod, trot, jog, step, stride,
        tiptoe, scoot, sneak, mosey, parade, waltz, stagger, hobble, potter"""
    ),
    "water": phrases("float, drift, sail, cruise, swim, stream, flow, waft, hover, steam, navigate"),
    "drive": phrases(
        "drive, ride, veer, sweep, steer, swerve, cross, traverse, make its way, work its way, wend its way"
    ),
    "moved": phrases(
        """be pushed, be pulled, be dragged, be carried, be blown, be towed, be moved, be rolled, be drawn, be shoved,
        be nudged, be swept, be hauled, be led, be sent"""
    ),
}
COMES = phrases("come, move, draw, get, creep, inch, roll, slide, glide, drift, edge, float, travel")
NEARS = phrases("approach, near, loom")
BOUNCES = phrases("bounce, hop, jump, leap, spring, bob, skip, bound, pogo, boing, rebound, trampoline, vault")
SPINS = phrases("spin, rotate, twirl, whirl, pirouette, revolve, swivel, gyrate, swirl, twist")
RECEDES = phrases("recede, retreat, withdraw, dwindle, shrink, diminish")
RESTS = phrases("stand, sit, rest, lie, stay, remain, wait, perch, linger, pause, repose, idle, keep, hold")
STILL = phrases(
    """still, motionless, stationary, static, immobile, unmoving, frozen, fixed, immovable, parked, put, inert,
    unmoved, stock still, at rest, at a standstill, at a stop, at a halt, rooted to the spot, nailed to the
    spot, glued to the spot"""
)
OBSERVERS = phrases(
    """us, me, you, camera, viewer, viewers, lens, audience, screen, observer, spectator, spectators, watcher, onlooker,
    beholder, person, eye, eyes, foreground, front, glass"""
)
SIDES = phrases(
    "-, -, side, hand side, edge, end, border, margin, side of the frame, edge of the screen, side of the picture"
)


IRREGULAR = {"is": ("is", "being"), "be": ("is", "being"), "have": ("has", "having"), "lie": ("lies", "lying")}
PAST = {
    "go": "went", "come": "came", "get": "got", "grow": "grew", "slide": "slid", "run": "ran", "shoot": "shot",
    "fly": "flew", "speed": "sped", "tear": "tore", "creep": "crept", "swim": "swam", "drive": "drove", "ride": "rode",
    "sweep": "swept", "make": "made", "draw": "drew", "leap": "leapt", "spring": "sprang", "spin": "spun",
    "withdraw": "withdrew", "shrink": "shrank", "stand": "stood", "sit": "sat", "lie": "lay", "keep": "kept",
    "hold": "held", "be": "was", "steal": "stole", "become": "became", "begin": "began", "swing": "swung",
    "slink": "slunk", "leave": "left", "take": "took", "freeze": "froze", "set": "set", "put": "put", "find": "found",
    "wend": "wended", "stride": "strode", "bear": "bore", "back": "backed",
}  # fmt: skip


def inflect(verb: str, ending: str) -> str:
    """The first word of a verb phrase with -s, -ing or -ed; "not move" becomes "does not move" and "not moving"."""
    word, _, rest = verb.partition(" ")
    if word == "not":
        return f"does not {rest}" if ending == "s" else f"not {inflect(rest, 'ing')}"
    if word == "is":
        return verb if ending == "s" else rest
    if ending == "ed":
        word = PAST.get(word) or _joined(word, "ed")
    elif word in IRREGULAR:
        word = IRREGULAR[word][ending == "ing"]
    elif ending == "s":
        word = word[:-1] + "ie" if word.endswith("y") and word[-2] not in "aeiou" else word
        word += "es" if word.endswith(("s", "x", "ch", "sh", "z", "o")) else "s"
    else:
        word = _joined(word, "ing")
    return f"{word} {rest}".strip()


def _joined(word: str, ending: str) -> str:
    if word.endswith("e") and (ending == "ed" or not word.endswith("ee")):
        word = word[:-1]
    elif ending == "ed" and word.endswith("y") and word[-2] not in "aeiou":
        word = word[:-1] + "i"
    return word + word[-1] * (word in DOUBLED) + ending


def forms(verb: str) -> tuple[str, ...]:
    """A verb phrase as it is, with -s, with -ing and with -ed: "creep up", "creeps up", "creeping up", "crept up"."""
    return (verb, inflect(verb, "s"), inflect(verb, "ing"), inflect(verb, "ed"))
