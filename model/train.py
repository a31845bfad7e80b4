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
import copy
import json
import math
import multiprocessing
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn

from model import data, world
from model.config import DiTConfig, Shape, VAEConfig
from model.data import BUCKETS, FPS, Bucket
from model.diffusion import blend, denoise, guide, noise, schedule, whole_times
from model.dit import DiT
from model.layers import Attention, attention, short_attention
from model.text import TextEncoder, small_encoder, split_words, word_tokenizer
from model.vae import STRIDE_TIME, VAE, to_pixels, to_video
from model.weights import CAPTIONER, save_model

if TYPE_CHECKING:
    from model.zero import Zero

PROMPT_TOKENS = 40
HARD_OFTEN = 3  # times as often as others does a clip come up that shows what is learnt last
WITH_ENDS = 9600  # clips of which the ends are encoded once more, behind a standing picture
DECODED = 6  # clips a step of the decoder that goes on alone
SPOKEN = tuple(world.vocabulary())
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
TEXT_LAYERS, TEXT_HEADS = 2, 4
STAGES = (0, 1, 2)  # of ZeRO


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a training run was asked for."""

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


def recipe_of(work: Path, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with these settings, as JSON gives them; of a data set if the work folder holds the list of one.

    Raises ValueError for settings that no recipe has.
    """
    known = {f.name for f in fields(Recipe)} - {"work", "rank", "ranks", "captions", "words"}
    if unknown := settings.keys() - known:
        raise ValueError(f"recipe: {min(unknown)!r} must be one of: {', '.join(sorted(known))}")
    values = dict(settings)
    if "buckets" in values:
        values["buckets"] = tuple(Bucket.from_json(bucket) for bucket in values["buckets"])
    if "dit" in values:
        dit: dict[str, Any] = {name: tuple(v) if name == "patch" else v for name, v in values["dit"].items()}
        values["dit"] = DiTConfig(**dit)
    recipe = Recipe(work=work, **values)
    return of_data(recipe) if (work / data.LIST).exists() else recipe


# --- clips: the world, rendered, or somebody's own --------------------------------------------------------------------


def scene_of(seed: int, bucket: Bucket, index: int) -> world.Scene:
    """The scene of one clip of the world."""
    return data.scene_of(seed, bucket.name, index)


def render(recipe: Recipe, processes: int = 2, only: str | None = None) -> None:
    """Renders what is missing. Several processes, or several calls, share the work by files."""
    jobs = [
        (recipe, bucket, first)
        for bucket in recipe.buckets
        if only in (None, bucket.name)
        for first in range(0, bucket.clips, recipe.chunk)
        if not _chunk(recipe, bucket, first).exists()
    ]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for done, name in enumerate(pool.imap(_render_chunk, jobs), 1):
            print(f"render {done}/{len(jobs)} {name}", flush=True)


def _chunk(recipe: Recipe, bucket: Bucket, first: int) -> Path:
    return recipe.work / "clips" / bucket.name / f"{first:07d}.npy"


def _render_chunk(job: tuple[Recipe, Bucket, int]) -> str:
    recipe, bucket, first = job
    shape = bucket.shape
    scenes = (scene_of(recipe.seed, bucket, first + k) for k in range(recipe.chunk))
    clips = np.stack([world.render(s, width=shape.width, height=shape.height, frames=shape.frames) for s in scenes])
    _save_chunk(_chunk(recipe, bucket, first), clips)
    return f"{bucket.name} {first}"


