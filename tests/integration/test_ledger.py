"""Requests and clips on a real Postgres: opening, adding, planning, watching, ending."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event, text
from sqlalchemy.exc import DataError, IntegrityError
from sqlalchemy.orm import Session, sessionmaker

from db.artifacts import add_artifacts, artifacts, known_keys
from db.claim import claim_shard, others_wait
from db.clips import NewClip, add_clips, clip_by
from db.engines import close_engine, closed_engines, engine_heartbeat, live_engines, register_engine, silent_engines
from db.history import clips_of, show_clip, standings
from db.leases import complete_shard, fail_clip, record_clip, renew, start_clip
from db.models import record_scores, register_model
from db.planning import reuse_renders, shard_table, unbind_shards, unplanned
from db.requests import (
    RequestNotFound,
    RequestNotReady,
    cancel_request,
    finish_request,
    open_request,
    progress,
    request_by,
    retry_request,
    seal_request,
)
from db.session import connect
from db.tables import ClipDirection, ClipMode, ClipStatus, EdgeKind, RequestStatus, ShardStatus
from db.watching import measured_costs, open_shards
from tests.factories import (
    ENGINE,
    MODEL,
    artifact_of,
    create_shard,
    digest,
    new_clip,
    new_request,
    opened,
    pass_time,
    planned,
    render,
    statuses,
)

Ledger = sessionmaker[Session]
ROOT = Path(__file__).parents[2]


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """All calls in threads of their own, begun together; their results or exceptions."""
    gate = threading.Barrier(len(calls))

    def one(call: Callable[[], Any]) -> Any:
        gate.wait()
        try:
            return call()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(one, calls))


# Opening and adding


def test_two_opens_with_one_key_at_once_make_one_request(ledger: Ledger) -> None:
    def open_it() -> Any:
        with ledger.begin() as session:
            return open_request(session, new_request())

    first, second = at_once(open_it, open_it)
    assert first.id == second.id
    assert sorted([first.created, second.created]) == [False, True]
    assert first.status == second.status == RequestStatus.OPEN


def test_an_open_request_goes_over_to_the_flow_run_that_asks(ledger: Ledger) -> None:
    with ledger.begin() as session:
        request = opened(session, [new_clip(0)])
        again = open_request(session, new_request(flow_run_id="flow-2", carrier={"traceparent": "new"}))
        row = request_by(session, request)
    assert (again.created, again.status) == (False, RequestStatus.OPEN)
    assert row is not None
    assert (row.flow_run_id, row.carrier) == ("flow-2", {"traceparent": "new"})


def test_a_cancelled_request_opens_again_for_another_flow_run_only(ledger: Ledger) -> None:
    with ledger.begin() as session:
        request = opened(session, [new_clip(0), new_clip(1)])
        planned(session, request)
        assert cancel_request(session, request) == 2
        assert open_request(session, new_request()).status == RequestStatus.CANCELLED
        assert statuses(session, request) == ["cancelled", "cancelled"]
        again = open_request(session, new_request(flow_run_id="flow-2"))
        assert (again.created, again.status) == (False, RequestStatus.OPEN)
        assert len(unplanned(session, request, 10)) == 2
        row = request_by(session, request)
        assert row is not None and row.finished_at is None


@pytest.mark.parametrize(
    "values",
    [
        {"mode": ClipMode.EXTEND, "direction": ClipDirection.FORWARD},
        {"mode": ClipMode.TEXT_TO_VIDEO, "source": "a"},
        {"mode": ClipMode.CONNECT, "source": "a"},
        {"mode": ClipMode.EXTEND, "source": "a"},
        {"mode": ClipMode.EDIT, "source": "a"},
        {"mode": ClipMode.EDIT, "source": "a", "strength": 1.5},
        {"mode": ClipMode.LOOP, "strength": 0.5},
        {"mode": ClipMode.LOOP, "window": 5, "overlap": 5},
        {"mode": ClipMode.LOOP, "source": "never stored"},
    ],
)
def test_a_clip_without_what_its_mode_is_made_from_is_refused(ledger: Ledger, values: dict[str, Any]) -> None:
    values = {**values, **({"source": artifact_of(values["source"]).sha256} if "source" in values else {})}
    with ledger.begin() as session:
        add_artifacts(session, [artifact_of("a")])
        with pytest.raises(IntegrityError, match=r"ck_clips_mode|ck_clips_windows|fk_clips_source"):
            opened(session, [new_clip(0, **values)])
        session.rollback()


def test_a_clip_made_from_others_names_them_and_is_found_as_a_source_when_done(ledger: Ledger) -> None:
    with ledger.begin() as session:
        first = opened(session, [new_clip(0), new_clip(1)], key="first")
        parent, unfinished = f"{first}-000000-0", f"{first}-000001-0"
        planned(session, first)
        lease, _ = claim_shard(session, "a", seconds=60, model_digest=MODEL) or pytest.fail("no work")
        render(session, lease, parent, "parent")
        found, waiting = clip_by(session, parent), clip_by(session, unfinished)
        assert found is not None and found.artifact == artifact_of("parent")
        assert (found.status, found.settings) == ("done", new_clip(0).settings)
        assert waiting is not None and waiting.artifact is None
        assert clip_by(session, "nobody") is None
        child = new_clip(
            0, mode=ClipMode.EXTEND, source=found.artifact.sha256, direction=ClipDirection.FORWARD,
            parents=((parent, EdgeKind.EXTEND),),
        )  # fmt: skip
        second = opened(session, [child], key="second")
        add_clips(session, second, [child])
        story = show_clip(session, f"{second}-000000-0")
    assert story is not None and story.parents == ((parent, EdgeKind.EXTEND),)
    assert story.clip.parents == [parent] and story.clip.direction is ClipDirection.FORWARD


def test_clips_added_twice_are_there_once(ledger: Ledger) -> None:
    clips = [new_clip(index, sample=sample) for index in range(3) for sample in range(2)]
    with ledger.begin() as session:
        request = open_request(session, new_request()).id
        assert add_clips(session, request, clips[:4]) == 4  # and here the first submitter dies
        assert add_clips(session, request, clips) == 2
        assert unplanned(session, request, 10) == []  # not before all are in
        seal_request(session, request, 6)
        seal_request(session, request, 6)
        assert [clip.clip_id for clip in unplanned(session, request, 10)] == [
            f"{request}-{index:06d}-{sample}" for index in range(3) for sample in range(2)
        ]
        with pytest.raises(ValueError, match="has 6 clips, not 7"):
            seal_request(session, request, 7)


def test_what_is_added_comes_back_as_it_was(ledger: Ledger) -> None:
    clip = new_clip(
        3, sample=1, custom_id="shot 7", prompt="ein roter Ball 🔴 \\ \"quoted\" '; drop table clips",
        rewritten_prompt="a glossy red ball", negative_prompt="blurry", guidance=0.1 + 0.2, shift=1e-7, seed=2**63 - 1,
        mode=ClipMode.CONNECT, source=artifact_of("a").sha256, end_source=artifact_of("b").sha256,
        window=17, overlap=5, made_frames=34, step_cache=0.1, guidance_2=2.5,
        tags=("dailies", "Ünï"), metadata={"shot": 7, "of": {"scene": [1, None]}},
    )  # fmt: skip
    with ledger.begin() as session:
        add_artifacts(session, [artifact_of("a"), artifact_of("b"), artifact_of("a", key="elsewhere")])
        request = opened(session, [clip])
        (row,) = clips_of(session, request)
        planned(session, request)
        _, (leased,) = claim_shard(session, "a", seconds=60, model_digest=MODEL) or pytest.fail("no work")
    same = set(NewClip.__slots__) - {"rejected", "parents", "source", "end_source", "tags"}
    assert {name: getattr(row, name) for name in same} == {name: getattr(clip, name) for name in same}
    assert row.settings == leased.settings == clip.settings
    assert tuple(row.tags or ()) == clip.tags
    assert (row.source_sha256, row.end_source_sha256) == (clip.source, clip.end_source)
    assert (leased.source, leased.end_source) == (artifact_of("a"), artifact_of("b"))
    assert (leased.mode, leased.settings.window, leased.settings.step_cache) == (ClipMode.CONNECT, 17, 0.1)
    assert row.status == ClipStatus.QUEUED


def test_what_a_step_cache_skipped_is_kept(ledger: Ledger) -> None:
    clips = [new_clip(index, step_cache=cache) for index, cache in enumerate((0.2, 1.0, None))]
    with ledger.begin() as session:
        request = opened(session, clips)
        planned(session, request)
        lease, todo = claim_shard(session, "a", seconds=60, model_digest=MODEL) or pytest.fail("no work")
        for spent, (clip, skipped) in enumerate(zip(todo, (0, 2, None), strict=True), 1):
            start_clip(session, lease, clip.clip_id, **ENGINE)
            took = {"seconds": {"denoise": float(spent)}, "skipped_steps": skipped}
            assert record_clip(session, lease, clip.clip_id, artifact=artifact_of(clip.clip_id), **took)
        rows = sorted(clips_of(session, request), key=lambda row: row.index)
    assert [(row.settings and row.settings.step_cache, row.skipped_steps) for row in rows] == [
        (0.2, 0),
        (1.0, 2),
        (None, None),
    ]


def test_a_rejected_line_is_kept_and_never_planned(ledger: Ledger) -> None:
    bad = NewClip(index=1, sample=0, prompt="", line=2, custom_id="twice", rejected="prompts.jsonl:2: prompt is blank")
    with ledger.begin() as session:
        request = opened(session, [new_clip(0, custom_id="twice"), bad])
        assert [clip.index for clip in unplanned(session, request, 10)] == [0]
        (row,) = clips_of(session, request, statuses=[ClipStatus.REJECTED])
        assert (row.error, row.line, row.settings) == ("prompts.jsonl:2: prompt is blank", 2, None)


def test_twenty_thousand_clips_stream_through(database: Engine, ledger: Ledger) -> None:
    statements = 0

    @event.listens_for(database, "before_cursor_execute")
    def count(*_: Any) -> None:
        nonlocal statements
        statements += 1

    with ledger.begin() as session:
        request = open_request(session, new_request()).id
        before = statements
        assert add_clips(session, request, map(new_clip, range(20_000))) == 20_000
        assert statements - before == 4  # a table made, read for clips and for what they are made from, emptied
        seal_request(session, request, 20_000)
        assert progress(session, request).counts[ClipStatus.QUEUED] == 20_000
        assert sum(1 for _ in clips_of(session, request)) == 20_000
        # The planner's tick on a request that is nearly done reads what is left, not what is done.
        session.execute(text("insert into artifacts select recipe, recipe, 1, 'video/mp4' from clips"))
        session.execute(text("insert into renders select recipe, recipe, id from clips where index < 19_900"))
        done = "update clips set status = 'done', artifact = recipe, finished_at = now() where index < 19_900"
        session.execute(text(done))
    with database.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("vacuum analyze clips, renders"))
    with ledger.begin() as session:
        rows = rows_read(database, session, lambda: unplanned(session, request, 10))
        assert rows < 2_000, f"{rows} rows read to find 10"
        assert [clip.index for clip in unplanned(session, request, 10)] == list(range(19_900, 19_910))
        before = statements
        (shard,) = planned(session, request, size=100)
        leased = claim_shard(session, "a", seconds=60, model_digest=MODEL)
        assert leased is not None and len(leased[1]) == 100 and leased[0].shard_id == shard
        complete_shard(session, leased[0])
        assert cancel_request(session, request) == 100
        assert statements - before < 40  # for a hundred clips as for one


def test_sealing_and_ending_count_no_clips(database: Engine, ledger: Ledger) -> None:
    said: list[str] = []

    @event.listens_for(database, "before_cursor_execute")
    def note(_: Connection, __: object, statement: str, *___: object) -> None:
        said.append(" ".join(statement.split()).lower())

    with ledger.begin() as session:
        request = open_request(session, new_request()).id
        add_clips(session, request, [new_clip(0), new_clip(1)])
        said.clear()
        with pytest.raises(ValueError, match="has 2 clips, not 3"):
            seal_request(session, request, 3)
        seal_request(session, request, 2)
        planned(session, request)
        with pytest.raises(RequestNotReady, match="2 of 2 clips still to come"):
            finish_request(session, request)
        lease, clips = claim_shard(session, "a", seconds=60, model_digest=MODEL) or pytest.fail("no work")
        assert all(render(session, lease, clip.clip_id) for clip in clips)
        assert finish_request(session, request) is RequestStatus.COMPLETED
    assert said and not [each for each in said if "count(*)" in each and "from clips" in each]


def test_forty_thousand_clips_leave_no_trace_in_memory(ledger: Ledger) -> None:
    total, most = 40_000, 2**20  # bytes; in memory they would be a hundred times as many

    def lines() -> Iterator[NewClip]:
        clip = new_clip(0)
        for index in range(total):
            if index == total - 1:
                assert tracemalloc.get_traced_memory()[1] - before < most, "clips pile up in memory"
            yield replace(clip, index=index, prompt=f"{index} {'word ' * 20}", recipe=f"{index:064x}")

    with ledger.begin() as session:
        request = open_request(session, new_request()).id
        add_clips(session, request, [new_clip(total)])  # whatever is loaded or compiled at the first time
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            assert add_clips(session, request, lines()) == total
        finally:
            tracemalloc.stop()


def rows_read(database: Engine, session: Session, query: Callable[[], object]) -> float:
    """How many rows all nodes of the query's plan touched."""
    seen: list[tuple[str, Any]] = []

    def note(_: Connection, __: object, statement: str, parameters: Any, *___: object) -> None:
        seen.append((statement, parameters))

    event.listen(database, "before_cursor_execute", note)
    query()
    event.remove(database, "before_cursor_execute", note)
    statement, parameters = seen[-1]
    plan = session.connection().exec_driver_sql(f"explain (analyze, format json) {statement}", parameters).scalar_one()

    def touched(node: dict[str, Any]) -> float:
        own = node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
        return node["Actual Loops"] * own + sum(touched(child) for child in node.get("Plans", []))

    return touched((json.loads(plan) if isinstance(plan, str) else plan)[0]["Plan"])


