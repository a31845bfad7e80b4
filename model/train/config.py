"""The configuration of a training: sizes, steps, rates, and that of mini itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from model.config import DiTConfig
from model.network.text import split_words
from model.train import data
from model.train.data import BUCKETS, FPS, Bucket
from model.world.captions import vocabulary

PROMPT_TOKENS = 40
SPOKEN = tuple(vocabulary())
WORDS = 8000  # of a data set's captions that its text encoder learns, the most frequent ones
FEWEST = 8  # clips of one shape that are worth a training
DEFAULTS = {
    "name": "mini",
    "max_prompt_tokens": PROMPT_TOKENS,
    "width": 64,
    "height": 64,
    "frames": 17,
    "fps": FPS,
    "steps": 25,
    "guidance": 4.0,
    "solver": "ab2",
    "shift": 2.0,
}
SAMPLING: dict[str, Any] = {name: DEFAULTS[name] for name in ("steps", "guidance", "solver", "shift")}
MINI = DiTConfig(layers=8, heads=4, head_dim=64, ffn_dim=1024, text_dim=192)
STAGES = (0, 1, 2)  # of ZeRO


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """All that determines a training run."""

    work: Path
    seed: int = 0
    threads: int = 2
    device: str = "cpu"
    bfloat16: bool = False  # on a CPU without instructions of its own for it, half as fast as float32
    vae_steps: int = 2400
    decoder_steps: int = 1200
    dit_steps: int = 4500
    captioner_steps: int = 2000
    vae_rate: float = 2e-3
    decoder_rate: float = 6e-4
    dit_rate: float = 1e-3
    text_rate: float = 3e-4  # at the transformer's, the encoder's constant part grows until it drowns the words
    captioner_rate: float = 1.5e-3
    clip: float = 1.0  # the norm of the transformer's gradient at most
    average: float = 0.998  # of the exponential moving average that is published
    buckets: tuple[Bucket, ...] = BUCKETS  # the autoencoder learns from the first
    dit: DiTConfig = MINI
    rank: int = 0  # this process, of `ranks` that divide every batch of the transformer's
    ranks: int = 1
    zero: int = 0  # stage of DeepSpeed's ZeRO, which divides AdamW over the ranks too; 0: every rank has all of it
    chunk: int = 250  # clips a file
    held_back: int = 128  # the first clips of every shape are for validation, never trained on
    every: int = 250  # steps between two checkpoints
    captions: Mapping[str, Sequence[str]] | None = None  # of every clip by shape; None: the world's
    words: Sequence[str] = SPOKEN  # that the text encoder knows

    def __post_init__(self) -> None:
        if self.zero not in STAGES:
            raise ValueError(
                f"zero={self.zero} must be one of {', '.join(map(str, STAGES))}: every rank keeps whole weights and "
                "their average, which stage 3 would have to divide"
            )

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bfloat16)


def train_config(work: Path, settings: Mapping[str, Any]) -> TrainConfig:
    """The training with these settings, as JSON gives them; of a data set if the work folder holds the list of one.

    Raises ValueError for settings that no training has.
    """
    known = {f.name for f in fields(TrainConfig)} - {"work", "rank", "ranks", "captions", "words"}
    if unknown := settings.keys() - known:
        raise ValueError(f"recipe: {min(unknown)!r} must be one of: {', '.join(sorted(known))}")
    values = dict(settings)
    if "buckets" in values:
        values["buckets"] = tuple(Bucket.from_json(bucket) for bucket in values["buckets"])
    if "dit" in values:
        dit: dict[str, Any] = {name: tuple(v) if name == "patch" else v for name, v in values["dit"].items()}
        values["dit"] = DiTConfig(**dit)
    config = TrainConfig(work=work, **values)
    return of_data(config) if (work / data.LIST).exists() else config


def of_data(config: TrainConfig) -> TrainConfig:
    """The training on the clips listed in its work folder, the commonest shape first. Raises BadData for too few."""
    _, cuts = data.load_list(config.work / data.LIST)
    counts = Counter(cut.shape for cut in cuts)
    batches = {b.shape: b.batch for b in config.buckets}
    buckets = tuple(
        Bucket(shape=shape, clips=count, share=count / len(cuts), batch=min(count, batches.get(shape, 8)))
        for shape, count in counts.most_common()
        if count >= FEWEST
    )
    if not buckets:
        raise data.BadData(f"no shape has the {FEWEST} clips that training needs: {dict(counts) or 'there are none'}")
    captions = {b.name: [cut.caption for cut in cuts if cut.shape == b.shape] for b in buckets}
    spoken = Counter(word for some in captions.values() for text in some for word in split_words(text))
    return replace(
        config,
        buckets=buckets,
        captions=captions,
        words=[word for word, _ in spoken.most_common(WORDS)],
        held_back=min(config.held_back, min(b.clips for b in buckets) // 4),
    )
