"""Who moves, and how: a sentence read clause by clause, by composition of verb, side and way in any order.

A clause belongs to a solid or to the camera. What its verb and its ways tell together (`ways`) is one motion, or
nothing sure: a motion that the world does not have ("rolls off"), and two that exclude each other, are left out and
named, for a wrong word is worse than none. The input is a prompt's words, with tokens of `lexicon.spot` for some:

    S0, S1 …  the solids in the order of their first mention       FLOOR, SKY  phrases for these
    COLOUR    the name of a colour
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from model.world import verbs, ways
from model.world.moves import OBSERVERS
from model.world.words import phrases

CAMERA, FOREIGN, ALL = "camera", "foreign", "ALL"  # who a clause is about, beside a solid; foreign: "a dog"
V = TypeVar("V")


@dataclass(slots=True)
class Reading:
    """The findings: values where all clauses agree, and the phrases that were not understood."""

    motions: dict[str, set[str]] = field(default_factory=dict[str, set[str]])  # by solid
    sides: dict[str, set[str]] = field(default_factory=dict[str, set[str]])  # where a solid goes
    stands: dict[str, str] = field(default_factory=dict[str, str])  # on which side of the other a solid stands
    unclear: set[str] = field(default_factory=set[str])  # solids, or the camera, that do what is left out
    cameras: set[str] = field(default_factory=set[str])
    told: list[str] = field(default_factory=list[str])  # phrases about motion that are left out
    of_solids: list[str] = field(default_factory=list[str])  # the words of clauses about solids
    films: bool = False  # has it a clause about the camera?
    circling: bool = False  # the camera's last clause is an orbit without a side

    def motion(self, solid: str) -> str | None:
        """The motion of a solid, if it is sure; standing still gives way to any other."""
        found = self.motions.get(solid, set())
        if "behind" in found or ("BEHIND" in found and found & {"left", "right"}):
            found = {"behind"} | found - {"left", "right"}
        moving = found - {"still", "BEHIND"}
        sure = moving or found - {"BEHIND"}
        return next(iter(sure)) if len(sure) == 1 else None

    @property
    def camera(self) -> str | None:
        """The camera's move, if that is sure."""
        return next(iter(self.cameras)) if len(self.cameras) == 1 else None

    def acting(self, solids: int) -> int | None:
        """The solid that acts first, by its place in the text; None where none or several do."""
        moving = [k for k in range(solids) if self.motions.get(f"S{k}", set()) - {"still", "BEHIND"}]
        return moving[0] if len(moving) == 1 else None

    def turned(self) -> Reading:
        """The same with the first two solids exchanged."""
        return replace(
            self,
            motions=_turned(self.motions),
            sides=_turned(self.sides),
            stands=_turned(self.stands),
            unclear={_OTHER.get(who, who) for who in self.unclear},
        )


_OTHER = {"S0": "S1", "S1": "S0"}


def _turned(of: dict[str, V]) -> dict[str, V]:
    return {_OTHER.get(solid, solid): value for solid, value in of.items()}


def read(tokens: Sequence[str]) -> Reading:
    """Reads the clauses of a prompt, given as words and the tokens that the module names."""
    text = " ".join(verbs.spelt(token) for token in tokens)
    for pattern, new in _BEFORE:
        text = pattern.sub(new, text)
    text = " ".join(_OBSERVER.sub(_observer, text).split())
    solids = sorted({token for token in tokens if _SOLID.fullmatch(token)})
    clauses = _Cutter(text.split()).clauses()
    _assign(clauses, solids)
    reading = Reading()
    for clause in clauses:
        _take(clause, reading, solids)
    _places(text, reading)
    return reading