# Planning: one recipe, one rendering


def test_twins_wait_for_the_first_and_are_adopted(ledger: Ledger) -> None:
    with ledger.begin() as session:
        request = opened(session, [new_clip(0, recipe="same"), new_clip(1, recipe="same"), new_clip(2)])
        other = opened(session, [new_clip(0, recipe="same")], key="other")
        assert [clip.index for clip in unplanned(session, request, 10)] == [0, 2]
        planned(session, request)
        assert unplanned(session, request, 10) == []
        assert unplanned(session, other, 10) == []  # somebody renders it
        assert reuse_renders(session, request) == 0
        leased = claim_shard(session, "a", seconds=60, model_digest=MODEL)
        assert leased is not None
        lease, (first, _) = leased
        assert render(session, lease, first.clip_id)
        assert unplanned(session, other, 10) == []  # somebody has rendered it
        assert reuse_renders(session, request, within=60) == 1
        session.execute(text("update clips set finished_at = finished_at - interval '100 seconds'"))
        assert reuse_renders(session, other, within=60) == 0, "that was longer ago"
        assert reuse_renders(session, other, within=120) == 1
        (mine, twin), (theirs,) = list(clips_of(session, request))[:2], list(clips_of(session, other))
        assert mine.sha256 == twin.sha256 == theirs.sha256 == artifact_of(first.clip_id).sha256
        assert (mine.reused, twin.reused, theirs.reused) == (False, True, True)
        assert (twin.attempts, twin.seconds, twin.rendered_by) == (0, mine.seconds, mine.clip_id)


