"""The forms of `generate` with the models that there are: what they refuse, and what stays possible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import build_error_obj, is_valid_schema, validate

from flows.operate.forms import with_models
from flows.request.form import GenerationRequest, ShortRequest
from model.loading.card import find_model

MINI = find_model("mini")
CARDS = {"mini": MINI, "wan": MINI.__class__(**{**MINI.to_json(), "path": MINI.path, "name": "wan", "multiple": 32})}


def short(request: ShortRequest) -> None: ...


def whole(request: GenerationRequest) -> None: ...


def form(of: Any) -> dict[str, Any]:
    schema = parameter_schema(of).model_dump_for_openapi()
    return with_models(schema, CARDS, default="wan", prompts=Path("/srv/prompts"))


@pytest.mark.parametrize("of", [short, whole])
def test_a_form_knows_the_models_and_their_bounds(of: Any) -> None:
    schema = form(of)
    is_valid_schema(schema)
    (definition,) = [each for each in schema["definitions"].values() if "prompts_uri" in each.get("properties", ())]
    model = definition["properties"]["model"]
    assert model["default"] == "wan" and model["anyOf"][0]["enum"] == ["mini", "wan"]
    assert (
        "- `mini`: 64x64, 17 frames at 8 a second, 25 steps" in model["description"] and "32n" in model["description"]
    )
    assert "/srv/prompts" in definition["properties"]["prompts_uri"]["description"]
    assert with_models(schema, CARDS, default="wan", prompts=Path("/srv/prompts")) == schema, (
        "made anew, it is the same"
    )


@pytest.mark.parametrize(
    ("request_json", "field"),
    [
        ({"frames": 50}, "frames"),
        ({"frames": 1026}, "frames"),
        ({"width": 9999}, "width"),
        ({"width": 40}, "width"),
        ({"model": "wan", "height": 48}, "height"),
        ({"samples": 0}, "samples"),
        ({"seed": -1}, "seed"),
        ({"model": ""}, "model"),
        ({"model": "mini", "mode": "edit", "frames": 50}, "frames"),
    ],
)
def test_what_a_field_may_not_be_is_said_at_the_field(request_json: dict[str, Any], field: str) -> None:
    said = build_error_obj(validate({"request": {"prompts_text": "a", "model": "mini", **request_json}}, form(short)))
    (request,) = said["errors"]
    assert request["property"] == "request" and {each["property"] for each in request["errors"]} == {field}


def test_a_length_between_two_names_those_that_are_near() -> None:
    (error,) = validate({"request": {"prompts_text": "a", "model": "mini", "frames": 50}}, form(short))
    assert error.message == "50 is not one of [49, 53, 57, 61, 65]"


@pytest.mark.parametrize(
    "request_json",
    [
        {"frames": 49, "width": 48},
        {"frames": None, "width": None},
        {"model": "wan", "width": 64},
        {"model": "/models/of/my/own", "width": 40, "frames": 50},  # whose bounds only the reader of prompts knows
        {"mode": "extend", "clip": "c", "frames": 50},  # joined from pieces, so of any length
    ],
)
def test_what_a_model_can_make_is_accepted(request_json: dict[str, Any]) -> None:
    for of in (short, whole):
        assert validate({"request": {"prompts_text": "a", "model": "mini", **request_json}}, form(of)) == []
