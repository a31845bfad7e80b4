"""Whether a model fits: the bytes that a rank needs, beside the bytes that the machine has."""

from __future__ import annotations

import math
import re
from pathlib import Path

from model.config import DiTConfig, Partition
from model.loading.card import SECOND, TRANSFORMER, WEIGHTS, dit_config, kept_weights
from model.loading.inspect import CONFIG, EMBEDDINGS, TEXT, TEXT_WEIGHTS, VAE, dit_shapes, weights_in

GIB = 1 << 30


class NotEnoughMemory(ValueError):
    """The model does not fit into memory in this partition. The message says how much it needs and what would fit."""

    exit_code = 1


def rank_bytes(path: Path, partition: Partition, dtype_bytes: int) -> int:
    """Bytes of the transformer's parameters, or of both experts', that one rank holds. All ranks hold as much.

    Tensor parallelism and ZeRO-3 divide weights; ranks of the other axes hold copies.
    """
    kept = kept_weights(path)
    shares = [_shares(dit_config(path, name), partition.tp, dtype_bytes, kept) for name in _transformers(path)]
    if partition.zero == 1:
        return sum(size for share in shares for size in share.values())
    sizes = [(size, _bytes_of(name, dtype_bytes)) for share in shares for name, size in share.items()]
    return sum(-(-size // (each * partition.zero)) * each for size, each in sizes)  # a part is whole numbers


def gathered_bytes(path: Path, partition: Partition, dtype_bytes: int) -> int:
    """Bytes of parameters that ZeRO-3 gathers beside those that a rank holds: a block's, and those of the next."""
    if partition.zero == 1:
        return 0
    share = _shares(dit_config(path), partition.tp, dtype_bytes, None)  # experts are alike, and take turns
    block = sum(count for name, count in share.items() if name.startswith("blocks.0."))
    beside = sum(count for name, count in share.items() if not name.startswith("blocks."))
    return 2 * max(block, beside)


def vae_bytes(path: Path) -> int:
    """Bytes of the autoencoder's parameters, which every rank holds, in float32."""
    _, tensors = weights_in(path / VAE, WEIGHTS)
    return 4 * sum(tensor.parameters for tensor in tensors.values())


def text_bytes(path: Path, dtype_bytes: int) -> int:
    """Bytes of the text encoder's parameters, which the first rank alone holds."""
    _, tensors = weights_in(path / TEXT, TEXT_WEIGHTS)
    if EMBEDDINGS[0] in tensors:
        tensors.pop(EMBEDDINGS[1], None)  # one table in memory
    return dtype_bytes * sum(tensor.parameters for tensor in tensors.values())


def what_fits(
    path: Path, heads: int, free_bytes: int, dtype_bytes: int, max_ranks: int = 64, *, shared: bool = False
) -> Partition | None:
    """The smallest partition whose weights fit into `free_bytes`, or None; one that sends all weights at every step
    (ZeRO-3) only where no other fits.

    `free_bytes` are each rank's own, as on GPUs, or where `shared` those of all ranks together: then more ranks never
    need less, since what is not divided is held by each.
    """
    ffn = dit_config(path).ffn_dim
    divided = [Partition(tp=n) for n in range(1, min(heads, max_ranks) + 1) if heads % n == 0 and ffn % n == 0]
    gathered = [Partition(zero=n) for n in range(2, max_ranks + 1)]
    for partition in divided + gathered:
        if _needed(path, partition, dtype_bytes, shared) <= free_bytes:
            return partition
    return None


def check_memory(path: Path, partition: Partition, free_bytes: int, dtype_bytes: int, device: str) -> None:
    """Raises NotEnoughMemory where the weights alone would not fit; activations come on top, and are not counted.

    `free_bytes` are those of the GPU with least, or of the host, whose memory all ranks on a CPU share.
    """
    shared = not device.startswith("cuda")
    needed = _needed(path, partition, dtype_bytes, shared)
    if needed <= free_bytes:
        return
    fitting = what_fits(path, dit_config(path).heads, free_bytes, dtype_bytes, shared=shared)
    each, text = _each(path, partition, dtype_bytes), text_bytes(path, dtype_bytes)
    raise NotEnoughMemory(
        f"model {path.name} on {partition} needs {_gib(each)} a rank and {_gib(text)} more for the text encoder of "
        f"the first, {_gib(needed)} {'for all of them' if shared else 'on that one'}; "
        f"{_gib(free_bytes)} are free on {device}: "
        + (f"partition {fitting} would fit" if fitting else "no partition would fit: free memory, or add some")
    )


def free_bytes(device: str) -> int:
    """Bytes that can still be taken: on this process's current GPU, or of the host as far as its cgroups allow."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info()[0]
    groups = _left_to(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    return min([_available(Path("/proc/meminfo")), *groups])


def resident_peak() -> int:
    """The most resident memory that this process has had, in bytes. (getrusage would count its parent's.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def _needed(path: Path, partition: Partition, dtype_bytes: int, shared: bool) -> int:
    """Bytes in the fullest memory: that of all ranks together where it is shared, else the first rank's."""
    each = _each(path, partition, dtype_bytes)
    return (partition.world if shared else 1) * each + text_bytes(path, dtype_bytes)


def _each(path: Path, partition: Partition, dtype_bytes: int) -> int:
    """Bytes in the memory of every rank."""
    weights = rank_bytes(path, partition, dtype_bytes) + gathered_bytes(path, partition, dtype_bytes)
    return weights + vae_bytes(path)


def _transformers(path: Path) -> list[str]:
    return [TRANSFORMER, SECOND] if (path / SECOND / CONFIG).is_file() else [TRANSFORMER]


def _shares(config: DiTConfig, tp: int, dtype_bytes: int, kept: str | None) -> dict[str, int]:
    """Bytes of every parameter of one of `tp` ranks, by the plan that places DeepSpeed's layers.

    A layer in 8 bits takes a byte a weight, and four for the step of each of its rows.
    """
    from model.loading.int8 import INT8, is_kept_in_int8
    from model.parallel.partition import WAN_PLAN

    sizes: dict[str, int] = {}
    for name, shape in dit_shapes(config).items():
        layer, _, leaf = name.rpartition(".")
        kind = next((kind for pattern, kind in WAN_PLAN.items() if re.fullmatch(pattern, layer)), None)
        whole = kind is None or (kind == "row" and leaf == "bias")  # added once, after the sum over the ranks
        count = math.prod(shape) // (1 if whole else tp)
        if kept == INT8 and is_kept_in_int8(name, len(shape)):
            sizes[name] = count + 4 * (shape[0] // (1 if kind == "row" else tp))
        else:
            sizes[name] = _bytes_of(name, dtype_bytes) * count
    return sizes


def _bytes_of(name: str, dtype_bytes: int) -> int:
    """Bytes of each number of a parameter that a network of `dtype_bytes` keeps."""
    from model.network.dit import KEPT_IN_FLOAT32

    return max(4, dtype_bytes) if KEPT_IN_FLOAT32.fullmatch(name) else dtype_bytes


def _available(meminfo: Path) -> int:
    return next(
        int(line.split()[1]) << 10 for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")
    )


def _left_to(root: Path, own: Path) -> list[int]:
    """Bytes left under each memory limit of this process's cgroups, of either version; [] without limits."""
    left: list[int] = []
    for line in own.read_text().splitlines() if own.is_file() else []:
        _, controllers, group = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / controllers
        limit, used = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else _V2
        inside = top / group.lstrip("/")
        for folder in (inside, *inside.parents):  # the limit of a group above holds too
            if folder.is_relative_to(top) and (folder / limit).is_file() and (folder / used).is_file():
                bound = (folder / limit).read_text().strip()
                if bound != "max":
                    left.append(max(0, int(bound) - int((folder / used).read_text()) + _cached(folder / "memory.stat")))
    return left


_V2 = ("memory.max", "memory.current")


def _cached(stat: Path) -> int:
    """Bytes of files that a cgroup counts as used and that the kernel gives up when they are needed."""
    facts = dict(line.split() for line in stat.read_text().splitlines()) if stat.is_file() else {}
    prefix = "total_" if "total_active_file" in facts else ""
    return sum(int(facts.get(f"{prefix}{name}", 0)) for name in ("active_file", "inactive_file"))


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB // 10 else f"{count / (1 << 20):.1f} MiB"
