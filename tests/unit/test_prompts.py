"""Prompt files: every rule, said in one line with file, line, value and bound."""

from __future__ import annotations

import io
import json
import os
import tracemalloc
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest

from flows.library.variants import BadVariant, Lora
from flows.request.fields import parse_size
from flows.request.files import BadUri, InFolder, InStore, digest_stream, locate, open_file, open_uri
from flows.request.form import MAX_SEED, Defaults, PromptsFormat
from flows.request.modes import BadSource
from flows.request.read import BadLine, check_defaults, check_prompts, read_prompts
from flows.request.recipe import Prompt, derived_seed, recipe
from flows.request.sources import for_submitter
from flows.request.unpack import BadFile
from infra.store.folder import FolderStore

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
EXAMPLE = Path(__file__).parents[2] / "examples" / "prompts.jsonl"


def read(data: bytes | str, format: str = "jsonl", defaults: Defaults = DEFAULTS) -> list[Prompt | BadLine]:
    stream = io.BytesIO(data.encode() if isinstance(data, str) else data)
    return list(read_prompts(stream, source=f"p.{format}", format=PromptsFormat(format), defaults=defaults))


def errors(data: bytes | str, format: str = "jsonl") -> list[str]:
    bad = [line for line in read(data, format) if isinstance(line, BadLine)]
    return [message for line in bad for message in line.messages("p")]


def one(**values: Any) -> Prompt:
    """The prompt that one good JSON line becomes."""
    (prompt,) = read(json.dumps({"prompt": "a red ball", **values}))
    assert isinstance(prompt, Prompt), prompt
    return prompt


