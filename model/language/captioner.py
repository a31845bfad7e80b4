"""Video to caption: what recaptioning writes, learned from the procedural world, where the truth is known.

A small encoder reads the latents of mini's autoencoder, a small decoder writes the caption word by word (greedily, so a
clip always gets the same caption). It is trained on `plainly`, the caption that names everything, and `parse` reads a
caption back into the attributes of `world.CLASSES`, so that each can be compared with the truth.

Letters: B batch, C channels, T/H/W latent frames/rows/columns, N patches, L words, D width.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.loading.card import CAPTIONER, folder_digest, read_json
from model.loading.load import load_vae
from model.network.text import word_tokenizer
from model.network.vae import VAE, to_video
from model.world import scene as scenes
from model.world.captions import describe
from model.world.lexicon import glean
from model.world.scene import CLASSES, COLOURS, Scene

WEIGHTS = "model.safetensors"


class NoCaptioner(ValueError):
    """The model has no captioner of its own. Name one that has, or let a vision-language model write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionerConfig:
    words: tuple[str, ...]  # it can say these, a comma and a full stop
    width: int = 128
    heads: int = 4
    encoder_layers: int = 3
    decoder_layers: int = 2
    length: int = 33  # tokens of a caption with the mark for its end
    latent_channels: int = 16
    cells: tuple[int, int, int] = (9, 8, 8)  # most patches along time, height and width

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> CaptionerConfig:
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        return cls(**known)


class Captioner(nn.Module):
    """Latents to words: convolutions to patches of 16 x 16 pixels, a transformer encoder, a causal decoder."""

    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = word_tokenizer(config.words, config.length)
        width, vocabulary = config.width, len(self.tokenizer)
        self.stem = nn.Sequential(
            nn.Conv3d(config.latent_channels, width, 3, stride=(1, 2, 2), padding=1),
            nn.GELU(),
            nn.Conv3d(width, width, 1),
        )
        self.places = nn.ParameterList([nn.Parameter(0.02 * torch.randn(cells, width)) for cells in config.cells])
        layer: dict[str, Any] = {"dim_feedforward": 2 * width, "dropout": 0.0, "activation": "gelu"}
        layer |= {"batch_first": True, "norm_first": True}
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(width, config.heads, **layer),
            config.encoder_layers,
            nn.LayerNorm(width),
            enable_nested_tensor=False,
        )
        self.embed = nn.Embedding(vocabulary, width)
        self.order = nn.Parameter(0.02 * torch.randn(config.length, width))
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(width, config.heads, **layer),
            config.decoder_layers,
            nn.LayerNorm(width),
        )
        self.head = nn.Linear(width, vocabulary)
        nn.init.normal_(self.embed.weight, std=0.02)

    def look(self, latents: Tensor) -> Tensor:
        """latents [B, C, T, H, W], normalised -> what the decoder attends to, [B, N, D]."""
        x = self.stem(latents)  # [B, D, T, H/2, W/2]
        if any(size > most for size, most in zip(x.shape[2:], self.config.cells, strict=True)):
            raise ValueError(
                f"latents of {tuple(latents.shape[2:])} frames, rows and columns make {tuple(x.shape[2:])} patches; "
                f"this captioner has seen at most {self.config.cells}: cut the clip smaller"
            )
        time, row, column = (
            table[:size].view(*shape)
            for table, size, shape in zip(
                self.places,
                x.shape[2:],
                ((1, -1, 1, 1, x.shape[1]), (1, 1, -1, 1, x.shape[1]), (1, 1, 1, -1, x.shape[1])),
                strict=True,
            )
        )
        return self.encoder((x.movedim(1, -1) + time + row + column).flatten(1, 3))

    def say(self, seen: Tensor, words: Tensor) -> Tensor:
        """Scores of each next word, [B, L, V], after the words [B, L] that begin with the padding token."""
        length = words.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=words.device).triu(1)
        said = self.embed(words) + self.order[:length]
        return self.head(self.decoder(said, seen, tgt_mask=later, tgt_is_causal=True))

    def forward(self, latents: Tensor, words: Tensor) -> Tensor:
        return self.say(self.look(latents), words)

    @torch.no_grad()
    def write(self, latents: Tensor) -> list[str]:
        """The captions of latents [B, C, T, H, W], the likeliest word at each place."""
        seen = self.look(latents)
        words = torch.zeros(len(latents), 1, dtype=torch.long, device=latents.device)
        ended = torch.zeros(len(latents), dtype=torch.bool, device=latents.device)
        while not ended.all() and words.shape[1] <= self.config.length:
            chosen = self.say(seen, words)[:, -1].argmax(-1).masked_fill(ended, self.tokenizer.pad_token_id)
            ended |= chosen == self.tokenizer.eos_token_id
            words = torch.cat((words, chosen[:, None]), 1)
        texts = self.tokenizer.batch_decode(words[:, 1:], skip_special_tokens=True)
        return [re.sub(r" ([,.])", r"\1", text) for text in texts]

    def spell(self, captions: Sequence[str]) -> Tensor:
        """Token ids [B, L] that begin with the padding token and end with the mark for the end."""
        ids = self.tokenizer(
            list(captions), padding="max_length", max_length=self.config.length, truncation=True, return_tensors="pt"
        )["input_ids"]
        return torch.cat((torch.zeros(len(ids), 1, dtype=torch.long), ids), 1)


