"""Bytes on the wire: what a partition makes every rank send in a denoising step, by the sizes of the network alone.

Counted is what a rank must send when the traffic is spread evenly, as in a ring: of S bytes among P ranks (P - 1) / P S
for an all-gather or an all-to-all, twice that for an all-reduce. All ranks send as much. Not counted is what the ranks'
loop sends beside the network: a flag for each clip and step.

docs/partitions.md says the same as formulas; tests count the collectives of a running network and compare.
Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from model.config import DiTConfig, Partition

FLOAT = 4  # bytes of latents, and of the sums of squares in norms


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that a rank sends in one call of the network."""

    block: Fraction  # in each of its blocks
    around: Fraction  # before, between and after them

    def whole(self, layers: int) -> Fraction:
        return self.around + layers * self.block


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a step computes: clips of so many tokens and words; guidance asks the network twice."""

    clips: int
    tokens: int
    words: int
    guided: bool = True
    precomputed: bool = True  # keys and values of the text are kept from step to step

    def rows(self, partition: Partition) -> int:
        """Rows that the ranks of the batch axis share out."""
        return self.clips * (2 if self.guided and partition.cfg == 1 else 1)


def step_traffic(config: DiTConfig, partition: Partition, work: Work, dtype_bytes: int) -> Traffic:
    """What a step sends: the velocities of all clips, both halves of guidance, are on every rank at its end."""
    sp, tp, zero = partition.sp, partition.tp, partition.zero
    rows = -(-work.rows(partition) // partition.batch)
    mine = rows * -(-work.tokens // sp)  # tokens, pads included
    activation = mine * config.width * dtype_bytes

    body, _ = block_parameters(config, tp)
    block = 3 * all_reduce(activation, tp)  # attn1.to_out, attn2.to_out, ffn.net.2
    block += 3 * all_reduce(mine * FLOAT, tp)  # attn1.norm_q, attn1.norm_k, attn2.norm_q
    block += 4 * exchange(Fraction(activation, tp), sp)  # q, k, v and what comes of them
    longer_in_block, longer_around = float32_parameters(config)
    block += gathered(body, zero, dtype_bytes) + gathered(longer_in_block, zero, FLOAT - dtype_bytes)
    around = all_gather(activation * sp, sp)
    around += gathered(outer_parameters(config), zero, dtype_bytes)
    around += gathered(longer_around, zero, FLOAT - dtype_bytes)
    if not work.precomputed:
        once = text_kv_traffic(config, partition, rows, work.words, dtype_bytes)
        block, around = block + once.block, around + once.around

    velocity = work.tokens * config.out_channels * math.prod(config.patch) * FLOAT  # of one row
    around += all_gather(rows * partition.batch * velocity, partition.batch)
    if work.guided:
        around += all_gather(work.rows(partition) * partition.cfg * velocity, partition.cfg)
    return Traffic(block, around)


def text_kv_traffic(config: DiTConfig, partition: Partition, rows: int, words: int, dtype_bytes: int) -> Traffic:
    """Bytes sent to make keys and values of texts [rows, words, Dt]: at every step, or once where they are kept."""
    _, text_kv = block_parameters(config, partition.tp)
    block = all_reduce(rows * words * FLOAT, partition.tp)  # attn2.norm_k
    block += gathered(text_kv, partition.zero, dtype_bytes)
    return Traffic(block, gathered(text_parameters(config), partition.zero, dtype_bytes))


def all_gather(size: int | Fraction, ranks: int) -> Fraction:
    """`size` is that of the whole, which every rank has in the end."""
    return Fraction(ranks - 1, ranks) * size


def exchange(size: int | Fraction, ranks: int) -> Fraction:
    """All-to-all: `size` is what a rank has, of which it keeps its own part."""
    return Fraction(ranks - 1, ranks) * size


def all_reduce(size: int | Fraction, ranks: int) -> Fraction:
    return 2 * all_gather(size, ranks)


def gathered(parameters: Iterable[int], zero: int, dtype_bytes: int) -> Fraction:
    """ZeRO-3 pads every parameter to a multiple of the ranks and gathers it."""
    return sum((all_gather(-(-count // zero) * zero * dtype_bytes, zero) for count in parameters), Fraction())


def block_parameters(config: DiTConfig, tp: int) -> tuple[list[int], list[int]]:
    """Numbers in each parameter of a block on one of `tp` ranks: of every step, and of a text's keys and values."""
    width, share, hidden = config.width, config.width // tp, config.ffn_dim // tp
    column, row, norm = [share * width, share], [share * width, width], [share]
    own_attention = 3 * column + 2 * norm + row
    cross_attention = column + norm + row
    feed_forward = [hidden * width, hidden, hidden * width, width]
    cross_norm = [width, width] if config.cross_norm else []
    return own_attention + cross_norm + cross_attention + feed_forward + [6 * width], 2 * column + norm


def outer_parameters(config: DiTConfig) -> list[int]:
    """Numbers in each parameter outside of the blocks that a step uses whatever it does with the text."""
    width, patch = config.width, math.prod(config.patch)
    inward, outward = config.in_channels * patch, config.out_channels * patch
    times = [config.freq_dim * width, width, width * width, width, 6 * width * width, 6 * width]
    return [inward * width, width, *times, outward * width, outward, 2 * width]


def float32_parameters(config: DiTConfig) -> tuple[list[int], list[int]]:
    """Numbers in each parameter that is float32 in a network of any type, of those in a block and of those around."""
    width = config.width
    cross_norm = [width, width] if config.cross_norm else []
    return [*cross_norm, 6 * width], [config.freq_dim * width, width, width * width, width, 2 * width]


def text_parameters(config: DiTConfig) -> list[int]:
    """Numbers in each parameter that brings texts to the network's width."""
    return [config.text_dim * config.width, config.width, config.width * config.width, config.width]
