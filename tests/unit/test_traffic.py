"""What a partition sends, by formula. That the formula is right, tests/distributed/test_partition.py counts."""

from __future__ import annotations

import re
from pathlib import Path

from model.config import DiTConfig, Partition
from tests.bench.traffic import (
    Work,
    block_parameters,
    float32_parameters,
    outer_parameters,
    step_traffic,
    text_parameters,
)

WAN = DiTConfig(layers=40, heads=40, head_dim=128, ffn_dim=13824, text_dim=4096)  # Wan 2.1 14B
HD = Work(clips=1, tokens=21 * 45 * 80, words=512, precomputed=False)  # 1280x720, 81 frames
DOCUMENT = Path(__file__).parents[2] / "docs" / "partitions.md"


def row(text: str) -> str:
    """A line of the document's table."""
    partition = Partition.parse(text)
    sent, (body, text_kv) = step_traffic(WAN, partition, HD, 2), block_parameters(WAN, partition.tp)
    block = [*body, *text_kv]
    held = sum(-(-n // partition.zero) for n in [*outer_parameters(WAN), *text_parameters(WAN), *WAN.layers * block])
    in_block, around = float32_parameters(WAN)  # which have two bytes more
    longer = sum(-(-n // partition.zero) for n in [*around, *WAN.layers * in_block])
    beside = 2 * 2 * (sum(block) + sum(in_block)) if partition.zero > 1 else 0
    figures = float(sent.block) / 1e6, float(sent.whole(WAN.layers)) / 1e9, 2 * (held + longer) / 1e9, beside / 1e9
    return (
        f"| `{partition}` | {partition.world} | {figures[0]:,.0f} | "
        + " | ".join(f"{x:.1f}" for x in figures[1:])
        + " |"
    )


def test_the_documents_figures_are_those_of_the_formulas() -> None:
    lines = re.findall(r"^\| `(cfg\S+)` .*$", document := DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) > 5
    assert [line for text in lines if (line := row(text)) not in document] == []
