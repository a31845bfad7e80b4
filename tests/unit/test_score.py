"""The measures, measured: each is near its best on real clips and far from it where something is wrong."""

import random

import pytest
import torch
from torch import Tensor

from model import world
from model.checker import Checker, labels_of
from model.score import (
    Asked,
    _scenes_with,
    adherence,
    by_word,
    filmed,
    flicker,
    frechet,
    frozen,
    questions,
    reprojection,
)


@pytest.fixture(scope="module")
def orbits() -> tuple[list[world.Scene], Tensor]:
    some = _scenes_with(lambda s: s.camera.startswith("orbit") and s.floor == "checkered", 4)
    scenes = [one.scene for one in some]
    return scenes, filmed(scenes)


def test_floors_of_real_orbits_are_where_the_camera_says(orbits: tuple[list[world.Scene], Tensor]) -> None:
    scenes, clips = orbits
    right, backwards = reprojection(clips, scenes), reprojection(clips.flip(2), scenes)
    still = reprojection(frozen(clips, 8), scenes)
    assert right["patches"] > 20
    assert right["median"] < 0.3 and right["within one pixel"] > 0.9
    assert backwards["median"] > 2 and still["median"] > 1.5


def test_flicker_tells_a_steady_clip_from_an_unsteady_one(orbits: tuple[list[world.Scene], Tensor]) -> None:
    _, clips = orbits
    noisy = clips + 0.1 * torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))
    assert flicker(frozen(clips, 3)) == 0
    assert flicker(clips) < flicker(noisy) / 2


def test_frechet_distance_of_known_gaussians() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(20_000, 4, generator=generator)
    assert frechet(a, a) == pytest.approx(0, abs=0.01)
    assert frechet(a, a + 1) == pytest.approx(4, abs=0.01)  # the squared distance of the means
    assert frechet(a, 3 * torch.randn(20_000, 4, generator=generator)) == pytest.approx(16, rel=0.05)  # 4 (3 - 1)^2


def test_a_perfect_judge_of_a_perfect_model_gives_ones() -> None:
    asked = questions(60)
    truth = labels_of([one.scene for one in asked])
    assert set(adherence(truth, asked).values()) == {1.0}
    wrong = truth | {"colour": (truth["colour"] + 1) % 8}
    scores = adherence(wrong, asked)
    assert scores["colour"] == scores["everything"] == 0 and scores["shape"] == 1
    for word, count in by_word(truth, asked, "motion").items():
        right, of = map(int, count.split("/"))
        assert right == of, word


def test_a_third_of_the_questions_are_of_held_out_combinations() -> None:
    asked = questions(90)
    assert sum(one.held_out for one in asked) == 30
    assert asked == questions(90)
    assert len({one.prompt for one in asked}) > 80
    assert questions(30) == asked[:30]


def test_the_judge_answers_every_question() -> None:
    said = Checker()(torch.randn(2, 16, 5, 8, 8))
    assert {name: scores.shape[1] for name, scores in said.items()} == {n: len(c) for n, c in world.CLASSES.items()}


def test_only_what_a_prompt_names_is_scored() -> None:
    rng = random.Random(0)
    scene = world.sample_scene(rng)
    asked = [Asked(scene, "a red ball", 0)]
    truth = labels_of([scene])
    assert adherence(truth | {"sky": (truth["sky"] + 1) % 3}, asked)["sky"] is None  # nobody asked for one
