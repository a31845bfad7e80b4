"""Laws of the request model: whatever JSON comes through the form or the API is a request or an error."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from flows.request.form import MAX_SEED, GenerationRequest

names = st.sampled_from([*GenerationRequest.model_fields, "promts", "__class__", "__init__", "model_config"])
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**40), 10**40)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        ["store:x", "../../etc/passwd", "file:///etc/passwd", "mini", "extend", "9" * 400, "\0", "1e999"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | names, inner, max_size=3),
    max_leaves=8,
)


@given(st.booleans(), st.dictionaries(names, values, max_size=6))
def test_any_json_is_a_request_or_a_plain_error(nearly_good: bool, fields: dict[str, Any]) -> None:
    try:
        request = GenerationRequest.model_validate({"prompts": ["a red ball"], **fields} if nearly_good else fields)
    except ValidationError as error:
        assert error.errors(include_input=False, include_url=False, include_context=False)
        return
    # What is accepted keeps its bounds, and comes through Prefect's parameters as it was.
    again = GenerationRequest.model_validate_json(request.model_dump_json())
    assert again == request
    assert 0 <= request.priority <= 9
    assert request.seed is None or 0 <= request.seed <= MAX_SEED
    assert [bool(each) for each in (request.prompts, request.prompts_text, request.prompts_uri)].count(True) == 1
    assert "\0" not in request.model_dump_json() and "\\u0000" not in request.model_dump_json()
    json.loads(request.inline_bytes().splitlines()[0]) if request.prompts else None
