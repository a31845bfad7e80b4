"""A rank's share of the model: imports, the process group, the networks on it, and their self-test."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from model.config import Partition
from model.engine.clip import RankInfo
from model.engine.messages import RankSettings
from model.engine.process import cpu_kind
from model.loading.card import SECOND, TRANSFORMER
from model.loading.load import load_text, load_vae
from model.network import cpu
from model.network.dit import DiT
from model.network.text import TextEncoder
from model.network.vae import VAE, WanVAE
from model.parallel.memory import check_memory, free_bytes
from model.parallel.mesh import Groups, connect, groups_of
from model.parallel.partition import load_partitioned, parameter_bytes
from model.parallel.self_test import self_test
from model.parallel.vae_rows import DividedDecoder


class NotEnoughDevices(ValueError):
    """A partition has more ranks than this machine has GPUs."""


@dataclass(frozen=True, slots=True)
class Networks:
    """The networks of one rank."""

    experts: list[DiT]  # one, or two of which the first works near the noise
    groups: Groups
    text: TextEncoder | None  # on rank 0
    vae: VAE | WanVAE
    decoder: DividedDecoder
    info: RankInfo


def load(settings: RankSettings, started: float) -> Networks:
    """Joins the group, loads this rank's part and tests it; the time since `started` (perf_counter) went to imports.

    Raises NotEnoughDevices, ValueError or NotEnoughMemory for a model that this partition or machine cannot serve,
    NoCompiler, and SelfTestFailed.
    """
    divided = Partition.parse(settings.partition)
    if settings.device == "cuda" and (found := torch.cuda.device_count()) < divided.world:
        raise NotEnoughDevices(
            f"partition {divided} needs a GPU for each of its {divided.world} ranks, and torch finds {found}: choose a "
            "smaller one, such as tp=1, or look at nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
    torch.set_num_threads(settings.threads)
    torch.set_grad_enabled(False)
    cpu.prepare()
    device, path, dtype = settings.device, Path(settings.path), getattr(torch, settings.dtype)
    if settings.compile:
        from model.network.compiled import check_compiler

        check_compiler(device)
        if divided.zero > 1:
            raise ValueError(f"partition {divided} cannot be compiled: zero gathers weights while a block computes")
    if device == "cuda":
        torch.cuda.set_device(settings.rank)
        check_memory(path, divided, free_bytes(device), dtype.itemsize, device)
    laps = {"import": time.perf_counter() - started}

    def lap(name: str) -> None:
        laps[name] = time.perf_counter() - started - sum(laps.values())

    connect(settings.rank, divided.world, settings.port, device, settings.listener)
    groups = groups_of(divided, device)
    lap("connect")
    parts = [TRANSFORMER] if settings.boundary is None else [TRANSFORMER, SECOND]
    experts = [load_partitioned(path, groups, dtype, device, part=part) for part in parts]
    if settings.compile:
        from model.network.compiled import compile_blocks

        for dit in experts:
            compile_blocks(dit, settings.compile)
    text = load_text(path, dtype, device) if settings.rank == 0 else None
    vae = load_vae(path, torch.float32, device)
    decoder = DividedDecoder(vae, settings.rank, divided.world)
    lap("load")
    errors = [
        self_test(dit, path, groups, dtype, device, part, bool(settings.compile)).error
        for dit, part in zip(experts, parts, strict=True)
    ]
    lap("self_test")
    info = RankInfo(
        rank=settings.rank,
        pid=os.getpid(),
        parameter_bytes=sum(map(parameter_bytes, experts)),
        self_test=max(errors),
        device=torch.cuda.get_device_name() if device == "cuda" else cpu_kind(),
        seconds={name: round(value, 3) for name, value in laps.items()},
    )
    return Networks(experts, groups, text, vae, decoder, info)
