"""Tags and metadata: what is taken, what is refused and in which words; and that no recipe knows them."""

import io
import json
from typing import Any

import pytest
from pydantic import ValidationError

from flows.request.form import GenerationRequest, PromptsFormat, request_key
from flows.request.labels import MAX_METADATA, Labels, metadata_of, tags_of
from flows.request.read import BadLine, read_prompts
from flows.request.recipe import Prompt, recipe
from tests.unit.test_prompts import DEFAULTS


@pytest.mark.parametrize(
    ("given", "tags"),
    [
        (["hero", " night ", "hero"], ["hero", "night"]),
        ("hero, night;hero", ["hero", "night"]),
        ("", []),
        (["día 1"], ["día 1"]),
    ],
)
def test_tags_are_words_each_once(given: Any, tags: list[str]) -> None:
    assert tags_of(given) == tags


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (3, "tags=3 must be a list of texts"),
        ({"hero": 1}, "must be a list of texts"),
        (["hero", 3], "tags: 3 must be a text"),
        (["hero", " "], "one of them is blank"),
        (["a,b"], 'has "," in it: make it two tags'),
        (["x" * 65], "has 65 characters, the most is 64"),
        ([str(k) for k in range(33)], "there are 33, the most is 32"),
        (["a\x00"], "a NUL character (U+0000) at character 2"),
        (["\ud800"], "half a surrogate pair (U+D800)"),
    ],
)
def test_tags_that_are_refused(given: Any, said: str) -> None:
    with pytest.raises(ValueError, match="tags") as error:
        tags_of(given)
    assert said in str(error.value)


_DEEP = json.loads('{"a":' * 7 + "1" + "}" * 7)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["a"], 'metadata=["a"] must be a JSON object'),
        ("take 3", 'metadata="take 3" must be a JSON object'),
        ('{"a": 1, "a": 2}', "each key once"),
        ("[" * 100_000, "must be a JSON object"),
        (_DEEP, "nested more than 5 deep"),
        ({"a": float("inf")}, "inf is no number that JSON has"),
        ({"a": ["\x00"]}, "a NUL character (U+0000)"),
        ({"\ud800": 1}, "half a surrogate pair"),
        ({"a": "x" * MAX_METADATA}, "metadata has 4,104 bytes as JSON, the most is 4,096"),
    ],
)
def test_metadata_that_is_refused(given: Any, said: str) -> None:
    with pytest.raises(ValueError, match="metadata") as error:
        metadata_of(given)
    assert said in str(error.value)


def test_lines_have_labels_of_their_own_in_every_format() -> None:
    jsonl = b'{"prompt": "a", "tags": ["hero"], "metadata": {"shot": 7}}\n{"prompt": "b"}\n'
    table = b'prompt,tags,metadata\na,"hero","{""shot"": 7}"\nb,,\n'
    for data, format in ((jsonl, PromptsFormat.JSONL), (table, PromptsFormat.CSV)):
        first, second = read(data, format)
        assert first.labels == Labels(["hero"], {"shot": 7})
        assert second.labels == Labels()


def test_a_line_whose_labels_are_wrong_says_all_of_it() -> None:
    (line,) = read(b'{"prompt": "a", "tags": 3, "metadata": {"a": {"b": 1, "b": 2}}}\n', PromptsFormat.JSONL)
    assert isinstance(line, BadLine)
    assert line.reason == 'tags=3 must be a list of texts; metadata: key "b" is given twice'


def test_no_recipe_knows_them_and_other_labels_are_another_request() -> None:
    plain, labelled = read(b'{"prompt": "a"}\n{"prompt": "a", "tags": ["hero"]}\n', PromptsFormat.JSONL)
    assert isinstance(plain, Prompt)
    assert isinstance(labelled, Prompt)
    assert recipe(plain, 0, model_digest="m") == recipe(labelled, 0, model_digest="m")
    assert plain.seed == labelled.seed

    def key(**given: Any) -> str:
        request = GenerationRequest(prompts=["a"], **given)
        return request_key(request, DEFAULTS, source_sha256="s", model_digest="m")

    assert key() == key(tags=[], metadata={})
    assert key(tags=["a", "b"]) == key(tags=["b", "a"])
    assert len({key(), key(tags=["a"]), key(metadata={"a": 1}), key(metadata={"a": "1"})}) == 4


def test_the_form_refuses_what_the_ledger_would() -> None:
    for wrong in ({"tags": ["a,b"]}, {"tags": ["x" * 65]}, {"metadata": {"a": "\x00"}}, {"metadata": _DEEP}):
        with pytest.raises(ValidationError):
            GenerationRequest(prompts=["a"], **wrong)


def test_a_clip_has_those_of_its_request_and_of_its_line() -> None:
    request, line = Labels(("spring", "hero"), {"shot": 1, "by": "Ada"}), Labels(("hero", "night"), {"shot": 7})
    assert request | line == Labels(("spring", "hero", "night"), {"shot": 7, "by": "Ada"})


def read(data: bytes, format: PromptsFormat) -> list[Prompt | BadLine]:
    return list(read_prompts(io.BytesIO(data), source="prompts", format=format, defaults=DEFAULTS))
