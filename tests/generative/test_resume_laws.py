"""What must hold of a clip that is taken out between two steps and put back, here or elsewhere."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from model.engine.batch import Batch
from model.engine.resume import Expected, ResumeState, Unusable, fingerprint, from_bytes, to_bytes
from model.network.diffusion import (
    SOLVERS,
    SolverState,
    history_length,
    in_model_times,
    model_time,
    noise,
    schedule,
    solve,
)
from model.network.stepcache import Computed, StepCache
from tests.generative.test_batch_laws import SHAPE, Clip, network
from tests.tiny import CLIP

LINE = (9, 4, 4, 3)  # of pixels


def expected(clip: Clip, windows: int = 1, cached: bool = False) -> Expected:
    return Expected(windows, clip.steps, clip.solver, lambda window: SHAPE, LINE, cached)


def join(batch: Batch, number: int, clip: Clip, state: SolverState, cache: StepCache | None = None) -> None:
    """As a rank does: `state` says from now on where the clip is."""
    times = schedule(clip.steps, 3.0, clip.solver)
    again = model_time(times[cache.last.step], clip.solver) if cache and cache.last else None
    text, negative = noise(clip.seed + 1000, (5, 16)), noise(2000, (5, 16))
    way = in_model_times(solve(state, times, clip.solver), clip.solver)
    batch.join(number, way, text, negative, clip.guidance, clip.known, cache, again)


def whole(clip: Clip, size: int) -> Tensor:
    batch = Batch((network(0), network(1)), size=size, boundary=0.6)
    join(batch, 0, clip, SolverState(noise(clip.seed, SHAPE)))
    while not (arrived := batch.step()):
        pass
    return arrived[0]


clips = st.builds(
    Clip,
    seed=st.integers(0, 9),
    steps=st.integers(2, 8),
    solver=st.sampled_from(SOLVERS),
    known=st.sampled_from([(False, False, False), (True, False, False)]),
)


@settings(deadline=None, max_examples=60)
@given(
    clip=clips,
    stops=st.sets(st.integers(1, 7), min_size=1, max_size=3),
    size=st.integers(1, 3),
    before=st.integers(0, 2),
    after=st.integers(0, 2),
)
def test_a_clip_goes_on_to_the_same_bits_wherever_it_was_interrupted(
    clip: Clip, stops: set[int], size: int, before: int, after: int
) -> None:
    """Each time in a new batch, with other neighbours, which join before or after it, and leave when they are done."""
    state = SolverState(noise(clip.seed, SHAPE))
    arrived: dict[int, Tensor] = {}
    for stop in [*sorted(stop for stop in stops if stop < clip.steps), clip.steps]:
        batch, others = Batch((network(0), network(1)), size=size, boundary=0.6), iter(range(1, 20))
        neighbours = [replace(clip, seed=70 + number, steps=1 + number) for number in range(before + after)]
        for beside in neighbours[:before][: size - 1]:
            join(batch, next(others), beside, SolverState(noise(beside.seed, SHAPE)))
        join(batch, 0, clip, state)
        waiting = neighbours[before:]
        while state.step < stop:
            while waiting and len(batch) < size:
                beside = waiting.pop()
                join(batch, next(others), beside, SolverState(noise(beside.seed, SHAPE)))
            arrived |= batch.step()
        if stop < clip.steps:
            state = from_bytes(to_bytes(ResumeState(0, state, None), "of"), "of", expected(clip)).solver
            assert state.step == stop
    assert torch.equal(arrived[0], whole(clip, size))


@settings(deadline=None, max_examples=60)
@given(clip=clips, stops=st.sets(st.integers(1, 7), max_size=3), threshold=st.sampled_from([1e-12, 0.1, 0.3, 1.0]))
def test_a_step_cache_goes_on_too_and_skips_the_same_steps(clip: Clip, stops: set[int], threshold: float) -> None:
    """Another one is told nothing but which step was computed last, and of what."""

    def walked(stops: set[int]) -> tuple[Tensor, list[bool]]:
        state, last, skips = SolverState(noise(clip.seed, SHAPE)), None, list[bool]()
        arrived: dict[int, Tensor] = {}
        for stop in [*sorted(stop for stop in stops if stop < clip.steps), clip.steps]:
            batch = Batch((network(0), network(1)), boundary=0.6)
            cache = StepCache(threshold, clip.steps, step=state.step, last=last)
            join(batch, 0, clip, state, cache)
            while state.step < stop:
                before = cache.skipped
                arrived |= batch.step()
                skips.append(cache.skipped > before)
            if stop < clip.steps:
                saved = ResumeState(0, state, None, sum(skips), cache.last)
                got = from_bytes(to_bytes(saved, "of"), "of", expected(clip, cached=True))
                state, last = got.solver, got.computed
                assert got.skipped == sum(skips) and last is not None
        return arrived[0], skips

    whole, skipped = walked(set())
    parts, skipped_again = walked(stops)
    assert torch.equal(parts, whole) and skipped_again == skipped
    assert len(skipped) == clip.steps and not skipped[0] and not skipped[-1]


def resume_state(clip: Clip, step: int, window: int = 0, cached: bool = False) -> ResumeState:
    past = tuple(noise(100 + k, SHAPE) for k in range(history_length(clip.solver, step)))
    pixels = np.random.default_rng(0).integers(0, 255, LINE, np.uint8) if window else None
    skipped = step // 2 if cached else None
    computed = Computed(step - 1, noise(200, SHAPE)) if cached and step else None
    return ResumeState(window, SolverState(noise(clip.seed, SHAPE), step, past), pixels, skipped, computed)


@given(clip=clips, step=st.integers(0, 7), window=st.integers(0, 2), cached=st.booleans())
def test_what_was_written_is_read(clip: Clip, step: int, window: int, cached: bool) -> None:
    assume(step < clip.steps and (step or window))
    was = resume_state(clip, step, window, cached)
    got = from_bytes(to_bytes(was, "of"), "of", expected(clip, 3, cached))
    assert got.skipped == was.skipped
    assert (got.computed is None) == (was.computed is None) == (not cached or step == 0)
    if got.computed and was.computed:
        assert got.computed.step == was.computed.step and torch.equal(got.computed.x, was.computed.x)
    assert (got.window, got.solver.step, len(got.solver.past)) == (window, step, len(was.solver.past))
    assert all(map(torch.equal, (got.solver.x, *got.solver.past), (was.solver.x, *was.solver.past)))
    assert (got.pixels is None) == (was.pixels is None) == (not window)
    assert was.pixels is None or np.array_equal(got.pixels, was.pixels)


GOOD = Clip(1, 6, "unipc")


@given(st.data())
def test_no_bit_may_differ(data: st.DataObject) -> None:
    """Wherever a bit tips over, or the end is cut off: it is refused, and in no other way than that."""
    written = bytearray(to_bytes(resume_state(GOOD, 3, 1), "of"))
    where = data.draw(st.integers(0, len(written) - 1) | st.integers(0, 600))
    if data.draw(st.booleans()):
        written[where] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del written[where:]
    try:
        got = from_bytes(bytes(written), "of", expected(GOOD, 2))
    except Unusable:
        return
    was = resume_state(GOOD, 3, 1)  # a space of the header may have become another one
    assert all(map(torch.equal, (got.solver.x, *got.solver.past), (was.solver.x, *was.solver.past)))
    assert np.array_equal(got.pixels, was.pixels) and (got.window, got.solver.step) == (1, 3)


@given(st.binary(max_size=400) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_anything_else_is_refused(said: bytes | str) -> None:
    header = said.encode() if isinstance(said, str) else said
    for data in (header, len(header).to_bytes(8, "little") + header):
        with pytest.raises(Unusable):
            from_bytes(data, "of", expected(GOOD))


def edited(change: str, value: object, cached: bool = False) -> bytes:
    """A file that says the truth about itself but for one thing."""
    was = resume_state(GOOD, 3, cached=cached)
    tensors = {"x": was.solver.x, "past": torch.stack(was.solver.past)}
    data = to_bytes(was, "of")
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if change in tensors:
        assert isinstance(value, Tensor)
        return save({**tensors, change: value}, header["__metadata__"])
    if change == "offsets":
        header["x"]["data_offsets"] = value
    else:
        header["__metadata__"][change] = value
    said = json.dumps(header).encode()
    return len(said).to_bytes(8, "little") + said + data[8 + length :]


HOSTILE = [
    ("of", "else", "made of something else"),
    ("step", "6", "step 6 of window 0"),
    ("step", "0", "step 0 of window 0"),
    ("step", "-1", "step -1"),
    ("step", "1e9", "cannot be read"),
    ("step", None, "cannot be read"),
    ("window", "1", "window 1, of 1 windows"),
    ("window", "9" * 5000, "cannot be read"),
    ("contents", "0" * 64, "digest"),
    ("x", torch.zeros(16, 3, 2, 3), "should hold"),
    ("x", torch.zeros(SHAPE, dtype=torch.float64), "should hold"),
    ("x", torch.full(SHAPE, torch.nan), "digest"),
    ("past", torch.zeros(1, *SHAPE), "should hold"),
    ("offsets", [0, 1 << 62], "lies from"),
    ("offsets", [-8, 760], "lies from"),
    ("offsets", ["a", None], "cannot be read"),
]


@pytest.mark.parametrize(("change", "value", "said"), HOSTILE, ids=[f"{c}-{k}" for k, (c, _, _) in enumerate(HOSTILE)])
def test_a_file_that_does_not_fit_is_refused_with_the_reason(change: str, value: object, said: str) -> None:
    with pytest.raises(Unusable, match=said):
        from_bytes(edited(change, value), "of", expected(GOOD))


@pytest.mark.parametrize(
    ("change", "value", "said"),
    [
        ("skipped", "4", "it skipped 4 steps, at step 3"),
        ("skipped", "-1", "it skipped -1 steps"),
        ("skipped", "0", "digest"),
        ("skipped", None, "cannot be read"),
        ("computed", "3", "the last step that it computed is 3, at step 3"),
        ("computed", "-1", "the last step that it computed is -1"),
        ("computed", "1", "digest"),
        ("computed", "one", "cannot be read"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused_with_the_reason(change: str, value: object, said: str) -> None:
    with pytest.raises(Unusable, match=said):
        from_bytes(edited(change, value, cached=True), "of", expected(GOOD, cached=True))


def test_a_cache_where_none_is_due_and_none_where_one_is_due_are_refused() -> None:
    for cached in (False, True):
        with pytest.raises(Unusable):
            from_bytes(to_bytes(resume_state(GOOD, 3, cached=not cached), "of"), "of", expected(GOOD, cached=cached))


def test_numbers_that_are_not_finite_are_refused_though_their_digest_is_right() -> None:
    state = resume_state(GOOD, 3).solver
    state.x[0, 0, 0, 0] = torch.inf
    with pytest.raises(Unusable, match="not finite"):
        from_bytes(to_bytes(ResumeState(0, state, None), "of"), "of", expected(GOOD))


def test_a_header_of_absurd_length_or_depth_is_refused() -> None:
    for header in (b"[" * 10_000, b" " * 100_000):
        with pytest.raises(Unusable):
            from_bytes(len(header).to_bytes(8, "little") + header, "of", expected(GOOD))
    with pytest.raises(Unusable, match="its header says that it has 4611686018427387904 bytes"):
        from_bytes((1 << 62).to_bytes(8, "little") + b"{}", "of", expected(GOOD))


def test_whatever_the_bits_depend_on_is_in_the_digest() -> None:
    frames = np.zeros((1, 32, 48, 3), np.uint8)
    given_one = replace(CLIP, start=frames)
    others = [
        fingerprint(CLIP, "model", ["cpu", "two"]),
        fingerprint(CLIP, "another", ["cpu", "tp=2"]),
        *(fingerprint(replace(CLIP, **{k: v}), "model", ["cpu", "tp=2"]) for k, v in {"seed": 8, "steps": 5}.items()),
        *(fingerprint(spec, "model", ["cpu", "tp=2"]) for spec in (CLIP, given_one, replace(CLIP, start=frames + 1))),
    ]
    assert len(set(others)) == len(others)
    same = replace(given_one, clip_id="another", resume_state=b"something")
    assert fingerprint(same, "model", ["cpu", "tp=2"]) == fingerprint(given_one, "model", ["cpu", "tp=2"])
