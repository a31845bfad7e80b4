"""Names that people have for the things of the world, and captions read into their meaning and written from it.

`Said` is what a prompt says of a scene; `caption` writes it in the words of the training captions, `read` reads it back
out of one, and `glean` out of what is not quite one. The word list has the world's own words first and then what else
people say; `spot` finds what it can be sure of in any prompt, `evidence` whether a prompt has any word for a thing,
`unknown_words` what it has no words for. Nothing here is learned, and nothing needs torch: `model.language.rewriter`
has the network.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

from model.world import clauses
from model.world.captions import (
    AT_REST,
    BESIDE,
    CLIP_OF,
    DOES,
    FILMED,
    GROUND,
    HEAVEN,
    IMAGE_OF,
    NOUNS,
    TOWARDS,
    WE_SEE,
    vocabulary,
)
from model.world.clauses import CAMERA, Reading
from model.world.moves import forms
from model.world.scene import CLASSES, COLOURS, Scene
from model.world.words import (
    ACTS,
    COLOUR_WORDS,
    DECOR,
    FILMED_AS,
    FLOOR_WORDS,
    FUNCTION_WORDS,
    LEFTWARD,
    OBSERVER,
    OPENINGS,
    RIGHTWARD,
    SHAPE_WORDS,
    SKY_WORDS,
    SLIDES,
    STYLE,
    UNSURE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """The meaning of a prompt; None is what it does not say. The values are those of `world.CLASSES`.

    `direction` is where the first solid goes when it passes behind the second, else on which side of that it stands.
    """

    shape: str | None = None
    colour: str | None = None
    shape2: str | None = None
    colour2: str | None = None
    motion: str | None = None
    direction: str | None = None
    camera: str | None = None
    floor: str | None = None
    sky: str | None = None

    @classmethod
    def of(cls, scene: Scene) -> Said:
        """All that could be said of a scene's clip."""
        first, second = scene.solids[0], scene.solids[1] if len(scene.solids) == 2 else None
        side = {-1: "left", 1: "right"}[scene.direction] if scene.motion == "behind" else None
        return cls(
            shape=first.shape,
            colour=first.colour,
            shape2=second and second.shape,
            colour2=second and second.colour,
            motion=scene.motion,
            direction="left" if second and scene.motion == "still" else side,
            camera=scene.camera,
            floor=scene.floor,
            sky=scene.sky,
        )

    def from_the_left(self) -> Said:
        """The same with the left one of two solids first, where both are known and neither moves."""
        if self.direction != "right" or self.motion not in (None, "still"):
            return self
        return replace(
            self,
            shape=self.shape2,
            colour=self.colour2,
            shape2=self.shape,
            colour2=self.colour,
            direction="left",
        )

    def classes(self) -> dict[str, str]:
        """The same in the terms of `world.CLASSES`, what is not said left out; of two at rest the left one first."""
        said = self.from_the_left()
        found: dict[str, str] = {name: value for name, value in asdict(said).items() if value is not None}
        if said.motion != "behind":
            found.pop("direction", None)  # on which side one stands: the order of the two tells it
        if said.shape:
            found["count"] = "two" if said.shape2 else "one"
        return found

    def possible(self) -> Said:
        """The same without what cannot be said: a second solid without a first, a side without a second solid."""
        said = self
        if said.shape is None:
            said = replace(said, shape=said.shape2, colour=said.colour2, shape2=None, motion=None)
        if said.shape2 is None:
            said = replace(said, colour2=None, direction=None)
            said = replace(said, motion=None) if said.motion == "behind" else said
        if said.motion not in (None, "still", "behind"):
            said = replace(said, direction=None)
        return said


SLOTS: dict[str, tuple[str, ...]] = {name: CLASSES[name] for name in Said.__slots__}

# ---- captions --------------------------------------------------------------------------------------------------------