class Reporter:
    """A captioner with the autoencoder that it reads through: frames in, captions out."""

    def __init__(self, model: Path, device: str = "cpu") -> None:
        """`model` is a folder in the diffusers layout with `captioner/` beside `vae/`. Raises NoCaptioner."""
        _check(model)
        self.captioner = load_captioner(model / CAPTIONER).to(device)
        self.vae = load_vae(model, torch.float32, device)
        self.device = device

    @torch.no_grad()
    def captions(self, clips: NDArray[np.uint8]) -> list[str]:
        """One caption for each of the clips [B, T, H, W, 3] of a shape that the captioner has seen."""
        assert isinstance(self.vae, VAE)
        return self.captioner.write(self.vae.encode(to_video(clips, self.device)))


def captioner_digest(model: Path) -> str:
    """sha256 of all that determines its captions: its own files and those of the autoencoder. Raises NoCaptioner."""
    _check(model)
    parts = "".join(folder_digest(model / name) for name in (CAPTIONER, "vae"))
    return hashlib.sha256(parts.encode()).hexdigest()


def _check(model: Path) -> None:
    if not (model / CAPTIONER / WEIGHTS).is_file():
        raise NoCaptioner(f"{model} has no {CAPTIONER}/{WEIGHTS}: name a model that was published with a captioner")


def load_captioner(folder: Path) -> Captioner:
    captioner = Captioner(CaptionerConfig.from_json(read_json(folder / "config.json")))
    captioner.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()})
    return captioner.eval().requires_grad_(False)


def save_captioner(captioner: Captioner, folder: Path) -> None:
    """As bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(captioner.config), indent=2) + "\n")
    save_file({k: v.bfloat16().contiguous() for k, v in captioner.state_dict().items()}, folder / WEIGHTS)


class _First(random.Random):
    """Makes the first choice everywhere; what may be left out is said."""

    def random(self) -> float:
        return 0.0

    def choice(self, seq: Any) -> Any:
        return seq[0]

    def shuffle(self, x: Any) -> None:
        pass


def plainly(scene: Scene, frames: int = 17) -> str:
    """The one caption that names all that can be seen, always in the same words."""
    return describe(_as_seen(scene, frames), _First(), frames=frames)


def truth(scene: Scene, frames: int = 17) -> dict[str, str]:
    """The facts that `parse` should find in the scene's plain caption."""
    labels = scenes.labels(_as_seen(scene, frames), frames)
    return {name: CLASSES[name][index] for name, index in labels.items() if index >= 0}


def _as_seen(scene: Scene, frames: int) -> Scene:
    """An image does not show which of two solids is about to move: they are named in the order of COLOURS."""
    if frames > 1 or scene.motion == "still":
        return scene
    colours = list(COLOURS)
    return replace(scene, solids=tuple(sorted(scene.solids, key=lambda solid: colours.index(solid.colour))))


def parse(caption: str, frames: int = 17) -> dict[str, str]:
    """The attributes (keys and values of `world.CLASSES`) that a caption in the words of the world names.

    What it does not say is left out; of an image (frames=1), motion, camera and direction are.
    """
    hidden = ("motion", "camera", "direction") if frames == 1 else ()
    return {name: value for name, value in glean(caption).classes().items() if name not in hidden}
