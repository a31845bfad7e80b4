"""Asking the ledger: clips by request, state and words; one clip's story; and SQL that somebody typed."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from itertools import islice
from typing import Any, cast

import psycopg
from sqlalchemy import Connection, Engine, Select, func, or_, select, text
from sqlalchemy.orm import Session

from db.reproductions import Comparison
from db.roles import PLANNING, READER, SEARCH_PATH
from db.tables import Attempt, AttemptStatus, Clip, ClipStatus, Edge, EdgeKind, Reproduction
from db.view import COLUMNS, HistoryRow, history, row_of


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
    """The answer of run_sql."""

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
    tags: Sequence[str] = (),
    tenant: str | None = None,
    model: str | None = None,
    since: timedelta | None = None,
    limit: int = 50,
) -> list[HistoryRow]:
    """The newest clips of a request (id or name), of a status, with `prompt` in their words, with all of `tags`, queued
    within `since`.

    model: its name, or the beginning of its digest.
    """
    found = select(history).order_by(history.c.queued_at.desc(), history.c.index, history.c.sample).limit(limit)
    if request is not None:
        found = found.where(or_(history.c.request_id == request, history.c.request_name == request))
    if status is not None:
        found = found.where(history.c.status == str(status))
    if prompt is not None:
        words = (history.c.prompt, history.c.rewritten_prompt)
        found = found.where(or_(*(column.icontains(prompt, autoescape=True) for column in words)))
    if tags:
        found = found.where(history.c.tags.contains(list(tags)))
    if tenant is not None:
        found = found.where(history.c.tenant == tenant)
    if model is not None:
        found = found.where(or_(history.c.model == model, history.c.model_digest.startswith(model, autoescape=True)))
    if since is not None:
        found = found.where(history.c.queued_at >= func.now() - since)
    return list(rows_of(session, found))


def find_by_id(session: Session, clip_id: str) -> HistoryRow | None:
    """The clip of this id."""
    return next(rows_of(session, select(history).where(history.c.clip_id == clip_id)), None)


def find_by_custom_id(session: Session, custom_id: str, *, limit: int = 10) -> list[HistoryRow]:
    """The clips whose submitter called them so, newest first."""
    found = select(Clip.id).where(Clip.custom_id == custom_id).order_by(Clip.queued_at.desc(), Clip.sample)
    return _newest_by_id(session, found.limit(limit))


def find_by_digest(session: Session, digest: str, *, limit: int = 10) -> list[HistoryRow]:
    """The clips whose file or recipe has this digest, or one that begins so: rendered ones first, then the newest."""
    of_file = Clip.artifact.startswith(digest, autoescape=True)
    found = select(Clip.id).where(or_(of_file, Clip.recipe.startswith(digest, autoescape=True)))
    return _newest_by_id(session, found.order_by(Clip.reused, Clip.queued_at.desc()).limit(limit))


def _newest_by_id(session: Session, chosen: Select[tuple[str]]) -> list[HistoryRow]:
    ids = list(session.scalars(chosen))
    rows = {row.clip_id: row for row in rows_of(session, select(history).where(history.c.clip_id.in_(ids)))}
    return [rows[each] for each in ids if each in rows]


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
            yield row_of(dict(zip(COLUMNS, row, strict=True)))


STANDING = (  # columns of ask.requests
    *("request_id", "name", "status", "done", "failed", "quarantined", "cancelled", "rejected", "clips_left", "total"),
    *("clips_per_minute", "eta", "tenant", "priority", "model", "created_at", "finished_at"),
)


def standings(session: Session, *, limit: int) -> list[dict[str, Any]]:
    """Where the latest requests stand, newest first: the columns STANDING of the view ask.requests."""
    asked = text(f"select {', '.join(STANDING)} from ask.requests order by created_at desc, request_id limit :limit")
    return [dict(row) for row in session.execute(asked, {"limit": limit}).mappings()]


def pairs_that_differ(
    session: Session, one: str, other: str, columns: Sequence[str], *, limit: int
) -> list[tuple[str, dict[str, Any] | None, dict[str, Any] | None]]:
    """Clips of two requests that differ in one of these columns of history, or that one of them lacks.

    Each as the name of its line, and the two rows. Clips are the same line's where custom_id, or else the prompt, and
    sample are the same.
    """
    differ = " or ".join(f'a."{name}" is distinct from b."{name}"' for name in columns)
    lines = """select h.*, coalesce(custom_id, prompt) as named,
        row_number() over (partition by coalesce(custom_id, prompt), sample order by "index") as nth
        from history h where request_id = """
    asked = text(f"""
        with a as ({lines} :one), b as ({lines} :other)
        select coalesce(a.named, b.named) as named, to_jsonb(a) as a, to_jsonb(b) as b
        from a full join b on a.named = b.named and a.sample = b.sample and a.nth = b.nth
        where a.clip_id is null or b.clip_id is null or {differ}
        order by coalesce(a."index", b."index"), coalesce(a.sample, b.sample), coalesce(a.nth, b.nth) limit :limit""")
    rows = session.execute(asked, {"one": one, "other": other, "limit": limit})
    return [(row.named, row.a, row.b) for row in rows]


def run_sql(engine: Engine, sql: str, *, timeout: float = 30.0, limit: int | None = None) -> Answer:
    """Run one query somebody typed, as `rushes_reader`: it may read `history` and the views of `ask`, whose schema it
    need not name (`requests` is `ask.requests`), and take `timeout` seconds.

    A login that may not become `rushes_reader`, as those of the app, asks with its own rights; read-only all the same.
    Raises SqlFailed for what the database refuses, a second statement included.
    """
    with engine.connect() as connection, connection.begin() as transaction:
        settings = {"statement_timeout": f"{timeout * 1000:.0f}", "search_path": SEARCH_PATH, **PLANNING}
        each = ", ".join(f"set_config('{name}', :{name}, true)" for name in settings)
        connection.execute(text(f"select {each}"), settings)
        role = as_reader(connection)
        driver = cast("psycopg.Connection[tuple[Any, ...]]", connection.connection.driver_connection)
        cursor = driver.cursor()
        try:
            # stream: one statement only, so no "commit; drop table" comes through, and no more rows than are wanted.
            with contextlib.closing(cast("Generator[tuple[Any, ...]]", cursor.stream(sql.encode()))) as stream:
                rows = list(stream if limit is None else islice(stream, limit + 1))
            columns = tuple(column.name for column in cursor.description or ())
            if not rows:  # an empty stream does not say its columns, and to ask once more takes as long again
                driver.pgconn.prepare(b"", sql.encode())
                described = driver.pgconn.describe_prepared(b"")
                columns = tuple((described.fname(place) or b"").decode() for place in range(described.nfields))
        except psycopg.Error as error:
            hint = ""
            if isinstance(error, psycopg.errors.InsufficientPrivilege) and role == READER:
                hint = f"\nHINT:  questions are asked as {READER}, who may read {SEEN} and nothing else"
            raise SqlFailed(str(error).strip() + hint) from error
        finally:
            transaction.rollback()
    return Answer(columns, rows[:limit], limit is not None and len(rows) > limit)


def as_reader(connection: Connection) -> str | None:
    """Have the transaction of a connection read only, and as `rushes_reader` where its login may become that role.

    Returns the role that it has become.
    """
    connection.execute(text("set transaction read only"))
    role = connection.scalar(text(_ASKED_AS))
    if role is not None:
        connection.exec_driver_sql(f"set local role {role}")
    return role


SEEN = "history and the views of the schema ask,"
# The role to ask as, if there is one to change to. A superuser could reach the server's files even from a read-only
# query, so it never stays what it is.
_ASKED_AS = f"""
select rolname from pg_roles
where rolname = '{READER}' and pg_has_role(oid, case when current_setting('server_version_num')::int >= 160000
    then 'set' else 'member' end)
