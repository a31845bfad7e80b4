"""Figures of the modes: are given frames kept, do joins show, do loops close, what does an edit keep.

    python -m model.score.modes mini --clips 4 --json modes.json

Renders through a real engine. Sources are either clips of the procedural world, whose every pixel is sharp, or what the
model itself makes of their captions, which is what extending a clip of history means. All frames are uint8
[T, H, W, 3]; differences are in levels of 255.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from model.config import ClipShape, Partition
from model.engine.clip import ClipSpec
from model.engine.engine import Engine
from model.loading.card import ModelCard, find_model
from model.media.windows import Frames

STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
EXTENSIONS = 4
MOST_BELOW_AUTOENCODER = 1.0  # dB
MOST_SEAM = 1.5
EXACT = 99.0  # dB
STILL = 0.5  # levels: below it frames do not differ but for rounding


def psnr(one: Frames, other: Frames) -> float:
    """In decibels, EXACT where nothing differs."""
    error = float(np.square(one.astype(np.float64) - other).mean())
    return 10 * math.log10(255**2 / error) if error > 1e-5 else EXACT


def steps_between(frames: Frames) -> list[float]:
    """How far each frame is from the one before it: mean absolute difference."""
    moving = frames.astype(np.float64)
    return [float(np.abs(after - before).mean()) for before, after in pairwise(moving)]


def seam(frames: Frames, join: int) -> float:
    """The step from frame join - 1 to frame `join`, over the mean of the two steps before and the two after it."""
    steps = steps_between(frames)
    beside = [steps[k] for k in (join - 3, join - 2, join, join + 1) if 0 <= k < len(steps)]
    return max(steps[join - 1], STILL) / max(mean(beside), STILL)


def closure(frames: Frames) -> float:
    """The step from the last frame back to the first, over the mean step."""
    steps = steps_between(np.concatenate((frames, frames[:1])))
    return max(steps[-1], STILL) / max(mean(steps[:-1]), STILL)


def likeness(one: Frames, other: Frames) -> float:
    """How much of the layout two clips share: the correlation of their brightness, 1 where it is the same."""
    pair = [frames.astype(np.float64).mean(-1).reshape(len(frames), -1) for frames in (one, other)]
    pair = [light - light.mean(1, keepdims=True) for light in pair]
    scale = np.linalg.norm(pair[0], axis=1) * np.linalg.norm(pair[1], axis=1)
    return float(((pair[0] * pair[1]).sum(1) / np.maximum(scale, 1e-9)).mean())


def colour_drift(frames: Frames, reference: Frames) -> float:
    """The largest change of a channel's mean against a reference."""
    return float(np.abs(frames.mean((0, 1, 2)) - reference.mean((0, 1, 2))).max())


def through_autoencoder(model: ModelCard, clips: Sequence[Frames]) -> list[Frames]:
    """Clips after the autoencoder alone: nothing that is made can be closer to its source."""
    import torch

    from model.loading.load import load_vae
    from model.network.vae import to_pixels, to_video

    vae = load_vae(model.path, torch.float32)
    restored: list[Frames] = []
    for clip in clips:
        with torch.no_grad():
            decoded = vae.decode(vae.encode(to_video(np.array(clip)[None])))
        restored.append(to_pixels(decoded)[0])
    return restored


def measure_modes(
    model_folder: str | Path,
    prompts: Sequence[str],
    *,
    sources: Sequence[Frames] | None = None,
    steps: int | None = None,
    overlap: int = 5,
    micro_batch: int = 8,
    threads: int = 1,
    log: Path | None = None,
) -> dict[str, Any]:
    """Means over the prompts, by mode. `sources`: a clip for each prompt; by default what the model makes of it."""
    model = find_model(model_folder)
    with Engine(model.path, Partition(), threads_per_rank=threads, micro_batch=micro_batch, log=log) as engine:
        plain = [spec_of(model, prompt, seed, steps, overlap) for seed, prompt in enumerate(prompts)]
        clips = _render(engine, plain) if sources is None else list(sources)
        restored = through_autoencoder(model, clips)
        return {
            "model": model.digest,
            "clips": len(clips),
            "sources": "made by the model" if sources is None else "given",
            "autoencoder_psnr": mean(psnr(a, b) for a, b in zip(clips, restored, strict=True)),
            "kept": _kept(engine, plain, clips, restored),
            "loop": _loops(engine, plain, clips),
            "edit": _edits(engine, plain, clips),
            "drift": _drift(engine, plain, clips, model),
        }


