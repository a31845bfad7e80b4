"""Prompts as people type them, made up with what they mean: what the rewriter learns from.

`draw` gives a prompt and the `Said` that it says. Terse, chatty and flowery ones, in any order of parts, with film
jargon, with words that mean nothing here, with misspellings, and about things that are not in the world at all.
Everything follows from the random generator that is passed in.
"""

from __future__ import annotations

import random
import string
from dataclasses import replace

from model.world import composed
from model.world.lexicon import SLOTS, Said, caption
from model.world.moves import inflect
from model.world.scene import sample_scene
from model.world.words import (
    ACTS,
    COLOUR_WORDS,
    DECOR,
    FILMED_AS,
    FLOOR_WORDS,
    FOREIGN_COLOURS,
    FOREIGN_THINGS,
    LEFTWARD,
    OBSERVER,
    OPENINGS,
    RIGHTWARD,
    SHAPE_WORDS,
    SKY_WORDS,
    SLIDES,
    STYLE,
)


def draw(rng: random.Random, *, held_out: bool = False) -> tuple[str, Said]:
    """A prompt, and what it says of the world; held_out: in phrases that training never has (`composed.HELD_OUT`)."""
    if rng.random() < 0.04 and not held_out:
        scene = sample_scene(rng)
        said = Said.of(scene)
        return caption(said), said
    said = _draw_said(rng)
    text = _Writer(rng, held_out).prompt(said)
    if said.shape is None:
        said = replace(said, colour=None, shape2=None, colour2=None, motion=None, direction=None)
    return _spoil(text, rng), said.possible()


def _draw_said(rng: random.Random) -> Said:
    def maybe(chance: float, values: tuple[str, ...]) -> str | None:
        return rng.choice(values) if rng.random() < chance else None

    shape = maybe(0.94, SLOTS["shape"])
    two = rng.random() < 0.3
    colour = maybe(0.92, SLOTS["colour"])
    motion = maybe(0.82, SLOTS["motion"])
    if motion == "behind" and not two:
        motion = rng.choice(("left", "right", "still"))
    if two and motion not in ("behind", "bounce", None):
        motion = rng.choice(("behind", "still", "still", motion, "bounce"))
    direction = maybe(0.75, SLOTS["direction"]) if two and motion in ("behind", "still", None) else None
    return Said(
        shape=shape,
        colour=colour,
        shape2=rng.choice(SLOTS["shape"]) if two else None,
        colour2=maybe(0.95, SLOTS["colour"]) if two else None,
        motion=motion,
        direction=direction,
        camera=maybe(0.4, SLOTS["camera"]),
        floor=maybe(0.55, SLOTS["floor"]),
        sky=maybe(0.55, SLOTS["sky"]),
    )