def wrong(**values: Any) -> list[str]:
    return errors(json.dumps({"prompt": "a red ball", **values}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"frames": 50}, "frames=50 must be 4n+1 (49 or 53)"),
        ({"frames": 2}, "frames=2 must be 4n+1 (1 or 5)"),
        ({"frames": 0}, "frames=0 must be between 1 and 1025"),
        ({"frames": 1024}, "frames=1024 must be 4n+1 (1021 or 1025)"),
        ({"size": "65x64"}, "size=65x64: width 65 must be a multiple of 16 (64 or 80)"),
        ({"size": "64x"}, 'size="64x" must be WIDTHxHEIGHT, like 96x64'),
        ({"size": "64x64", "width": 64}, "size=64x64 and width or height are both given: give one of them"),
        ({"width": 65}, "width=65 must be a multiple of 16 (64 or 80)"),
        ({"height": 15}, "height=15 must be between 16 and 2048"),
        ({"height": 4096}, "height=4096 must be between 16 and 2048"),
        ({"steps": 0}, "steps=0 must be between 1 and 200"),
        ({"samples": 65}, "samples=65 must be between 1 and 64"),
        ({"fps": 121}, "fps=121 must be between 1 and 120"),
        ({"seed": -1}, "seed=-1 must be between 0 and 9223372036854775807"),
        ({"seed": 2**63}, "seed=9223372036854775808 must be between 0 and 9223372036854775807"),
        ({"guidance": float("nan")}, "guidance=NaN must be a number between 1 and 30"),
        ({"guidance": float("inf")}, "guidance=Infinity must be a number between 1 and 30"),
        ({"guidance": 0.5}, "guidance=0.5 must be a number between 1 and 30"),
        ({"guidance": 10**400}, "guidance=100000000000000000000000000000000000000… must be a number between 1 and 30"),
        ({"shift": 0}, "shift=0 must be a number between 0.1 and 20"),
        ({"step_cache": 0}, "step_cache=0 must be a number above 0, at most 1"),
        ({"step_cache": 1.5}, "step_cache=1.5 must be a number above 0, at most 1"),
        ({"step_cache": "0.1"}, 'step_cache="0.1" must be a number above 0, at most 1'),
        ({"steps": True}, "steps=true must be a whole number between 1 and 200"),
        ({"steps": "25"}, 'steps="25" must be a whole number between 1 and 200'),
        ({"steps": 2.5}, "steps=2.5 must be a whole number between 1 and 200"),
        ({"steps": [1]}, "steps=[1] must be a whole number between 1 and 200"),
        ({"guidance": "4"}, 'guidance="4" must be a number between 1 and 30'),
        ({"guidance": False}, "guidance=false must be a number between 1 and 30"),
        ({"solver": "rk4"}, 'solver="rk4" must be euler, ab2 or unipc'),
        ({"solver": 1}, "solver=1 must be euler, ab2 or unipc"),
        ({"prompt": "  "}, "prompt is blank"),
        ({"prompt": None}, "prompt is missing"),
        ({"prompt": 5}, "prompt=5 must be a text"),
        ({"prompt": "x" * 2001}, "prompt has 2,001 characters, the most is 2,000"),
        ({"negative_prompt": "x" * 2001}, "negative_prompt has 2,001 characters, the most is 2,000"),
        ({"custom_id": ""}, "custom_id is blank"),
        ({"custom_id": 17}, "custom_id=17 must be a text"),
        ({"custom_id": "x" * 201}, "custom_id has 201 characters, the most is 200"),
        ({"prompt": "a\0b"}, "prompt has a NUL character (U+0000) at character 2, which cannot be stored: remove it"),
        (
            {"prompt": "a\x1b[2J"},
            "prompt has the control character (U+001B) at character 2, which cannot be stored: remove it",
        ),
        (
            {"prompt": "a\ud800"},
            "prompt has half a surrogate pair (U+D800) at character 2, which cannot be stored: remove it",
        ),
        ({"frame": 17}, 'unknown key "frame": did you mean "frames"?'),
        ({"Seed": 17}, 'unknown key "Seed": did you mean "seed"?'),
        (
            {"width": 2048, "height": 2048, "frames": 101},
            "2048x2048x101 has 423,624,704 pixels, the most is 268,435,456: make it smaller or shorter",
        ),
    ],
)
def test_what_is_wrong_is_said_with_value_bound_and_what_to_do(values: dict[str, Any], message: str) -> None:
    assert wrong(**values) == [f"p:1: {message}"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"nonsense", "is not JSON: expecting value at column 1"),
        (b'{"prompt": "a"', "is not JSON: expecting ',' delimiter at column 15"),
        (b"42", '42 must be an object, like {"prompt": "a red ball spins"}'),
        (b'{"prompt": "a", "seed": 1, "seed": 2}', 'key "seed" is given twice'),
        (b'{"prompt": "a\xff"}', "byte 0xff at column 14 is not UTF-8: save the file as UTF-8"),
        (b'{"prompt": ' + b"[" * 100_000, "is not JSON that can be read: it is nested too deeply"),
        (
            b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
            "is not JSON that can be read: a number has too many digits",
        ),
        (
            b'{"prompt": "' + b"x" * 10_000_000 + b'"}',
            "the line is longer than 1,000,000 bytes: write one prompt a line",
        ),
    ],
)
def test_a_line_that_cannot_be_read_is_named_and_the_next_one_is_read(line: bytes, message: str) -> None:
    before, after = b'{"prompt": "before"}\n', b'\n{"prompt": "after"}\n'
    lines = read(before + line + after)
    assert errors(before + line + after) == [f"p:2: {message}"]
    assert [line.prompt for line in lines if isinstance(line, Prompt)] == ["before", "after"]
    assert [line.index for line in lines] == [0, 1, 2]


def test_all_errors_of_a_line_and_of_a_file_are_told_at_once() -> None:
    data = (
        '{"prompt": "", "frames": 50, "seed": -1, "guidance": NaN, "negative": "x"}\n'
        '{"prompt": "good"}\n'
        '{"prompt": 3, "width": 65, "height": 65}\n'
    )
    assert errors(data) == [
        "p:1: prompt is blank",
        "p:1: frames=50 must be 4n+1 (49 or 53)",
        "p:1: seed=-1 must be between 0 and 9223372036854775807",
        "p:1: guidance=NaN must be a number between 1 and 30",
        'p:1: unknown key "negative": did you mean "negative_prompt"?',
        "p:3: prompt=3 must be a text",
        "p:3: width=65 must be a multiple of 16 (64 or 80)",
        "p:3: height=65 must be a multiple of 16 (64 or 80)",
    ]
    checked = check_prompts(
        io.BytesIO(data.encode()), source="p", format=PromptsFormat.JSONL, defaults=DEFAULTS, keep=2
    )
    assert (checked.prompts, checked.bad, checked.faults, len(checked.messages)) == (1, 2, 8, 2)


