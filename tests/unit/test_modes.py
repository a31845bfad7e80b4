"""What lines may be made from: every rule in one sentence, what follows from a source, and what makes a recipe."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.request import sources
from flows.request.form import Defaults, GenerationRequest, Mode, PromptLine, PromptsFormat, request_key
from flows.request.modes import BadSource, MediaSource
from flows.request.read import BadLine, check_defaults, check_prompts, read_prompts, untrained_shapes
from flows.request.recipe import Prompt, recipe
from model.media.encode import encode_png
from tests.unit.test_prompts import DEFAULTS as PLAIN
from tests.unit.test_request import CARD

DEFAULTS = replace(PLAIN, window=17)
PICTURE = MediaSource(
    sha256="1" * 64, key="blobs/1", bytes=9, media_type="image/png", width=600, height=400, frames=1, fps=0.0
)
VIDEO = replace(PICTURE, sha256="2" * 64, media_type="video/mp4", frames=50, fps=24.0)
GIF = replace(VIDEO, sha256="4" * 64, media_type="image/gif")
CLIP = replace(VIDEO, sha256="3" * 64, width=96, height=64, frames=17, fps=8.0, clip_id="req_1-000000-0")
KNOWN = {"image": {"ball.png": PICTURE}, "video": {"walk.mp4": VIDEO, "spin.gif": GIF}, "clip": {"c": CLIP, "d": CLIP}}


def find(kind: str, name: str) -> MediaSource | None:
    for kinds in KNOWN.values():
        if name in kinds and (kind != "clip" or name in KNOWN["clip"]):
            return kinds[name]
    raise BadSource("is not in the store")


def read(defaults: Defaults = DEFAULTS, find: Any = find, **values: Any) -> Prompt | BadLine:
    stream = io.BytesIO(json.dumps({"prompt": "a red ball", **values}).encode())
    (line,) = read_prompts(stream, source="p", format=PromptsFormat.JSONL, defaults=defaults, find=find)
    return line


def one(**values: Any) -> Prompt:
    line = read(**values)
    assert isinstance(line, Prompt), line
    return line


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"mode": "movie"},
            'mode="movie" must be text-to-video or image or image-to-video or extend or connect or loop or edit',
        ),
        ({"mode": 3}, "mode=3 must be text-to-video or image or image-to-video or extend or connect or loop or edit"),
        (
            {"image": "ball.png"},
            "image=ball.png is not for mode=text-to-video: say mode image-to-video, connect, loop or edit",
        ),
        ({"mode": "image-to-video"}, "mode=image-to-video needs image, video or clip"),
        ({"mode": "extend"}, "mode=extend needs video or clip"),
        (
            {"mode": "extend", "image": "ball.png"},
            ["image=ball.png is not for mode=extend, which takes video or clip"],
        ),
        ({"mode": "edit", "clip": "c", "video": "walk.mp4"}, "video and clip are both given: give one of them"),
        ({"mode": "connect", "clip": "c"}, "mode=connect needs end_image, end_video or end_clip"),
        (
            {"mode": "extend", "clip": "c", "end_clip": "d"},
            "end_clip=d is not for mode=extend: say mode connect",
        ),
        (
            {"mode": "edit", "clip": "c", "direction": "backward"},
            "direction=backward is for mode=extend, not for mode=edit",
        ),
        ({"strength": 0.5}, "strength=0.5 is for mode=edit, not for mode=text-to-video"),
        ({"mode": "edit", "clip": "c", "strength": 0}, "strength=0 must be a number above 0, at most 1"),
        ({"mode": "edit", "clip": "c", "strength": 1.01}, "strength=1.01 must be a number above 0, at most 1"),
        ({"mode": "extend", "clip": "c", "direction": "up"}, 'direction="up" must be forward or backward'),
        ({"mode": "extend", "clip": "x"}, "clip=x is not in the store"),
        ({"mode": "extend", "video": "ball.png"}, "video=ball.png is a picture: name it as image"),
        ({"mode": "edit", "image": "walk.mp4"}, "image=walk.mp4 is a video: name it as video"),
        (
            {"mode": "edit", "image": "spin.gif"},
            "image=spin.gif is an animation of 50 frames: name it as video, or save the frame you want",
        ),
        ({"mode": "image", "frames": 17}, "frames=17 must be 1 with mode=image"),
        (
            {"mode": "image-to-video", "image": "ball.png", "frames": 1},
            "frames=1 must be at least 5: the first one is the picture",
        ),
        ({"mode": "extend", "clip": "c", "frames": 17}, "frames=17 must be at least 18: the source has 17 of them"),
        (
            {"mode": "connect", "clip": "c", "end_clip": "d", "frames": 34},
            "frames=34 must be at least 35: the two sources have 17 and 17 of them",
        ),
        (
            {"mode": "loop", "frames": 9},
            "frames=9 must be at least 13: a shorter clip cannot come back to its beginning",
        ),
        ({"mode": "edit", "clip": "c", "frames": 21}, "frames=21 must be at most 17, which is what is edited"),
        (
            {"mode": "extend", "clip": "c", "overlap": 6},
            "overlap=6 must be 4n+1, at most 13: the model makes 17 frames at once",
        ),
        (
            {"mode": "extend", "clip": "c", "overlap": 17},
            "overlap=17 must be 4n+1, at most 13: the model makes 17 frames at once",
        ),
        ({"overlap": 5}, "overlap=5 does nothing here: the clip is made at once"),
        ({"mode": "extend", "clip": "c", "frames": 2000}, "frames=2000 must be between 1 and 1025"),
        ({"mode": "image-to-video", "image": "ball.png", "frames": 18}, "frames=18 must be 4n+1 (17 or 21)"),
        ({"mode": "extend", "clips": "c"}, 'unknown key "clips": did you mean "clip"?'),
    ],
)
def test_what_does_not_go_together_is_said_with_what_to_do(values: dict[str, Any], message: str | list[str]) -> None:
    line = read(**values)
    assert isinstance(line, BadLine)
    messages = [fault.message for fault in line.faults]
    assert (message if isinstance(message, str) else message[0]) in messages


@pytest.mark.parametrize(
    ("values", "frames", "made", "shapes"),
    [
        ({}, 17, None, ("64x64x17",)),
        ({"mode": "image"}, 1, None, ("64x64x1",)),
        ({"frames": 33}, 33, 17 + 17 + 17, ("64x64x17",)),  # a long video: windows that overlap
        ({"mode": "image-to-video", "image": "ball.png"}, 17, None, ("64x64x17",)),
        ({"mode": "extend", "clip": "c"}, 17 + 12, 17, ("96x64x17",)),
        ({"mode": "extend", "clip": "c", "overlap": 9}, 17 + 8, 17, ("96x64x17",)),
        ({"mode": "extend", "clip": "c", "frames": 41}, 41, 34, ("96x64x17",)),
        ({"mode": "extend", "clip": "c", "direction": "backward"}, 17 + 12, 17, ("96x64x17",)),
        ({"mode": "extend", "video": "walk.mp4"}, 17 + 12, 17, ("64x64x17",)),  # 24 frames a second become 8
        ({"mode": "connect", "clip": "c", "end_clip": "d"}, 17 + 8 + 17, 17, ("96x64x17",)),
        ({"mode": "connect", "image": "ball.png", "end_image": "ball.png"}, 14, 17, ("64x64x17",)),
        ({"mode": "loop"}, 17, 9 + 17, ("64x64x17", "64x64x9")),
        ({"mode": "loop", "clip": "c"}, 17 + 8, 17, ("96x64x17",)),
        ({"mode": "edit", "clip": "c", "width": 64}, 17, None, ("64x64x17",)),
        ({"mode": "edit", "image": "ball.png"}, 1, None, ("64x64x1",)),
    ],
)
def test_what_follows_from_a_source(
    values: dict[str, Any], frames: int, made: int | None, shapes: tuple[str, ...]
) -> None:
    prompt = one(**values)
    assert (prompt.frames, prompt.conditions.made_frames, prompt.shapes) == (frames, made, shapes)


def test_a_clip_brings_its_size_unless_somebody_asks_for_another() -> None:
    assert (one(mode="extend", clip="c").width, one(mode="extend", clip="c", width=64).width) == (96, 64)
    assert one(mode="extend", clip="c", defaults=replace(DEFAULTS, asked_size=True)).width == 64
    assert one(mode="image-to-video", image="ball.png").width == 64


def test_a_line_that_says_nothing_follows_the_request() -> None:
    request = GenerationRequest(prompts=["a"], mode=Mode.EDIT, clip="c", strength=0.3, frames=9)
    defaults = request.resolve(CARD)
    prompt = one(defaults=defaults)
    assert (prompt.conditions.mode, prompt.conditions.strength, prompt.frames) == (Mode.EDIT, 0.3, 9)
    assert one(defaults=defaults, strength=0.5).conditions.strength == 0.5
    assert one(defaults=defaults, mode="text-to-video").conditions.source is None
    assert one(defaults=defaults, mode="edit", clip="d").conditions.strength == 0.3, "an option that suits the line"
    options = GenerationRequest(prompts=["a"], strength=0.3, overlap=9).resolve(CARD)
    assert check_defaults(options) == []
    assert one(defaults=replace(options, window=17), mode="extend", clip="c").conditions.overlap == 9
    wrong = GenerationRequest(prompts=["a"], mode=Mode.EXTEND, image="ball.png").resolve(CARD)
    assert check_defaults(wrong)[0] == "image=ball.png is not for mode=extend, which takes video or clip"
    line = PromptLine(prompt="a", mode=Mode.EXTEND, clip="c")
    assert json.loads(GenerationRequest(prompts=[line]).inline_bytes()) == {
        "prompt": "a",
        "mode": "extend",
        "clip": "c",
    }


def test_clips_from_words_alone_keep_the_recipes_and_keys_they_always_had() -> None:
    """Written down before there were modes, and again for each `NUMERICS`: what was rendered is not rendered again."""
    recipes = [
        recipe(one(defaults=PLAIN), 0, model_digest="m"),
        recipe(one(frames=1, width=96, seed=7, negative_prompt="x", prompt="a blue cone"), 0, model_digest="m"),
    ]
    assert recipes == [
        "9fbb07fd7ba98aa46969bab556b92d8215b548774b4fac990992122113b00029",
        "f561feefc9ae4ea2450fa18968174b878fc2dbf6e1aa1db83f2f59f76744e393",
    ]
    assert recipe(one(mode="text-to-video"), 0, model_digest="m") == recipes[0]
    assert recipe(one(mode="image"), 0, model_digest="m") == recipe(one(frames=1), 0, model_digest="m")
    request = GenerationRequest(prompts=["a red ball"])
    for defaults in (PLAIN, DEFAULTS):
        key = request_key(request, defaults, source_sha256="s", model_digest="m")
        assert key == "8f03da58761dba8fe70da59556c3fc386eb922897d1fa3b6167c5549aca1a4ec"


def test_recipes_and_keys_of_all_settings_and_modes_never_change_by_accident() -> None:
    """Written down before settings were converted by field name: what was rendered is not rendered again."""
    recipes = {
        "cached": one(step_cache=0.2, seed=3, guidance=1, shift=2, solver="euler", steps=9, negative_prompt="x"),
        "edit": one(mode="edit", clip="c", seed=1),
        "extend": one(mode="extend", clip="c", direction="backward", seed=2),
        "loop": one(mode="loop", seed=1),
        "connect": one(mode="connect", clip="c", end_clip="d", seed=5, step_cache=0.5),
    }
    assert {name: recipe(line, 1, model_digest="m", rewritten="w") for name, line in recipes.items()} == {
        # guidance=1 is off, so negative_prompt is no part of it: the digest is that of the clip without one
        "cached": "d27ec1ff668d20a94ee5d699818f0ad459c7ba6c9c2940f63f6486e2090dafb6",
        "edit": "f60f07ac59db2345be222e90235ae49e9b578772974808c8911d41d1b05450fc",
        "extend": "a6f9bf7cf1bfd2f0ab6288cb5f8cd7ea0156bce886d524e35f8adb40402327df",
        "loop": "6950940dd16aed76070f6fd33553f522fd889dba29d71abe059173c33a62f89e",
        "connect": "ae4f80dcdc9be79cec87639c97de6fd45a6a9ecafc1f7c199a7564bead8cbae2",
    }
    for request, key in (
        (
            GenerationRequest(prompts=["a"], step_cache=0.25, guidance=3, samples=2, seed=4, negative_prompt="n"),
            "0a8081791de01e6bf8b917e17da15c0cd2cb632d5aa48089b80945f343edf68c",
        ),
        (
            GenerationRequest(prompts=["a"], mode=Mode.EDIT, clip="c", strength=0.5),
            "85c3933b3f31a38b983df950ed8bd94ed75e888c3ea6e6183d91cbd1fdd342fa",
        ),
    ):
        assert request_key(request, request.resolve(CARD), source_sha256="s", model_digest="m") == key


modes = st.fixed_dictionaries(
    {"mode": st.sampled_from(["extend", "edit", "loop", "image-to-video", "connect"])},
    optional={
        "clip": st.sampled_from(["c", "d"]),
        "video": st.just("walk.mp4"),
        "end_clip": st.just("d"),
        "direction": st.sampled_from(["forward", "backward"]),
        "strength": st.sampled_from([0.25, 0.5]),
        "overlap": st.sampled_from([1, 5, 9]),
        "frames": st.sampled_from([33, 37]),
    },
)


@given(modes, modes)
def test_recipes_differ_exactly_when_conditions_do(first: dict[str, Any], second: dict[str, Any]) -> None:
    lines = [line for values in (first, second) if isinstance(line := read(seed=1, **values), Prompt)]
    for line in lines:
        assert recipe(line, 0, model_digest="m") != recipe(one(seed=1), 0, model_digest="m")
    if len(lines) == 2:
        same = [(line.conditions.recipe(), line.width, line.height, line.frames) for line in lines]
        digests = [recipe(line, 0, model_digest="m") for line in lines]
        assert (digests[0] == digests[1]) == (same[0] == same[1])


def test_the_same_bytes_under_another_name_are_the_same_recipe() -> None:
    assert recipe(one(mode="edit", clip="c", seed=1), 0, model_digest="m") == recipe(
        one(mode="edit", clip="d", seed=1), 0, model_digest="m"
    )


def lines(*values: dict[str, Any]) -> io.BytesIO:
    return io.BytesIO("".join(json.dumps({"prompt": "a", **each}) + "\n" for each in values).encode())


def test_what_a_file_is_made_from_is_part_of_what_it_is() -> None:
    def made_from(*values: dict[str, Any]) -> str | None:
        stream = lines(*values)
        return check_prompts(stream, source="p", format=PromptsFormat.JSONL, defaults=DEFAULTS, find=find).made_from

    assert made_from({}, {"frames": 9}) is None
    video, clip = {"mode": "extend", "video": "walk.mp4"}, {"mode": "extend", "clip": "c"}
    assert len({made_from(video), made_from(clip), made_from(video, clip), made_from({"mode": "edit", **clip})}) == 3


def test_a_clip_that_cannot_be_looked_up_here_is_left_to_the_run() -> None:
    line = one(find=lambda kind, name: None, mode="extend", clip="anything")
    assert line.conditions.mode is Mode.EXTEND and line.conditions.identity == ("clip=anything",)


def test_shapes_that_the_model_does_not_know_are_warned_of() -> None:
    card = replace(CARD, trained=("64x64x17", "64x64x1"))
    assert untrained_shapes(card, {"64x64x17": 3}) == untrained_shapes(CARD, {"128x128x17": 1}) == ""
    assert untrained_shapes(card, {"64x64x17": 3, "128x128x17": 1, "64x64x9": 2}) == (
        "mini was not trained for 128x128x17 (1 clip), 64x64x9 (2 clips): expect less of them; "
        "it knows 64x64x17, 64x64x1"
    )
    assert card.window == 17 and CARD.window == 0


def test_sources_are_looked_up_only_where_a_line_names_one() -> None:
    def refuse(kind: str, name: str) -> MediaSource | None:
        raise AssertionError(name)

    def plain() -> Iterator[dict[str, Any]]:
        yield {}
        yield {"frames": 33}
        yield {"mode": "loop"}

    checked = check_prompts(lines(*plain()), source="p", format=PromptsFormat.JSONL, defaults=DEFAULTS, find=refuse)
    assert (checked.prompts, checked.bad) == (3, 0)


def test_the_sources_of_a_request_are_bounded_together_before_any_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_PIXELS", 25_000)
    pictures = np.random.default_rng(0).integers(0, 255, (3, 100, 100, 3), np.uint8)
    files = {name: encode_png(picture, {}) for name, picture in zip("abc", pictures, strict=True)}
    files |= {"again": files["a"], "c": files["c"][:2000], "small": encode_png(pictures[2, :64, :64], {})}
    request = sources.Sources(None, lambda _, name: (files[name], ""), lambda _: True)
    for name in ("a", "b", "again"):  # the same bytes count once
        assert request.find("image", name) is not None
    said = r"brings the request's sources to 30,000 pixels of all their frames, the most is 25,000: use shorter or"
    for _ in range(2):
        with pytest.raises(BadSource, match=said):  # told by its header: what follows it is missing
            request.find("image", "c")
    assert request.find("image", "small") is not None
