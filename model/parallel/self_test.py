"""The self-test of a partition: the divided network beside the whole one, on a tiny input."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.loading.card import TRANSFORMER
from model.loading.tensors import WHOLE, WeightFiles, empty, read_parameters
from model.network.dit import DiT, set_type
from model.parallel.guidance import both_halves, own_text
from model.parallel.mesh import ALONE, Axis, Groups


@dataclass(frozen=True, slots=True)
class SelfTest:
    """How far the partitioned network is from the whole one, relative to the largest velocity, and how far it may."""

    error: float
    bound: float


class SelfTestFailed(Exception):
    """The partitioned network computes something else than the whole one: its pictures would be wrong. Do not serve."""


@torch.no_grad()
def self_test(
    dit: DiT,
    path: Path,
    groups: Groups,
    dtype: torch.dtype,
    device: str,
    part: str = TRANSFORMER,
    compiled: bool = False,
) -> SelfTest:
    """Compares this rank's results with the whole network's on a small clip. Raises SelfTestFailed on every rank alike.

    One rank has nothing to compare unless its network is compiled: the whole one never is.
    The whole network is computed by rank 0, with one block's weights in memory at a time. In float32 the two may differ
    by 1e-5: only the order of sums differs. In a shorter type rounding alone moves the whole network some way off what
    it computes in float32 with the same weights; the partitioned one may be three times as far off.
    """
    alone = groups == ALONE
    if alone and not compiled:
        return SelfTest(0.0, 0.0)
    config, random = dit.config, torch.Generator().manual_seed(0)
    size = [3 * step for step in config.patch]  # 27 tokens, so that an even sp has to pad
    latents = torch.randn(1, config.in_channels, *size, generator=random).to(device)
    text, negative = torch.randn(2, 1, 5, config.text_dim, generator=random).to(device)
    times = torch.tensor([[0.9, 0.5, 0.0]], device=device)

    def velocities(network: DiT, cfg: Axis) -> Tensor:
        return torch.stack(both_halves(network, latents, times, own_text(text, negative, cfg), cfg)).float()

    for _ in range(2 if compiled else 0):  # CUDA graphs are warmed up, recorded, and only then replayed
        velocities(dit, groups.cfg)
    mine = velocities(dit, groups.cfg)
    truth, rounded = torch.zeros_like(mine), torch.zeros_like(mine)
    if alone or dist.get_rank() == 0:
        with streamed(path, dtype, torch.float32, device, part) as whole:
            truth = velocities(whole, Axis())
        if dtype != torch.float32:
            with streamed(path, dtype, dtype, device, part) as whole:
                rounded = velocities(whole, Axis())
    if not alone:
        for wanted in (truth, rounded):
            dist.broadcast(wanted, 0)
    scale = truth.abs().max().clamp(min=1e-30)
    error = (mine - truth).abs().max() / scale
    if not alone:
        dist.all_reduce(error, dist.ReduceOp.MAX)
    bound = 1e-5 if dtype == torch.float32 else 3 * float((rounded - truth).abs().max() / scale)
    if not float(error) <= bound:  # a NaN fails too
        raise SelfTestFailed(
            f"the partitioned transformer differs from the whole one by {float(error):.2e}, allowed {bound:.2e}"
        )
    return SelfTest(float(error), bound)


@contextmanager
def streamed(
    path: Path, stored: torch.dtype, computed: torch.dtype, device: str, part: str = TRANSFORMER
) -> Generator[DiT]:
    """The whole transformer, weights rounded to `stored`, each block read when its turn comes and forgotten after."""
    dit = empty(path, part)
    with WeightFiles(path, part) as files:

        def fill(module: nn.Module, prefix: str, recurse: bool = True) -> None:
            set_type(module, stored, prefix, recurse)
            module.to_empty(device=device, recurse=recurse)
            read_parameters(module, files, WHOLE, prefix, recurse)
            set_type(module, computed, prefix, recurse)

        for name, module in dit.named_children():
            if name != "blocks":
                fill(module, f"{name}.")
        for k, block in enumerate(dit.blocks):
            block.register_forward_pre_hook(lambda block, _, k=k: fill(block, f"blocks.{k}."))
            block.register_forward_hook(lambda block, *_: block.to("meta") and None)
        fill(dit, "", recurse=False)
        yield dit
