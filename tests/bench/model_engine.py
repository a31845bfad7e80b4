"""Measures the engine on this machine, and prints Markdown: `python -m tests.bench.model_engine`.

What is compared is run side by side in one go, since machines and their moods differ.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file

from model.config import ClipShape, DiTConfig, Partition
from model.engine.clip import ClipSpec, RenderedClip
from model.engine.engine import Engine
from model.loading.card import SHIPPED, TRANSFORMER, WEIGHTS, find_model
from model.loading.load import load_dit, load_text, load_vae
from model.network.diffusion import noise
from model.network.dit import DiT
from model.network.vae import to_pixels
from model.parallel.memory import resident_peak
from model.parallel.mesh import connect, groups_of
from model.parallel.partition import load_partitioned, parameter_bytes
from model.parallel.zero_inference import held
from model.score.modes import spec_of
from tests.bench.model_gpu import gpu

GIB = 1 << 30
LARGE = DiTConfig(layers=11, heads=12, head_dim=128, ffn_dim=8960, text_dim=4096)  # Wan 1.3B's width, 2 GB in float32


def random_checkpoint(folder: Path, config: DiTConfig) -> int:
    """Writes a transformer of random weights, a file for every block, and returns its bytes."""
    (folder / TRANSFORMER).mkdir(parents=True)
    (folder / TRANSFORMER / "config.json").write_text(json.dumps(config.to_diffusers()))
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in DiT(config).state_dict().items()}
    places: dict[str, str] = {}
    for name in shapes:
        block = name.split(".")[1] if name.startswith("blocks.") else "rest"
        places[name] = f"{block}.safetensors"
    for file in sorted(set(places.values())):
        tensors = {name: torch.randn(shapes[name]) / 64 for name, place in places.items() if place == file}
        save_file(tensors, folder / TRANSFORMER / file)
    (folder / TRANSFORMER / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": places}))
    return sum(file.stat().st_size for file in (folder / TRANSFORMER).glob("*.safetensors"))


def _load(rank: int, folder: Path, partition: Partition, port: int, out: Path) -> None:
    """One process: loads its part, or without a partition the whole, and writes down what that took."""
    torch.set_num_threads(1)
    divided = partition.world > 1
    connect(rank, partition.world, port, "cpu")
    groups = groups_of(partition, "cpu")
    if divided:
        importlib.import_module("deepspeed.module_inject.layers")  # which takes memory too, whatever is loaded
    before, started = resident_peak(), time.perf_counter()
    dit = load_partitioned(folder, groups, torch.float32, "cpu") if divided else load_dit(folder, torch.float32)
    for parameter in dit.parameters():  # a mapped file is only read when somebody looks
        held(parameter).sum()
    took = time.perf_counter() - started
    found = {"bytes": parameter_bytes(dit), "peak": resident_peak() - before, "seconds": took}
    (out / f"{rank}.json").write_text(json.dumps(found))
    if divided:
        dist.barrier()
        dist.destroy_process_group()


def loading(config: DiTConfig = LARGE) -> Iterator[str]:
    """The most memory that loading a random checkpoint takes, whole and by two ranks that divide it in two ways."""
    yield "| loaded | weights of a rank | peak resident memory above the start | seconds |"
    yield "|---|---|---|---|"
    with tempfile.TemporaryDirectory(prefix="rushes-bench-") as folder:
        size = random_checkpoint(Path(folder) / "model", config)
        for partition in (Partition(), Partition(tp=2), Partition(zero=2)):
            out = Path(folder) / str(partition)
            out.mkdir()
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            mp.spawn(_load, (Path(folder) / "model", partition, port, out), nprocs=partition.world)
            ranks = [json.loads((out / f"{rank}.json").read_text()) for rank in range(partition.world)]
            what = f"{size / GIB:.2f} GiB whole" if partition.world == 1 else f"by each rank of {partition}"
            worst: dict[str, Any] = {name: max(rank[name] for rank in ranks) for name in ranks[0]}
            yield (
                f"| {what} | {worst['bytes'] / GIB:.2f} GiB | {worst['peak'] / GIB:.2f} GiB | {worst['seconds']:.1f} |"
            )


def step(rounds: int = 15) -> Iterator[str]:
    """One denoising step of mini against diffusers' transformer with the same weights: both halves of guidance."""
    from diffusers import WanTransformer3DModel

    folder = SHIPPED / "mini"
    ours, text = load_dit(folder, torch.float32), load_text(folder, torch.float32)
    theirs = WanTransformer3DModel.from_pretrained(folder / TRANSFORMER, dtype=torch.float32).eval()
    yield "| clips at once | ours, ms | diffusers, ms | ours of theirs | largest difference |"
    yield "|---|---|---|---|---|"
    for clips in (1, 4, 16):
        random = torch.Generator().manual_seed(0)
        x, times = torch.randn(2 * clips, 16, 5, 8, 8, generator=random), torch.full((2 * clips,), 0.7)
        words = text.encode(["a red ball slides to the left"] * clips + [""] * clips)
        with torch.inference_mode():
            text_kv = ours.precompute_kv(words)
            calls: dict[str, Callable[[], torch.Tensor]] = {
                "ours": lambda x=x, t=times, kv=text_kv: ours(x, t, kv),
                "theirs": lambda x=x, t=times, w=words: theirs(x, 1000 * t, w, return_dict=False)[0],
            }
            error = (calls["ours"]() - calls["theirs"]()).abs().max().item()
            taken: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(rounds):  # by turns, so that a busy moment hits both
                for name, call in calls.items():
                    started = time.perf_counter()
                    call()
                    taken[name].append(time.perf_counter() - started)
        a, b = (median(taken[name]) for name in ("ours", "theirs"))
        yield f"| {clips} | {1000 * a:.1f} | {1000 * b:.1f} | {a / b:.2f} | {error:.0e} |"


