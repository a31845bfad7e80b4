"""Descriptions of a model: shapes, partitions and the hyper-parameters saved beside the weights.

Nothing here imports torch: planning and submitting a million prompts must not pay for it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ClipShape:
    """The size of a clip in pixels and frames. One frame is an image."""

    width: int
    height: int
    frames: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"


def frames_at(frames: int, rate: float, fps: float) -> int:
    """How many frames a video of `frames` at `rate` has at `fps`, each the nearest one; a picture (rate 0) has one."""
    return math.ceil((frames - 0.5) * fps / rate) if rate else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """How one model is split over the ranks of an engine.

    cfg:  2 runs the conditional and the unconditional half of classifier-free guidance on different ranks.
    sp:   Ulysses sequence parallel degree: tokens are divided, heads are exchanged in self-attention.
    tp:   tensor parallel degree: the linear layers of every block are divided.
    zero: ZeRO-3 degree: the weights are divided over the ranks of cfg and sp, which would hold copies, and over as many
          more as that leaves; these share out the rows of a batch. A block's weights are gathered while it computes.
    """

    cfg: int = 1
    sp: int = 1
    tp: int = 1
    zero: int = 1

    def __post_init__(self) -> None:
        if self.cfg not in (1, 2):
            raise ValueError(f"partition cfg={self.cfg} must be 1 or 2 (guidance has two halves)")
        for name in ("sp", "tp", "zero"):
            if getattr(self, name) < 1:
                raise ValueError(f"partition {name}={getattr(self, name)} must be at least 1")
        if self.zero > 1 and self.zero % (self.cfg * self.sp):
            raise ValueError(
                f"partition zero={self.zero} must be 1 or a multiple of cfg {self.cfg} x sp {self.sp} = "
                f"{self.cfg * self.sp}: the ranks of these axes divide the weights between them"
            )

    @property
    def batch(self) -> int:
        """Ranks that share out the rows of a batch: what `zero` has beyond the ranks of cfg and sp."""
        return max(1, self.zero // (self.cfg * self.sp))

    @property
    def world(self) -> int:
        """The number of ranks."""
        return self.batch * self.cfg * self.sp * self.tp

    def __str__(self) -> str:
        zero = f"xzero{self.zero}" if self.zero > 1 else ""  # history holds the form without it
        return f"cfg{self.cfg}xsp{self.sp}xtp{self.tp}{zero}"

    @classmethod
    def parse(cls, text: str) -> Partition:
        """Reads `tp=2` or `cfg=2,sp=1,tp=2,zero=2`, or the form that `str` gives (`cfg2xsp1xtp2`)."""
        degrees: dict[str, int] = {}
        for part in text.replace("x", ",").replace("=", "").split(","):
            name, number = part.strip()[:-1].rstrip("0123456789"), ""
            number = part.strip()[len(name) :]
            if name not in ("cfg", "sp", "tp", "zero") or not number.isdigit() or name in degrees:
                raise ValueError(f"partition {text!r} must look like tp=2 or cfg=2,sp=1,tp=2,zero=2")
            degrees[name] = int(number)
        return cls(**degrees)

    def check_heads(self, heads: int) -> None:
        """Raises ValueError when `heads` attention heads cannot be divided over sp × tp ranks."""
        if heads % (self.sp * self.tp):
            raise ValueError(
                f"{heads} attention heads do not divide over sp {self.sp} x tp {self.tp} = {self.sp * self.tp} ranks; "
                f"choose sp x tp among {[n for n in range(1, heads + 1) if heads % n == 0]}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DiTConfig:
    """Wan 2.1's diffusion transformer, in the terms of diffusers' `WanTransformer3DModel` config."""

    layers: int
    heads: int
    head_dim: int
    ffn_dim: int
    text_dim: int
    in_channels: int = 16
    out_channels: int = 16
    freq_dim: int = 256
    patch: tuple[int, int, int] = (1, 2, 2)
    cross_norm: bool = True
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: rotary embeddings turn pairs of channels")
        if self.head_dim // 6 == 0:
            raise ValueError(f"head_dim {self.head_dim} must be at least 6: three axes share it")

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    def operations(self, tokens: int, text_tokens: int) -> int:
        """Floating point operations of the blocks in one pass: two for every weight that a token meets, four for every
        pair that attends."""
        of_tokens = 2 * tokens * (6 * self.width**2 + 2 * self.width * self.ffn_dim)
        of_text = 2 * text_tokens * 2 * self.width**2
        return self.layers * (of_tokens + of_text + 4 * self.width * tokens * (tokens + text_tokens))

    @property
    def rope_axes(self) -> tuple[int, int, int]:
        """Channels of a head that encode time, height and width (Wan 2.1's split)."""
        side = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * side, side, side

    @classmethod
    def from_diffusers(cls, config: dict[str, Any]) -> DiTConfig:
        """Reads `transformer/config.json`. Raises ValueError for variants that this DiT does not compute."""
        refused = {"image_dim": None, "added_kv_proj_dim": None, "pos_embed_seq_len": None}
        for key, only in refused.items():
            if config.get(key) is not only:
                raise ValueError(f"transformer config {key}={config[key]!r} is not supported (must be {only})")
        if config.get("qk_norm", "rms_norm_across_heads") != "rms_norm_across_heads":
            raise ValueError(f"transformer config qk_norm={config['qk_norm']!r} must be rms_norm_across_heads")
        patch = config["patch_size"]
        return cls(
            layers=config["num_layers"],
            heads=config["num_attention_heads"],
            head_dim=config["attention_head_dim"],
            ffn_dim=config["ffn_dim"],
            text_dim=config["text_dim"],
            in_channels=config["in_channels"],
            out_channels=config["out_channels"],
            freq_dim=config["freq_dim"],
            patch=(patch[0], patch[1], patch[2]),
            cross_norm=config.get("cross_attn_norm", True),
            eps=config.get("eps", 1e-6),
        )

    def to_diffusers(self) -> dict[str, Any]:
        return {
            "_class_name": "WanTransformer3DModel",
            "patch_size": list(self.patch),
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_dim,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "text_dim": self.text_dim,
            "freq_dim": self.freq_dim,
            "ffn_dim": self.ffn_dim,
            "num_layers": self.layers,
            "cross_attn_norm": self.cross_norm,
            "qk_norm": "rms_norm_across_heads",
            "eps": self.eps,
            "image_dim": None,
            "added_kv_proj_dim": None,
            "rope_max_seq_len": 1024,
            "pos_embed_seq_len": None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class VAEConfig:
    """Mini's causal video autoencoder. Strides are fixed: 4 in time, 8 in space; the first frame stands alone."""

    channels: tuple[int, int, int] = (32, 64, 96)
    latent_channels: int = 16
    encoder_blocks: tuple[int, int, int] = (1, 1, 1)
    decoder_blocks: tuple[int, int, int] = (1, 2, 2)
    latents_mean: tuple[float, ...] = (0.0,) * 16
    latents_std: tuple[float, ...] = (1.0,) * 16

    def __post_init__(self) -> None:
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.latent_channels:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} values, latent_channels is {self.latent_channels}"
                )

    def to_json(self) -> dict[str, Any]:
        return {"_class_name": "CausalVideoVAE", **asdict(self)}

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> VAEConfig:
        known: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if not k.startswith("_")
        }
        return cls(**known)
