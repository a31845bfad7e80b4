"""The trial compares captions and nothing else."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.language.captioner import parse, truth
from model.score.recaption_trial import WRONG, alt_texts, deafen, run_trial
from model.train.autoencoder import encode_latents, train_vae
from model.train.clips import render
from model.train.config import TrainConfig
from model.train.transformer import train_dit, trained_writer
from model.world.scene import sample_scene
from tests.integration.test_train import small


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    torch.set_num_threads(1)
    config = replace(small(tmp_path_factory.mktemp("trial") / "work"), vae_steps=2, dit_steps=3)
    config.work.mkdir()
    render(config, processes=1)
    train_vae(config)
    encode_latents(config)
    train_dit(config)
    return config


def test_trainings_differ_in_their_captions_alone(config: TrainConfig, tmp_path: Path) -> None:
    ball, cube = (["a red ball"] * 16, ["a blue cube at night"] * 16)

    def loss(short: TrainConfig) -> dict[str, float | None]:
        return {"loss": json.loads((short.work / "dit.jsonl").read_text().splitlines()[-1])["held_out_loss"]}

    figures = run_trial(config, {"one": ball, "same": ball, "other": cube}, loss, tmp_path)
    assert figures["one"] == figures["same"]
    one, same, other = (load_file(tmp_path / name / "dit.safetensors") for name in ("one", "same", "other"))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
    assert run_trial(config, {"one": ball}, loss, tmp_path) == {"one": figures["one"]}
    assert len((tmp_path / "one" / "dit.jsonl").read_text().splitlines()) == 2, "what is done is not done again"


def test_what_hears_the_text_begins_anew_and_nothing_else(config: TrainConfig) -> None:
    heard, deaf = trained_writer(config).state_dict(), deafen(trained_writer(config), 1).state_dict()
    changed = {name for name in heard if not torch.equal(heard[name], deaf[name])}
    assert "dit.blocks.0.attn2.to_q.weight" in changed and any(name.startswith("text.") for name in changed)
    assert not deaf["dit.blocks.0.attn2.to_out.0.weight"].any(), "a block that begins anew starts deaf"
    assert {name for name in changed if "attn1" in name or "ffn" in name or "proj_out" in name} == set()


def test_alt_texts_say_little_and_not_always_the_truth() -> None:
    rng = random.Random(1)
    scenes = [sample_scene(rng) for _ in range(1500)]
    texts = alt_texts(scenes, rng)
    said = [(parse(text), truth(scene)) for text, scene in zip(texts, scenes, strict=True)]
    assert not any({"motion", "camera", "floor", "sky"} & found.keys() for found, _ in said)
    coloured = [(found["colour"], true) for found, true in said if "colour" in found]
    wrong = sum(colour not in (true["colour"], true.get("colour2")) for colour, true in coloured) / len(coloured)
    assert 0.6 * WRONG < wrong < WRONG
