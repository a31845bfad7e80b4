"""From a model folder to networks, and back into a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.config import VAEConfig
from model.loading.card import TRANSFORMER, WEIGHTS, card, read_json

if TYPE_CHECKING:
    import torch

    from model.network.dit import DiT
    from model.network.text import TextEncoder
    from model.network.vae import VAE, WanVAE


def load_dit(path: Path, dtype: torch.dtype, device: str = "cpu", part: str = TRANSFORMER) -> DiT:
    """The whole transformer on one device, in evaluation mode, its weights in `dtype` (`set_type`): adapters merged,
    and what an engine keeps in 8 bits rounded as there. Partitioned loading is `model.parallel.partition`'s."""
    from model.loading.tensors import WeightFiles, empty, read_parameters
    from model.network.dit import set_type

    dit = empty(path, part)
    set_type(dit, dtype)
    dit.to_empty(device=device)
    with WeightFiles(path, part) as files:
        read_parameters(dit, files)
    return dit


def load_vae(path: Path, dtype: torch.dtype, device: str = "cpu") -> VAE | WanVAE:
    """The autoencoder that the folder names: ours, or diffusers' AutoencoderKLWan."""
    config = read_json(path / "vae" / "config.json")
    if config["_class_name"] == "AutoencoderKLWan":
        from diffusers import AutoencoderKLWan

        from model.network.vae import WanVAE

        inner: Any = AutoencoderKLWan.from_pretrained(
            path / "vae", torch_dtype=dtype, use_safetensors=True, local_files_only=True
        )
        return WanVAE(inner.to(device).eval().requires_grad_(False))
    if config["_class_name"] != "CausalVideoVAE":
        raise ValueError(
            f"{path / 'vae/config.json'}: _class_name={config['_class_name']!r} is not an autoencoder known here"
        )
    from safetensors.torch import load_file

    from model.network.vae import VAE

    vae = VAE(VAEConfig.from_json(config))
    vae.load_state_dict(load_file(path / "vae" / WEIGHTS))
    return vae.to(device=device, dtype=dtype).eval().requires_grad_(False)


def load_text(path: Path, dtype: torch.dtype, device: str = "cpu") -> TextEncoder:
    from model.network.text import load_text_encoder

    return load_text_encoder(path, card(path.resolve()).max_prompt_tokens, dtype, device)


def save_model(
    path: Path, *, dit: DiT, text: TextEncoder, vae: VAE, defaults: Mapping[str, Any], dtype: torch.dtype | None = None
) -> None:
    """Writes a model folder in the diffusers layout; `defaults` goes to rushes.json. Tensors are saved as `dtype`."""
    from safetensors.torch import save_file

    def write(name: str, config: Mapping[str, Any]) -> None:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in module.state_dict().items()}

    write("rushes.json", defaults)
    write(
        "model_index.json",
        {
            "_class_name": "WanPipeline",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "UMT5EncoderModel"],
            "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
            "transformer": ["diffusers", "WanTransformer3DModel"],
            "vae": ["model.vae", "VAE"],
        },
    )
    write(
        "scheduler/scheduler_config.json",
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": defaults["shift"]},
    )
    write("transformer/config.json", dit.config.to_diffusers())
    save_file(tensors(dit), path / "transformer" / WEIGHTS)
    write("vae/config.json", vae.config.to_json())
    save_file(tensors(vae), path / "vae" / WEIGHTS)
    encoder: Any = text.encoder
    kept = encoder.dtype
    encoder.to(dtype or kept).save_pretrained(path / "text_encoder")
    encoder.to(kept)
    text.tokenizer.save_pretrained(path / "tokenizer")
