"""Clips to train on: rendered from the procedural world, or read from a folder of cuts."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.train import data
from model.train.config import TrainConfig
from model.train.data import FPS, Bucket
from model.train.files import atomic_path
from model.world import render as world_render
from model.world.scene import Scene


def scene_of(seed: int, bucket: Bucket, index: int) -> Scene:
    """The scene of one clip of the world."""
    return data.scene_of(seed, bucket.name, index)


def render(config: TrainConfig, processes: int = 2, only: str | None = None) -> None:
    """Renders what is missing. Several processes, or several calls, share the work by files."""
    jobs = [
        (config, bucket, first)
        for bucket in config.buckets
        if only in (None, bucket.name)
        for first in range(0, bucket.clips, config.chunk)
        if not _chunk(config, bucket, first).exists()
    ]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for done, name in enumerate(pool.imap(_render_chunk, jobs), 1):
            print(f"render {done}/{len(jobs)} {name}", flush=True)


def _chunk(config: TrainConfig, bucket: Bucket, first: int) -> Path:
    return config.work / "clips" / bucket.name / f"{first:07d}.npy"


def _render_chunk(job: tuple[TrainConfig, Bucket, int]) -> str:
    config, bucket, first = job
    shape = bucket.shape
    scenes = (scene_of(config.seed, bucket, first + k) for k in range(config.chunk))
    clips = np.stack(
        [world_render.render(s, width=shape.width, height=shape.height, frames=shape.frames) for s in scenes]
    )
    _save_chunk(_chunk(config, bucket, first), clips)
    return f"{bucket.name} {first}"


def _save_chunk(path: Path, clips: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as part, part.open("wb") as file:  # np.save would end another name with .npy
        np.save(file, clips)


def list_cuts(config: TrainConfig, folder: Path) -> None:
    """Writes down which clips the folder gives, once: the training keeps to them. Raises BadData."""
    path = config.work / data.LIST
    if path.exists():
        source, _ = data.load_list(path)
        if source.folder != folder.absolute():
            raise data.BadData(f"{config.work} is at work on {source.folder or 'the world'}: name another --work")
        return
    scanned = data.scan(folder, [b.shape for b in config.buckets], FPS)
    for sentence in scanned.unused:
        print(f"unused {sentence}", flush=True)
    data.save_list(path, data.Source(folder=folder.absolute()), scanned.cuts)


def read(config: TrainConfig) -> None:
    """Cuts the clips that are missing out of the files of the list."""
    source, cuts = data.load_list(config.work / data.LIST)
    for bucket in config.buckets:
        mine = [cut for cut in cuts if cut.shape == bucket.shape]
        for first in range(0, len(mine), config.chunk):
            if _chunk(config, bucket, first).exists():
                continue
            clips = np.stack(list(source.read(mine[first : first + config.chunk])))
            _save_chunk(_chunk(config, bucket, first), clips)
            print(f"read {bucket.name} {first + len(clips)}/{len(mine)}", flush=True)


def clips_of(config: TrainConfig, bucket: Bucket) -> list[NDArray[np.uint8]]:
    """The rendered chunks of a shape, mapped, in order. Raises FileNotFoundError when some are missing."""
    firsts = range(0, bucket.clips, config.chunk)
    missing = [f for f in firsts if not _chunk(config, bucket, f).exists()]
    if missing:
        raise FileNotFoundError(
            f"{bucket.name}: {len(missing)} of {len(firsts)} chunks are missing; run the stage `render` or `read`"
        )
    return [np.load(_chunk(config, bucket, f), mmap_mode="r") for f in firsts]
