"""Requests and their clips, from the first line read to the last one accounted for.

Plain functions: they take a session, return values, and leave the transaction to the caller. What engines write is in
leases.py; what people read is in history.py. None of them costs more statements for a million clips than for ten.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timedelta
from operator import attrgetter
from typing import Any, cast

import psycopg
from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    Column,
    Enum,
    Insert,
    MetaData,
    Row,
    Table,
    Text,
    any_,
    case,
    delete,
    distinct,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
    text,
    tuple_,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session, aliased
from sqlalchemy.schema import CreateTable

from db.history import HistoryRow as ClipRow
from db.history import history, rows_of
from db.leases import NO_CHECKPOINT, NewArtifact, adoptable, adopted, end_leases
from db.session import change
from db.tables import (
    ACTIVE,
    PRIORITY,
    TERMINAL,
    Artifact,
    Attempt,
    AttemptStatus,
    Clip,
    ClipDirection,
    ClipMode,
    ClipStatus,
    EdgeKind,
    Engine,
    Model,
    Request,
    RequestStatus,
    Shard,
    ShardStatus,
    Tally,
    Tenant,
    Usage,
)

CHUNK = 1000  # rows that go to or come from the server at a time
_ANALYZE_FROM = 2000  # clips at which a request changes the statistics that plans are made from
ALIVE = 45.0  # seconds since its last sign of life after which an engine counts as gone
_PLANNING = 0x506C616E  # advisory lock: "Plan"


FILES = "files"  # in a card: what of the model lies in the store


class RequestNotFound(LookupError):
    """No request has this id; `rushes history` lists the ids there are."""


class QuotaExceeded(RuntimeError):
    """The tenant may not ask for so much now; the message gives its bound, what it has, and what it asked for."""


class RequestNotReady(RuntimeError):
    """The request is not in the state this step needs; the message says which, and what to do first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRequest:
    key: str  # two requests with one key are one request
    name: str
    tenant: str
    model: str
    model_digest: str
    settings: Mapping[str, Any]
    source: str  # where the prompts came from: an uri, or "inline"
    source_sha256: str
    priority: int = PRIORITY
    deadline: datetime | None = None  # when all should be done
    clips: int | None = None  # that it will have: what a quota counts until they are in
    gpu_seconds: float = 0.0  # that they are expected to take
    flow_run_id: str | None = None
    carrier: Mapping[str, str] = field(default_factory=dict)
    trace_id: str | None = None