def spec_of(model: ModelCard, prompt: str, seed: int, steps: int | None, overlap: int) -> ClipSpec:
    """A clip of the prompt alone, in the model's own size and with its own settings but for `steps`."""
    return ClipSpec(
        clip_id=f"clip {seed}",
        prompt=prompt,
        negative_prompt="",
        seed=seed,
        width=model.width,
        height=model.height,
        frames=model.frames,
        fps=model.fps,
        steps=steps or model.steps,
        guidance=model.guidance,
        solver=model.solver,
        shift=model.shift,
        window=model.frames,
        overlap=overlap,
    )


def _render(engine: Engine, specs: Sequence[ClipSpec]) -> list[Frames]:
    numbered = [replace(spec, clip_id=str(k)) for k, spec in enumerate(specs)]  # they are done in any order
    made = {clip.clip_id: clip.frames for clip in engine.render(numbered)}
    return [made[spec.clip_id] for spec in numbered]


def _kept(
    engine: Engine, plain: Sequence[ClipSpec], clips: Sequence[Frames], restored: Sequence[Frames]
) -> dict[str, Any]:
    """For each mode that keeps frames: they against the source, the autoencoder's own on the same frames, the joins."""
    length, overlap = len(clips[0]), plain[0].overlap
    new = length - overlap
    bridge = new - (overlap - 1)
    others = [*clips[1:], clips[0]]
    own = list(zip(clips, restored, strict=True))
    neighbours = [*own[1:], own[0]]
    begin, end = slice(0, overlap), slice(length - overlap, length)
    # mode: what is given, how long it gets, source frames that are faded and by how much they moved, where it is joined
    modes: dict[str, tuple[dict[str, int], int, list[tuple[Any, slice, int]], list[int]]] = {
        "image-to-video": ({"start": 1}, length, [(own, slice(0, 1), 0)], [1]),
        "extend": ({"start": length}, length + new, [(own, end, 0)], [length]),
        "extend backward": ({"end": length}, length + new, [(own, begin, new)], [new]),
        "connect": (
            {"start": length, "end": length},
            2 * length + bridge,
            [(own, end, 0), (neighbours, begin, length + bridge)],
            [length, length + bridge],
        ),
    }
    figures: dict[str, Any] = {}
    for mode, (given, frames, faded, joins) in modes.items():
        specs = [
            replace(
                spec,
                frames=frames,
                start=clip[: given["start"]] if "start" in given else None,
                end=(other if mode == "connect" else clip) if "end" in given else None,
            )
            for spec, clip, other in zip(plain, clips, others, strict=True)
        ]
        made = _render(engine, specs)
        seams = [seam(each, join) for each in made for join in joins]
        kept: list[float] = []
        alone: list[float] = []
        for pairs, at, moved in faded:
            for each, (source, through) in zip(made, pairs, strict=True):
                kept.append(psnr(each[at.start + moved : at.stop + moved], source[at]))
                alone.append(psnr(through[at], source[at]))
        figures[mode] = {
            "kept_psnr": mean(kept),
            "autoencoder_psnr": mean(alone),
            "kept": mean(kept) >= mean(alone) - MOST_BELOW_AUTOENCODER,
            "seam": mean(seams),
            "seams_within": mean(each <= MOST_SEAM for each in seams),
        }
    return figures