def caption(said: Said, *, moving: bool = True) -> str:
    """The training captions' way to say it; of an image (not moving) they tell no motion. It must name a shape.

    What is not said is left out, although captions always name colours, and a motion of every clip: it is better to let
    the model choose than to put words into somebody's mouth.
    """
    said = said.possible()
    if said.shape is None:
        raise ValueError("a caption must name a shape")
    motion = said.motion if moving else None
    first, second = _noun(said.colour, said.shape), said.shape2 and _noun(said.colour2, said.shape2)
    sides = said.direction if said.motion != "behind" else None
    if second and sides:
        text = AT_REST[sides == "right"].format(left=first, right=second)
        text = text if sides == "left" else AT_REST[1].format(left=second, right=first)
    else:
        says, _, then = DOES[motion][0] if motion else ("", "", "")
        link = "" if motion == "behind" else "and" if motion is None else BESIDE[0]
        toward = TOWARDS[-1 if said.direction == "left" else 1][0] if motion == "behind" and said.direction else ""
        text = " ".join(part for part in (first, says, then, second and link, second, toward) if part)
    where = [GROUND[said.floor][0]] if said.floor else []
    where += [HEAVEN[said.sky][0]] if said.sky else []
    filmed = f", {FILMED[said.camera][0]}" if said.camera and moving else ""
    return " ".join([text, *where]) + filmed


def _noun(colour: str | None, shape: str) -> str:
    words = " ".join(word for word in (colour, NOUNS[shape][0]) if word)
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def read(text: str) -> Said | None:
    """The meaning of a caption; None if the text is not written like the training captions."""
    text = " ".join(text.lower().split())
    return glean(text) if _CAPTION.fullmatch(text) else None


def glean(text: str) -> Said:
    """The meaning of those phrases of a text that stand in training captions, also where it is not quite a caption."""
    rest = " ".join(re.sub("[,.]", " ", text.lower()).split())
    found: dict[str, str | None] = {}
    for name, table in (("camera", _CAMERAS), ("floor", _FLOORS), ("sky", _SKIES)):
        if phrase := _longest(rest, table):
            found[name] = table[phrase]
            rest = rest.replace(phrase, " ")
    for end, (colour, noun) in zip(("", "2"), _SOLID.findall(rest), strict=False):
        found |= {f"colour{end}": colour or None, f"shape{end}": _SHAPES[noun]}
    rest = " ".join(_SOLID.sub("*", rest).split())
    if " behind *" in rest:
        found |= {"motion": "behind", "direction": _TOWARDS.get(_longest(rest, _TOWARDS))}
    elif stand := _longest(rest, _AT_REST):
        found |= {"motion": None if rest.startswith(IMAGE_OF) else "still", "direction": _AT_REST[stand]}
    else:
        found["motion"] = _VERBS.get(_longest(rest, _VERBS))
    return Said(**found)


def _longest(text: str, phrases: Iterable[str]) -> str:
    """The longest of the phrases that the text contains as whole words; "" if there is none."""
    return max((phrase for phrase in phrases if f" {phrase} " in f" {text} "), key=len, default="")


def _turned_over(table: Mapping[str, Iterable[str]]) -> dict[str, str]:
    return {phrase: name for name, phrases in table.items() for phrase in phrases}


_SHAPES, _CAMERAS, _FLOORS, _SKIES = (_turned_over(table) for table in (NOUNS, FILMED, GROUND, HEAVEN))
_TOWARDS = _turned_over({"left": TOWARDS[-1], "right": TOWARDS[1]})
_AT_REST = {  # where the solid that is named first stands
    text.format(left="*", right="*"): "left" if text.startswith("{left}") else "right" for text in AT_REST
}
_VERBS = {
    " ".join(word for word in (verb, then) if word): motion
    for motion, verbs in DOES.items()
    for says, saying, then in verbs
    for verb in (says, saying)
}


def _one_of(phrases: Iterable[str]) -> str:
    """A pattern for any of the phrases; the longest is tried first."""
    return f"(?:{'|'.join(re.escape(phrase) for phrase in sorted(set(phrases), key=lambda p: (-len(p), p)))})"


_SOLID = re.compile(rf"\ban? (?:({_one_of(COLOURS)}) )?({_one_of(_SHAPES)})\b")