@dataclass(frozen=True, slots=True)
class OpenedRequest:
    id: str
    created: bool  # False: this key was known
    status: RequestStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class NewClip:
    """A clip asked for. With `rejected` (the reason) it is kept for the record only, and may lack its settings."""

    index: int
    sample: int
    prompt: str
    custom_id: str | None = None
    rewritten_prompt: str | None = None
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    fps: int | None = None
    steps: int | None = None
    guidance: float | None = None
    solver: str | None = None
    shift: float | None = None
    seed: int | None = None
    recipe: str | None = None
    line: int | None = None
    mode: ClipMode = ClipMode.TEXT_TO_VIDEO
    source: str | None = None  # sha256 of an artifact that the ledger knows: see add_artifacts
    end_source: str | None = None
    direction: ClipDirection | None = None
    strength: float | None = None
    window: int | None = None
    overlap: int | None = None
    made_frames: int | None = None
    step_cache: float | None = None
    fresh: bool = False  # a take that is there already will not do
    parents: tuple[tuple[str, EdgeKind], ...] = ()  # clips it is made from, and how
    rejected: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Unplanned:
    """A clip that waits for a shard, with what its cost depends on."""

    clip_id: str
    index: int
    sample: int
    width: int
    height: int
    frames: int
    steps: int
    guidance: float
    solver: str
    recipe: str
    mode: ClipMode
    strength: float | None
    window: int | None
    made_frames: int | None
    tries: int  # that failed
    losses: int  # of the engine that was at it

    @property
    def suspect(self) -> bool:
        """Something went wrong with it before: it should be alone in its shard."""
        return self.tries + self.losses > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a request stands. `counts` holds every clip status, also those with no clip."""

    request_id: str
    status: RequestStatus
    total: int | None  # None while clips are still being added
    counts: Mapping[ClipStatus, int]
    found: int  # done without rendering
    seconds_done: float  # engine seconds of the clips rendered
    mean_seconds: float | None  # of one rendered clip
    first_started: datetime | None
    engines: int  # with a live lease on a shard of this request
    now: datetime

    @property
    def added(self) -> int:
        return sum(self.counts.values())

    @property
    def waiting(self) -> int:
        """Clips that are not terminal yet."""
        return sum(self.counts[status] for status in ACTIVE)

    @property
    def finished(self) -> bool:
        return self.total is not None and self.waiting == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRow:
    id: int
    status: ShardStatus
    owner: str | None
    attempt: int
    leased_until: datetime | None
    width: int
    height: int
    frames: int
    size: int
    done: int
    running: int
    failed: int  # failed or quarantined
    seconds: float
    created_at: datetime
    claimed_at: datetime | None
    finished_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRow:
    id: str
    key: str
    name: str
    tenant: str
    model: str
    model_digest: str
    settings: dict[str, Any]
    source: str
    source_sha256: str
    priority: int
    status: RequestStatus
    total: int | None
    flow_run_id: str | None
    carrier: dict[str, Any]
    trace_id: str | None
    manifest_key: str | None
    sheet_key: str | None
    created_at: datetime
    finished_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRow:
    id: str
    host: str
    pid: int
    device: str
    partition: str
    model_digest: str
    code_version: str
    flow_run_id: str | None
    started_at: datetime
    heartbeat_at: datetime
    closed_at: datetime | None


# Opening


def request_id(key: str) -> str:
    """The id that belongs to an idempotency key."""
    return "req_" + hashlib.sha256(key.encode()).hexdigest()[:12]


def open_request(session: Session, new: NewRequest) -> OpenedRequest:
    """Open the request, or find the one that was opened with this key. Raises QuotaExceeded for a new one.

    A cancelled one is opened again, its cancelled clips queued, when another flow run asks for it. An open one goes
    over to the flow run that asks.
    """
    known_model = upsert(Model).values(digest=new.model_digest, name=new.model)
    change(session, known_model.on_conflict_do_nothing(index_elements=[Model.digest]))
    change(session, upsert(Tenant).values(name=new.tenant).on_conflict_do_nothing(index_elements=[Tenant.name]))
    values: dict[str, Any] = {**asdict(new), "id": request_id(new.key), "asked": new.clips}
    del values["clips"], values["gpu_seconds"]
    created = upsert(Request).values(values).on_conflict_do_nothing(index_elements=[Request.key])
    if session.execute(created.returning(Request.id)).one_or_none() is not None:
        _check_quota(session, values["id"], new)
        return OpenedRequest(values["id"], True, RequestStatus.OPEN)
    found = _lock_request(session, values["id"])
    status = found.status
    if status == RequestStatus.CANCELLED and found.flow_run_id != new.flow_run_id:
        _queue_again(session, found.id, [ClipStatus.CANCELLED])
        status = RequestStatus.OPEN
    if status == RequestStatus.OPEN:
        asking = {"flow_run_id": new.flow_run_id, "carrier": dict(new.carrier), "trace_id": new.trace_id}
        change(session, update(Request).where(Request.id == found.id).values(asking))
    return OpenedRequest(found.id, False, status)


def _check_quota(session: Session, request_id: str, new: NewRequest) -> None:
    """Raises QuotaExceeded where this request is one too many. Submitters of one tenant take turns from here."""
    tenant = session.execute(
        select(Tenant.max_clips, Tenant.max_gpu_seconds)
        .where(Tenant.name == new.tenant)
        .with_for_update(key_share=True)
    ).one()
    if tenant.max_clips is not None:
        waiting = clips_waiting(session, new.tenant, apart_from=request_id)
        if waiting + (new.clips or 0) > tenant.max_clips:
            raise QuotaExceeded(
                f"tenant {new.tenant} may have {tenant.max_clips:,} clips waiting, has {waiting:,} and asks for "
                f"{new.clips or 0:,} more: wait until some are done, or have the bound raised (`rushes tenants`)"
            )
    if tenant.max_gpu_seconds is not None:
        used = gpu_seconds_of(session, new.tenant, 86400.0)
        if used + new.gpu_seconds > tenant.max_gpu_seconds:
            raise QuotaExceeded(
                f"tenant {new.tenant} may use {tenant.max_gpu_seconds:,.0f} GPU-seconds in 24 hours, has used "
                f"{used:,.0f} and asks for about {new.gpu_seconds:,.0f} more: wait, or have the bound raised "
                "(`rushes tenants`)"
            )


def clips_waiting(session: Session, tenant: str, *, apart_from: str = "") -> int:
    """Clips of a tenant's open requests that have not ended, those included that are announced and not yet added."""
    theirs = select(Request.id, Request.total, Request.asked).where(
        Request.tenant == tenant, Request.status == RequestStatus.OPEN, Request.id != apart_from
    )
    of_request = theirs.subquery("theirs")
    active = select(func.sum(Tally.clips)).where(Tally.request_id == of_request.c.id, Tally.status.in_(ACTIVE))
    counted = func.coalesce(active.correlate(of_request).scalar_subquery(), 0)
    waiting = case((of_request.c.total.is_(None), func.greatest(of_request.c.asked, counted)), else_=counted)
    return session.scalar(select(func.coalesce(func.sum(waiting), 0))) or 0


def gpu_seconds_of(session: Session, tenant: str, seconds: float) -> float:
    """What a tenant's leases took that ended within the last `seconds`."""
    since = func.statement_timestamp() - timedelta(seconds=seconds)
    used = select(func.sum(Usage.gpu_seconds)).where(Usage.tenant == tenant, Usage.minute > since)
    return session.scalar(used) or 0.0


