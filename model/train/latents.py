"""Latents of training clips: where they lie, and how often each length is drawn."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from model.network.vae import STRIDE_TIME
from model.train.clips import scene_of
from model.train.config import TrainConfig
from model.train.data import Bucket
from model.world.scene import Scene

HARD_OFTEN = 3  # times as often as others does a clip come up that shows what is learnt last


def end_lengths(bucket: Bucket) -> range:
    """How many latent frames an end has that was encoded once more; clip k has the (k mod all of them)th."""
    return range(1, min(3, (bucket.shape.frames - 1) // STRIDE_TIME - 1) + 1)


def ends_path(config: TrainConfig, bucket: Bucket) -> Path:
    """[clips, C, E, H, W], float16: the ends of the first clips of the first shape, behind a standing picture."""
    return config.work / "latents" / f"{bucket.name}.ends.safetensors"


def latents_of(config: TrainConfig, bucket: Bucket) -> Tensor:
    """[clips, C, T, H, W], float16, normalised: what the stage `latents` made of a shape's clips."""
    return load_file(config.work / "latents" / f"{bucket.name}.safetensors")["latents"][: bucket.clips]


def how_often(scene: Scene) -> int:
    """How many times as often as others a scene comes up.

    At the world's own shares a model that had learnt all the rest still mixed up the colours and shapes of two solids
    (a quarter of the clips), and let a cube stand that was to spin (one in twelve).
    """
    return HARD_OFTEN if len(scene.solids) == 2 or scene.motion == "spin" else 1


def sampling_weights(config: TrainConfig, bucket: Bucket, clips: Iterable[int]) -> list[int]:
    """Cumulative weights to draw the clips of a shape by: the world's by `how_often`, others evenly."""
    even = config.captions is not None
    return list(accumulate(1 if even else how_often(scene_of(config.seed, bucket, k)) for k in clips))
