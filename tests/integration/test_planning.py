"""Planning a wave costs what its clips cost, however many are planned already."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine, event, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker

from db.planning import NewShard, create_shards, unplanned
from tests.factories import new_clip, opened


def wave(session: Session, request: str, size: int, limit: int = 10_000) -> list[int]:
    """The next clips, in shards of `size`."""
    ids = [clip.clip_id for clip in unplanned(session, request, limit)]
    parts = [ids[start : start + size] for start in range(0, len(ids), size)]
    return create_shards(session, request, [NewShard(clip_ids=part) for part in parts])


def test_clips_go_where_they_were_put(ledger: sessionmaker[Session]) -> None:
    """A clip that is asked for twice is in the first shard; a shard that nothing is left for is not made."""
    with ledger.begin() as session:
        request = opened(session, [new_clip(k) for k in range(5)])
        a, b, c, d, e = (clip.clip_id for clip in unplanned(session, request, 10))
        asked = [([a, b], "tp=2"), ([b], None), ([c, a, d], None)]
        new = [NewShard(clip_ids=ids, partition=to, predicted_seconds=6.0) for ids, to in asked]
        first, second = create_shards(session, request, new)
        found = session.execute(text("select id, shard_id from clips order by id")).all()
        assert [shard for _, shard in found] == [first, first, second, second, None]
        rows = session.execute(text("select size, partition, predicted_seconds from shards order by id")).all()
        assert [tuple(row) for row in rows] == [(2, "tp=2", 6.0), (2, None, pytest.approx(4.0))]
        assert create_shards(session, request, [NewShard(clip_ids=[a, b])]) == []
        assert len(create_shards(session, request, [NewShard(clip_ids=[a, e])])) == 1


def test_a_wave_is_as_many_statements_as_a_shard(ledger: sessionmaker[Session], database: Engine) -> None:
    said: list[int] = []
    for shards in (1, 30):
        with ledger.begin() as session:
            request = opened(session, [new_clip(k, recipe=(shards, k)) for k in range(60)], key=f"batch {shards}")
            count = [0]

            def tell(*_: object, count: list[int] = count) -> None:
                count[0] += 1

            event.listen(database, "before_cursor_execute", tell)
            assert len(wave(session, request, 60 // shards)) == shards
            event.remove(database, "before_cursor_execute", tell)
            said.append(count[0])
    assert said[0] == said[1]


def test_the_statistics_know_that_clips_are_planned(ledger: sessionmaker[Session]) -> None:
    """Else the server takes it that none is, and compares each clip of the next wave with every planned one."""
    with ledger.begin() as session:
        request = opened(session, [new_clip(k) for k in range(4000)])
        assert len(wave(session, request, 100, limit=2000)) == 20
        query = "select null_frac from pg_stats where tablename = 'clips' and attname = 'shard_id'"
        assert session.scalar(text(query)) == pytest.approx(0.5)


def test_a_planner_waits_for_its_turn_with_a_bound(
    database: Engine, ledger: sessionmaker[Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody who holds the planners' lock, and can be no planner, does not stop them for ever."""
    monkeypatch.setattr("db.fence.TURN_SECONDS", 0.2)
    with ledger.begin() as session:
        request = opened(session, [new_clip(0)])
        todo = [NewShard(clip_ids=[clip.clip_id for clip in unplanned(session, request, 1)])]
    with database.connect() as other, other.begin():
        other.execute(text("select pg_advisory_xact_lock(0x506c616e)"))
        with pytest.raises(OperationalError, match="lock timeout"), ledger.begin() as session:
            create_shards(session, request, todo)
    with ledger.begin() as session:
        assert len(create_shards(session, request, todo)) == 1
        assert session.scalar(text("select current_setting('lock_timeout')")) == "0", "of the turn alone"
