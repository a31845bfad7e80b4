"""What must hold of any two clips that are compared."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from model.config import ClipShape
from model.media.compare import WHITE, compare
from model.media.windows import Frames


def clips(*, height: int = 3, width: int = 4) -> st.SearchStrategy[Frames]:
    """Few distinct values, so that frames are often equal."""
    sizes = st.integers(1, 4).map(lambda frames: (frames, height, width, 3))
    return sizes.flatmap(lambda size: arrays(np.uint8, size, elements=st.sampled_from([0, 1, 128, 255])))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Frames, Frames]:
    """Two clips of one shape that differ in a few values, perhaps in none."""
    one = draw(clips())
    other = one.copy()
    for place in draw(st.lists(st.integers(0, one.size - 1), max_size=3)):
        other.flat[place] = draw(st.integers(0, 255))
    return one, other


@given(pairs())
def test_figures_are_those_of_the_whole_arrays(pair: tuple[Frames, Frames]) -> None:
    one, other = pair
    found, apart = compare(one, other), np.abs(one.astype(float) - other.astype(float))
    assert found.nothing == np.array_equal(one, other) == (found.psnr is None) == (found.largest == 0)
    assert found.largest == apart.max()
    if not found.nothing:
        assert found.first == min(k for k in range(len(one)) if not np.array_equal(one[k], other[k]))
        assert found.psnr is not None and math.isclose(found.psnr, 10 * math.log10(255**2 / (apart**2).mean()))
    assert found.shapes == (ClipShape(4, 3, len(one)),) * 2


@given(clips(), clips() | clips(height=5))
def test_whichever_is_named_first(one: Frames, other: Frames) -> None:
    there, back = compare(one, other), compare(other, one)
    assert (there.largest, there.psnr, there.first) == (back.largest, back.psnr, back.first)
    assert there.shapes == back.shapes[::-1]


@given(clips(), clips())
def test_frames_that_only_one_has_are_all_wrong(one: Frames, more: Frames) -> None:
    found = compare(one, np.concatenate((one, more)))
    assert (found.largest, found.first) == (WHITE, len(one))
    assert found.shapes == (ClipShape(4, 3, len(one)), ClipShape(4, 3, len(one) + len(more)))
    wrong = len(more) / (len(one) + len(more))
    assert found.psnr is not None and math.isclose(found.psnr, -10 * math.log10(wrong), abs_tol=1e-9)


@given(clips(), clips(width=5))
def test_clips_of_different_sizes_have_nothing_in_common(one: Frames, other: Frames) -> None:
    found = compare(one, other)
    assert (found.largest, found.psnr, found.first) == (WHITE, 0.0, 0)
    assert found.shapes == (ClipShape(4, 3, len(one)), ClipShape(5, 3, len(other)))