def _loops(engine: Engine, plain: Sequence[ClipSpec], clips: Sequence[Frames]) -> dict[str, float]:
    """How loops close, from words alone and around a source; beside them a clip that was never asked to."""
    length, overlap = len(clips[0]), plain[0].overlap
    around = length + length - overlap - (overlap - 1)
    from_words = _render(engine, [replace(spec, loop=True) for spec in plain])
    of_source = _render(
        engine,
        [replace(spec, loop=True, start=clip, frames=around) for spec, clip in zip(plain, clips, strict=True)],
    )
    return {
        "closure": mean(closure(each) for each in from_words),
        "closure_around_source": mean(closure(each) for each in of_source),
        "closure_of_clips_that_do_not_loop": mean(closure(each) for each in clips),
    }


def _edits(engine: Engine, plain: Sequence[ClipSpec], clips: Sequence[Frames]) -> dict[str, float]:
    """How much of the source's layout is left, by strength; every clip is edited with its neighbour's words."""
    words = [spec.prompt for spec in (*plain[1:], plain[0])]
    kept: dict[str, float] = {}
    for strength in STRENGTHS:
        specs = [
            replace(spec, prompt=other, start=clip, strength=strength)
            for spec, other, clip in zip(plain, words, clips, strict=True)
        ]
        made = _render(engine, specs)
        kept[f"{strength:g}"] = mean(likeness(each, clip) for each, clip in zip(made, clips, strict=True))
    return kept


def _drift(engine: Engine, plain: Sequence[ClipSpec], clips: Sequence[Frames], model: ModelCard) -> dict[str, float]:
    """Colour against the source after each of several extensions, and within the source itself."""
    length = len(clips[0])
    new = length - plain[0].overlap
    specs = [
        replace(spec, start=clip, frames=length + EXTENSIONS * new) for spec, clip in zip(plain, clips, strict=True)
    ]
    made = _render(engine, specs)
    drift = {"in the source": mean(colour_drift(clip[length // 2 :], clip[: length // 2]) for clip in clips)}
    for k in range(EXTENSIONS):
        part = slice(length + k * new, length + (k + 1) * new)
        pairs = zip(made, clips, strict=True)
        drift[f"extension {k + 1}"] = mean(colour_drift(each[part], clip) for each, clip in pairs)
    return drift


def world_clips(count: int, shape: ClipShape, seed: int = 0) -> tuple[list[str], list[Frames]]:
    """Captions and clips of the procedural world, none of which a training run of seed 0 has seen."""
    from model.world.captions import describe
    from model.world.render import render
    from model.world.scene import sample_scene

    scenes = [sample_scene(random.Random(f"modes/{seed}/{k}"), unseen=False) for k in range(count)]
    prompts = [describe(scene, random.Random(k), frames=shape.frames) for k, scene in enumerate(scenes)]
    size = {"width": shape.width, "height": shape.height, "frames": shape.frames}
    return prompts, [render(scene, **size) for scene in scenes]


def table(figures: Mapping[str, Any]) -> str:
    """The figures as lines of Markdown."""
    lines = [
        f"{figures['clips']} clips, {figures['sources']}; autoencoder {figures['autoencoder_psnr']:.2f} dB",
        "",
        "| mode | kept frames | autoencoder alone | seam | seams within 1.5 |",
        "|---|---|---|---|---|",
    ]
    for mode, row in figures["kept"].items():
        kept = "to the bit" if row["kept_psnr"] == EXACT else f"{row['kept_psnr']:.2f} dB"
        lines.append(
            f"| {mode} | {kept} | {row['autoencoder_psnr']:.2f} dB | {row['seam']:.2f} "
            f"| {100 * row['seams_within']:.0f} % |"
        )
    for name in ("loop", "edit", "drift"):
        said = ", ".join(f"{key.replace('_', ' ')} {value:.2f}" for key, value in figures[name].items())
        lines += ["", f"{name}: {said}"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model.score.modes", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", default="mini", help="shipped name or folder")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--sources", choices=("world", "model"), default="world")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--overlap", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    given = parser.parse_args()
    card = find_model(given.model)
    prompts, clips = world_clips(given.clips, ClipShape(card.width, card.height, card.frames))
    figures = measure_modes(
        card.path,
        prompts,
        sources=clips if given.sources == "world" else None,
        steps=given.steps,
        overlap=given.overlap,
        threads=given.threads,
    )
    print(table(figures))
    if given.json:
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
