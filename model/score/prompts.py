"""Prompts that a model of the world is asked, and how often its clips show what they were asked for.

Every prompt and every seed here is fixed, so that two models are asked the same, and none was trained on: the model's
and the judge's training draw their scenes from other seeds. What clips show is told as `Labels`; who looks at them, and
how they are made, is not known here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from model.language.rewriter import examples
from model.score.clips import Labels, share
from model.score.judge import SHAPE, labels_of, scene_with
from model.world import scene as scenes
from model.world.captions import GROUND, HEAVEN, describe
from model.world.lexicon import Said
from model.world.scene import CLASSES, MOTIONS, Scene, sample_scene

PROMPTS = 256
SEED, OTHER_SEED, USERS_SEED = 1_000_000, 2_000_000, 3_000_000  # of the first clip of each set


@dataclass(frozen=True, slots=True)
class Asked:
    """One prompt of the evaluation, and the scene that it describes."""

    scene: Scene
    prompt: str
    seed: int

    @property
    def held_out(self) -> bool:
        return scenes.held_out(self.scene)


@dataclass(frozen=True, slots=True)
class UsersPrompt:
    """A prompt in somebody's own words, and what it says."""

    prompt: str
    said: Said
    seed: int

    @property
    def in_any_order(self) -> bool:
        """Neither of its two solids is the one that moves or stands on the left."""
        return self.said.shape2 is not None and self.said.motion in (None, "still") and self.said.direction is None


def questions(count: int = PROMPTS) -> list[Asked]:
    """Prompts that no training clip had; every third is of a held-out combination."""
    asked: list[Asked] = []
    for k in range(count):
        rng = random.Random(f"score/{k}")
        scene = sample_scene(rng, unseen=k % 3 == 2)
        asked.append(Asked(scene, describe(scene, rng, frames=SHAPE.frames), SEED + k))
    return asked


def questions_with(wanted: Callable[[Scene], bool], count: int) -> list[Asked]:
    """Prompts of scenes of one kind."""
    rng = random.Random("score/some")
    found: list[Asked] = []
    for k in range(count):
        scene = scene_with(rng, wanted)
        found.append(Asked(scene, describe(scene, rng, frames=SHAPE.frames), OTHER_SEED + k))
    return found


def users_prompts(most: int) -> list[UsersPrompt]:
    """The hand-written prompts that the rewriter is judged by, none of which it was trained on."""
    return [UsersPrompt(one.prompt, one.said, USERS_SEED + k) for k, one in enumerate(examples()[:most])]


def judges_scenes(count: int, behind: int) -> list[Scene]:
    """Scenes to try a judge on: `count` as they come, and more until in `behind` one solid passes behind the other.

    Only these show every attribute: a second solid, and the side that the first one goes to. Every spin comes once more
    at rest: lone cubes before a standing camera mostly spin, and a judge that says so of all of them would seem right.
    """
    rng = random.Random("score/judge")
    scenes = [sample_scene(rng) for _ in range(count)]
    passing = sum(scene.motion == "behind" for scene in scenes)
    scenes += [scene_with(rng, lambda s: s.motion == "behind") for _ in range(passing, behind)]
    return scenes + [replace(scene, motion="still") for scene in scenes if scene.motion == "spin"]


# --- what prompts ask for ---------------------------------------------------------------------------------------------


def wanted_of(asked: Sequence[Asked]) -> Labels:
    """Classes that the prompts' scenes show, floor and sky only where the prompt names them."""
    wanted = labels_of([one.scene for one in asked])
    for name, phrases in (("floor", GROUND), ("sky", HEAVEN)):
        wanted[name] = wanted[name].where(torch.tensor([_names(one.prompt, phrases) for one in asked]), -1)
    return wanted


def _names(prompt: str, phrases: Mapping[str, Sequence[str]]) -> bool:
    return any(phrase in prompt for choices in phrases.values() for phrase in choices)


def wanted_by_users(asked: Sequence[UsersPrompt]) -> Labels:
    """Classes that the prompts name and no others; one that names a solid asks for so many as it names."""
    rows = [one.said.classes() for one in asked]
    return {
        name: torch.tensor([classes.index(row[name]) if row.get(name) else -1 for row in rows])
        for name, classes in CLASSES.items()
    }


PAIRS = (("colour", "colour2"), ("shape", "shape2"))


def as_named(shown: Labels, wanted: Labels, in_any_order: Tensor) -> Labels:
    """`shown` with the two solids of a clip exchanged where their order is free [B] and that is nearer to `wanted`."""
    exchanged = shown | {name: shown[other] for pair in PAIRS for name, other in (pair, pair[::-1])}
    better = in_any_order & (_hits(exchanged, wanted) > _hits(shown, wanted))
    return {name: torch.where(better, exchanged[name], shown[name]) for name in shown}