def _caption_pattern() -> str:
    solid, floor, sky = _SOLID.pattern, _one_of(_FLOORS), _one_of(_SKIES)
    passes, does = (_one_of(v for v in _VERBS if (_VERBS[v] == "behind") == behind) for behind in (True, False))
    at_rest = "|".join(each.format(left=solid, right=solid) for each in AT_REST)
    return (
        rf"(?:{_one_of((*CLIP_OF, *IMAGE_OF, WE_SEE))} )?"
        rf"(?:{solid} {passes} {solid}(?: {_one_of(_TOWARDS)})?|{at_rest}"
        rf"|{solid}(?: {does})?(?: {_one_of(('and', *BESIDE))} {solid})?)"
        rf"(?: {floor}(?: {sky})?| {sky}(?: {floor})?)?"
        rf"(?:[,.] {_one_of(_CAMERAS)})?\.?"
    )


_CAPTION = re.compile(_caption_pattern())


def instructions() -> str:
    """How to rewrite a prompt as a caption, for a language model that is told so."""
    said = Said(shape="sphere", colour="red", motion="left", floor="grass", sky="sunset")
    pair = Said(shape="cube", colour="blue", motion="behind", direction="right", shape2="cone", colour2="pink")
    drum = Said(shape="cylinder", colour="green", camera="dolly in", sky="night")
    told = {
        "a crimson ball rolls off over the lawn to the left, at dusk, cinematic": caption(said),
        "cobalt crate slips behind a rose cone, heading right": caption(pair),
        "neon green drum, zoom in, midnight": caption(drum),
    }
    lists = {
        "colours": COLOURS,
        "shapes": NOUNS,
        "what the first solid does": [" ".join(part for part in verbs[0][::2] if part) for verbs in DOES.values()],
        "floors": [phrases[0] for phrases in GROUND.values()],
        "skies": [phrases[0] for phrases in HEAVEN.values()],
        "camera moves": [phrases[0] for phrases in FILMED.values()],
    }
    return "\n".join(
        (
            "You rewrite prompts for a small video model that knows one or two solids and only these phrases:",
            *(f"- {what}: {'; '.join(phrases)}" for what, phrases in lists.items()),
            "Write one line in this order: solid, what it does, floor, sky, then after a comma the camera. Use the "
            "nearest phrase for what the user says, leave out what they do not say, invent nothing, explain nothing. "
            "For example:",
            *(f"{prompt} -> {text}" for prompt, text in told.items()),
        )
    )


# ---- the word list in use --------------------------------------------------------------------------------------------

ALIKE = 0.8  # difflib's ratio from which a word counts as a misspelling of another


def words_of(prompt: str) -> list[str]:
    """Words, numbers and punctuation marks, in lower case; a hyphen only parts words, a dash or bracket is a comma."""
    text = prompt.lower().replace("’", "'").replace("can't", "can not").replace("n't", " not")
    text = re.sub(r"[-=]+>|→|⇒|➜", " to the ", text)
    text = re.sub(r"\s[-/]+\s|[-]{2,}|[–—()\[\]{}|\n\r]", " , ", text)
    return re.findall(r"[^\W\d_]+|\d+|[.,;:!?]", text)


def settle(prompt: str, said: Said) -> Said:
    """The meaning of a prompt, where `said` is the network's reading of it; see `understand`."""
    return understand(prompt, said)[0]


def understand(prompt: str, said: Said) -> tuple[Said, tuple[str, ...]]:
    """The meaning of a prompt, and its phrases about motion that were not understood.

    said: the network's reading. Where the word list or the clauses are sure they win, what these leave open on purpose
    stays open, and what no word of the prompt speaks for is left out.
    """
    words = [word for word in words_of(prompt) if word in _MEANINGS or not word.endswith("ly")]  # moves slowly away
    spotted = spot(words)
    reading = spotted.clauses
    speak = {
        "camera": words if reading.films else (),
        **dict.fromkeys(("motion", "direction"), reading.of_solids),
        **dict.fromkeys(("floor", "sky"), spotted.of_places),
    }
    evidence = {kind: set(chain(*map(meanings, speak.get(kind, spotted.of_solids)))) for kind in KIND.values()}
    kept = {name: value for name, value in asdict(said).items() if (KIND[name], value) in evidence[KIND[name]]}
    if len(spotted.solids) < 2:
        kept = {name: value for name, value in kept.items() if name not in ("shape2", "colour2")}
    kept = {**kept, **_agree(kept, spotted.solids), **spotted.others}
    return Said(**_moved(kept, reading, len(spotted.solids))).possible(), tuple(dict.fromkeys(reading.told))


