"""Motions and camera moves as sentences compose them: verb, side, way and order, whose clause, what is left out."""

from __future__ import annotations

import random

import pytest

from model.world import composed
from model.world.lexicon import Said, understand
from model.world.moves import forms

# prompt -> motion, direction and camera as word list and clauses read them without any network
SENTENCES = {
    "A blue cube moving to the right.": ("right", None, None),
    "A green cone glides past from the left to the right": ("right", None, None),
    "A ball painted orange, that travels from right to left. The camera does not move.": ("left", None, "static"),
    "The camera moves forward. A red cube stands on a lawn": ("still", None, "dolly in"),
    "A red cube, the camera circles it to the left": (None, None, "orbit left"),
    "The camera flies around a red ball, moving left": (None, None, "orbit left"),
    "A red cone enters from the left and leaves on the right": ("right", None, None),
    "From the right edge of the picture to the left one, a ball rolls": ("left", None, None),
    "To the left rolls a purple can": ("left", None, None),
    "A blue cone moves right at us": ("closer", None, None),
    "A blue cone moves right at night": ("right", None, None),
    "A small red ball left on the lawn does not move": ("still", None, None),
    "A yellow ball rotates without stopping": ("spin", None, None),
    "The camera backs away from a spinning purple cube": ("spin", None, "dolly out"),
    "Turn the camera right. A cone hops": ("bounce", None, "pan right"),
    "A cube -> right, no camera motion": ("right", None, "static"),
    "Behind an orange cube, a purple ball moves to the right": ("behind", "right", None),
    "A cube stands on a lawn and a red ball passes behind it to the left": ("behind", "left", None),
    "A red ball to the left of a blue cube, both at rest": ("still", "left", None),
    "A blue cone sitting right next to a yellow ball": ("still", None, None),
}
LEFT_OUT = {  # prompt -> phrases that are named, and the motion and camera that stay open
    "a crimson ball rolls off over the grass": "rolls off",
    "A red cone moves back and forth": "moves back and forth",
    "A green ball rolls left and right": "rolls left and right",
    "A red ball spins. It rolls to the left": "",
    "A red ball, the camera follows it": "camera follows it",
    "A red ball, the camera orbits it": "camera orbits it",
    "A red ball and a dog. The dog runs to the left": "runs to the left",
}
NOBODY = Said(shape="sphere", shape2="cube", motion="left", camera="pan left")  # what no clause says is not invented


@pytest.mark.parametrize("prompt", SENTENCES)
def test_sentences_are_read_by_their_parts(prompt: str) -> None:
    said, _ = understand(prompt, NOBODY)
    assert (said.motion, said.direction, said.camera) == SENTENCES[prompt]


@pytest.mark.parametrize("prompt", LEFT_OUT)
def test_a_wrong_word_is_worse_than_none(prompt: str) -> None:
    said, told = understand(prompt, NOBODY)
    assert (said.motion, said.camera) == (None, None)
    assert LEFT_OUT[prompt] in told or not LEFT_OUT[prompt]


@pytest.mark.parametrize("held_out", [False, True])
def test_composed_phrases_are_read_also_those_that_training_never_has(held_out: bool) -> None:
    rng, wrong, missing = random.Random(3), 0, 0
    for _ in range(400):
        motion, camera = (
            rng.choice(("left", "right", "closer", "away", "bounce", "spin", "still")),
            rng.choice(tuple(composed.FILMED)),
        )
        text = composed.motion(rng, "a red ball", motion, held_out=held_out)
        filmed, _ = composed.filmed(rng, camera, held_out=held_out)
        said, _ = understand(f"{text}. {filmed}.", Said(shape="sphere", colour="red"))
        for want, got in ((motion, said.motion), (camera, said.camera)):
            wrong += got not in (want, None)
            missing += got is None
    assert wrong <= 8  # of 800
    assert missing <= 24


def test_verbs_are_inflected() -> None:
    assert forms("carry") == ("carry", "carries", "carrying", "carried")
    assert forms("skip along") == ("skip along", "skips along", "skipping along", "skipped along")
    assert forms("be pushed") == ("be pushed", "is pushed", "being pushed", "was pushed")