def add_clips(session: Session, request_id: str, clips: Iterable[NewClip]) -> int:
    """Add the clips: one COPY stream into a table of this transaction, and from there in one go.

    Those that are there already are left as they are. Never more than a few are in memory, however many come; `clips`
    may not use this session. Returns how many were new. Nothing is planned before seal_request.
    """
    session.execute(CreateTable(_GIVEN, if_not_exists=True))
    with _driver(session).cursor() as cursor, cursor.copy(_COPY.encode()) as copy:
        for clip in clips:
            parents, kinds = [parent for parent, _ in clip.parents], [str(kind) for _, kind in clip.parents]
            copy.write_row((_clip_id(request_id, clip), request_id, clip.rejected, *_values_of(clip), parents, kinds))
    added = change(session, _TAKE_OVER)
    session.execute(_TAKE_OVER_EDGES)
    session.execute(text(f"truncate {_GIVEN.name}"))  # it may be used again before the transaction ends
    return added


_OF_CLIP = tuple(name for name in NewClip.__slots__ if name not in ("rejected", "parents"))
_values_of = attrgetter(*_OF_CLIP)  # their values, in this order
# Enums are words here: the type of a column of a table that is only passed through need not be the same.
_GIVEN = Table(
    "given_clips",
    MetaData(),
    *(Column(name, Text) for name in ("id", "request_id", "error")),
    *(Column(n, Text if isinstance(c := Clip.__table__.c[n].type, Enum) else c, nullable=True) for n in _OF_CLIP),
    *(Column(name, ARRAY(Text)) for name in ("parents", "kinds")),
    prefixes=["temporary"],
    postgresql_on_commit="DROP",
)
_COPY = f"copy {_GIVEN.name} from stdin"


def _take_over() -> Insert:
    given = [each for each in _GIVEN.c if each.name not in ("parents", "kinds")]
    types = {"mode": Clip.mode.type, "direction": Clip.direction.type}
    taken = [each.cast(types[each.name]) if each.name in types else each for each in given]
    rejected = _GIVEN.c.error.is_not(None)
    status = case((rejected, ClipStatus.REJECTED), else_=ClipStatus.QUEUED).cast(Clip.status.type)
    source = select(*taken, status, case((rejected, func.now()), else_=None))
    into = [*(each.name for each in given), "status", "finished_at"]
    return upsert(Clip).from_select(into, source).on_conflict_do_nothing()


_TAKE_OVER = _take_over()
_TAKE_OVER_EDGES = text(f"""
    insert into edges (child, parent, kind)
    select given.id, made_from.parent, made_from.kind::edge_kind
    from {_GIVEN.name} given cross join unnest(given.parents, given.kinds) made_from (parent, kind)
    on conflict do nothing""")


def _driver(session: Session) -> psycopg.Connection[Any]:
    """The connection of the session's transaction, for what SQLAlchemy has no words for."""
    return cast("psycopg.Connection[Any]", session.connection().connection.driver_connection)


def _clip_id(request_id: str, clip: NewClip) -> str:
    return f"{request_id}-{clip.index:06d}-{clip.sample}"


def seal_request(session: Session, request_id: str, total: int) -> None:
    """All clips are in, `total` of them: planning may begin. Said again with the same total it changes nothing."""
    request = _lock_request(session, request_id)
    there = sum(_counted(session, request_id).values())
    if there != total or request.total not in (None, total):
        said = f"; it was sealed with {request.total}" if request.total is not None else ""
        raise ValueError(
            f"{request_id} has {there} clips, not {total}{said}: add_clips must bring every line exactly once"
        )
    change(session, update(Request).where(Request.id == request_id).values(total=total))
    if request.status == RequestStatus.CANCELLED:  # while its clips were being added
        _end_clips(session, request_id)
    if total >= _ANALYZE_FROM:
        session.execute(text("analyze clips"))


# Tenants


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantRow:
    """A tenant, its share and bounds, and where it stands."""

    name: str
    weight: float
    max_clips: int | None
    max_gpu_seconds: float | None
    waiting: int  # clips that have not ended
    gpu_seconds: float  # of leases that ended in the last 24 hours


def set_tenant(session: Session, name: str, **bounds: Any) -> None:
    """Sets `weight`, `max_clips`, `max_gpu_seconds` (None: any number), those that are given; makes the tenant."""
    known = upsert(Tenant).values(name=name, **bounds)
    if bounds:
        change(session, known.on_conflict_do_update(index_elements=[Tenant.name], set_=bounds))
    else:
        change(session, known.on_conflict_do_nothing(index_elements=[Tenant.name]))


