"""Training mini's captioner: latents to captions, where the truth is known."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.language.captioner import Captioner, CaptionerConfig, parse, plainly, truth
from model.world import captions as world_captions
from model.world.scene import CLASSES

if TYPE_CHECKING:
    from model.train.config import TrainConfig


def train_captioner(config: TrainConfig) -> None:
    """Cross entropy of the plain captions, on the latents of the training clips of every shape."""
    from model.train.clips import scene_of
    from model.train.latents import latents_of
    from model.train.loop import Checkpoint, run

    latents = {bucket.name: latents_of(config, bucket) for bucket in config.buckets}
    torch.manual_seed(config.seed)
    captioner = Captioner(CaptionerConfig(words=tuple(world_captions.vocabulary()))).to(config.device)
    spelt = {
        b.name: captioner.spell(
            [plainly(scene_of(config.seed, b, k), b.shape.frames) for k in range(len(latents[b.name]))]
        )
        for b in config.buckets
    }
    rate, steps = config.captioner_rate, config.captioner_steps
    optimizer = torch.optim.AdamW(captioner.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    checkpoint = Checkpoint(config.work / "captioner.safetensors", {"captioner": captioner}, optimizer)
    shares = [b.share for b in config.buckets]

    def learn(step: int) -> dict[str, float]:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 100, 2.5 * (1 - step / steps)) + 1e-6
        rng = random.Random(f"{config.seed}/captioner/{step}")
        bucket = rng.choices(config.buckets, shares)[0]
        stock = latents[bucket.name]
        chosen = [rng.randrange(config.held_back, len(stock)) for _ in range(2 * bucket.batch)]
        words = spelt[bucket.name][chosen].to(config.device)
        # On a CPU the fused attention's backward pass alone would take a third of the step.
        with sdpa_kernel(SDPBackend.MATH), config.autocast():
            scores = captioner(stock[chosen].float().to(config.device), words[:, :-1])
        unsaid = captioner.tokenizer.pad_token_id  # what follows the end
        loss = F.cross_entropy(scores.float().flatten(0, 1), words[:, 1:].flatten(), ignore_index=unsaid)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(captioner.parameters(), 1.0)
        optimizer.step()
        return {"loss": loss.item()}

    def validate() -> dict[str, float]:
        captioner.eval()
        pairs: list[tuple[dict[str, str], dict[str, str]]] = []
        for bucket in config.buckets:
            frames = bucket.shape.frames
            texts = captioner.write(latents[bucket.name][: config.held_back].float().to(config.device))
            scenes = (scene_of(config.seed, bucket, k) for k in range(len(texts)))
            pairs += [(parse(text, frames), truth(scene, frames)) for text, scene in zip(texts, scenes, strict=True)]
        captioner.train()
        return {f"held_out_{name}": share for name, share in exact(pairs).items()}

    run(config, "captioner", steps, checkpoint, learn, validate)


def trained_captioner(config: TrainConfig) -> Captioner:
    """The weights of the last checkpoint."""
    from model.train.loop import part_of

    captioner = Captioner(CaptionerConfig(words=tuple(world_captions.vocabulary())))
    captioner.load_state_dict(part_of(load_file(config.work / "captioner.safetensors"), "captioner"))
    return captioner


def exact(pairs: Sequence[tuple[Mapping[str, str], Mapping[str, str]]]) -> dict[str, float]:
    """Of pairs (said, true): of the clips with an attribute, the share that says it rightly; and of clips all right."""
    names = [name for name in CLASSES if any(name in true for _, true in pairs)]
    shares: dict[str, float] = {}
    for name in names:
        right = [said.get(name) == true[name] for said, true in pairs if name in true]
        shares[name] = sum(right) / len(right)
    return shares | {"all": sum(said == true for said, true in pairs) / len(pairs)}