_SOLID = re.compile(r"S\d")
_STILL = (
    r"(?:static|fixed|stationary|still|locked off|locked|lock off|unmoving|motionless|immobile|non moving|steady|"
    r"stable|constant|tripod|immovable|unchanging)"
)
_VIEW = r"(?:camera|cam|shot|view|framing|frame|tripod|angle|position|viewpoint|vantage point)"
_NONE = r"(?:nothing|neither|none|no one|nobody|everything|both|all)(?: of (?:them|these|the two))?"
_NO_MORE = r"stop|paus|end|break|ceas|rest|interrupt|hurry|haste|hesitat|slow|sound|noise|let|fail|tir"
_BEFORE = tuple(  # in this order, on the words with their articles
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\b(?:its|it s)\b(?= (?:own|left|right|place|position|axis)\b)", "its"),
        (r"\b(?:do|does|did|is|are|was|has|have|had|will|would|must|should) not\b", "not"),
        (r"\b(?:exactly )?where (?:it|they|she|he) (?:is|are|was|were|stands|stood)\b", "in same place"),
        (r"\bas (?:if|though)\b", ""),
        (r"\b(?:mak|work|wend|find|fight|push|pick|thread)\w* (?:its|their) way\b", "goes"),
        (r"\bon (?:its|their|the) way\b", "goes"),
        (  # "rotates without stopping", but not "does not stop still"
            rf"\b(?:without|never|not|with no) (?:a |any |ever |once )?(?:{_NO_MORE})\w*(?: up| down)?\b"
            r"(?! (?:still|motionless))",
            "",
        ),
        (r"\bright hand\b", "right"),
        (r"\bleft hand\b", "left"),
        (r"\bstill (?=life|image|photo|photograph|picture|warm|of )", ""),
        (r"\bstage (?=left|right)", ""),
        (
            r"\b(?:no|without|zero)(?: (?:any|a|further))? (?:camera|cam) "
            r"(?:motion|movements?|moves?|action|work|moving)",
            "FIXED",
        ),
        (r"\b(?:no|without)(?: (?:any|a))? (?:motion|movements?|moves?) of (?:the )?camera", "FIXED"),
        (
            rf"\b{_STILL} (?:wide |medium |close up |long |tripod )?{_VIEW}(?: (?:angle|position|shot|view))?"
            rf"(?! (?:{'|'.join(sorted(verbs.CAMERA_ONLY))})\b)",
            "FIXED",
        ),
        (
            r"\b(?:camera|cam|shot|view|it)? ?(?:mounted |set |put |placed |stands? |standing |sits? |rests? )?"
            r"(?:on|from) (?:a |the |its )(?:fixed |sturdy )?tripod\b(?! (?:that|which))",
            "FIXED",
        ),
        (
            r"\btripod shot\b|\block(?:ed)? (?:off|down)(?: (?:camera|shot|cam|frame))?\b|"
            r"\b(?:camera|cam) lock(?:ed)? (?:off|down)\b",
            "FIXED",
        ),
        (r"\bclose up\b(?! (?:to|on))|\bclose ups\b", ""),
        (
            rf"\b{_NONE}(?= (?:at all )?(?:in the scene |there |here |else |of it )?(?:moves?|is|are|stays?|remains?|"
            r"keeps?|stirs?|budges?|stands?|rests?|sits?|at|still|motionless|moving|standing|sitting|resting|lying|perfectly|"
            r"completely|not|has|changes))",
            ALL,
        ),
        (r"\b(?:in )?(?:our|my|your|this) (?:way|direction)\b", "OBSWARD"),
        (r"\b(?:to|towards?) meet (?=us|me|you|the)", "to "),
    )
)
_WHO_WATCHES = sorted({*OBSERVERS, "cam"} - {"front", "foreground", "screen"}, key=len, reverse=True)
_OBSERVER = re.compile(
    r"(?<!next )\b(to|towards?|at|from|past|nears?|nearing|into|facing|reach\w*|closer|upon|on|of|by|approach\w*|"
    rf"leav\w*|pass\w*|for|than) ((?:the|our|your|a)? ?)(?:very )?(?:{'|'.join(_WHO_WATCHES)})\b"
    r"(?! (?:that|which|pan|pull|push|zoom|who (?:pans|turns)))(?: (?:who|that) (?:is|are) watching\b)?"
)


def _observer(found: re.Match[str]) -> str:
    films = found[1] == "by" and "camera" in found[0]  # "filmed by a camera"
    return found[0] if films else f"{found[1]} OBS"