def _moved(kept: dict[str, str | None], clauses: Reading, solids: int) -> dict[str, str | None]:
    """The same with what the clauses say of motion and camera, and without what they leave open."""
    motion = clauses.motion("S0")
    if motion or "S0" in clauses.unclear or clauses.motions.get("S0"):
        kept["motion"] = motion
    if clauses.cameras or CAMERA in clauses.unclear:
        kept["camera"] = clauses.camera
    if solids == 2:
        sides = clauses.sides.get("S0", set())
        if motion == "behind":
            kept["direction"] = next(iter(sides)) if len(sides) == 1 else None
        elif clauses.stands:
            other = clauses.stands.get("S1")
            kept["direction"] = clauses.stands.get("S0") or (other and {"left": "right", "right": "left"}[other])
        elif motion not in (None, "still"):
            kept["direction"] = None
    return kept


def _agree(kept: Mapping[str, str], solids: Sequence[Solid]) -> dict[str, str | None]:
    """The solids as the word list has them, with the network's colours where it has none."""
    if not 1 <= len(solids) <= 2 or not any(solid.shape for solid in solids):
        return {}
    values: dict[str, str | None] = {"shape2": None, "colour2": None}
    for end, solid in zip(("", "2"), solids, strict=False):
        shape = solid.shape or solid.maybe
        same = kept.get(f"shape{end}") == shape
        values[f"shape{end}"] = shape
        values[f"colour{end}"] = solid.colour or (kept.get(f"colour{end}") if same else None)
    return values


class Solid(NamedTuple):
    """A solid as the word list sees it: "" is a shape it is not sure of, which is `maybe` if there is another solid."""

    shape: str
    colour: str | None = None  # right before the shape, or told after it
    maybe: str = ""


@dataclass(frozen=True, slots=True)
class Spotted:
    """The findings of the word list."""

    solids: tuple[Solid, ...]  # the one that acts first
    others: dict[str, str]  # of these it is sure
    of_solids: list[str]  # the words without those that tell of the camera
    of_places: list[str]  # and without colours: grass green is no lawn
    clauses: Reading  # who moves, and how


def spot(words: Sequence[str]) -> Spotted:
    """Looks for the phrases of the word list, the longest first at every place."""
    words = [word for word in words if word in _MEANINGS or not word.endswith("ly")]
    found: dict[str, set[str]] = {}
    solids: list[Solid] = []
    colour, colour_ends = "", -1
    of_solids: list[str] = []
    of_places: list[str] = []
    behind_a_link = False  # "next to a blue cube a red ball bounces" begins with the second solid
    tokens: list[str] = []
    solid_ends = 0
    k = 0
    while k < len(words):
        size, kind, value = _phrase_at(words, k)
        after = words[k + size] if k + size < len(words) else ""
        no_solid = (
            _is_modal(words, k) or _is_simile(words, k) or after in ("floor", "tiles", "surface", "ground", "wall")
        )
        named_next = _phrase_at(words, k + 1)[1] == "shape" if k + 1 < len(words) else False
        if kind == "shape" and no_solid:
            kind = value = ""
        a_can = words[k] == "can" and k and words[k - 1] in ("a", "the", "one", "this")
        sure = a_can or " ".join(words[k : k + size]) not in UNSURE
        before, again = len(solids), None
        if kind == "colour":
            colour, colour_ends = value, k + size
            told_after = solids and not solids[-1].colour and all(w in _IS_COLOURED for w in words[solid_ends:k])
            if told_after and not _noun_follows(words, k + size):
                solids[-1] = solids[-1]._replace(colour=value)  # "a ball, which is green"
        elif kind == "shape":
            ends = next((n for n in range(k, -1, -1) if n == colour_ends or words[n - 1] not in _BETWEEN), k)
            tinted = colour if ends == colour_ends else None
            if not solids:
                behind_a_link = _linked(words, k)
            again = _mentioned(words, k, solids, value, tinted)
            if again is None:
                solids.append(Solid(value if sure or tinted else "", tinted, value))
        elif not (kind or no_solid or named_next or len(words[k]) < 5 or words[k] in _MEANINGS) and {
            kind for kind, _ in meanings(words[k])
        } == {"shape"}:
            solids.append(Solid("", maybe=min(value for _, value in meanings(words[k]))))  # misspelt
        tokens += _tokens(kind, words[k : k + size], len(solids) - 1 if len(solids) > before else again)
        solid_ends = k + size if len(solids) > before else solid_ends
        if kind != "camera":
            of_solids += words[k : k + size]
        if kind not in ("camera", "colour"):
            of_places += words[k : k + size]
        found.setdefault(kind, set()).add(value if sure else "")
        k += size
    reading = clauses.read(tokens)
    if len(solids) == 2:
        first = reading.acting(2)
        if behind_a_link if first is None else first == 1:
            solids.reverse()
            reading = reading.turned()
    one = {kind: sure.pop() for kind, values in found.items() if len(sure := values - {""}) == 1}
    others = {kind: value for kind, value in one.items() if value and kind in ("camera", "floor", "sky")}
    return Spotted(tuple(solids), others, of_solids, of_places, reading)