def tenants(session: Session) -> list[TenantRow]:
    """All tenants, by name."""
    return [
        TenantRow(
            name=tenant.name,
            weight=tenant.weight,
            max_clips=tenant.max_clips,
            max_gpu_seconds=tenant.max_gpu_seconds,
            waiting=clips_waiting(session, tenant.name),
            gpu_seconds=gpu_seconds_of(session, tenant.name, 86400.0),
        )
        for tenant in session.scalars(select(Tenant).order_by(Tenant.name))
    ]


# Planning


def adopt_takes(session: Session, request_id: str, *, within: float | None = None) -> int:
    """Every unplanned clip whose recipe was rendered before is done. Returns how many were.

    within: only where that was so many seconds ago at most, which spares reading all unplanned clips.
    """
    _lock_request(session, request_id)
    adopt = update(Clip).where(_unplanned(Clip), Clip.request_id == request_id, adoptable(Clip)).values(adopted())
    if within is not None:
        made = aliased(Clip)
        recent = select(made.recipe).where(made.status == ClipStatus.DONE)
        recent = recent.where(made.finished_at > func.statement_timestamp() - timedelta(seconds=within))
        adopt = adopt.where(Clip.recipe.in_(recent))
    return change(session, adopt)


def unplanned(session: Session, request_id: str, limit: int) -> list[Unplanned]:
    """The next clips to plan, in file order: of each recipe the first one, and only where nobody renders it or has.

    The others wait, and are adopted when the take is there; what failed waits for its next try. Empty until the request
    is sealed.
    """
    twin = aliased(Clip)
    earlier = exists().where(
        twin.request_id == Clip.request_id,
        twin.recipe == Clip.recipe,
        _unplanned(twin),
        tuple_(twin.index, twin.sample) < tuple_(Clip.index, Clip.sample),
    )
    rows = session.execute(
        select(Clip.id.label("clip_id"), *(getattr(Clip, f.name) for f in fields(Unplanned)[1:]))
        .join(Request, Request.id == Clip.request_id)
        .where(Clip.request_id == request_id, _unplanned(Clip), Request.total.is_not(None))
        .where(~earlier, *_nobody_renders(), _its_time_has_come())
        .order_by(Clip.index, Clip.sample)
        .limit(limit)
    )
    return [Unplanned(**row) for row in rows.mappings()]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewShard:
    """Clips of one width, height and frames for one engine to lease together."""

    clip_ids: Sequence[str]
    partition: str | None = None  # the only one whose engines may claim it
    predicted_seconds: float | None = None  # an engine's for all of `clip_ids`; the shard keeps those of its own clips
    predicted_bytes: int | None = None  # of its fullest rank


def create_shard(
    session: Session,
    request_id: str,
    clip_ids: Sequence[str],
    *,
    carrier: Mapping[str, str] | None = None,
    priority: int | None = None,
    partition: str | None = None,
    predicted_seconds: float | None = None,
    predicted_bytes: int | None = None,
) -> int | None:
    """One shard, as create_shards makes it; None where none of its clips can be taken."""
    predicted = {"predicted_seconds": predicted_seconds, "predicted_bytes": predicted_bytes}
    new = NewShard(clip_ids=clip_ids, partition=partition, **predicted)  # type: ignore[arg-type]
    return next(iter(create_shards(session, request_id, [new], carrier=carrier, priority=priority)), None)


def create_shards(
    session: Session,
    request_id: str,
    shards: Sequence[NewShard],
    *,
    carrier: Mapping[str, str] | None = None,
    priority: int | None = None,
) -> list[int]:
    """Put clips into new shards, in this order, and return the shards' ids.

    A clip that meanwhile was taken, cancelled, or whose recipe somebody else renders or has rendered, stays out; a
    shard of which none is left is not made. Engines on which one of its clips failed before leave a shard to others for
    a while. `priority` is the request's when not given. Planners of all requests take turns from here to the end of the
    transaction, so commit soon.

    All shards in as many statements as one takes: whether nobody renders its clips, asked of each shard alone, reads
    all clips that are planned for every one of them, as long as the statistics do not know that there are any.
    """
    request = _lock_request(session, request_id)
    if request.status != RequestStatus.OPEN or request.total is None:
        return []
    session.execute(select(func.pg_advisory_xact_lock(_PLANNING)))
    asked = [clip_id for shard in shards for clip_id in shard.clip_ids]
    takable = select(Clip.id, Clip.width, Clip.height, Clip.frames, Clip.attempts).distinct(Clip.recipe)
    takable = takable.where(
        Clip.id == any_(literal(asked, ARRAY(Text))),
        Clip.request_id == request_id,
        _unplanned(Clip),
        *_nobody_renders(),
    )
    rows = {row.id: row for row in session.execute(takable.order_by(Clip.recipe, Clip.index, Clip.sample))}
    new: list[dict[str, Any]] = []
    taken: list[list[str]] = []
    for shard in shards:
        theirs = [rows.pop(clip_id) for clip_id in shard.clip_ids if clip_id in rows]
        if not theirs:
            continue
        shapes = {(row.width, row.height, row.frames) for row in theirs}
        if len(shapes) > 1:
            said = f"these clips of {request_id} have {len(shapes)}: {sorted(shapes)}"
            raise ValueError(f"a shard renders one shape; {said}")
        ((width, height, frames),) = shapes
        tried = [row.id for row in theirs if row.attempts]
        seconds = shard.predicted_seconds
        new.append(
            {
                "request_id": request_id,
                "priority": request.priority if priority is None else priority,
                "width": width,
                "height": height,
                "frames": frames,
                "size": len(theirs),
                "partition": shard.partition,
                "predicted_seconds": seconds and seconds * len(theirs) / len(shard.clip_ids),
                "predicted_bytes": shard.predicted_bytes,
                "avoid": _failed_on(session, tried, request.model_digest) if tried else None,
                "carrier": dict(carrier or {}),
            }
        )
        taken.append([row.id for row in theirs])
    if not new:
        return []
    made = list(session.scalars(insert(Shard).returning(Shard.id, sort_by_parameter_order=True), new))
    placed = select(
        func.unnest(literal([clip_id for part in taken for clip_id in part], ARRAY(Text))).label("id"),
        func.unnest(
            literal([shard for shard, part in zip(made, taken, strict=True) for _ in part], ARRAY(BigInteger))
        ).label("shard_id"),
    ).cte("placed")
    change(session, update(Clip).where(Clip.id == placed.c.id).values(shard_id=placed.c.shard_id))
    if len(asked) >= _ANALYZE_FROM:  # or the next wave asks of each clip whether any planned one is its twin
        session.execute(text("analyze clips"))
    return made


