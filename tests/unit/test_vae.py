"""The autoencoder looks back only, and its sizes are what they say."""

import pytest
import torch

from model.config import ClipShape, VAEConfig
from model.network.vae import VAE


@pytest.fixture(scope="module")
def vae() -> VAE:
    torch.manual_seed(0)
    config = VAEConfig(channels=(8, 8, 8), latents_mean=(0.5,) * 16, latents_std=(2.0,) * 16)
    made = VAE(config).eval()
    for parameter in made.parameters():  # also those that start at zero
        torch.nn.init.normal_(parameter, std=0.1)
    return made


@pytest.mark.parametrize(
    "shape", [ClipShape(64, 64, 17), ClipShape(96, 64, 9), ClipShape(64, 96, 1), ClipShape(16, 24, 5)]
)
@torch.no_grad()
def test_sizes(vae: VAE, shape: ClipShape) -> None:
    video = torch.rand(1, 3, shape.frames, shape.height, shape.width) * 2 - 1
    latents = vae.encode(video)
    assert latents.shape[1:] == vae.latent_shape(shape)
    assert vae.decode(latents).shape == video.shape
    assert vae.decode(latents).abs().max() <= 1


@pytest.mark.parametrize("kept", [1, 5, 9])
@torch.no_grad()
def test_the_future_does_not_change_the_past(vae: VAE, kept: int) -> None:
    video = torch.rand(1, 3, 17, 16, 16)
    other = video.clone()
    other[:, :, kept:] = -1
    frames = (kept - 1) // 4 + 1
    assert torch.equal(vae.encode(video)[:, :, :frames], vae.encode(other)[:, :, :frames])
    assert not torch.equal(vae.encode(video)[:, :, frames:], vae.encode(other)[:, :, frames:])

    latents = vae.encode(video)
    changed = latents.clone()
    changed[:, :, frames:] += 1
    assert torch.equal(vae.decode(latents)[:, :, :kept], vae.decode(changed)[:, :, :kept])


@torch.no_grad()
def test_an_image_is_a_video_of_one_frame(vae: VAE) -> None:
    video = torch.rand(1, 3, 9, 16, 16)
    torch.testing.assert_close(vae.encode(video)[:, :, :1], vae.encode(video[:, :, :1]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("shape", "message"),
    [(ClipShape(64, 64, 16), r"frames=16 must be 4n\+1"), (ClipShape(60, 64, 1), "width=60 must be a multiple of 8")],
)
def test_sizes_that_do_not_fit_are_refused(vae: VAE, shape: ClipShape, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vae.latent_shape(shape)
