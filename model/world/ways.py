"""Sides and ways: what the words of one clause tell together, once it is known whose clause it is.

The text of a clause has no articles and no small words, and the tokens of `clauses` in it (S0, FLOOR, SKY); OBS is who
watches ("towards us"), OBSWARD the way to there. `side` turns to WAY what it has read, and to PLACE where things stand.
"""

from __future__ import annotations

import re

from model.world import verbs
from model.world.moves import STILL

MIRRORED = {"left": "right", "right": "left"}
FRAME = r"(?:frame|screen|picture|image|shot|view|scene|stage|field|sight|video|clip|camera)"
SIDE = r"(left|right)(?:wards?)?"
_PART = r"(?: (?:side|edge|border|margin|end|half|part|corner|boundary|limit|third|area|extreme|flank|wall))?"
_TAIL = rf"(?: hand)?{_PART}(?: (?:of|in) (?:{FRAME}|FLOOR|it|OBS))?(?: {FRAME}(?= |$))?"
_FAR = rf"(?:(?:{FRAME}|outside|upper|lower|very) )?"
_EDGE = rf"{_FAR}{SIDE}{_TAIL}"
_ADJECTIVES = r"(?:(?!of\b|and\b)[a-z]+ |COLOUR )"
_OF_SOLID = r"(?! (?:of|from) S\d| of it\b| of other\b)"

_BETWEEN = rf"over|across|through|along|past|on|straight|and|moving|going|it|,|out|off|up|of|{FRAME}|FLOOR|SKY|OBS|S\d"
_FROM_TO = re.compile(rf"(?:from )?{_EDGE}(?: (?:{_BETWEEN}))*? (?:to|towards?|into|until|till) {_EDGE}")
_FROM = re.compile(rf"(?:from|out of|out from)(?: (?:beyond|outside|off|out|somewhere|on|at))? {_EDGE}")
_TO = re.compile(
    rf"(?:to|towards?|for|into|off|past|beyond|over|via|(?:out|exit)(?: of {FRAME})? (?:on|at|by|through)|direction)"
    rf"(?: (?:way|reach|direction of|of|out of))? {_EDGE}{_OF_SOLID}"
)
_OF_OTHER = re.compile(
    rf"\b(?:(?:to|on|at) )?{_FAR}{SIDE}(?: hand)?(?: side)? (?:of|from) {_ADJECTIVES}{{0,3}}(?:S\d|it\b|other\b)"
)
_OF_ITS = re.compile(rf"(?:to|on|at) its {SIDE}(?: side)?")
AT = re.compile(rf"(?:on|at|in|by|near) {_FAR}(left|right)(?!ward){_TAIL}{_OF_SOLID}")
_BARE = re.compile(rf"(?<!\bits )\b{SIDE}\b(?! of S\d)")
_ENTERS = re.compile(
    r"\b(?:enter|appear|emerg|start|begin|originat|arriv|com|pop|peek)\w*(?: (?!to\b|towards?\b|for\b)\w+)?? "
    rf"(?:(?:from|on|at|in|by|through|via) )?{_EDGE}"
)
_EXITS = re.compile(rf"(?:(?:on|at|by|to|through|via|past|over|off|towards?) )?{_EDGE}")
# "right behind", "right at us", "right now" are no sides, and "left lying in the grass" is none
_HEDGES = (
    r"behind|next|beside|in front|in middle|in centre|in center|now|there|here|away|up|down|before|after|by|near|where|"
    r"above|below|under S\d|on top|out|on spot|in place|against|along (?:S\d|with|OBS)|"
    r"into (?:distance|foreground|back)|on cue|on time|on its|"
    r"(?:at|towards?|into|up to|to|for|past|in front of|behind) OBS"
)
_HEDGED = re.compile(
    rf"(?<!to )(?<!towards )(?<!toward )(?<!from )\bright (?={_HEDGES})|\ball right\b|\bright (?:angle|time|thing)s?\b"
)
_ACROSS = re.compile(rf"\bright (?=(?:across|over|through|on|past|along) (?:{FRAME}|FLOOR))")
_LEFT_BEHIND = re.compile(
    r"\b(?:been|was|is|are|were|being|has|have|had|got|get)? ?left (?=alone|lying|standing|sitting|behind|there|"
    r"in FLOOR|on FLOOR|in SKY|out|here|for|by|untouched|still|motionless)"
)


