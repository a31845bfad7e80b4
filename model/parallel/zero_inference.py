"""ZeRO-3 for rendering: every parameter of a transformer divided over ranks, and whole only while it is used.

Parameters are gathered in units: a block, an embedder, the head. While a block computes, the next one is on its way, so
a rank needs memory for its part and two units. DeepSpeed divides and gathers (`deepspeed.zero.Init`); when that happens
is decided here. `deepspeed.initialize` would go by the order of module calls that it saw in an earlier forward, one
linear layer at a time, and lose that order whenever the keys and values of a text are computed between two steps.

Source: "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (Rajbhandari et al. 2020), stage 3, and
"DeepSpeed Inference" (Aminabadi et al. 2022), ZeRO-Inference.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from model.network.dit import DiT
from model.network.layers import Attention, Block, TextKV


def divide_weights(dit: DiT, group: ProcessGroup, fill: Callable[[nn.Module, str], None]) -> None:
    """Gives each rank of the group its part of every parameter, and hangs the gathering into the network.

    `fill(module, prefix)` must give a module memory for its own parameters, not those of its children, and read them.
    It is called for one module at a time, so that no rank ever holds more than its part and the largest layer. All
    ranks of the group get the values that its first one read.
    """
    from deepspeed.runtime.zero.partition_parameters import Init

    os.environ["LOCAL_RANK"] = str(dist.get_rank())  # DeepSpeed takes the device from it; all ranks are on one machine
    for name, module in reversed(list(dit.named_modules())):  # children first: Init passes over what is divided
        if any(True for _ in module.parameters(recurse=False)):
            fill(module, f"{name}." if name else "")
            # Without the last argument torch's own F.linear would be replaced, for all networks of this process.
            Init(module=module, data_parallel_group=group, mem_efficient_linear=False)
    _hang_in(dit)


def held(parameter: nn.Parameter) -> Tensor:
    """The part of a parameter that this rank keeps between calls: flat and padded where it is divided, else all."""
    return getattr(parameter, "ds_tensor", parameter)


class Unit:
    """Divided parameters that come and go together, by one collective."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters: list[Any] = list(parameters)  # with the attributes that DeepSpeed gave them
        self.coming: Any = None

    def start(self) -> None:
        """Asks for what is not here and not on its way yet, without waiting for it."""
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        away = [parameter for parameter in self.parameters if parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE]
        if away:
            self.coming = away[0].all_gather_coalesced(away)

    def take(self) -> None:
        """The parameters are whole from here to `release`."""
        self.start()
        if self.coming is not None:
            self.coming.wait()
            self.coming = None

    def release(self) -> None:
        for parameter in self.parameters:
            parameter.partition()


def _hang_in(dit: DiT) -> None:
    """Every unit is whole while its module computes. The network itself and its callers need not know."""
    blocks = [block for block in dit.blocks if isinstance(block, Block)]
    text_kv = [_text_kv_unit(block.attn2) for block in blocks]
    of_text = {id(parameter) for unit in text_kv for parameter in unit.parameters}
    bodies = [Unit(p for p in block.parameters() if id(p) not in of_text) for block in blocks]
    embedder = dit.condition_embedder
    times = Unit([*embedder.time_embedder.parameters(), *embedder.time_proj.parameters()])
    text, head = Unit(embedder.text_embedder.parameters()), Unit(dit.proj_out.parameters())
    own = Unit([*dit.patch_embedding.parameters(), dit.scale_shift_table])  # used by the network's own forward
    units = [own, times, text, *bodies, *text_kv, head]
    lacking = {id(p) for p in dit.parameters()} - {id(p) for unit in units for p in unit.parameters}
    assert not lacking, [name for name, p in dit.named_parameters() if id(p) in lacking]

    _while_it_computes(dit, own, lambda _: [bodies[0]])
    _while_it_computes(embedder, times, lambda _: [])
    _while_it_computes(embedder.text_embedder, text, lambda _: [])
    for k, block in enumerate(blocks):

        def following(given: tuple[Any, ...], k: int = k) -> list[Unit]:
            if k + 1 == len(blocks):
                return [head]
            return [bodies[k + 1]] if isinstance(given[1], tuple) else [bodies[k + 1], text_kv[k + 1]]

        _while_it_computes(block, bodies[k], following)
    _while_it_computes(dit.proj_out, head, lambda _: [])


def _while_it_computes(module: nn.Module, unit: Unit, following: Callable[[tuple[Any, ...]], list[Unit]]) -> None:
    """Takes the unit before the module's forward and releases it after; what is needed next may come meanwhile."""

    def before(_: nn.Module, given: tuple[Any, ...]) -> None:
        unit.take()
        for other in following(given):
            other.start()

    def after(*_: Any) -> None:
        unit.release()

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def _text_kv_unit(attention: Attention) -> Unit:
    """The unit that makes keys and values of a text, which is done inside a block, or once a clip and outside of it."""
    layers = (attention.to_k, attention.to_v, attention.norm_k)
    unit = Unit(parameter for layer in layers for parameter in layer.parameters())
    precompute_kv = attention.precompute_kv

    def whole(context: Tensor) -> TextKV:
        unit.take()
        kv = precompute_kv(context)
        unit.release()
        return kv

    attention.precompute_kv = whole
    return unit
