"""Training the autoencoder, then its decoder, and encoding every clip once."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from model.config import VAEConfig
from model.network.vae import STRIDE_TIME, VAE, to_video
from model.train.clips import clips_of
from model.train.config import TrainConfig
from model.train.latents import end_lengths, ends_path, latents_of, sampling_weights
from model.train.loop import Checkpoint, follow, part_of, run, set_rate, write

WITH_ENDS = 9600  # clips of which the ends are encoded once more, behind a standing picture
DECODED = 6  # clips a step of the decoder that goes on alone


def train_vae(config: TrainConfig) -> None:
    """L1 + MSE + a little KL on 1-, 9- and 17-frame crops; the peak rate decays along a cosine."""
    chunks, longest = clips_of(config, config.buckets[0]), config.buckets[0].shape.frames
    torch.manual_seed(config.seed)
    vae = in_memory_order(VAE(VAEConfig())).to(config.device)
    optimizer = torch.optim.AdamW(vae.parameters(), config.vae_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    checkpoint = Checkpoint(config.work / "vae.safetensors", {"vae": vae}, optimizer)
    count = sum(len(c) for c in chunks)

    def batch(step: int) -> Tensor:
        rng = np.random.default_rng((config.seed, 1, step))
        size, frames = (
            (24, 1) if step % 12 == 11 else (8, longest // 2 + 1) if step < 0.6 * config.vae_steps else (4, longest)
        )
        crops = []
        for clip in rng.integers(config.held_back, count, size):
            start = rng.integers(0, longest - frames + 1)
            crops.append(chunks[clip // config.chunk][clip % config.chunk, start : start + frames])
        return to_video(np.stack(crops), config.device)

    def learn(step: int) -> dict[str, float]:
        share = step / config.vae_steps
        set_rate(optimizer, config.vae_rate * min(1, (step + 1) / 60) * (0.5 + 0.5 * math.cos(math.pi * share)) + 1e-5)
        video = batch(step)
        generator = torch.Generator().manual_seed(step)
        with config.autocast():
            mean, log_variance = vae.posterior(video)
            sample = torch.randn(mean.shape, generator=generator).to(mean)
            restored = vae.reconstruct(mean + sample * (0.5 * log_variance).exp())
        error = restored - video
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = error.abs().mean() + error.square().mean() + 2e-4 * kl
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        return {"psnr": psnr(error.detach()), "kl": kl.item(), "loss": loss.item()}

    def validate() -> dict[str, float]:
        with torch.no_grad(), config.autocast():
            video = to_video(np.array(chunks[0][: min(32, config.held_back)]), config.device)
            restored = torch.cat([vae.reconstruct(vae.posterior(v)[0]) for v in video.split(8)])
        return {"held_out_psnr": psnr(restored.clamp(-1, 1) - video)}

    run(config, "vae", config.vae_steps, checkpoint, learn, validate)


def in_memory_order(vae: VAE) -> VAE:
    """Convolution weights with their channels last, as oneDNN's bfloat16 kernels want them."""
    for parameter in vae.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    return vae


def psnr(error: Tensor) -> float:
    """In decibels, for values in -1..1."""
    return 10 * math.log10(4 / max(error.square().mean().item(), 1e-12))


def trained_vae(config: TrainConfig, *, finished: bool = True) -> VAE:
    """The autoencoder of the last checkpoint; finished: with the decoder that went on alone, once there is one."""
    sizes = VAEConfig()
    spread = config.work / "latents" / "spread.json"
    if spread.exists():
        sizes = replace(sizes, **{k: tuple(v) for k, v in json.loads(spread.read_text()).items()})
    vae = VAE(sizes)
    vae.load_state_dict(part_of(load_file(config.work / "vae.safetensors"), "vae"))
    if finished and (alone := config.work / "decoder.safetensors").exists():
        vae.decoder.load_state_dict(part_of(load_file(alone), "average"))
    return in_memory_order(vae).to(config.device).eval().requires_grad_(False)