def without_hedges(text: str) -> str:
    """The text without "right" and "left" where they are no sides."""
    return _LEFT_BEHIND.sub(" ", _HEDGED.sub("", text))


def side(text: str, kinds: set[str]) -> tuple[str | None, str]:
    """Where to (left, right, or ? where that is said twice), and the text without it.

    kinds: those of the clause's verbs, and "camera" in a clause about the camera.
    """
    strong, weak = set[str](), set[str]()  # weak: from where
    text = _HEDGED.sub("", text)
    text = re.sub(rf" of {_ADJECTIVES}{{0,3}}S\d", "", text) if "camera" in kinds else text
    text = " ".join(_OF_ITS.sub("", _OF_OTHER.sub(" PLACE ", text)).split())

    def take(pattern: re.Pattern[str], into: set[str], group: int, *, turned: bool = False) -> None:
        nonlocal text
        into.update(MIRRORED[found[group]] if turned else found[group] for found in pattern.finditer(text))
        text = pattern.sub(" WAY ", text)

    take(_FROM_TO, strong, 2)
    if "enter" in kinds:
        take(_ENTERS, weak, 1, turned=True)
    if "exit" in kinds:
        take(_EXITS, strong, 1)
    take(_FROM, weak, 1, turned=True)
    take(_TO, strong, 1)
    text = AT.sub(" PLACE ", text)
    text = text if {"travel", "camera"} & kinds else _LEFT_BEHIND.sub(" ", text)
    text = _ACROSS.sub(" ", text) if strong else text
    take(_BARE, strong, 1)
    found = strong or weak
    return (next(iter(found)) if len(found) == 1 else "?" if found else None), " ".join(text.split())


# ---- a solid's clause ------------------------------------------------------------------------------------------------

