"""Asking the ledger: the view `history`, one row per clip with everything about it.

What the view holds is said once, in COLUMNS; the migration that makes it is checked against that list by a test.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from itertools import islice
from typing import Any, cast

import psycopg
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Double,
    Engine,
    Integer,
    MetaData,
    Select,
    Table,
    Text,
    func,
    or_,
    select,
    text,
)
from sqlalchemy.orm import Session

from db.reproductions import Comparison
from db.roles import READER
from db.tables import Attempt, AttemptStatus, ClipDirection, ClipMode, ClipStatus, Edge, EdgeKind, Reproduction

COLUMNS: dict[str, tuple[Any, str]] = {
    "request_id": (Text, "the request it belongs to"),
    "request_name": (Text, "the request's name"),
    "clip_id": (Text, "request id, line index and sample: req_…-000011-0"),
    "custom_id": (Text, "the submitter's own id for the line, if there was one"),
    "index": (Integer, "position of its line in the prompt file, from 0"),
    "sample": (Integer, "which of the line's samples, from 0"),
    "tenant": (Text, "who asked"),
    "prompt": (Text, "the words as they came"),
    "rewritten_prompt": (Text, "the words the model was given, where they differ"),
    "negative_prompt": (Text, "what the clip should not show"),
    "model": (Text, "the model's name"),
    "model_digest": (Text, "sha256 over the model's files"),
    "width": (Integer, "pixels"),
    "height": (Integer, "pixels"),
    "frames": (Integer, "1 is an image"),
    "fps": (Integer, "frames a second"),
    "steps": (Integer, "denoising steps"),
    "guidance": (Double, "scale of classifier-free guidance"),
    "solver": (Text, "the sampler"),
    "shift": (Double, "of the time steps towards noise"),
    "seed": (BigInteger, "of the noise"),
    "recipe": (Text, "sha256 of all that determines the pixels: equal recipes share one rendering"),
    "status": (Text, "queued running done failed quarantined cancelled rejected"),
    "error": (Text, "why it failed, last failed, or was rejected"),
    "attempts": (Integer, "tries, ever"),
    "found": (Boolean, "done by a rendering that was there already"),
    "engine": (Text, "who made the last attempt"),
    "partition": (Text, "how the model was split: cfg1xsp1xtp2"),
    "code_version": (Text, "of the engine"),
    "text_seconds": (Double, "encoding the prompt"),
    "denoise_seconds": (Double, "the denoising loop"),
    "decode_seconds": (Double, "latents to frames"),
    "encode_seconds": (Double, "frames to MP4 or PNG"),
    "put_seconds": (Double, "storing the bytes"),
    "seconds": (Double, "engine time: the sum of the five stages"),
    "queued_at": (DateTime(timezone=True), "when it was added"),
    "started_at": (DateTime(timezone=True), "when its last attempt began"),
    "finished_at": (DateTime(timezone=True), "when it reached its end state"),
    "object_key": (Text, "where its bytes lie in the store"),
    "sha256": (Text, "of its bytes"),
    "bytes": (BigInteger, "their number"),
    "media_type": (Text, "video/mp4 or image/png"),
    "trace_id": (Text, "of the rendering, else of the request"),
    "parent_clip_id": (Text, "the clip it was made from (the first, where there are several: see edges)"),
    "line": (Integer, "of the prompt file, from 1"),
    "flow_run_id": (Text, "the Prefect flow run of its request"),
    "shard_id": (BigInteger, "the shard it was last part of"),
    "mode": (Text, "text-to-video image image-to-video extend connect loop edit"),
    "source_sha256": (Text, "of what it was made from"),
    "end_source_sha256": (Text, "of what it leads to"),
    "direction": (Text, "of an extension: forward backward"),
    "strength": (Double, "of an edit: 1 keeps nothing of the source"),
    "window": (Integer, "most frames made at once, where it is made in several windows"),
    "overlap": (Integer, "frames that a window takes over from what is known"),
    "made_frames": (Integer, "frames that went through the model, where that is not all of them once"),
    "predicted_seconds": (Double, "engine time, as it was predicted when its shard was planned"),
    "predicted_bytes": (BigInteger, "memory on the fullest rank, predicted"),
    "peak_bytes": (BigInteger, "memory on the fullest rank, measured"),
    "step_cache": (Double, "how little the first block may change for the others to be skipped"),
    "skipped_steps": (Integer, "steps that the step cache answered"),
    "reproductions": (Integer, "times it was rendered again to compare"),
    "lowest_psnr": (Double, "dB, of those that differed"),
    "largest_difference": (Integer, "of any value of 255 in any of them"),
    "priority": (Integer, "of its request: 0 to 9, higher goes first"),
    "deadline": (DateTime(timezone=True), "when its request should be done"),
    "fresh": (Boolean, "a rendering from before it was queued would not do"),
    "host": (Text, "where the last attempt was made"),
    "error_class": (Text, "what kind of failure the last attempt was"),
    "resumed_step": (Integer, "that the last attempt went on from, where an earlier one had come so far"),
}
# In a MetaData of its own: a view is no table that migrations would create.
history = Table("history", MetaData(), *(Column(name, kind) for name, (kind, _) in COLUMNS.items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryRow:
    """A row of the view; COLUMNS says what the values mean."""

    request_id: str
    request_name: str
    clip_id: str
    custom_id: str | None
    index: int
    sample: int
    tenant: str
    prompt: str
    rewritten_prompt: str | None
    negative_prompt: str | None
    model: str
    model_digest: str
    width: int | None
    height: int | None
    frames: int | None
    fps: int | None
    steps: int | None
    guidance: float | None
    solver: str | None
    shift: float | None
    seed: int | None
    recipe: str | None
    status: ClipStatus
    error: str | None
    attempts: int
    found: bool
    engine: str | None
    partition: str | None
    code_version: str | None
    text_seconds: float | None
    denoise_seconds: float | None
    decode_seconds: float | None
    encode_seconds: float | None
    put_seconds: float | None
    seconds: float | None
    queued_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    object_key: str | None
    sha256: str | None
    bytes: int | None
    media_type: str | None
    trace_id: str | None
    parent_clip_id: str | None
    line: int | None
    flow_run_id: str | None
    shard_id: int | None
    mode: ClipMode
    source_sha256: str | None
    end_source_sha256: str | None
    direction: ClipDirection | None
    strength: float | None
    window: int | None
    overlap: int | None
    made_frames: int | None
    predicted_seconds: float | None
    predicted_bytes: int | None
    peak_bytes: int | None
    step_cache: float | None
    skipped_steps: int | None
    reproductions: int
    lowest_psnr: float | None
    largest_difference: int | None
    priority: int
    deadline: datetime | None
    fresh: bool
    host: str | None
    error_class: str | None
    resumed_step: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRow:
    number: int
    status: AttemptStatus
    error: str | None
    error_class: str | None
    host: str | None
    resumed_step: int | None
    shard_id: int
    owner: str
    engine: str
    partition: str
    code_version: str
    text_seconds: float | None
    denoise_seconds: float | None
    decode_seconds: float | None
    encode_seconds: float | None
    put_seconds: float | None
    drift: float | None
    skipped_steps: int | None
    peak_bytes: int | None
    trace_id: str | None
    started_at: datetime
    finished_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReproductionRow(Comparison):
    created_at: datetime


@dataclass(frozen=True, slots=True)
class ClipStory:
    """Everything of one clip."""

    clip: HistoryRow
    attempts: tuple[AttemptRow, ...]  # in order
    parents: tuple[tuple[str, EdgeKind], ...]  # (clip id, how it was used)
    children: tuple[tuple[str, EdgeKind], ...]
    reproductions: tuple[ReproductionRow, ...]  # in order


@dataclass(frozen=True, slots=True)
class Answer:
    """What run_sql found."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    truncated: bool  # there were more rows than were asked for


