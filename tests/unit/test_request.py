"""The request: what the form accepts, what it becomes, and when two requests are one."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import validate
from pydantic import ValidationError

from flows.request.form import (
    GenerationRequest,
    PromptLine,
    PromptsFormat,
    ShortRequest,
    Solver,
    clip_id,
    digest_of,
    request_id,
    request_key,
)
from flows.request.read import BadLine, read_prompts
from flows.request.recipe import Prompt
from model.loading.card import ModelCard

CARD = ModelCard(
    name="mini",
    path=Path("mini"),
    digest="d" * 64,
    heads=4,
    multiple=16,
    frame_step=4,
    max_prompt_tokens=32,
    width=64,
    height=64,
    frames=17,
    fps=8,
    steps=25,
    guidance=4.0,
    solver="euler",
    shift=2.0,
)


def key_of(source: str = "s", **fields: Any) -> str:
    request = GenerationRequest(**{"prompts_uri": "store:x.jsonl", **fields})
    return request_key(request, request.resolve(CARD), source_sha256=source, model_digest=CARD.digest)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prompts": []},
        {"prompts": ["a"], "prompts_uri": "x"},
        {"prompts_uri": "  "},
        {"prompts": ["a"], "priority": 10},
        {"prompts": ["a"], "priority": -1},
        {"prompts": ["a"], "tenant": "../x"},
        {"prompts": ["a"], "tenant": ""},
        {"prompts": ["a"], "guidance": float("nan")},
        {"prompts": ["a"], "guidance": 0.5},
        {"prompts": ["a"], "step_cache": 0},
        {"prompts": ["a"], "step_cache": 1.5},
        {"prompts": ["a"], "seed": -1},
        {"prompts": ["a"], "seed": 2**63},
        {"prompts": ["a"], "samples": 0},
        {"prompts": ["a"], "width": 8},
        {"prompts": ["a"], "solver": "rk4"},
        {"prompts": ["a"], "prompt": "b"},
        {"prompts": [{"prompt": "a", "widht": 64}]},
        {"prompts": [{"custom_id": "a"}]},
        {"prompts": ["a"], "name": "x" * 201},
        {"prompts_text": " \n "},
        {"prompts_text": "a", "prompts": ["a"]},
        {"prompts_text": "a", "prompts_uri": "x"},
        {"prompts_text": "a" * 200_001},
    ],
)
def test_what_a_request_may_not_be(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GenerationRequest(**fields)


def schema() -> Any:
    def generate(request: GenerationRequest) -> None: ...

    return parameter_schema(generate).model_dump_for_openapi()


def short_schema() -> Any:
    def generate(request: ShortRequest) -> None: ...

    return parameter_schema(generate).model_dump_for_openapi()


FORMS = pytest.mark.parametrize("form", [schema, short_schema])


@FORMS
@pytest.mark.parametrize(
    "request_json",
    [
        {"prompts": ["a red ball"]},
        {"prompts_text": "a red ball\n{}"},
        {"prompts_text": "a", "name": None, "height": None, "mode": "extend", "clip": "c", "overlap": 5},
        {"prompts": ["a"], "resumes": "req_0123456789ab"},
        {"prompts": ["a", {"prompt": "b", "width": 96, "samples": None}], "priority": 0},
        {"prompts_uri": "store:prompts/x", "prompts_format": "jsonl", "solver": "ab2", "seed": 2**63 - 1},
        {"prompts_uri": "store:prompts/x", "files": {"a.png": "blobs/sha256/ab/cd/abcd"}},
        {"prompts": ["a"], "idempotency_key": "mine"},
        {"prompts": ["a"], "key": "mine"},
        {"prompts": ["a"], "key": None},
        # What a form sends that was opened and closed again: null for every field without a value.
        {
            "prompts": ["a"],
            **dict.fromkeys(["name", "prompts_uri", "width", "frames", "guidance", "solver", "idempotency_key"]),
        },
    ],
)
def test_prefect_accepts_what_the_class_accepts(request_json: dict[str, Any], form: Callable[[], Any]) -> None:
    assert validate({"request": request_json}, form()) == []
    assert ShortRequest(**request_json).model_dump() == GenerationRequest(**request_json).model_dump()


@FORMS
@pytest.mark.parametrize(
    "request_json",
    [
        {"prompts": ["a"], "width": 8},
        {"prompts": ["a"], "key": 1},
        {"prompts": ["a"], "key": ""},
        {"prompts": ["a"], "frames": "17"},
        {"prompts": ["a"], "priority": 10},
        {"prompts": ["a"], "solver": "rk4"},
        {"prompts": [{"prompt": "a", "widht": 64}]},
        {"prompts": ["a"], "seeds": 1},
        {"prompts": ["a"], "files": {"a.png": 1}},
        {"prompts": ["a"], "more_files": {"a.png": "b"}},
        {"prompts": "a"},
    ],
)
def test_prefect_refuses_before_anything_is_scheduled(request_json: dict[str, Any], form: Callable[[], Any]) -> None:
    assert validate({"request": request_json}, form())


def test_the_form_explains_itself() -> None:
    fields = GenerationRequest.model_json_schema()["properties"]
    assert all("title" in field for field in fields.values())
    for name in ("width", "frames", "steps", "guidance", "samples"):
        # One plain number field with its bounds, not a choice between a number and None.
        assert {"type", "minimum", "maximum"} <= fields[name].keys() and "anyOf" not in fields[name]
    assert "files" not in fields  # only a program could fill it in


def test_the_form_of_most_requests_is_short_and_begins_with_a_box_to_paste_prompts_into() -> None:
    short, whole = (each()["definitions"] for each in (short_schema, schema))
    assert list(short_schema()["properties"]) == ["request"]
    fields = short["ShortRequest"]["properties"]
    assert len(fields) <= 12
    places = [field["position"] for field in fields.values()]  # Prefect's Postgres keeps no order of keys
    assert places == sorted(set(places))
    first, second, *_ = fields
    assert (first, second) == ("prompts_text", "model") and fields[first]["type"] == "string"
    every = whole["GenerationRequest"]["properties"]
    assert list(every)[:4] == ["prompts_text", "model", "mode", "image"] and fields.keys() < every.keys()
    assert every.keys() | {"prompts", "files", "resumes"} == GenerationRequest.model_fields.keys()


def test_pasted_prompts_are_read_like_a_file() -> None:
    def read(text: str) -> list[Any]:
        request = GenerationRequest(prompts_text=text)
        stream = io.BytesIO(request.inline_bytes())
        return list(read_prompts(stream, source="prompts", format=request.format, defaults=request.resolve(CARD)))

    assert [line.prompt for line in read("a red ball\r\n\n  a blue cone ")] == ["a red ball", "a blue cone"]
    good, bad = read('{"prompt": "a", "seed": 5}\n\n{"prompt": "b", "frames": 10}')
    assert good.seed == 5 and bad.messages("prompts") == ["prompts:3: frames=10 must be 4n+1 (9 or 13)"]
    assert [(line.prompt, line.frames) for line in read("prompt,frames\na,9")] == [("a", 9)]
    mixed = read('a red ball\n\n{"prompt": "a blue cone", "frames": 9}\n{"prompt": "b", "frames": 10}\n{not json} ball')
    assert [(line.prompt, line.line) for line in mixed] == [
        ("a red ball", 1),
        ("a blue cone", 3),
        ("b", 4),
        ("{not json} ball", 5),
    ]
    assert mixed[1].frames == 9 and isinstance(mixed[2], BadLine)


def test_solvers_are_those_of_the_model() -> None:
    from model.network.diffusion import SOLVERS

    assert {solver.value for solver in Solver} == set(SOLVERS)


def test_defaults_are_the_models_unless_the_request_says_otherwise() -> None:
    defaults = GenerationRequest(prompts=["a"]).resolve(CARD)
    assert (defaults.width, defaults.frames, defaults.guidance, defaults.samples, defaults.seed) == (64, 17, 4.0, 1, 0)
    defaults = GenerationRequest(prompts=["a"], width=96, guidance=1, solver=Solver.AB2, seed=9).resolve(CARD)
    assert (defaults.width, defaults.height, defaults.guidance, defaults.solver, defaults.seed) == (
        96,
        64,
        1.0,
        "ab2",
        9,
    )


def test_a_step_cache_is_the_lines_own_else_the_requests_else_none() -> None:
    def caches(**fields: Any) -> list[float | None]:
        request = GenerationRequest(prompts=["a", PromptLine(prompt="b", step_cache=0.3)], **fields)
        stream, defaults = io.BytesIO(request.inline_bytes()), request.resolve(CARD)
        lines = read_prompts(stream, source="prompts", format=request.format, defaults=defaults)
        return [line.step_cache for line in lines if isinstance(line, Prompt)]

    assert caches() == [None, 0.3]
    assert caches(step_cache=0.1) == [0.1, 0.3]


def test_inline_prompts_are_read_like_a_file() -> None:
    request = GenerationRequest(
        prompts=[
            "a red ball",
            PromptLine(prompt="ein grüner Würfel", seed=5, frames=9),
            PromptLine(prompt="b", frames=10),
        ]
    )
    stream = io.BytesIO(request.inline_bytes())
    lines = list(read_prompts(stream, source="prompts", format=request.format, defaults=request.resolve(CARD)))
    good = [line for line in lines if isinstance(line, Prompt)]
    assert [(p.prompt, p.frames) for p in good] == [("a red ball", 17), ("ein grüner Würfel", 9)]
    assert isinstance(lines[2], BadLine)
    assert lines[2].messages("prompts") == ["prompts:3: frames=10 must be 4n+1 (9 or 13)"]


@pytest.mark.parametrize(
    ("uri", "format"),
    [
        ("a.jsonl", "jsonl"),
        ("store:x/a.NDJSON", "jsonl"),
        ("file:a.csv", "csv"),
        ("a.tsv", "csv"),
        ("a.txt", "text"),
        ("store:prompts/abc", "auto"),
    ],
)
def test_the_ending_tells_the_format(uri: str, format: str) -> None:
    assert GenerationRequest(prompts_uri=uri).format == PromptsFormat(format)
    assert GenerationRequest(prompts_uri=uri, prompts_format=PromptsFormat.CSV).format is PromptsFormat.CSV


def test_the_same_file_and_settings_are_the_same_request() -> None:
    key = key_of()
    assert key_of(name="other", priority=9, skip_invalid=True) == key  # names and urgency make no other clips
    assert key_of(width=64, guidance=4, samples=1) == key  # what the model would have taken anyway
    assert key_of(prompts_uri="elsewhere.jsonl") == key
    different = {
        key_of("other bytes"),
        key_of(width=96),
        key_of(seed=1),
        key_of(samples=2),
        key_of(negative_prompt="x"),
        key_of(tenant="t"),
        key_of(prompts_format="csv"),
        key_of(step_cache=0.1),
        key_of(step_cache=0.2),
    }
    assert len(different | {key}) == 10
    request = GenerationRequest(prompts_uri="x.jsonl")
    assert request_key(request, request.resolve(CARD), source_sha256="s", model_digest="e") != key


def test_a_given_key_decides_alone_within_a_tenant() -> None:
    assert key_of(idempotency_key="k") == key_of("other bytes", idempotency_key="k", width=96)
    assert key_of(idempotency_key="k", tenant="a") != key_of(idempotency_key="k", tenant="b")


def test_the_key_is_known_by_its_first_name_as_well() -> None:
    assert key_of(key="k") == key_of(idempotency_key="k") == "default:k"
    assert key_of(key=" ") == key_of(idempotency_key="") == key_of()
    assert GenerationRequest.model_validate({"prompts": ["a"], "key": "k"}).model_dump()["idempotency_key"] == "k"
    shown = GenerationRequest.model_json_schema()["properties"]
    assert "idempotency_key" in shown and "key" not in shown, "the form shows one field"
    with pytest.raises(ValidationError):
        GenerationRequest.model_validate({"prompts": ["a"], "key": "one", "idempotency_key": "another"})


def test_ids_are_those_of_the_ledger() -> None:
    from db.requests import request_id as of_ledger

    assert request_id("some key") == of_ledger("some key") == "req_6e3b0e6bd282"
    assert clip_id("req_0123456789ab", 11, 0) == "req_0123456789ab-000011-0"


def test_equal_values_have_equal_digests() -> None:
    assert digest_of({"a": 1, "b": "ü"}) == digest_of(json.loads('{"b": "\\u00fc", "a": 1}'))
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest_of([float("nan")])


def test_importing_the_request_is_cheap() -> None:
    heavy = ["torch", "prefect", "sqlalchemy", "httpx", "numpy"]
    code = f"import flows.request.form, flows.request.read, sys; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