# ---- clauses ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Clause:
    actor: str | None
    words: list[str] = field(default_factory=list[str])
    inherited: bool = False  # it has no subject of its own
    sentence: int = 0
    brief: bool = False  # about the camera without naming it: "zoom in"
    before: list[str] = field(default_factory=list[str])  # attributes of the actor: "a spinning cube"

    @property
    def text(self) -> str:
        return " ".join(word for word in self.words if word not in verbs.SMALL and word not in verbs.ARTICLES)


class _Cutter:
    """Cuts at marks, joining words and new subjects; a clause without a subject goes on with the last one."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = tokens
        self.done: list[_Clause] = []
        self.now = _Clause(None, inherited=True)
        self.lasting: str | None = None  # the subject that a clause without one goes on with
        self.nearest: str | None = None  # what "that" and "which" are about
        self.sentence = 0

    def clauses(self) -> list[_Clause]:
        for k in range(len(self.tokens)):
            self._add(k)
        self._go_on()
        return self.done

    def _at(self, k: int) -> str:
        return self.tokens[k] if 0 <= k < len(self.tokens) else ""

    def _cut(
        self, actor: str | None, *, brief: bool = False, inherited: bool = False, keep: Sequence[str] = ()
    ) -> None:
        if self.now.words or self.now.before:
            self.done.append(self.now)
        self.now = _Clause(actor, list(keep), inherited, self.sentence, brief)

    def _go_on(self) -> None:
        self._cut(self.lasting, inherited=True)

    def _begin(self, actor: str | None, keep: Sequence[str] = ()) -> None:
        self._cut(actor, keep=keep)
        self.lasting = actor

    def _add(self, k: int) -> None:
        token, before, after = self._at(k), self._at(k - 1), self._at(k + 1)
        acts = after in verbs.VERBS or after in verbs.AUXILIARY
        if token in _MARKS:
            if token != ",":
                self.sentence, self.nearest = self.sentence + 1, None
            self._go_on()
        elif token == "and" and before in _PAIRED and after in _PAIRED:
            self.now.words.append(token)
        elif token == "FIXED":
            self._cut(CAMERA, brief=True, keep=["still", "camera"])
            self._go_on()
        elif token == ALL:
            self._cut(ALL)
        elif _SOLID.fullmatch(token):
            self._solid(token, k)
        elif token in verbs.CAMERAS and self._films(k):
            self._camera(token)
        elif token in ("we", "i") and self._films(k):
            self._begin(CAMERA)
        elif token in ("that", "which", "who") and (acts or verbs.is_ing(after)):
            self._begin(self.nearest or self.lasting)
        elif acts and self._is_foreign(k):
            self._begin(FOREIGN)
        elif acts and token in verbs.THING and before in verbs.ARTICLES:
            self._begin(self._subject())
        elif acts and token in ("it", "they", "this", "there") and not self._after_verb(k):
            if token == "there":
                self._cut(None)
            else:
                self._begin(self._subject())
        elif token in verbs.JOINS:
            self._go_on()
        elif self._is_brief(k):
            front = self.now.words if all(_is_slight(word) for word in self.now.words) else []
            self.now.words = [] if front else self.now.words
            self._cut(CAMERA, brief=True, keep=[*front, token])
        elif self.now.actor == CAMERA and before == self.nearest and self._is_attached(token):
            self._cut(self.nearest, keep=[token])
        else:
            self.now.words.append(token)

    def _subject(self) -> str | None:
        """The solid that "it" is about: the last subject that is no camera."""
        return next((c.actor for c in (self.now, *self.done[::-1]) if c.actor not in (None, CAMERA, ALL)), None)

    def _is_attached(self, token: str) -> bool:
        """Does a participle right after a solid tell what that does: "the camera circles a ball bouncing on a lawn"?"""
        moving = verbs.is_ing(token) and token in verbs.VERBS and token not in verbs.CAMERA_ONLY
        return moving and bool(self.now.words)

    def _solid(self, token: str, k: int) -> None:
        governor = self._governor(k)
        attributes = self._attributes(k)
        if governor == "verb" and self.now.inherited and not any(map(_SOLID.fullmatch, self.now.words)):
            self.now.actor, self.now.inherited, self.lasting = token, False, token  # "to the left rolls a ball"
            self.now.before += attributes
        elif governor:
            if attributes:
                self.done.append(_Clause(token, before=attributes, sentence=self.sentence))
            self.now.words.append(token)
        else:
            self._begin(token)
            self.now.before = attributes
        self.nearest = token

    def _camera(self, token: str) -> None:
        """A clause about the camera begins, with what stands before it: "a left pan", "turn the camera left"."""
        front: list[str] = []
        words = self.now.words
        if self.now.inherited:
            if len(words) < 3:
                front = [word for word in words if word in verbs.SIDEWAYS]
                words[:] = [word for word in words if word not in front]
            while words and words[-1] in verbs.ARTICLES:
                words.pop()
            if words and words[-1] in _TAKE_THE_CAMERA:
                front.append(words.pop())
        still = [word for word in words[-2:] if word in verbs.STILL_WORDS] if token != "camera" else []
        self._begin(CAMERA, keep=[*front, *still])
        self.nearest = CAMERA

    def _is_foreign(self, k: int) -> bool:
        """Ends here the name of something that is no solid of the world and does something: "a dog runs"?"""
        if self._at(k + 1) in ("show", "shows") or not verbs.is_unknown(self._at(k)):
            return False
        j = k - 1
        while j >= 0 and k - j < 4 and (verbs.is_unknown(self._at(j)) or _is_adjective(self._at(j))):
            j -= 1
        return self._at(j) in verbs.ARTICLES and self._at(j - 1) not in verbs.OF_OBJECTS | {"of", "in", "with"}

    def _after_verb(self, k: int) -> bool:
        before = self._at(k - 1)
        return before in verbs.VERBS - verbs.BEING or before in verbs.OF_OBJECTS | {"where", "than", "of", "in"}

    def _governor(self, k: int) -> str:
        """The part of a solid at place k in the words before it: an object, perhaps the subject of a verb, or ""."""
        j = k - 1
        while j >= 0 and (
            _is_adjective(self._at(j))
            or self._at(j) in verbs.ARTICLES | verbs.STILL_WORDS
            or (verbs.is_ing(self._at(j)) and self._at(j - 1) in verbs.ARTICLES)
        ):
            j -= 1
        for _ in range(2):  # adjectives that are not on any list
            if j >= 0 and verbs.is_unknown(self._at(j)):
                j -= 1
                while j >= 0 and (_is_adjective(self._at(j)) or self._at(j) in verbs.ARTICLES):
                    j -= 1
        word, before = self._at(j), self._at(j - 1)
        if word == "of":
            return "object" if before in _SIDE_OF else ""
        if word in verbs.SUBJECT_AFTER or word in ("like", "as"):
            return ""
        if word in verbs.TRANSITIVE | verbs.OF_OBJECTS:
            return "object"
        return "verb" if word in verbs.VERBS else ""

    def _attributes(self, k: int) -> list[str]:
        """Takes what stands between a solid's article and the solid out of the clause before: "a spinning"."""
        j = k - 1
        while j >= 0 and k - j < 7 and self._at(j) not in verbs.ARTICLES and self._at(j) not in _NOT_WITHIN:
            j -= 1
        between = list(self.tokens[j + 1 : k])
        if not between or self._at(j) not in verbs.ARTICLES or any(w in verbs.OF_OBJECTS for w in between):
            return []
        if self.now.words[-len(between) :] == between:
            del self.now.words[-len(between) :]
        return [word for word in between if word in verbs.VERBS or word in verbs.STILL_WORDS]

    def _films(self, k: int) -> bool:
        """Does the camera, or we, do something here, rather than see it or be moved towards?"""
        token, before, rest = self._at(k), self._at(k - 1), self.tokens[k + 1 : k + 5]
        if token in ("we", "i"):
            ahead = next((word for word in rest if word not in verbs.SMALL and word not in _IS), "")
            return ahead in _WE_DO
        if token in ("camera", "cam"):
            return True
        if before in ("of", "into", "from", "out", "across", "on"):
            return False
        if token == "tripod":
            return True
        if before in verbs.ARTICLES or before in {*verbs.CAMERA_ONLY, "push", "pull", "tracking", "arc"}:
            return any(word in verbs.VERBS or word in verbs.STILL_WORDS for word in rest[:2])
        return any(word in verbs.VERBS for word in rest[:1])

    def _is_brief(self, k: int) -> bool:
        """Does a camera move begin here without the word camera: "pan left", "zoom in", "pull back"?"""
        token, after, then = self._at(k), self._at(k + 1), self._at(k + 2)
        if self.now.actor == CAMERA and not self.now.inherited:
            return False
        free = self.now.inherited or self.now.actor is None
        match verbs.CAMERA_ONLY.get(token):
            case None:
                pass
            case "track" | "truck" | "crane" | "orbit":
                return free
            case "zoom":
                return free or after in ("in", "out", "closer", "back", "on", "into", "")
            case _:
                return True
        if not free:
            return False
        if token in _PUSHES and not self.now.words:
            if after == "in":
                return not (then in verbs.ARTICLES or then in _PLACES)
            return (
                after == "out"
                or (after == "away" and token == "back")
                or (after in ("back", "away") and "pull" in token)
            )
        return token in ("circling", "orbital", "orbiting", "circle") or (
            token == "arc" and after in ("shot", "left", "right")
        )