def test_a_thousand_unknown_keys_do_not_make_a_thousand_messages() -> None:
    messages = wrong(**{f"zz{i}": 1 for i in range(1000)})
    assert len(messages) == 6
    assert messages[-1] == "p:1: 995 more keys are unknown"


def test_a_repeated_custom_id_names_the_line_that_had_it_first() -> None:
    data = "".join(json.dumps({"prompt": "a", "custom_id": f"id-{i % 3000}"}) + "\n" for i in range(3001))
    assert errors(data) == ['p:3001: custom_id="id-0" is already the id of line 1']


def test_null_and_whole_floats_are_as_data_frames_write_them() -> None:
    prompt = one(frames=49.0, seed=7.0, negative_prompt=None, width=None, guidance=3)
    assert (prompt.frames, prompt.seed, prompt.negative_prompt, prompt.width) == (49, 7, None, 64)
    assert isinstance(prompt.frames, int) and isinstance(prompt.guidance, float)


def test_defaults_fill_what_a_line_leaves_open() -> None:
    defaults = replace(DEFAULTS, negative_prompt="dark", samples=3, width=96)
    (line,) = read('{"prompt": " a red ball "}', defaults=defaults)
    assert isinstance(line, Prompt)
    assert (line.prompt, line.negative_prompt, line.samples, line.width) == ("a red ball", "dark", 3, 96)
    (line,) = read('{"prompt": "a", "negative_prompt": ""}', defaults=defaults)
    assert isinstance(line, Prompt) and line.negative_prompt is None  # switched off for this line


def test_a_byte_order_mark_windows_line_ends_and_blank_lines_are_no_errors() -> None:
    data = b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n   \n{"prompt": "b"}\r\n\n\n'
    lines = read(data)
    assert [(line.prompt, line.line, line.index) for line in lines] == [("a", 1, 0), ("b", 4, 1)]


@pytest.mark.parametrize("format", ["jsonl", "csv", "text", "auto"])
@pytest.mark.parametrize("data", [b"", b"\n\n  \n", b"\xef\xbb\xbf", b"\xff\xfea\0"])
def test_an_empty_or_utf16_file_is_refused_as_a_whole(data: bytes, format: str) -> None:
    with pytest.raises(BadFile, match=r"^p\.\w+: (holds no prompts: write|is written in UTF-16: save it as UTF-8)"):
        read(data, format)


def test_a_json_array_is_told_from_json_lines() -> None:
    with pytest.raises(BadFile, match="is a JSON array: write one object a line"):
        read('[\n{"prompt": "a"}\n]')


def test_text_is_a_prompt_a_line() -> None:
    lines = read("a red ball\n\n  a blue cube, static shot.  \r\n", "text")
    assert [(line.prompt, line.line, line.index) for line in lines] == [
        ("a red ball", 1, 0),
        ("a blue cube, static shot.", 3, 1),
    ]
    assert errors(b"ok\nb\xe4d\n" + b"x" * 2001, "text") == [
        "p:2: byte 0xe4 at column 2 is not UTF-8: save the file as UTF-8",
        "p:3: prompt has 2,001 characters, the most is 2,000",
    ]


