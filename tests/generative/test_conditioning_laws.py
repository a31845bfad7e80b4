"""What must hold of windows, canvases and held latents for any clip."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.media.windows import FADE, Canvas, Given, Window, seed_of, times_from, windows
from model.network.diffusion import SOLVERS, denoise, schedule
from tests.tiny import hold

STEP = 4


@st.composite
def time_lines(draw: st.DrawFn) -> Given:
    """Any time line that a request may lead to."""
    overlap = STEP * draw(st.integers(0, 3)) + 1
    window = draw(st.sampled_from([0, 0, 9, 17, 33]))
    window = window if window >= overlap + STEP else 0
    kind = draw(st.sampled_from(["free", "start", "end", "both", "loop", "loop of a source"]))
    gap = draw(st.integers(1, 60))
    rest: dict[str, Any] = {"window": window, "overlap": overlap}
    if kind == "free":
        length = gap if 0 < window < gap else STEP * (gap // STEP) + 1
        return Given(frames=length, **rest)
    if kind == "loop":
        return Given(frames=STEP * draw(st.integers(3, 15)) + 1, loop=True, **rest)
    start = draw(st.integers(1, 40)) if kind != "end" else 0
    end = draw(st.integers(STEP if kind == "end" else 1, 40)) if kind in ("end", "both") else 0
    loop = kind == "loop of a source"
    frames = start + gap + end
    return Given(frames=max(frames, 3 * STEP + 1) if loop else frames, start=start, end=end, loop=loop, **rest)


@given(time_lines())
def test_windows_make_every_unknown_frame_from_frames_that_are_known_by_then(given: Given) -> None:
    known = [k < given.start or k >= given.frames - given.end for k in range(given.frames)]
    last = windows(given, STEP)[-1]
    for window in windows(given, STEP):
        assert window.frames % STEP == 1 and window.head in (0, *range(1, window.frames, STEP))
        assert not given.window or window.frames <= max(given.window, 2 * given.overlap + 2 * STEP)
        latent = window.known(STEP)
        assert len(latent) == (window.frames - 1) // STEP + 1 and not all(latent)
        new = range(window.first + window.head, window.first + window.frames - window.tail)
        assert any(0 <= k < given.frames and not known[k] for k in new), "each window adds something"
        for k in (*range(window.head), *range(window.frames - window.tail, window.frames)):
            place = window.first + k
            place -= given.frames if given.loop and place >= given.frames else 0
            assert place >= given.frames or known[place], "nothing is taken for known that is not"
        for k in new:
            if 0 <= k < given.frames:
                known[k] = True
    assert all(known)
    if given.end or given.loop:
        ahead = last if given.start or given.loop else windows(given, STEP)[0]
        assert any(ahead.known(STEP)[1:]) and ahead.tail >= STEP, "the end is seen"


@given(time_lines(), st.integers(0, 2**31))
def test_a_canvas_keeps_what_it_was_given_and_is_whole_in_the_end(given: Given, seed: int) -> None:
    """Whatever the decoder makes of it."""
    random = np.random.default_rng(seed)
    start, end = (random.integers(1, 200, (2, n, 2, 2, 3), np.uint8) for n in (given.start, given.end))
    canvas = Canvas(given, start, end, STEP)
    assert not canvas.frames[:, given.start : given.frames - given.end].any()
    for window in windows(given, STEP):
        seen = canvas.known(window)
        assert seen.shape[1] == (window.frames if window.tail else window.head)
        canvas.paint(window, random.integers(240, 255, (2, window.frames, 2, 2, 3), np.uint8))
    assert canvas.frames.shape == (2, given.frames, 2, 2, 3)
    assert np.array_equal(canvas.frames[:, : given.start], start)
    assert np.array_equal(canvas.frames[:, given.frames - given.end :], end)
    assert canvas.frames.all(), "every frame was painted"


@given(st.integers(0, 2**31), st.booleans())
def test_what_stands_still_does_not_step_at_a_join(seed: int, backward: bool) -> None:
    """A decoder that loses something of every pixel, and makes nothing of time: the loss comes in little by little."""
    random = np.random.default_rng(seed)
    picture = random.integers(60, 200, (1, 1, 4, 4, 3)).astype(np.uint8)
    decoded = (picture + random.integers(-40, 40, picture.shape)).astype(np.uint8).repeat(17, 1)
    given = Given(frames=17, start=0 if backward else 5, end=8 if backward else 0)
    canvas = Canvas(given, picture.repeat(given.start, 1), picture.repeat(given.end, 1), STEP)
    (window,) = windows(given, STEP)
    canvas.paint(window, decoded)
    steps = np.abs(np.diff(canvas.frames.astype(int), axis=1)).max(-1)
    assert steps.max() <= 2 * 40 / FADE + 1
    assert np.array_equal(canvas.frames[:, 0 if backward else -1], decoded[:, 0]), "and is all there in the end"


def test_what_moves_leaves_no_ghost() -> None:
    """A bar moves on by its own width with every frame; what the decoder lost of it stays with the known frame."""
    decoded = np.full((1, 17, 8, 17, 3), 60, np.uint8)
    for k in range(17):
        decoded[:, k, :, k] = 200
    given = decoded[:, :5].copy()
    given[decoded[:, :5] == 200] = 170
    canvas = Canvas(Given(frames=17, start=5), given, given[:, :0], STEP)
    canvas.paint(Window(0, 17, 5), decoded)
    assert np.array_equal(canvas.frames[:, 5:], decoded[:, 5:])


@given(st.booleans(), st.integers(100, 250))
def test_a_cut_at_a_join_becomes_a_dissolve(backward: bool, level: int) -> None:
    """The model makes something else than what leads to the known frames."""
    known = np.full((1, 5, 4, 4, 3), 10, np.uint8)
    given = Given(frames=17, start=0 if backward else 5, end=5 if backward else 0)
    canvas = Canvas(given, known[:, : given.start], known[:, : given.end], STEP)
    (window,) = windows(given, STEP)
    canvas.paint(window, np.full((1, window.frames, 4, 4, 3), level, np.uint8))
    steps = np.abs(np.diff(canvas.frames.astype(int), axis=1)).max((0, 2, 3, 4))
    assert steps.max() < (level - 10) / 3 and (canvas.frames[:, 0 if backward else -1] == level).all()


@given(
    known=st.lists(st.booleans(), min_size=1, max_size=6),
    steps=st.integers(1, 12),
    solver=st.sampled_from(SOLVERS),
    strength=st.floats(0.01, 1),
)
def test_known_latents_stay_at_time_0_and_untouched_to_the_end(
    known: list[bool], steps: int, solver: str, strength: float
) -> None:
    asked: list[torch.Tensor] = []

    def predict(x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        asked.append(times)
        return torch.randn_like(x)

    start = torch.randn(2, 3, len(known), 2, 2)
    times = times_from(schedule(steps, 2.0), strength)
    *_, end = denoise(hold(predict, known), start, times, solver)
    still = torch.tensor(known)
    assert torch.equal(end[:, :, still], start[:, :, still])
    assert not still.all() or torch.equal(end, start)
    for now, each in zip(times, asked, strict=False):
        expected = torch.full((2, len(known)), now).masked_fill(still, 0.0)
        assert torch.equal(each, expected if any(known) else expected[:, 0])


@given(steps=st.integers(1, 100), shift=st.floats(0.1, 20), strength=st.floats(0.001, 1))
def test_an_edit_begins_at_its_strength_and_takes_no_more_steps(steps: int, shift: float, strength: float) -> None:
    whole = schedule(steps, shift)
    times = times_from(whole, strength)
    assert times[0] == strength and times[-1] == 0 and len(times) <= len(whole)
    assert times == sorted(set(times), reverse=True)
    assert times_from(whole, 1.0) == whole


@given(st.integers(0, 2**63 - 1))
def test_each_window_has_noise_of_its_own(seed: int) -> None:
    assert seed_of(seed, 0) == seed
    seeds = [seed_of(seed, k) for k in range(300)]
    assert len(set(seeds)) == 300 and all(0 <= s < 2**63 for s in seeds)


def test_a_length_that_the_autoencoder_cannot_give_is_refused() -> None:
    with pytest.raises(ValueError, match=r"frames=8 must be 4n\+1"):
        windows(Given(frames=8), STEP)