def _failed_on(session: Session, clip_ids: Sequence[str], model_digest: str) -> list[str] | None:
    """The engines on which one of these clips failed, where there is another one to leave it to."""
    failed = select(Attempt.owner).distinct().where(Attempt.clip_id.in_(clip_ids))
    failed = failed.where(Attempt.status.in_((AttemptStatus.FAILED, AttemptStatus.LOST))).order_by(Attempt.owner)
    owners = list(session.scalars(failed))
    if owners and any(engine.id not in owners for engine in live_engines(session, ALIVE, model_digest=model_digest)):
        return owners
    return None


def unbind_shards(session: Session, request_id: str, partitions: Sequence[str] | None = None) -> int:
    """Queued shards of these partitions, by default of all, may now be claimed by every engine. How many there were."""
    bound = (Shard.request_id == request_id) & (Shard.status == ShardStatus.QUEUED) & Shard.partition.is_not(None)
    if partitions is not None:
        bound &= Shard.partition.in_(partitions)
    return change(session, update(Shard).where(bound).values(partition=None))


def _unplanned(clip: Any) -> Any:
    return (clip.status == ClipStatus.QUEUED) & clip.shard_id.is_(None)


def _its_time_has_come() -> Any:
    return or_(Clip.not_before.is_(None), Clip.not_before <= func.statement_timestamp())


def _nobody_renders() -> tuple[Any, Any]:
    active = aliased(Clip)
    planned = active.status.in_(ACTIVE) & active.shard_id.is_not(None)
    return ~exists().where(active.recipe == Clip.recipe, planned), ~exists().where(adoptable(Clip))


# Watching


def progress(session: Session, request_id: str) -> Progress:
    """Where the request stands, by the counts that are kept: a million clips are as quick as ten."""
    summed = [func.sum(getattr(Tally, name)).label(name) for name in ("clips", "found", "rendered", "seconds")]
    rows = session.execute(
        select(Tally.status, *summed, func.min(Tally.started_at).label("started"))
        .where(Tally.request_id == request_id)
        .group_by(Tally.status)
    ).all()
    live = (Shard.status == ShardStatus.LEASED) & (Shard.leased_until >= func.statement_timestamp())
    engines = select(func.count(distinct(Shard.owner))).where(Shard.request_id == request_id, live).scalar_subquery()
    request = session.execute(
        select(Request.status, Request.total, engines.label("engines"), func.statement_timestamp().label("now")).where(
            Request.id == request_id
        )
    ).one_or_none()
    if request is None:
        raise _not_found(request_id)
    counted = {row.status: int(row.clips) for row in rows}
    rendered_clips = sum(int(row.rendered) for row in rows)
    seconds = sum(float(row.seconds) for row in rows)
    return Progress(
        request_id=request_id,
        status=request.status,
        total=request.total,
        counts={status: counted.get(status, 0) for status in ClipStatus},
        found=sum(int(row.found) for row in rows),
        seconds_done=seconds,
        mean_seconds=seconds / rendered_clips if rendered_clips else None,
        first_started=min((row.started for row in rows if row.started), default=None),
        engines=request.engines,
        now=request.now,
    )


def _counted(session: Session, request_id: str) -> dict[ClipStatus, int]:
    """How many clips of the request there are of every status, by the counts that are kept."""
    summed = select(Tally.status, func.sum(Tally.clips)).where(Tally.request_id == request_id).group_by(Tally.status)
    return {status: int(clips) for status, clips in session.execute(summed)}


