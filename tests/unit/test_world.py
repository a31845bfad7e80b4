import random
import re
from itertools import pairwise

import numpy as np
import pytest

from model.world.__main__ import contact_strip
from model.world.captions import LONGEST, describe, vocabulary
from model.world.render import moments, render
from model.world.scene import (
    CAMERAS,
    CLASSES,
    COLOURS,
    FLOORS,
    HELD_OUT,
    MOTIONS,
    SHAPES,
    SKIES,
    Scene,
    Solid,
    held_out,
    labels,
    sample_scene,
)


def mask(scene: Scene, clip: np.ndarray) -> np.ndarray:
    """Where the first solid's hue is, [T, H, W]; grey floors and a night sky have next to none of it."""
    pixels = clip.astype(float) / 255
    colour = np.array(COLOURS[scene.solids[0].colour])
    hue = colour - colour.mean()
    chroma = pixels - pixels.mean(axis=-1, keepdims=True)
    strength = chroma @ hue / np.linalg.norm(hue)
    return (strength > 0.12) & (strength > 0.93 * np.linalg.norm(chroma, axis=-1))


def middle(found: np.ndarray) -> float:
    return float(np.nonzero(found)[1].mean()) / found.shape[1]


def test_the_same_seed_draws_the_same_scene_caption_and_pixels():
    def draw() -> tuple[Scene, str, bytes]:
        rng = random.Random(7)
        scene = sample_scene(rng)
        return scene, describe(scene, rng), render(scene, frames=5).tobytes()

    assert draw() == draw()


@pytest.mark.parametrize(("width", "height"), [(64, 64), (96, 64), (64, 96), (128, 128), (40, 24)])
@pytest.mark.parametrize("frames", [1, 9, 17, 33])
def test_a_clip_has_the_size_and_length_asked_for(width: int, height: int, frames: int):
    clip = render(sample_scene(random.Random(frames)), width=width, height=height, frames=frames, supersample=1)
    assert clip.shape == (frames, height, width, 3)
    assert clip.dtype == np.uint8
    assert clip.std() > 10


def test_length_and_size_change_how_a_clip_is_seen_not_what_happens():
    scene = Scene((Solid("red", "cube", 0.9),), "left", floor="grey", sky="night")
    long, short = render(scene, frames=33), render(scene, frames=9)
    assert np.array_equal(long[::4], short)
    wide = render(scene, width=96, frames=9)
    assert np.abs(wide[:, :, 16:80].astype(int) - short).max() <= 1


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("motion", ["left", "right"])
def test_slides_cross_most_of_the_picture_the_way_they_say(colour: str, shape: str, motion: str):
    scene = Scene((Solid(colour, shape, 0.9),), motion, floor="grey", sky="night")
    path = [middle(frame) for frame in mask(scene, render(scene, frames=9))]
    steps = np.diff(path) * (1 if motion == "right" else -1)
    assert (steps > 0.01).all()
    assert steps.sum() > 0.4
    assert 0.1 < min(path) < max(path) < 0.9


@pytest.mark.parametrize(("motion", "sign"), [("closer", 1), ("away", -1)])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_comes_closer_grows_and_what_goes_away_shrinks(shape: str, motion: str, sign: int):
    scene = Scene((Solid("green", shape, 0.9),), motion, floor="grey", sky="night")
    size = mask(scene, render(scene, frames=9)).sum(axis=(1, 2)).astype(float)
    assert (sign * np.diff(size) > 0).all()
    assert max(size) > 2.5 * min(size)


@pytest.mark.parametrize(
    ("camera", "sign"), [("pan right", -1), ("pan left", 1), ("orbit right", -1), ("orbit left", 1)]
)
def test_the_camera_turns_and_travels_the_way_it_says(camera: str, sign: int):
    # The second solid stands in front of the centre: a camera that turns right, or travels right around the centre,
    # sees it drift to the left.
    drift = {}
    for how in (camera, "static"):
        scene = Scene((Solid("red", "sphere", 0.8), Solid("blue", "sphere", 0.8)), "behind", how, "grey", "night")
        second = Scene(scene.solids[1:], "still")
        drift[how] = np.array([middle(frame) for frame in mask(second, render(scene, frames=9))])
    assert (sign * np.diff(drift[camera] - drift["static"]) > 0).all()


def test_a_dolly_changes_the_size_of_what_stands_still():
    sizes = {}
    for camera in ("dolly in", "dolly out"):
        scene = Scene((Solid("red", "cube", 0.9),), "still", camera, "grey", "night")
        sizes[camera] = mask(scene, render(scene, frames=9)).sum(axis=(1, 2))
    assert (np.diff(sizes["dolly in"]) > 0).all()
    assert (np.diff(sizes["dolly out"]) < 0).all()


def test_what_passes_behind_is_seen_before_and_after_and_hidden_between():
    scene = Scene((Solid("red", "cylinder", 0.7), Solid("blue", "cube", 0.75)), "behind", floor="grey", sky="night")
    seen = mask(scene, render(scene, frames=17)).sum(axis=(1, 2))
    assert seen[8] < 0.3 * min(seen[0], seen[-1])


@pytest.mark.parametrize("frames", [1, 17])
def test_the_right_frames_of_a_behind_clip_are_shown(frames: int):
    scene = Scene((Solid("red", "cube", 0.7), Solid("blue", "cube", 0.75)), "behind")
    assert frames > 1 or abs(moments(scene, 1)[0] - 0.5) >= 0.35
    assert len(moments(scene, frames)) == frames