def test_planners_of_two_requests_at_once_plan_each_recipe_once(ledger: Ledger) -> None:
    keys = [f"batch-{number}" for number in range(4)]
    with ledger.begin() as session:
        requests = [opened(session, [new_clip(index, recipe=index) for index in range(20)], key) for key in keys]

    def plan(request: str) -> int:
        with ledger.begin() as session:
            clips = [clip.clip_id for clip in unplanned(session, request, 20)]
        with ledger.begin() as session:
            for start in range(0, len(clips), 5):
                create_shard(session, request, clips[start : start + 5])
        return len(clips)

    offered = at_once(*(lambda request=request: plan(request) for request in requests))
    assert all(isinstance(count, int) for count in offered), offered
    with ledger.begin() as session:
        twice = "select recipe from clips where shard_id is not null group by 1 having count(*) > 1"
        assert session.execute(text(twice)).all() == []
        assert session.scalar(text("select count(*) from clips where shard_id is not null")) == 20
        assert session.scalar(text("select sum(size) from shards")) == 20


def test_a_shard_has_one_shape_and_only_clips_that_are_free(ledger: Ledger) -> None:
    with ledger.begin() as session:
        request = opened(session, [new_clip(0), new_clip(1, width=96), new_clip(2)])
        ids = [clip.clip_id for clip in unplanned(session, request, 10)]
        with pytest.raises(ValueError, match=r"one shape.*2: \[\(64, 48, 5\), \(96, 48, 5\)\]"):
            create_shard(session, request, ids)
        shard = create_shard(session, request, [ids[0]], priority=9, carrier={"traceparent": "x"})
        assert create_shard(session, request, [ids[0]]) is None
        second = create_shard(session, request, [ids[0], ids[2]])
        assert [(row.id, row.size) for row in shard_table(session, request)] == [(shard, 1), (second, 1)]
        cancel_request(session, request)
        assert create_shard(session, request, [ids[1]]) is None


