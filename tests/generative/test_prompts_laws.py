"""Laws of reading prompt files: nothing crashes it, the three formats agree, chunks do not matter."""

from __future__ import annotations

import csv
import io
import json
from typing import Any, BinaryIO, cast

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flows.request.form import MAX_SEED, Defaults, PromptsFormat
from flows.request.read import BadLine, read_prompts
from flows.request.recipe import Prompt, recipe
from flows.request.unpack import BadFile

DEFAULTS = Defaults(
    width=64,
    height=64,
    frames=17,
    fps=8,
    steps=25,
    guidance=4.0,
    solver="euler",
    shift=2.0,
    negative_prompt=None,
    samples=1,
    seed=0,
    multiple=16,
    frame_step=4,
)
# The first draw of a text builds Unicode tables, which takes seconds on a busy machine.
law = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
JSON, CSV, TEXT, AUTO = PromptsFormat.JSONL, PromptsFormat.CSV, PromptsFormat.TEXT, PromptsFormat.AUTO

# Words as a person may type them, without control characters and byte order marks (which have rules of their own).
typed = st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="\ufeff")
texts = st.text(typed, min_size=1, max_size=40).filter(lambda text: text.strip() not in ("", "prompt"))
good_lines = st.fixed_dictionaries(
    {"prompt": texts},
    optional={
        "negative_prompt": texts,
        "width": st.integers(1, 8).map(lambda n: 16 * n),
        "height": st.integers(1, 8).map(lambda n: 16 * n),
        "frames": st.integers(0, 20).map(lambda n: 4 * n + 1),
        "fps": st.integers(1, 120),
        "steps": st.integers(1, 200),
        "guidance": st.floats(1, 30),
        "solver": st.sampled_from(["euler", "ab2", "unipc"]),
        "shift": st.floats(0.1, 20),
        "step_cache": st.floats(0, 1, exclude_min=True),
        "samples": st.integers(1, 64),
        "seed": st.integers(0, MAX_SEED),
    },
)
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
keys = st.sampled_from(["prompt", "custom_id", "size", "width", "frames", "seed", "guidance", "solver", "samples", "x"])


def read(data: bytes | BinaryIO, format: PromptsFormat) -> list[Prompt | BadLine]:
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    return list(read_prompts(stream, source="p", format=format, defaults=DEFAULTS))


def as_csv(lines: list[dict[str, Any]]) -> bytes:
    columns = sorted({key for line in lines for key in line})
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue().encode(errors="replace")


@law
@given(st.binary(max_size=400), st.sampled_from(PromptsFormat))
@example(b"\xff", CSV)
@example(b'prompt\n"', CSV)
@example(b"prompt\r\r", CSV)
@example(b"{}\n[", JSON)
def test_any_bytes_become_prompts_or_errors_and_never_a_crash(data: bytes, format: PromptsFormat) -> None:
    try:
        lines = read(data, format)
    except BadFile as error:
        assert str(error).startswith("p")
        return
    assert [line.index for line in lines] == list(range(len(lines)))
    assert [line.line for line in lines] == sorted({line.line for line in lines})
    for line in lines:
        if isinstance(line, BadLine):
            assert line.faults and all("\n" not in message for message in line.messages("p"))


@law
@given(st.lists(st.dictionaries(keys, any_json, max_size=6), min_size=1, max_size=4))
def test_any_values_become_prompts_within_bounds_or_errors_on_one_line(values: list[dict[str, Any]]) -> None:
    for line in read("".join(json.dumps(value) + "\n" for value in values).encode(), JSON):
        if isinstance(line, BadLine):
            assert line.faults and all("\n" not in fault.message for fault in line.faults)
            line.reason.encode()  # goes into the ledger: no lone surrogates, no NUL
            assert "\0" not in line.reason + line.prompt
            continue
        assert line.prompt.strip() == line.prompt != ""
        assert line.width % 16 == line.height % 16 == 0 and line.frames % 4 == 1
        assert 0 <= line.seed <= MAX_SEED and 1 <= line.samples <= 64 and 1 <= line.guidance <= 30