_MARKS = frozenset(".;:!?,")
_NOT_WITHIN = _MARKS | {"and", "with", "of", "in"}
_PAIRED = frozenset(
    phrases("""closer, nearer, further, farther, bigger, larger, smaller, up, down, round, around, over, left, right,
    back, forth, to, fro, again""")
)
_SIDE_OF = frozenset(phrases("side, left, right, front, back, edge, rear, top, middle"))  # "… of S1": an object
_IS = frozenset(phrases("is, are, am, also, then"))
_TAKE_THE_CAMERA = frozenset(
    {*verbs.CAMERA_TURN, *verbs.CAMERA_GO, *verbs.CAMERA_ONLY, "move", "moving", "bring", "send"}
)
_WE_DO = frozenset(
    {*verbs.CAMERA_TURN, *verbs.CAMERA_ROUND, *verbs.CAMERA_GO, *verbs.TRAVEL, *verbs.RECEDE, *verbs.CAMERA_NEAR}
    | verbs.CAMERA_STAY.keys()
) - set(phrases("have, get, are, is, am, look, looking, follow, make, take, leave"))
_PUSHES = frozenset(phrases("push, pushing, pushes, pull, pulling, pulls, move, moving, track, dolly, ease, back"))
_PLACES = frozenset(phrases("direction, place, FLOOR, SKY, front, its, from"))


