"""Clips that go on from a checkpoint on real ranks, to the bits of an undisturbed rendering."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model.config import Partition
from model.engine.clip import ClipSpec, RankDied
from model.engine.engine import Engine
from tests.distributed.conftest import Engines
from tests.tiny import CLIP

pytestmark = pytest.mark.xdist_group("ranks")

WHOLE = replace(CLIP, steps=12, solver="unipc")
FILM = replace(WHOLE, clip_id="film", solver="ab2", frames=18, window=9, overlap=5, steps=6)  # several windows
GIVEN = replace(
    FILM, clip_id="given", start=np.random.default_rng(0).integers(0, 255, (1, 32, 48, 3), np.uint8), loop=True
)
LONG = 100  # steps of a clip that is told to leave at its third: ranks go on while a busy machine lets us wait
Saved = dict[str, tuple[int, bytes]]


@pytest.fixture
def engine(engines: Engines) -> Engine:
    return engines.get(Partition(tp=2), micro_batch=2)


@pytest.fixture(scope="module")
def wanted(engines: Engines) -> dict[str, bytes]:
    return rendered(engines.get(Partition(tp=2), micro_batch=2), WHOLE, FILM, GIVEN)


def rendered(engine: Engine, *specs: ClipSpec) -> dict[str, bytes]:
    return {clip.clip_id: clip.frames.tobytes() for clip in engine.render(specs)}


def go_on(engine: Engine, *specs: ClipSpec) -> tuple[dict[str, bytes], dict[str, int]]:
    """The frames, and the step that each clip began at."""
    began: dict[str, int] = {}

    def on_step(clip_id: str, step: int, _: int) -> None:
        began.setdefault(clip_id, step)

    made = engine.render(specs, on_step=on_step)
    return {clip.clip_id: clip.frames.tobytes() for clip in made}, began


@pytest.mark.parametrize(
    ("spec", "steps", "dies_at"),
    [
        pytest.param(WHOLE, 2, 7, id="one", marks=pytest.mark.chaos),
        pytest.param(FILM, 5, 12, id="film", marks=pytest.mark.chaos),
        pytest.param(GIVEN, 1, 8, id="given"),
    ],
)
def test_a_rank_is_killed_and_a_new_engine_goes_on(
    engines: Engines, engine: Engine, wanted: dict[str, bytes], spec: ClipSpec, steps: int, dies_at: int
) -> None:
    saved: Saved = {}

    def on_step(_: str, step: int, __: int) -> None:
        if step == dies_at:
            os.kill(engine.ready[step % 2].pid, signal.SIGKILL)

    many = replace(spec, clip_id="beside", seed=9)
    with pytest.raises(RankDied):
        list(
            engine.render(
                [spec, many],
                on_step=on_step,
                on_checkpoint=lambda clip: saved.__setitem__(clip.clip_id, (clip.step, clip.data)),
                checkpoint_every=(steps, 0.0),
            )
        )
    step, data = saved[spec.clip_id]
    assert step > 0 and step % steps == 0
    another = engines.get(Partition(tp=2), micro_batch=2)  # its ranks are new ones
    # In front of it is one that begins at its beginning, and so on every rank.
    made, began = go_on(another, replace(CLIP, clip_id="first"), replace(spec, resume_state=data))
    assert made[spec.clip_id] == wanted[spec.clip_id]
    assert began == {"first": 0, spec.clip_id: step}


def test_who_must_leave_is_saved_at_the_next_step_and_nothing_else_begins(
    engine: Engine, wanted: dict[str, bytes]
) -> None:
    saved: Saved = {}
    steps: list[tuple[str, int]] = []
    # Of another kind, so that it may not join them, not even where the film is between two of its windows.
    long = replace(WHOLE, steps=LONG)
    whole = rendered(engine, long) | {"film": wanted["film"]}
    specs = [long, FILM, replace(WHOLE, clip_id="later", guidance=1.0)]
    made = engine.render(
        specs,
        on_step=lambda clip_id, step, _: steps.append((clip_id, step)),
        on_checkpoint=lambda clip: saved.__setitem__(clip.clip_id, (clip.step, clip.data)),
        leave=lambda: ("one", 3) in steps,
    )
    assert list(made) == []
    assert "later" not in saved and 3 <= saved["one"][0] < LONG
    finished, began = go_on(engine, *(replace(each, resume_state=saved[each.clip_id][1]) for each in specs[:2]))
    assert began == {clip_id: step for clip_id, (step, _) in saved.items()}
    assert finished == whole


def test_seconds_make_checkpoints_too_and_none_is_made_unasked(engine: Engine) -> None:
    saved: list[int] = []
    long = replace(CLIP, steps=200)
    list(engine.render([long], on_checkpoint=lambda clip: saved.append(clip.step)))
    assert saved == []
    began = time.monotonic()
    list(engine.render([long], on_checkpoint=lambda clip: saved.append(clip.step), checkpoint_every=(0, 0.05)))
    assert 1 <= len(saved) <= (time.monotonic() - began) / 0.05 and saved == sorted(saved)


def test_a_checkpoint_of_no_use_means_to_begin_anew(engine: Engine, wanted: dict[str, bytes]) -> None:
    """Of another clip, of another engine, broken, or nothing at all: never an error, and never other pixels."""
    saved: list[bytes] = []
    other = replace(WHOLE, seed=8)
    list(engine.render([other], on_checkpoint=lambda clip: saved.append(clip.data), checkpoint_every=(3, 0.0)))
    for data in (saved[0], saved[0][:100], b"", b"\0" * 1000, os.urandom(1000)):
        made, began = go_on(engine, replace(WHOLE, resume_state=data))
        assert made["one"] == wanted["one"] and began == {"one": 0}
    assert engine.running


@pytest.mark.parametrize(
    ("partition", "every"),
    [
        ("tp=2", 5),
        *(pytest.param(partition, 1, marks=pytest.mark.chaos) for partition in ("tp=2", "sp=2", "cfg=2", "zero=2")),
    ],
)
def test_a_clip_with_a_step_cache_goes_on_from_any_step_and_skips_the_same(
    engines: Engines, partition: str, every: int
) -> None:
    """One window and several, where every rank remembers its own part of the tokens, or of guidance."""
    specs = [replace(spec, step_cache=0.2, guidance=3.0) for spec in (WHOLE, FILM)]
    divided = Partition.parse(partition)
    engine = engines.get(divided, micro_batch=2 if divided.tp == 2 else 1)
    saved: list[tuple[str, int, bytes]] = []
    made = list(
        engine.render(
            specs,
            on_checkpoint=lambda clip: saved.append((clip.clip_id, clip.step, clip.data)),
            checkpoint_every=(1, 0.0),
        )
    )
    whole = {clip.clip_id: clip for clip in made}
    for spec in specs:
        steps = len(whole[spec.clip_id].steps)
        assert 0 < (whole[spec.clip_id].skipped_steps or 0) < steps - 2, "to skip never or always proves nothing"
        mine = {step: data for clip_id, step, data in saved if clip_id == spec.clip_id}
        assert len(mine) >= steps - steps // spec.steps, "one after each step but the last of a window"
        for step, data in list(mine.items())[::every]:
            began: list[int] = []
            (again,) = engine.render(
                [replace(spec, resume_state=data)], on_step=lambda _, step, __, began=began: began.append(step)
            )
            assert (began[0], again.skipped_steps) == (step, whole[spec.clip_id].skipped_steps)
            assert np.array_equal(again.frames, whole[spec.clip_id].frames), f"step {step} of {spec.clip_id}"


def test_a_clip_with_a_step_cache_leaves_as_any_other(engine: Engine) -> None:
    cached = replace(WHOLE, step_cache=0.2, steps=LONG)
    (whole,) = rendered(engine, cached).values()
    steps: list[tuple[str, int]] = []
    saved: list[tuple[str, int, bytes]] = []
    made = engine.render(
        [cached, replace(WHOLE, clip_id="beside", steps=LONG)],
        on_step=lambda clip_id, step, _: steps.append((clip_id, step)),
        on_checkpoint=lambda clip: saved.append((clip.clip_id, clip.step, clip.data)),
        leave=lambda: ("one", 3) in steps,
    )
    assert list(made) == []
    ((step, data),) = [(step, data) for clip_id, step, data in saved if clip_id == "one"]
    finished, began = go_on(engine, replace(cached, resume_state=data))
    assert finished["one"] == whole and 3 <= began["one"] == step < LONG


def test_an_engine_of_another_kind_has_another_fingerprint(model: Path, engine: Engine) -> None:
    digests = [engine.fingerprint(WHOLE)]
    for partition, batch, threads in ((Partition(), 2, 1), (Partition(tp=2), 1, 1), (Partition(tp=2), 2, 2)):
        other = Engine(model, partition, micro_batch=batch, threads_per_rank=threads)
        other.ready = engine.ready
        digests.append(other.fingerprint(WHOLE))
    assert len(set(digests)) == len(digests)
    assert engine.fingerprint(WHOLE) == digests[0] != engine.fingerprint(replace(WHOLE, seed=1))
