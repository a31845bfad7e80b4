"""Mini's causal video autoencoder, and the common face of the open models' ones.

Stride 4 in time, 8 in space; 4n+1 frames become n+1 latent frames. All convolutions in time look back only, so the
first frame stands alone and an image is a video of one frame. 3D convolutions are factorised into two spatial ones and
one temporal: at equal training time that gave 1.7 dB more than full 3x3x3 kernels.

Letters: B batch, C channels, T/H/W frames/rows/columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn

from model.config import ClipShape, VAEConfig
from model.network import cpu

STRIDE_TIME, STRIDE_SPACE = 4, 8
FOLD = 2  # pixels folded into channels at the border, on each spatial axis


def to_video(pixels: NDArray[np.uint8], device: str = "cpu") -> Tensor:
    """uint8 [B, T, H, W, 3] -> float [B, 3, T, H, W] in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).to(device).movedim(-1, 1).float() / 127.5 - 1


def to_pixels(video: Tensor) -> NDArray[np.uint8]:
    """[B, 3, T, H, W] in -1..1 -> uint8 [B, T, H, W, 3]."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(1, -1).contiguous().cpu().numpy()


class CausalConv(nn.Conv3d):
    """A convolution that sees its own frame and those before it."""

    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, int, int], stride: tuple[int, int, int] = (1, 1, 1)
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding=(0, kernel[1] // 2, kernel[2] // 2))
        self.past = kernel[0] - 1

    def forward(self, input: Tensor) -> Tensor:
        if self.past:
            input = F.pad(input, (0, 0, 0, 0, self.past, 0))
        return cpu.convolution(self, input)


class PositionNorm(nn.Module):
    """LayerNorm over the channels of each position: it mixes no frames, so it keeps causality."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype))
        return y.movedim(-1, 1)


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            PositionNorm(channels),
            nn.SiLU(),
            CausalConv(channels, channels, (1, 3, 3)),
            nn.SiLU(),
            CausalConv(channels, channels, (3, 1, 1)),
            PositionNorm(channels),
            nn.SiLU(),
            CausalConv(channels, channels, (1, 3, 3)),
        )
        last = self.layers[-1]
        assert isinstance(last, CausalConv) and last.bias is not None
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Down(nn.Module):
    """Half the frames (keeping the first alone), rows and columns."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.space = CausalConv(inputs, outputs, (1, 3, 3), (1, 2, 2))
        self.time = CausalConv(outputs, outputs, (3, 1, 1), (2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.time(self.space(x))


class Up(nn.Module):
    """Twice the rows and columns, and 2T - 1 frames: the first latent frame stands for one frame."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.spread = nn.Conv3d(inputs, 8 * outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = rearrange(
            cpu.convolution(self.spread, x), "b (c pt ph pw) t h w -> b c (t pt) (h ph) (w pw)", pt=2, ph=2, pw=2
        )
        return x[:, :, 1:].contiguous(memory_format=torch.channels_last_3d)