def _is_adjective(word: str) -> bool:
    return word in verbs.SMALL or word in verbs.SIZES


def _is_slight(word: str) -> bool:
    return word in verbs.SIDEWAYS or word in verbs.ARTICLES or word in verbs.SMALL


def _assign(clauses: list[_Clause], solids: Sequence[str]) -> None:
    """Gives clauses without a subject to the next solid of their sentence, else to the last one, else to the first."""
    for k, clause in enumerate(clauses):
        if clause.actor is not None or clause.brief:
            continue
        same = [each.actor for each in clauses[k + 1 :] if each.sentence == clause.sentence and each.actor in solids]
        earlier = [each.actor for each in clauses[:k] if each.actor in solids]
        later = [each.actor for each in clauses[k + 1 :] if each.actor in solids]
        clause.actor = next(iter(same or earlier[::-1] or later or solids), None)
        clause.inherited = True


# ---- what they tell --------------------------------------------------------------------------------------------------


def _take(clause: _Clause, reading: Reading, solids: Sequence[str]) -> None:
    """Adds to a reading what a clause tells."""
    if clause.actor == CAMERA and not _films(clause, reading, solids):
        return
    text = clause.text
    if clause.actor == FOREIGN:
        if ways.motions(text)[2]:
            reading.told.append(_shown(clause))
        return
    reading.of_solids += ways.without_hedges(" ".join([*clause.before, text])).split()
    actors = list(solids) if clause.actor == ALL else [clause.actor] if clause.actor else []
    if clause.actor == ALL and re.search(r"\b(?:moves?|stirs?|budges?|moving|change\w*)\b", text):
        text = f"not {text}"
    if clause.before:
        found, _, _ = ways.motions(" ".join(clause.before))
        for actor in actors:
            reading.motions.setdefault(actor, set()).update(found)
    if not text:
        return
    found, side, telling = ways.motions(text)
    if clause.actor == ALL and found - {"still"}:
        return
    if len(found) > 1 or "?" in found or (telling and not found):
        reading.unclear.update(actors)
        reading.told.append(_shown(clause))
    for actor in actors:
        reading.motions.setdefault(actor, set()).update(found - {"?"})
        if side in ways.MIRRORED:
            reading.sides.setdefault(actor, set()).add(side)


