"""torch.compile for the transformer, block by block: the blocks share one code, so it is compiled once for all of them.

What is compiled is kept in inductor's cache folder (TORCHINDUCTOR_CACHE_DIR, which the engine sets), so that the next
engine finds it there. Sums are fused in another order, so the last bits of a clip differ from those of eager execution.

With "reduce-overhead" a GPU also replays a block's kernels as one CUDA graph for each shape, which saves the time of
launching them; on a CPU it does what `True` does. A replay writes where the one before wrote: nothing that a block
returns outlives a step here, as the network's last layers are not compiled and make tensors of their own.
"""

from __future__ import annotations

import os
import shutil
from typing import Literal

import torch
import torch.compiler.config

from model.network.dit import DiT

VARIANTS = 64  # of a block's code: text or its keys and values, one time or many, some sizes before one serves all
COMPILERS = ("g++", "clang++")


class NoCompiler(Exception):
    """No C++ compiler was found, and torch.compile writes C++ for a CPU."""


def check_compiler(device: str) -> None:
    """Raises NoCompiler when what torch.compile writes for the device cannot be compiled."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
    if device == "cpu" and not any(map(shutil.which, names)):
        raise NoCompiler(
            f"compile=True needs a C++ compiler on a CPU, and there is no {' or '.join(names)} on the PATH: "
            "install one (on Debian and Ubuntu: apt-get install g++), or do without (RUSHES_COMPILE=0)"
        )


def compile_blocks(dit: DiT, how: Literal[True, "reduce-overhead"] = True) -> None:
    """Has every block compiled when it first runs, and once more when it meets a second shape, then for any.

    Beyond `VARIANTS` torch would quietly run the block uncompiled. Collectives inside a block break its graph in two.
    """
    torch.compiler.config.recompile_limit = VARIANTS
    for block in dit.blocks:
        block.compile(mode=None if how is True else how)
    if how == "reduce-overhead":
        dit.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