def _is_modal(words: Sequence[str], k: int) -> bool:
    """Is "can" no can here: "can you show", "that can be seen"?"""
    after = words[k + 1] if k + 1 < len(words) else ""
    return words[k] == "can" and after in ("be", "you", "i", "we", "it", "not", "see", "barely", "only", "have", "just")


def _noun_follows(words: Sequence[str], k: int) -> bool:
    """Does the name of a solid begin at place k, or after adjectives?"""
    while k < len(words) and words[k] in _BETWEEN:
        k += 1
    return k < len(words) and any(kind == "shape" for kind, _ in meanings(words[k]))


def _is_simile(words: Sequence[str], k: int) -> bool:
    """Does the noun at place k only say what something is like: "like a rubber ball"?"""
    while k and (words[k - 1] in _BETWEEN or words[k - 1] in _COLOURING - {"to"}):
        k -= 1
    return bool(k) and words[k - 1] == "like"


def _mentioned(words: Sequence[str], k: int, solids: Sequence[Solid], shape: str, colour: str | None) -> int | None:
    """Which of the solids the noun at place k names again: "the ball", of a red ball; None for a new one."""
    while k and (words[k - 1] in _BETWEEN or words[k - 1] in _COLOURING - {"the", "this"}):
        k -= 1
    if not k or words[k - 1] not in ("the", "this", "that", "same"):
        return None
    same = [n for n, solid in enumerate(solids) if solid.shape == shape and colour in (None, solid.colour)]
    return same[0] if len(same) == 1 else None


def _tokens(kind: str, words: Sequence[str], solid: int | None) -> list[str]:
    """A phrase in the tokens of `clauses`."""
    if solid is not None:
        return [f"S{solid}"]
    if kind == "sky" and words[0] in ("at", "by", "under", "in", "on"):
        return [words[0], "SKY"]
    if kind == "floor" and words[0] in ("on", "in"):
        return [words[0], "FLOOR"]
    return [kind.upper()] if kind in ("floor", "sky", "colour") else list(words)


def _linked(words: Sequence[str], k: int) -> bool:
    """Does the noun at place k follow "next to", "behind" or the like, with nothing but its own words between?"""
    while k and (words[k - 1] in _BETWEEN or words[k - 1] in _COLOURING):
        k -= 1
    return bool(k) and words[k - 1] in _LINKS


def _phrase_at(words: Sequence[str], k: int) -> tuple[int, str, str]:
    """How many words the longest phrase from place k on has, its kind, and what it means."""
    for size in range(min(_LONGEST_PHRASE, len(words) - k), 0, -1):
        if (phrase := " ".join(words[k : k + size])) in _PHRASES:
            return size, *_PHRASES[phrase]
    return 1, "", ""


def unknown_words(prompt: str) -> list[str]:
    """The words of the prompt that mean nothing in the world and are no small change either, each once."""
    return [word for word in dict.fromkeys(words_of(prompt)) if word.isalpha() and not _is_known(word)]


@lru_cache(maxsize=1 << 16)
def meanings(word: str) -> frozenset[tuple[str, str]]:
    """The (kind of slot, value) that a word speaks for, also misspelt."""
    return frozenset(chain.from_iterable(_MEANINGS[each] for each in _spelt(word)))


