"""Looks at a clip of the procedural world and says what is to be seen: the measure of "it does what its prompt says".

A small network over the latents of mini's autoencoder, trained on rendered clips and their exact descriptions, held-out
combinations among them. It sees pixels only through that autoencoder, as a generated clip has passed through it too.
What it says of real clips after that round trip is its own proof, and stands beside every score.

    python -m model.score.judge --work DIR --out model/weights/checker

trains it, after `python -m model.train` has left its latents in DIR.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.loading.card import WEIGHTS as VAE_WEIGHTS
from model.network.vae import VAE, PositionNorm, to_video
from model.train.autoencoder import trained_vae
from model.train.clips import scene_of
from model.train.config import TrainConfig
from model.train.data import BUCKETS
from model.train.latents import latents_of
from model.world.render import render
from model.world.scene import CLASSES, Scene, labels, sample_scene

SHAPE = BUCKETS[0].shape  # 64x64 with 17 frames: what every score is taken at
CELLS = (5, 8, 8)  # its latent frames, rows and columns
NARROW, WIDE = 64, 128
UNSURE = 0.05  # standard deviation of the noise in training, at most; with 0.15 a spin drowns in it
HELD_STILL = 2000  # clips of one frame that stands, which is how a solid is compared before and after something
PASSING = 2000  # the same of scenes in which one solid passes behind another
STOPPED = 1500  # and of spins: without them a judge says of any lone cube before a standing camera that it spins
UNSEEN = 2000  # clips of held-out combinations, which the generator never sees and its judge must know
WEIGHTS = "checker.safetensors"
T = TypeVar("T")


class Mixer(nn.Module):
    """A residual block: spatial, then temporal convolution. It may look ahead, unlike the autoencoder's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            PositionNorm(channels),
            nn.Conv3d(channels, channels, (1, 3, 3), padding=(0, 1, 1)),
            nn.SiLU(),
            nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0)),
            nn.SiLU(),
            nn.Conv3d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Checker(nn.Module):
    """Letters: B clips, A attributes (`world.CLASSES`), D features."""

    def __init__(self, latent_channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv3d(latent_channels, NARROW, 1)
        self.place = nn.Parameter(torch.zeros(1, NARROW, *CELLS))
        self.fine = nn.Sequential(Mixer(NARROW), Mixer(NARROW))
        self.down = nn.Conv3d(NARROW, WIDE, (1, 2, 2), (1, 2, 2))
        self.coarse = nn.Sequential(Mixer(WIDE), Mixer(WIDE), Mixer(WIDE), PositionNorm(WIDE))
        self.questions = nn.Parameter(torch.randn(1, len(CLASSES), WIDE))
        self.look = nn.MultiheadAttention(WIDE, 4, batch_first=True)
        self.answers = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(2 * WIDE, WIDE), nn.SiLU(), nn.Linear(WIDE, len(classes)))
                for name, classes in CLASSES.items()
            }
        )

    def features(self, latents: Tensor) -> Tensor:
        """latents [B, 16, 5, 8, 8] -> [B, A, D]: what each attribute is read from."""
        cells = self.coarse(self.down(self.fine(self.stem(latents) + self.place))).flatten(2).mT
        seen: Tensor = self.look(self.questions.expand(len(cells), -1, -1), cells, cells, need_weights=False)[0]
        return torch.cat((seen, cells.mean(1, keepdim=True).expand_as(seen)), -1)

    def forward(self, latents: Tensor) -> dict[str, Tensor]:
        """latents [B, 16, 5, 8, 8] -> for each attribute the scores [B, classes]."""
        seen = self.features(latents)
        return {name: answer(seen[:, k]) for k, (name, answer) in enumerate(self.answers.items())}

    @torch.no_grad()
    def look_at(self, latents: Tensor) -> dict[str, Tensor]:
        """latents [B, 16, 5, 8, 8] -> for each attribute the index [B] of the class it shows."""
        return {name: scores.argmax(-1) for name, scores in self(latents).items()}


def load_checker(folder: Path) -> Checker:
    checker = Checker()
    checker.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()})
    return checker.eval().requires_grad_(False)


def labels_of(scenes: list[Scene]) -> dict[str, Tensor]:
    """For each attribute the index [B] of its class; -1 where a scene has none."""
    rows = [labels(scene) for scene in scenes]
    return {name: torch.tensor([row[name] for row in rows]) for name in CLASSES}


def unseen_latents(config: TrainConfig) -> tuple[Tensor, list[Scene]]:
    """Encoded clips of held-out combinations, rendered once and kept beside the others."""
    scenes = [sample_scene(random.Random(f"{config.seed}/checker/{k}"), unseen=True) for k in range(UNSEEN)]
    return _encoded(config, "held_out", scenes, filmed), scenes


def still_latents(config: TrainConfig) -> tuple[Tensor, list[Scene]]:
    """Encoded clips that show the first or the last frame of a scene all the time, and the scene that this is."""
    kinds: dict[str, tuple[int, Callable[[Scene], bool]]] = {
        # Of two of which one bounces it is a matter of chance which side is whose.
        "still": (HELD_STILL, lambda s: s.motion != "bounce" or len(s.solids) == 1),
        "passing": (PASSING, lambda s: s.motion == "behind"),
        "spin": (STOPPED, lambda s: s.motion == "spin"),
    }
    latents: list[Tensor] = []
    scenes: list[Scene] = []
    for kind, (count, wanted) in kinds.items():
        some = [scene_with(random.Random(f"{config.seed}/{kind}/{k}"), wanted) for k in range(count)]
        latents.append(_encoded(config, f"held_{kind}", [(scene, k % 2) for k, scene in enumerate(some)], _stopped))
        scenes += [held_still(scene, k % 2) for k, scene in enumerate(some)]
    return torch.cat(latents), scenes


