"""Who goes first, who gives way, who is refused: tenants' shares, priorities that age, deadlines, quotas, retries."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

from db.audit import contradictions
from db.claim import claim_shard, outranked
from db.clips import add_clips
from db.engines import register_engine
from db.fence import Lease, LeaseLost
from db.leases import (
    ResumeState,
    complete_shard,
    expire_leases,
    fail_clip,
    record_clip,
    release_shard,
    save_resume_state,
    start_clip,
)
from db.planning import free_recipes, reuse_renders, unplanned
from db.requests import QuotaExceeded, cancel_request, open_request, seal_request
from db.tenants import set_tenant, tenants
from tests.documents import QUESTIONS
from tests.factories import (
    ENGINE,
    MODEL,
    artifact_of,
    batch,
    claim,
    clear,
    new_clip,
    new_request,
    opened,
    pass_time,
    planned,
    render,
    run_out,
    statuses,
)

Ledger = sessionmaker[Session]
LAW = settings(max_examples=4, suppress_health_check=list(HealthCheck))


def begun_earlier(session: Session, lease: Lease, seconds: float) -> None:
    """The lease has lasted for so long."""
    session.execute(
        text("update shards set claimed_at = claimed_at - make_interval(secs => :by) where id = :id"),
        {"by": seconds, "id": lease.shard_id},
    )


@given(weights=st.lists(st.integers(1, 5), min_size=2, max_size=4), engines=st.integers(1, 3), dice=st.randoms())
@LAW
def test_tenants_share_gpu_seconds_by_weight(
    ledger: Ledger, weights: list[int], engines: int, dice: random.Random
) -> None:
    """However long the shards take, and however many GPUs an engine has."""
    turns = 60
    with ledger.begin() as session:
        clear(session)
        for number, weight in enumerate(weights):
            set_tenant(session, f"tenant-{number}", weight=weight)
            batch(session, f"of-{number}", turns, tenant=f"tenant-{number}")
    held: list[tuple[Lease, float]] = []
    for turn in range(turns):
        with ledger.begin() as session:
            if len(held) == engines:
                lease, seconds = held.pop(dice.randrange(engines))
                begun_earlier(session, lease, seconds)
                complete_shard(session, lease)
            held.append((claim(session, f"engine-{turn}", ranks=dice.choice([1, 2]))[0], dice.uniform(1, 8)))
    with ledger.begin() as session:
        used = {row.name: row.gpu_seconds for row in tenants(session)}
    for number, weight in enumerate(weights):
        share = used[f"tenant-{number}"] / sum(used.values())
        assert share == pytest.approx(weight / sum(weights), abs=0.05), (weights, used)


@given(priority=st.integers(4, 8), dice=st.randoms())
@LAW
def test_nothing_waits_for_ever_behind_what_is_more_urgent(ledger: Ledger, priority: int, dice: random.Random) -> None:
    ageing, took = 20.0, 7.0
    with ledger.begin() as session:
        clear(session)
        patient = batch(session, "patient", 2, priority=priority)
    arrived, waited, served = 0, 0.0, 0
    waiting = before = 0  # urgent ones: now, and when the patient one was served last
    while served < 2:
        with ledger.begin() as session:
            coming = dice.choice([1, 1, 2])  # more than one engine can ever do
            for number in range(arrived, arrived + coming):
                batch(session, f"urgent-{number}", 1, priority=9)
            lease, _ = claim(session, ageing=ageing)
            complete_shard(session, lease)
            pass_time(session, took)
        arrived, waited, waiting = arrived + coming, waited + took, waiting + coming
        if lease.request_id == patient:
            waited, before, served = 0.0, waiting, served + 1
            continue
        waiting -= 1
        # After so long it is level with the newest of them. Those that came before that went first, two a turn at most.
        assert waited <= before * took + 2 * (10 - priority) * ageing + 4 * took, (priority, arrived)


def test_within_a_tenant_priority_goes_before_deadline_and_that_before_age(ledger: Ledger) -> None:
    with ledger.begin() as session:
        now = session.execute(text("select now()")).scalar_one()
        first = batch(session, "first", 1)
        later = batch(session, "later", 1, deadline=now.replace(year=now.year + 2))
        sooner = batch(session, "sooner", 1, deadline=now.replace(year=now.year + 1))
        urgent = batch(session, "urgent", 1, priority=6)
        turns = [claim(session, f"engine-{turn}")[0].request_id for turn in range(4)]
    assert turns == [urgent, sooner, later, first]


def test_as_many_leases_give_way_as_shards_of_a_higher_priority_wait(ledger: Ledger) -> None:
    with ledger.begin() as session:
        batch(session, "low", 3, priority=2)
        leases = [claim(session, f"engine-{number}")[0] for number in range(3)]
        batch(session, "theirs", 2, tenant="another", priority=9)
        assert not any(outranked(session, lease) for lease in leases), "another tenant takes no GPU away"
        high = batch(session, "high", 2, priority=3)
        assert [outranked(session, lease) for lease in leases] == [False, True, True]  # the youngest
        session.execute(text("update shards set partition = 'tp2' where request_id = :id"), {"id": high})
        mine = [[outranked(session, lease, partition=name) for lease in leases] for name in ("tp1", "tp2")]
        assert mine == [[False] * 3, [False, True, True]], "nobody makes room for what he may not claim"
        session.execute(text("update shards set partition = null where request_id = :id"), {"id": high})
        release_shard(session, leases[2])
        turn = claim(session, "engine-2", window=1e-3)
        while turn[0].request_id != high:  # the other tenant had nothing yet
            turn = claim(session, "engine-2")
        assert [outranked(session, lease) for lease in (*leases[:2], turn[0])] == [False, True, False]
        cancel_request(session, high)
        assert not any(outranked(session, lease) for lease in leases[:2])


def test_a_checkpoint_goes_from_engine_to_engine_and_ends_with_the_clip(ledger: Ledger) -> None:
    def at(step: int) -> ResumeState:
        return ResumeState(key=f"checkpoints/{step}", step=step, fingerprint="alike")

    with ledger.begin() as session:
        request = batch(session, "batch", 1)
        lease, (clip,) = claim(session)
        assert clip.resume_state is None
        assert save_resume_state(session, lease, clip.clip_id, at(1)) == "checkpoints/1"  # it has not been started
        start_clip(session, lease, clip.clip_id, **ENGINE)
        assert save_resume_state(session, lease, clip.clip_id, at(2)) is None
        assert save_resume_state(session, lease, clip.clip_id, at(4)) == "checkpoints/2"
        release_shard(session, lease)
        with pytest.raises(LeaseLost):
            save_resume_state(session, lease, clip.clip_id, at(6))
        lease, (clip,) = claim(session, "b")
        assert clip.resume_state == at(4)
        start_clip(session, lease, clip.clip_id, resumed_step=4, host="b", **ENGINE)
        run_out(session, lease.shard_id)
        assert expire_leases(session) == 1
        pass_time(session, 61)
        planned(session, request)
        lease, (clip,) = claim(session, "c")
        assert clip.resume_state == at(4)  # the engine was lost, its work was not
        start_clip(session, lease, clip.clip_id, **ENGINE)
        fail_clip(session, lease, clip.clip_id, "again", error_class="rank_died")
        complete_shard(session, lease)
        pass_time(session, 61)
        planned(session, request)
        lease, (clip,) = claim(session, "d")
        assert clip.resume_state is None  # something went wrong twice: the fault may lie in it
        start_clip(session, lease, clip.clip_id, **ENGINE)
        save_resume_state(session, lease, clip.clip_id, at(8))
        record_clip(session, lease, clip.clip_id, artifact=artifact_of("x"), seconds={"denoise": 1.0})
        complete_shard(session, lease)
        assert session.scalar(text("select count(*) from clips where resume_key is not null")) == 0
        told = session.execute(text("select host, resumed_step, error_class from attempts order by number")).all()
        assert [tuple(row) for row in told] == [
            *[(None, None, None), ("b", 4, "engine_lost")],
            *[(None, None, "rank_died"), (None, None, None)],
        ]


def test_a_clip_that_failed_is_left_to_another_engine_where_there_is_one(ledger: Ledger) -> None:
    def engine(session: Session, owner: str) -> None:
        of = {"host": "h", "pid": 1, "device": "cpu", "partition": "p", "model_digest": MODEL, "code_version": "1"}
        register_engine(session, owner, **of)

    with ledger.begin() as session:
        engine(session, "a")
        request = batch(session, "batch", 1)
        for number, others in enumerate(([], ["b"])):
            for other in others:
                engine(session, other)
            lease, (clip,) = claim(session, "a")
            start_clip(session, lease, clip.clip_id, **ENGINE)
            fail_clip(session, lease, clip.clip_id, "no")
            complete_shard(session, lease)
            pass_time(session, 61)
            (waiting,) = unplanned(session, request, 5)
            assert waiting.failures == number + 1
            planned(session, request)
        assert claim_shard(session, "a", seconds=60, model_digest=MODEL) is None
        assert claim(session, "b")[1][0].clip_id == waiting.clip_id


def test_quotas_refuse_at_submission_also_when_two_submit_at_once(ledger: Ledger) -> None:
    with ledger.begin() as session:
        set_tenant(session, "studio", max_clips=5, max_gpu_seconds=100.0)
        batch(session, "there", 2)

    def submit(number: int) -> bool:
        try:
            with ledger.begin() as session:
                open_request(session, new_request(f"more-{number}", clips=2))
        except QuotaExceeded as error:
            assert "may have 5 clips waiting, has 4 and asks for 2 more" in str(error)
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(submit, range(4))) == [False, False, False, True]
    with ledger.begin() as session:
        lease, _ = claim(session)
        begun_earlier(session, lease, 90.0)
        complete_shard(session, lease)
    with ledger.begin() as session, pytest.raises(QuotaExceeded, match=r"100 GPU-seconds .* used 90 .* about 20 more"):
        open_request(session, new_request("long", clips=0, gpu_seconds=20.0))
    with ledger.begin() as session:
        open_request(session, new_request("other", tenant="other", clips=1000, gpu_seconds=1e6))
        set_tenant(session, "studio", max_clips=None, max_gpu_seconds=None)
        open_request(session, new_request("long", clips=1000, gpu_seconds=20.0))


def test_what_is_to_be_fresh_is_rendered_again_and_once(ledger: Ledger) -> None:
    def ask(session: Session, key: str, fresh: bool) -> str:
        twice = [new_clip(0, recipe="same", fresh=fresh), new_clip(1, recipe="same", fresh=fresh)]
        request = opened(session, twice, key=key)
        reuse_renders(session, request)
        return request

    def work_off(session: Session, content: str) -> list[str]:
        lease, clips = claim(session)
        for clip in clips:
            render(session, lease, clip.clip_id, content)
        complete_shard(session, lease)
        return [clip.clip_id for clip in clips]

    with ledger.begin() as session:
        old = ask(session, "old", fresh=False)
        planned(session, old)
        assert work_off(session, "old") == [f"{old}-000000-0"]
        reuse_renders(session, old)
    with ledger.begin() as session:
        again = ask(session, "again", fresh=True)
        assert statuses(session, again) == ["queued", "queued"]
        planned(session, again)
    with ledger.begin() as session:
        assert work_off(session, "new") == [f"{again}-000000-0"]
        reuse_renders(session, again)
        assert statuses(session, again) == ["done", "done"]
    with ledger.begin() as session:
        third = ask(session, "third", fresh=False)
        assert statuses(session, third) == ["done", "done"]
        made = {row.clip_id: row.sha256 for row in session.execute(text("select clip_id, sha256 from history"))}
        assert {made[f"{old}-00000{n}-0"] for n in (0, 1)} == {artifact_of("old").sha256}
        assert {made[f"{each}-00000{n}-0"] for each in (again, third) for n in (0, 1)} == {artifact_of("new").sha256}
        assert session.scalar(text("select count(*) from history where not reused")) == 2
        assert list(contradictions(session)) == []
        twice = QUESTIONS["Was anything rendered twice? (no rows: nothing was)"]
        assert session.execute(text(twice)).all() == [], "nothing was that nobody asked for"


def test_twenty_who_submit_the_same_at_once_make_one_request(ledger: Ledger) -> None:
    def submit(number: int) -> tuple[str, bool]:
        with ledger.begin() as session:
            request = open_request(session, new_request("ours", flow_run_id=f"flow-{number}"))
        with ledger.begin() as session:
            add_clips(session, request.id, [new_clip(index) for index in range(30)])
        with ledger.begin() as session:
            seal_request(session, request.id, 30)
        return request.id, request.created

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(submit, range(20)))
    assert len({request for request, _ in answers}) == 1
    assert sum(created for _, created in answers) == 1
    with ledger.begin() as session:
        assert session.scalar(text("select count(*) from clips")) == 30


def shared(session: Session, key: str, count: int, first: int = 0, **changes: object) -> str:
    """A request of so many clips, a shard each where nobody else renders them; its recipes are numbers."""
    clips = [new_clip(index, recipe=first + index) for index in range(count)]
    request = opened(session, clips, key=key, name=key, **changes)
    planned(session, request, size=1)
    return request


def turn(session: Session, request: str) -> int:
    """A planner's round."""
    reuse_renders(session, request)
    freed = free_recipes(session, request)
    planned(session, request, size=1)
    return freed