class _Writer:
    """One person's way of saying it."""

    def __init__(self, rng: random.Random, held_out: bool = False) -> None:
        self.rng, self.held_out = rng, held_out
        self.terse = rng.random() < 0.4
        self.flowery = not self.terse and rng.random() < 0.5

    def prompt(self, said: Said) -> str:
        rng = self.rng
        parts = [self.happening(said)]
        where = [self.floor(said.floor), self.sky(said.sky)]
        rng.shuffle(where)
        where = [part for part in where if part]
        if where and rng.random() < (0.3 if self.terse else 0.2):
            parts = [*where, *parts]
            where = []
        elif where and not self.terse and rng.random() < 0.7:
            parts = [" ".join([*parts, *where])]
            where = []
        parts += where
        if said.camera:
            parts = self.with_camera(parts, said.camera)
        if rng.random() < 0.3:
            parts.insert(rng.randrange(len(parts) + 1), rng.choice(STYLE))
        if rng.random() < 0.25:
            parts.append(rng.choice(STYLE))
        text = self.joined(parts)
        if not self.terse and rng.random() < 0.3:
            text = f"{rng.choice(OPENINGS)} {text}"
        return text

    def joined(self, parts: list[str]) -> str:
        if self.rng.random() < (0.25 if self.terse else 0.15):
            return ". ".join(part[:1].upper() + part[1:] for part in parts) + "."
        glue = self.rng.choice((", ", ", ", ", ", " ", "; ", " - ")) if self.terse else ", "
        return glue.join(parts)

    def with_camera(self, parts: list[str], camera: str) -> list[str]:
        if self.held_out or self.rng.random() < 0.5:
            clause, with_ing = composed.filmed(self.rng, camera, held_out=self.held_out)
            match self.rng.randrange(5):
                case 0:
                    return [*parts, f"with {with_ing}"]
                case 1:
                    return [f"{clause} {self.rng.choice(('while', 'as'))} {parts[0]}", *parts[1:]]
                case 2:
                    return [*parts[:-1], f"{parts[-1]} {self.rng.choice(('while', 'as', 'and'))} {clause}"]
                case 3:
                    return [*parts[:-1], f"{parts[-1]}. {clause[:1].upper()}{clause[1:]}"]
                case _:
                    return [*parts, clause] if self.rng.random() < 0.7 else [clause, *parts]
        filmed = self.rng.choice(FILMED_AS[camera])
        slow = self.rng.choice(("", "", "", "slowly", "gently", "smoothly"))
        way = self.rng.random()
        if way < 0.25:
            return [f"{filmed} {slow}".strip(), *parts]
        if way < 0.45 and "camera" in filmed:
            return [*parts[:-1], f"{parts[-1]} {self.rng.choice(('while', 'as', 'and'))} {filmed} {slow}".strip()]
        if way < 0.6:
            link = self.rng.choice(("on", "around", "of", "as", "while", "in a scene where", "from", "toward"))
            return [f"{filmed} {link} {parts[0]}", *parts[1:]]
        return [*parts, f"{filmed} {slow}".strip()]

    # What happens

    def happening(self, said: Said) -> str:
        first = self.solid(said.colour, said.shape)
        second = self.solid(said.colour2, said.shape2) if said.shape2 else None
        rng = self.rng
        if said.motion == "behind" and second:
            return self.behind(first, second, said.direction)
        if second and said.direction:
            return self.pair(first, second, said.direction, said.motion == "still")
        if second and said.motion is None:
            link = rng.choice(("and", "next to", "beside", "with", "plus", "near", "&", "alongside", ","))
            return f"{first} {link} {second}"
        if second:
            link = rng.choice(("next to", "beside", "near", "alongside", "by", "close to"))
            if said.motion == "still" and rng.random() < 0.5:
                both = rng.choice(("nothing moves", "both still", "both at rest", "neither moves", "both motionless"))
                return f"{first} {rng.choice(('and', link))} {second}, {both}"
            act = self.act(first, said.motion or "still")
            return f"{act} {link} {second}" if rng.random() < 0.7 else f"{link} {second}, {act}"
        if said.shape and rng.random() < 0.06:  # something mini knows nothing of is there too
            thing = f"{rng.choice(('a', 'the', 'my'))} {rng.choice(FOREIGN_THINGS)}"
            link = rng.choice(("next to", "beside", "near", "behind", "with", "watched by"))
            return f"{self.act(first, said.motion) if said.motion else first} {link} {thing}"
        return self.act(first, said.motion) if said.motion else first

    def act(self, subject: str, motion: str) -> str:
        rng = self.rng
        if motion != "behind" and (self.held_out or rng.random() < 0.55):
            return composed.motion(rng, subject, motion, held_out=self.held_out)
        if motion in ("left", "right"):
            way = rng.choice(LEFTWARD if motion == "left" else RIGHTWARD)
            if rng.random() < 0.12:
                return f"{subject} {way}"
            verb, then = rng.choice(SLIDES), way
        else:
            verbs, endings = rng.choice(ACTS[motion])
            verb, then = rng.choice(verbs), rng.choice(endings).replace("{us}", rng.choice(OBSERVER))
        if self.flowery and rng.random() < 0.4:
            adverb = rng.choice(("slowly", "gently", "gracefully", "majestically", "quietly", "lazily", "rapidly"))
            then = f"{then} {adverb}" if rng.random() < 0.4 else then
            subject = f"{subject} {adverb}" if then.split()[-1:] != [adverb] else subject
        if rng.random() < 0.07:
            link = rng.choice((". It", ". it", "; it", ", and it", ": it", ". There it"))
            return f"{subject}{link} {inflect(verb, 's')} {then}".strip()
        which = rng.choice(("s", "ing", "ing", "")) if self.terse else rng.choice(("s", "s", "ing", "that s", "base"))
        match which:
            case "that s":
                said = f"{subject} {rng.choice(('that', 'which'))} {inflect(verb, 's')} {then}"
            case "base" if not verb.startswith(("is ", "not ")):
                said = f"{rng.choice(('see', 'watch', 'let', 'make', 'have', 'film'))} {subject} {verb} {then}"
            case "ing":
                moving = f"{inflect(verb, 'ing')} {then}"
                be = rng.choice(("", "", "is", ",")) if not verb.startswith("is ") else ""
                if rng.random() < (0.2 if self.terse else 0.06):
                    return f"{moving.strip()}{rng.choice((' ', ' ', ': '))}{subject}"
                said = f"{subject} {be} {moving}".replace(" ,", ",")
            case _:
                said = f"{subject} {inflect(verb, 's')} {then}"
        return " ".join(said.split())

    def behind(self, first: str, second: str, direction: str | None) -> str:
        rng = self.rng
        verbs, endings = ACTS["behind"][0]
        verb, then = rng.choice(verbs), rng.choice(endings)
        said = f"{first} {inflect(verb, rng.choice(('s', 'ing')))} {then} {second}"
        if direction is None:
            return said
        way = rng.choice(LEFTWARD if direction == "left" else RIGHTWARD)
        if self.held_out or rng.random() < 0.5:
            way = composed.sideways(rng, direction, held_out=self.held_out)
        lead = rng.choice(("", "", "moving", "heading", "travelling", "going", "rolling", "on its way"))
        return f"{said}{rng.choice((' ', ', '))}{lead} {way}".replace("  ", " ")

    def pair(self, first: str, second: str, direction: str, still: bool) -> str:
        rng = self.rng
        side, other = direction, "right" if direction == "left" else "left"
        stands = rng.choice(("standing", "sitting", "resting", "at rest", "motionless", "still")) if still else ""
        said = rng.choice(
            (
                f"{first} {stands} to the {side} of {second}",
                f"{first} {stands} left of {second}".replace("left", side),
                f"{first} on the {side}, {second} on the {other}",
                f"{first} on the {side} and {second} on the {other}",
                f"{first} at {side} and {second} at {other}",
                f"{first} with {second} to its {other}",
                f"{first} and {second} to its {other}",
                f"on the {side} {first}, on the {other} {second}",
                f"{first} on the {side} side of {second}",
            )
        )
        if still and (not stands or stands not in said):
            said += rng.choice(
                (", nothing moves", ", both at rest", ", neither moves", ", both standing still", ", still")
            )
        return " ".join(said.split())

    # What is there

    def solid(self, colour: str | None, shape: str | None) -> str:
        rng = self.rng
        if shape is None:
            thing = rng.choice(FOREIGN_THINGS) if rng.random() < 0.8 else rng.choice(("thing", "object", "something"))
        else:
            thing = rng.choice(SHAPE_WORDS[shape][: 3 if rng.random() < 0.5 else None])
        tint = rng.choice(COLOUR_WORDS[colour][: 2 if rng.random() < 0.35 else None]) if colour else None
        if tint is None and rng.random() < 0.3:
            tint = rng.choice(FOREIGN_COLOURS)
        if tint and rng.random() < 0.3:
            tint = tint.replace("-", " ")
        if tint and rng.random() < 0.1:
            tint += rng.choice(("-coloured", "-colored", " coloured", "-hued", " tinted"))
        if tint and rng.random() < 0.1:
            tint = f"{rng.choice(('bright', 'deep', 'pale', 'dark', 'light', 'vivid', 'dull'))} {tint}"
        decor = rng.choice(DECOR) if rng.random() < (0.15 if self.terse else 0.35) else ""
        article = "" if self.terse and rng.random() < 0.7 else rng.choice(("a", "a", "the", "one", "a single", "this"))
        way = rng.random()
        if tint and way < 0.06:
            said = f"{article} {decor} {thing} {rng.choice(('of', 'in', 'of deepest', 'painted', 'coloured'))} {tint}"
        elif tint and way < 0.1:
            said = f"{article} {decor} {thing}, {rng.choice(('which is', 'the colour of', ''))} {tint},"
        elif tint and way < 0.14 and self.terse:
            said = f"{thing} {tint}"
        elif decor and way < 0.3:
            said = f"{article} {tint or ''}, {decor} {thing}"
        elif decor and way < 0.4:
            said = f"{article} {tint or ''} {thing}, {decor} and {rng.choice(DECOR)},"
        else:
            said = f"{article} {decor} {tint or ''} {thing}"
        said = " ".join(said.split()).replace(" ,", ",").removeprefix(", ")
        head, _, rest = said.partition(" ")
        return f"an {rest}" if head == "a" and rest[:1] in tuple("aeiou") else said

    def floor(self, floor: str | None) -> str:
        if floor is None:
            return ""
        rng = self.rng
        ground = rng.choice(FLOOR_WORDS[floor])
        if ground in ("checkered", "chequered", "sandy", "grassy", "grey", "gray"):
            ground += rng.choice((" ground", " floor", " surface", " plane"))
        if self.terse and rng.random() < 0.5:
            return ground
        article = rng.choice(("", "a", "the", "a wide", "an endless", "soft", "bare", "an empty", "polished"))
        prep = rng.choice(("on", "on", "over", "across", "upon", "in", "somewhere on", "set on", "against"))
        return " ".join(f"{prep} {article} {ground}".split())

    def sky(self, sky: str | None) -> str:
        if sky is None:
            return ""
        rng = self.rng
        light = rng.choice(SKY_WORDS[sky])
        if self.terse and rng.random() < 0.5:
            return light
        article = rng.choice(("", "", "the", "a", "a beautiful", "the warm", "a dramatic", "soft"))
        prep = rng.choice(("at", "under", "in", "by", "beneath", "during", "as", "bathed in", "lit by"))
        return " ".join(f"{prep} {article} {light}".split())


def _spoil(text: str, rng: random.Random) -> str:
    """As typed: without capitals or commas at times, and with slips of the finger."""
    if rng.random() < 0.35:
        text = text.lower()
    elif rng.random() < 0.4:
        text = text[:1].upper() + text[1:]
    if rng.random() < 0.1:
        text = text.replace(",", "")
    if rng.random() < 0.25:
        words = text.split(" ")
        for _ in range(rng.choice((1, 1, 2, 3))):
            k = rng.randrange(len(words))
            words[k] = misspell(words[k], rng)
        text = " ".join(words)
    return text


def misspell(word: str, rng: random.Random) -> str:
    """One letter left out, doubled, swapped with the next or mistaken. Short words and left/right stay as they are."""
    if len(word) < 4 or "left" in word or "right" in word:
        return word
    k = rng.randrange(1, len(word) - 1)
    match rng.randrange(4):
        case 0:
            return word[:k] + word[k + 1 :]
        case 1:
            return word[:k] + word[k] + word[k:]
        case 2:
            return word[:k] + word[k + 1] + word[k] + word[k + 2 :]
        case _:
            return word[:k] + rng.choice(string.ascii_lowercase) + word[k + 1 :]