def scene_with(rng: random.Random, wanted: Callable[[Scene], bool]) -> Scene:
    """The next scene of one kind."""
    while not wanted(scene := sample_scene(rng)):
        pass
    return scene


def held_still(scene: Scene, end: int) -> Scene:
    """Classes of the first (end=0) or last (1) frame of a scene when it stands: two solids are named from the left."""
    turned = scene.motion == "behind" and (scene.direction > 0) == bool(end)
    solids = scene.solids[::-1] if turned else scene.solids
    return replace(scene, solids=solids, motion="still", camera="static")


def filmed(scenes: Sequence[Scene]) -> Tensor:
    """Real clips [B, 3, T, H, W] in -1..1."""
    clips = [render(s, width=SHAPE.width, height=SHAPE.height, frames=SHAPE.frames) for s in scenes]
    return to_video(np.stack(clips))


def _stopped(shown: Sequence[tuple[Scene, int]]) -> Tensor:
    clips = filmed([scene for scene, _ in shown])
    frames = torch.stack([clip[:, -end] for clip, (_, end) in zip(clips, shown, strict=True)])
    return frames[:, :, None].expand_as(clips)


def _encoded(config: TrainConfig, name: str, shown: Sequence[T], film: Callable[[Sequence[T]], Tensor]) -> Tensor:
    path = config.work / "latents" / f"{name}.safetensors"
    if not path.exists():
        vae = trained_vae(config)
        latents: list[Tensor] = []
        for first in range(0, len(shown), 20):
            clips = film(shown[first : first + 20]).to(config.device)
            with torch.no_grad():
                latents.append(vae.encode(clips).half().cpu().contiguous())
        save_file({"latents": torch.cat(latents).contiguous()}, path)
    return load_file(path)["latents"]


def train(config: TrainConfig, out: Path, steps: int, batch: int = 64, start: Path | None = None) -> None:
    """Cross-entropy over all attributes; the first `held_back` clips are for validation. Writes `out`.

    start: the folder of a judge whose weights are the first ones.
    """
    bucket = config.buckets[0]
    latents = latents_of(config, bucket)
    seen = latents, [scene_of(config.seed, bucket, k) for k in range(len(latents))]
    unseen, still = unseen_latents(config), still_latents(config)
    parts = (seen, unseen, still, still)  # those that stand make up three tenths
    latents = torch.cat([part for part, _ in parts])
    truth = labels_of([scene for _, scenes in parts for scene in scenes])
    torch.manual_seed(config.seed)
    checker = Checker().to(config.device) if start is None else load_checker(start).to(config.device)
    checker.train().requires_grad_()
    optimizer = torch.optim.AdamW(checker.parameters(), 1e-3, weight_decay=0.05, fused=True)
    generator = torch.Generator().manual_seed(config.seed)
    started = time.monotonic()
    for step in range(steps):
        rate = 2e-3 * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = torch.randint(config.held_back, len(latents), (batch,), generator=generator)
        x = latents[chosen].float()
        x = x + UNSURE * torch.rand(batch, 1, 1, 1, 1, generator=generator) * torch.randn(x.shape, generator=generator)
        said = checker(x.to(config.device))
        losses = [
            F.cross_entropy(said[name], truth[name][chosen].to(config.device), ignore_index=-1, label_smoothing=0.02)
            for name in said
            if (truth[name][chosen] >= 0).any()
        ]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(checker.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 250 == 0 or step + 1 == steps:
            right = accuracy(checker, latents[: config.held_back], {n: t[: config.held_back] for n, t in truth.items()})
            row = {"step": step + 1, "of": steps, "seconds": round(time.monotonic() - started), "loss": loss.item()}
            print(json.dumps(row | right), flush=True)
            save(checker, trained_vae(config), out)


def save(checker: Checker, eyes: VAE, out: Path) -> None:
    """Both networks in bfloat16. The autoencoder lies where `load_vae` looks: another's latents would mean nothing."""
    (out / "vae").mkdir(parents=True, exist_ok=True)
    (out / "vae" / "config.json").write_text(json.dumps(eyes.config.to_json(), indent=2) + "\n", encoding="utf-8")
    for module, file in ((checker, out / WEIGHTS), (eyes, out / "vae" / VAE_WEIGHTS)):
        tensors = {name: tensor.detach().cpu().bfloat16() for name, tensor in module.state_dict().items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def accuracy(checker: Checker, latents: Tensor, truth: dict[str, Tensor]) -> dict[str, float]:
    """The share of clips whose attribute the checker names rightly, of those that have it."""
    device = next(checker.parameters()).device
    said = checker.look_at(latents.float().to(device))
    return {name: round((said[name].cpu() == truth[name])[truth[name] >= 0].float().mean().item(), 4) for name in truth}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m model.score.judge", description="Trains the judge of mini's clips."
    )
    parser.add_argument("--work", type=Path, required=True, help="the folder that model.train worked in")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="a judge to go on from")
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    train(TrainConfig(work=given.work, device=given.device), given.out, given.steps, start=given.start)


if __name__ == "__main__":
    main()
