"""Claiming a shard: whose turn it is, and one statement that takes the next.

Tenants share GPU-seconds by weight; within a tenant the higher priority goes first and ages upwards. The rows of a
claim are locked with `for update skip locked`, so engines never wait for each other. Time is the database's."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, and_, bindparam, exists, func, or_, select, text, update
from sqlalchemy.orm import Session

from db.artifacts import NewArtifact
from db.fence import HELD, Lease, held_params, now
from db.leases import ResumeState, complete_shard, end_running
from db.renders import reusable, reused
from db.session import change
from db.settings import SETTINGS, ClipSettings
from db.tables import (
    Artifact,
    AttemptStatus,
    Clip,
    ClipDirection,
    ClipMode,
    ClipStatus,
    Request,
    RequestStatus,
    Shard,
    ShardStatus,
)
from db.usage import charge

_AS_STORED = ("negative_prompt", "seed", "recipe", "mode", "direction", "tags", "metadata", "queued_at")
WINDOW = 600.0  # seconds over which tenants share the GPUs by weight
AGEING = 600.0  # seconds without a lease that lift a request's priority by one: nothing waits for ever
AVOID = 30.0  # seconds for which a clip waits for another engine than those on which it failed


@dataclass(frozen=True, slots=True, kw_only=True)
class LeasedClip:
    """All an engine needs to render one clip."""

    clip_id: str
    attempt_no: int  # the number its next attempt will have
    prompt: str  # the rewritten one where there is one
    negative_prompt: str | None
    seed: int
    settings: ClipSettings
    recipe: str
    mode: ClipMode
    direction: ClipDirection | None
    source: NewArtifact | None  # what it is made from
    end_source: NewArtifact | None
    tags: list[str] | None = None
    metadata: dict[str, Any] | None = None
    queued_at: datetime | None = None
    tenant: str | None = None
    resume_state: ResumeState | None = None  # where an earlier attempt had come to


def claim_shard(
    session: Session,
    owner: str,
    *,
    seconds: float,
    model_digest: str,
    partition: str | None = None,
    ranks: int = 1,
    window: float = WINDOW,
    ageing: float = AGEING,
) -> tuple[Lease, list[LeasedClip]] | None:
    """Lease the next shard for `seconds` and return it with the clips still to render; None when there is no work.

    `partition`: the engine's own; shards that were planned for another one are left. None takes any. `ranks`: its GPUs.

    First the tenant that had the fewest GPU-seconds for its weight within `window` seconds; of its requests the one of
    the highest priority, which grows by one with every `ageing` seconds that a request gets no lease; then the earliest
    deadline, the fewest leases, age. A shard whose lease ran out is taken over: what was running in it counts one
    attempt lost, and at the sixth is quarantined.
    """
    turn = _Turn(model_digest, partition, owner, ranks, seconds, window, ageing)
    while (taken := _take_next(session, turn)) is not None:
        lease, before = taken
        if before.status == ShardStatus.LEASED:  # else whoever ended the last lease has put things right
            end_running(session, [lease.shard_id], AttemptStatus.LOST)
        clips = _clips_to_render(session, lease.shard_id)
        if before.status == ShardStatus.LEASED:
            charge(session, before)
        if clips:
            return lease, clips
        complete_shard(session, lease)
    return None


def outranked(session: Session, lease: Lease, *, partition: str | None = None) -> bool:
    """True when this lease should give way: shards of a higher priority of the same tenant and model wait for a GPU.

    `partition`: of the engine, which can do nothing for shards that are for another one. None takes any.

    As many leases give way as shards wait, those of the lowest priority first, and of these the youngest. Priorities
    are taken as they were given: a request that has waited long goes first when a GPU is free, but takes none away.
    """
    mine = (
        select(Shard.priority, Shard.claimed_at, Shard.id, Request.tenant, Request.model_digest)
        .join(Request, Request.id == Shard.request_id)
        .where(HELD)
        .cte("mine")
    )
    same = (Request.tenant == mine.c.tenant) & (Request.model_digest == mine.c.model_digest)
    theirs = select(func.count()).select_from(Shard).join(Request, Request.id == Shard.request_id).join(mine, same)
    waiting = theirs.where(Shard.status == ShardStatus.QUEUED, Request.status == RequestStatus.OPEN)
    if partition is not None:
        waiting = waiting.where(Shard.partition.is_(None) | (Shard.partition == partition))
    waiting = waiting.where(Shard.priority > mine.c.priority).scalar_subquery()
    younger = or_(
        Shard.priority < mine.c.priority,
        and_(Shard.priority == mine.c.priority, Shard.claimed_at > mine.c.claimed_at),
        and_(Shard.priority == mine.c.priority, Shard.claimed_at == mine.c.claimed_at, Shard.id > mine.c.id),
    )
    leased = theirs.where(Shard.status == ShardStatus.LEASED, Shard.leased_until >= now())
    first = leased.where(younger).scalar_subquery()
    return session.scalar(select(first < waiting), held_params(lease)) or False


def others_wait(session: Session, *, model_digest: str, partition: str) -> bool:
    """True when shards of this model are queued that an engine of this partition may not claim."""
    queued = select(Shard.id).join(Request, Request.id == Shard.request_id)
    queued = queued.where(Shard.status == ShardStatus.QUEUED, Shard.partition != partition)
    queued = queued.where(Request.status == RequestStatus.OPEN, Request.model_digest == model_digest)
    return session.scalar(select(queued.exists())) or False


@dataclass(frozen=True, slots=True)
class _Turn:
    """Who asks for work, and by which rules it is shared."""

    model_digest: str
    partition: str | None
    owner: str
    ranks: int
    seconds: float
    window: float
    ageing: float


_CLAIMABLE = """shard.request_id = {request}
          -- what the index ix_shards_active holds, said once more so that it is used
          and shard.status in ('queued', 'leased')
          and (shard.status = 'queued' or shard.leased_until < statement_timestamp())
          and (shard.partition is null or shard.partition = coalesce(:partition, shard.partition))
          and not (coalesce(:owner = any (shard.avoid), false)
                   and shard.created_at > statement_timestamp() - make_interval(secs => :avoid))
        order by shard.priority desc, shard.id
        limit 1"""
# One statement, always the same words: built once here, parsed and planned once by the server for each connection.
CLAIM = text(f"""
with live as materialized (
    -- the leases there are, and the GPU-seconds that each takes within the window, as was predicted or is seen
    select shard.request_id, request.tenant,
           shard.ranks * least(:window, greatest(
               extract(epoch from statement_timestamp() - shard.claimed_at)::float8,
               coalesce(shard.predicted_seconds, shard.size)
           )) as gpu_seconds
    from shards shard join requests request on request.id = shard.request_id
    where shard.status = 'leased' and shard.leased_until >= statement_timestamp()
), used as (
    select tenant, sum(gpu_seconds) as gpu_seconds
    from (
        select tenant, gpu_seconds from live
        union all
        select tenant, gpu_seconds from usage where minute > statement_timestamp() - make_interval(secs => :window)
    ) as both_of_them
    group by tenant
), turn as materialized (
    -- the requests that have work, the one whose turn it is first
    select request.id
    from requests request
    join tenants tenant on tenant.name = request.tenant
    left join used on used.tenant = request.tenant
    cross join lateral (
        select shard.id from shards shard
        where {_CLAIMABLE.format(request="request.id")}
    ) oldest
    cross join lateral (
        select extract(epoch from statement_timestamp() - greatest(request.created_at, max(shard.claimed_at)))::float8
        from shards shard where shard.request_id = request.id
    ) waited (seconds)
    where request.status = 'open' and request.model_digest = :model_digest
    order by coalesce(used.gpu_seconds, 0) / tenant.weight,
             request.priority + floor(waited.seconds / :ageing) desc,
             request.deadline nulls last,
             (select count(*) from live where live.request_id = request.id),
             oldest.id
), first as materialized (
    -- of the first of them that another claim has not emptied meanwhile
    select before.*
    from turn cross join lateral (
        select shard.id, shard.status, shard.request_id, shard.ranks, shard.claimed_at, shard.leased_until
        from shards shard
        where {_CLAIMABLE.format(request="turn.id")}
        for no key update skip locked
    ) before
    limit 1
)
update shards
set status = 'leased', owner = :owner, ranks = :ranks, attempt = shards.attempt + 1,
    leased_until = statement_timestamp() + make_interval(secs => :seconds), claimed_at = statement_timestamp()