def compact(session: Session, request_id: str) -> None:
    """Sums up the kept counts of a request, so that few rows answer for many changes. Safe beside writers."""
    names = ("clips", "found", "rendered", "seconds")
    gone = delete(Tally).where(Tally.request_id == request_id).returning(Tally.__table__).cte("gone")
    summed = select(
        gone.c.request_id, gone.c.status, *(func.sum(gone.c[name]) for name in names), func.min(gone.c.started_at)
    ).group_by(gone.c.request_id, gone.c.status)
    change(session, insert(Tally).from_select(["request_id", "status", *names, "started_at"], summed))


def shard_table(session: Session, request_id: str, *, limit: int | None = None) -> list[ShardRow]:
    """The request's shards, oldest first; with `limit` the newest ones only."""
    ended_badly = Clip.status.in_((ClipStatus.FAILED, ClipStatus.QUARANTINED))
    newest = select(Shard).where(Shard.request_id == request_id).order_by(Shard.id.desc()).limit(limit).subquery()
    shard = aliased(Shard, newest)
    clips = (
        select(
            func.count().filter(Clip.status == ClipStatus.DONE).label("done"),
            func.count().filter(Clip.status == ClipStatus.RUNNING).label("running"),
            func.count().filter(ended_badly).label("failed"),
            func.coalesce(func.sum(Clip.seconds), 0.0).label("seconds"),
        )
        .where(Clip.shard_id == shard.id)
        .lateral("its_clips")
    )
    own = [f.name for f in fields(ShardRow) if f.name not in clips.c]
    rows = session.execute(select(*(getattr(shard, name) for name in own), *clips.c).order_by(shard.id))
    return [ShardRow(**row) for row in rows.mappings()]


def clips_of(session: Session, request_id: str, *, statuses: Sequence[ClipStatus] | None = None) -> Iterator[ClipRow]:
    """The request's clips in file order, read through a server-side cursor."""
    wanted = select(history).where(history.c.request_id == request_id).order_by(history.c.index, history.c.sample)
    if statuses is not None:
        wanted = wanted.where(history.c.status.in_([str(status) for status in statuses]))
    return rows_of(session, wanted)


def request_by(session: Session, id_or_name: str) -> RequestRow | None:
    """The request of this id; else the latest of this name, or of this flow run."""
    mine = or_(Request.id == id_or_name, Request.name == id_or_name, Request.flow_run_id == id_or_name)
    first = select(Request).where(mine).order_by((Request.id == id_or_name).desc(), Request.created_at.desc()).limit(1)
    found = session.scalars(first, execution_options={"populate_existing": True}).one_or_none()
    return None if found is None else _request_row(found)


def latest_requests(session: Session, limit: int = 20) -> list[RequestRow]:
    latest = select(Request).order_by(Request.created_at.desc(), Request.id).limit(limit)
    found = session.scalars(latest, execution_options={"populate_existing": True})
    return [_request_row(request) for request in found]


def _request_row(request: Request) -> RequestRow:
    return RequestRow(**{f.name: getattr(request, f.name) for f in fields(RequestRow)})


# Ending


def finish_request(
    session: Session, request_id: str, *, manifest_key: str | None = None, sheet_key: str | None = None
) -> RequestStatus:
    """Close the request with the state its clips give it, and return that.

    All done: completed. None done: failed. Else completed with gaps. A cancelled one stays cancelled. Keys given
    replace those kept before. Raises RequestNotReady while a clip is still to come.
    """
    request = _lock_request(session, request_id)
    counted = _counted(session, request_id)
    done, there = counted.get(ClipStatus.DONE, 0), sum(counted.values())
    ended = sum(counted.get(status, 0) for status in TERMINAL)
    status = request.status
    if status != RequestStatus.CANCELLED:
        if request.total is None:
            raise RequestNotReady(f"{request_id} is not sealed: add its clips and call seal_request first")
        if ended < there:
            raise RequestNotReady(f"{request_id} has {there - ended} of {there} clips still to come")
        status = RequestStatus.COMPLETED_WITH_GAPS if done else RequestStatus.FAILED
        status = RequestStatus.COMPLETED if done == there else status
    keys = {"manifest_key": manifest_key, "sheet_key": sheet_key}
    finished: dict[str, Any] = {"status": status, "finished_at": func.coalesce(Request.finished_at, func.now())}
    finished.update({name: key for name, key in keys.items() if key is not None})
    change(session, update(Request).where(Request.id == request_id).values(finished))
    return status


def cancel_request(session: Session, request_id: str) -> int:
    """Cancel what is not terminal yet. Returns how many clips that was; nothing happens to a request that has ended.

    Engines learn of it from leases.renew.
    """
    request = _lock_request(session, request_id)
    if request.status != RequestStatus.OPEN:
        return 0
    change(
        session,
        update(Request).where(Request.id == request_id).values(status=RequestStatus.CANCELLED, finished_at=func.now()),
    )
    return _end_clips(session, request_id)


