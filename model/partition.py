"""How one DiT is divided over the ranks of an engine. DeepSpeed's inference lives here and in `model.zero_inference`.

The network never learns its rank. `load_partitioned` builds it without memory, puts DeepSpeed's layers where the plan
says, reads this rank's slices of the weights and hangs the sequence exchange into the network's three hooks. Where an
axis has one rank its group is None and every function here gives its input back, so one process and N run one path.

Letters: B batch, N tokens of a clip, n tokens of this rank, H heads, K head size, D width.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from model.config import Partition
from model.dit import DiT
from model.layers import Attention, Block, HeadsRMSNorm, Heard, attention
from model.lora import Adapters
from model.quantised import CODES, INT8, STEPS, codes_of, is_kept_in_int8, keep_in_int8, steps_of
from model.weights import TRANSFORMER, dit_config, kept_weights, transformer_files
from model.zero_inference import divide_weights, held

Kind = Literal["column", "row", "norm"]
Plan = Mapping[str, Kind]

# Where the transformer is divided under tensor parallelism: outputs of the first linear layer of a pair ("column"),
# inputs of the second ("row", summed over the ranks after), and the norm that spans the heads between them.
WAN_PLAN: Plan = {
    r"blocks\.\d+\.attn1\.to_[qkv]": "column",
    r"blocks\.\d+\.attn1\.norm_[qk]": "norm",
    r"blocks\.\d+\.attn1\.to_out\.0": "row",
    r"blocks\.\d+\.attn2\.to_[qkv]": "column",
    r"blocks\.\d+\.attn2\.norm_[qk]": "norm",
    r"blocks\.\d+\.attn2\.to_out\.0": "row",
    r"blocks\.\d+\.ffn\.net\.0\.proj": "column",
    r"blocks\.\d+\.ffn\.net\.2": "row",
}


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of the mesh as this rank sees it. `group` is None where the axis has a single rank."""

    group: ProcessGroup | None = None
    rank: int = 0
    size: int = 1


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


def load_partitioned(
    path: Path, groups: Groups, dtype: torch.dtype, device: str, plan: Plan = WAN_PLAN, part: str = TRANSFORMER
) -> DiT:
    """This rank's share of a transformer of a model folder, in evaluation mode.

    Only the slices that this rank keeps are read from the files; under ZeRO-3 all of its tensor parallel slice, one
    layer at a time.
    Raises ValueError when the partition does not divide the network or the files do not hold it.
    """
    dit = empty(path, part)
    place(dit, groups, plan)
    dit = dit.to(dtype)
    if kept_weights(path) == INT8:
        if groups.zero.group is not None:
            raise ValueError(f"{path.name} keeps its weights in 8 bits, which zero cannot divide: choose another axis")
        keep_in_int8(dit)
    with WeightFiles(path, part) as files:

        def fill(module: nn.Module, prefix: str = "", recurse: bool = False) -> None:
            module.to_empty(device=device, recurse=recurse)
            read_parameters(module, files, groups.tp, prefix, recurse)

        if groups.zero.group is None:
            fill(dit, recurse=True)
        else:
            divide_weights(dit, groups.zero.group, fill)
    return dit


def place(dit: DiT, groups: Groups, plan: Plan = WAN_PLAN) -> None:
    """Divides the network in place.

    Raises ValueError when heads or layer sizes do not divide, a pattern of the plan matches no layer, or a linear layer
    of a block is in no pattern: each of these would otherwise give wrong pictures and no error.
    """
    Partition(sp=groups.sp.size, tp=groups.tp.size).check_heads(dit.config.heads)
    divide_layers(dit, groups.tp, plan)
    if groups.sp.group is not None:
        exchange = Ulysses(groups.sp)
        dit.split, dit.merge = exchange.split, exchange.merge
        for block in dit.blocks:
            assert isinstance(block, Block)
            block.attn1.attend = exchange.attend  # cross-attention stays with its tokens: every rank has all the text
    if groups.batch.group is not None:
        rows = SharedRows(groups.batch)
        dit.register_forward_pre_hook(rows.own)
        dit.register_forward_hook(rows.everyones)