class SqlFailed(Exception):
    """The database refused the query; the message is the database's own."""

    exit_code = 2


def find_clips(
    session: Session,
    *,
    request: str | None = None,
    status: ClipStatus | None = None,
    prompt: str | None = None,
    since: timedelta | None = None,
    limit: int = 50,
) -> list[HistoryRow]:
    """The newest clips of a request (id or name), of a status, with `prompt` in their words, queued within `since`."""
    found = select(history).order_by(history.c.queued_at.desc(), history.c.index, history.c.sample).limit(limit)
    if request is not None:
        found = found.where(or_(history.c.request_id == request, history.c.request_name == request))
    if status is not None:
        found = found.where(history.c.status == str(status))
    if prompt is not None:
        words = (history.c.prompt, history.c.rewritten_prompt)
        found = found.where(or_(*(column.icontains(prompt, autoescape=True) for column in words)))
    if since is not None:
        found = found.where(history.c.queued_at >= func.now() - since)
    return list(rows_of(session, found))


def show_clip(session: Session, clip_id: str) -> ClipStory | None:
    """The clip's row, its attempts, and what it came from and led to; None when there is no such clip."""
    rows = list(rows_of(session, select(history).where(history.c.clip_id == clip_id)))
    if not rows:
        return None
    tried = select(*_columns(Attempt, AttemptRow)).where(Attempt.clip_id == clip_id)
    attempts = session.execute(tried.order_by(Attempt.number)).mappings()
    compared = select(*_columns(Reproduction, ReproductionRow)).where(Reproduction.clip_id == clip_id)
    reproductions = session.execute(compared.order_by(Reproduction.id)).mappings()
    parents = session.execute(select(Edge.parent, Edge.kind).where(Edge.child == clip_id).order_by(Edge.parent))
    children = session.execute(select(Edge.child, Edge.kind).where(Edge.parent == clip_id).order_by(Edge.child))
    return ClipStory(
        clip=rows[0],
        attempts=tuple(AttemptRow(**row) for row in attempts),
        parents=tuple((row.parent, row.kind) for row in parents),
        children=tuple((row.child, row.kind) for row in children),
        reproductions=tuple(ReproductionRow(**row) for row in reproductions),
    )


