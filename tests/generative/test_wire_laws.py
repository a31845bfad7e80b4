"""What must hold of messages between an engine and its ranks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, make_dataclass, replace
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.engine.clip import ClipSpec, RankInfo
from model.engine.messages import (
    CancelClip,
    ClipBegan,
    ClipDone,
    ClipDropped,
    ClipFailed,
    ClipSaved,
    Exit,
    FromRank,
    RankAtWork,
    RankFailed,
    RankReady,
    RankSettings,
    RenderClip,
    StepsTaken,
    SuspendClip,
    ToRank,
)
from model.engine.wire import Wire, WireError, decode, encode
from tests.tiny import CLIP

BOTH = ToRank | FromRank
whole, real = st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False)
frames = st.integers(1, 3).map(lambda count: np.random.default_rng(count).integers(0, 255, (count, 2, 4, 3), np.uint8))
clips = st.builds(
    ClipSpec,
    clip_id=st.text(),
    prompt=st.text(),
    negative_prompt=st.text(),
    seed=whole,
    width=st.just(4),
    height=st.just(2),
    frames=whole,
    fps=whole,
    steps=whole,
    guidance=real,
    solver=st.text(),
    shift=real,
    start=frames,
    end=st.none() | frames,
    loop=st.booleans(),
    strength=st.none() | st.floats(0.1, 1),
    window=whole,
    overlap=whole,
    step_cache=st.none() | st.floats(0.1, 1),
    resume_state=st.none() | st.binary(),
)
seconds = st.dictionaries(st.sampled_from(["text", "denoise", "decode"]), real)
infos = st.builds(
    RankInfo, rank=whole, pid=whole, parameter_bytes=whole, self_test=real, device=st.text(), seconds=seconds
)
messages = st.one_of(
    st.builds(
        RenderClip,
        job=whole,
        clip=clips,
        buffer=whole,
        fingerprint=st.text(),
        checkpoint_every=st.tuples(whole, real),
    ),
    st.builds(CancelClip, job=whole),
    st.builds(SuspendClip, job=whole),
    st.builds(Exit),
    st.builds(RankReady, info=infos),
    st.builds(
        RankFailed,
        reason=st.text(),
        clips=st.lists(st.text()).map(tuple),
        cause=st.sampled_from(["memory", "device", "other"]),
        time=real,
    ),
    st.builds(RankAtWork),
    st.builds(ClipBegan, job=whole, step=whole),
    st.builds(StepsTaken, steps=st.lists(st.tuples(whole, whole, whole)).map(tuple), time=real),
    st.builds(ClipSaved, job=whole, step=whole, data=st.binary()),
    st.builds(
        ClipDone,
        job=whole,
        seconds=seconds,
        spans=st.lists(st.tuples(st.text(), real, real)).map(tuple),
        peak_bytes=whole,
        skipped_steps=st.none() | whole,
    ),
    st.builds(ClipFailed, job=whole, reason=st.text()),
    st.builds(ClipDropped, job=whole),
)


@contextmanager
def wires(receives: Any = BOTH) -> Iterator[tuple[Wire[Any, Any], Wire[Any, Any]]]:
    ours, theirs = Pipe()
    with ours, theirs:
        yield Wire(ours, receives), Wire(theirs, receives)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other) and one.dtype == other.dtype
    return type(one) is type(other) and one == other


def memory_files() -> int:
    """How many of this process's descriptors are those of messages."""
    links: list[str] = []
    for each in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one that lists them
            links.append(os.readlink(each))
    return sum("memfd:rushes-message" in link for link in links)


@given(st.lists(messages, max_size=3))
def test_messages_arrive_as_they_were_sent_and_in_order(sent: list[Any]) -> None:
    before = memory_files()
    with wires() as (ours, theirs):
        for message in sent:
            ours.send(message)
            got = theirs.receive()
            assert got == message
            if isinstance(message, RenderClip):  # equality of clips leaves out what they bring
                for each in fields(ClipSpec):
                    assert same(getattr(got.clip, each.name), getattr(message.clip, each.name)), each.name
    got = None  # as long as it is there its frames are mapped
    assert memory_files() == before, "memory files stay open"