def train_decoder(config: TrainConfig) -> None:
    """The decoder alone, from where the autoencoder's training left it, on the latents of the first shape.

    The latents do not change, so networks trained on them stay true. Published is the running average of the weights.
    """
    bucket = config.buckets[0]
    chunks, latents = clips_of(config, bucket), latents_of(config, bucket)
    clips = range(config.held_back, len(latents))
    weights = sampling_weights(config, bucket, clips)
    average = trained_vae(config, finished=False)
    vae = copy.deepcopy(average)
    optimizer = torch.optim.AdamW(
        vae.decoder.requires_grad_().parameters(), config.decoder_rate, betas=(0.9, 0.98), fused=True
    )
    modules: dict[str, nn.Module] = {"decoder": vae.decoder, "average": average.decoder}
    checkpoint = Checkpoint(config.work / "decoder.safetensors", modules, optimizer)

    def error_of(vae: VAE, chosen: Sequence[int]) -> Tensor:
        video = np.stack([chunks[k // config.chunk][k % config.chunk] for k in chosen])
        plain = latents[list(chosen)].float().to(config.device) * vae.std + vae.mean
        with config.autocast():
            return vae.reconstruct(plain) - to_video(video, config.device)

    def learn(step: int) -> dict[str, float]:
        share = step / config.decoder_steps
        set_rate(optimizer, config.decoder_rate * min(1, (step + 1) / 40) * (0.5 + 0.5 * math.cos(math.pi * share)))
        rng = random.Random(f"{config.seed}/decoder/{step}")
        error = error_of(vae, rng.choices(clips, cum_weights=weights, k=DECODED))
        loss = 0.5 * error.abs().mean() + error.square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        optimizer.step()
        follow(average.decoder, vae.decoder, step, 0.99)
        return {"psnr": psnr(error.detach()), "loss": loss.item()}

    @torch.no_grad()
    def validate() -> dict[str, float]:
        each = [psnr(error_of(average, [k])) for k in range(min(64, config.held_back))]
        return {"held_out_psnr": sum(each) / len(each)}

    run(config, "decoder", config.decoder_steps, checkpoint, learn, validate)


def encode_latents(config: TrainConfig) -> None:
    """Writes latents/SHAPE.safetensors (float16, normalised) for every shape, and spread.json."""
    folder = config.work / "latents"
    folder.mkdir(exist_ok=True)
    vae = trained_vae(config)

    @torch.no_grad()
    def encode(clips: NDArray[np.uint8]) -> Tensor:
        with config.autocast():
            some = (clips[k : k + 25] for k in range(0, len(clips), 25))
            return torch.cat([vae.posterior(to_video(np.array(c), config.device))[0].cpu() for c in some])

    if not (folder / "spread.json").exists():
        sample = torch.cat([encode(chunk) for chunk in clips_of(config, config.buckets[0])[:8]])
        mean, std = sample.mean((0, 2, 3, 4)), sample.std((0, 2, 3, 4))
        (folder / "spread.json").write_text(json.dumps({"latents_mean": mean.tolist(), "latents_std": std.tolist()}))
    spread = json.loads((folder / "spread.json").read_text())
    mean, std = (torch.tensor(spread[k]).view(1, -1, 1, 1, 1) for k in ("latents_mean", "latents_std"))
    for bucket in config.buckets:
        path = folder / f"{bucket.name}.safetensors"
        if path.exists():
            continue
        latents = torch.cat([((encode(chunk) - mean) / std).half() for chunk in clips_of(config, bucket)])
        write({"latents": latents}, path)
        print(f"latents {bucket.name} {tuple(latents.shape)}", flush=True)
    bucket = config.buckets[0]
    if not ends_path(config, bucket).exists() and (lengths := end_lengths(bucket)):
        ends: list[Tensor] = []
        for number, chunk in enumerate(clips_of(config, bucket)[: -(-WITH_ENDS // config.chunk)]):
            clips = np.array(chunk)
            for k, clip in enumerate(clips, number * config.chunk):
                border = len(clip) - STRIDE_TIME * lengths[k % len(lengths)]
                clip[:border] = clip[border]
            ends.append(((encode(clips) - mean) / std)[:, :, -len(lengths) :].half())
        write({"ends": torch.cat(ends)}, ends_path(config, bucket))