def test_spinning_shows_and_stays_where_it_is():
    scene = Scene((Solid("yellow", "cube", 0.9),), "spin", floor="grey", sky="night")
    clip = render(scene, frames=9)
    path = [middle(frame) for frame in mask(scene, clip)]
    assert max(path) - min(path) < 0.05
    assert all(np.abs(before.astype(int) - after).max() > 40 for before, after in pairwise(clip))


def test_every_combination_is_either_trained_on_or_held_out_and_every_word_is_trained_on():
    possible = {(c, s, m) for c in COLOURS for s in SHAPES for m in MOTIONS if m != "spin" or s == "cube"}
    assert possible > HELD_OUT
    assert 0.04 < len(HELD_OUT) / len(possible) < 0.08
    for place, names in enumerate((tuple(COLOURS), SHAPES, MOTIONS)):
        for name in names:
            of_name = {triple for triple in possible if triple[place] == name}
            assert 0 < len(of_name & HELD_OUT) < 0.15 * len(of_name), name


def test_a_sampler_told_to_avoid_or_seek_what_is_held_out_does():
    rng = random.Random(3)
    assert not any(held_out(sample_scene(rng, unseen=False)) for _ in range(2000))
    assert all(held_out(sample_scene(rng, unseen=True)) for _ in range(100))
    share = sum(held_out(sample_scene(rng)) for _ in range(3000)) / 3000
    assert 0.03 < share < 0.10


def test_the_second_solid_can_be_held_out_too():
    colour, shape, _ = next(triple for triple in sorted(HELD_OUT) if triple[2] == "still")
    assert held_out(Scene((Solid("red", "cone", 0.8), Solid(colour, shape, 0.8)), "bounce"))


def test_the_mix_is_as_designed():
    rng = random.Random(11)
    scenes = [sample_scene(rng) for _ in range(4000)]

    def share(of) -> float:  # type: ignore[no-untyped-def]
        return sum(map(of, scenes)) / len(scenes)

    assert share(lambda s: len(s.solids) == 2) == pytest.approx(0.25, abs=0.03)
    assert share(lambda s: s.motion in ("left", "right")) == pytest.approx(0.25, abs=0.03)
    assert all(s.camera == "static" for s in scenes if s.motion not in ("still", "bounce", "spin"))
    assert all(s.solids[0].colour != s.solids[1].colour for s in scenes if len(s.solids) == 2)
    for attribute, names in (("motion", MOTIONS), ("camera", CAMERAS), ("floor", FLOORS), ("sky", SKIES)):
        for name in names:
            assert share(lambda s, a=attribute, n=name: getattr(s, a) == n) > 0.025, name


def test_every_word_of_the_vocabulary_is_used_and_no_other():
    rng = random.Random(5)
    used = set()
    for i in range(6000):
        caption = describe(sample_scene(rng), rng, frames=1 if i % 4 == 0 else 17)
        assert caption == caption.lower()
        tokens = re.findall(r"[a-z0-9]+|[^a-z0-9 ]", caption)
        used |= set(tokens)
    assert used - {",", "."} == set(vocabulary())
    assert len(vocabulary()) <= 150


class Longest(random.Random):
    """Chooses the phrase with the most words, and everything that may be left out."""

    def random(self) -> float:
        return 0.0

    def choice(self, seq):  # type: ignore[no-untyped-def]
        return max(seq, key=lambda phrase: len((phrase if isinstance(phrase, str) else " ".join(phrase)).split()))

    def shuffle(self, x) -> None:  # type: ignore[no-untyped-def]
        pass


def test_the_longest_caption_fits_and_stays_a_phrase():
    draw = random.Random(1)
    captions = [describe(sample_scene(draw), Longest()) for _ in range(2000)]
    assert 27 <= max(len(re.findall(r"[a-z0-9]+|[,.]", caption)) for caption in captions) <= LONGEST
    assert all(caption.startswith(("a ", "an ")) for caption in captions)


def test_an_image_is_not_said_to_move():
    rng = random.Random(2)
    moving = {"moving", "sliding", "slides", "moves", "bounces", "camera", "spins", "passes", "video", "clip", "still"}
    for _ in range(500):
        scene = sample_scene(rng)
        assert not moving & set(describe(scene, rng, frames=1).split())
        assert labels(scene, frames=1)["motion"] == labels(scene, frames=1)["camera"] == -1


def test_labels_count_through_their_classes():
    rng = random.Random(4)
    for _ in range(500):
        scene = sample_scene(rng)
        found = labels(scene)
        assert found.keys() == CLASSES.keys()
        assert all(-1 <= index < len(CLASSES[name]) for name, index in found.items())
        assert CLASSES["motion"][found["motion"]] == scene.motion
        assert CLASSES["colour"][found["colour"]] == scene.solids[0].colour
        assert (found["colour2"] == -1) == (found["shape2"] == -1) == (len(scene.solids) == 1)
        assert (found["direction"] != -1) == (scene.motion == "behind")


def test_a_scene_that_cannot_be_says_what_is_wrong():
    red = Solid("red", "cube", 0.9)
    with pytest.raises(ValueError, match="'white' must be one of: red, green"):
        Solid("white", "cube", 0.9)
    with pytest.raises(ValueError, match="'fly' must be one of"):
        Scene((red,), "fly")
    with pytest.raises(ValueError, match="'behind' with 1 solids"):
        Scene((red,), "behind")
    with pytest.raises(ValueError, match="must all be at least 1"):
        render(Scene((red,), "still"), frames=0)


def test_a_contact_strip_shows_the_first_and_the_last_frame():
    clip = render(sample_scene(random.Random(0)), frames=9)
    strip = contact_strip(clip, 3)
    assert strip.shape == (64, 3 * 65 - 1, 3)
    assert np.array_equal(strip[:, :64], clip[0])
    assert np.array_equal(strip[:, -64:], clip[-1])
