"""Small random models in the diffusers layout, for tests that need a network but not a picture."""

from __future__ import annotations

from pathlib import Path

import torch

from model import checker
from model.captioner import Captioner, CaptionerConfig, save_captioner
from model.config import DiTConfig, VAEConfig
from model.dit import DiT
from model.engine import ClipSpec
from model.text import TextEncoder, small_encoder, word_tokenizer
from model.vae import VAE
from model.weights import CAPTIONER, save_model

DEFAULTS = {
    "name": "tiny",
    "max_prompt_tokens": 12,
    "width": 48,
    "height": 32,
    "frames": 9,
    "fps": 8,
    "steps": 4,
    "guidance": 3.0,
    "solver": "ab2",
    "shift": 3.0,
}
CLIP = ClipSpec(
    clip_id="one",
    prompt="a red ball moves left",
    negative_prompt="",
    seed=7,
    **{name: value for name, value in DEFAULTS.items() if name not in ("name", "max_prompt_tokens")},
)
WORDS = ["a", "red", "green", "blue", "ball", "cube", "moves", "left", "right", "slowly"]


def tiny_model(
    path: Path, *, heads: int = 4, head_dim: int = 12, layers: int = 2, dtype: torch.dtype | None = None
) -> Path:
    """Writes a model folder and returns it. All its weights are random, the head's too: untrained it would say 0."""
    torch.manual_seed(0)
    config = DiTConfig(layers=layers, heads=heads, head_dim=head_dim, ffn_dim=8 * head_dim, text_dim=16, freq_dim=32)
    dit = DiT(config)
    dit.init_weights()
    for parameter in dit.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    length = int(DEFAULTS["max_prompt_tokens"])
    text = TextEncoder(small_encoder(5 + len(WORDS), 16, 1, 2), word_tokenizer(WORDS, length), length)
    vae = VAE(VAEConfig(channels=(8, 8, 8)))
    save_model(path, dit=dit, text=text, vae=vae, defaults=DEFAULTS, dtype=dtype)
    return path


def tiny_captioner(model: Path) -> None:
    """Gives the model a captioner. It is random too: it says something, always the same of the same clip."""
    torch.manual_seed(0)
    config = CaptionerConfig(words=tuple(WORDS), width=16, heads=2, encoder_layers=1, decoder_layers=1, length=8)
    save_captioner(Captioner(config), model / CAPTIONER)


def tiny_judge(path: Path) -> Path:
    """Writes a judge with random weights, who says something, always the same of the same clip."""
    torch.manual_seed(1)
    checker.save(checker.Checker(), VAE(VAEConfig(channels=(8, 8, 8))), path)
    return path
