"""The state diagram of ARCHITECTURE.md is what the ledger does: all of it, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

from db.claim import claim_shard
from db.fence import Lease
from db.leases import complete_shard, expire_leases, expire_owner, fail_clip, release_shard, start_clip
from db.lost import forget, queue_lost
from db.planning import reuse_renders
from db.requests import cancel_request, finish_request, pause_request, resume_request, retry_request
from db.tables import MAX_FAILURES, MAX_LOST_ATTEMPTS, AttemptStatus, ClipStatus, RequestStatus, ShardStatus
from tests.documents import transitions
from tests.factories import ENGINE, MODEL, claim, new_clip, opened, pass_time, planned, render, run_out

# Every change of a status, as the database sees it; of a shard also a new claim while it is leased.
WATCH = """
create table moves (kind text, before text, after text);
create function note_move() returns trigger language plpgsql as $$
begin
    insert into moves
    values (tg_argv[0], case when tg_op = 'UPDATE' then old.status::text else '' end, new.status::text);
    return null;
end $$;
create trigger a after insert on clips for each row execute function note_move('clip');
create trigger b after update on clips for each row when (old.status <> new.status) execute function note_move('clip');
create trigger a after insert on attempts for each row execute function note_move('attempt');
create trigger b after update on attempts for each row when (old.status <> new.status)
    execute function note_move('attempt');
create trigger a after insert on requests for each row execute function note_move('request');
create trigger b after update on requests for each row when (old.status <> new.status)
    execute function note_move('request');
create trigger a after insert on shards for each row execute function note_move('shard');
create trigger b after update on shards for each row
    when (old.status <> new.status or old.attempt <> new.attempt) execute function note_move('shard');
"""


def under_way(session: Session, key: str) -> tuple[str, Lease, str]:
    """A request of one clip that is being rendered: its id, the lease, the clip."""
    request = opened(session, [new_clip(0, recipe=key)], key)
    planned(session, request)
    return request, *again(session)


def again(session: Session) -> tuple[Lease, str]:
    lease, (clip,) = claim(session)
    start_clip(session, lease, clip.clip_id, **ENGINE)
    return lease, clip.clip_id


def replanned(session: Session, request: str) -> tuple[Lease, str]:
    """The clip's next attempt, when its time has come."""
    pass_time(session, 91)
    planned(session, request)
    return again(session)


def ends_well(session: Session) -> None:
    request = opened(session, [new_clip(0, recipe="well"), new_clip(1, recipe=None, rejected="bad line")], "well")
    planned(session, request)
    lease, (clip,) = claim(session)
    render(session, lease, clip.clip_id)
    complete_shard(session, lease)
    assert reuse_renders(session, opened(session, [new_clip(0, recipe="well")], "the same")) == 1


def fails(session: Session) -> None:
    request, lease, clip = under_way(session, "fails")
    for number in range(MAX_FAILURES):
        fail_clip(session, lease, clip, "no")
        complete_shard(session, lease)
        if number < MAX_FAILURES - 1:
            lease, clip = replanned(session, request)
    assert retry_request(session, request) == 1
    lease, clip = replanned(session, request)
    fail_clip(session, lease, clip, "never", permanent=True)
    complete_shard(session, lease)
    assert retry_request(session, request) == 1


def loses_its_engines(session: Session) -> None:
    request, lease, _ = under_way(session, "lost")
    run_out(session, lease.shard_id)
    assert expire_leases(session) == 1
    for _ in range(MAX_LOST_ATTEMPTS - 1):
        lease, _ = replanned(session, request)
        assert expire_owner(session, lease.owner) == 1


def is_taken_over(session: Session) -> None:
    request = opened(session, [new_clip(index, recipe=("over", index)) for index in range(2)], "over")
    planned(session, request)
    first, (clip, _) = claim(session)
    start_clip(session, first, clip.clip_id, **ENGINE)
    run_out(session, first.shard_id)
    second, clips = claim(session, "b")
    assert second.shard_id == first.shard_id and len(clips) == 1
    start_clip(session, second, clips[0].clip_id, **ENGINE)
    release_shard(session, second)


