"""What a file of prompts would take, without GPUs, weights or a stack."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.generate.forecast import forecast
from flows.plan.layout import BadGpus, CannotFit, parse_gpus
from flows.settings import Settings
from model.loading.card import ModelNotFound


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    lines = [{"prompt": "a city", "samples": 30}, {"prompt": "a lake", "frames": 1}, {"prompt": "", "frames": 2}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_every_clip_of_a_file_is_planned_and_bad_lines_are_named(prompts: Path, tmp_path: Path) -> None:
    said: list[str] = []
    found = forecast(Settings(home=tmp_path), prompts, "16xH100", "wan-14b", {"steps": 40}, said.append)
    rows = found.rows()
    assert (found.clips, found.bad) == (31, 1)
    assert {(row["shape"], row["steps"]) for row in rows} == {("832x480x81", 40), ("832x480x1", 40)}
    assert sum(row["clips"] for row in rows) == 31
    assert all(row["memory_gib"] < 80 for row in rows)
    assert found.layout.gpu_hours == pytest.approx(16 * found.layout.seconds / 3600)
    assert said and all(message.startswith("prompts.jsonl:3: ") for message in said)


def test_a_model_that_is_here_is_planned_by_its_own_sizes(prompts: Path, tmp_path: Path) -> None:
    found = forecast(Settings(home=tmp_path), prompts, "2xl40s", "mini", {}, lambda _: None)
    assert {row["shape"] for row in found.rows()} == {"64x64x17", "64x64x1"}
    assert {found.network.tokens(work.size) for phase in found.layout.phases for work in phase.work} == {16, 80}


@pytest.mark.parametrize("text", ["8h200", "0xh200", "8x", "8xtpu", "-1xh100", ""])
def test_gpus_that_nobody_knows_are_refused(text: str) -> None:
    with pytest.raises(BadGpus, match=r"must be a number and a kind, like 8xh200; kinds: a100, "):
        parse_gpus(text)


def test_what_cannot_be_planned_says_why(prompts: Path, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    with pytest.raises(CannotFit, match="use more or larger GPUs"):
        forecast(settings, prompts, "1xrtx4090", "wan-a14b", {}, lambda _: None)
    with pytest.raises(ModelNotFound, match=r"without weights can be planned: wan-1\.3b, wan-14b, wan-5b, wan-a14b"):
        forecast(settings, prompts, "1xh100", "wan-99b", {}, lambda _: None)