_KINDS = {
    "travel": verbs.TRAVEL, "bounce": verbs.BOUNCE, "spin": verbs.SPIN, "recede": verbs.RECEDE, "rest": verbs.REST,
    "near": verbs.NEAR, "turn": verbs.TURN, "enter": verbs.ENTER, "exit": verbs.EXIT, "grow": verbs.GROW,
}  # fmt: skip
_NOT = re.compile(r"\b(?:not|never|no|without|nor|neither|nothing|hardly|refuses|none|stops|stopped)\b")
_SWAYS = re.compile(
    r"\b(?:to and fro|back and forth|forth and back|side to side|left (?:and|or|then) right|right (?:and|or|then) left|"
    r"zig ?zags?|zigzagging|in circles?)\b"
)
_GROWS = r"\b(?:grow|grew|get|got|becom|becam|loom|turn|shr)\w*(?: (?:ever|so|more and more))?"
_CLOSER = re.compile(
    r"\b(?:closer|nearer)\b(?! to (?:S\d|left|right|edge|horizon|FLOOR))|"
    r"\b(?:towards?|to|at|upon|on|for|into|in on) OBS\b"
    r"|\bforwards?\b|\bOBSWARD\b|\b(?:into|to|towards?) (?:foreground|front)\b|"
    r"\b(?:com\w*|came|draw\w*|drew|get\w*|got|mov\w*) (?:ever )?near\b(?! (?:to )?(?:S\d|FLOOR))|"
    rf"\b(?:larger|bigger)\b|{_GROWS} (?:large|big|huge|enormous|giant)\b"
)
_NEARS_ANOTHER = re.compile(r"\b(?:approach\w*|near\w*|loom\w*)(?: \w+)? (?:S\d|FLOOR|SKY|WAY)")
_ADVANCES = re.compile(r"\badvanc\w+(?: on OBS)?$|\bclos\w+ in on OBS")
_AWAY = re.compile(
    r"\baway\b(?! from S)|\b(?:into|toward|towards|to|off in) (?:distance|background|back)\b|"
    r"\b(?:to|towards?|over|into|for|at|on|beyond|past|reaches) horizon\b|"
    r"\b(?:farther|further) (?:away|off|back|and|into|from|WAY away)\b|"
    r"\bfrom OBS\b|\b(?:leav\w*|left) OBS\b|\bfrom (?:view|sight)\b|\bbackwards?\b|\b(?:smaller|tinier)\b|"
    rf"{_GROWS} (?:tiny|small)\b"
)
_BEHIND = re.compile(
    r"\b(?:behind|around back of|past back of|in back of|to back of|rear of|back of)"
    r"(?: (?!S\d|next\b|near\b|beside\b|by\b)\w+){0,2}? (?:S\d|it\b|other|WAY)"
)
_PASSES = re.compile(r"\b(?:hid\w*|duck\w*|slip\w*|pass\w*)\b")
_UP_AND_DOWN = re.compile(r"\bup and down\b|\binto air\b|\bup into\b")
_SPINS = re.compile(
    r"\baxis\b|\b(?:around|about) itself\b|\bround and round\b|\baround and around\b|\blike (?:top|carousel)\b"
)
_TURNS = re.compile(
    r"\bturn\w* (?:around|round|about|full turns?)\b(?! (?:S\d|it\b|WAY|corner))|"
    r"\bturn\w*(?: (?:in place|on spot|in same place|in same spot|endlessly))?"
    r"(?: (?:on|in|at|under|over|by|FLOOR|SKY|beside|next|near)\b|$)"
)
_RESTING = sorted((still.replace(" a ", " ").replace(" the ", " ") for still in STILL), key=len, reverse=True)
_AT_REST = re.compile(rf"\b(?:{'|'.join(_RESTING)})\b|\bin (?:same|one) (?:place|spot)\b")
_SURELY_AT_REST = re.compile(r"\b(?:still|motionless|at rest)\b")


def motions(text: str) -> tuple[set[str], str | None, bool]:
    """The motions that a solid's clause tells, the side, and whether it tells of any motion, understood or not.

    Two motions exclude each other; BEHIND stands behind another and may pass it by what other clauses say.
    """
    words = set(text.split())
    kinds = {name for name, table in _KINDS.items() if words & table.keys()}
    if _NOT.search(text):
        stays = verbs.BUDGE & words or re.search(r"\b(?:motion|movement|moving|anywhere)\b", text)
        return ({"still"} if stays else set()), None, bool(stays or kinds)
    if _SWAYS.search(text):
        return set(), None, True
    to, rest = side(text, kinds)
    if _BEHIND.search(rest):
        if kinds & {"travel", "exit", "bounce"} or to or _PASSES.search(rest):
            return {"behind"}, to, True
        if not kinds:
            return {"BEHIND"}, None, True
    found = set[str]()
    if "bounce" in kinds or _UP_AND_DOWN.search(rest):
        found.add("bounce")
    if "spin" in kinds or _SPINS.search(rest) or ("turn" in kinds and not to and _TURNS.search(rest)):
        found.add("spin")
        to = to if "travel" in kinds else None  # the side that it spins to
    if _CLOSER.search(rest) or ("near" in kinds and not _NEARS_ANOTHER.search(rest)):
        found.add("closer")
    if _ADVANCES.search(rest) and not to:
        found.add("closer")
    away = _AWAY.search(rest)
    if "recede" in kinds or (away and not (to and away[0] == "away")):  # "away to the left" goes left
        found.add("away")
    if to:
        found.add(to)
    if found:
        return found, to, True
    rests = "rest" in kinds or _AT_REST.search(rest)
    if rests and "turn" not in kinds and ("travel" not in kinds or "rest" in kinds or _SURELY_AT_REST.search(rest)):
        return {"still"}, None, True
    telling = kinds & {"travel", "turn", "exit", "enter"} or (kinds & {"near", "grow"} and "OBS" in words)
    return set(), None, bool(telling)


