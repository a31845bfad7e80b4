"""Leases one by one (who may write, what counts against a clip, whose turn it is), and many engines at once."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

from db.audit import contradictions
from db.claim import claim_shard
from db.fence import Lease, LeaseLost
from db.leases import (
    ResumeState,
    complete_shard,
    expire_leases,
    expire_owner,
    fail_clip,
    record_clip,
    release_shard,
    renew,
    save_resume_state,
    start_clip,
)
from db.planning import reuse_renders, unplanned
from db.requests import cancel_request, finish_request, progress, retry_request
from db.tables import MAX_LOST_ATTEMPTS, ClipStatus, RequestStatus
from tests.factories import (
    ENGINE,
    MODEL,
    artifact_of,
    batch,
    claim,
    clear,
    create_shard,
    digest,
    new_clip,
    opened,
    pass_time,
    planned,
    render,
    run_out,
    statuses,
    suffer,
)

Ledger = sessionmaker[Session]


def one_shard(session: Session, clips: int = 2, key: str = "batch") -> str:
    request = opened(session, [new_clip(index, recipe=(key, index)) for index in range(clips)], key=key)
    planned(session, request)
    return request


WRITES: dict[str, Callable[[Session, Lease, str], object]] = {
    "renew": lambda session, lease, clip: renew(session, lease, 60),
    "start": lambda session, lease, clip: start_clip(session, lease, clip, **ENGINE),
    "record": lambda session, lease, clip: record_clip(session, lease, clip, artifact=artifact_of("late"), seconds={}),
    "fail": lambda session, lease, clip: fail_clip(session, lease, clip, "late"),
    "complete": lambda session, lease, clip: complete_shard(session, lease),
    "release": lambda session, lease, clip: release_shard(session, lease),
}


@pytest.mark.parametrize("taken_by", ["another engine", "itself", "maintenance", "found dead", "completed", "released"])
def test_no_write_of_a_lost_lease_goes_through(ledger: Ledger, taken_by: str) -> None:
    with ledger.begin() as session:
        request = one_shard(session)
        lease, (clip, _) = claim(session)
        start_clip(session, lease, clip.clip_id, **ENGINE)
    with ledger.begin() as session:
        run_out(session, lease.shard_id)
        # Late, but nobody took it: the lease is still ours and can be kept.
        assert renew(session, lease, 600) == set()
        assert claim_shard(session, "b", seconds=60, model_digest=MODEL) is None
        run_out(session, lease.shard_id)
        if taken_by in ("another engine", "itself"):
            again, (left,) = claim(session, "b" if taken_by == "another engine" else "a")
            assert (again.shard_id, again.attempt) == (lease.shard_id, 2)
            assert left.clip_id != clip.clip_id  # what ran when the engine was lost is planned anew, alone
            start_clip(session, again, left.clip_id, **ENGINE)
        elif taken_by == "maintenance":
            assert expire_leases(session) == 1
        elif taken_by == "found dead":
            assert (expire_owner(session, "a"), expire_owner(session, "b")) == (1, 0)
        else:
            (complete_shard if taken_by == "completed" else release_shard)(session, lease)
    with ledger.begin() as session:
        before = everything(session)
    for write in WRITES.values():
        with pytest.raises(LeaseLost, match=f"shard {lease.shard_id}: attempt 1 by a"), ledger.begin() as session:
            write(session, lease, clip.clip_id)
    with ledger.begin() as session:
        assert everything(session) == before
        assert statuses(session, request).count("done") == 0


def test_an_engine_that_missed_a_cancel_and_a_retry_cannot_write_into_the_new_attempt(ledger: Ledger) -> None:
    with ledger.begin() as session:
        request = one_shard(session, clips=1)
        old, (clip,) = claim(session, "a")
        start_clip(session, old, clip.clip_id, **ENGINE)
        cancel_request(session, request)
        retry_request(session, request)
        planned(session, request)
        new, _ = claim(session, "b")
        start_clip(session, new, clip.clip_id, **ENGINE)
        before = everything(session)
        said = {name: write(session, old, clip.clip_id) for name, write in WRITES.items()}
        assert everything(session) == before
        nothing = {"renew": set(), "start": 0, "complete": None, "release": None}
        assert said == {**nothing, "record": False, "fail": ClipStatus.CANCELLED}
        assert record_clip(session, new, clip.clip_id, artifact=artifact_of("new"), seconds={})


def everything(session: Session) -> list[str]:
    tables = ("requests", "shards", "clips", "attempts", "artifacts", "renders")
    return [str(row) for table in tables for row in session.execute(text(f"select * from {table} order by 1, 2"))]


def test_a_clip_under_which_engine_after_engine_dies_is_quarantined_at_last(ledger: Ledger) -> None:
    with ledger.begin() as session:
        request = one_shard(session, clips=2)
    with ledger.begin() as session:
        lease, (poison, other) = claim(session, "engine-1")
        start_clip(session, lease, poison.clip_id, **ENGINE)
        run_out(session, lease.shard_id)
    with ledger.begin() as session:  # the other one goes on at once
        lease, clips = claim(session, "engine-2")
        assert [clip.clip_id for clip in clips] == [other.clip_id]
        assert render(session, lease, other.clip_id)
        complete_shard(session, lease)
    for attempt in range(2, MAX_LOST_ATTEMPTS + 1):
        with ledger.begin() as session:
            expire_leases(session)
            assert unplanned(session, request, 5) == []  # it waits, a second or longer
            pass_time(session, 91)
            (waiting,) = unplanned(session, request, 5)
            assert (waiting.failures, waiting.lost_attempts, waiting.suspect) == (0, attempt - 1, True)
            planned(session, request)
            lease, (clip,) = claim(session, f"engine-{attempt}")
            assert (clip.clip_id, clip.attempt_no) == (poison.clip_id, attempt)
            start_clip(session, lease, clip.clip_id, **ENGINE)
            run_out(session, lease.shard_id)
    with ledger.begin() as session:
        assert expire_leases(session) == 1
        assert claim_shard(session, "last", seconds=60, model_digest=MODEL) is None
        assert statuses(session, request) == ["quarantined", "done"]
        attempts = text("select status::text from attempts where clip_id = :id order by number")
        assert session.scalars(attempts, {"id": f"{request}-000000-0"}).all() == ["lost"] * MAX_LOST_ATTEMPTS
        error = session.scalar(text("select error from history where status = 'quarantined'"))
        assert error == "the engine died or stalled while rendering this clip"
        assert finish_request(session, request) == RequestStatus.COMPLETED_WITH_GAPS


@pytest.mark.parametrize("end", [complete_shard, release_shard])
def test_an_end_that_waits_for_a_renewal_ends_the_lease(ledger: Ledger, end: Callable[[Session, Lease], None]) -> None:
    with ledger.begin() as session:
        request = one_shard(session)
        lease, clips = claim(session)
        if end is complete_shard:
            for clip in clips:
                render(session, lease, clip.clip_id)

    def ends() -> None:
        with ledger.begin() as session:
            end(session, lease)

    with ThreadPoolExecutor(1) as pool, ledger.begin() as session:
        assert renew(session, lease, 60) == set()
        ended = pool.submit(ends)
        waits = text("select 1 from pg_stat_activity where wait_event_type = 'Lock' and query like '%held%'")
        until = time.monotonic() + 300
        with ledger() as beside:
            while beside.scalar(waits) is None:
                assert time.monotonic() < until and not ended.done(), "it did not wait"
                beside.rollback()
        session.commit()
        ended.result(300)
    with ledger() as session:
        status, until_when = session.execute(text("select status::text, leased_until from shards")).one()
        assert (status, until_when) == ("done" if end is complete_shard else "queued", None)
        assert session.scalar(text("select count(*) from usage")) == 1
        assert statuses(session, request) == ["done" if end is complete_shard else "queued"] * 2


@pytest.mark.parametrize(
    ("fates", "end"),
    [
        ("fff", "quarantined"),
        ("llfllff", "quarantined"),  # its third failure, whatever happened between
        ("lflflll", "queued"),  # hosts that vanish and two failures are no poison
        ("lflfllll", "quarantined"),
        ("rrrllr", "queued"),
    ],
)
def test_failures_and_losses_are_counted_apart(ledger: Ledger, fates: str, end: str) -> None:
    with ledger.begin() as session:
        request = one_shard(session, clips=1)
        for fate in fates:
            assert statuses(session, request) == ["queued"]
            lease, (clip,) = claim(session)
            suffer(session, lease, clip, fate)
            planned(session, request)
        assert statuses(session, request) == [end]
        assert list(contradictions(session)) == []
        if end == "queued":
            return
        assert retry_request(session, request) == 1
        (waiting,) = unplanned(session, request, 5)
        assert (waiting.failures, waiting.lost_attempts, waiting.suspect) == (0, 0, False), "all tries anew"


def test_a_checkpoint_outlives_bad_luck_and_is_left_behind_where_it_may_be_the_fault(ledger: Ledger) -> None:
    def kept_after(key: str, fates: str) -> list[bool]:
        kept: list[bool] = []
        with ledger.begin() as session:
            request = one_shard(session, clips=1, key=key)
            for fate in fates:
                lease, (clip,) = claim(session)
                start_clip(session, lease, clip.clip_id, **ENGINE)
                point = ResumeState(key=f"checkpoints/{key}/{len(kept)}", step=1 + len(kept), fingerprint="alike")
                save_resume_state(session, lease, clip.clip_id, point)
                if fate == "f":
                    fail_clip(session, lease, clip.clip_id, "no")
                    complete_shard(session, lease)
                else:
                    run_out(session, lease.shard_id)
                    expire_leases(session)
                kept.append(session.scalar(text("select resume_key from clips")) is not None)
                pass_time(session, 91)
                planned(session, request)
            clear(session)
        return kept

    assert kept_after("failures", "ff") == [True, False]
    assert kept_after("lost_attempts", "lllll") == [True, True, False, True, True]
    assert kept_after("both", "lf") == [True, False]


def test_giving_back_in_order_costs_the_clip_nothing(ledger: Ledger) -> None:
    with ledger.begin() as session:
        request = one_shard(session, clips=1)
        for _ in range(5):
            lease, (clip,) = claim(session)
            start_clip(session, lease, clip.clip_id, **ENGINE)
            release_shard(session, lease)
        assert statuses(session, request) == ["queued"]
        lease, (clip,) = claim(session)
        assert (lease.attempt, clip.attempt_no) == (6, 6)
        assert render(session, lease, clip.clip_id)


def test_a_clip_started_and_never_told_of_again_is_queued_when_the_shard_is_completed(ledger: Ledger) -> None:
    with ledger.begin() as session:
        request = one_shard(session, clips=2)
        lease, (first, second) = claim(session)
        start_clip(session, lease, first.clip_id, **ENGINE)
        assert render(session, lease, second.clip_id)
        complete_shard(session, lease)
        assert statuses(session, request) == ["queued", "done"]
        pass_time(session, 61)
        assert [clip.clip_id for clip in unplanned(session, request, 5)] == [first.clip_id]


def test_every_write_may_be_said_twice(ledger: Ledger) -> None:
    with ledger.begin() as session:
        request = one_shard(session, clips=2)
        lease, (first, second) = claim(session)
        assert [start_clip(session, lease, first.clip_id, **ENGINE) for _ in range(2)] == [1, 1]
        assert [render(session, lease, first.clip_id) for _ in range(2)] == [True, True]
        start_clip(session, lease, second.clip_id, **ENGINE)
        assert [fail_clip(session, lease, second.clip_id, "no") for _ in range(2)] == [ClipStatus.QUEUED] * 2
        assert record_clip(session, lease, second.clip_id, artifact=artifact_of(2), seconds={}) is False
        assert session.scalar(text("select count(*) from attempts")) == 2
        with pytest.raises(ValueError, match=r"stage 'sleep'.*known are text, denoise, decode, encode, put"):
            record_clip(session, lease, second.clip_id, artifact=artifact_of(2), seconds={"sleep": 1.0})
        assert statuses(session, request) == ["done", "queued"]


def test_an_engine_gets_work_for_its_model_only(ledger: Ledger) -> None:
    with ledger.begin() as session:
        one_shard(session)
        assert claim_shard(session, "a", seconds=60, model_digest=digest("another")) is None


def test_priority_first_then_tenants_and_requests_in_turn(ledger: Ledger) -> None:
    with ledger.begin() as session:
        batch(session, "huge", 6, tenant="one")
        batch(session, "mine", 2, tenant="one")
        batch(session, "theirs", 3, tenant="two")
        batch(session, "urgent", 1, tenant="one", priority=9)
        turns: list[str] = []
        while leased := claim_shard(session, f"engine-{len(turns)}", seconds=600, model_digest=MODEL):
            name = text("select name from requests where id = :id")
            turns.append(session.execute(name, {"id": leased[0].request_id}).scalar_one())
    # The urgent one is a lease of tenant one; then whoever has least, tenants before requests, the older one on a tie.
    assert turns[:7] == ["urgent", "theirs", "huge", "theirs", "mine", "theirs", "huge"]
    assert Counter(turns) == {"huge": 6, "mine": 2, "theirs": 3, "urgent": 1}


def test_many_engines_at_once_get_every_shard_once(ledger: Ledger) -> None:
    engines, shards = 8, 48
    with ledger.begin() as session:
        for number in range(3):
            batch(session, f"batch-{number}", shards // 3)
    gate = threading.Barrier(engines)

    def claim_all(number: int) -> list[int]:
        mine: list[int] = []
        gate.wait()
        while True:
            with ledger.begin() as session:
                leased = claim_shard(session, f"engine-{number}", seconds=600, model_digest=MODEL)
            if leased is None:
                return mine
            mine.append(leased[0].shard_id)

    with ThreadPoolExecutor(engines) as pool:
        claimed = [shard for mine in pool.map(claim_all, range(engines)) for shard in mine]
    assert len(claimed) == len(set(claimed)) == shards


def test_engines_planners_and_people_at_once_neither_block_nor_break_each_other(ledger: Ledger) -> None:
    """Real threads, real locks: batches that share recipes, engines that stall and fail, people who cancel."""
    batches = [f"batch-{number}" for number in range(3)]
    with ledger.begin() as session:
        requests = [
            opened(session, [new_clip(index, recipe=(index + shift) % 30) for index in range(30)], key=key)
            for shift, key in enumerate(batches)
        ]
    rendered: list[str] = []
    too_late: set[str] = set()
    over = threading.Event()
    deadline = time.monotonic() + 600

    def engine(number: int) -> None:
        dice = random.Random(number)
        while not over.is_set():
            with ledger.begin() as session:
                leased = claim_shard(session, f"engine-{number}", seconds=600, model_digest=MODEL)
            if leased is None:
                time.sleep(0.02)
                continue
            lease, clips = leased
            try:
                for clip in clips:
                    with ledger.begin() as session:
                        if start_clip(session, lease, clip.clip_id, **ENGINE) == 0:
                            continue
                    fate = dice.random()
                    with ledger.begin() as session:
                        if fate < 0.1:
                            fail_clip(session, lease, clip.clip_id, "no")
                        elif fate < 0.2:
                            run_out(session, lease.shard_id)  # and goes on, as if nothing had happened
                    with ledger.begin() as session:
                        artifact = artifact_of((number, lease.shard_id, lease.attempt, clip.clip_id))
                        if record_clip(session, lease, clip.clip_id, artifact=artifact, seconds={"denoise": 0.0}):
                            rendered.append(clip.recipe)
                with ledger.begin() as session:
                    (release_shard if dice.random() < 0.1 else complete_shard)(session, lease)
            except LeaseLost:
                continue

    def planner(request: str) -> None:
        while not over.is_set():
            with ledger.begin() as session:
                reuse_renders(session, request)
                clips = [clip.clip_id for clip in unplanned(session, request, 12)]
                for start in range(0, len(clips), 4):
                    create_shard(session, request, clips[start : start + 4])
            time.sleep(0.01)

    def people() -> None:
        for turn in range(4):
            time.sleep(0.15)
            request = requests[turn % 3]
            with ledger.begin() as session:
                cancel_request(session, request)
            with ledger.begin() as session:
                expire_leases(session)
            with ledger.begin() as session:
                if retry_request(session, request) == 0:  # all of it was done before
                    too_late.add(request)
        while not over.is_set():
            with ledger.begin() as session:
                expire_leases(session)
                for request in requests:
                    retry_request(session, request)  # quarantined: once more
                if all(progress(session, request).finished for request in requests):
                    over.set()
            if time.monotonic() > deadline:
                over.set()
            time.sleep(0.05)

    with ThreadPoolExecutor(8) as pool:
        work = [pool.submit(engine, number) for number in range(4)]
        work += [pool.submit(planner, request) for request in requests]
        work += [pool.submit(people)]
        try:
            for part in work:
                part.result(timeout=100)
        finally:
            over.set()
    with ledger.begin() as session:
        for request in requests:
            assert statuses(session, request) == ["done"] * 30
            ended = RequestStatus.CANCELLED if request in too_late else RequestStatus.COMPLETED
            assert finish_request(session, request) == ended
        assert sorted(rendered) == sorted(set(rendered)), "a recipe was rendered twice"
        assert len(rendered) == 30
        assert session.scalar(text("select count(*) from clips where not reused")) == 30
