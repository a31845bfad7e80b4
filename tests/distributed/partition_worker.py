"""One rank of `test_partition`: runs every check that its world size allows and prints what it found, one JSON line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.checkpoint import rank_bytes
from model.conditioning import hold
from model.config import Partition
from model.diffusion import denoise, guide, schedule
from model.dit import DiT
from model.partition import (
    ALONE,
    Axis,
    Groups,
    both_halves,
    connect,
    groups_of,
    load_partitioned,
    own_text,
    parameter_bytes,
    self_test,
    total,
)
from model.stepcache import StepCache
from model.weights import load_dit

PARTITIONS = {2: ["tp=2", "sp=2", "cfg=2"], 4: ["cfg=2,tp=2", "cfg=2,sp=2", "sp=2,tp=2", "tp=4", "sp=4"]}
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


@torch.no_grad()
def check(path: Path, short: Path, partition: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    groups = groups_of(Partition.parse(partition), "cpu")
    whole, mine = load_dit(path, torch.float32), load_partitioned(path, groups, torch.float32, "cpu")
    for kind in INPUTS:
        latents, times, text, negative = inputs(kind)
        wanted = torch.cat(both_halves(whole, latents, times, own_text(text, negative, Axis()), Axis()))
        read = own_text(text, negative, groups.cfg)
        for what, words in (("error", read), ("error heard", mine.hear(read))):
            got = torch.cat(both_halves(mine, latents, times, words, groups.cfg))
            found[f"{what} {kind}"] = float((got - wanted).abs().max())
        found[f"size {kind}"] = float(wanted.abs().max())
    found["step cache"] = compare_cached(whole, mine, groups)
    found["bytes"], found["whole bytes"] = parameter_bytes(mine.blocks), parameter_bytes(whole.blocks)
    found["predicted"], found["loaded"] = rank_bytes(path, Partition.parse(partition), 4), parameter_bytes(mine)
    found["self test"] = self_test(mine, path, groups, torch.float32, "cpu").error
    in_bfloat = load_partitioned(short, groups, torch.bfloat16, "cpu")
    bfloat = self_test(in_bfloat, short, groups, torch.bfloat16, "cpu")
    found["bfloat16 self test"] = [bfloat.error, bfloat.bound]
    with torch.no_grad():  # one wrong slice on one rank must not get past the self-test
        if dist.get_rank() == dist.get_world_size() - 1:
            mine.blocks[1].get_parameter("attn1.to_v.weight").mul_(1.05)
    try:
        self_test(mine, path, groups, torch.float32, "cpu")
        found["spoilt"] = "served"
    except Exception as problem:
        found["spoilt"] = f"{type(problem).__name__}: {problem}"
    return found


def compare_cached(whole: DiT, mine: DiT, groups: Groups) -> dict[str, Any]:
    """A walk with a step cache, on the whole network and on the divided one: the changes it saw, and the latents.

    Its threshold lies in the widest gap between the changes of an exact walk, so that rounding decides nothing.
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
        sums = total(sums, groups)
        changes.append(float(sums[0] / sums[1]))
        return sums

    words, cache = own_text(text, negative, groups.cfg), StepCache(threshold, 16, watched)
    predict = cache.over(dit, lambda x, times: guide(*both_halves(dit, x, times, words, groups.cfg), 3.0))
    walk: Iterable[torch.Tensor] = denoise(hold(predict, [True, False, False]), latents, schedule(16, 3.0), "ab2")
    (*_, last) = walk
    return changes, cache.skipped, last


def main() -> None:
    rank, world, port, listen_fd = (int(a) for a in sys.argv[1:5])
    torch.set_num_threads(1)
    connect(rank, world, port, "cpu", listen_fd if rank == 0 else None, timeout=240)
    results = {partition: check(Path(sys.argv[5]), Path(sys.argv[6]), partition) for partition in PARTITIONS[world]}
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, results)
    if rank == 0:
        print(json.dumps(everyone), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