def test_a_shard_keeps_what_was_predicted_and_history_has_it_beside_what_came(ledger: Ledger) -> None:
    with ledger.begin() as session:
        request = opened(session, [new_clip(0), new_clip(1), new_clip(2, recipe=(0, 0))])
        twin = session.scalar(text("select id from clips where index = 2"))
        ids = [clip.clip_id for clip in unplanned(session, request, 10)]
        create_shard(session, request, [*ids, twin], predicted_seconds=6.0, predicted_bytes=5 << 30)
        lease, clips = claim_shard(session, "a", seconds=60, model_digest=MODEL) or pytest.fail("no work")
        for clip in clips:
            start_clip(session, lease, clip.clip_id, **ENGINE)
            done = {"artifact": artifact_of(clip.clip_id), "seconds": {"denoise": 3.0}, "peak_bytes": 4 << 30}
            assert record_clip(session, lease, clip.clip_id, **done)
        complete_shard(session, lease)
        reuse_renders(session, request)
        rows = {row.index: row for row in clips_of(session, request)}
    assert [(rows[k].predicted_seconds, rows[k].seconds) for k in (0, 1)] == [(2.0, 3.0)] * 2  # the twin stayed out
    assert [(rows[k].predicted_bytes, rows[k].peak_bytes) for k in (0, 1)] == [(5 << 30, 4 << 30)] * 2
    assert rows[2].reused and rows[2].predicted_seconds is None


def test_a_shard_of_a_partition_waits_for_its_engines_until_it_is_unbound(ledger: Ledger) -> None:
    with ledger.begin() as session:
        request = opened(session, [new_clip(index) for index in range(4)])
        ids = [clip.clip_id for clip in unplanned(session, request, 10)]
        bound = [("cfg2xsp1xtp1", ids[:1]), (None, ids[1:2]), ("cfg1xsp1xtp1", ids[2:3]), ("cfg1xsp1xtp1", ids[3:])]
        shards = [create_shard(session, request, part, partition=to, predicted_seconds=2.0) for to, part in bound]

    def claim(partition: str | None) -> int | None:
        with ledger.begin() as session:
            found = claim_shard(session, "a", seconds=60, model_digest=MODEL, partition=partition)
        return found and found[0].shard_id

    def waits(partition: str) -> bool:
        with ledger() as session:
            return others_wait(session, model_digest=MODEL, partition=partition)

    assert [claim("cfg1xsp1xtp2"), claim("cfg1xsp1xtp2")] == [shards[1], None]
    assert [claim("cfg2xsp1xtp1"), claim("cfg2xsp1xtp1")] == [shards[0], None]
    assert waits("cfg2xsp1xtp1") and not waits("cfg1xsp1xtp1")
    with ledger.begin() as session:
        stands = [(each.partition, each.count, each.queued, each.seconds) for each in open_shards(session, request)]
        assert stands == [("cfg2xsp1xtp1", 1, 0, 2.0), (None, 1, 0, 2.0), ("cfg1xsp1xtp1", 2, 2, 4.0)]
    assert claim(None) == shards[2]  # an engine that takes whatever there is
    with ledger.begin() as session:
        assert unbind_shards(session, request, ["cfg2xsp1xtp1"]) == 0
        assert unbind_shards(session, request) == 1  # what is rendered already stays what it was
    assert not waits("cfg2xsp1xtp1")
    assert [claim("cfg2xsp1xtp1"), claim(None)] == [shards[3], None]


def test_costs_are_medians_of_a_shape_on_a_partition_of_a_device(ledger: Ledger) -> None:
    def rendered(
        owner: str, partition: str, seconds: Sequence[float], resumed_step: int | None = None, **more: Any
    ) -> None:
        told = {"partition": partition, "resumed_step": resumed_step}
        with ledger.begin() as session:
            clips = [new_clip(k, recipe=(owner, partition, k, str(told), str(more))) for k in range(len(seconds))]
            planned(session, opened(session, clips, key=f"{owner} {partition} {told} {more}"))
            lease, leased = claim_shard(session, owner, seconds=60, model_digest=MODEL) or pytest.fail("no work")
            for clip, each in zip(leased, seconds, strict=True):
                start_clip(session, lease, clip.clip_id, **ENGINE | {"engine": owner} | told)
                stages = {"text": 0.5, "denoise": each, "decode": 1.0}
                record_clip(session, lease, clip.clip_id, artifact=artifact_of(clip.recipe), seconds=stages, **more)
            complete_shard(session, lease)

    with ledger.begin() as session:
        for owner, device in (("a", "cpu x86_64"), ("b", "cuda x86_64")):
            told = {"host": "here", "pid": 1, "model_digest": MODEL, "code_version": "1.0", "partition": "tp=2"}
            register_engine(session, owner, device=device, **told)
    rendered("a", "cfg1xsp1xtp2", [2.0, 3.0, 70.0])
    rendered("a", "cfg2xsp1xtp1", [5.0])
    rendered("a", "cfg2xsp1xtp1", [0.1, 0.1, 0.1], skipped_steps=3)
    rendered("a", "cfg2xsp1xtp1", [0.1, 0.1, 0.1], resumed_step=20)
    rendered("b", "cfg1xsp1xtp2", [0.2])
    with ledger.begin() as session:
        found = {cost.partition: cost for cost in measured_costs(session, MODEL, "cpu")}
        assert [cost.seconds for cost in measured_costs(session, MODEL, "cuda")] == [1.7]
        assert measured_costs(session, digest("another"), "cpu") == []
    assert {name: cost.seconds for name, cost in found.items()} == {"cfg1xsp1xtp2": 4.5, "cfg2xsp1xtp1": 6.5}
    stages = {"text": 0.5, "denoise": 3.0, "decode": 1.0, "encode": 0.0, "put": 0.0}
    assert found["cfg1xsp1xtp2"].stages == stages


def test_a_clip_planned_before_its_take_was_there_is_not_rendered(ledger: Ledger) -> None:
    with ledger.begin() as session:
        request = opened(session, [new_clip(0), new_clip(1)])
        planned(session, request, size=1)
        artifact = artifact_of("before")
        session.execute(
            text("insert into artifacts (sha256, key, bytes, media_type) values (:sha, 'k', 1, 'video/mp4')"),
            {"sha": artifact.sha256},
        )
        session.execute(
            text("insert into renders (recipe, sha256, clip_id) select recipe, :sha, id from clips where index = 0"),
            {"sha": artifact.sha256},
        )
        leased = claim_shard(session, "a", seconds=60, model_digest=MODEL)  # closes the first shard, takes the second
        assert leased is not None
        assert [clip.clip_id for clip in leased[1]] == [f"{request}-000001-0"]
        assert [row.status for row in shard_table(session, request)] == [ShardStatus.DONE, ShardStatus.LEASED]
        assert statuses(session, request) == ["done", "queued"]


