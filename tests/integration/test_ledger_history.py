"""Asking the ledger: the view, its filters, the queries of docs/questions.md, and what a typed query may not do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session, sessionmaker

from db.claim import claim_shard
from db.clips import add_clips
from db.engines import register_engine
from db.history import SqlFailed, find_clips, run_sql, show_clip
from db.leases import STAGES, complete_shard, fail_clip, record_clip, start_clip
from db.planning import reuse_renders
from db.requests import request_id
from db.session import connect, sessions
from db.tables import AttemptStatus, ClipMode, ClipStatus, EdgeKind
from db.view import COLUMNS
from tests.documents import QUESTIONS
from tests.factories import ENGINE, MODEL, artifact_of, digest, new_clip, opened, planned

Ledger = sessionmaker[Session]


@pytest.fixture(scope="module")
def dailies(clone: Callable[[str], AbstractContextManager[str]], migrated_template: str) -> Iterator[Engine]:
    """A ledger with one request in it, which the tests of this file only read: see `rendered`."""
    with clone(migrated_template) as url:
        engine = connect(url)
        rendered(sessions(engine))
        yield engine
        engine.dispose()


REQUEST = request_id("dailies")
MADE_FROM = ((f"{REQUEST}-000000-0", EdgeKind.EXTEND),)


def rendered(ledger: Ledger) -> None:
    """Two done (one at its second attempt), one twin found, one failed, one rejected."""
    clips = [
        new_clip(0, prompt="a red ball rolls left", custom_id="opening", tags=("hero", "night"), metadata={"shot": 7}),
        new_clip(
            1, prompt="100% of a blue_box", rewritten_prompt="A Red box, on a table", recipe="box", parents=MADE_FROM
        ),
        new_clip(2, prompt="100 of a blue box", recipe="box"),
        new_clip(3, prompt="too much"),
        new_clip(4, prompt="", rejected="prompts.jsonl:5: prompt is blank"),
    ]
    with ledger.begin() as session:
        request = opened(session, clips, key="dailies", trace_id="request-trace")
    seconds = {stage: 0.5 + position for position, stage in enumerate(STAGES)}
    for turn in range(2):
        with ledger.begin() as session:
            session.execute(text("update clips set not_before = null"))  # what failed has waited long enough
            planned(session, request)
            lease, todo = claim_shard(session, "a", seconds=60, model_digest=MODEL) or pytest.fail("no work")
            for clip in todo:
                index = int(clip.clip_id.split("-")[1])
                start_clip(session, lease, clip.clip_id, **ENGINE)
                if index == 3:
                    fail_clip(session, lease, clip.clip_id, "out of memory\nat step 3", permanent=True)
                elif index == 1 and turn == 0:
                    fail_clip(session, lease, clip.clip_id, "a rank hung")
                else:
                    stored = artifact_of(clip.clip_id)
                    trace = {"trace_id": "clip-trace"} if index == 1 else {}
                    assert record_clip(
                        session, lease, clip.clip_id, artifact=stored, seconds=seconds, peak_bytes=7, **trace
                    )
            complete_shard(session, lease)
            reuse_renders(session, request)
    with ledger.begin() as session:
        assert add_clips(session, request, clips) == 0  # again: no clip and no parent comes twice


@pytest.fixture(scope="module")
def studio(clone: Callable[[str], AbstractContextManager[str]], migrated_template: str) -> Iterator[Engine]:
    """`dailies`, and a second request, of another tenant and model, that connects clips of it and is still open."""
    with clone(migrated_template) as url:
        engine = connect(url)
        rendered(sessions(engine))
        connected(sessions(engine))
        yield engine
        engine.dispose()


TAKES, OTHER_MODEL = request_id("takes"), digest("other")
FIRST, SECOND = f"{REQUEST}-000000-0", f"{REQUEST}-000001-0"


def connected(ledger: Ledger) -> None:
    """One done at its first attempt, one that connects two clips at its second, one that is rendered now."""
    ends = {"source": artifact_of(FIRST).sha256, "end_source": artifact_of(SECOND).sha256}
    clips = [
        new_clip(0, prompt="a red ball rolls left", recipe="take 0", width=32),
        new_clip(1, recipe="take 1", width=32, mode=ClipMode.CONNECT, **ends,
                 parents=((FIRST, EdgeKind.CONNECT), (SECOND, EdgeKind.CONNECT))),
        new_clip(2, recipe="take 2", width=32),
    ]  # fmt: skip
    with ledger.begin() as session:
        described = {"tenant": "agency", "model": "other", "model_digest": OTHER_MODEL, "settings": {"steps": 8}}
        request = opened(session, clips, key="takes", **described)
        named = {"host": "gpu1", "pid": 1, "device": "cpu", "partition": "cfg1xsp1xtp2", "code_version": "1.0"}
        register_engine(session, "engine-1", model_digest=OTHER_MODEL, **named)
    for fails in (True, False):
        with ledger.begin() as session:
            session.execute(text("update clips set not_before = null"))
            planned(session, request)
            lease, todo = claim_shard(session, "engine-1", seconds=60, model_digest=OTHER_MODEL) or pytest.fail("none")
            for clip in todo:
                start_clip(session, lease, clip.clip_id, **ENGINE, host="gpu1")
                if clip.clip_id.endswith("1-0") and fails:
                    fail_clip(session, lease, clip.clip_id, "no memory", error_class="out_of_memory")
                elif not clip.clip_id.endswith("2-0"):
                    stored = artifact_of(clip.clip_id)
                    assert record_clip(session, lease, clip.clip_id, artifact=stored, seconds={"denoise": 2.0})
                elif fails:
                    fail_clip(session, lease, clip.clip_id, "no memory", error_class="out_of_memory")
            if fails:
                complete_shard(session, lease)


def test_the_views_tell_of_requests_attempts_engines_and_costs(studio: Engine) -> None:
    """Among a request that has not been ended and one that is rendered now."""

    def ask(sql: str) -> list[tuple[object, ...]]:
        return run_sql(studio, sql).rows

    counts = "clips_left, running, done, reused, failed, rejected, seconds, bytes"
    assert ask(f"select {counts} from requests where name = 'dailies'") == [(0, 0, 3, 1, 1, 1, 25.0, 2000)]
    assert ask(f"select {counts} from requests where name = 'takes'") == [(1, 1, 2, 0, 0, 0, 4.0, 2000)]
    (going,) = ask("select clips_per_minute > 0, eta > now(), gpu_seconds > 8 from requests where name = 'takes'")
    assert going == (True, True, True)
    tried = "select status, count(*), count(error_class), bool_and(gpu_seconds > 0) from attempts group by 1 order by 1"
    assert ask(tried) == [("done", 4, 0, True), ("failed", 4, 4, True), ("running", 1, 0, True)]
    engines = "select engine_id, state, now_rendering, gpus, busy_share > 0 from engines"
    assert ask(engines) == [("engine-1", "rendering", [f"{TAKES}-000002-0"], 2, True)]
    used = "select tenant, model, attempts, rendered, gpu_seconds > 2 * wasted_gpu_seconds from usage order by 1"
    assert ask(used) == [("agency", "other", 5, 2, True), ("studio", "mini", 4, 2, True)]
    assert ask("select count(*), sum(seconds) from stages where stage = 'denoise'") == [(4, 7.0)]


def test_lineage_knows_both_parents_and_every_descendant(studio: Engine) -> None:
    connecting = f"{TAKES}-000001-0"
    rows = run_sql(studio, "select parent, child, kind, depth from lineage").rows
    assert sorted(rows) == sorted([
        (FIRST, SECOND, "extend", 1),
        (FIRST, connecting, "connect", 1),
        (FIRST, connecting, "connect", 2),
        (SECOND, connecting, "connect", 1),
    ])  # fmt: skip
    assert run_sql(studio, f"select parents from history where clip_id = '{connecting}'").rows == [([FIRST, SECOND],)]


def test_history_has_one_row_for_every_clip_with_all_about_it(dailies: Engine) -> None:
    assert run_sql(dailies, "select count(*), count(distinct clip_id) from history").rows == [(5, 5)]
    with Session(dailies) as session:
        story = show_clip(session, f"{REQUEST}-000001-0")
        assert show_clip(session, "nobody") is None
        parent = show_clip(session, f"{REQUEST}-000000-0")
    assert story is not None and parent is not None
    clip = story.clip
    assert (clip.request_name, clip.tenant, clip.model, clip.model_digest) == ("dailies", "studio", "mini", MODEL)
    assert (clip.status, clip.error, clip.attempts, clip.reused) == (ClipStatus.DONE, None, 2, False)
    assert (clip.engine, clip.partition, clip.code_version) == ("engine-1", "cfg1xsp1xtp2", "1.0")
    stages = [getattr(clip, f"{stage}_seconds") for stage in STAGES]
    assert (stages, clip.seconds) == ([0.5, 1.5, 2.5, 3.5, 4.5], 12.5)
    stored = artifact_of(clip.clip_id)
    assert (clip.sha256, clip.object_key, clip.bytes) == (stored.sha256, stored.key, stored.bytes)
    assert (clip.trace_id, parent.clip.trace_id) == ("clip-trace", "request-trace")
    assert clip.started_at is not None and clip.finished_at is not None
    assert clip.queued_at < clip.started_at <= clip.finished_at
    assert (clip.parents, parent.clip.parents) == ([parent.clip.clip_id], [])
    assert (clip.rendered_by, clip.gpu_seconds) == (clip.clip_id, 25.0), "on two GPUs"
    assert story.parents == ((parent.clip.clip_id, EdgeKind.EXTEND),)
    assert parent.children == ((clip.clip_id, EdgeKind.EXTEND),)
    assert [(row.number, row.status, row.error) for row in story.attempts] == [
        (1, AttemptStatus.FAILED, "a rank hung"),
        (2, AttemptStatus.DONE, None),
    ]
    assert story.attempts[1].peak_bytes == 7


def test_a_reused_clip_carries_the_figures_of_the_clip_that_was_rendered(dailies: Engine) -> None:
    with Session(dailies) as session:
        made, reused = (show_clip(session, f"{REQUEST}-00000{k}-0") or pytest.fail("no clip") for k in (1, 2))
    of_the_rendering = ("engine", "partition", "code_version", "seconds", "denoise_seconds", "peak_bytes", "trace_id")
    for name in (*of_the_rendering, "rendered_by", "sha256"):
        assert getattr(reused.clip, name) == getattr(made.clip, name) is not None, name
    assert (reused.clip.reused, reused.clip.attempts, reused.clip.gpu_seconds) == (True, 0, 0.0)
    assert run_sql(dailies, "select sum(gpu_seconds) from history").rows == [(50.0,)], "each rendering counts once"


def test_no_column_has_a_reserved_name(dailies: Engine) -> None:
    with dailies.connect() as connection:
        reserved = set(connection.scalars(text("select word from pg_get_keywords() where catcode = 'R'")))
    assert reserved & set(COLUMNS) == set()
    run_sql(dailies, "select window_frames, overlap from history")


def test_clips_are_found_by_what_people_remember(dailies: Engine) -> None:
    with Session(dailies) as session:

        def found(**filters: object) -> list[int]:
            return [clip.index for clip in find_clips(session, **filters)]  # pyright: ignore

        assert found() == [0, 1, 2, 3, 4]
        assert found(limit=2) == [0, 1]
        assert found(request=REQUEST) == found(request="dailies") == [0, 1, 2, 3, 4]
        assert found(request="weeklies") == []
        assert found(status=ClipStatus.DONE) == [0, 1, 2]
        assert found(prompt="RED") == [0, 1]  # in the words, or in the rewritten ones
        assert found(prompt="100%") == found(prompt="blue_box") == [1]  # a percent sign is a percent sign
        assert found(since=timedelta(hours=1)) == [0, 1, 2, 3, 4]
        session.execute(text("update clips set queued_at = queued_at - interval '2 hours' where index > 1"))
        assert found(since=timedelta(hours=1)) == [0, 1]
        assert found(status=ClipStatus.DONE, prompt="box", since=timedelta(hours=3)) == [1, 2]


# What each query must say of the request above: a part of one of its rows. Nothing, where nothing is the good answer.
ANSWERS: dict[str, tuple[object, ...] | None] = {
    "Which model and partition succeed, and how fast?": ("mini", 3),
    "Which clips were slowest, and why?": (12.5, 1.5),
    "What goes wrong most?": ("out of memory", 1),
    "How many clips and how much engine time an hour?": (4, 29),
    "Was anything rendered twice? (no rows: nothing was)": None,
    "Which clips needed more than one attempt?": ("done", 2),
    "How busy was each engine?": ("engine-1", "gpu1", "rendering", 1),
    "Where are the clips about a word?": ("done", "a red ball rolls left"),
    "How do two models do on the same prompts and seeds?": ("a red ball rolls left", "mini", "other"),
    "What did each tenant cost, by day and model?": ("agency", "other", 2),
    "Which clips came from this one?": (1, "connect", f"{TAKES}-000001-0", "done"),
    "What failed, by hour and cause?": ("out_of_memory", 2, 1),
    "How long do clips take from submission to file?": ("studio", 5, 3),
    "What is left, and when will it be done?": ("takes", "agency", 1, 2, 0),
    "What differs between the last two requests?": ("steps", 4, 8),
    "What does each request store?": ("dailies", 3, 2000),
    "How slow is each stage at its slowest?": ("denoise", 4, [1.5, 2.0, 2.0]),
    "How far are the clips with a tag, by a value of ours?": ("7", 1, 1),
    "Which prompts are nearly the same as the newest?": (f"{REQUEST}-000000-0", "a red ball rolls left", "done"),
    "What did it save that clips were reused?": ("studio", 3, 1),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_query_of_the_documents_answers_its_question(studio: Engine, question: str) -> None:
    answer = run_sql(studio, QUESTIONS[question])
    assert answer.columns
    expected = ANSWERS[question]
    if expected is None:
        assert answer.rows == []
        return
    assert any(all(value in row for value in expected) for row in answer.rows), answer.rows


def test_each_question_has_its_answer() -> None:
    assert set(QUESTIONS) == set(ANSWERS)


def test_a_rendering_done_twice_would_show(database: Engine, ledger: Ledger) -> None:
    rendered(ledger)
    with ledger.begin() as session:
        session.execute(text("update clips set reused = false, rendered_by = null where reused"))
    question = next(question for question in QUESTIONS if "twice" in question)
    ((_, renderings, clips),) = run_sql(database, QUESTIONS[question]).rows
    assert (renderings, clips) == (2, [f"{REQUEST}-000001-0", f"{REQUEST}-000002-0"])


REFUSED = {
    "commit; drop table clips": "multiple commands",
    "select 1; select 2": "multiple commands",
    "drop table clips": "read-only transaction",
    "delete from clips": "read-only transaction",
    "with gone as (delete from clips returning 1) select * from gone": "read-only transaction",
    "select * from clips": "permission denied for table clips\nHINT:  questions are asked as rushes_reader",
    "select nextval('shards_id_seq')": "read-only transaction|permission denied",
    "select pg_read_file('/etc/passwd')": "permission denied",
    "copy clips to program 'cat'": "permission denied",
    "select * from nowhere": "does not exist",
    "selekt": "syntax error",
    "select pg_sleep(30)": "statement timeout",
    "": "EMPTY_QUERY",
}


@pytest.mark.parametrize("sql", REFUSED)
def test_a_typed_query_changes_nothing_and_takes_no_longer_than_it_may(dailies: Engine, sql: str) -> None:
    with pytest.raises(SqlFailed, match=REFUSED[sql]):
        run_sql(dailies, sql, timeout=1.0)
    assert run_sql(dailies, "select count(*) from history").rows == [(5,)]


def test_a_typed_query_gives_columns_rows_and_no_more_than_asked_for(database: Engine) -> None:
    empty = run_sql(database, "select * from history")
    assert (empty.columns, empty.rows, empty.truncated) == (tuple(COLUMNS), [], False)
    some = run_sql(database, "select n, '50%' as share from generate_series(1, 100000) n", limit=2)
    assert (some.columns, some.rows, some.truncated) == (("n", "share"), [(1, "50%"), (2, "50%")], True)
    assert run_sql(database, "select 1", limit=1).truncated is False