union all
select 'pg_read_all_data' from pg_roles where rolname = current_user and rolsuper
limit 1"""


def clips_of(
    session: Session, request_id: str, *, statuses: Sequence[ClipStatus] | None = None
) -> Iterator[HistoryRow]:
    """The request's clips in file order, read through a server-side cursor."""
    wanted = select(history).where(history.c.request_id == request_id).order_by(history.c.index, history.c.sample)
    if statuses is not None:
        wanted = wanted.where(history.c.status.in_([str(status) for status in statuses]))
    return rows_of(session, wanted)


def first_clips(session: Session, request_id: str, statuses: Sequence[ClipStatus], *, limit: int) -> list[HistoryRow]:
    """The first clips of these statuses in file order."""
    chosen = select(Clip.id).where(Clip.request_id == request_id, Clip.status.in_(statuses))
    return _rows_by_id(session, chosen.order_by(Clip.index, Clip.sample).limit(limit))


def spread_clips(session: Session, request_id: str, *, every: int, limit: int) -> list[HistoryRow]:
    """The first done clip in file order, and every so many-th one after it."""
    order = Clip.index, Clip.sample
    number = func.row_number().over(order_by=order).label("number")
    done = select(Clip.id, number).where(Clip.request_id == request_id, Clip.status == ClipStatus.DONE).subquery()
    chosen = select(done.c.id).where((done.c.number - 1) % every == 0)
    return _rows_by_id(session, chosen.order_by(done.c.number).limit(limit))


def _rows_by_id(session: Session, chosen: Select[tuple[str]]) -> list[HistoryRow]:
    """The rows of these clips in file order; the view is asked by id, so that it is never read as a whole."""
    ids = list(session.scalars(chosen))
    wanted = select(history).where(history.c.clip_id.in_(ids)).order_by(history.c.index, history.c.sample)
    return list(rows_of(session, wanted)) if ids else []
