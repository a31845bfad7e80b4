"""Captions can be read back: whatever a true caption says, `parse` finds, and it finds nothing that is not so."""

import random

from hypothesis import given
from hypothesis import strategies as st

from model.language.captioner import parse, plainly, truth
from model.network.text import split_words
from model.world.captions import LONGEST, describe, vocabulary
from model.world.scene import CLASSES, Scene, sample_scene
from model.world.scene import labels as labels_of

scenes = st.integers(0, 2**32).map(lambda seed: sample_scene(random.Random(seed)))
lengths = st.sampled_from((1, 17))


@given(scenes, lengths)
def test_the_plain_caption_says_everything_in_words_of_the_world(scene: Scene, frames: int) -> None:
    caption = plainly(scene, frames)
    assert parse(caption, frames) == truth(scene, frames)
    assert set(split_words(caption)) <= set(vocabulary())
    assert len(split_words(caption)) + caption.count(",") + caption.count(".") <= LONGEST


def pairs(said: dict[str, str]) -> list[tuple[str, str]]:
    return [(said["colour"], said["shape"]), (said["colour2"], said["shape2"])]


@given(scenes, lengths, st.randoms(use_true_random=False))
def test_every_caption_is_read_back_truly(scene: Scene, frames: int, rng: random.Random) -> None:
    found = parse(describe(scene, rng, frames=frames), frames)
    labels = labels_of(scene, frames)
    true = {name: CLASSES[name][index] for name, index in labels.items() if index >= 0}
    if frames == 1 and len(scene.solids) == 2 and scene.motion != "still":  # "a and b" has no first
        for colour, shape in pairs(true):
            assert (colour, shape) in pairs(found)
        solids = ("colour", "shape", "colour2", "shape2")
        found, true = ({k: v for k, v in said.items() if k not in solids} for said in (found, true))
        assert found.items() <= true.items()
        return
    assert found.items() <= true.items()
    assert {"colour", "shape", "count"} | ({"motion"} if frames > 1 else set()) <= found.keys()


@given(st.text())
def test_other_texts_are_read_without_complaint(text: str) -> None:
    assert parse(text).keys() <= CLASSES.keys()
