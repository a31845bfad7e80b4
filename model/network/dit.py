"""The diffusion transformer: Wan 2.1's architecture, small enough to read, at any size.

It predicts the velocity of the flow (noise minus clean) for every latent token. It knows neither text nor pixels nor
ranks: `split`, `merge` and each self-attention's `attend` are plain functions that `model.parallel.partition` replaces;
`run` is one that `model.network.stepcache` does.

Letters: B batch, C latent channels, T/H/W latent frames/rows/columns, N tokens, L text tokens, D width, S times.
Source: "Wan: Open and Advanced Large-Scale Video Generative Models" (2025), and diffusers' WanTransformer3DModel, whose
parameter names and config this class shares; per-token times as in Wan 2.2 TI2V.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import DiTConfig
from model.network import cpu
from model.network.layers import Block, LayerNorm32, Linear, TextKV, rope_freqs, sinusoid
from model.network.patch import grid, patchify, unpatchify

ENOUGH = 16  # rows from which on products of this size gave the same bits whatever their number
Layer = Callable[[Tensor], Tensor]  # a block with all that it is given beside the tokens: [B, n, D] -> [B, n, D]


class TimeMLP(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = Linear(channels, width), Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class TextMLP(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = Linear(channels, width), Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x), approximate="tanh"))


class Conditioning(nn.Module):
    """Times and text, brought to the transformer's width."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.time_embedder = TimeMLP(config.freq_dim, config.width)
        self.time_proj = Linear(config.width, 6 * config.width)
        self.text_embedder = TextMLP(config.text_dim, config.width)
        self.channels = config.freq_dim

    def forward(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """times [B, S] -> embedding [B, S, D], modulation [B, S, 6, D].

        Few times are filled up to ENOUGH: a product with less rows may take another path through the CPU's library, and
        then a clip's last bits would depend on how many others there are.
        """
        weight, count = self.time_embedder.linear_1.weight, times.numel()
        flat = F.pad(times.flatten(), (0, max(0, ENOUGH - count)))
        embedding = self.time_embedder(sinusoid(flat, self.channels).to(weight.dtype)).to(self.time_proj.weight.dtype)
        modulation = self.time_proj(F.silu(embedding))
        shape = times.shape
        return embedding[:count].view(*shape, -1), modulation[:count].view(*shape, 6, -1)

    def embed(self, text: Tensor) -> Tensor:
        """[B, L, Dt] -> [B, L, D]."""
        return self.text_embedder(text.to(self.text_embedder.linear_1.weight.dtype))


class DiT(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patch_embedding = nn.Conv3d(config.in_channels, width, config.patch, stride=config.patch)
        self.condition_embedder = Conditioning(config)
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.ffn_dim, config.cross_norm, config.eps) for _ in range(config.layers)
        )
        self.norm_out = LayerNorm32(width, config.eps, elementwise_affine=False)
        self.proj_out = Linear(width, config.out_channels * config.patch[0] * config.patch[1] * config.patch[2])
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, width) / width**0.5)
        self.split: Callable[[Tensor, int], Tensor] = lambda x, dim: x  # the tokens that this process computes
        self.merge: Callable[[Tensor, int], Tensor] = lambda x, dim: x  # and all of them again
        self.run: Callable[[Sequence[Layer], Tensor], Tensor] = in_order

    def precompute_kv(self, text: Tensor) -> list[TextKV]:
        """Every block's keys and values of a text [B, L, Dt], which `forward` takes in its place at every step."""
        embedded = self.condition_embedder.embed(text)
        return [block.attn2.precompute_kv(embedded) for block in self.blocks if isinstance(block, Block)]

    def forward(self, latents: Tensor, times: Tensor, text: Tensor | list[TextKV]) -> Tensor:
        """latents [B, C, T, H, W], times [B] or [B, S] in 0 (clean) .. 1 (noise), text [B, L, Dt] -> velocity.

        Its `precompute_kv` may be given in place of the text. The velocity has the latents' shape and type. S is 1,
        T / patch (a time for each latent frame) or N (a time for each token). Raises ValueError for other counts, and
        for sizes that the patch does not divide.
        """
        cells = grid(latents, self.config.patch)
        count = cells[0] * cells[1] * cells[2]
        times = times[:, None] if times.ndim == 1 else times
        if count % times.shape[1]:
            raise ValueError(
                f"times has {times.shape[1]} entries a clip; it must be 1, {cells[0]} (frames) or {count} (tokens)"
            )

        weight = self.patch_embedding.weight
        x = cpu.linear(
            patchify(latents.to(weight.dtype), self.config.patch), weight.flatten(1), self.patch_embedding.bias
        )
        freqs = self.split(rope_freqs(cells, self.config.rope_axes, latents.device), 0)[:, None]
        embedding, modulation = self.condition_embedder(times)  # [B, S, D], [B, S, 6, D]
        texts = [self.condition_embedder.embed(text)] * len(self.blocks) if isinstance(text, Tensor) else text
        x, modulation = self.split(x, 1), self._split_times(modulation, count)  # [B, n, D]
        layers = [
            lambda x, block=block, own=own: block(x, own, modulation, freqs)
            for block, own in zip(self.blocks, texts, strict=True)
        ]
        x = self.run(layers, x)

        shift, scale = (self.scale_shift_table + embedding.float()[:, :, None]).unbind(2)  # [B, S, D]
        x = self.merge(x, 1)  # [B, N, D]
        y = self.norm_out(x).unflatten(1, (scale.shape[1], -1))
        y = (y * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2).to(x.dtype)
        return unpatchify(self.proj_out(y), cells, self.config.patch).to(latents.dtype)

    def _split_times(self, modulation: Tensor, count: int) -> Tensor:
        """One time serves every token; several are spread over the tokens before these are divided."""
        if modulation.shape[1] == 1:
            return modulation
        whole = modulation.repeat_interleave(count // modulation.shape[1], 1)
        mine = self.split(whole, 1)
        return modulation if mine is whole else mine

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """
        | linear layers                | xavier uniform, bias 0                        |
        | time embedder                | normal 0.02, bias 0                           |
        | modulation tables            | normal 1/sqrt(D)                              |
        | cross-attention output, head | zero: a block starts deaf, the velocity at 0  |

        Text keeps its scale, unlike in Wan's own table (normal 0.02 there): values that start at a quarter of it leave
        the text unheard through thousands of steps.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1), generator=generator)
        assert self.patch_embedding.bias is not None
        nn.init.zeros_(self.patch_embedding.bias)
        conditioning = self.condition_embedder
        times = conditioning.time_embedder
        for linear in (times.linear_1, times.linear_2, conditioning.time_proj):
            nn.init.normal_(linear.weight, std=0.02, generator=generator)
        for block in (self, *self.blocks):
            nn.init.normal_(block.get_parameter("scale_shift_table"), std=self.config.width**-0.5, generator=generator)
        for block in self.blocks:
            nn.init.zeros_(block.get_parameter("attn2.to_out.0.weight"))
        nn.init.zeros_(self.proj_out.weight)


# Parameters that are float32 in a network of any shorter type, as diffusers keeps them (`_keep_in_fp32_modules` of its
# WanTransformer3DModel): few weights, which every token of every block is scaled and shifted by.
KEPT_IN_FLOAT32 = re.compile(r"(?:.*\.)?(?:time_embedder\..+|scale_shift_table|norm2\.\w+)")


def set_type(module: nn.Module, dtype: torch.dtype, prefix: str = "", recurse: bool = True) -> None:
    """Gives a network's parameters a type, and those that are KEPT_IN_FLOAT32 float32 where that is longer.

    prefix: of the module's names in the network.
    """
    for name, parameter in module.named_parameters(recurse=recurse):
        longer = KEPT_IN_FLOAT32.fullmatch(prefix + name) and dtype.itemsize < torch.float32.itemsize
        parameter.data = parameter.data.to(torch.float32 if longer else dtype)


def in_order(layers: Sequence[Layer], x: Tensor) -> Tensor:
    """x [B, n, D] through one layer after the other."""
    for layer in layers:
        x = layer(x)
    return x
