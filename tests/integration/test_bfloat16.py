"""A network in bfloat16 beside diffusers' own: the same parameters stay float32, and so times are as exact as there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from model.loading.card import TRANSFORMER
from model.loading.load import load_dit
from model.network import dit as network
from model.network.dit import DiT
from model.network.layers import sinusoid
from tests.integration.test_diffusers_pipeline import SHIPPED
from tests.tiny import tiny_model


@pytest.fixture(scope="module", params=["tiny", "mini"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SHIPPED / "mini" if request.param == "mini" else tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def all_short(folder: Path, monkeypatch: pytest.MonkeyPatch) -> DiT:
    """All parameters in bfloat16, as they were kept before."""
    with monkeypatch.context() as changed:
        changed.setattr(network, "KEPT_IN_FLOAT32", re.compile("(?!)"))
        return load_dit(folder, torch.bfloat16)


def off(ours: Tensor, wanted: Tensor) -> float:
    return float((ours.float() - wanted.float()).norm() / wanted.float().norm())


def test_the_parameters_that_stay_float32_are_those_of_diffusers(folder: Path) -> None:
    theirs = WanTransformer3DModel.from_pretrained(folder / TRANSFORMER, torch_dtype=torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        types = {name: parameter.dtype for name, parameter in load_dit(folder, dtype).named_parameters()}
        if dtype == torch.bfloat16:
            assert types == {name: parameter.dtype for name, parameter in theirs.named_parameters()}
        else:
            assert set(types.values()) == {dtype}


@torch.no_grad()
def test_times_reach_the_blocks_with_the_error_of_one_rounding(folder: Path, all_short: DiT) -> None:
    exact, kept = (
        load_dit(folder, torch.float32).condition_embedder,
        load_dit(folder, torch.bfloat16).condition_embedder,
    )
    times = torch.linspace(0, 1, 64)
    wanted = exact.time_embedder(sinusoid(times, exact.channels))
    ours, before = (each(times[None])[0][0] for each in (kept, all_short.condition_embedder))
    if folder.name == "mini":  # whose weights are stored in bfloat16, so that nothing else is rounded
        assert torch.equal(ours, wanted.bfloat16())
    assert off(ours, wanted) < 0.6 * off(before, wanted)


@torch.no_grad()
def test_velocities_in_bfloat16_are_as_near_to_float32_as_those_of_diffusers(folder: Path, all_short: DiT) -> None:
    exact, kept = load_dit(folder, torch.float32), load_dit(folder, torch.bfloat16)
    theirs = WanTransformer3DModel.from_pretrained(folder / TRANSFORMER, torch_dtype=torch.bfloat16).eval()
    random, errors = torch.Generator().manual_seed(0), dict.fromkeys(("kept", "all short", "diffusers"), 0.0)
    for _ in range(4):
        x = torch.randn(1, exact.config.in_channels, 3, 8, 8, generator=random)
        times = torch.rand(1, generator=random)
        text = torch.randn(1, 12, exact.config.text_dim, generator=random)
        wanted = exact(x, times, text)
        made = {
            "kept": kept(x, times, text),
            "all short": all_short(x, times, text),
            "diffusers": theirs(x.bfloat16(), 1000 * times, text.bfloat16(), return_dict=False)[0],
        }
        for name, velocity in made.items():
            errors[name] += off(velocity, wanted) / 4
    assert errors["kept"] < 1.05 * errors["diffusers"] < 0.02
