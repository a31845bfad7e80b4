"""A model folder of ours opens in diffusers, and its pipeline walks to the same latents as our sampler."""

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import AutoTokenizer, UMT5EncoderModel

from model.config import Shape
from model.diffusion import denoise, guide, noise
from model.weights import SHIPPED, load_dit, load_text, load_vae
from tests.tiny import tiny_model


@pytest.fixture(scope="module", params=["tiny", "mini"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "mini":
        return SHIPPED / "mini"
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@torch.no_grad()
def test_diffusers_pipeline_and_our_sampler_agree(folder: Path) -> None:
    shape, steps, guidance = Shape(64, 64, 9), 6, 3.0
    prompt, negative = "a red ball moves left", "a green cube"
    dit, text, vae = (load(folder, torch.float32) for load in (load_dit, load_text, load_vae))
    start = noise(5, vae.latent_shape(shape))[None]

    pipeline = WanPipeline(
        transformer=WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32),
        text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt=prompt,
        negative_prompt=negative,
        width=shape.width,
        height=shape.height,
        num_frames=shape.frames,
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=text.length,
        latents=start,
        output_type="latent",
    ).frames

    words = text.encode([prompt, negative])

    def velocity(x: torch.Tensor, now: float) -> torch.Tensor:
        with_text, without = dit(torch.cat((x, x)), torch.full((2,), now), words).chunk(2)
        return guide(with_text, without, guidance)

    *_, ours = denoise(velocity, start, pipeline.scheduler.sigmas.tolist(), "euler")
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)
    assert (ours - start).abs().max() > 0.1  # the walk went somewhere
