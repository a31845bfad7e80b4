"""Planning: laws of cutting requests into shards, of predicting costs and of asking for engines."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.plan import MAX_SHARDS, START_SECONDS, CostModel, Shape, engines_wanted, shards


@dataclass(frozen=True)
class Clip:
    clip_id: str
    width: int = 64
    height: int = 64
    frames: int = 17
    steps: int = 25
    guidance: float = 4.0
    mode: str = "text-to-video"
    strength: float | None = None
    made_frames: int | None = None


@dataclass(frozen=True)
class Finished:
    seconds: float
    width: int = 64
    height: int = 64
    frames: int = 17
    steps: int = 25
    guidance: float = 4.0
    mode: str = "text-to-video"
    strength: float | None = None
    made_frames: int | None = None


law = settings(deadline=None)
kinds = st.tuples(
    st.sampled_from([64, 96]), st.sampled_from([64, 96]), st.sampled_from([1, 9, 17]), st.sampled_from([4, 25])
)
batches = st.lists(st.tuples(kinds, st.sampled_from([1.0, 4.0, 7.5])), max_size=60).map(
    lambda rows: [Clip(f"clip-{i}", *kind, guidance) for i, (kind, guidance) in enumerate(rows)]
)
costs = st.builds(
    CostModel, per_clip=st.floats(0.001, 10), per_token_pass=st.floats(0, 0.1), by_shape=st.just(dict[Shape, float]())
)


@law
@given(batches, costs, st.floats(0.01, 1000), st.integers(1, 20), st.integers(1, 50), st.integers(0, 200))
def test_every_clip_is_in_one_shard_shapes_never_mix_and_the_bounds_hold(
    clips: list[Clip], cost: CostModel, seconds: float, engines: int, room: int, later: int
) -> None:
    planned = shards(clips, cost, seconds=seconds, engines=engines, room=room, remaining=len(clips) + later)

    assert Counter(clip_id for shard in planned for clip_id in shard.clip_ids) == Counter(c.clip_id for c in clips)
    by_id = {clip.clip_id: clip for clip in clips}
    for shard in planned:
        assert shard.clip_ids
        assert {Shape.of(by_id[clip_id]) for clip_id in shard.clip_ids} == {shard.shape}
        assert shard.seconds == pytest.approx(len(shard.clip_ids) * cost.seconds(shard.shape))
    shapes = {Shape.of(clip) for clip in clips}
    share = max(len(shapes), room * len(clips) // max(1, len(clips) + later))
    assert len(planned) <= share
    assert len(planned) >= min(engines, len(clips), share)
    places = [int(shard.clip_ids[0].removeprefix("clip-")) for shard in planned]
    assert places == sorted(places)


@law
@given(st.integers(1, 300), st.floats(0.1, 100), st.floats(0.1, 50))
def test_shards_take_about_as_long_as_asked(count: int, seconds: float, each: float) -> None:
    cost = CostModel(per_clip=each, per_token_pass=0)
    planned = shards([Clip(str(i)) for i in range(count)], cost, seconds=seconds)
    if len(planned) < MAX_SHARDS:
        assert all(shard.seconds < seconds + each for shard in planned)  # never more than a clip too long
    sizes = [len(shard.clip_ids) for shard in planned]
    assert max(sizes) - min(sizes) <= 1  # no engine is left with a crumb


def test_a_huge_request_fills_its_room_in_any_number_of_waves() -> None:
    cost = CostModel(per_clip=1, per_token_pass=0)
    total, wave, made = 200_000, 20_000, 0
    clips = [Clip(str(i)) for i in range(wave)]
    for first in range(0, total, wave):
        made += len(shards(clips, cost, seconds=20, room=MAX_SHARDS - made, remaining=total - first))
    assert 0.95 * MAX_SHARDS <= made <= MAX_SHARDS


def test_more_shapes_than_room_get_a_shard_each() -> None:
    clips = [Clip(str(i), width=16 * (i + 1)) for i in range(10)]
    assert len(shards(clips, CostModel(), seconds=1e9, room=3)) == 10
    assert shards([], CostModel(), seconds=1) == []


def test_engines_are_fed_even_when_the_work_is_short() -> None:
    clips = [Clip(str(i)) for i in range(8)]
    assert len(shards(clips, CostModel(), seconds=1e9)) == 1
    assert [len(s.clip_ids) for s in shards(clips, CostModel(), seconds=1e9, engines=4)] == [2, 2, 2, 2]
    assert len(shards(clips, CostModel(), seconds=1e9, engines=20)) == 8


def test_guidance_takes_twice_the_passes_and_longer_clips_more_tokens() -> None:
    guided, free = Shape.of(Clip("a")), Shape.of(Clip("a", guidance=1.0))
    assert guided.token_passes == 2 * free.token_passes == 2 * 5 * 4 * 4 * 25
    assert Shape.of(Clip("a", frames=1)).token_passes == guided.token_passes // 5
    assert CostModel().seconds(guided) == pytest.approx(0.9, rel=0.1)  # what two CPU cores took for mini


@law
@given(st.lists(st.builds(Finished, seconds=st.floats(-1, 1e4) | st.just(math.nan)), max_size=20), kinds)
def test_predictions_are_always_positive_and_finite(history: list[Finished], kind: tuple[int, int, int, int]) -> None:
    predicted = CostModel.from_history(history).seconds(Shape.of(Clip("a", *kind)))
    assert 0 < predicted < math.inf


def test_what_was_measured_beats_the_formula_and_one_outlier_does_not() -> None:
    history = [Finished(2.0), Finished(2.2), Finished(500.0), Finished(0.7, frames=1), Finished(math.nan)]
    cost = CostModel.from_history(history)
    assert cost.seconds(Shape.of(Clip("a"))) == 2.2
    assert cost.seconds(Shape.of(Clip("a", frames=1))) == 0.7
    larger = cost.seconds(Shape.of(Clip("a", width=128, height=128)))
    assert 4 < larger < 40  # scaled from what was measured here, not from the default
    assert CostModel.from_history([]) == CostModel()


@law
@given(st.floats(0, 1e7), st.integers(0, 2000), st.integers(0, 100))
def test_engines_are_never_more_than_shards_or_the_most(seconds: float, count: int, most: int) -> None:
    wanted = engines_wanted(seconds, count, most)
    assert 0 <= wanted <= min(count, most)
    assert (wanted == 0) == (count == 0 or most == 0)
    assert engines_wanted(seconds * 2, count, most) >= wanted
    assert engines_wanted(seconds, count + 1, most) >= wanted


def test_another_engine_must_be_worth_its_start() -> None:
    assert engines_wanted(1.9 * START_SECONDS, 100, 8) == 1
    assert engines_wanted(2 * START_SECONDS, 100, 8) == 2
    assert engines_wanted(math.inf, 100, 8) == 8