# Watching


def test_progress_and_shards_tell_where_a_request_stands(ledger: Ledger) -> None:
    clips = [new_clip(index, recipe=min(index, 4)) for index in range(6)]  # the last is the twin of the one before
    with ledger.begin() as session:
        request = open_request(session, new_request()).id
        add_clips(session, request, clips)
        before = progress(session, request)
        assert (before.total, before.added, before.finished, before.mean_seconds) == (None, 6, False, None)
        seal_request(session, request, 6)
        planned(session, request, size=3)
        lease, leased = claim_shard(session, "a", seconds=60, model_digest=MODEL) or pytest.fail("no work")
        render(session, lease, leased[0].clip_id)
        render(session, lease, leased[1].clip_id)
        start_clip(session, lease, leased[2].clip_id, **ENGINE)
        now = progress(session, request)
        assert {status: count for status, count in now.counts.items() if count} == {
            "done": 2,
            "running": 1,
            "queued": 3,
        }
        assert (now.total, now.waiting, now.reused, now.seconds_done, now.mean_seconds) == (6, 4, 0, 4.0, 2.0)
        assert (now.engines, now.finished) == (1, False)
        assert now.first_started is not None and now.first_started <= now.now
        first, second = shard_table(session, request)
        assert (first.status, first.owner, first.done, first.running, first.seconds) == ("leased", "a", 2, 1, 4.0)
        assert (second.status, second.owner, second.size, second.done) == ("queued", None, 2, 0)
        assert [row.id for row in shard_table(session, request, limit=1)] == [second.id]
        assert fail_clip(session, lease, leased[2].clip_id, "no", permanent=True) == ClipStatus.FAILED
        complete_shard(session, lease)
        lease, leased = claim_shard(session, "a", seconds=60, model_digest=MODEL) or pytest.fail("no work")
        for clip in leased:
            render(session, lease, clip.clip_id)
        complete_shard(session, lease)
        reuse_renders(session, request)
        end = progress(session, request)
        assert (end.finished, end.reused, end.mean_seconds) == (True, 1, 2.0)
        assert (end.counts[ClipStatus.DONE], end.counts[ClipStatus.FAILED]) == (5, 1)
    with ledger.begin() as session, pytest.raises(RequestNotFound, match="req_nothing"):
        progress(session, "req_nothing")


def test_requests_are_found_by_id_name_and_flow_run(ledger: Ledger) -> None:
    with ledger.begin() as session:
        first = opened(session, [new_clip(0)], key="a", name="night shoot", flow_run_id="run-a")
    with ledger.begin() as session:
        second = opened(session, [new_clip(0)], key="b", name="night shoot", flow_run_id="run-b")
        found = [request_by(session, asked) for asked in (first, "night shoot", "run-a", "nothing")]
        assert [row.id if row else None for row in found] == [first, second, first, None]
        assert [row["request_id"] for row in standings(session, limit=5)] == [second, first]
        assert [row["request_id"] for row in standings(session, limit=1)] == [second]


def test_engines_come_go_and_fall_silent(ledger: Ledger) -> None:
    register = {"host": "h", "pid": 1, "device": "cpu", "partition": "p", "model_digest": MODEL, "code_version": "1"}
    with ledger.begin() as session:
        register_model(session, MODEL, "mini", "/weights", {"steps": 4})
        register_model(session, MODEL, "mini", "/elsewhere", {"steps": 8})
        assert session.execute(text("select path, card from models")).one() == ("/elsewhere", {"steps": 8})
        for owner in ("a", "b", "c"):
            register_engine(session, owner, **register)
        session.execute(text("update engines set heartbeat_at = now() - interval '1 day' where id <> 'b'"))
        close_engine(session, "c")
        assert [engine.id for engine in live_engines(session, 30)] == ["b"]
        age = session.scalars(text("select extract(epoch from now() - pg_postmaster_start_time())")).one()
        assert [engine.id for engine in silent_engines(session, min(30, float(age) / 2))] == ["a"]
        assert silent_engines(session, float(age) + 60) == [], "nobody is silent while the server is down"
        assert [engine.id for engine in closed_engines(session, 30)] == ["c"]
        engine_heartbeat(session, "a")
        assert [engine.id for engine in live_engines(session, 30, model_digest=MODEL)] == ["a", "b"]
        assert live_engines(session, 30, model_digest="another") == []
        register_engine(session, "c", **register)
        assert [engine.id for engine in live_engines(session, 30)] == ["a", "b", "c"]
        assert closed_engines(session, 30) == []


def test_scores_are_added_to_what_is_known_of_a_model(ledger: Ledger) -> None:
    with ledger.begin() as session:
        register_model(session, MODEL, "mini", "/weights", {"steps": 4, "training": {"seed": 1}})
        record_scores(session, MODEL, {"dit": {"loss": 0.2}, "evaluation": {"old": 1}})
        register_model(session, MODEL, "mini", "/weights", {"steps": 4})  # as every engine does
        record_scores(session, MODEL, {"evaluation": {"colour": 0.9}})
    with ledger() as session:
        card = session.scalar(text("select card from models where digest = :digest"), {"digest": MODEL})
    assert card == {
        "steps": 4,
        "training": {"seed": 1},
        "scores": {"dit": {"loss": 0.2}, "evaluation": {"colour": 0.9}},
    }


def test_the_store_can_be_swept_by_what_the_ledger_knows(ledger: Ledger) -> None:
    with ledger.begin() as session:
        request = opened(session, [new_clip(0)])
        planned(session, request)
        lease, (clip,) = claim_shard(session, "a", seconds=60, model_digest=MODEL) or pytest.fail("no work")
        render(session, lease, clip.clip_id)
        complete_shard(session, lease)
        finish_request(session, request, manifest_key="requests/m", sheet_key="requests/s")
        key = artifact_of(clip.clip_id).key
        assert known_keys(session, [key, "requests/m", "requests/s", "blobs/orphan"]) == {
            key,
            "requests/m",
            "requests/s",
        }
        assert known_keys(session, []) == set()
        assert [artifact.key for artifact in artifacts(session)] == [key]