AGAIN = (ClipStatus.FAILED, ClipStatus.QUARANTINED, ClipStatus.CANCELLED)


def retry_request(session: Session, request_id: str, statuses: Sequence[ClipStatus] = AGAIN) -> int:
    """Queue the failed, quarantined and cancelled clips again, or those of `statuses`, each with all tries anew.

    Opens the request again when there were any. Returns how many. Raises RequestNotReady for a request that was
    cancelled before all of its clips were in.
    """
    request = _lock_request(session, request_id)
    if request.total is None:
        raise RequestNotReady(f"{request_id} lacks some of its clips: submit its prompts again")
    return _queue_again(session, request_id, statuses)


def _queue_again(session: Session, request_id: str, statuses: Sequence[ClipStatus]) -> int:
    queued = (
        update(Clip)
        .where(Clip.request_id == request_id, Clip.status.in_(statuses))
        .values(status=ClipStatus.QUEUED, tries=0, losses=0, shard_id=None)
        .values(error=None, finished_at=None, not_before=None)
    )
    count = change(session, queued)
    unsealed = Request.total.is_(None)  # cancelled so early that it may have no clip yet
    change(
        session,
        update(Request)
        .where(Request.id == request_id, or_(unsealed, literal(count > 0, Boolean)))
        .values(status=RequestStatus.OPEN, finished_at=None),
    )
    return count


def _end_clips(session: Session, request_id: str) -> int:
    # Shards first: an engine that writes at this moment is waited for, one that comes later sees the cancelled shard.
    theirs = select(Shard.id).where(
        Shard.request_id == request_id, Shard.status.in_((ShardStatus.QUEUED, ShardStatus.LEASED))
    )
    shard_ids = list(session.scalars(theirs.order_by(Shard.id).with_for_update(key_share=True)))
    change(
        session,
        update(Attempt)
        .where(Attempt.clip_id == Clip.id, Clip.request_id == request_id, Clip.status == ClipStatus.RUNNING)
        .where(Attempt.status == AttemptStatus.RUNNING)
        .values(status=AttemptStatus.CANCELLED, finished_at=func.statement_timestamp()),
    )
    cancelled = (
        update(Clip)
        .where(Clip.request_id == request_id, Clip.status.in_(ACTIVE))
        .values(status=ClipStatus.CANCELLED, finished_at=func.statement_timestamp(), **NO_CHECKPOINT)
    )
    count = change(session, cancelled)
    if shard_ids:
        end_leases(session, shard_ids, ShardStatus.CANCELLED)
    return count


# Models, engines, edges, artifacts


def register_model(session: Session, digest: str, name: str, path: str, card: Mapping[str, Any]) -> None:
    """Note the weights of this digest; said again it refreshes where they lie and adds to what is known of them.

    Weights that lie in the store (db/models.py) keep the name they were added under, whatever their folder is called.
    """
    known = upsert(Model).values(digest=digest, name=name, path=path, card=dict(card))
    stays = case((Model.card.has_key(FILES), Model.name), else_=known.excluded.name)
    change(
        session,
        known.on_conflict_do_update(
            index_elements=[Model.digest],
            set_={"name": stays, "path": path, "card": Model.card.concat(known.excluded.card)},
        ),
    )


def record_scores(session: Session, digest: str, scores: Mapping[str, Any]) -> None:
    """Add to what was measured of the weights of this digest; what has the same name is replaced, all else stays."""
    known = func.coalesce(Model.card["scores"], literal({}, JSONB))
    card = Model.card.concat(func.jsonb_build_object("scores", known.concat(dict(scores)), type_=JSONB))
    change(session, update(Model).where(Model.digest == digest).values(card=card))


def register_engine(
    session: Session,
    owner: str,
    *,
    host: str,
    pid: int,
    device: str,
    partition: str,
    model_digest: str,
    code_version: str,
    flow_run_id: str | None = None,
) -> None:
    """Note an engine that is about to lease shards as `owner`."""
    values = {
        "id": owner,
        "host": host,
        "pid": pid,
        "device": device,
        "partition": partition,
        "model_digest": model_digest,
        "code_version": code_version,
        "flow_run_id": flow_run_id,
        "started_at": func.statement_timestamp(),
        "heartbeat_at": func.statement_timestamp(),
        "closed_at": None,
    }
    change(session, upsert(Engine).values(values).on_conflict_do_update(index_elements=[Engine.id], set_=values))


def engine_heartbeat(session: Session, owner: str) -> None:
    """The engine lives: also one that was closed since it was silent for long, and has come back."""
    alive = {"heartbeat_at": func.statement_timestamp(), "closed_at": None}
    change(session, update(Engine).where(Engine.id == owner).values(alive))


