"""One rank of `test_partition`: checks models under partitions and prints what every rank found, one JSON line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from fractions import Fraction
from itertools import pairwise, product
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import Partition
from model.loading.card import kept_weights
from model.loading.load import load_dit
from model.network.diffusion import denoise, guide, schedule
from model.network.dit import DiT
from model.network.stepcache import StepCache
from model.parallel.guidance import both_halves, own_text, total
from model.parallel.memory import rank_bytes
from model.parallel.mesh import ALONE, Axis, Groups, connect, groups_of
from model.parallel.partition import load_partitioned, parameter_bytes
from model.parallel.self_test import self_test
from model.parallel.zero_inference import held
from tests.bench.traffic import Work, step_traffic, text_kv_traffic
from tests.tiny import hold

PARTITIONS = {
    2: ["tp=2", "sp=2", "cfg=2", "zero=2", "sp=2,zero=2", "cfg=2,zero=2"],
    3: ["zero=3"],  # four rows of a batch over three ranks; parameters that do not divide by three
    4: ["cfg=2,tp=2", "sp=2,tp=2", "cfg=2,sp=2,zero=4", "tp=2,zero=2"],
}
MORE = ["cfg=2,sp=2", "tp=4", "sp=4", "zero=4", "cfg=2,zero=4", "sp=2,zero=4"]  # of four ranks, for `make chaos`
INPUTS = {  # latent frames, rows and columns (a token is 1 x 2 x 2 of them), and how many times a clip has
    "divides": (4, 4, 6, 1),
    "padded": (3, 6, 6, 1),
    "per frame": (3, 6, 6, 3),
    "per token": (3, 6, 6, 27),
    "one token": (1, 2, 2, 1),
}


def inputs(kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    *size, times = INPUTS[kind]
    latents = torch.randn(2, 16, *size, generator=random)
    text, negative = torch.randn(2, 2, 7, 16, generator=random)
    return latents, torch.rand(2, times, generator=random), text, negative


class Sent(TorchDispatchMode):
    """Adds up what this rank's collectives send, whoever calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = Fraction()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.bytes += self.sent(func, args)
        return func(*args, **(kwargs or {}))

    def sent(self, func: Any, args: Any) -> Fraction:
        name = func._schema.name
        tensors = args[{"c10d::allreduce_": 0}.get(name, 1)]
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else tensors
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        ranks = next(dist.ProcessGroup.unbox(a).size() for a in args if isinstance(a, torch.ScriptObject))
        factors: dict[str, Fraction | int] = {
            "c10d::allreduce_": Fraction(2 * (ranks - 1), ranks),
            "c10d::allgather_": ranks - 1,
            "c10d::_allgather_base_": ranks - 1,
            "c10d::alltoall_base_": Fraction(ranks - 1, ranks),
        }
        return Fraction(factors[name] * size)


def traffic(path: Path, groups: Groups, partition: str, dtype: torch.dtype) -> list[tuple[str, ...]]:
    """What was done, what this rank sent, and what the formula says."""
    divided, mine = Partition.parse(partition), load_partitioned(path, groups, dtype, "cpu")
    lines: list[tuple[str, ...]] = []

    def line(what: str, sent: Sent, expected: Fraction) -> None:
        lines.append((f"{what}, {mine.config.layers} layers in {dtype}", str(sent.bytes), str(expected)))

    for kind in ("padded", "one token"):
        latents, times, text, negative = inputs(kind)
        tokens = prod(latents.shape[2:]) // 4
        for guided, precomputed in product((True, False), (True, False)):
            read = own_text(text, negative, groups.cfg) if guided else text
            work = Work(clips=2, tokens=tokens, words=7, guided=guided, precomputed=precomputed)
            with Sent() as sent:
                words = mine.precompute_kv(read) if precomputed else read
            once = text_kv_traffic(mine.config, divided, work.rows(divided), 7, dtype.itemsize)
            line("text k/v", sent, once.whole(mine.config.layers) if precomputed else Fraction())
            with Sent() as sent:
                if guided:
                    both_halves(mine, latents, times, words, groups.cfg)
                else:
                    mine(latents, times, words)
            step = step_traffic(mine.config, divided, work, dtype.itemsize)
            line(f"a step of {kind}, {guided=}, {precomputed=}", sent, step.whole(mine.config.layers))
    return lines


