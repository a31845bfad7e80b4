"""The measures of modes over clips that a real engine makes of frames."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.config import ClipShape
from model.score.modes import EXACT, EXTENSIONS, STRENGTHS, measure_modes, table, world_clips
from tests.tiny import DEFAULTS, tiny_model

pytestmark = pytest.mark.xdist_group("ranks")


def test_every_mode_is_measured(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "tiny")
    width, height, frames = (int(DEFAULTS[name]) for name in ("width", "height", "frames"))
    prompts, clips = world_clips(2, ClipShape(width, height, frames))
    figures = measure_modes(model, prompts, sources=clips, steps=2, overlap=1, log=tmp_path / "log")
    assert (figures["clips"], figures["sources"]) == (2, "given")
    kept = figures["kept"]
    assert set(kept) == {"image-to-video", "extend", "extend backward", "connect"}
    assert all(row["kept_psnr"] == EXACT and row["kept"] and row["seam"] > 0 for row in kept.values())
    assert set(figures["edit"]) == {f"{strength:g}" for strength in STRENGTHS}
    assert len(figures["drift"]) == 1 + EXTENSIONS
    said = table(figures)
    assert all(f"| {mode} |" in said for mode in kept) and "closure around source" in said
    assert said.count("to the bit") == len(kept)