# Ending


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        (["done", "done"], RequestStatus.COMPLETED),
        (["done", "failed"], RequestStatus.COMPLETED_WITH_GAPS),
        (["done", "rejected"], RequestStatus.COMPLETED_WITH_GAPS),
        (["failed", "quarantined"], RequestStatus.FAILED),
        (["rejected", "rejected"], RequestStatus.FAILED),
        ([], RequestStatus.COMPLETED),
    ],
)
def test_a_request_ends_as_its_clips_did(ledger: Ledger, ends: list[str], expected: RequestStatus) -> None:
    rejected = {"rejected": "blank", "prompt": ""}
    clips = [new_clip(index, **(rejected if end == "rejected" else {})) for index, end in enumerate(ends)]
    with ledger.begin() as session:
        request = opened(session, clips)
        if "queued" in statuses(session, request):
            with pytest.raises(RequestNotReady, match="still to come"):
                finish_request(session, request)
        planned(session, request)
        while leased := claim_shard(session, "a", seconds=60, model_digest=MODEL):
            lease, todo = leased
            for clip in todo:
                end = ends[int(clip.clip_id.split("-")[1])]
                if end == "done":
                    render(session, lease, clip.clip_id)
                    continue
                start_clip(session, lease, clip.clip_id, **ENGINE)
                fail_clip(session, lease, clip.clip_id, "no", permanent=end == "failed")
            complete_shard(session, lease)
            pass_time(session, 61)
            planned(session, request)
        assert statuses(session, request) == ends
        assert finish_request(session, request, manifest_key="m") == expected
        assert finish_request(session, request, sheet_key="s") == expected
        row = request_by(session, request)
        assert row is not None and (row.manifest_key, row.sheet_key) == ("m", "s")
        assert row.finished_at is not None


def test_cancel_reaches_every_clip_and_the_engine_that_renders(ledger: Ledger) -> None:
    with ledger.begin() as session:
        request = opened(session, [new_clip(index) for index in range(4)])
        planned(session, request, size=2)
        lease, (first, second) = claim_shard(session, "a", seconds=60, model_digest=MODEL) or pytest.fail("no work")
        render(session, lease, first.clip_id)
        start_clip(session, lease, second.clip_id, **ENGINE)
        assert renew(session, lease, 60) == set()
    with ledger.begin() as session:
        assert cancel_request(session, request) == 3
        assert cancel_request(session, request) == 0
    with ledger.begin() as session:
        assert renew(session, lease, 60) == {second.clip_id}
        artifact = artifact_of("late")
        assert record_clip(session, lease, second.clip_id, artifact=artifact, seconds={}) is False
        assert start_clip(session, lease, second.clip_id, **ENGINE) == 0
        assert fail_clip(session, lease, second.clip_id, "late") == ClipStatus.CANCELLED
        complete_shard(session, lease)
        assert statuses(session, request) == ["done", "cancelled", "cancelled", "cancelled"]
        assert [row.status for row in shard_table(session, request)] == [ShardStatus.CANCELLED] * 2
        assert session.scalars(text("select status::text from attempts order by 1")).all() == ["cancelled", "done"]
        assert session.scalar(text("select count(*) from renders")) == 1
        assert claim_shard(session, "b", seconds=60, model_digest=MODEL) is None
        assert finish_request(session, request) == RequestStatus.CANCELLED


def test_retry_gives_what_ended_badly_a_fresh_allowance(ledger: Ledger) -> None:
    with ledger.begin() as session:
        request = opened(session, [new_clip(0), new_clip(1), new_clip(2, rejected="bad", prompt="")])
        for expected in (ClipStatus.QUEUED, ClipStatus.QUEUED, ClipStatus.QUARANTINED):
            planned(session, request)
            lease, todo = claim_shard(session, "a", seconds=60, model_digest=MODEL) or pytest.fail("no work")
            for clip in todo:
                start_clip(session, lease, clip.clip_id, **ENGINE)
                if clip.clip_id.endswith("000001-0"):
                    record_clip(session, lease, clip.clip_id, artifact=artifact_of(1), seconds={})
                else:
                    assert fail_clip(session, lease, clip.clip_id, "boom\0" * 9000) == expected
            complete_shard(session, lease)
            assert unplanned(session, request, 5) == []  # it waits a little
            pass_time(session, 61)
        assert statuses(session, request) == ["quarantined", "done", "rejected"]
        assert finish_request(session, request) == RequestStatus.COMPLETED_WITH_GAPS
        assert retry_request(session, request) == 1
        assert retry_request(session, request) == 0
        assert statuses(session, request) == ["queued", "done", "rejected"]
        planned(session, request)
        lease, (clip,) = claim_shard(session, "a", seconds=60, model_digest=MODEL) or pytest.fail("no work")
        assert clip.attempt_no == 4
        start_clip(session, lease, clip.clip_id, **ENGINE)
        assert fail_clip(session, lease, clip.clip_id, "boom") == ClipStatus.QUEUED
        row = next(clips_of(session, request))
        assert (row.attempts, row.error) == (4, "boom")


def test_a_request_cancelled_while_it_is_added_can_only_be_submitted_again(ledger: Ledger) -> None:
    with ledger.begin() as session:
        request = open_request(session, new_request()).id
        add_clips(session, request, [new_clip(0)])
        cancel_request(session, request)
        add_clips(session, request, [new_clip(1)])  # the submitter has not heard of it
        with pytest.raises(RequestNotReady, match="submit its prompts again"):
            retry_request(session, request)
        seal_request(session, request, 2)
        assert statuses(session, request) == ["cancelled", "cancelled"]
        assert open_request(session, new_request(flow_run_id="flow-2")).status == RequestStatus.OPEN
        assert statuses(session, request) == ["queued", "queued"]


# Crashes