def test_csv_has_a_header_and_the_same_rules() -> None:
    data = (
        "prompt,custom_id,frames,guidance,seed\n"
        '"a red ball, bouncing",one,17,4,1\n'
        "a blue cube,two,50,nan,-1\n"
        "\n"
        '"over\ntwo lines",three,9.0,,\n'
        ",four,9,,\n"
        "a,one,,,\n"
        ",,,,\n"
        "a,b\n"
        "a,b,c,d,e,f\n"
        "a,five,1_7,1e400,١\n"
    )
    assert errors(data, "csv") == [
        "p:3: frames=50 must be 4n+1 (49 or 53)",
        "p:3: guidance=nan must be a number between 1 and 30",
        "p:3: seed=-1 must be between 0 and 9223372036854775807",
        "p:7: prompt is blank",
        'p:8: custom_id="one" is already the id of line 2',
        "p:10: has 2 cells, the header has 5",
        "p:11: has 6 cells, the header has 5 (a text with a comma in it needs quotes around it)",
        "p:12: frames=1_7 must be a whole number between 1 and 1025",
        "p:12: guidance=1e400 must be a number between 1 and 30",
        "p:12: seed=١ must be a whole number between 0 and 9223372036854775807",
    ]
    good = [line for line in read(data, "csv") if isinstance(line, Prompt)]
    assert [(p.prompt, p.line, p.frames) for p in good] == [("a red ball, bouncing", 2, 17), ("over\ntwo lines", 5, 9)]


def test_csv_that_cannot_be_read_says_where_and_why() -> None:
    assert errors(b'prompt,seed\na\xe4,1\n"b"x,2\nc,3\n' + b"d" * 2_000_000 + b',4\n"open,5\nmore\n', "csv") == [
        "p:2: byte 0xe4 is not UTF-8: save the file as UTF-8",
        "p:3: is not CSV: ',' expected after '\"'",
        "p:5: the line is longer than 1,000,000 bytes: write one prompt a line",
        "p:6: is not CSV: a quote is opened and never closed",
    ]


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_spreadsheets_may_write_other_delimiters(delimiter: str) -> None:
    (line,) = read(f"custom_id{delimiter}prompt\nx{delimiter}a, b\n", "csv")
    assert (line.prompt, line.custom_id) == ("a, b", "x")


def test_every_error_of_a_header_is_told() -> None:
    with pytest.raises(BadFile) as caught:
        read("promt,frame,,seed,seed\na,b,c,d,e\n", "csv")
    assert str(caught.value).splitlines() == [
        'p.csv:1: unknown column "promt": did you mean "prompt"?',
        'p.csv:1: unknown column "frame": did you mean "frames"?',
        "p.csv:1: column 3 of the header has no name",
        'p.csv:1: column "seed" is there twice',
    ]
    with pytest.raises(BadFile, match="the header row has no column prompt"):
        read("seed\n1\n", "csv")


@pytest.mark.parametrize(
    ("data", "first"),
    [('\n{"prompt": "a"}', "a"), ("prompt,seed\nb,1\n", "b"), ("a prompt, or two\n", "a prompt, or two")],
)
def test_without_a_telling_name_the_first_line_tells_the_format(data: str, first: str) -> None:
    assert read(data, "auto")[0].prompt == first


class Endless:
    """A stream of one line without an end, `size` bytes long, that holds none of it."""

    def __init__(self, size: int) -> None:
        self.left = size

    def read(self, size: int = -1) -> bytes:
        size = min(size, self.left)
        self.left -= size
        return b"x" * size


def test_a_line_of_half_a_gigabyte_takes_a_few_megabytes() -> None:
    tracemalloc.start()
    try:
        stream = cast(BinaryIO, Endless(500_000_000))
        (line,) = read_prompts(stream, source="p", format=PromptsFormat.JSONL, defaults=DEFAULTS)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(line, BadLine)
    assert peak < 8_000_000, peak


def test_remembering_ids_takes_numbers_and_no_texts() -> None:
    class Lines:
        def __init__(self, count: int) -> None:
            self.numbers = iter(range(count))

        def read(self, size: int = -1) -> bytes:
            rows = [f'{{"prompt": "a", "custom_id": "{n:0200d}"}}\n' for n in islice(self.numbers, 50)]
            return "".join(rows).encode()

    def peak(count: int) -> int:
        tracemalloc.start()
        try:
            stream = cast(BinaryIO, Lines(count))
            checked = check_prompts(stream, source="p", format=PromptsFormat.JSONL, defaults=DEFAULTS)
            assert checked.prompts == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    # From hash to line: a place in a dict and two integers each. With the texts it would be some 300 bytes.
    assert peak(4000) - peak(100) < 4000 * 140