from first
where shards.id = first.id
returning shards.attempt, shards.carrier, first.*
""")


def _take_next(session: Session, turn: _Turn) -> tuple[Lease, Row[Any]] | None:
    """The lease, and how the shard was before: its status, and whose GPUs were used for how long if it was leased."""
    row = session.execute(CLAIM, {**asdict(turn), "avoid": AVOID}).one_or_none()
    if row is None:
        return None
    return Lease(row.id, turn.owner, row.attempt, row.request_id, row.carrier), row


def _clips_to_render(session: Session, shard_id: int) -> list[LeasedClip]:
    """The shard's clips still to render. A render of their recipe that came after they were planned is reused."""
    waiting = session.execute(_OF_SHARD, {"shard_id": shard_id}).all()
    if any(row.there for row in waiting):
        queued = (Clip.shard_id == shard_id) & (Clip.status == ClipStatus.QUEUED)
        change(session, update(Clip).where(queued, reusable(Clip)).values(reused()))
        waiting = session.execute(_OF_SHARD, {"shard_id": shard_id}).all()
    return [_leased_clip(row) for row in waiting]


def clip_to_render(session: Session, clip_id: str) -> LeasedClip:
    """All that is needed to render this clip, in any state."""
    return _leased_clip(session.execute(_BY_ID, {"clip_id": clip_id}).one())