@given(
    low=st.integers(0, 2), high=st.integers(0, 2), same=st.booleans(), mine=st.integers(1, 3), theirs=st.integers(1, 4)
)
@settings(max_examples=12, suppress_health_check=list(HealthCheck), deadline=None)
def test_nobody_waits_for_a_render_that_others_would_make_later(
    ledger: Ledger, low: int, high: int, same: bool, mine: int, theirs: int
) -> None:
    """The first clips of a long request are asked for by a second one: what goes first takes them, and no more.

    Then nothing is taken back, however often both look; each recipe is rendered once, and both end.
    """
    with ledger.begin() as session:
        clear(session)
        first = shared(session, "first", theirs, priority=low, tenant="studio")
        second = shared(session, "second", mine, priority=high, tenant="studio" if same else "lab")
        common = min(mine, theirs)
        alone = mine > theirs  # the second has work of its own
        takes = high > low or (high == low and not same and not alone and theirs > 1)
        freed = turn(session, second)
        assert freed == (common if takes else 0)
        assert all(turn(session, request) == 0 for request in (first, second) * 3)
        made: list[str] = []
        while (leased := claim_shard(session, "a", seconds=600, model_digest=MODEL)) is not None:
            lease, clips = leased
            made += [str(clip.clip_id) for clip in clips]
            for clip in clips:
                render(session, lease, clip.clip_id)
            complete_shard(session, lease)
            for request in (first, second):
                turn(session, request)
        assert len(made) == max(mine, theirs)
        if high > low and same:
            assert made[0].startswith(second)
        for request in (first, second):
            assert set(statuses(session, request)) == {"done"}
        assert list(contradictions(session)) == []


def test_what_an_engine_has_leased_is_waited_for(ledger: Ledger) -> None:
    with ledger.begin() as session:
        shared(session, "first", 1, priority=0)
        claim(session)
        second = shared(session, "second", 1, priority=9, tenant="lab")
        assert turn(session, second) == 0