def test_seeds_stay_when_lines_are_added_or_given_other_settings() -> None:
    few = read('{"prompt": "a"}\n{"prompt": "b", "custom_id": "x"}\n{"prompt": "c", "seed": 5}')
    more = read(
        '{"prompt": "new"}\n{"prompt": "c", "seed": 5}\n{"prompt": "b", "custom_id": "x", "frames": 9}\n{"prompt": "a"}'
    )
    seeds = {line.prompt: line.seed for line in more if isinstance(line, Prompt)}
    assert all(seeds[line.prompt] == line.seed for line in few if isinstance(line, Prompt))
    assert seeds["c"] == 5
    assert len(set(seeds.values())) == 4


def test_the_request_seed_and_the_custom_id_change_derived_seeds_only() -> None:
    assert derived_seed(0, "a", None) != derived_seed(1, "a", None) != derived_seed(1, "a", "x")
    assert derived_seed(0, "a", None) == 111274364939893  # a resubmission next year finds the same clips
    (line,) = read('{"prompt": "a", "seed": 5}', defaults=replace(DEFAULTS, seed=1))
    assert isinstance(line, Prompt) and line.seed == 5


def test_samples_count_up_from_the_seed_and_wrap() -> None:
    prompt = one(seed=MAX_SEED, samples=3)
    assert [prompt.seed_of(k) for k in range(3)] == [MAX_SEED, 0, 1]


def test_a_recipe_is_all_that_determines_the_pixels_and_nothing_else() -> None:
    prompt = one(seed=1)
    same = recipe(prompt, 0, model_digest="m")
    assert len(same) == 64 and int(same, 16)
    for other in (replace(prompt, index=9, line=9, custom_id="x", samples=4), replace(prompt, negative_prompt="")):
        assert recipe(other, 0, model_digest="m") == same
    changes: dict[str, Any] = {
        "prompt": "b",
        "negative_prompt": "b",
        "width": 80,
        "height": 80,
        "frames": 21,
        "fps": 9,
        "steps": 26,
        "guidance": 4.5,
        "solver": "ab2",
        "shift": 3.0,
        "step_cache": 0.2,
        "seed": 2,
    }
    others = [recipe(replace(prompt, **{key: value}), 0, model_digest="m") for key, value in changes.items()]
    others += [recipe(prompt, 1, model_digest="m"), recipe(prompt, 0, model_digest="n")]
    others += [recipe(prompt, 0, model_digest="m", rewritten="b, in other words")]
    # Sample 1 of seed 1 has the noise of sample 0 of seed 2: that is one clip, rendered once.
    assert len({same, *others}) == len(others)
    assert recipe(prompt, 1, model_digest="m") == recipe(replace(prompt, seed=2), 0, model_digest="m")


def test_a_recipe_never_changes_by_accident() -> None:
    """If this fails, old takes would no longer be found (or be found wrongly): is that what you want?"""
    prompt = one(seed=1, guidance=4)
    expected = "fc684104b1f87d16bda3a555b9b0ed3c"
    assert recipe(prompt, 0, model_digest="m")[:32] == expected


def test_the_settings_of_the_request_are_checked_in_the_same_words() -> None:
    assert check_defaults(DEFAULTS) == []
    assert check_defaults(replace(DEFAULTS, frames=50, width=65)) == [
        "width=65 must be a multiple of 16 (64 or 80)",
        "frames=50 must be 4n+1 (49 or 53)",
    ]


def test_sizes_are_parsed() -> None:
    assert parse_size("96x64") == parse_size(" 96 X 64 ") == parse_size("96×64") == (96, 64)
    assert parse_size("96") is parse_size("-96x64") is parse_size("9" * 20 + "x64") is None


def test_the_examples_are_good_and_varied() -> None:
    with EXAMPLE.open("rb") as stream:
        lines = list(read_prompts(stream, source="e", format=PromptsFormat.JSONL, defaults=DEFAULTS))
    prompts = [line for line in lines if isinstance(line, Prompt)]
    assert len(prompts) == len(lines) == 8
    assert len({(p.width, p.height) for p in prompts}) >= 2
    assert {p.frames for p in prompts} == {1, 9, 17}
    assert sorted(p.samples for p in prompts) == [1, 1, 1, 1, 1, 1, 1, 2]
    assert sum(p.negative_prompt is not None for p in prompts) == 1
    assert all(p.custom_id for p in prompts)


