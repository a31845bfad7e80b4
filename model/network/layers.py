"""The parts of the diffusion transformer. Attention is written once, here.

Parameter names are those of diffusers' Wan classes, so that one state dict serves both.
Letters: B batch, N tokens, L text tokens, D width, H heads, K head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.network import cpu

TextKV = tuple[Tensor, Tensor]  # cross-attention keys and values of a text, [B, L, H, K] each
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [B, N, H, K], k and v [B, M, H, K] -> [B, N, H, K]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention, [B, N, H, K] in and out."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, N, K]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same, for training on a CPU: below some 320 tokens it is half again as fast as the fused kernel."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)


def rotary(cells: tuple[int, int, int], axes: tuple[int, int, int], device: torch.device) -> Tensor:
    """Angles of the 3-axis rotary embedding, [N, K/2] float32 (Wan 2.1; theta 10000 on each axis)."""
    angles: list[Tensor] = []
    for axis, (count, channels) in enumerate(zip(cells, axes, strict=True)):
        rate = 10000.0 ** -(torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels)
        turn = torch.arange(count, dtype=torch.float64, device=device)[:, None] * rate
        shape = [1, 1, 1, channels // 2]
        shape[axis] = count
        angles.append(turn.view(shape).expand(*cells, -1))
    return torch.cat(angles, -1).flatten(0, 2).float()


@lru_cache(maxsize=16)
def rope_freqs(cells: tuple[int, int, int], axes: tuple[int, int, int], device: torch.device) -> Tensor:
    """The angles of `rotary` as complex numbers of length 1, [N, K/2]: the same at every step of a clip."""
    with torch.inference_mode(False):  # kept, they may serve a training next
        angles = rotary(cells, axes, device)
        return torch.complex(angles.cos(), angles.sin())


def rotate(x: Tensor, freqs: Tensor) -> Tensor:
    """Rotates x [B, N, H, K], of which two neighbouring channels are one complex number, by freqs [N, 1, K/2].

    On a CPU one complex product takes a ninth of the time of four real ones over every other channel.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # inductor writes no code for complex numbers, and fuses real ones
        (even, odd), (cos, sin) = pairs.unbind(-1), torch.view_as_real(freqs).unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * freqs)
    return turned.flatten(-2).to(x.dtype)


def sinusoid(times: Tensor, channels: int) -> Tensor:
    """[...] times in 0..1 -> [..., channels], cosines first; the network counts to 1000 (DDPM, Ho et al. 2020)."""
    half = channels // 2
    rate = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=times.device) / half)
    turn = times.float()[..., None] * 1000 * rate
    return torch.cat((turn.cos(), turn.sin()), -1)


class Linear(nn.Linear):
    """A linear layer by the quicker of a CPU's two libraries."""

    def forward(self, input: Tensor) -> Tensor:
        return cpu.linear(input, self.weight, self.bias)


class LayerNorm32(nn.LayerNorm):
    """LayerNorm computed in float32 for inputs of any type."""

    def forward(self, input: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps)


class HeadsRMSNorm(nn.Module):
    """RMS norm over all heads at once, as Wan norms queries and keys (`rms_norm_across_heads`)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D]
        square = x.float().pow(2).mean(-1, keepdim=True)
        return (x.float() * torch.rsqrt(square + self.eps)).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Self-attention with rotary positions, or cross-attention to text. `attend` is where a partition steps in."""

    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([Linear(width, width)])
        self.norm_q, self.norm_k = HeadsRMSNorm(width, eps), HeadsRMSNorm(width, eps)
        self.attend: Attend = attention

    def precompute_kv(self, context: Tensor) -> TextKV:
        """Keys and values, [B, M, H, K] each, of context [B, M, D]."""
        k = self.norm_k(self.to_k(context)).unflatten(-1, (self.heads, -1))
        return k, self.to_v(context).unflatten(-1, (self.heads, -1))

    def forward(self, x: Tensor, context: Tensor | TextKV, freqs: Tensor | None) -> Tensor:
        """x [B, N, D], context [B, M, D] or its `precompute_kv`; freqs [N, 1, K/2] rotate queries and keys, and are
        None in cross-attention.
        """
        q = self.norm_q(self.to_q(x)).unflatten(-1, (self.heads, -1))  # [B, N, H, K]
        k, v = self.precompute_kv(context) if isinstance(context, Tensor) else context
        if freqs is not None:
            q, k = rotate(q, freqs), rotate(k, freqs)
        return self.to_out[0](self.attend(q, k, v).flatten(-2))  # [B, N, D]


class GELU(nn.Module):
    """A linear layer, then tanh-approximated GELU (diffusers' `ffn.net.0`)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.proj, Linear):  # else it is a partition's
            return cpu.linear_gelu(x, self.proj.weight, self.proj.bias)
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GELU(width, hidden), nn.Identity(), Linear(hidden, width)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class Block(nn.Module):
    """Self-attention, cross-attention to text, feed-forward; adaLN modulation from a table plus the time embedding."""

    def __init__(self, width: int, heads: int, ffn_dim: int, cross_norm: bool, eps: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm32(width, eps, elementwise_affine=False)
        self.attn1 = Attention(width, heads, eps)
        self.norm2 = LayerNorm32(width, eps) if cross_norm else nn.Identity()
        self.attn2 = Attention(width, heads, eps)
        self.norm3 = LayerNorm32(width, eps, elementwise_affine=False)
        self.ffn = FeedForward(width, ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, width) / width**0.5)

    def forward(self, x: Tensor, text: Tensor | TextKV, modulation: Tensor, freqs: Tensor) -> Tensor:
        """x [B, N, D], text [B, L, D] or its keys and values by attn2, modulation [B, S, 6, D].

        The S times divide N: 1, frames, or N.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + modulation.float()).unbind(
            2
        )  # [B, S, D]
        y = affine(self.norm1(x), scale1, shift1).to(x.dtype)
        x = residual(x, self.attn1(y, y, freqs), gate1)
        x = x + self.attn2(self.norm2(x).to(x.dtype), text, None)
        y = affine(self.norm3(x), scale2, shift2).to(x.dtype)
        return residual(x, self.ffn(y), gate2)


def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x [B, N, D] * (1 + scale) + shift, both [B, S, D], each serving N/S neighbouring tokens."""
    x = x.unflatten(1, (scale.shape[1], -1))
    return torch.addcmul(shift[:, :, None], x, 1 + scale[:, :, None]).flatten(1, 2)


def residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + y * gate in float32, as Wan adds it; gate [B, S, D]."""
    times = gate.shape[1], -1
    moved = torch.addcmul(x.float().unflatten(1, times), y.float().unflatten(1, times), gate[:, :, None])
    return moved.flatten(1, 2).to(x.dtype)