def _save_chunk(path: Path, clips: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    with part.open("wb") as file:
        np.save(file, clips)
    part.rename(path)


def list_cuts(recipe: Recipe, folder: Path) -> None:
    """Writes down which clips the folder gives, once: the training keeps to them. Raises BadData."""
    path = recipe.work / data.LIST
    if path.exists():
        source, _ = data.load_list(path)
        if source.folder != folder.absolute():
            raise data.BadData(f"{recipe.work} is at work on {source.folder or 'the world'}: name another --work")
        return
    scanned = data.scan(folder, [b.shape for b in recipe.buckets], FPS)
    for sentence in scanned.unused:
        print(f"unused {sentence}", flush=True)
    data.save_list(path, data.Source(folder=folder.absolute()), scanned.cuts)


def of_data(recipe: Recipe) -> Recipe:
    """The recipe for the clips listed in its work folder, the commonest shape first. Raises BadData for too few."""
    _, cuts = data.load_list(recipe.work / data.LIST)
    counts = Counter(cut.shape for cut in cuts)
    batches = {b.shape: b.batch for b in recipe.buckets}
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
        recipe,
        buckets=buckets,
        captions=captions,
        words=[word for word, _ in spoken.most_common(WORDS)],
        held_back=min(recipe.held_back, min(b.clips for b in buckets) // 4),
    )


def read(recipe: Recipe) -> None:
    """Cuts the clips that are missing out of the files of the list."""
    source, cuts = data.load_list(recipe.work / data.LIST)
    for bucket in recipe.buckets:
        mine = [cut for cut in cuts if cut.shape == bucket.shape]
        for first in range(0, len(mine), recipe.chunk):
            if _chunk(recipe, bucket, first).exists():
                continue
            clips = np.stack(list(source.read(mine[first : first + recipe.chunk])))
            _save_chunk(_chunk(recipe, bucket, first), clips)
            print(f"read {bucket.name} {first + len(clips)}/{len(mine)}", flush=True)


def clips_of(recipe: Recipe, bucket: Bucket) -> list[NDArray[np.uint8]]:
    """The rendered chunks of a shape, mapped, in order. Raises FileNotFoundError when some are missing."""
    firsts = range(0, bucket.clips, recipe.chunk)
    missing = [f for f in firsts if not _chunk(recipe, bucket, f).exists()]
    if missing:
        raise FileNotFoundError(
            f"{bucket.name}: {len(missing)} of {len(firsts)} chunks are missing; run the stage `render` or `read`"
        )
    return [np.load(_chunk(recipe, bucket, f), mmap_mode="r") for f in firsts]


# --- the autoencoder --------------------------------------------------------------------------------------------------


def train_vae(recipe: Recipe) -> None:
    """L1 + MSE + a little KL on 1-, 9- and 17-frame crops; the peak rate decays along a cosine."""
    chunks, longest = clips_of(recipe, recipe.buckets[0]), recipe.buckets[0].shape.frames
    torch.manual_seed(recipe.seed)
    vae = in_memory_order(VAE(VAEConfig())).to(recipe.device)
    optimizer = torch.optim.AdamW(vae.parameters(), recipe.vae_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    checkpoint = Checkpoint(recipe.work / "vae.safetensors", {"vae": vae}, optimizer)
    count = sum(len(c) for c in chunks)

    def batch(step: int) -> Tensor:
        rng = np.random.default_rng((recipe.seed, 1, step))
        size, frames = (
            (24, 1) if step % 12 == 11 else (8, longest // 2 + 1) if step < 0.6 * recipe.vae_steps else (4, longest)
        )
        crops = []
        for clip in rng.integers(recipe.held_back, count, size):
            start = rng.integers(0, longest - frames + 1)
            crops.append(chunks[clip // recipe.chunk][clip % recipe.chunk, start : start + frames])
        return to_video(np.stack(crops), recipe.device)

    def learn(step: int) -> dict[str, float]:
        share = step / recipe.vae_steps
        _set_rate(optimizer, recipe.vae_rate * min(1, (step + 1) / 60) * (0.5 + 0.5 * math.cos(math.pi * share)) + 1e-5)
        video = batch(step)
        generator = torch.Generator().manual_seed(step)
        with recipe.autocast():
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
        with torch.no_grad(), recipe.autocast():
            video = to_video(np.array(chunks[0][: min(32, recipe.held_back)]), recipe.device)
            restored = torch.cat([vae.reconstruct(vae.posterior(v)[0]) for v in video.split(8)])
        return {"held_out_psnr": psnr(restored.clamp(-1, 1) - video)}

    run(recipe, "vae", recipe.vae_steps, checkpoint, learn, validate)


def in_memory_order(vae: VAE) -> VAE:
    """Convolution weights with their channels last, as oneDNN's bfloat16 kernels want them."""
    for parameter in vae.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    return vae


def psnr(error: Tensor) -> float:
    """In decibels, for values in -1..1."""
    return 10 * math.log10(4 / max(error.square().mean().item(), 1e-12))


def trained_vae(recipe: Recipe, *, finished: bool = True) -> VAE:
    """The autoencoder of the last checkpoint; finished: with the decoder that went on alone, once there is one."""
    config = VAEConfig()
    spread = recipe.work / "latents" / "spread.json"
    if spread.exists():
        config = replace(config, **{k: tuple(v) for k, v in json.loads(spread.read_text()).items()})
    vae = VAE(config)
    vae.load_state_dict(part_of(load_file(recipe.work / "vae.safetensors"), "vae"))
    if finished and (alone := recipe.work / "decoder.safetensors").exists():
        vae.decoder.load_state_dict(part_of(load_file(alone), "average"))
    return in_memory_order(vae).to(recipe.device).eval().requires_grad_(False)


def train_decoder(recipe: Recipe) -> None:
    """The decoder alone, from where the autoencoder's training left it, on the latents of the first shape.

    Whatever was trained on the latents stays true. Published is the running average of the weights.
    """
    bucket = recipe.buckets[0]
    chunks, latents = clips_of(recipe, bucket), latents_of(recipe, bucket)
    clips = range(recipe.held_back, len(latents))
    turns = turns_of(recipe, bucket, clips)
    average = trained_vae(recipe, finished=False)
    vae = copy.deepcopy(average)
    optimizer = torch.optim.AdamW(
        vae.decoder.requires_grad_().parameters(), recipe.decoder_rate, betas=(0.9, 0.98), fused=True
    )
    modules: dict[str, nn.Module] = {"decoder": vae.decoder, "average": average.decoder}
    checkpoint = Checkpoint(recipe.work / "decoder.safetensors", modules, optimizer)

    def error_of(vae: VAE, chosen: Sequence[int]) -> Tensor:
        video = np.stack([chunks[k // recipe.chunk][k % recipe.chunk] for k in chosen])
        plain = latents[list(chosen)].float().to(recipe.device) * vae.std + vae.mean
        with recipe.autocast():
            return vae.reconstruct(plain) - to_video(video, recipe.device)

    def learn(step: int) -> dict[str, float]:
        share = step / recipe.decoder_steps
        _set_rate(optimizer, recipe.decoder_rate * min(1, (step + 1) / 40) * (0.5 + 0.5 * math.cos(math.pi * share)))
        rng = random.Random(f"{recipe.seed}/decoder/{step}")
        error = error_of(vae, rng.choices(clips, cum_weights=turns, k=DECODED))
        loss = 0.5 * error.abs().mean() + error.square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        optimizer.step()
        _follow(average.decoder, vae.decoder, step, 0.99)
        return {"psnr": psnr(error.detach()), "loss": loss.item()}

    @torch.no_grad()
    def validate() -> dict[str, float]:
        each = [psnr(error_of(average, [k])) for k in range(min(64, recipe.held_back))]
        return {"held_out_psnr": sum(each) / len(each)}

    run(recipe, "decoder", recipe.decoder_steps, checkpoint, learn, validate)


def encode_latents(recipe: Recipe) -> None:
    """Writes latents/SHAPE.safetensors (float16, normalised) for every shape, and spread.json."""
    folder = recipe.work / "latents"
    folder.mkdir(exist_ok=True)
    vae = trained_vae(recipe)

    @torch.no_grad()
    def encode(clips: NDArray[np.uint8]) -> Tensor:
        with recipe.autocast():
            some = (clips[k : k + 25] for k in range(0, len(clips), 25))
            return torch.cat([vae.posterior(to_video(np.array(c), recipe.device))[0].cpu() for c in some])

    if not (folder / "spread.json").exists():
        sample = torch.cat([encode(chunk) for chunk in clips_of(recipe, recipe.buckets[0])[:8]])
        mean, std = sample.mean((0, 2, 3, 4)), sample.std((0, 2, 3, 4))
        (folder / "spread.json").write_text(json.dumps({"latents_mean": mean.tolist(), "latents_std": std.tolist()}))
    spread = json.loads((folder / "spread.json").read_text())
    mean, std = (torch.tensor(spread[k]).view(1, -1, 1, 1, 1) for k in ("latents_mean", "latents_std"))
    for bucket in recipe.buckets:
        path = folder / f"{bucket.name}.safetensors"
        if path.exists():
            continue
        latents = torch.cat([((encode(chunk) - mean) / std).half() for chunk in clips_of(recipe, bucket)])
        _write({"latents": latents}, path)
        print(f"latents {bucket.name} {tuple(latents.shape)}", flush=True)
    bucket = recipe.buckets[0]
    if not ends_path(recipe, bucket).exists() and (lengths := end_lengths(bucket)):
        ends: list[Tensor] = []
        for number, chunk in enumerate(clips_of(recipe, bucket)[: -(-WITH_ENDS // recipe.chunk)]):
            clips = np.array(chunk)
            for k, clip in enumerate(clips, number * recipe.chunk):
                border = len(clip) - STRIDE_TIME * lengths[k % len(lengths)]
                clip[:border] = clip[border]
            ends.append(((encode(clips) - mean) / std)[:, :, -len(lengths) :].half())
        _write({"ends": torch.cat(ends)}, ends_path(recipe, bucket))


def end_lengths(bucket: Bucket) -> range:
    """How many latent frames an end has that was encoded once more; clip k has the (k mod all of them)th."""
    return range(1, min(3, (bucket.shape.frames - 1) // STRIDE_TIME - 1) + 1)


def ends_path(recipe: Recipe, bucket: Bucket) -> Path:
    """[clips, C, E, H, W], float16: the ends of the first clips of the first shape, behind a standing picture."""
    return recipe.work / "latents" / f"{bucket.name}.ends.safetensors"


def latents_of(recipe: Recipe, bucket: Bucket) -> Tensor:
    """[clips, C, T, H, W], float16, normalised: what the stage `latents` made of a shape's clips."""
    return load_file(recipe.work / "latents" / f"{bucket.name}.safetensors")["latents"][: bucket.clips]


# --- the transformer --------------------------------------------------------------------------------------------------


class Writer(nn.Module):
    """Transformer and text encoder: what flow matching trains together."""

    def __init__(self, config: DiTConfig, words: Sequence[str] = SPOKEN) -> None:
        super().__init__()
        tokenizer = word_tokenizer(words, PROMPT_TOKENS)
        encoder = small_encoder(len(tokenizer), config.text_dim, TEXT_LAYERS, TEXT_HEADS)
        self.text = TextEncoder(encoder, tokenizer, PROMPT_TOKENS)
        self.dit = DiT(config)

    def attend_with(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        for module in self.dit.modules():
            if isinstance(module, Attention):
                module.attend = function

    def forward(self, latents: Tensor, times: Tensor, prompts: list[str]) -> Tensor:
        """latents [B, C, T, H, W], times [B, T] -> velocity like latents."""
        ids, mask = self.text.tokens(prompts)
        return self.dit(latents, times, self.text(ids.to(latents.device), mask.to(latents.device)))


def draw_times(count: int, generator: torch.Generator) -> Tensor:
    """[B] times: logit-normal shifted towards noise by 2, 10 % uniform, and 30 % from the last tenth.

    Which way a solid slides is settled above 0.95; without that last part too few steps lie there and left and right
    stay at chance while the loss hardly shows it.
    """
    normal = torch.randn(count, generator=generator).sigmoid()
    even, late, which = (torch.rand(count, generator=generator) for _ in range(3))
    times = 2 * normal / (1 + normal)
    times = torch.where(which < 0.10, even, times)
    return torch.where(which > 0.70, 0.9 + 0.1 * late, times)


def draw_known(count: int, frames: int, generator: torch.Generator) -> Tensor:
    """[B, T] True where a latent frame is given.

    As many at the start, at the end or at both as the modes give (25 % of clips), or any at random (3 %); never all.
    """
    which, some = torch.rand(count, generator=generator), torch.rand(count, frames, generator=generator)
    length = torch.randint(1, max(2, frames - 1), (2, count, 1), generator=generator)
    place = torch.arange(frames)
    known = torch.zeros(count, frames, dtype=torch.bool)
    if frames > 1:
        known[which < 0.08, 0] = True
        starts = ((which >= 0.08) & (which < 0.14)) | ((which >= 0.20) & (which < 0.25))
        ends = (which >= 0.14) & (which < 0.25)
        known |= starts[:, None] & (place < length[0])
        known |= ends[:, None] & (place >= frames - length[1])
        known |= (which > 0.97)[:, None] & (some < torch.rand(count, 1, generator=generator))
        known[known.all(1)] = False
    return known


def how_often(scene: world.Scene) -> int:
    """How many times as often as others a scene comes up.

    At the world's own shares a model that had learnt all the rest still mixed up the colours and shapes of two solids
    (a quarter of the clips), and let a cube stand that was to spin (one in twelve).
    """
    return HARD_OFTEN if len(scene.solids) == 2 or scene.motion == "spin" else 1


def turns_of(recipe: Recipe, bucket: Bucket, clips: Iterable[int]) -> list[int]:
    """Cumulative weights to draw the clips of a shape by: the world's by `how_often`, others evenly."""
    even = recipe.captions is not None
    return list(accumulate(1 if even else how_often(scene_of(recipe.seed, bucket, k)) for k in clips))


class Stock:
    """The clips of one shape that the transformer is trained on, as latents."""

    def __init__(self, recipe: Recipe, bucket: Bucket) -> None:
        self.latents = latents_of(recipe, bucket)
        path = ends_path(recipe, bucket)
        self.ends = load_file(path)["ends"] if path.exists() else self.latents[:0]
        self.lengths = end_lengths(bucket)
        self.clips = range(recipe.held_back, len(self.latents))
        self.turns = turns_of(recipe, bucket, self.clips)

    def draw(self, known: Tensor, rng: random.Random) -> tuple[list[int], Tensor]:
        """The numbers of B clips, and their latents [B, C, T, H, W], of which the frames `known` [B, T] are given.

        A request knows the end of its clip but not what leads to it: the encoded end is of a picture that stood still
        before (as `Canvas.known` has it), while what is to be made did lead to it. Where such ends lie ready they are
        taken.
        """
        chosen = rng.choices(self.clips, cum_weights=self.turns, k=len(known))
        at_end: list[int] = known.flip(1).cumprod(1).sum(1).tolist()
        count = len(self.lengths)
        rows = [row for row, length in enumerate(at_end) if length in self.lengths and len(self.ends)]
        for row in rows:
            place = rng.randrange(-(-self.clips.start // count), len(self.ends) // count)
            chosen[row] = place * count + self.lengths.index(at_end[row])
        clean = self.latents[chosen].float()
        for row in rows:
            clean[row, :, -at_end[row] :] = self.ends[chosen[row], :, -at_end[row] :].float()
        return chosen, clean


def join(recipe: Recipe) -> Recipe:
    """The recipe of one of the processes that torchrun started."""
    if recipe.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("gloo" if recipe.device == "cpu" else "nccl")
    return replace(recipe, rank=distributed.get_rank(), ranks=distributed.get_world_size())


def divide(recipe: Recipe, writer: nn.Module, optimizer: torch.optim.AdamW) -> Zero:
    """The network and its optimizer in this rank's part."""
    from model.zero import Zero

    return Zero(writer, optimizer, recipe.zero, device=recipe.device, bfloat16=recipe.bfloat16, clip=recipe.clip)


def train_dit(recipe: Recipe) -> None:
    """Flow matching over all shapes; the rate warms up, stays, and falls to 0 over the last quarter."""
    stocks = {bucket.name: Stock(recipe, bucket) for bucket in recipe.buckets}
    torch.manual_seed(recipe.seed)
    writer = Writer(recipe.dit, recipe.words)
    writer.dit.init_weights()
    writer.to(recipe.device)
    if recipe.device == "cpu":
        writer.attend_with(short_attention)
    average = copy.deepcopy(writer).requires_grad_(False)
    groups = [
        {"params": list(writer.text.parameters()), "scale": recipe.text_rate / recipe.dit_rate},
        {"params": list(writer.dit.parameters())},
    ]
    optimizer = torch.optim.AdamW(groups, recipe.dit_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    zero = divide(recipe, writer, optimizer) if recipe.zero and recipe.ranks > 1 else None
    parallel = zero or (nn.parallel.DistributedDataParallel(writer) if recipe.ranks > 1 else writer)
    modules = {"writer": writer, "average": average}
    checkpoint = Checkpoint(recipe.work / "dit.safetensors", modules, optimizer, zero, recipe.rank)
    shares = [b.share for b in recipe.buckets]

    def learn(step: int) -> dict[str, float]:
        share = step / recipe.dit_steps
        rate = recipe.dit_rate * min(1, (step + 1) / 100, (1 - share) / 0.25)
        _set_rate(optimizer, rate + 1e-6)
        rng = random.Random(f"{recipe.seed}/dit/{step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        bucket = rng.choices(recipe.buckets, shares)[0]
        known = draw_known(bucket.batch, stocks[bucket.name].latents.shape[2], generator)
        chosen, clean = stocks[bucket.name].draw(known, rng)
        prompts = [caption(recipe, bucket, k, rng) for k in chosen]
        prompts = ["" if rng.random() < 0.1 else p for p in prompts]
        times = draw_times(len(clean), generator)[:, None].expand_as(known).masked_fill(known, 0.0)
        disturbance = torch.randn(clean.shape, generator=generator)
        # Every rank draws the whole batch and computes its part: however many they are, the step is the same.
        mine = slice(recipe.rank, None, recipe.ranks)
        weight = (~known)[:, None, :, None, None].float() / (~known).float().mean()
        target, predicted = step_of(parallel, clean[mine], times[mine], prompts[mine], disturbance[mine], recipe)
        error = (predicted - target).square() * weight[mine].to(predicted)
        loss = error.mean() * (len(error) * recipe.ranks / len(clean))
        if zero:
            zero.step(loss)
        else:
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(writer.parameters(), recipe.clip)
            optimizer.step()
        _follow(average, writer, step, recipe.average)
        return {"loss": loss.item()}

    @torch.no_grad()
    def validate() -> dict[str, float]:
        bucket = recipe.buckets[0]
        stock = stocks[bucket.name].latents[: recipe.held_back].float()
        generator = torch.Generator().manual_seed(1)
        rng = random.Random(1)
        losses: list[float] = []
        for first in range(0, len(stock), 32):
            clean = stock[first : first + 32]
            times = ((torch.arange(len(clean)) % 16 + 0.5) / 16)[:, None].expand(-1, clean.shape[2])
            prompts = [caption(recipe, bucket, first + k, rng) for k in range(len(clean))]
            disturbance = torch.randn(clean.shape, generator=generator)
            target, predicted = step_of(average, clean, times, prompts, disturbance, recipe)
            losses.append((predicted - target).square().mean().item())
        return {
            "held_out_loss": sum(losses) / len(losses),
            "words_apart": words_apart(average.text),
            "places_apart": places_apart(average.text),
        }

    run(recipe, "dit", recipe.dit_steps, checkpoint, learn, validate)


@torch.no_grad()
def words_apart(text: TextEncoder) -> float:
    """How far the encodings of two words in one place differ: the tenth percentile over all pairs.

    1.4 would be unrelated, 0 the same. A text encoder that has collapsed hardly shows in the loss (skies and colours
    may still be told apart), but here.
    """
    words = [word for word in text.tokenizer.get_vocab() if word.isalpha()][:200]
    encoded = text.encode([f"a {word}" for word in words])[:, 1]
    return (torch.pdist(encoded) / encoded.shape[1] ** 0.5).quantile(0.1).item()


@torch.no_grad()
def places_apart(text: TextEncoder) -> float:
    """How far the encodings of one word in two places differ, as a share of how far those of two words in one place do.

    Which of two solids a colour belongs to is nowhere else to be read. Near 0 an encoder is deaf to the order of words.
    """
    words = [word for word in text.tokenizer.get_vocab() if word.isalpha()][:40]
    ahead, behind = text.encode([f"a {w} x x a y" for w in words]), text.encode([f"a y x x a {w}" for w in words])
    places = (ahead[:, 1] - behind[:, 5]).norm(dim=1).mean()
    return (places / torch.pdist(ahead[:, 1]).mean()).item()


def caption(recipe: Recipe, bucket: Bucket, index: int, rng: random.Random) -> str:
    if recipe.captions is not None:
        return recipe.captions[bucket.name][index]
    return world.describe(scene_of(recipe.seed, bucket, index), rng, frames=bucket.shape.frames)


def step_of(
    writer: Callable[..., Tensor], clean: Tensor, times: Tensor, prompts: list[str], disturbance: Tensor, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """(target, predicted) velocities of clips [B, C, T, H, W] at times [B, T]."""
    clean, disturbance, times = (tensor.to(recipe.device) for tensor in (clean, disturbance, times))
    mixed = blend(clean, disturbance, times[:, None, :, None, None])
    with recipe.autocast():
        predicted = writer(mixed, times, prompts)
    return disturbance - clean, predicted.float()


@torch.no_grad()
def sample(
    dit: DiT,
    text: TextEncoder,
    vae: VAE,
    prompts: Sequence[str],
    shape: Shape,
    seeds: Iterable[int],
    *,
    steps: int,
    guidance: float,
    solver: str,
    shift: float,
) -> Tensor:
    """Clips [B, 3, T, H, W] in -1..1 of one batch on one device, without an engine: for a look, or a score."""
    device = next(dit.parameters()).device
    size = vae.latent_shape(shape)
    x = torch.stack([noise(seed, size) for seed in seeds]).to(device)
    encoded = text.encode([*prompts, *("" for _ in prompts)])

    def velocity(x: Tensor, now: float) -> Tensor:
        both = dit(torch.cat((x, x)), torch.full((2 * len(x),), now, device=device), encoded)
        with_text, without = both.chunk(2)
        return guide(with_text, without, guidance)

    for latents in denoise(whole_times(velocity, solver), x, schedule(steps, shift, solver), solver):
        x = latents
    return vae.decode(x)


def trained_writer(recipe: Recipe) -> Writer:
    """The averaged weights of the last checkpoint."""
    writer = Writer(recipe.dit, recipe.words)
    writer.load_state_dict(part_of(load_file(recipe.work / "dit.safetensors"), "average"))
    writer.attend_with(attention)
    return writer.to(recipe.device).eval().requires_grad_(False)


def publish(recipe: Recipe, out: Path) -> None:
    """Writes the averaged weights as bfloat16 in the diffusers layout, with how they were made beside them."""
    writer, vae = trained_writer(recipe), trained_vae(recipe)
    writer.cpu()
    shape = recipe.buckets[0].shape
    defaults: dict[str, Any] = {**DEFAULTS, "width": shape.width, "height": shape.height, "frames": shape.frames}
    defaults["trained"] = [bucket.name for bucket in recipe.buckets]
    if recipe.captions is not None:
        defaults["name"] = out.name
    save_model(out, dit=writer.dit, text=writer.text, vae=vae.cpu(), defaults=defaults, dtype=torch.bfloat16)
    record = {stage: _last(recipe.work / f"{stage}.jsonl") for stage in ("vae", "decoder", "dit")}
    record["data"] = {"clips": {b.name: b.clips for b in recipe.buckets}}
    if recipe.captions is None:
        record["data"]["world_seed"] = recipe.seed
    else:
        source, cuts = data.load_list(recipe.work / data.LIST)
        record["data"]["digest"] = data.digest(cuts, source.fps)
    if (recipe.work / "captioner.safetensors").exists():
        from model.captioner import save_captioner, trained_captioner

        save_captioner(trained_captioner(recipe), out / CAPTIONER)
        record["captioner"] = _last(recipe.work / "captioner.jsonl")
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


# --- running, stopping, going on --------------------------------------------------------------------------------------


@dataclass(slots=True)
class Checkpoint:
    """Modules and AdamW moments in one safetensors file, replaced whole or not at all."""

    path: Path
    modules: Mapping[str, nn.Module]
    optimizer: torch.optim.Optimizer
    zero: Zero | None = None  # where it divides the optimizer over ranks; the file holds all of it
    rank: int = 0  # 0 writes

    def save(self, step: int) -> None:
        """Of every rank, since each may have a part of the moments."""
        tensors = {f"{name}.{k}": v for name, module in self.modules.items() for k, v in module.state_dict().items()}
        for k, moments in enumerate(self.zero.moments() if self.zero else self._moments()):
            if self.rank == 0:
                tensors |= {f"optimizer.{k}.{key}": value.cpu() for key, value in moments.items()}
        if self.rank:
            return
        tensors["step"] = torch.tensor(step)
        _write({k: v.detach().clone().contiguous() for k, v in tensors.items()}, self.path)

    def load(self) -> int:
        """The step to go on from; 0 when there is nothing to go on from."""
        if not self.path.exists():
            return 0
        tensors = load_file(self.path)
        for name, module in self.modules.items():
            module.load_state_dict(part_of(tensors, name))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, k, key = name.split(".")
                moments.setdefault(int(k), {})[key] = value
        in_order = [moments[k] for k in range(len(moments))]
        if self.zero:
            self.zero.load(in_order)
        elif in_order:  # without any, AdamW begins anew
            self._load(in_order)
        return int(tensors["step"])

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.optimizer.param_groups:
            yield from group["params"]

    def _moments(self) -> Iterator[dict[str, Tensor]]:
        for parameter in self._parameters():
            yield self.optimizer.state[parameter]

    def _load(self, moments: Sequence[Mapping[str, Tensor]]) -> None:
        for parameter, state in zip(self._parameters(), moments, strict=True):
            # The fused AdamW walks raw memory: a moment must lie in the same order as its parameter.
            self.optimizer.state[parameter] = {
                key: v.to(parameter.device) if key == "step" else torch.empty_like(parameter).copy_(v)
                for key, v in state.items()
            }


def run(
    recipe: Recipe,
    stage: str,
    steps: int,
    checkpoint: Checkpoint,
    learn: Callable[[int], dict[str, float]],
    validate: Callable[[], dict[str, float]],
) -> None:
    """Steps from the last checkpoint to `steps`; every so many it validates, logs a line to STAGE.jsonl and saves."""
    first = told = checkpoint.load()
    total: dict[str, float] = {}
    started = time.monotonic()
    for step in range(first, steps):
        for key, value in learn(step).items():
            total[key] = total.get(key, 0.0) + value
        done = step + 1
        if done % recipe.every and done != steps:
            continue
        row: dict[str, Any] = {
            "stage": stage,
            "step": done,
            "of": steps,
            "seconds": round(time.monotonic() - started, 1),
            "steps_per_second": round((done - first) / (time.monotonic() - started), 3),
        }
        means = over_ranks(recipe, {key: value / (done - told) for key, value in total.items()})
        total, told = {}, done
        row |= {key: round(value, 4) for key, value in means.items()}
        if recipe.rank == 0:
            row |= {key: round(value, 4) for key, value in validate().items()}
        checkpoint.save(done)
        if recipe.rank:
            continue
        with (recipe.work / f"{stage}.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def over_ranks(recipe: Recipe, means: dict[str, float]) -> dict[str, float]:
    """The mean over all ranks of what each has measured on its part of the batches."""
    if recipe.ranks == 1:
        return means
    measured = torch.tensor(list(means.values()), device=recipe.device)
    distributed.all_reduce(measured)
    return dict(zip(means, (measured / recipe.ranks).tolist(), strict=True))


def part_of(checkpoint: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The weights of one module of a checkpoint's tensors."""
    prefix = f"{name}."
    return {k.removeprefix(prefix): v for k, v in checkpoint.items() if k.startswith(prefix)}


@torch.no_grad()
def _follow(average: nn.Module, learning: nn.Module, step: int, most: float) -> None:
    """Moves a running average on, which keeps less of itself in the first steps, and `most` of itself at most."""
    keep = min(most, (1 + step) / (10 + step))
    for kept, new in zip(average.parameters(), learning.parameters(), strict=True):
        kept.lerp_(new, 1 - keep)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    part = path.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
    part.rename(path)


def _last(log: Path) -> dict[str, Any]:
    return json.loads(log.read_text().splitlines()[-1]) if log.exists() else {}


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
    recipe = recipe_of(given.work, settings)
    if given.data:
        try:
            list_cuts(recipe, given.data)
            recipe = of_data(recipe)
        except data.BadData as error:
            parser.error(str(error))
    torch.set_num_threads(recipe.threads)
    stage = given.stage
    if "WORLD_SIZE" in os.environ:
        if stage != "dit":
            parser.error(f"{stage} runs in one process; torchrun divides only dit")
        recipe = join(recipe)
    own = recipe.captions is not None
    if stage == "read" and not own:
        parser.error("read needs --data, the folder of videos and images")
    if stage == "captioner" and own:
        parser.error("captioner learns from the world, where the truth is known, not from --data")
    if stage == "render" or (stage == "all" and not own):
        render(recipe, recipe.threads, given.only)
    if stage == "read" or (stage == "all" and own):
        read(recipe)
    if stage in ("all", "vae"):
        train_vae(recipe)
    if stage in ("all", "latents"):
        encode_latents(recipe)
    if stage in ("all", "decoder"):
        train_decoder(recipe)
    if stage in ("all", "dit"):
        train_dit(recipe)
    if stage == "captioner" or (stage == "all" and not own):
        from model.captioner import train_captioner

        train_captioner(recipe)
    if stage == "look":
        look(recipe, given.out or recipe.work / "look.png")
    if stage == "publish" or (stage == "all" and given.out):
        if not given.out:
            parser.error("publish needs --out, the folder of the model")
        publish(recipe, given.out)


def end_with_input() -> None:
    """From now on this process ends when its standard input does, as it does when its parent is killed."""

    def wait() -> None:
        while os.read(0, 1):  # not sys.stdin: its lock would be held when the interpreter ends
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def look(recipe: Recipe, out: Path) -> None:
    """A contact sheet: of the world one prompt for each kind of motion and camera, else the held-back captions."""
    from model.encode import SheetRow, contact_sheet

    writer, vae = trained_writer(recipe), trained_vae(recipe)
    bucket = recipe.buckets[0]
    prompts = _kinds() if recipe.captions is None else list(recipe.captions[bucket.name][: min(recipe.held_back, 12)])
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
    for kind in (*world.MOTIONS, *world.CAMERAS[1:]):
        while True:
            scene = world.sample_scene(rng)
            if kind in (scene.motion, scene.camera):
                prompts.append(world.describe(scene, rng))
                break
    return prompts


if __name__ == "__main__":
    main()