def divide_layers(dit: DiT, tp: Axis, plan: Plan) -> None:
    """Tensor parallelism: DeepSpeed's layers where the plan says."""
    unused = set(plan)
    for name, module in list(dit.named_modules()):
        matched = [pattern for pattern in plan if re.fullmatch(pattern, name)]
        if isinstance(module, nn.Linear) and name.startswith("blocks.") and not matched:
            raise ValueError(f"the partition plan does not say how to divide {name}")
        for pattern in matched:
            unused.discard(pattern)
            if tp.group is not None:
                owner, _, leaf = name.rpartition(".")
                setattr(dit.get_submodule(owner), leaf, divide(name, module, plan[pattern], tp))
        if isinstance(module, Attention):
            module.heads //= tp.size
    if unused:
        raise ValueError(f"the partition plan matches no layer of this transformer with {', '.join(sorted(unused))}")


def divide(name: str, module: nn.Module, kind: Kind, tp: Axis) -> nn.Module:
    """One layer's share. Raises ValueError when its size does not divide over the ranks, or it is no such layer."""
    from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer
    from deepspeed.module_inject.tp_shard import AutoTPMeta

    expected = HeadsRMSNorm if kind == "norm" else nn.Linear
    if not isinstance(module, expected):
        raise ValueError(f"the partition plan takes {name} for a {expected.__name__}, it is a {type(module).__name__}")
    size = module.weight.shape[1 if kind == "row" else 0]
    if size % tp.size:
        raise ValueError(f"{name}: its {size} channels do not divide over tp {tp.size} ranks")
    if isinstance(module, HeadsRMSNorm):
        return DividedHeadsRMSNorm(module, tp)
    layer = LinearAllreduce if kind == "row" else LinearLayer
    return layer(module, tp.group, name=name, tp_meta=AutoTPMeta(tp_grain_size=1))


class DividedHeadsRMSNorm(nn.Module):
    """`HeadsRMSNorm` where each rank holds some of the heads: the sum of squares spans all of them."""

    def __init__(self, whole: HeadsRMSNorm, tp: Axis) -> None:
        super().__init__()
        self.eps, self.group = whole.eps, tp.group
        self.width = whole.weight.shape[0]
        self.weight = nn.Parameter(whole.weight.detach().chunk(tp.size)[tp.rank].clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, n, D / tp]
        square = x.float().pow(2).sum(-1, keepdim=True)
        dist.all_reduce(square, group=self.group)
        return (x.float() * torch.rsqrt(square / self.width + self.eps)).to(x.dtype) * self.weight