def close_engine(session: Session, owner: str) -> None:
    """The engine has left in order. Its leases are its own to release (or end them with leases.expire_owner)."""
    change(
        session,
        update(Engine)
        .where(Engine.id == owner, Engine.closed_at.is_(None))
        .values(closed_at=func.statement_timestamp()),
    )


def live_engines(session: Session, within_seconds: float, *, model_digest: str | None = None) -> list[EngineRow]:
    """Engines that have not left and gave a sign of life within the last seconds."""
    return _engines(session, _silent_for() <= within_seconds, model_digest)


def silent_engines(session: Session, for_seconds: float) -> list[EngineRow]:
    """Engines that have not left, but gave no sign of life for so long: for tidy to end.

    While the server was down nobody could give one, so silence counts from its start at the earliest.
    """
    server_age = func.extract("epoch", func.statement_timestamp() - func.pg_postmaster_start_time())
    return _engines(session, func.least(_silent_for(), server_age) > for_seconds, None)


def closed_engines(session: Session, within_seconds: float) -> list[EngineRow]:
    """Engines that have left in the last seconds, or were closed as they were silent."""
    ago = func.extract("epoch", func.statement_timestamp() - Engine.closed_at)
    return _engines(session, ago <= within_seconds, None, left=True)


def _silent_for() -> Any:
    return func.extract("epoch", func.statement_timestamp() - Engine.heartbeat_at)


def _engines(session: Session, which: Any, model_digest: str | None, *, left: bool = False) -> list[EngineRow]:
    there = Engine.closed_at.is_not(None) if left else Engine.closed_at.is_(None)
    found = select(Engine).where(there, which).order_by(Engine.started_at, Engine.id)
    if model_digest is not None:
        found = found.where(Engine.model_digest == model_digest)
    engines = session.scalars(found, execution_options={"populate_existing": True})
    return [EngineRow(**{f.name: getattr(engine, f.name) for f in fields(EngineRow)}) for engine in engines]


def add_artifacts(session: Session, stored: Iterable[NewArtifact]) -> None:
    """Note objects that lie in the store already and that clips are made from."""
    if rows := [asdict(artifact) for artifact in stored]:
        change(session, upsert(Artifact).values(rows).on_conflict_do_nothing(index_elements=[Artifact.sha256]))


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedClip:
    """A clip of history that others may be made from."""

    clip_id: str
    status: ClipStatus
    width: int
    height: int
    frames: int
    fps: int
    artifact: NewArtifact | None  # None: it is not done


def clip_by(session: Session, clip_id: str) -> FinishedClip | None:
    """What is known of a clip as a source; None when there is no such clip, or none that was accepted."""
    row = session.execute(
        select(Clip.status, Clip.width, Clip.height, Clip.frames, Clip.fps, *_ARTIFACT)
        .outerjoin(Artifact, Artifact.sha256 == Clip.artifact)
        .where(Clip.id == clip_id, Clip.recipe.is_not(None))
    ).one_or_none()
    if row is None:
        return None
    status, width, height, frames, fps, *stored = row
    names = (each.key for each in _ARTIFACT)
    return FinishedClip(
        clip_id=clip_id,
        status=status,
        width=width,
        height=height,
        frames=frames,
        fps=fps,
        artifact=NewArtifact(**dict(zip(names, stored, strict=True))) if stored[0] else None,
    )


_ARTIFACT = (Artifact.sha256, Artifact.key, Artifact.bytes, Artifact.media_type)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactRow:
    sha256: str
    key: str
    bytes: int
    media_type: str
    created_at: datetime


def artifacts(session: Session) -> Iterator[ArtifactRow]:
    """Every stored object the ledger knows, by key, through a server-side cursor: for the audit."""
    names = [f.name for f in fields(ArtifactRow)]
    stored = select(*(getattr(Artifact, name) for name in names)).order_by(Artifact.key)
    with closing(session.execute(stored, execution_options={"yield_per": CHUNK})) as rows:
        for row in rows.mappings():
            yield ArtifactRow(**row)


def known_keys(session: Session, keys: Sequence[str]) -> set[str]:
    """Those of the object keys that a clip or a request refers to: the others are orphans."""
    of_requests = [Request.manifest_key, Request.sheet_key]
    found = set(session.scalars(select(Artifact.key).where(Artifact.key.in_(keys))))
    for name in of_requests:
        found.update(key for key in session.scalars(select(name).where(name.in_(keys))) if key is not None)
    return found


def _lock_request(session: Session, request_id: str) -> Row[Any]:
    """The request's row, ours until the transaction ends: what concerns all clips of a request happens in turn."""
    row = session.execute(
        select(Request.id, Request.status, Request.total, Request.priority, Request.flow_run_id, Request.model_digest)
        .where(Request.id == request_id)
        .with_for_update(key_share=True)
    ).one_or_none()
    if row is None:
        raise _not_found(request_id)
    return row


def _not_found(request_id: str) -> RequestNotFound:
    return RequestNotFound(f"no request {request_id!r} in the ledger: `rushes history` lists those there are")