@law
@given(st.lists(st.dictionaries(keys, st.text(max_size=6).map(lambda text: text.replace("\r", " ")), max_size=6)))
@example(
    [{"prompt": "a", "frames": "1\n7"}, {"prompt": "a", "seed": "\0"}, {"prompt": "a", "size": "\n64x64", "width": "1"}]
)
def test_any_cells_become_prompts_or_errors_on_one_line(values: list[dict[str, str]]) -> None:
    try:
        lines = read(as_csv([{"prompt": "", **value} for value in values]), CSV)
    except BadFile:
        return
    for line in lines:
        if isinstance(line, BadLine):
            assert line.faults and all("\n" not in message for message in line.messages("p"))
            assert "\0" not in line.reason + line.prompt
            line.reason.encode()


@law
@given(st.lists(good_lines, min_size=1, max_size=5))
def test_jsonl_and_csv_say_the_same(lines: list[dict[str, Any]]) -> None:
    from_json = read("".join(json.dumps(line) + "\n" for line in lines).encode(), JSON)
    from_csv = read(as_csv(lines), CSV)
    assert all(isinstance(line, Prompt) for line in from_json)
    recipes = [[recipe(cast(Prompt, p), 0, model_digest="m") for p in each] for each in (from_json, from_csv)]
    assert recipes[0] == recipes[1]
    assert [cast(Prompt, p).samples for p in from_json] == [cast(Prompt, p).samples for p in from_csv]


@law
@given(st.lists(texts, min_size=1, max_size=5))
def test_text_says_the_same_as_jsonl(prompts: list[str]) -> None:
    from_text = read("\n".join(prompts).encode(), TEXT)
    from_json = read("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts).encode(), JSON)
    assert [(p.prompt, p.line) for p in from_text] == [(p.prompt, p.line) for p in from_json]


class Dribble:
    """A stream that gives at most so many bytes at a time."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        self.data, self.sizes, self.at = data, sizes, 0

    def read(self, size: int = -1) -> bytes:
        step = self.sizes[self.at % len(self.sizes)]
        self.at += 1
        given, self.data = self.data[:step], self.data[step:]
        return given


@law
@given(st.binary(min_size=4, max_size=300), st.lists(st.integers(1, 7), min_size=1), st.sampled_from([JSON, CSV, TEXT]))
def test_how_a_stream_is_cut_into_chunks_does_not_matter(data: bytes, sizes: list[int], format: PromptsFormat) -> None:
    def outcome(stream: bytes | BinaryIO) -> Any:
        try:
            return read(stream, format)
        except BadFile as error:
            return str(error)

    # The first chunk must hold the byte order mark whole, as every real stream's does.
    dribble = Dribble(data, [4, *sizes])
    assert outcome(cast(BinaryIO, dribble)) == outcome(data)


@law
@given(st.lists(good_lines, min_size=1, max_size=5), good_lines, st.integers(0, 5))
def test_a_new_line_changes_no_other_recipe(lines: list[dict[str, Any]], new: dict[str, Any], place: int) -> None:
    def recipes(of: list[dict[str, Any]]) -> list[str]:
        read_lines = read("".join(json.dumps(line) + "\n" for line in of).encode(), JSON)
        return [recipe(cast(Prompt, line), 0, model_digest="m") for line in read_lines]

    place = min(place, len(lines))
    after = recipes([*lines[:place], new, *lines[place:]])
    del after[place]
    assert after == recipes(lines)


@settings(law, max_examples=30)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=3000))
def test_exactly_the_repeated_ids_are_found_and_the_first_line_is_named(ids: list[int]) -> None:
    lines = read("".join(f'{{"prompt": "a", "custom_id": "{n}"}}\n' for n in ids).encode(), JSON)
    for place, (n, line) in enumerate(zip(ids, lines, strict=True)):
        first = ids.index(n)
        if first == place:
            assert isinstance(line, Prompt)
        else:
            assert isinstance(line, BadLine)
            assert line.reason == f'custom_id="{n}" is already the id of line {first + 1}'