def test_every_message_and_every_setting_of_a_clip_is_drawn_above() -> None:
    drawn = {kind.__name__ for kind in get_args(BOTH)}
    assert drawn == {kind.__name__ for kind in (*get_args(ToRank), *get_args(FromRank))}
    spec = replace(CLIP, start=np.zeros((1, 32, 48, 3), np.uint8), resume_state=b"state")
    plain, blobs = encode(spec)
    assert set(plain) == {"$kind", *(each.name for each in fields(ClipSpec))}
    assert sum(map(len, blobs)) == 32 * 48 * 3 + 5


def test_a_new_setting_travels_without_a_line_here() -> None:
    """Of any kind: a number, a choice, frames, bytes."""
    settings: dict[str, Any] = {"sharpness": float, "mode": str, "mask": Any, "lora": bytes, "tiles": tuple[int, int]}
    wider = make_dataclass("ClipSpec", settings.items(), bases=(ClipSpec,), frozen=True, kw_only=True)
    mask = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    values = {each.name: getattr(CLIP, each.name) for each in fields(CLIP)}
    spec = wider(**values, sharpness=0.3, mode="soft", mask=mask, lora=b"weights", tiles=(2, 3))
    plain, blobs = encode(RenderClip(job=1, clip=spec, buffer=0, fingerprint="", checkpoint_every=(0, 0.0)))
    whole = np.frombuffer(b"".join(bytes(blob) for blob in blobs), np.uint8)
    got: Any = decode(json.loads(json.dumps(plain)), whole, [RenderClip, wider]).clip
    assert type(got) is wider
    for each in fields(wider):
        assert same(getattr(got, each.name), getattr(spec, each.name)), each.name


def test_frames_that_arrive_cannot_be_changed() -> None:
    spec = replace(CLIP, start=np.ones((1, 32, 48, 3), np.uint8))
    with wires() as (ours, theirs):
        ours.send(RenderClip(job=1, clip=spec, buffer=0, fingerprint="", checkpoint_every=(0, 0.0)))
        start = theirs.receive().clip.start
    with pytest.raises(ValueError, match="read-only"):
        start[0] = 0


def test_a_message_that_is_not_expected_is_refused_with_its_name() -> None:
    with wires(ToRank) as (ours, theirs):
        ours.send(ClipDropped(job=1))
        with pytest.raises(WireError, match="'ClipDropped' is not among CancelClip, ClipSpec, Exit"):
            theirs.receive()
        ours.send(CLIP)  # known, but no message
        with pytest.raises(WireError, match="ClipSpec is not among CancelClip, Exit"):
            theirs.receive()


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        ({"$kind": "Shutdown"}, "'Shutdown' is not among CancelClip"),
        ({"$kind": "CancelClip"}, r"CancelClip has the fields \[\], and should have \['job'\]"),
        ({"$kind": "CancelClip", "job": 1, "why": ""}, r"has the fields \['job', 'why'\]"),
        ({"$kind": "CancelClip", "job": {"$bytes": 3}}, "its memory file has 2 bytes, 3 were announced"),
    ],
)
def test_a_message_that_does_not_fit_is_refused_with_the_reason(plain: dict[str, Any], said: str) -> None:
    with pytest.raises(WireError, match=said):
        decode(plain, np.zeros(2, np.uint8), [CancelClip])


def test_only_bytes_travel_beside() -> None:
    with pytest.raises(TypeError, match="an array of float32 cannot be sent"):
        encode(replace(CLIP, start=np.zeros((1, 32, 48, 3), np.float32)))  # pyright: ignore


def test_the_settings_of_a_rank_fit_on_its_command_line() -> None:
    settings = RankSettings(
        path="/models/tiny",
        partition="cfg1xsp1xtp2",
        device="cpu",
        dtype="float32",
        threads=1,
        micro_batch=2,
        compile="reduce-overhead",
        frame_step=4,
        boundary=None,
        rank=1,
        buffers=(3, 4),
    )
    line = json.dumps(encode(settings)[0])
    assert decode(json.loads(line), np.zeros(0, np.uint8), [RankSettings]) == settings
