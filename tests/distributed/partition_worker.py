"""One rank of `test_partition`: runs every check that its world size allows and prints what it found, one JSON line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.checkpoint import rank_bytes
from model.config import Partition
from model.partition import (
    Axis,
    both_halves,
    connect,
    groups_of,
    load_partitioned,
    own_text,
    parameter_bytes,
    self_test,
)
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
    found["bytes"], found["whole bytes"] = parameter_bytes(mine.blocks), parameter_bytes(whole.blocks)
    found["predicted"], found["loaded"] = rank_bytes(path, Partition.parse(partition), 4), parameter_bytes(mine)
    found["self test"] = self_test(mine, path, groups, torch.float32, "cpu").error
    in_bfloat = load_partitioned(short, groups, torch.bfloat16, "cpu")
    bfloat = self_test(in_bfloat, short, groups, torch.bfloat16, "cpu")
    found["bfloat16 self test"] = [bfloat.error, bfloat.bound]
    with torch.no_grad():  # one wrong slice on one rank must not get past the self-test
        if dist.get_rank() == dist.get_world_size() - 1:
            mine.blocks[1].get_parameter("attn1.to_v.bias").add_(0.05)
    try:
        self_test(mine, path, groups, torch.float32, "cpu")
        found["spoilt"] = "served"
    except Exception as problem:
        found["spoilt"] = f"{type(problem).__name__}: {problem}"
    return found


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
