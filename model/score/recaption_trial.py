"""Does recaptioning help? Two short trainings that differ in their captions alone.

    python -m model.score.recaption_trial --work DIR --judge DIR/checker --model mini

The claim of "Improving Image Generation with Better Captions" (Betker et al. 2023), which Sora's report takes over for
videos: a generator follows prompts better when it is trained on what a captioner wrote than on what stood beside its
clips. Here the same clips get alt texts, poor as those of the web; what mini's captioner writes; and the truth, as good
as any captioner could be. Every training begins with the same weights, of which all that hears the text is
begun anew, takes the same steps with the same noise, and is asked the same prompts with the same seeds.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from model.language.captioner import load_captioner, plainly
from model.loading.card import CAPTIONER, find_model
from model.network.vae import VAE
from model.score.judge import SHAPE
from model.score.measure import Judge, in_batches
from model.score.prompts import Asked, adherence, wanted_of
from model.train.autoencoder import trained_vae
from model.train.clips import scene_of
from model.train.config import SAMPLING, TrainConfig
from model.train.latents import latents_of
from model.train.loop import Checkpoint
from model.train.transformer import Writer, sample, train_dit, trained_writer
from model.world.captions import NOUNS
from model.world.scene import Scene, sample_scene

CLIPS, STEPS, PROMPTS = 8000, 600, 96
WRONG = 0.2  # of alt texts that belong to another clip


def alt_texts(scenes: Sequence[Scene], rng: random.Random) -> list[str]:
    """Texts as they stand beside clips on the web: one solid, with its colour or without, or that of another clip."""
    texts: list[str] = []
    for scene in scenes:
        shown = rng.choice(scenes) if rng.random() < WRONG else scene
        solid = rng.choice(shown.solids)
        noun = rng.choice(NOUNS[solid.shape])
        texts.append(f"a {solid.colour} {noun}" if rng.random() < 0.7 else f"a {noun}")
    return texts


def deafen(writer: Writer, seed: int) -> Writer:
    """The same transformer with all that hears the text begun anew. Returns its argument."""
    torch.manual_seed(seed)
    fresh = Writer(writer.dit.config)
    fresh.dit.init_weights()
    new = dict(fresh.named_parameters())
    with torch.no_grad():
        for name, parameter in writer.named_parameters():
            if name.startswith("text.") or "text_embedder" in name or ".attn2." in name:
                parameter.copy_(new[name])
    return writer


def begin(config: TrainConfig, writer: Writer, latents: Path) -> None:
    """Lays out a work folder in which `train_dit` starts with these weights and no moments."""
    (config.work / "latents").mkdir(parents=True, exist_ok=True)
    link = config.work / "latents" / latents.name
    if not link.exists():
        link.symlink_to(latents.absolute())
    if not (config.work / "dit.safetensors").exists():
        unused = torch.optim.AdamW(writer.parameters())
        Checkpoint(config.work / "dit.safetensors", {"writer": writer, "average": writer}, unused).save(0)


def write_captions(config: TrainConfig, model: Path, count: int) -> dict[str, list[str]]:
    """For each kind of caption those of the first clips of the first shape; the captioner reads their latents."""
    bucket = config.buckets[0]
    scenes = [scene_of(config.seed, bucket, k) for k in range(count)]
    captioner, stock = load_captioner(model / CAPTIONER), latents_of(config, bucket)[:count]
    said = [text for some in stock.split(64) for text in captioner.write(some.float())]
    return {
        "alt texts": alt_texts(scenes, random.Random(f"{config.seed}/alt")),
        "recaptioned": said,
        "truth": [plainly(scene) for scene in scenes],
    }


def questions(count: int) -> list[Asked]:
    asked: list[Asked] = []
    for k in range(count):
        scene = sample_scene(random.Random(f"recaption/{k}"), unseen=False)
        asked.append(Asked(scene, plainly(scene), 3_000_000 + k))
    return asked


def measure(config: TrainConfig, jury: Judge, vae: VAE, asked: Sequence[Asked]) -> dict[str, float | None]:
    """The adherence of a finished training."""
    writer = trained_writer(config)

    def render(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return sample(writer.dit, writer.text, vae, prompts, SHAPE, seeds, **SAMPLING)

    clips = in_batches(render, [one.prompt for one in asked], [one.seed for one in asked])
    return adherence(jury.look(clips), wanted_of(asked))


def run_trial(
    config: TrainConfig,
    captions: Mapping[str, list[str]],
    score: Callable[[TrainConfig], dict[str, float | None]],
    folder: Path,
) -> dict[str, dict[str, float | None]]:
    """Trains once for each kind of caption, in `folder`, and scores it. `config.dit_steps` is the length of each.

    A training that was stopped goes on, as any does.
    """
    bucket = config.buckets[0]
    latents = config.work / "latents" / f"{bucket.name}.safetensors"
    figures: dict[str, dict[str, float | None]] = {}
    for kind, texts in captions.items():
        short = replace(
            config,
            work=folder / kind.replace(" ", "-"),
            buckets=(replace(bucket, clips=len(texts), share=1.0),),
            captions={bucket.name: texts},
        )
        begin(short, deafen(trained_writer(config), config.seed), latents)
        train_dit(short)
        figures[kind] = score(short)
        print(kind, json.dumps(figures[kind]), flush=True)
    return figures


def table(figures: Mapping[str, Mapping[str, float | None]]) -> str:
    """The figures as Markdown."""
    names = [n for n, value in next(iter(figures.values())).items() if value is not None]
    lines = ["| trained on | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for kind, scores in figures.items():
        lines.append(f"| {kind} | " + " | ".join(f"{scores[name]:.2f}" for name in names) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m model.score.recaption_trial", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--work", type=Path, required=True, help="the folder that model.train worked in")
    parser.add_argument("--judge", type=Path, required=True, help="a folder that model.score.judge wrote")
    parser.add_argument("--model", default="mini", help="whose captioner writes: a shipped model or a folder")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--clips", type=int, default=CLIPS)
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--only", help="one kind of caption, to train two at a time")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    config = TrainConfig(work=given.work, threads=given.threads, dit_steps=given.steps)
    captions = write_captions(config, find_model(given.model).path, given.clips)
    if given.only:
        captions = {given.only: captions[given.only]}
    asked = questions(given.prompts)
    jury, vae = Judge(given.judge), trained_vae(config)
    folder = given.work / "recaption-trial"
    figures = run_trial(config, captions, lambda short: measure(short, jury, vae, asked), folder)
    print(table(figures))


if __name__ == "__main__":
    main()