def is_cancelled(session: Session) -> None:
    request = opened(session, [new_clip(index, recipe=("cancelled", index)) for index in range(3)], "cancelled")
    planned(session, request, size=1)
    again(session)
    assert cancel_request(session, request) == 3
    assert retry_request(session, request) == 3


def is_paused(session: Session) -> None:
    request, lease, clip = under_way(session, "paused")
    assert pause_request(session, request)
    release_shard(session, lease)
    assert claim_shard(session, "a", seconds=600, model_digest=MODEL) is None
    assert resume_request(session, request)
    lease, clip = again(session)
    fail_clip(session, lease, clip, "never", permanent=True)
    complete_shard(session, lease)
    assert finish_request(session, request) == RequestStatus.FAILED
    assert retry_request(session, request) == 1
    planned(session, request)
    assert pause_request(session, request)
    cancel_request(session, request)
    assert not pause_request(session, request) and not resume_request(session, request)


def ends_while_it_is_paused(session: Session) -> None:
    """What engines had under way when it was paused may have been its last."""
    for failed, ending in (
        (0, RequestStatus.COMPLETED),
        (1, RequestStatus.COMPLETED_WITH_GAPS),
        (2, RequestStatus.FAILED),
    ):
        for paused in (True, False):
            key = f"late {failed} {paused}"
            clips = [new_clip(index, recipe=(key, index)) for index in range(2)]
            request = opened(session, clips, key)
            planned(session, request)
            lease, leased = claim(session)
            if paused:
                pause_request(session, request)
            for index, clip in enumerate(leased):
                if index < failed:
                    start_clip(session, lease, clip.clip_id, **ENGINE)
                    fail_clip(session, lease, clip.clip_id, "never", permanent=True)
                else:
                    render(session, lease, clip.clip_id)
            complete_shard(session, lease)
            assert finish_request(session, request) == ending
            assert retry_request(session, request) == failed


def loses_its_bytes(session: Session) -> None:
    request = opened(session, [new_clip(0, recipe="bytes")], "bytes")
    planned(session, request)
    lease, (clip,) = claim(session)
    render(session, lease, clip.clip_id)
    complete_shard(session, lease)
    assert finish_request(session, request) == RequestStatus.COMPLETED
    had = text("select artifact from clips where id = :id")
    digests = [str(digest) for digest in session.scalars(had, {"id": clip.clip_id})]
    forget(session, digests)
    assert queue_lost(session, digests) == {request: 1}


STORIES: tuple[Callable[[Session], None], ...] = (
    ends_well,
    fails,
    loses_its_engines,
    is_taken_over,
    is_cancelled,
    is_paused,
    ends_while_it_is_paused,
    loses_its_bytes,
)


@pytest.fixture
def moves(ledger: sessionmaker[Session]) -> dict[str, set[tuple[str, str]]]:
    """Every transition of requests, clips, shards and attempts that a ledger went through."""
    with ledger.begin() as session:
        session.execute(text(WATCH))
    for story in STORIES:
        with ledger.begin() as session:
            story(session)
        with ledger.begin() as session:  # so that the next one claims what is its own
            for request in session.scalars(text("select id from requests where status = 'open'")).all():
                cancel_request(session, request)
    with ledger.begin() as session:
        seen: dict[str, set[tuple[str, str]]] = {}
        for kind, before, after in session.execute(text("select distinct kind, before, after from moves")):
            seen.setdefault(kind, set()).add((before, after))
    return seen


def test_the_diagram_shows_every_transition_and_no_other(moves: dict[str, set[tuple[str, str]]]) -> None:
    assert moves == transitions()
    kinds = {"request": RequestStatus, "clip": ClipStatus, "shard": ShardStatus, "attempt": AttemptStatus}
    for kind, states in kinds.items():
        assert {after for _, after in moves[kind]} == {state.value for state in states}
