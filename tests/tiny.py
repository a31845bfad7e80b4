"""Small random models in the diffusers layout, for tests that need a network but not a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from flows.library.variants import Lora, write_variant
from model.config import DiTConfig, VAEConfig
from model.engine.clip import ClipSpec
from model.language.captioner import Captioner, CaptionerConfig, save_captioner
from model.loading.card import CAPTIONER, covered_files
from model.loading.load import load_dit, save_model
from model.media.windows import stand_still, times_of
from model.network.dit import DiT
from model.network.text import TextEncoder, small_encoder, word_tokenizer
from model.network.vae import VAE
from model.score import judge

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
LORA_LAYERS = [  # that tensor parallelism divides by rows, by columns, and one that it does not divide
    "blocks.0.attn1.to_q",
    "blocks.0.attn1.to_out.0",
    "blocks.1.attn2.to_v",
    "blocks.1.ffn.net.0.proj",
    "blocks.1.ffn.net.2",
    "condition_embedder.time_proj",
]
WORDS = ["a", "red", "green", "blue", "ball", "cube", "moves", "left", "right", "slowly"]


def hold(predict: Callable[[Tensor, Tensor], Tensor], known: Sequence[bool]) -> Callable[[Tensor, float], Tensor]:
    """The velocity of latents [B, C, T, H, W], all at one time, of which the known frames [T] stand still.

    `predict` takes latents and times, [B] where nothing is known and [B, T] else.
    """

    def velocity(x: Tensor, now: float) -> Tensor:
        times = x.new_tensor([times_of(now, known)] * len(x))
        return stand_still(predict(x, times if any(known) else times[:, 0]), known)

    return velocity


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


def tiny_wan(path: Path, release: str) -> Path:
    """Writes a folder as diffusers saves one of Wan's releases, tiny and random: "2.1", "2.2-ti2v" or "2.2-a14b"."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    torch.manual_seed(0)
    channels, space = (48, 16) if release == "2.2-ti2v" else (16, 8)
    residual = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "decoder_base_dim": 8}
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=channels,
        num_res_blocks=1,
        latents_mean=torch.linspace(-0.5, 0.5, channels).tolist(),
        latents_std=torch.linspace(0.5, 2.0, channels).tolist(),
        scale_factor_spatial=space,
        **(residual if release == "2.2-ti2v" else {}),
    )

    def transformer() -> WanTransformer3DModel:
        network = WanTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=12,
            in_channels=channels,
            out_channels=channels,
            text_dim=16,
            freq_dim=32,
            ffn_dim=96,
            num_layers=2,
        )
        for parameter in network.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        return network

    experts = release == "2.2-a14b"
    WanPipeline(
        transformer=transformer(),
        transformer_2=transformer() if experts else None,
        vae=vae,
        text_encoder=small_encoder(5 + len(WORDS), 16, 1, 2),
        tokenizer=word_tokenizer(WORDS, 512),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        boundary_ratio=0.875 if experts else None,
        expand_timesteps=release == "2.2-ti2v",
    ).save_pretrained(path)
    return path


def tiny_captioner(model: Path) -> None:
    """Gives the model a captioner. It is random too: it says something, always the same of the same clip."""
    torch.manual_seed(0)
    config = CaptionerConfig(words=tuple(WORDS), width=16, heads=2, encoder_layers=1, decoder_layers=1, length=8)
    save_captioner(Captioner(config), model / CAPTIONER)


def tiny_judge(path: Path) -> Path:
    """Writes a judge with random weights, who says something, always the same of the same clip."""
    torch.manual_seed(1)
    judge.save(judge.Checker(), VAE(VAEConfig(channels=(8, 8, 8))), path)
    return path


def tiny_lora(
    path: Path,
    model: Path,
    layers: Sequence[str] = LORA_LAYERS,
    *,
    rank: int = 3,
    prefix: str = "transformer.",
    alpha: float | None = None,
    metadata: Mapping[str, Any] | None = None,
    seed: int = 2,
) -> Path:
    """Writes a random adapter for layers of the model's transformer, strong enough to be seen."""
    random = torch.Generator().manual_seed(seed)
    shapes = {name: tuple(tensor.shape) for name, tensor in load_dit(model, torch.float32).state_dict().items()}
    tensors: dict[str, torch.Tensor] = {}
    for layer in layers:
        rows, columns = shapes[f"{layer}.weight"]
        tensors[f"{prefix}{layer}.lora_A.weight"] = 0.3 * torch.randn(rank, columns, generator=random)
        tensors[f"{prefix}{layer}.lora_B.weight"] = 0.3 * torch.randn(rows, rank, generator=random)
        if alpha is not None:
            tensors[f"{prefix}{layer}.alpha"] = torch.tensor(alpha)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None)
    return path


def variant(base: Path, folder: Path, *loras: str, weights: str | None = None) -> Path:
    """Writes the folder of a variant; adapters are given as on the command line."""
    write_variant(base, covered_files(base), folder, [Lora.parse(each) for each in loras], weights)
    return folder