def their_pipeline(folder: Path) -> Any:
    """diffusers' `WanPipeline` over a model folder of ours, whose autoencoder it does not have: it ends at latents."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import AutoTokenizer, UMT5EncoderModel

    parts: dict[str, Any] = dict(
        transformer=WanTransformer3DModel.from_pretrained(folder / TRANSFORMER, dtype=torch.float32),
        text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=None,
    )
    pipeline = WanPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Ours:
    """Engines of mini, one rank each, started."""

    def __init__(self, engines: int, threads: int, seats: int, running: ExitStack) -> None:
        self.engines = [
            running.enter_context(Engine(SHIPPED / "mini", Partition(), threads_per_rank=threads, micro_batch=seats))
            for _ in range(engines)
        ]
        self.callers = running.enter_context(ThreadPoolExecutor(engines))

    def render(self, specs: Sequence[ClipSpec]) -> list[RenderedClip]:
        """Every engine takes as many."""
        parts = [specs[k :: len(self.engines)] for k in range(len(self.engines))]
        made = self.callers.map(lambda engine, some: list(engine.render(some)), self.engines, parts)
        return [clip for some in made for clip in some]


class Theirs:
    """Processes with `WanPipeline` of mini and our decoder."""

    def __init__(self, processes: int, threads: int, batch: int, running: ExitStack) -> None:
        spawn = mp.get_context("spawn")
        self.batch = batch
        self.processes = [
            running.enter_context(ProcessPoolExecutor(1, spawn, initializer=_load_theirs, initargs=(threads,)))
            for _ in range(processes)
        ]

    def render(self, specs: Sequence[ClipSpec]) -> None:
        parts = [specs[k :: len(self.processes)] for k in range(len(self.processes))]
        each = zip(self.processes, parts, strict=True)
        for done in [process.submit(_render_theirs, some, self.batch) for process, some in each]:
            done.result()


_their: dict[str, Any] = {}  # what this process has loaded


def _load_theirs(threads: int) -> None:
    torch.set_num_threads(threads)
    folder = SHIPPED / "mini"
    _their.update(pipeline=their_pipeline(folder), vae=load_vae(folder, torch.float32), card=find_model(folder))


@torch.inference_mode()
def _render_theirs(specs: Sequence[ClipSpec], batch: int) -> None:
    """Prompts to pixels, so many at once."""
    vae, card = _their["vae"], _their["card"]
    for first in range(0, len(specs), batch):
        some = specs[first : first + batch]
        shape = ClipShape(some[0].width, some[0].height, some[0].frames)
        latents = _their["pipeline"](
            prompt=[spec.prompt for spec in some],
            negative_prompt=[""] * len(some),
            width=shape.width,
            height=shape.height,
            num_frames=shape.frames,
            num_inference_steps=some[0].steps,
            guidance_scale=some[0].guidance,
            max_sequence_length=card.max_prompt_tokens,
            latents=torch.stack([noise(spec.seed, vae.latent_shape(shape)) for spec in some]),
            output_type="latent",
        ).frames
        for latent in latents:
            to_pixels(vae.decode(latent[None]))


def clips(
    count: int = 32,
    cores: int = os.cpu_count() or 1,
    at_once: Sequence[tuple[int, int]] = ((1, 1), (4, 4), (4, 16)),
    steps: int = 25,
) -> Iterator[str]:
    """Whole clips of mini, 25 steps, guided: engines of one rank against diffusers' pipeline and our decoder.

    at_once: how many clips ours denoises together, and theirs.
    """
    card = find_model(SHIPPED / "mini")
    prompts = [f"a {colour} ball slides to the left" for colour in ("red", "green", "blue", "yellow")]
    specs = [
        replace(spec_of(card, prompts[k % len(prompts)], seed=k, steps=steps, overlap=5), solver="euler")
        for k in range(count)
    ]
    yield (
        f"| processes x threads | clips at once, of {count}: ours | s a clip | diffusers | s a clip "
        "| times as fast | decoding, of ours |"
    )
    yield "|---|---|---|---|---|---|---|"
    for processes, threads in ((1, cores), (cores, 1)):
        for mine, yours in at_once:
            turn, taken = max(8, processes * max(mine, yours)), [0.0, 0.0]
            made: list[RenderedClip] = []
            with ExitStack() as running:
                ours = Ours(processes, threads, mine, running)
                theirs = Theirs(processes, threads, yours, running)
                ours.render(specs[: processes * mine])
                theirs.render(specs[:processes])
                for first in range(0, count, turn):  # by turns, so that a busy moment hits both
                    some, started = specs[first : first + turn], time.perf_counter()
                    made += ours.render(some)
                    between = time.perf_counter()
                    theirs.render(some)
                    taken[0] += between - started
                    taken[1] += time.perf_counter() - between
            a, b = taken
            decode = sum(clip.seconds["decode"] for clip in made) / sum(sum(clip.seconds.values()) for clip in made)
            yield (
                f"| {processes} x {threads} | {mine} | {a / count:.2f} | {yours} | {b / count:.2f} | {b / a:.2f} "
                f"| {decode:.0%} |"
            )


BENCHES = {"loading": loading, "step": step, "clips": clips, "gpu": gpu}


def show(benches: Mapping[str, Callable[[], Iterator[str]]], which: Sequence[str] = ()) -> None:
    """Runs some of them, by default all, and prints what they say under what they are."""
    for name in which or benches:
        print(f"### {(benches[name].__doc__ or name).splitlines()[0]}\n")
        for line in benches[name]():
            print(line, flush=True)
        print()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.model_engine", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("which", nargs="*", choices=[*BENCHES, []], help="which (default: all)")
    show(BENCHES, parser.parse_args().which)


if __name__ == "__main__":
    main()