# ---- a clause about the camera ---------------------------------------------------------------------------------------

_ROUND = re.compile(r"\b(?:around|round|about|in (?:wide )?(?:arc|circle|orbit|curve|loop))\b")
_ROUND_IT = re.compile(
    r"\b(?:around|round|about) (?:it|S\d|them|scene|subject|object|both|pair|thing|solid|FLOOR|WAY it)\b"
)
_SWINGS = re.compile(r"\bsw[iu]ng\w*|\bsweep\w*")
_NOT_INTO = r"FLOOR|SKY|place|same|arc|circle|one|its|position|wide|orbit|front|curve|loop|sync|WAY|step"
_IN = re.compile(
    rf"\bin(?! (?:{_NOT_INTO})\b)|\bforwards?\b|\b(?:closer|nearer|ahead|inwards?)\b|"
    r"\b(?:up to|towards?|into) (?!WAY)|\bto (?:S\d|it|scene|them)\b"
)
_OUT = re.compile(r"\b(?:out|back|backwards?|away|off|outwards?|further|farther|backs|backing|backed)\b")
_KEPT = re.compile(r"\b(?:place|position|put|tripod|hold\w*|its?|spot)\b")
_LOCKED = verbs.STILL_WORDS | {"locked", "tripod", "unmoved", "stable"}


def camera(text: str) -> tuple[str | None, bool]:
    """The move that a clause about the camera tells, and whether it tells of any, understood or not."""
    words = set(text.split())
    telling = bool(words & verbs.VERBS - verbs.BEING)
    turns, circles = words & verbs.CAMERA_TURN.keys(), words & verbs.CAMERA_ROUND.keys()
    if _NOT.search(text):
        moves = words & verbs.BUDGE or turns or circles or words & verbs.CAMERA_GO.keys()
        moves = moves or re.search(r"\b(?:motion|movements?|changes?|moves)\b", text)
        return ("static" if moves else None), bool(moves or telling)
    if _SWAYS.search(text.replace("in circle", "")):
        return None, True
    to, rest = side(text, {"camera"})
    if to == "?":
        return None, True
    if circles or _ROUND.search(rest):
        looks = turns and not circles and not _ROUND_IT.search(rest) and not _SWINGS.search(rest)
        return (f"orbit {to}" if to and not looks else None), True
    nears = words & verbs.CAMERA_NEAR.keys()
    goes = words & {*verbs.TRAVEL, *verbs.CAMERA_GO, *verbs.GROW}
    into, out = bool(nears or _IN.search(rest)), bool(words & verbs.RECEDE.keys() or _OUT.search(rest))
    if to:
        return (f"pan {to}" if turns and not (into and goes) else None), True
    if into and out and goes:
        into = not (re.search(r"\b(?:out|away|back)\b", rest) and not nears and "closer" not in words)
        return (None if into else "dolly out"), True
    if (goes or nears or words & verbs.RECEDE.keys()) and into != out:
        return ("dolly in" if into else "dolly out"), True
    if any(word.startswith("zoom") for word in words):
        return "dolly in", True
    if words & _LOCKED or (words & verbs.CAMERA_STAY.keys() - verbs.BEING and _KEPT.search(rest)):
        return "static", True
    return None, telling


def circles_without_side(text: str) -> bool:
    """Does the camera's clause tell of an orbit?"""
    return bool(_ROUND.search(text) or set(text.split()) & verbs.CAMERA_ROUND.keys())