def _hits(shown: Labels, wanted: Labels) -> Tensor:
    return torch.stack([shown[name] == wanted[name] for pair in PAIRS for name in pair]).sum(0)


# --- does it do what its prompt says ----------------------------------------------------------------------------------

SLIDES = torch.tensor([MOTIONS.index("left"), MOTIONS.index("right")])


def adherence(shown: Labels, wanted: Labels) -> dict[str, float | None]:
    """Shares of the clips that show an attribute as it was wanted, of those that it was wanted of."""
    return {name: share(right, of) for name, (right, of) in _answers(shown, wanted).items()}


def counts(wanted: Labels) -> dict[str, int]:
    """Of how many clips each figure of `adherence` is a share."""
    return {name: int(of.sum()) for name, (_, of) in _answers(wanted, wanted).items()}


def _answers(shown: Labels, wanted: Labels) -> dict[str, tuple[Tensor, Tensor]]:
    """For each figure: which clips [B] are right, which [B] count."""
    of = {name: wanted[name] >= 0 for name in CLASSES}
    right = {name: shown[name] == wanted[name] for name in CLASSES}
    kept = {name: right[name] | ~of[name] for name in CLASSES}  # right, or nobody asked
    first = ("colour", "shape", "motion", "camera", "count", "floor", "sky")
    return {
        **{name: (right[name], of[name]) for name in first},
        "left or right": (right["motion"], torch.isin(wanted["motion"], SLIDES)),
        "second colour": (right["colour2"], of["colour2"]),
        "second shape": (right["shape2"], of["shape2"]),
        "second solid": (kept["colour2"] & kept["shape2"], of["colour2"] | of["shape2"]),
        "side it passes to": (right["direction"], of["direction"]),
        "everything": (reduce(torch.logical_and, kept.values()), reduce(torch.logical_or, of.values())),
    }


def by_word(shown: Labels, wanted: Labels, name: str) -> dict[str, str]:
    """For every class of an attribute: how many of how many clips show it."""
    right = shown[name] == wanted[name]
    asked_for = ((word, wanted[name] == k) for k, word in enumerate(CLASSES[name]))
    return {word: f"{int((right & of).sum())}/{int(of.sum())}" for word, of in asked_for if of.any()}


def ratio(one: Mapping[str, float | None], other: Mapping[str, float | None]) -> dict[str, float | None]:
    """Of two answers of `adherence` the first over the second; None where either has no figure, or the second is 0."""
    pairs = ((name, value, other.get(name)) for name, value in one.items())
    return {name: round(a / b, 3) if a is not None and b else None for name, a, b in pairs}


@dataclass(frozen=True, slots=True)
class Miss:
    """An attribute that a clip shows otherwise than it was asked to: the classes, by name."""

    attribute: str
    asked: str
    seen: str


def misses(shown: Labels, wanted: Labels) -> list[list[Miss]]:
    """For each clip what is wrong with it; [] where it does all that its prompt says."""
    alone = (shown["count"] == CLASSES["count"].index("one")).tolist()
    found: list[list[Miss]] = [[] for _ in alone]
    for name, classes in CLASSES.items():
        for k, (asked, seen) in enumerate(zip(wanted[name].tolist(), shown[name].tolist(), strict=True)):
            if asked >= 0 and asked != seen:
                absent = alone[k] and name in ("colour2", "shape2", "direction")
                found[k].append(Miss(name, classes[asked], "none" if absent else classes[seen]))
    return found


# --- and can the judge tell -------------------------------------------------------------------------------------------


def proof(said: Labels, truth: Labels) -> dict[str, dict[str, float | int | str | None]]:
    """For each attribute: the share of real clips that the judge names rightly, of how many; and its weakest class."""
    rows: dict[str, dict[str, float | int | str | None]] = {}
    for name, classes in CLASSES.items():
        right = said[name] == truth[name]
        shares = {word: share(right, truth[name] == k) for k, word in enumerate(classes)}
        known = {word: value for word, value in shares.items() if value is not None}
        weakest = min(known, key=known.__getitem__, default=None)
        rows[name] = {
            "right": share(right, truth[name] >= 0),
            "clips": int((truth[name] >= 0).sum()),
            "weakest class": weakest,
            "right of it": known[weakest] if weakest else None,
            "clips of it": int((truth[name] == classes.index(weakest)).sum()) if weakest else 0,
        }
    return rows