def _columns(table: Any, row: type[AttemptRow] | type[ReproductionRow]) -> list[Any]:
    return [getattr(table, field.name) for field in fields(row)]


def rows_of(session: Session, wanted: Select[Any]) -> Iterator[HistoryRow]:
    """Rows of a query over `history`, through a server-side cursor: a million do not lie in memory."""
    # Closed also when the reader stops half-way: an open cursor would hold back the server's clean-up.
    with contextlib.closing(session.execute(wanted, execution_options={"yield_per": 500})) as rows:
        for row in rows:
            values = dict(zip(COLUMNS, row, strict=True))
            values["status"], values["mode"] = ClipStatus(values["status"]), ClipMode(values["mode"])
            values["direction"] = values["direction"] and ClipDirection(values["direction"])
            yield HistoryRow(**values)


def run_sql(engine: Engine, sql: str, *, timeout: float = 30.0, limit: int | None = None) -> Answer:
    """Run one query somebody typed, as `rushes_reader`: it may read `history`, and take `timeout` seconds.

    A login that may not become `rushes_reader`, as those of the app, asks with its own rights; read-only all the same.
    Raises SqlFailed for what the database refuses, a second statement included.
    """
    with engine.connect() as connection, connection.begin() as transaction:
        connection.execute(text("set transaction read only"))
        connection.execute(text("select set_config('statement_timeout', :ms, true)"), {"ms": f"{timeout * 1000:.0f}"})
        role = connection.scalar(text(_ASKED_AS))
        if role is not None:
            connection.exec_driver_sql(f"set local role {role}")
        driver = cast("psycopg.Connection[tuple[Any, ...]]", connection.connection.driver_connection)
        cursor = driver.cursor()
        try:
            # stream: one statement only, so no "commit; drop table" comes through, and no more rows than are wanted.
            with contextlib.closing(cast("Generator[tuple[Any, ...]]", cursor.stream(sql.encode()))) as stream:
                rows = list(stream if limit is None else islice(stream, limit + 1))
            if not rows:  # an empty stream does not say its columns
                cursor.execute(sql.encode(), prepare=True)
            columns = tuple(column.name for column in cursor.description or ())
        except psycopg.Error as error:
            hint = ""
            if isinstance(error, psycopg.errors.InsufficientPrivilege) and role == READER:
                hint = f"\nHINT:  questions are asked as {READER}, who may read the view history and nothing else"
            raise SqlFailed(str(error).strip() + hint) from error
        finally:
            transaction.rollback()
    return Answer(columns, rows[:limit], limit is not None and len(rows) > limit)