class Ulysses:
    """DeepSpeed-Ulysses: each rank holds some of the tokens; for self-attention they trade tokens against heads.

    A sequence that does not divide is padded to one that does. The pads are cut from keys and values before attention
    and from the sequence at the end, so that they change nothing.
    """

    def __init__(self, sp: Axis) -> None:
        from deepspeed.sequence.layer import DistributedAttention

        self.sp = sp
        self.count = 0  # true tokens of the sequence last split
        local: Any = self.local  # declared a Module there, but only ever called
        group: Any = sp.group
        self.distributed = DistributedAttention(local, group, scatter_idx=2, gather_idx=1)

    def split(self, x: Tensor, dim: int) -> Tensor:
        """[..., N, ...] -> [..., n, ...]: this rank's tokens, zeros where the sequence has ended."""
        self.count = x.shape[dim]
        share = -(-self.count // self.sp.size)
        start = min(self.sp.rank * share, self.count)
        mine = x.narrow(dim, start, min(share, self.count - start))
        if mine.shape[dim] < share:
            missing = list(mine.shape)
            missing[dim] = share - mine.shape[dim]
            mine = torch.cat((mine, mine.new_zeros(missing)), dim)
        return mine.contiguous()

    def merge(self, x: Tensor, dim: int) -> Tensor:
        """[..., n, ...] -> [..., N, ...] on every rank, the pads left off."""
        return torch.cat(gather(x, self.sp), dim).narrow(dim, 0, self.count)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [B, n, H, K] each
        return self.distributed(q, k, v, 0)

    def local(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [B, padded N, H / sp, K] each
        return attention(q, k[:, : self.count], v[:, : self.count]).contiguous()


class SharedRows:
    """A batch whose rows (clips, and halves of guidance) are computed by different ranks.

    All ranks are called with all rows and get all velocities. Every rank computes as many rows, so where they do not
    divide some are computed twice: whoever waits for the others' weights must run along anyway.
    """

    def __init__(self, batch: Axis) -> None:
        self.batch = batch
        self.count = self.share = 0  # rows of the batch last seen, and of each rank

    def own(self, _: nn.Module, given: tuple[Tensor, Tensor, Tensor | list[Heard]]) -> tuple[Any, ...]:
        """Latents [R, C, T, H, W], times [R, ...] and text [R, L, Dt] (or what was heard of it) -> this rank's rows."""
        latents, times, text = given
        self.count = latents.shape[0]
        self.share = -(-self.count // self.batch.size)
        start = min(self.batch.rank * self.share, self.count - self.share)
        mine = slice(start, start + self.share)
        words = text[mine] if isinstance(text, Tensor) else [(k[mine], v[mine]) for k, v in text]
        return latents[mine], times[mine], words

    def everyones(self, _: nn.Module, __: tuple[Any, ...], velocity: Tensor) -> Tensor:
        """This rank's rows [share, C, T, H, W] -> those of all [R, C, T, H, W]."""
        parts: list[Tensor] = []
        for rank, part in enumerate(gather(velocity, self.batch)):
            seen = min(rank * self.share, self.count)  # what earlier ranks have computed
            parts.append(part[seen - min(rank * self.share, self.count - self.share) :])
        return torch.cat(parts)


def gather(x: Tensor, axis: Axis) -> list[Tensor]:
    """What every rank of the axis holds, in order; on a single rank, x alone."""
    if axis.group is None:
        return [x]
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(axis.size)]
    dist.all_gather(parts, x.contiguous(), group=axis.group)
    return parts


def total(x: Tensor, groups: Groups, guided: bool) -> Tensor:
    """The sum of x, which is of one clip, over all ranks of the engine, the same to the bit on each of them.

    x itself is overwritten. Ranks of the batch axis for which there is no row repeat others' and do not count.
    """
    if groups != ALONE:
        if groups.batch.rank > (guided and groups.cfg.group is None):
            x.zero_()
        dist.all_reduce(x)
    return x


def own_text(text: Tensor, negative: Tensor, cfg: Axis) -> Tensor:
    """What this rank reads of prompts and negative prompts [B, L, Dt]: both [2B, L, Dt] where it is alone, else one."""
    if cfg.group is None:
        return torch.cat((text, negative))
    return text if cfg.rank == 0 else negative


def both_halves(dit: DiT, x: Tensor, times: Tensor, text: Tensor | list[Heard], cfg: Axis) -> tuple[Tensor, Tensor]:
    """The conditional and the unconditional velocity of x [B, C, T, H, W] at times [B] or [B, S].

    `text` is this rank's (`own_text`), or what `dit.hear` made of it. On one rank the two are one batch of 2B; over two
    ranks of the cfg axis each computes one and they exchange them.
    """
    if cfg.group is None:
        velocity = dit(torch.cat((x, x)), torch.cat((times, times)), text)
        conditional, unconditional = velocity.chunk(2)
    else:
        conditional, unconditional = gather(dit(x, times, text), cfg)
    return conditional, unconditional


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
            module.to(stored).to_empty(device=device, recurse=recurse)
            read_parameters(module, files, Axis(), prefix, recurse)
            module.to(computed)

        for name, module in dit.named_children():
            if name != "blocks":
                fill(module, f"{name}.")
        for k, block in enumerate(dit.blocks):
            block.register_forward_pre_hook(lambda block, _, k=k: fill(block, f"blocks.{k}."))
            block.register_forward_hook(lambda block, *_: block.to("meta") and None)
        fill(dit, "", recurse=False)
        yield dit


def empty(path: Path, part: str = TRANSFORMER) -> DiT:
    """The network of a model folder, without memory."""
    with torch.device("meta"):
        return DiT(dit_config(path, part)).eval().requires_grad_(False)


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of parameters that this rank holds: of those that ZeRO-3 divides its parts, and any that are whole now."""
    tensors = {id(tensor): tensor for p in module.parameters() for tensor in (p, held(p))}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


class WeightFiles:
    """The tensors of a model's transformer, read slice by slice (safetensors only), as its variant makes them.

    One file is open at a time: what has been read of a file stays resident for as long as it is mapped.
    """

    def __init__(self, path: Path, part: str = TRANSFORMER) -> None:
        self.path = path / part
        self.files = transformer_files(path, part)
        self.adapters = Adapters(path, part)
        self.int8 = kept_weights(path) == INT8
        self.opened: tuple[Path, Any] | None = None
        self.rows: tuple[str, slice, Tensor] | None = None  # the last ones read for a layer in 8 bits
        self.stack = ExitStack()

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *problem: object) -> None:
        self.stack.close()

    def slice(self, name: str) -> Any:
        """safetensors' lazy view of one tensor: `get_shape()`, and indexing reads only what is asked for."""
        from safetensors import safe_open

        file = self.files[name]
        if self.opened is None or self.opened[0] != file:
            self.stack.close()
            self.opened = file, self.stack.enter_context(safe_open(file, "pt"))
        return self.opened[1].get_slice(name)

    def read(self, name: str, mine: Sequence[int], tp: Axis) -> Tensor:
        """A parameter of shape `mine`: where the file's tensor is tp times as long, ours is a part of it.

        Adapters are merged. Of a layer in 8 bits it is the codes or the steps, or, in a network that keeps it in
        floats, what these come to. Raises ValueError where the files do not hold it.
        """
        weight = re.sub(f"({re.escape(CODES)}|{re.escape(STEPS)})$", ".weight", name)
        if weight not in self.files:
            raise ValueError(f"{self.path}: its weights have no {weight}")
        shape, where = tuple(self.slice(weight).get_shape()), list[slice]()
        for whole, own in zip(shape, mine, strict=False):
            divided = whole == own * tp.size and tp.size > 1
            where.append(slice(tp.rank * own, (tp.rank + 1) * own) if divided else slice(None))
        if self.int8 and is_kept_in_int8(weight, len(shape)):
            part = self._in_int8(name, weight, where[0], where[1])
        else:
            part = self._merged(weight, tuple(where))
        if part.shape != tuple(mine):
            raise ValueError(f"{self.path}: {weight} is {shape}, which does not give {tuple(mine)}")
        return part

    def _merged(self, weight: str, where: tuple[slice, ...]) -> Tensor:
        return self.adapters.merged(weight, self.slice(weight)[where], where)

    def _in_int8(self, name: str, weight: str, rows: slice, columns: slice) -> Tensor:
        """Whole rows are read, whose largest weight decides the step, though this rank may keep some columns only."""
        if self.rows is None or self.rows[:2] != (weight, rows):
            self.rows = weight, rows, self._merged(weight, (rows, slice(None))).float()
        steps = steps_of(self.rows[2])
        if name.endswith(STEPS):
            return steps
        codes = codes_of(self.rows[2][:, columns], steps)
        return codes if name.endswith(CODES) else codes * steps


@torch.no_grad()
def read_parameters(module: nn.Module, files: WeightFiles, tp: Axis, prefix: str = "", recurse: bool = True) -> None:
    """Fills the parameters from the files, rounding each once to the type that it has here."""
    for name, parameter in module.named_parameters(recurse=recurse):
        parameter.copy_(files.read(prefix + name, parameter.shape, tp))
