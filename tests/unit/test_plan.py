"""Planning: laws of cutting requests into shards, of predicting costs and of asking for engines."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.library.models import network_of
from flows.plan.layout import GPUS, MINI, Rates
from flows.plan.shards import MAX_SHARDS, START_SECONDS, CostModel, WorkShape, arrange, engines_wanted, shards
from model.config import Partition
from model.loading.card import find_model
from model.parallel.memory import text_bytes, vae_bytes


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
    window: int | None = None
    made_frames: int | None = None


@dataclass(frozen=True)
class Finished:
    """Clips of a shape that were rendered. Where `stages` are empty, all of its seconds were denoising."""

    seconds: float
    width: int = 64
    height: int = 64
    frames: int = 17
    steps: int = 25
    guidance: float = 4.0
    mode: str = "text-to-video"
    strength: float | None = None
    window: int | None = None
    made_frames: int | None = None
    partition: str = "cfg1xsp1xtp2"
    stages: dict[str, float] = field(default_factory=dict[str, float])


NETWORK = network_of(find_model("mini"), 4)
ALONE, TWO = Partition(), Partition(tp=2)


def learnt(history: list[Finished]) -> CostModel:
    known = [c if c.stages else replace(c, stages={"denoise": c.seconds}) for c in history]
    return CostModel.from_history(known, NETWORK, MINI)


law = settings(deadline=None)
kinds = st.tuples(
    st.sampled_from([64, 96]), st.sampled_from([64, 96]), st.sampled_from([1, 9, 17]), st.sampled_from([4, 25])
)
batches = st.lists(st.tuples(kinds, st.sampled_from([1.0, 4.0, 7.5])), max_size=60).map(
    lambda rows: [Clip(f"clip-{i}", *kind, guidance) for i, (kind, guidance) in enumerate(rows)]
)
costs = st.builds(
    lambda each, step: lambda shape: each + step * shape.steps * shape.frames, st.floats(0.001, 10), st.floats(0, 0.1)
)


@law
@given(batches, costs, st.floats(0.01, 1000), st.integers(1, 20), st.integers(1, 50), st.integers(0, 200))
def test_every_clip_is_in_one_shard_shapes_never_mix_and_the_bounds_hold(
    clips: list[Clip], cost: Callable[[WorkShape], float], seconds: float, engines: int, room: int, later: int
) -> None:
    planned = shards(clips, cost, seconds=seconds, engines=engines, room=room, remaining=len(clips) + later)

    assert Counter(clip_id for shard in planned for clip_id in shard.clip_ids) == Counter(c.clip_id for c in clips)
    by_id = {clip.clip_id: clip for clip in clips}
    for shard in planned:
        assert shard.clip_ids
        assert {WorkShape.of(by_id[clip_id]) for clip_id in shard.clip_ids} == {shard.shape}
        assert shard.seconds == pytest.approx(len(shard.clip_ids) * cost(shard.shape))
    shapes = {WorkShape.of(clip) for clip in clips}
    share = max(len(shapes), room * len(clips) // max(1, len(clips) + later))
    assert len(planned) <= share
    assert len(planned) >= min(engines, len(clips), share)
    places = [int(shard.clip_ids[0].removeprefix("clip-")) for shard in planned]
    assert places == sorted(places)


@law
@given(st.integers(1, 300), st.floats(0.1, 100), st.floats(0.1, 50))
def test_shards_take_about_as_long_as_asked(count: int, seconds: float, each: float) -> None:
    planned = shards([Clip(str(i)) for i in range(count)], lambda _: each, seconds=seconds)
    if len(planned) < MAX_SHARDS:
        assert all(shard.seconds < seconds + each for shard in planned)  # never more than a clip too long
    sizes = [len(shard.clip_ids) for shard in planned]
    assert max(sizes) - min(sizes) <= 1  # no engine is left with a crumb


def test_a_huge_request_fills_its_room_in_any_number_of_waves() -> None:
    total, wave, made = 200_000, 20_000, 0
    clips = [Clip(str(i)) for i in range(wave)]
    for first in range(0, total, wave):
        made += len(shards(clips, lambda _: 1.0, seconds=20, room=MAX_SHARDS - made, remaining=total - first))
    assert 0.95 * MAX_SHARDS <= made <= MAX_SHARDS


def test_more_shapes_than_room_get_a_shard_each() -> None:
    clips = [Clip(str(i), width=16 * (i + 1)) for i in range(10)]
    assert len(shards(clips, lambda _: 1.0, seconds=1e9, room=3)) == 10
    assert shards([], lambda _: 1.0, seconds=1) == []


def test_engines_are_fed_even_when_the_work_is_short() -> None:
    clips = [Clip(str(i)) for i in range(8)]
    assert len(shards(clips, lambda _: 1.0, seconds=1e9)) == 1
    assert [len(s.clip_ids) for s in shards(clips, lambda _: 1.0, seconds=1e9, engines=4)] == [2, 2, 2, 2]
    assert len(shards(clips, lambda _: 1.0, seconds=1e9, engines=20)) == 8


@law
@given(st.integers(1, 300), st.integers(1, 9), st.integers(2, 17), st.floats(20, 5000))
def test_long_clips_are_batched_and_overlap_and_no_engine_has_more_to_do_than_others(
    count: int, engines: int, fewest: int, each: float
) -> None:
    clips = [Clip(str(i)) for i in range(count)]
    planned = shards(clips, lambda _: each, seconds=20, engines=engines, fewest=fewest)
    sizes = [len(shard.clip_ids) for shard in planned]
    if count >= engines * fewest:
        assert min(sizes) >= fewest, "one by one they are neither batched nor published while others render"
        assert max(sizes) < 3 * fewest, "a lost engine loses little, and a priority is soon felt"
        assert len(sizes) % engines == 0
    else:
        assert len(sizes) == min(count, engines), "engines come first"
    assert max(sizes) - min(sizes) <= 1


@law
@given(st.lists(st.builds(Finished, seconds=st.floats(-1, 1e4) | st.just(math.nan)), max_size=20), kinds)
def test_predictions_are_always_positive_and_finite(history: list[Finished], kind: tuple[int, int, int, int]) -> None:
    predicted = learnt(history).seconds(WorkShape.of(Clip("a", *kind)), TWO)
    assert 0 < predicted < math.inf


def test_what_was_measured_beats_the_formula_and_one_outlier_does_not() -> None:
    history = [Finished(2.0), Finished(2.2), Finished(500.0), Finished(0.7, frames=1), Finished(math.nan)]
    cost = learnt(history)
    assert cost.seconds(WorkShape.of(Clip("a")), TWO) == 2.2
    assert cost.seconds(WorkShape.of(Clip("a", frames=1)), TWO) == 0.7
    larger = cost.seconds(WorkShape.of(Clip("a", width=128, height=128)), TWO)
    assert 4 < larger < 40  # scaled from what was measured here, not from the default
    assert asdict(learnt([]).rates) == pytest.approx(asdict(MINI))


factors = st.floats(0.1, 10)
truths = st.builds(
    lambda f, s, m, u, c: Rates(
        petaflop=f * MINI.petaflop, step=s * MINI.step, megapixel=m, undivided=2 * u, clip=2 * c
    ),
    *(factors, factors, factors, factors, factors),
)
MANY = [Clip("a", w, h, f, s, g) for w, h, f, s, g in [
    (64, 64, 17, 25, 4.0), (64, 64, 1, 8, 4.0), (128, 96, 9, 10, 1.0), (128, 128, 17, 40, 4.0), (96, 64, 33, 16, 1.0)
]]  # fmt: skip


def rendered(truth: Rates, partition: Partition, slow: float = 1.0) -> list[Finished]:
    """What a machine of these rates would leave in history; `slow`: how much longer the third shape took."""
    history: list[Finished] = []
    for number, clip in enumerate(MANY):
        shape, ranks = WorkShape.of(clip), partition.world
        work, factor = shape.work, slow if number == 2 else 1.0
        stages = {
            "denoise": truth.petaflop * work.peta(NETWORK) / ranks + truth.step * work.walked,
            "decode": (truth.megapixel / ranks + truth.undivided / 2) * work.megapixels + truth.clip / 2,
            "encode": truth.undivided / 2 * work.megapixels,
            "text": truth.clip / 2,
        }
        stages = {stage: factor * seconds for stage, seconds in stages.items()}
        shown = {name: getattr(clip, name) for name in ("width", "height", "frames", "steps", "guidance")}
        history.append(Finished(sum(stages.values()), **shown, partition=str(partition), stages=stages))
    return history


unseen = st.builds(
    Clip,
    st.just("new"),
    *(st.sampled_from([64, 80, 160]), st.sampled_from([64, 112]), st.sampled_from([1, 13, 21, 49])),
    *(st.integers(1, 60), st.sampled_from([1.0, 4.0])),
)


@law
@given(truths, truths, unseen)
def test_a_machine_is_found_again_from_its_history_and_partitions_do_not_mix(
    alone: Rates, two: Rates, clip: Clip
) -> None:
    cost, shape = learnt([*rendered(alone, ALONE), *rendered(two, TWO)]), WorkShape.of(clip)
    for truth, partition in ((alone, ALONE), (two, TWO)):
        expected = truth.seconds(shape.work, NETWORK, partition.world)
        assert cost.seconds(shape, partition) == pytest.approx(expected, rel=0.02)


@law
@given(truths, unseen)
def test_what_ran_on_one_partition_tells_of_others_and_one_slow_shape_misleads_nobody(truth: Rates, clip: Clip) -> None:
    shape, four = WorkShape.of(clip), Partition(sp=4)
    expected = truth.seconds(shape.work, NETWORK, 4)
    both = [*rendered(truth, ALONE), *rendered(truth, TWO)]
    assert learnt(both).seconds(shape, four) == pytest.approx(expected, rel=0.05)
    disturbed = learnt([*rendered(truth, ALONE, slow=20.0), *rendered(truth, TWO)])
    assert disturbed.seconds(shape, four) == pytest.approx(expected, rel=0.5)


@law
@given(st.lists(st.tuples(st.integers(0, 4), st.floats(0.01, 100)), max_size=12), unseen, st.data())
def test_no_history_makes_more_work_take_less_time(
    noise: list[tuple[int, float]], clip: Clip, data: st.DataObject
) -> None:
    plain = rendered(MINI, TWO)
    history = [
        replace(plain[k], seconds=by * plain[k].seconds, stages={n: by * s for n, s in plain[k].stages.items()})
        for k, by in noise
    ]
    cost = learnt(history)
    rates = (cost.rates.petaflop, cost.rates.step, cost.rates.megapixel, cost.rates.undivided, cost.rates.clip)
    assert min(rates) >= 0
    name, more = data.draw(st.sampled_from([("steps", 1), ("frames", 4), ("width", 16), ("height", 48)]))
    larger = replace(clip, **{name: getattr(clip, name) + more})
    assert cost.formula(WorkShape.of(clip).work, TWO) <= cost.formula(WorkShape.of(larger).work, TWO) * (1 + 1e-9)
    free = replace(clip, guidance=1.0)
    assert cost.formula(WorkShape.of(free).work, TWO) <= cost.formula(WorkShape.of(clip).work, TWO) * (1 + 1e-9)


def test_windows_see_fewer_tokens_at_once_and_edits_take_fewer_steps() -> None:
    whole = WorkShape.of(Clip("a", frames=65)).work
    made = WorkShape.of(Clip("a", frames=65, window=17, made_frames=85)).work
    assert (made.at_once.frames, made.turns, made.walked) == (17, 5, 125)
    assert made.megapixels == whole.megapixels
    assert made.peta(NETWORK) == pytest.approx(5 * WorkShape.of(Clip("a")).work.peta(NETWORK))
    assert WorkShape.of(Clip("a", mode="edit", strength=0.5)).work.steps == 13


def test_memory_is_that_of_the_fullest_rank_in_the_type_its_device_computes_in() -> None:
    card, shape = find_model("mini"), WorkShape.of(Clip("a"))
    whole, divided = (learnt([]).memory(shape, partition) for partition in (ALONE, TWO))
    assert whole is not None and divided is not None
    weights = 4 * 8 * (8 * 256**2 + 2 * 256 * 1024)  # float32, 8 blocks
    beside = vae_bytes(card.path) + text_bytes(card.path, 4)
    assert 0 < whole - weights - beside < 10 * 80 * 2 * 4 * (256 + 1024)
    assert 0.45 * weights < whole - divided < 0.7 * weights
    half = replace(learnt([]), network=network_of(card)).memory(shape, ALONE)
    assert half is not None and half - vae_bytes(card.path) == pytest.approx((whole - vae_bytes(card.path)) / 2)


@law
@given(batches.filter(bool), st.integers(1, 16), st.none() | st.floats(0.1, 1000))
def test_every_clip_is_given_to_one_group_that_can_render_it(
    clips: list[Clip], gpus: int, deadline: float | None
) -> None:
    cost = learnt([])
    found = arrange(clips, cost, GPUS["cpu"], gpus, deadline)
    given_out = Counter(clip.clip_id for group in found.groups for clip in group.waiting)
    assert given_out == Counter(clip.clip_id for clip in clips)
    for group in found.groups:
        assert group.partition.world * group.replicas <= found.gpus <= gpus
        group.partition.check_heads(NETWORK.dit.heads)
        for clip in group.waiting:
            needed = cost.memory(WorkShape.of(clip), group.partition)
            assert needed is not None and needed < GPUS["cpu"].memory
    soonest = arrange(clips, cost, GPUS["cpu"], gpus)
    if deadline is not None and soonest.seconds <= deadline:
        assert found.seconds <= deadline
        assert found.gpus * found.seconds <= soonest.gpus * soonest.seconds * (1 + 1e-9)


def test_a_batch_gets_small_replicas_one_clip_all_ranks_and_a_late_deadline_few() -> None:
    def groups(count: int, gpus: int = 4, deadline: float | None = None) -> list[tuple[int, int, int]]:
        clips = [Clip(str(k), steps=50, width=128, height=128) for k in range(count)]
        found = arrange(clips, learnt([]), GPUS["cpu"], gpus, deadline)
        return [(group.replicas, group.partition.world, len(group.waiting)) for group in found.groups]

    assert groups(1) == [(1, 4, 1)]
    assert groups(40) == [(4, 1, 40)]
    assert groups(40, deadline=1e6) == [(1, 1, 40)]
    assert groups(5, deadline=0.1) == groups(5)  # what cannot be met is met as nearly as can be


def test_replicas_of_another_size_must_be_worth_their_start() -> None:
    clips = [Clip(str(k), steps=50, width=128, height=128) for k in range(9)]  # two rounds of four, and one
    for slower, expected in ((1, [1]), (10, [1, 4])):
        rates = replace(MINI, petaflop=slower * MINI.petaflop, step=slower * 0.1)
        found = arrange(clips, replace(learnt([]), rates=rates), GPUS["cpu"], 4)
        assert [group.partition.world for group in found.groups] == expected


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
