"""The training loop: checkpoints, learning rate, averaged weights, and ranks that share a batch.

Every batch is drawn from a generator seeded by (seed, stage, step), so a run killed at any moment goes on along the
same loss curve from its last checkpoint, however many processes divide it by then."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn

from model.train.config import TrainConfig
from model.train.files import atomic_path

if TYPE_CHECKING:
    from model.parallel.zero_training import Zero


def join(config: TrainConfig) -> TrainConfig:
    """The training of one of the processes that torchrun started."""
    if config.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("gloo" if config.device == "cpu" else "nccl")
    return replace(config, rank=distributed.get_rank(), ranks=distributed.get_world_size())


def divide(config: TrainConfig, writer: nn.Module, optimizer: torch.optim.AdamW) -> Zero:
    """The network and its optimizer in this rank's part."""
    from model.parallel.zero_training import Zero

    return Zero(writer, optimizer, config.zero, device=config.device, bfloat16=config.bfloat16, clip=config.clip)


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
        write({k: v.detach().clone().contiguous() for k, v in tensors.items()}, self.path)

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
    config: TrainConfig,
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
        if done % config.every and done != steps:
            continue
        row: dict[str, Any] = {
            "stage": stage,
            "step": done,
            "of": steps,
            "seconds": round(time.monotonic() - started, 1),
            "steps_per_second": round((done - first) / (time.monotonic() - started), 3),
        }
        means = over_ranks(config, {key: value / (done - told) for key, value in total.items()})
        total, told = {}, done
        row |= {key: round(value, 4) for key, value in means.items()}
        if config.rank == 0:
            row |= {key: round(value, 4) for key, value in validate().items()}
        checkpoint.save(done)
        if config.rank:
            continue
        with (config.work / f"{stage}.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def over_ranks(config: TrainConfig, means: dict[str, float]) -> dict[str, float]:
    """The mean over all ranks of what each has measured on its part of the batches."""
    if config.ranks == 1:
        return means
    measured = torch.tensor(list(means.values()), device=config.device)
    distributed.all_reduce(measured)
    return dict(zip(means, (measured / config.ranks).tolist(), strict=True))


def part_of(checkpoint: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The weights of one module of a checkpoint's tensors."""
    prefix = f"{name}."
    return {k.removeprefix(prefix): v for k, v in checkpoint.items() if k.startswith(prefix)}


@torch.no_grad()
def follow(average: nn.Module, learning: nn.Module, step: int, most: float) -> None:
    """Moves a running average on, which keeps less of itself in the first steps, and `most` of itself at most."""
    keep = min(most, (1 + step) / (10 + step))
    for kept, new in zip(average.parameters(), learning.parameters(), strict=True):
        kept.lerp_(new, 1 - keep)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)


def write(tensors: dict[str, Tensor], path: Path) -> None:
    with atomic_path(path) as part:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)


def last(log: Path) -> dict[str, Any]:
    return json.loads(log.read_text().splitlines()[-1]) if log.exists() else {}


def end_with_input() -> None:
    """From now on this process ends when its standard input does, as it does when its parent is killed."""

    def wait() -> None:
        while os.read(0, 1):  # not sys.stdin: its lock would be held when the interpreter ends
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
