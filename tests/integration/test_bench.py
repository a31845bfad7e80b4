"""The benches run and compare like with like; what they measure is not tested, machines differ."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest

from model import bench
from model.config import DiTConfig, Partition


def cells(lines: Iterable[str]) -> list[list[str]]:
    """The rows of a Markdown table without its head."""
    head, rule, *rows = lines
    assert head.count("|") == rule.count("|") and set(rule) == {"|", "-"}
    assert all(row.count("|") == head.count("|") for row in rows)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


@pytest.mark.xdist_group("ranks")
def test_a_rank_of_two_loads_half_of_what_is_divided() -> None:
    config = DiTConfig(layers=2, heads=8, head_dim=64, ffn_dim=8192, text_dim=64, freq_dim=64)
    rows = cells(bench.loading(config))
    sizes = [float(row[1].removesuffix(" GiB")) for row in rows]
    assert "whole" in rows[0][0]
    assert [row[0] for row in rows[1:]] == [
        f"by each rank of {Partition(tp=2)}",
        f"by each rank of {Partition(zero=2)}",
    ]
    assert sizes[1:] == pytest.approx([sizes[0] / 2] * 2, abs=0.02)


def test_a_step_computes_what_diffusers_computes() -> None:
    rows = cells(bench.step(rounds=1))
    assert [row[0] for row in rows] == ["1", "4", "16"]
    for row in rows:
        assert float(row[4]) < 1e-4
        assert float(row[3]) == pytest.approx(float(row[1]) / float(row[2]), rel=0.05)


@pytest.mark.xdist_group("ranks")
def test_whole_clips_are_timed_side_by_side() -> None:
    rows = cells(bench.clips(2, threads=1))
    assert [row[0] for row in rows] == ["1", "16"]
    assert all(re.fullmatch(r"\d+%", row[4]) and float(row[1]) > 0 for row in rows)
