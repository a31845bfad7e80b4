"""Settings that change nothing: told when prompts are checked, refused under strict, and no part of a recipe."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flows.request.form import GenerationRequest, PromptsFormat
from flows.request.read import check_prompts, warnings_of
from flows.request.recipe import recipe, without_effect
from model.network.diffusion import at_model_times, denoise, schedule
from tests.unit.test_prompts import DEFAULTS, one
from tests.unit.test_request import CARD


def told(*lines: dict[str, Any], **of_request: Any) -> list[str]:
    defaults = GenerationRequest(prompts=["x"], **of_request).resolve(CARD)
    data = "".join(json.dumps({"prompt": "a red ball", **line}) + "\n" for line in lines).encode()
    checked = check_prompts(io.BytesIO(data), source="p", format=PromptsFormat.JSONL, defaults=defaults)
    assert checked.bad == 0, checked.messages
    return warnings_of(CARD, checked)


def test_guidance_of_a_second_expert_is_told_and_not_hashed_where_it_changes_nothing() -> None:
    assert told({"guidance_2": 4.0}) == ["guidance_2=4.0 has no effect (line 1): the model has one expert"]

    def recipe_of(experts: int, **settings: Any) -> str:
        return recipe(replace(one(), experts=experts, **settings), 0, model_digest="0" * 64)

    plain = recipe_of(1)
    assert plain == recipe_of(2) == recipe_of(1, guidance_2=2.0) == recipe_of(2, guidance_2=DEFAULTS.guidance)
    assert recipe_of(2, guidance=1.0) == recipe_of(2, guidance=1.0, guidance_2=2.0)
    assert len({plain, recipe_of(2, guidance_2=2.0), recipe_of(2, guidance_2=1.0)}) == 3
    card = replace(CARD, boundary=0.875)
    assert (GenerationRequest(prompts=["x"], guidance_2=2.0).resolve(card).experts, CARD.boundary) == (2, None)


STEERS = "guidance=1 is off: nothing is steered away from"


@pytest.mark.parametrize(
    ("lines", "of_request", "warnings"),
    [
        ([{}, {"negative_prompt": "fog"}, {"shift": 9.0, "solver": "unipc", "step_cache": 0.1}], {}, []),
        ([{"guidance": 1, "negative_prompt": "fog"}], {}, [f'negative_prompt="fog" has no effect (line 1): {STEERS}']),
        (
            [{}, {"negative_prompt": "rain"}, {"guidance": 4}],
            {"guidance": 1, "negative_prompt": "fog"},
            [f'negative_prompt="fog" has no effect (2 prompts, the first in line 1): {STEERS}'],
        ),
        (
            [{"steps": 2, "step_cache": 0.2}, {"steps": 3, "step_cache": 0.2}],
            {},
            ["step_cache=0.2 has no effect (line 1): the first and the last step are always computed"],
        ),
        ([{"steps": 1}, {"steps": 1, "solver": "unipc", "shift": 9}], {}, []),  # the model's own shift is not told
        (
            [{"steps": 1, "shift": 9, "solver": "ab2"}],
            {},
            [
                "shift=9.0 has no effect (line 1): there is one step, from noise to the clip",
                'solver="ab2" has no effect (line 1): euler and ab2 take the same first step',
            ],
        ),
        (
            [{}],
            {"steps": 1, "shift": CARD.shift},
            ["shift=2.0 has no effect (line 1): there is one step, from noise to the clip"],
        ),
        (
            [{"mode": "image"}],
            {"strength": 0.5, "direction": "backward"},
            [
                "direction=backward of the request has no effect: no prompt has mode extend",
                "strength=0.5 of the request has no effect: no prompt has mode edit",
            ],
        ),
        (
            [{"mode": "image"}],
            {"mode": "edit", "clip": "c"},
            ["mode=edit of the request has no effect: every prompt says its own mode or source"],
        ),
        ([{"mode": "loop"}], {"overlap": 5}, []),
    ],
)
def test_settings_that_change_nothing_are_told(
    lines: list[dict[str, Any]], of_request: dict[str, Any], warnings: list[str]
) -> None:
    assert told(*lines, **of_request) == warnings


def test_settings_that_change_nothing_are_no_part_of_the_recipe() -> None:
    def same(left: dict[str, Any], right: dict[str, Any], **both: Any) -> bool:
        recipes = [recipe(one(seed=1, **both, **each), 0, model_digest="m") for each in (left, right)]
        return recipes[0] == recipes[1]

    assert same({"negative_prompt": "fog"}, {}, guidance=1)
    assert not same({"negative_prompt": "fog"}, {}, guidance=1.5)
    assert same({"step_cache": 0.2}, {}, steps=2) and not same({"step_cache": 0.2}, {}, steps=3)
    assert same({"shift": 9, "solver": "ab2"}, {}, steps=1) and not same({"shift": 9}, {}, steps=2)
    assert not same({"solver": "unipc"}, {}, steps=1) and not same({"solver": "ab2"}, {}, steps=2)


@given(st.sampled_from(["euler", "ab2"]), st.floats(0.1, 20), st.integers(0, 9))
def test_one_step_gives_the_same_bits_whatever_shift_and_solver(solver: str, shift: float, seed: int) -> None:
    x = torch.randn(4, generator=torch.Generator().manual_seed(seed))

    def velocity(at: Tensor, now: float) -> Tensor:
        return torch.sin(3 * at) + now

    def end(shift: float, solver: str) -> Tensor:
        return list(denoise(at_model_times(velocity, solver), x, schedule(1, shift, solver), solver))[-1]

    settings = replace(one(), steps=1, shift=shift, solver=solver)
    assert {"shift", "solver"} <= without_effect(settings).keys()
    assert torch.equal(end(shift, solver), end(DEFAULTS.shift, "euler"))


def test_the_key_of_a_request_does_not_know_which_settings_were_given() -> None:
    from flows.request.form import request_key

    requests = [GenerationRequest(prompts=["x"]), GenerationRequest(prompts=["x"], shift=CARD.shift, strict=True)]
    keys = {request_key(each, each.resolve(CARD), source_sha256="s", model_digest="m") for each in requests}
    assert len(keys) == 1
