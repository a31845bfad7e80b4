"""Whatever engines, planners and people do, and in whatever order: every clip ends accounted for, and once.

The machine below plays all of them against a real Postgres. Engines stall, lose their lease to another and write all
the same. Take the attempt out of `leases.HELD` and it fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

from db.audit import contradictions
from db.claim import LeasedClip, claim_shard
from db.fence import Lease, LeaseLost
from db.leases import (
    BACKOFF_MOST,
    complete_shard,
    expire_leases,
    expire_owner,
    fail_clip,
    record_clip,
    release_shard,
    renew,
    start_clip,
)
from db.planning import free_recipes, reuse_renders, unplanned
from db.requests import (
    cancel_request,
    finish_request,
    open_request,
    pause_request,
    progress,
    resume_request,
    retry_request,
)
from db.tables import TERMINAL, ClipStatus, RequestStatus
from tests.factories import (
    ENGINE,
    MODEL,
    artifact_of,
    clear,
    create_shard,
    new_clip,
    new_request,
    opened,
    pass_time,
    run_out,
)

Result = TypeVar("Result")

FORSAKEN = """
select 'a take that no clip was rendered for: ' || t.recipe from renders t left join clips c on c.id = t.clip_id
where c.status <> 'done' or c.reused
"""


@dataclass(frozen=True)
class Claim:
    """What an engine believes to hold, for as long as it likes to."""

    lease: Lease
    clips: tuple[LeasedClip, ...]


class Studio(RuleBasedStateMachine):
    requests: Bundle[str] = Bundle("requests")
    claims: Bundle[Claim] = Bundle("claims")

    def __init__(self, ledger: sessionmaker[Session]) -> None:
        super().__init__()
        self.ledger = ledger
        self.submitted = 0
        self.holders: dict[int, int] = {}  # shard -> the attempt that holds it
        self.overdue: set[int] = set()  # shards held by a lease that has run out
        self.owners: dict[int, str] = {}
        self.cancelled: set[int] = set()  # shards
        self.rendered: dict[str, str] = {}  # recipe -> the clip recorded for it
        with ledger.begin() as session:
            clear(session)

    # People

    @initialize(target=requests, recipes=st.lists(st.integers(0, 5), min_size=2, max_size=4))
    def begin(self, recipes: list[int]) -> str:
        request = self.submit(recipes, 5)
        self.plan(request, 2)
        return request

    @rule(
        target=requests,
        recipes=st.lists(st.integers(0, 5), min_size=1, max_size=4),
        priority=st.sampled_from([5, 9]),
        tenant=st.sampled_from(["studio", "lab"]),
    )
    def submit(self, recipes: list[int], priority: int, tenant: str = "studio") -> str:
        self.submitted += 1
        clips = [new_clip(index, recipe=recipe) for index, recipe in enumerate(recipes)]
        with self.ledger.begin() as session:
            return opened(session, clips, key=f"batch-{self.submitted}", priority=priority, tenant=tenant)

    @rule(request=requests, flow=st.integers(1, 3))
    def submit_again(self, request: str, flow: int) -> None:
        with self.ledger.begin() as session:
            key = session.execute(text("select key from requests where id = :id"), {"id": request}).scalar_one()
            again = open_request(session, new_request(key, flow_run_id=f"flow-{flow}"))
            assert (again.id, again.created) == (request, False)

    @rule(request=requests)
    def cancel(self, request: str) -> None:
        with self.ledger.begin() as session:
            cancel_request(session, request)
            query = text("select id from shards where request_id = :id and status = 'cancelled'")
            self.cancelled.update(session.scalars(query, {"id": request}))
            assert progress(session, request).waiting == 0

    @rule(request=requests)
    def retry(self, request: str) -> None:
        with self.ledger.begin() as session:
            before = progress(session, request).counts
            again = sum(before[ended] for ended in (ClipStatus.FAILED, ClipStatus.QUARANTINED, ClipStatus.CANCELLED))
            assert retry_request(session, request) == again

    @rule(request=requests)
    def pause(self, request: str) -> None:
        with self.ledger.begin() as session:
            pause_request(session, request)

    @rule(request=requests)
    def resume(self, request: str) -> None:
        with self.ledger.begin() as session:
            resume_request(session, request)

    # The planner

    @rule(request=requests, size=st.integers(1, 3))
    def plan(self, request: str, size: int) -> None:
        with self.ledger.begin() as session:
            reuse_renders(session, request)
            free_recipes(session, request)
            while clips := unplanned(session, request, size):
                assert not {clip.recipe for clip in clips} & set(self.rendered)
                planned = create_shard(session, request, [clip.clip_id for clip in clips])
                if planned is None:
                    assert request in self.paused(session)
                    break

    @rule(request=requests)
    def finish(self, request: str) -> None:
        with self.ledger.begin() as session:
            if progress(session, request).finished:
                finish_request(session, request)

    @rule()
    def maintenance(self) -> None:
        with self.ledger.begin() as session:
            assert expire_leases(session) == len(self.overdue - self.cancelled)
        for shard in self.overdue:
            self.holders.pop(shard, None)
        self.overdue.clear()

    # Engines

    @rule(target=claims, owner=st.sampled_from("abc"))
    def claim(self, owner: str) -> object:
        with self.ledger.begin() as session:
            paused = self.paused(session)
            leased = claim_shard(session, owner, seconds=600, model_digest=MODEL)
        if leased is None:
            self.forget_closed()
            return multiple()
        lease, clips = leased
        assert lease.shard_id not in self.holders or lease.shard_id in self.overdue, "a live lease was taken over"
        assert not {clip.recipe for clip in clips} & set(self.rendered), "a clip to render that was rendered"
        assert lease.request_id not in paused, "a paused request was leased from"
        self.holders[lease.shard_id] = lease.attempt
        self.owners[lease.shard_id] = owner
        self.overdue.discard(lease.shard_id)
        self.forget_closed()
        return Claim(lease, tuple(clips))

    def paused(self, session: Session) -> set[str]:
        return set(session.scalars(text("select id from requests where status = 'paused'")))

    def forget_closed(self) -> None:
        """A claim closes the shards it finds empty: nobody holds those any more."""
        with self.ledger.begin() as session:
            closed = set(session.scalars(text("select id from shards where status = 'done'")))
        self.overdue -= closed
        for shard in closed:
            self.holders.pop(shard, None)

    @rule(claim=claims)
    def stall(self, claim: Claim) -> None:
        if self.holds(claim) and claim.lease.shard_id not in self.cancelled:
            self.overdue.add(claim.lease.shard_id)
            with self.ledger.begin() as session:
                run_out(session, claim.lease.shard_id)

    @rule(owner=st.sampled_from("abc"))
    def found_dead(self, owner: str) -> None:
        theirs = {shard for shard in self.holders if self.owners[shard] == owner and shard not in self.cancelled}
        with self.ledger.begin() as session:
            assert expire_owner(session, owner) == len(theirs)
        self.overdue -= theirs
        for shard in theirs:
            del self.holders[shard]

    @rule(claim=claims, pick=st.integers(0, 2))
    def start(self, claim: Claim, pick: int) -> None:
        clip = claim.clips[pick % len(claim.clips)]
        self.write(claim, lambda session: start_clip(session, claim.lease, clip.clip_id, **ENGINE))

    @rule(claim=claims, pick=st.integers(0, 2), first=st.booleans())
    def record(self, claim: Claim, pick: int, first: bool) -> None:
        if first:
            self.start(claim, pick)
        clip = claim.clips[pick % len(claim.clips)]
        artifact = artifact_of((claim.lease.shard_id, claim.lease.attempt, clip.clip_id))
        seconds = {"denoise": 1.0}
        done = self.write(
            claim, lambda session: record_clip(session, claim.lease, clip.clip_id, artifact=artifact, seconds=seconds)
        )
        if done:
            assert self.rendered.setdefault(clip.recipe, clip.clip_id) == clip.clip_id, "one recipe, two renderings"

    @rule(claim=claims, pick=st.integers(0, 2), permanent=st.booleans())
    def fail(self, claim: Claim, pick: int, permanent: bool) -> None:
        self.start(claim, pick)
        clip = claim.clips[pick % len(claim.clips)]
        self.write(claim, lambda session: fail_clip(session, claim.lease, clip.clip_id, "no", permanent=permanent))

    @rule(claim=claims)
    def renew(self, claim: Claim) -> None:
        if self.write(claim, lambda session: renew(session, claim.lease, 600)) is not None and self.holds(claim):
            self.overdue.discard(claim.lease.shard_id)

    @rule(claim=claims)
    def complete(self, claim: Claim) -> None:
        self.write(claim, lambda session: complete_shard(session, claim.lease))
        self.let_go(claim)

    @rule(claim=claims)
    def release(self, claim: Claim) -> None:
        with self.ledger.begin() as session:
            tries = session.scalar(text("select sum(failures + lost_attempts) from clips"))
        self.write(claim, lambda session: release_shard(session, claim.lease))
        self.let_go(claim)
        with self.ledger.begin() as session:
            assert session.scalar(text("select sum(failures + lost_attempts) from clips")) == tries

    def holds(self, claim: Claim) -> bool:
        return self.holders.get(claim.lease.shard_id) == claim.lease.attempt

    def let_go(self, claim: Claim) -> None:
        if self.holds(claim):
            del self.holders[claim.lease.shard_id]
            self.overdue.discard(claim.lease.shard_id)

    def write(self, claim: Claim, action: Callable[[Session], Result]) -> Result | None:
        """Goes through exactly when the engine holds the lease. (Of a cancelled shard it may be told either way.)"""
        with self.ledger.begin() as session:
            if claim.lease.shard_id in self.cancelled:
                try:
                    return action(session)
                except LeaseLost:
                    return None
            if self.holds(claim):
                return action(session)
            with pytest.raises(LeaseLost):
                action(session)
        return None

    # What holds at every moment, and at the end

    @invariant()
    def nothing_is_broken(self) -> None:
        with self.ledger.begin() as session:
            assert list(contradictions(session)) == []
            assert session.scalars(text(FORSAKEN)).all() == []
            takes = {take.recipe: take.clip_id for take in session.execute(text("select recipe, clip_id from renders"))}
        assert takes == self.rendered

    def teardown(self) -> None:
        """Everybody but one engine is gone: it brings what is open to an end, in a bounded number of turns.

        And what is paused after that: nothing that is open waits for it.
        """
        with self.ledger.begin() as session:
            for shard in list(self.holders):
                run_out(session, shard)
            paused = self.paused(session)
            expire_leases(session)  # as maintenance does
        self.finish_what_is_open()
        for request in paused:
            self.resume(request)
        self.finish_what_is_open()
        self.nothing_is_broken()

    def finish_what_is_open(self) -> None:
        with self.ledger.begin() as session:
            requests = list(session.scalars(text("select id from requests where status = 'open'")))
        for _ in range(20 * len(requests) + 20):
            with self.ledger.begin() as session:
                pass_time(session, BACKOFF_MOST * 1.5)  # what failed or was lost has waited long enough
            for request in requests:
                self.plan(request, 3)
            with self.ledger.begin() as session:
                leased = claim_shard(session, "last", seconds=600, model_digest=MODEL)
            if leased is None:
                break
            lease, clips = leased
            for clip in clips:
                self.overdue.discard(lease.shard_id)
                self.holders[lease.shard_id] = lease.attempt
                self.record(Claim(lease, tuple(clips)), clips.index(clip), True)
            with self.ledger.begin() as session:
                complete_shard(session, lease)
        with self.ledger.begin() as session:
            for request in requests:
                end = progress(session, request)
                assert end.finished and sum(end.counts[status] for status in TERMINAL) == end.total
                assert finish_request(session, request) != RequestStatus.OPEN


def test_every_clip_ends_accounted_for_and_no_recipe_is_rendered_twice(ledger: sessionmaker[Session]) -> None:
    run_state_machine_as_test(
        lambda: Studio(ledger),
        settings=settings(
            max_examples=15,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
            report_multiple_bugs=False,
            # Shrinking against a real database takes minutes. To look into a failure, reproduce it with Phase.shrink.
            phases=[Phase.explicit, Phase.reuse, Phase.generate],
        ),
    )
