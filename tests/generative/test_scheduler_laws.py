"""What must hold of the order in which clips are denoised, whatever their keys and whoever leaves."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from model.engine.batch import BatchKey
from model.engine.job import RankJob
from model.engine.scheduler import Scheduler
from tests.tiny import CLIP

SHAPE = (16, 3, 4, 6)
KEYS = [BatchKey(SHAPE, True, False), BatchKey(SHAPE, False, False), BatchKey((16, 5, 4, 6), True, True)]


@settings(deadline=None)
@given(
    clips=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4), st.integers(1, 2)), max_size=12),
    size=st.integers(1, 4),
    arrivals=st.lists(st.integers(0, 3), min_size=12, max_size=12).filter(any),
    leavers=st.dictionaries(st.integers(0, 11), st.tuples(st.integers(0, 12), st.booleans())),
)
def test_every_clip_is_denoised_or_leaves_and_none_is_overtaken(
    clips: list[tuple[int, int, int]], size: int, arrivals: list[int], leavers: dict[int, tuple[int, bool]]
) -> None:
    """A clip has a key, and some windows of some steps each. It arrives, and may leave, at a step of its own."""
    jobs: dict[int, RankJob] = {}
    scheduler = Scheduler(size, jobs)
    left = {number: [steps] * windows for number, (_, steps, windows) in enumerate(clips)}
    waiting, batch = list(enumerate(clips)), list[int]()
    began, over = list[int](), set[int]()
    for now in range(200):
        for _ in range(arrivals[now % 12]):
            if waiting:
                number, (key, _, _) = waiting.pop(0)
                jobs[number] = RankJob(number, CLIP, 0, key=KEYS[key])
                scheduler.enqueue(number)
        for number, (when, cancelled) in leavers.items():
            if when == now:
                (scheduler.cancel if cancelled else scheduler.suspend)(number)
        turn = scheduler.next_turn(batch)
        assert len(turn.clips) == len(set(turn.clips)) <= size
        assert len({jobs[number].key for number in turn.clips}) <= 1, "one batch, one key"
        assert [number for number in batch if number in turn.clips] == turn.clips[: len(set(batch) & set(turn.clips))]
        assert not any(jobs[number].leaves for number in turn.clips)
        for job in turn.leaving:
            assert job.leaves and job.number not in turn.clips
            over.add(job.number)
            del jobs[job.number]
        if scheduler.ready and len(turn.clips) < size:
            assert turn.clips and scheduler.ready[0].key != jobs[turn.clips[0]].key, "a slot is free and a clip waits"
        for number in turn.clips:
            if number not in began:
                began.append(number)
                jobs[number].begun = True
        batch = []
        for number in turn.clips:
            left[number][0] -= 1
            if left[number][0]:
                batch.append(number)
            elif len(left[number]) > 1:  # another window
                left[number].pop(0)
                scheduler.enqueue(number)
            else:
                over.add(number)
                del jobs[number]
        if not waiting and not jobs:
            break
    assert over == set(range(len(clips))), "none waits for ever"
    assert began == sorted(began), "clips begin in the order in which they came"


def test_a_clip_whose_next_window_is_ready_goes_before_those_that_have_not_begun() -> None:
    jobs = {number: RankJob(number, CLIP, 0, key=KEYS[0]) for number in range(3)}
    scheduler = Scheduler(1, jobs)
    jobs[2].begun = True
    for number in range(3):
        scheduler.enqueue(number)
    assert scheduler.next_turn([]).clips == [2]


def test_what_is_said_of_a_clip_that_is_done_is_not_heard() -> None:
    scheduler = Scheduler(1, {})
    scheduler.cancel(7)
    scheduler.suspend(7)
    assert not scheduler.next_turn([]).clips