def test_a_killed_process_leaves_nothing_half_written(database_url: str, ledger: Ledger) -> None:
    with ledger.begin() as session:
        request = opened(session, [new_clip(0)])
        planned(session, request)
        lease, (clip,) = claim_shard(session, "a", seconds=60, model_digest=MODEL) or pytest.fail("no work")
        start_clip(session, lease, clip.clip_id, **ENGINE)
    program = """
import os, signal, sys
from db.leases import Lease, record_clip
from db.session import connect, sessions
from tests.factories import artifact_of
url, shard, request, clip = sys.argv[1:]
session = sessions(connect(url))()
lease = Lease(int(shard), "a", 1, request, {})
assert record_clip(session, lease, clip, artifact=artifact_of("x"), seconds={"denoise": 1.0})
session.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""
    arguments = [database_url, str(lease.shard_id), request, clip.clip_id]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with ledger.begin() as session:  # waits for nothing: the dead process' locks are gone with its connection
        session.execute(text("set local lock_timeout = '5s'"))
        for table in ("artifacts", "renders"):
            assert session.scalar(text(f"select count(*) from {table}")) == 0
        assert statuses(session, request) == ["running"]
        assert record_clip(session, lease, clip.clip_id, artifact=artifact_of("x"), seconds={})
        complete_shard(session, lease)
        assert finish_request(session, request) == RequestStatus.COMPLETED


# The constraints refuse what they say. One row of each kind to begin with, then one statement for each rule.

WORLD = f"""
insert into models (digest, name) values ('{MODEL}', 'mini');
insert into tenants (name) values ('t');
insert into usage (tenant, minute, part, gpu_seconds) values ('t', now(), 0, 1);
insert into requests (id, key, name, tenant, model, model_digest, settings, source, source_sha256)
values ('req_000000000001', 'one', 'one', 't', 'mini', '{MODEL}', '{{}}', 'inline', 'x');
insert into artifacts (sha256, key, bytes, media_type) values ('{digest("a")}', 'a', 1, 'video/mp4');
insert into shards (request_id, priority, width, height, frames, size) values ('req_000000000001', 5, 64, 48, 5, 1);
insert into clips (id, request_id, index, sample, custom_id, prompt, width, height, frames, fps, steps, guidance,
                   solver, shift, seed, recipe, shard_id)
select 'clip-' || n, 'req_000000000001', n, 0, 'custom-' || n, 'a ball', 64, 48, 5, 8, 4, 3.0, 'euler', 3.0, n,
       case n when 0 then '{digest("r0")}' else '{digest("r1")}' end, case n when 2 then null else 1 end