def _films(clause: _Clause, reading: Reading, solids: Sequence[str]) -> bool:
    """Takes a clause about the camera; is it one about a solid after all, which has no subject of its own?"""
    text = clause.text
    reading.films = reading.films or bool(text)
    move, telling = ways.camera(text)
    goes_on = clause.inherited and not clause.brief
    if goes_on and reading.circling and (side := ways.side(text, {"camera"})[0]) in ways.MIRRORED:
        move, reading.circling = f"orbit {side}", False  # "flies around it, moving left"
        reading.unclear.discard(CAMERA)
        reading.told.pop()
    if move and not (goes_on and reading.cameras):
        reading.cameras.add(move)
    elif goes_on and solids and (reading.cameras or set(text.split()) & verbs.BOUNCE.keys()):
        clause.actor = next((solid for solid in solids if solid not in reading.motions), solids[0])
        return True
    elif telling and not goes_on:
        reading.unclear.add(CAMERA)
        reading.circling = ways.circles_without_side(text)
        reading.told.append(f"camera {_shown(clause)}")
    return False


def _shown(clause: _Clause) -> str:
    """A clause as it is named: its words from the first verb on."""
    words = [word for word in clause.words if word.islower() and word not in verbs.SMALL]
    first = next((k for k, word in enumerate(words) if word in verbs.VERBS and word not in verbs.BEING), 0)
    words = words[first : first + 4]
    while words and (words[-1] in verbs.ARTICLES or words[-1] in verbs.OF_OBJECTS - {"off"}):
        words.pop()
    return " ".join(words)


_WITHIN = r"(?: (?!S\d)[a-z]+| COLOUR)*?"
_OF = re.compile(rf"\b{ways.SIDE}(?: hand)?(?: side)? (?:of|from){_WITHIN} (S\d)")
_TO_ITS = re.compile(rf"(S\d)(?: (?!S\d)[a-z]+)*? (?:to|on|at) its {ways.SIDE}")
_ON_SIDE = re.compile(rf"(?:on|at|in) {ways.SIDE}(?: hand)?(?: side)?{_WITHIN} (S\d)")


def _places(text: str, reading: Reading) -> None:
    """Reads who of two stands on which side."""
    words = [word for word in text.split() if word not in verbs.ARTICLES and word not in verbs.SMALL]
    text = ways.without_hedges(" ".join(words))
    for found in _OF.finditer(text):
        before, after = _SOLID.findall(text[: found.start()]), _SOLID.findall(text[found.end() :])
        reading.stands |= {solid: found[1] for solid in before[-1:] or after[:1] if solid != found[2]}
    reading.stands |= {solid: side for solid, side in _TO_ITS.findall(text)}
    if reading.stands:
        return
    for part in re.split(r" (?:[.,;:!?]|and|while)(?: |$)", text):
        sides, solids = ways.AT.findall(part), _SOLID.findall(part)
        if len(sides) == 1 and len(solids) == 1:
            reading.stands[solids[0]] = sides[0]
    pairs = _ON_SIDE.findall(text)
    if len(pairs) == 2 and not reading.stands:
        reading.stands |= {solid: side for side, solid in pairs}