# The role to ask as, if there is one to change to. A superuser (the embedded database's own is one) could reach the
# server's files even from a read-only query, so it never stays what it is.
_ASKED_AS = f"""
select rolname from pg_roles
where rolname = '{READER}' and pg_has_role(oid, case when current_setting('server_version_num')::int >= 160000
    then 'set' else 'member' end)
union all
select 'pg_read_all_data' from pg_roles where rolname = current_user and rolsuper
limit 1"""
# Ten questions people ask, as README prints them.
QUERIES: dict[str, str] = {
    "Which model and partition succeed, and how fast?": """\
select model, partition, count(*) as tried, round(avg((status = 'done')::int), 3) as success,
       round(avg(seconds)::numeric, 2) as mean_seconds
from history
where finished_at > now() - interval '1 day' and attempts > 0 and status <> 'cancelled'
group by 1, 2
order by tried desc""",
    "Which clips were slowest, and why?": """\
select clip_id, width, height, frames, steps, seconds, denoise_seconds, left(prompt, 40) as prompt
from history
where finished_at > now() - interval '1 day' and seconds is not null
order by seconds desc
limit 20""",
    "What did each tenant use?": """\
select tenant, count(*) filter (where status = 'done') as clips, count(*) filter (where found) as found,
       round((coalesce(sum(seconds), 0) / 3600)::numeric, 4) as engine_hours, coalesce(sum(bytes), 0) as bytes
from history
where finished_at > now() - interval '1 day'
group by 1
order by engine_hours desc""",
    "What goes wrong most?": """\
select split_part(error, e'\\n', 1) as error, count(*) as clips, min(clip_id) as example
from history
where finished_at > now() - interval '1 day' and status in ('failed', 'quarantined', 'rejected')
group by 1
order by clips desc
limit 20""",
    "How many clips and how much engine time an hour?": """\
select date_trunc('hour', finished_at) as hour, count(*) as clips,
       round(sum(seconds)::numeric, 1) as engine_seconds,
       round(sum(frames / fps::numeric), 1) as footage_seconds
from history
where finished_at > now() - interval '2 days' and status = 'done' and not found
group by 1
order by 1 desc
limit 48""",
    "Was anything rendered twice? (no rows: nothing was)": """\
select recipe, count(*) as renderings, array_agg(clip_id order by clip_id) as clips
from history
where finished_at > now() - interval '1 day' and status = 'done' and not found and not fresh
group by 1
having count(*) > 1""",
    "Where does the time go?": """\
select width, height, frames, count(*) as clips,
       round((100 * sum(text_seconds) / sum(seconds))::numeric, 1) as text_pct,
       round((100 * sum(denoise_seconds) / sum(seconds))::numeric, 1) as denoise_pct,
       round((100 * sum(decode_seconds) / sum(seconds))::numeric, 1) as decode_pct,
       round((100 * sum(encode_seconds) / sum(seconds))::numeric, 1) as encode_pct,
       round((100 * sum(put_seconds) / sum(seconds))::numeric, 1) as put_pct
from history
where finished_at > now() - interval '1 day' and seconds > 0
group by 1, 2, 3
order by clips desc""",
    "Which clips needed more than one attempt?": """\
select clip_id, status, attempts, engine, left(error, 60) as error
from history
where finished_at > now() - interval '1 day' and attempts > 1
order by attempts desc, clip_id
limit 50""",
    "How busy was each engine?": """\
select engine, partition, count(*) as clips, min(started_at) as first, max(finished_at) as last,
       round((100 * sum(seconds))::numeric / nullif(extract(epoch from max(finished_at) - min(started_at)), 0), 1)
         as busy_pct
from history
where finished_at > now() - interval '1 day' and seconds is not null
group by 1, 2
order by clips desc""",
    "Where are the clips about a word?": """\
select clip_id, status, prompt, seed, object_key
from history
where queued_at > now() - interval '1 day' and (prompt ilike '%red%' or rewritten_prompt ilike '%red%')
order by queued_at desc
limit 20""",
}


def clips_of(
    session: Session, request_id: str, *, statuses: Sequence[ClipStatus] | None = None
) -> Iterator[HistoryRow]:
    """The request's clips in file order, read through a server-side cursor."""
    wanted = select(history).where(history.c.request_id == request_id).order_by(history.c.index, history.c.sample)
    if statuses is not None:
        wanted = wanted.where(history.c.status.in_([str(status) for status in statuses]))
    return rows_of(session, wanted)