@torch.no_grad()
def check(path: Path, short: Path, deep: Path, partition: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    groups = groups_of(Partition.parse(partition), "cpu")
    whole, mine = load_dit(path, torch.float32), load_partitioned(path, groups, torch.float32, "cpu")
    for kind in INPUTS:
        latents, times, text, negative = inputs(kind)
        wanted = torch.cat(both_halves(whole, latents, times, own_text(text, negative, Axis()), Axis()))
        read = own_text(text, negative, groups.cfg)
        for what, words in (("error", read), ("error precomputed", mine.precompute_kv(read))):
            got = torch.cat(both_halves(mine, latents, times, words, groups.cfg))
            found[f"{what} {kind}"] = float((got - wanted).abs().max())
        found[f"size {kind}"] = float(wanted.abs().max())
    found["step cache"] = compare_cached(whole, mine, groups)
    found["bytes"], found["whole bytes"] = parameter_bytes(mine.blocks), parameter_bytes(whole.blocks)
    if kept_weights(path) is None:  # what is sent does not depend on how weights are kept
        found["traffic"] = [
            line
            for model, dtype in ((path, torch.float32), (deep, torch.float32), (short, torch.bfloat16))
            for line in traffic(model, groups, partition, dtype)
        ]
    found["predicted"], found["loaded"] = rank_bytes(path, Partition.parse(partition), 4), parameter_bytes(mine)
    found["self test"] = self_test(mine, path, groups, torch.float32, "cpu").error
    in_bfloat = load_partitioned(short, groups, torch.bfloat16, "cpu")
    bfloat = self_test(in_bfloat, short, groups, torch.bfloat16, "cpu")
    found["bfloat16 self test"] = [bfloat.error, bfloat.bound]
    with torch.no_grad():  # one wrong slice on one rank must not get past the self-test
        if dist.get_rank() == dist.get_world_size() - 1:
            held(mine.blocks[1].get_parameter("attn1.to_v.bias")).add_(0.05)
    try:
        self_test(mine, path, groups, torch.float32, "cpu")
        found["spoilt"] = "served"
    except Exception as problem:
        found["spoilt"] = f"{type(problem).__name__}: {problem}"
    return found


def compare_cached(whole: DiT, mine: DiT, groups: Groups) -> dict[str, Any]:
    """A denoising with a step cache, on the whole network and on the divided one: the changes it saw, and the latents.

    Its threshold lies in the widest gap between the changes of an exact one, so that rounding decides nothing.
    """
    seen = sorted(cached(whole, ALONE, 1e-12)[0])
    low, high = max(pairwise(seen[2:-2]), key=lambda gap: gap[1] / gap[0])
    (changes, skipped, wanted), (got_changes, got_skipped, got) = (
        cached(dit, where, (low * high) ** 0.5) for dit, where in ((whole, ALONE), (mine, groups))
    )
    off = max(abs(one / other - 1) for one, other in zip(got_changes, changes, strict=True))
    error = float((got - wanted).abs().max())
    return {"changes": len(changes), "off": off, "skipped": skipped, "skipped here": got_skipped, "error": error}


def cached(dit: DiT, groups: Groups, threshold: float) -> tuple[list[float], int, torch.Tensor]:
    """Changes, skipped steps and latents of 16 steps on 27 tokens, an odd number, of which the first 9 are known."""
    latents, _, text, negative = (x[:1] for x in inputs("per frame"))
    changes = list[float]()

    def watched(sums: torch.Tensor) -> torch.Tensor:
        sums = total(sums, groups, guided=True)
        changes.append(float(sums[0] / sums[1]))
        return sums

    words, cache = own_text(text, negative, groups.cfg), StepCache(threshold, 16, watched)
    predict = cache.over(dit, lambda x, times: guide(*both_halves(dit, x, times, words, groups.cfg), 3.0))
    steps: Iterable[torch.Tensor] = denoise(hold(predict, [True, False, False]), latents, schedule(16, 3.0), "ab2")
    (*_, last) = steps
    return changes, cache.skipped, last


def main() -> None:
    rank, world, port, listen_fd = (int(a) for a in sys.argv[1:5])
    torch.set_num_threads(1)
    connect(rank, world, port, "cpu", listen_fd if rank == 0 else None, timeout=600)
    partitions, paths = sys.argv[5].split(), list(map(Path, sys.argv[6:]))
    results: list[dict[str, Any]] = []
    for path, short, deep in zip(paths[::3], paths[1::3], paths[2::3], strict=True):
        some = [each for each in partitions if kept_weights(path) is None or Partition.parse(each).zero == 1]
        results.append({partition: check(path, short, deep, partition) for partition in some})
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, results)
    if rank == 0:
        print(json.dumps(everyone), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