class VAE(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        a, b, c = config.channels
        pixels, z = 3 * FOLD * FOLD, config.latent_channels
        down, up = config.encoder_blocks, config.decoder_blocks
        self.encoder = nn.Sequential(
            CausalConv(pixels, a, (3, 3, 3)),
            *(Residual(a) for _ in range(down[0])),
            Down(a, b),
            *(Residual(b) for _ in range(down[1])),
            Down(b, c),
            *(Residual(c) for _ in range(down[2])),
            PositionNorm(c),
            nn.SiLU(),
            CausalConv(c, 2 * z, (1, 1, 1)),
        )
        self.decoder = nn.Sequential(
            CausalConv(z, c, (3, 3, 3)),
            *(Residual(c) for _ in range(up[2])),
            Up(c, b),
            *(Residual(b) for _ in range(up[1])),
            Up(b, a),
            *(Residual(a) for _ in range(up[0])),
            PositionNorm(a),
            nn.SiLU(),
            CausalConv(a, pixels, (3, 3, 3)),
        )
        self.register_buffer("mean", torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.latents_std).view(1, -1, 1, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    @staticmethod
    def check(shape: ClipShape) -> None:
        """Raises ValueError for a clip that the strides do not divide."""
        if shape.frames % STRIDE_TIME != 1:
            raise ValueError(f"frames={shape.frames} must be {STRIDE_TIME}n+1")
        for name, size in (("width", shape.width), ("height", shape.height)):
            if size % STRIDE_SPACE:
                raise ValueError(f"{name}={size} must be a multiple of {STRIDE_SPACE}")

    def latent_shape(self, shape: ClipShape) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latent of one clip."""
        self.check(shape)
        frames = (shape.frames - 1) // STRIDE_TIME + 1
        return self.config.latent_channels, frames, shape.height // STRIDE_SPACE, shape.width // STRIDE_SPACE

    def posterior(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """video [B, 3, T, H, W] in -1..1 -> mean and log variance [B, Z, t, h, w], float32, not normalised."""
        self.check(ClipShape(video.shape[4], video.shape[3], video.shape[2]))
        x = rearrange(video, "b c t (h ph) (w pw) -> b (c ph pw) t h w", ph=FOLD, pw=FOLD)
        mean, log_variance = self.encoder(x.contiguous(memory_format=torch.channels_last_3d)).chunk(2, 1)
        return mean.float(), log_variance.float().clamp(-12, 4)

    def reconstruct(self, latents: Tensor) -> Tensor:
        """Latents that are not normalised -> video, float32, not clamped."""
        x = self.decoder(latents.contiguous(memory_format=torch.channels_last_3d))
        return rearrange(x, "b (c ph pw) t h w -> b c t (h ph) (w pw)", ph=FOLD, pw=FOLD).float()

    def encode(self, video: Tensor) -> Tensor:
        """video [B, 3, T, H, W] in -1..1 -> latents [B, Z, t, h, w] of about unit variance, the posterior's mean."""
        return (self.posterior(video)[0] - self.mean) / self.std

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, Z, t, h, w] of about unit variance -> video [B, 3, T, H, W] in -1..1."""
        plain = latents * self.std + self.mean
        return self.reconstruct(plain.to(next(self.decoder.parameters()).dtype)).clamp(-1, 1)


class WanVAE:
    """diffusers' `AutoencoderKLWan` behind the same two calls; open weights bring their own autoencoder."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.decoder: nn.Module = inner.decoder
        config = inner.config
        self.channels: int = config.z_dim
        self.time: int = getattr(config, "scale_factor_temporal", None) or STRIDE_TIME
        self.space: int = getattr(config, "scale_factor_spatial", None) or STRIDE_SPACE
        self.mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
        self.std = torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)

    def latent_shape(self, shape: ClipShape) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latent of one clip. Raises ValueError for a clip that the strides do not divide."""
        if shape.frames % self.time != 1:
            raise ValueError(f"frames={shape.frames} must be {self.time}n+1")
        if shape.width % self.space or shape.height % self.space:
            raise ValueError(f"{shape.width}x{shape.height} must be multiples of {self.space}")
        return self.channels, (shape.frames - 1) // self.time + 1, shape.height // self.space, shape.width // self.space

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """video [B, 3, T, H, W] in -1..1 -> latents [B, Z, t, h, w] of about unit variance, the posterior's mean."""
        mean = self.inner.encode(video.to(next(self.inner.parameters()))).latent_dist.mode().float()
        return (mean - self.mean.to(mean)) / self.std.to(mean)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, Z, t, h, w] of about unit variance -> video [B, 3, T, H, W] in -1..1."""
        weight = next(self.inner.parameters())
        plain = latents * self.std.to(latents) + self.mean.to(latents)
        return self.inner.decode(plain.to(weight), return_dict=False)[0].float().clamp(-1, 1)
