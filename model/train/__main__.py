"""Trains mini from nothing, in stages that may each be stopped and taken up again.

    python -m model.train all --work DIR --out model/weights/mini
    python -m model.train all --work DIR --out my-model --data FOLDER
    torchrun --standalone --nproc-per-node 2 -m model.train dit --work DIR --threads 1 --zero 2

render     clips of the procedural world, by shape, in chunk files (a file that exists is whole)
read       the same, cut from a folder of one's own videos and images (--data)
vae        the autoencoder, on crops of the clips of the first shape
latents    every clip encoded once, and the latents' mean and spread; ends of clips as requests bring them
decoder    the autoencoder's decoder goes on alone: the latents stay what they are
dit        transformer and text encoder together, by flow matching, over all shapes
captioner  latents to captions, where the truth is known: for the world alone
publish    the averaged weights in the diffusers layout
look       a contact sheet of held-out prompts

Every batch is drawn from a generator seeded by (seed, stage, step), so a run killed at any moment goes on along the
same loss curve from its last checkpoint, however many processes divide it by then. It knows nothing of flows, databases
or stores: it reads and writes folders.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from pathlib import Path
from typing import Any

import torch

from model.loading.card import CAPTIONER
from model.loading.load import save_model
from model.network.vae import to_pixels
from model.train import data
from model.train.autoencoder import encode_latents, train_decoder, train_vae, trained_vae
from model.train.clips import list_cuts, read, render
from model.train.config import DEFAULTS, SAMPLING, STAGES, TrainConfig, of_data, train_config
from model.train.loop import end_with_input, join, last
from model.train.transformer import sample, train_dit, trained_writer
from model.world.captions import describe
from model.world.scene import CAMERAS, MOTIONS, sample_scene


def publish(config: TrainConfig, out: Path) -> None:
    """Writes the averaged weights as bfloat16 in the diffusers layout, with how they were made beside them."""
    writer, vae = trained_writer(config), trained_vae(config)
    writer.cpu()
    shape = config.buckets[0].shape
    defaults: dict[str, Any] = {**DEFAULTS, "width": shape.width, "height": shape.height, "frames": shape.frames}
    defaults["trained"] = [bucket.name for bucket in config.buckets]
    if config.captions is not None:
        defaults["name"] = out.name
    save_model(out, dit=writer.dit, text=writer.text, vae=vae.cpu(), defaults=defaults, dtype=torch.bfloat16)
    record = {stage: last(config.work / f"{stage}.jsonl") for stage in ("vae", "decoder", "dit")}
    record["data"] = {"clips": {b.name: b.clips for b in config.buckets}}
    if config.captions is None:
        record["data"]["world_seed"] = config.seed
    else:
        source, cuts = data.load_list(config.work / data.LIST)
        record["data"]["digest"] = data.digest(cuts, source.fps)
    if (config.work / "captioner.safetensors").exists():
        from model.language.captioner import save_captioner
        from model.train.captioner import trained_captioner

        save_captioner(trained_captioner(config), out / CAPTIONER)
        record["captioner"] = last(config.work / "captioner.jsonl")
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model.train", description="Trains mini, or a model of your own.")
    stages = ("all", "render", "read", "vae", "latents", "decoder", "dit", "captioner", "publish", "look")
    parser.add_argument("stage", nargs="?", default="all", choices=stages)
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for clips, latents and checkpoints (about 6 GB)"
    )
    parser.add_argument("--data", type=Path, help="folder of videos and images to train on (default: the world)")
    parser.add_argument("--out", type=Path, help="where publish writes the model, or look its contact sheet")
    parser.add_argument("--recipe", type=Path, help="JSON file with settings of the recipe; the options below win")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--zero", type=int, choices=STAGES, help="dit: stage of DeepSpeed's ZeRO, under torchrun")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--bfloat16", action=argparse.BooleanOptionalAction)
    parser.add_argument("--vae-steps", type=int)
    parser.add_argument("--dit-steps", type=int)
    parser.add_argument("--only", help="render: one shape, such as 64x64x17")
    parser.add_argument("--attached", action="store_true", help="end when standard input does: with the parent")
    given = parser.parse_args()
    if given.attached:
        end_with_input()
    given.work.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.is_available()
    settings: dict[str, Any] = {"device": "cuda" if gpu else "cpu", "bfloat16": gpu}
    settings |= json.loads(given.recipe.read_text()) if given.recipe else {}
    options = ("seed", "threads", "zero", "device", "bfloat16", "vae_steps", "dit_steps")
    settings |= {name: value for name in options if (value := getattr(given, name)) is not None}
    config = train_config(given.work, settings)
    if given.data:
        try:
            list_cuts(config, given.data)
            config = of_data(config)
        except data.BadData as error:
            parser.error(str(error))
    torch.set_num_threads(config.threads)
    stage = given.stage
    if "WORLD_SIZE" in os.environ:
        if stage != "dit":
            parser.error(f"{stage} runs in one process; torchrun divides only dit")
        config = join(config)
    own = config.captions is not None
    if stage == "read" and not own:
        parser.error("read needs --data, the folder of videos and images")
    if stage == "captioner" and own:
        parser.error("captioner learns from the world, where the truth is known, not from --data")
    if stage == "render" or (stage == "all" and not own):
        render(config, config.threads, given.only)
    if stage == "read" or (stage == "all" and own):
        read(config)
    if stage in ("all", "vae"):
        train_vae(config)
    if stage in ("all", "latents"):
        encode_latents(config)
    if stage in ("all", "decoder"):
        train_decoder(config)
    if stage in ("all", "dit"):
        train_dit(config)
    if stage == "captioner" or (stage == "all" and not own):
        from model.train.captioner import train_captioner

        train_captioner(config)
    if stage == "look":
        look(config, given.out or config.work / "look.png")
    if stage == "publish" or (stage == "all" and given.out):
        if not given.out:
            parser.error("publish needs --out, the folder of the model")
        publish(config, given.out)


def look(config: TrainConfig, out: Path) -> None:
    """A contact sheet: of the world one prompt for each kind of motion and camera, else the held-back captions."""
    from model.media.encode import SheetRow, contact_sheet

    writer, vae = trained_writer(config), trained_vae(config)
    bucket = config.buckets[0]
    prompts = _kinds() if config.captions is None else list(config.captions[bucket.name][: min(config.held_back, 12)])
    rows: list[SheetRow] = []
    for first in range(0, len(prompts), 8):
        some = prompts[first : first + 8]
        seeds = range(first, first + len(some))
        video = sample(writer.dit, writer.text, vae, some, bucket.shape, seeds, **SAMPLING)
        rows += [
            SheetRow(clip_id=f"seed {first + k}", prompt=prompt, frames=list(clip[::4]))
            for k, (prompt, clip) in enumerate(zip(some, to_pixels(video), strict=True))
        ]
    out.write_bytes(contact_sheet(rows))


def _kinds() -> list[str]:
    rng = random.Random(7)
    prompts: list[str] = []
    for kind in (*MOTIONS, *CAMERAS[1:]):
        while True:
            scene = sample_scene(rng)
            if kind in (scene.motion, scene.camera):
                prompts.append(describe(scene, rng))
                break
    return prompts


if __name__ == "__main__":
    main()
