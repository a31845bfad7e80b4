"""A model folder of ours opens in diffusers, one that diffusers saved opens here, and both make the same clips."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from model.config import ClipShape, Partition
from model.engine.engine import Engine
from model.loading.card import SECOND, SHIPPED, find_model
from model.loading.load import load_dit, load_text, load_vae
from model.network.diffusion import at_model_times, denoise, guide, noise, schedule
from tests.bench.model_engine import their_pipeline
from tests.tiny import CLIP, tiny_model, tiny_wan

STEPS, GUIDANCE, NEGATIVE = 6, 3.0, "a green cube"
GUIDANCE_2 = 1.5  # of a second expert


def walked(pipeline: WanPipeline, shape: ClipShape, start: torch.Tensor, length: int, output: str) -> Any:
    """What diffusers makes of the one request that all tests here ask."""
    return pipeline(
        prompt=CLIP.prompt,
        negative_prompt=NEGATIVE,
        width=shape.width,
        height=shape.height,
        num_frames=shape.frames,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        max_sequence_length=length,
        **({"guidance_scale_2": GUIDANCE_2} if pipeline.config.get("boundary_ratio") else {}),
        latents=start,
        output_type=output,
    ).frames


@pytest.fixture(scope="module", params=["tiny", "mini"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "mini":
        return SHIPPED / "mini"
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@torch.no_grad()
def test_diffusers_pipeline_and_our_sampler_agree(folder: Path) -> None:
    shape = ClipShape(64, 64, 9)
    dit, text, vae = (load(folder, torch.float32) for load in (load_dit, load_text, load_vae))
    start = noise(5, vae.latent_shape(shape))[None]
    pipeline = their_pipeline(folder)
    theirs = walked(pipeline, shape, start, text.length, "latent")
    words = text.encode([CLIP.prompt, NEGATIVE])

    def velocity(x: torch.Tensor, now: float) -> torch.Tensor:
        with_text, without = dit(torch.cat((x, x)), torch.full((2,), now), words).chunk(2)
        return guide(with_text, without, GUIDANCE)

    *_, ours = denoise(velocity, start, pipeline.scheduler.sigmas.tolist(), "euler")
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)
    assert (ours - start).abs().max() > 0.1  # the walk went somewhere


RELEASES = ("2.1", "2.2-ti2v", "2.2-a14b")
SIZES = {"2.1": ClipShape(48, 32, 9), "2.2-ti2v": ClipShape(64, 96, 5), "2.2-a14b": ClipShape(32, 48, 5)}


@pytest.fixture(scope="module", params=RELEASES)
def released(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, tiny_wan(tmp_path_factory.mktemp("wan"), request.param)


def their_frames(release: str, folder: Path, start: torch.Tensor) -> torch.Tensor:
    """[T, H, W, 3] in 0..1 of diffusers' pipeline, opened from the folder with nothing said but the request."""
    pipeline = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return torch.from_numpy(walked(pipeline, SIZES[release], start, 512, "np")[0])


@torch.no_grad()
def test_a_release_of_wan_makes_the_frames_that_diffusers_makes(released: tuple[str, Path]) -> None:
    release, folder = released
    shape, card = SIZES[release], find_model(folder)
    assert (card.solver, card.shift, card.multiple) == ("unipc", 3.0, 32 if release == "2.2-ti2v" else 16)
    text, vae = load_text(folder, torch.float32), load_vae(folder, torch.float32)
    start = noise(CLIP.seed, vae.latent_shape(shape))[None]
    words = text.encode([CLIP.prompt, NEGATIVE])
    experts = [load_dit(folder, torch.float32)]
    if card.boundary:
        experts.append(load_dit(folder, torch.float32, part=SECOND))
    asked: list[int] = []

    def velocity(x: torch.Tensor, now: float) -> torch.Tensor:
        asked.append(now < (card.boundary or 0))
        time_of_each_token = torch.full((2, x[0, 0, :, ::2, ::2].numel()), now)
        times = time_of_each_token if release == "2.2-ti2v" else torch.full((2,), now)
        scale = (GUIDANCE, GUIDANCE_2)[asked[-1]]
        return guide(*experts[asked[-1]](torch.cat((x, x)), times, words).chunk(2), scale)

    times = schedule(STEPS, card.shift, card.solver)
    *_, latents = denoise(at_model_times(velocity, card.solver), start, times, card.solver)
    ours = (vae.decode(latents)[0].movedim(0, -1) + 1) / 2
    theirs = their_frames(release, folder, start)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert theirs.std() > 0.01  # there is something to be seen
    assert set(asked) == ({0, 1} if release == "2.2-a14b" else {0})  # both experts had their turn


DIVIDED = [("2.1", Partition(tp=2)), ("2.2-a14b", Partition())]
REST = [
    (release, partition)
    for release in RELEASES
    for partition in (Partition(), Partition(tp=2), Partition(zero=2))
    if (release, partition) not in DIVIDED
]


@pytest.mark.parametrize(
    ("released", "partition"),
    [*DIVIDED, *(pytest.param(*each, marks=pytest.mark.chaos) for each in REST)],
    indirect=["released"],
    ids=str,
)
def test_an_engine_makes_them_too(released: tuple[str, Path], partition: Partition) -> None:
    release, folder = released
    shape = SIZES[release]
    spec = replace(
        CLIP,
        negative_prompt=NEGATIVE,
        width=shape.width,
        height=shape.height,
        frames=shape.frames,
        steps=STEPS,
        guidance=GUIDANCE,
        guidance_2=GUIDANCE_2,  # which one expert does not know
        solver="unipc",
    )
    with Engine(folder, partition) as engine:
        (clip,) = engine.render([spec])
    start = noise(CLIP.seed, load_vae(folder, torch.float32).latent_shape(shape))[None]
    theirs = their_frames(release, folder, start).numpy() * 255
    assert np.abs(clip.frames.astype(float) - theirs).max() < 1  # they are rounded to whole levels
