"""The device mesh: process groups for the axes cfg, sp and tp, and ZeRO's.

Where an axis has one rank its group is None and every function gives its input back: one process and N run one path.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from model.config import Partition
from model.loading.tensors import Part


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of the mesh as this rank sees it. `group` is None where the axis has a single rank."""

    group: ProcessGroup | None = None
    rank: int = 0
    size: int = 1

    @property
    def part(self) -> Part:
        """This rank's part of a tensor that is divided over the axis."""
        return Part(self.rank, self.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """This rank's place in a partition."""

    cfg: Axis = Axis()
    sp: Axis = Axis()
    tp: Axis = Axis()
    batch: Axis = Axis()
    zero: Axis = Axis()  # the ranks of all axes but tp, where these divide the weights


ALONE = Groups()


def connect(
    rank: int, world: int, port: int, device: str, listen_fd: int | None = None, timeout: float = 1800.0
) -> None:
    """Joins the engine's process group on loopback; `listen_fd` is rank 0's socket, bound to `port` and listening.

    One rank has nothing to join. `timeout` (seconds) bounds every collective.
    """
    if world == 1:
        return
    deepspeed = load_deepspeed(device)
    wait = timedelta(seconds=timeout)
    store = dist.TCPStore("127.0.0.1", port, world, rank == 0, wait, master_listen_fd=listen_fd)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
    deepspeed.init_distributed(dist_backend="nccl" if device == "cuda" else "gloo", timeout=wait, verbose=False)


def load_deepspeed(device: str) -> ModuleType:
    """DeepSpeed, which takes seconds to import, for this device."""
    os.environ.setdefault("DS_ACCELERATOR", device)  # else it looks for one, and warns
    import deepspeed

    # On a CPU DeepSpeed would compile a shared-memory all-reduce (45 s) that ignores the process group: with two
    # groups of two ranks it sums over all four, silently. Without it, gloo does the sum, in the right group.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def groups_of(partition: Partition, device: str) -> Groups:
    """The meshes of a partition, tensor parallel ranks next to each other. Raises ValueError when the world differs."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if partition.world != world:
        raise ValueError(f"partition {partition} needs {partition.world} ranks, this engine has {world}")
    if world == 1:
        return ALONE
    axes = axes_of({"batch": partition.batch, "cfg": partition.cfg, "sp": partition.sp, "tp": partition.tp}, device)
    if partition.zero > 1:
        axes["zero"] = axes_of({"zero": partition.zero, "tp": partition.tp}, device)["zero"]
    return Groups(**axes)


def axes_of(sizes: Mapping[str, int], device: str) -> dict[str, Axis]:
    """The axes of one mesh over all ranks, the last one's ranks next to each other."""
    mesh = dist.init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    return {
        name: Axis(mesh.get_group(name), mesh.get_local_rank(name), size) if size > 1 else Axis()
        for name, size in sizes.items()
    }


def gather(x: Tensor, axis: Axis) -> list[Tensor]:
    """All-gathers x over the axis, in rank order; on a single rank, [x]."""
    if axis.group is None:
        return [x]
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(axis.size)]
    dist.all_gather(parts, x.contiguous(), group=axis.group)
    return parts