@lru_cache(maxsize=1 << 16)
def _spelt(word: str) -> tuple[str, ...]:
    """The words of the word list that this may be."""
    if word in _MEANINGS:
        return (word,)
    if len(word) < 3 or word in _SMALL_CHANGE:
        return ()
    return tuple(difflib.get_close_matches(word, _MEANINGS, n=2, cutoff=ALIKE))


def _is_known(word: str) -> bool:
    return word in _SMALL_CHANGE or bool(_spelt(word))


def _motions() -> dict[str, list[str]]:
    """Every way that the word list has to say a motion."""
    said = {
        motion: [f"{verb} {says[2]}" for says in verbs for verb in says[:2] if verb] for motion, verbs in DOES.items()
    }
    for motion, groups in ACTS.items():
        endings = [(verb, then.replace("{us}", us)) for verbs, ends in groups for verb in verbs for then in ends
                   for us in (OBSERVER if "{us}" in then else ("",))]  # fmt: skip
        said[motion] += [f"{form} {then}" for verb, then in endings for form in forms(verb)]
    for motion, ways in (("left", LEFTWARD), ("right", RIGHTWARD)):
        said[motion] += [f"{form} {way}" for verb in SLIDES for form in forms(verb) for way in ways]
    return said


def _all_phrases() -> dict[str, tuple[str, str]]:
    """Every phrase of the word list: the kind of slot it fills, and with what."""
    filmed = {name: (*FILMED[name], *FILMED_AS[name]) for name in FILMED}
    tables: dict[str, Mapping[str, Iterable[str]]] = {
        "motion": _motions(),
        "sky": {name: (*HEAVEN[name], *SKY_WORDS[name]) for name in HEAVEN},
        "floor": {name: (*GROUND[name], *FLOOR_WORDS[name]) for name in GROUND},
        "camera": {name: (*said, *(each.removeprefix("the ") for each in said)) for name, said in filmed.items()},
        "shape": SHAPE_WORDS,
        "colour": COLOUR_WORDS,
    }
    return {
        " ".join(words_of(phrase)): (kind, value)
        for kind, table in tables.items()
        for value, phrases in table.items()
        for phrase in phrases
    }


def _all_meanings() -> dict[str, frozenset[tuple[str, str]]]:
    """The meanings that each word of the word list's phrases may speak for: (kind of slot, value)."""
    small = frozenset(FUNCTION_WORDS)
    found: dict[str, set[tuple[str, str]]] = {}
    for phrase, meaning in _PHRASES.items():
        for word in phrase.split():
            if word not in small or word == phrase:
                found.setdefault(word, set()).add(meaning)
    for word in words_of(" ".join((*LEFTWARD, *RIGHTWARD))):
        if "left" in word or "right" in word:
            side = "left" if "left" in word else "right"
            # "a ball with a box to its right" stands on the left of it
            found.setdefault(word, set()).update({("direction", "left"), ("direction", "right"), ("motion", side)})
    for word in ("nothing", "neither", "both", "none"):
        found.setdefault(word, set()).add(("motion", "still"))
    for values in found.values():  # what may roll to the left, closer or away says nothing by rolling
        for kind in ("motion", "floor", "sky"):  # nor does "the floor" say which
            of_kind = {meaning for meaning in values if meaning[0] == kind}
            if len(of_kind) > 2:
                values -= of_kind
    return {word: frozenset(values) for word, values in found.items()}


KIND = {name: name.rstrip("2") for name in SLOTS}
_BETWEEN = frozenset(chain(DECOR, ("coloured", "colored", "hued", "tinted", "thing", "shaped")))
_COLOURING = frozenset(chain(("a", "an", "the", "one", "this", "to"), *map(str.split, chain(*COLOUR_WORDS.values()))))
_IS_COLOURED = frozenset(
    words_of(
        "that which is are was , . deepest painted coloured colored in of all bright deep dark light pale tinted a it"
    )
)
_LINKS = frozenset(("next", "beside", "near", "behind", "by", "alongside"))
_PHRASES = _all_phrases()
_LONGEST_PHRASE = max(phrase.count(" ") + 1 for phrase in _PHRASES)
_MEANINGS = _all_meanings()
_SMALL_CHANGE = frozenset(words_of(" ".join((*FUNCTION_WORDS, *STYLE, *OPENINGS, *DECOR, *vocabulary()))))