from generate_series(0, 2) as n;
insert into attempts (clip_id, number, shard_id, shard_attempt, owner, engine, partition, code_version)
values ('clip-0', 1, 1, 1, 'a', 'e', 'p', '1');
insert into renders (recipe, sha256, clip_id) values ('{digest("r9")}', '{digest("a")}', 'clip-0');
insert into datasets (id, key, name, source, fps, captions)
values ('set_000000000001', 'k', 'n', 'file:///v', 8, 'files');
insert into dataset_clips (dataset_id, index, file, sha256, start, width, height, frames, caption)
values ('set_000000000001', 0, 'a.mp4', '{digest("a")}', 0, 64, 48, 5, 'a ball');
insert into reproductions (clip_id, partition, device, code_version, sha256, identical, largest, seconds)
values ('clip-0', 'p', 'cpu', '1', '{digest("a")}', true, 0, 1.0);
insert into rewrites (key, rewriter, prompt, moving, rewritten)
values ('{digest("w")}', 'r', 'a crimson ball', true, 'a red ball');
"""

REFUSED = {
    "uq_requests_key": "insert into requests select 'req_000000000002', key, name, tenant, model, model_digest,"
    " settings, source, source_sha256 from requests",
    "fk_requests_model_digest": "update requests set model_digest = 'unknown'",
    "fk_requests_tenant": "update requests set tenant = 'nobody'",
    "ck_tenants_weight": "update tenants set weight = 0",
    "ck_tenants_quota": "update tenants set max_clips = -1",
    "fk_usage_tenant": "update usage set tenant = 'nobody'",
    "ck_usage_gpu_seconds": "update usage set gpu_seconds = -1",
    "ck_clips_resume": "update clips set resume_key = 'key' where id = 'clip-0'",
    "uq_clips_resume_key": "update clips set resume_key = 'key', resume_step = 1, resume_fingerprint = 'x'",
    "ck_attempts_error_class": "update attempts set status = 'failed', finished_at = now()",
    "ck_requests_priority": "update requests set priority = 10",
    "ck_requests_labels": "update requests set tags = array[]::text[]",
    "ck_clips_labels": "update clips set metadata = '[]' where id = 'clip-0'",
    "ck_clips_guidance_2": "update clips set guidance_2 = -1 where id = 'clip-0'",
    "ck_requests_id": "insert into requests select 'by hand', 'two', name, tenant, model, model_digest, settings,"
    " source, source_sha256 from requests",
    "ck_requests_total": "update requests set total = -1",
    "ck_requests_finished": "update requests set status = 'completed'",
    "fk_shards_request_id": "update shards set request_id = 'unknown'",
    "ck_shards_lease": "update shards set status = 'leased', owner = 'a', attempt = 1",
    "ck_shards_attempt": "update shards set status = 'leased', owner = 'a', leased_until = now()",
    "ck_shards_finished": "update shards set status = 'cancelled'",
    "ck_shards_size": "update shards set size = 0",
    "ck_shards_priority": "update shards set priority = -1",
    "uq_artifacts_key": f"insert into artifacts (sha256, key, bytes, media_type) values ('{digest('b')}', 'a', 1, 'm')",
    "ck_artifacts_sha256": "insert into artifacts (sha256, key, bytes, media_type) values ('short', 'b', 1, 'm')",
    "ck_artifacts_bytes": "update artifacts set bytes = 0",
    "uq_clips_request_id_index_sample": "update clips set index = 1 where id = 'clip-0'",
    "fk_clips_request_id": "update clips set request_id = 'unknown'",
    "fk_clips_shard_id": f"update clips set shard_id = 999, recipe = '{digest('r2')}' where id = 'clip-2'",
    "fk_clips_rendered_by": "update clips set rendered_by = 'unknown'",
    "fk_clips_artifact": "update clips set status = 'done', finished_at = now(), artifact = 'unknown'",
    "ck_clips_position": "update clips set sample = -1",
    "ck_clips_renderable": "update clips set width = null where id = 'clip-0'",
    "ck_clips_recipe": "update clips set recipe = 'abc' where id = 'clip-2'",
    "ck_clips_done": "update clips set status = 'done', finished_at = now()",
    "ck_clips_running": "update clips set status = 'running', shard_id = null",
    "ck_clips_finished": "update clips set status = 'cancelled'",
    "ck_clips_error": "update clips set status = 'failed', finished_at = now()",
    "ck_clips_failures": "update clips set failures = 3",
    "ck_clips_reused": "update clips set reused = true",
    "uq_clips_recipe_active": "update clips set shard_id = 1 where id = 'clip-2'",
    "uq_clips_custom_id": "update clips set custom_id = 'custom-0' where id = 'clip-1'",
    "fk_attempts_clip_id": "update attempts set clip_id = 'unknown'",
    "fk_attempts_shard_id": "update attempts set shard_id = 999",
    "ck_attempts_number": "update attempts set number = 0",
    "ck_attempts_finished": "update attempts set status = 'lost'",
    "uq_attempts_running": "insert into attempts select clip_id, 2, shard_id, shard_attempt, owner, engine, partition,"
    " code_version from attempts",
    "fk_renders_sha256": "update renders set sha256 = 'unknown'",
    "fk_renders_clip_id": "update renders set clip_id = 'unknown'",
    "ck_renders_recipe": "update renders set recipe = 'abc'",
    "pk_renders": f"insert into renders (recipe, sha256, clip_id) values ('{digest('r9')}', '{digest('a')}', 'clip-1')",
    "fk_edges_child": "insert into edges values ('unknown', 'clip-0', 'extend')",
    "fk_edges_parent": "insert into edges values ('clip-0', 'unknown', 'extend')",
    "ck_edges_loop": "insert into edges values ('clip-0', 'clip-0', 'extend')",
    "ck_clips_mode": "update clips set mode = 'extend', direction = 'forward' where id = 'clip-0'",
    "ck_clips_windows": "update clips set \"window\" = 5, overlap = 5 where id = 'clip-0'",
    "ck_clips_step_cache": "update clips set step_cache = 0 where id = 'clip-0'",
    "ck_attempts_measured": "update attempts set skipped_steps = -1",
    "fk_clips_source": f"update clips set mode = 'loop', source = '{digest('b')}' where id = 'clip-0'",
    "fk_clips_end_source": f"update clips set mode = 'connect', source = '{digest('a')}',"
    f" end_source = '{digest('b')}' where id = 'clip-0'",
    "fk_models_dataset_id": "update models set dataset_id = 'set_000000000002'",
    "uq_datasets_key": "insert into datasets (id, key, name, source, fps, captions)"
    " select 'set_000000000002', key, name, source, fps, captions from datasets",
    "fk_datasets_parent": "update datasets set captions = 'vision', author = 'v', parent = 'set_000000000002'",
    "ck_datasets_id": "insert into datasets (id, key, name, source, fps, captions)"
    " select 'by hand', 'two', name, source, fps, captions from datasets",
    "ck_datasets_digest": "update datasets set digest = 'short', clips = 1, sealed_at = now()",
    "ck_datasets_sealed": "update datasets set clips = 1",
    "ck_datasets_author": "update datasets set author = 'somebody'",
    "ck_datasets_seed": "update datasets set seed = 1",
    "ck_datasets_fps": "update datasets set fps = 0",
    "fk_dataset_clips_dataset_id": "update dataset_clips set dataset_id = 'set_000000000002'",
    "ck_dataset_clips_position": "update dataset_clips set start = -1",
    "ck_dataset_clips_sha256": "update dataset_clips set sha256 = 'short'",
    "ck_dataset_clips_shape": "update dataset_clips set frames = 0",
    "ck_shards_predicted": "update shards set predicted_seconds = 0",
    "fk_reproductions_clip_id": "update reproductions set clip_id = 'unknown'",
    "ck_reproductions_sha256": "update reproductions set sha256 = 'short'",
    "ck_reproductions_drift": "update reproductions set largest = 1",
    "ck_rewrites_key": "update rewrites set key = 'short'",
    "ck_rewrites_rewritten": "update rewrites set rewritten = ''",
}

ALSO_NOT_RENDERABLE = [
    "prompt = ''", "height = 0", "frames = 0", "fps = null", "steps = 0", "guidance = 'nan'", "guidance = -1",
    "guidance = 'infinity'", "shift = 0", "shift = 'nan'", "solver = null", "seed = -1", "seed = null", "recipe = null",
]  # fmt: skip


def test_every_constraint_refuses_what_it_is_there_for(database: Engine) -> None:
    with database.connect() as connection, connection.begin():
        connection.exec_driver_sql(WORLD)
        for name, statement in REFUSED.items():
            assert refused_by(connection, statement) == name, statement
        for change in ALSO_NOT_RENDERABLE:
            statement = f"update clips set {change} where id = 'clip-0'"
            assert refused_by(connection, statement) == "ck_clips_renderable", change
        for table, column in (
            ("clips", "status"),
            ("requests", "status"),
            ("shards", "status"),
            ("attempts", "status"),
        ):
            with pytest.raises(DataError, match="invalid input value for enum"), connection.begin_nested():
                connection.exec_driver_sql(f"update {table} set {column} = 'lost in space'")
        rules = """
            select conname from pg_constraint where connamespace = 'public'::regnamespace and contype in ('c', 'u', 'f')
            union select indexrelid::regclass::text from pg_index
            where indisunique and indpred is not null and indrelid::regclass::text <> 'pg_catalog'"""
        there = set(connection.execute(text(rules)).scalars())
    assert there - set(REFUSED) == set(), "a rule without a test of what it prevents"


def refused_by(connection: Connection, statement: str) -> str | None:
    with pytest.raises(IntegrityError) as caught, connection.begin_nested():
        connection.exec_driver_sql(statement)
    return getattr(caught.value.orig, "diag").constraint_name  # noqa: B009


def test_only_postgres_will_do() -> None:
    with pytest.raises(ValueError, match="needs Postgres"):
        connect("sqlite:///rushes.db")