_SOURCES = Artifact.__table__.alias("source"), Artifact.__table__.alias("end_source")
_PLAIN = ("clip_id", "attempt_no", "prompt", *_AS_STORED)
_OF_ARTIFACT = tuple(field.name for field in fields(NewArtifact))


def _wanted(which: ColumnElement[bool]) -> Select[Any]:
    """All that is needed to render these clips, in file order; and whether a render of a clip's recipe is there."""
    clip = Clip.__table__.c  # columns and no attributes: the mapper would walk through every row once more
    return (
        select(
            clip.id,
            clip.attempts + 1,
            func.coalesce(clip.rewritten_prompt, clip.prompt),
            *(clip[name] for name in (*_AS_STORED, *SETTINGS)),
            *(clip.resume_key, clip.resume_step, clip.resume_fingerprint),
            *(source.c[name] for source in _SOURCES for name in _OF_ARTIFACT),
            exists().where(reusable(Clip)).label("there"),
            select(Request.tenant).where(Request.id == clip.request_id).scalar_subquery().label("tenant"),
        )
        .outerjoin(_SOURCES[0], _SOURCES[0].c.sha256 == clip.source)
        .outerjoin(_SOURCES[1], _SOURCES[1].c.sha256 == clip.end_source)
        .where(which)
        .order_by(clip.index, clip.sample)
    )


_OF_SHARD = _wanted((Clip.shard_id == bindparam("shard_id")) & (Clip.status == ClipStatus.QUEUED))
_BY_ID = _wanted(Clip.id == bindparam("clip_id"))


def _leased_clip(row: Row[Any]) -> LeasedClip:
    after = len(_PLAIN) + len(SETTINGS)
    key, step, fingerprint = row[after : after + 3]
    return LeasedClip(
        **dict(zip(_PLAIN, row, strict=False)),
        tenant=row.tenant,
        settings=ClipSettings(**dict(zip(SETTINGS, row[len(_PLAIN) : after], strict=True))),
        source=_artifact(row, after + 3),
        end_source=_artifact(row, after + 3 + len(_OF_ARTIFACT)),
        resume_state=None if key is None else ResumeState(key=key, step=step, fingerprint=fingerprint),
    )


def _artifact(row: Row[Any], at: int) -> NewArtifact | None:
    """The one whose columns begin there."""
    if row[at] is None:
        return None
    return NewArtifact(**dict(zip(_OF_ARTIFACT, row[at : at + len(_OF_ARTIFACT)], strict=True)))