def test_the_examples_use_words_that_mini_was_taught() -> None:
    from model.world.captions import vocabulary

    known = set(vocabulary())
    for line in EXAMPLE.read_text().splitlines():
        value = json.loads(line)
        said = f"{value['prompt']} {value.get('negative_prompt', '')}".replace(",", " ").replace(".", " ").split()
        assert set(said) <= known
        assert len(said) <= 31


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A prompts folder with a file, links that stay inside, and ways out of it."""
    root = tmp_path / "prompts"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "secret.jsonl").write_text("secret")
    (root / "inside").symlink_to(root / "sub" / "a.jsonl")
    (root / "outside").symlink_to(tmp_path / "secret.jsonl")
    (root / "up").symlink_to(tmp_path)
    return root


@pytest.mark.parametrize("uri", ["sub/a.jsonl", "file:sub/a.jsonl", "./sub//a.jsonl", "inside", "file:inside"])
def test_a_uri_names_files_below_the_prompts_folder(folder: Path, uri: str) -> None:
    assert locate(uri, folder) == InFolder((folder / "sub" / "a.jsonl").resolve())


def test_an_absolute_path_below_the_folder_is_below_the_folder(folder: Path) -> None:
    there = folder / "sub" / "a.jsonl"
    assert locate(f"file://{there}", folder) == locate(str(there), folder) == InFolder(there.resolve())


@pytest.mark.parametrize(
    "uri",
    [
        "../secret.jsonl",
        "sub/../../secret.jsonl",
        "sub/../sub/a.jsonl",
        "outside",
        "up/secret.jsonl",
        "/etc/passwd",
        "file:/etc/passwd",
        "file:///etc/passwd",
        "file://host/etc/passwd",
        "file:",
        "",
        "http://example.com/prompts.jsonl",
        "s3://bucket/prompts.jsonl",
        "store:",
        "store:/etc/passwd",
        "store:a/../../b",
        "store:a\nb",
        "a\0b",
    ],
)
def test_a_uri_never_names_another_file(folder: Path, uri: str) -> None:
    with pytest.raises(BadUri, match=r"^prompts_uri="):
        locate(uri, folder)


def test_a_uri_names_objects_of_the_store(tmp_path: Path, folder: Path) -> None:
    store = FolderStore(tmp_path / "store")
    store.put_at("prompts/abc", b'{"prompt": "a"}\n', "application/x-ndjson")
    assert locate("store:prompts/abc", folder) == InStore("prompts/abc")
    with open_uri("store:prompts/abc", folder=folder, store=store) as stream:
        assert digest_stream(stream)[1] == 16
    with open_uri("sub/a.jsonl", folder=folder, store=store) as stream:
        assert stream.read() == b'{"prompt": "a"}\n'


def test_an_address_says_what_is_allowed(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(BadUri, match=r"must be store:<key>, or a file below .*: nothing is fetched from the network"):
        locate("https://example.com/a.png", folder, "image")
    sources = for_submitter(None, lambda: FolderStore(tmp_path / "store"), folder, {})
    for name in ("https://example.com/a.png", "s3://bucket/a.png", "file:///a.png"):
        with pytest.raises(
            BadSource, match="name a file beside the prompts, or store:KEY; nothing is fetched from the n"
        ):
            sources.find("image", name)
    with pytest.raises(BadVariant, match="must be a safetensors file of this machine"):
        Lora.parse("https://example.com/a.safetensors:0.8")
    assert locate("store:my pictures/ä, 1.png", folder) == InStore("my pictures/ä, 1.png")


def test_what_is_no_file_is_said_in_one_line(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(BadFile, match=r"nothing\.jsonl: no such file below the prompts folder"):
        locate("nothing.jsonl", folder)
    with pytest.raises(BadFile, match="no such file"):
        open_file(tmp_path / "nothing.jsonl")
    with pytest.raises(BadFile, match="is not a file"):
        open_file(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadFile, match="is not a file"):  # and it is not waited for
        open_file(tmp_path / "pipe")
