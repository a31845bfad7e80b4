"""The ledger: requests, clips, shards, attempts, artifacts, takes, models, engines, edges, and the view `history`.

Revision: 0001, the first

Written as SQL, since that is what it is about. db/tables.py says of every constraint and index what it prevents; a test
compares the two by the database's own catalogs. Creates everything, so it locks nothing that anybody uses.
"""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    for statement in (*ENUMS, *TABLES, *INDEXES, HISTORY):
        op.execute(statement)


def downgrade() -> None:
    op.execute("drop view history")
    for table in ("edges", "takes", "attempts", "clips", "shards", "requests", "engines", "artifacts", "models"):
        op.execute(f"drop table {table}")
    for name in ("edge_kind", "attempt_status", "clip_status", "shard_status", "request_status"):
        op.execute(f"drop type {name}")


ENUMS = (
    "create type request_status as enum ('open', 'completed', 'completed_with_gaps', 'failed', 'cancelled')",
    """create type clip_status as enum
       ('queued', 'running', 'done', 'failed', 'quarantined', 'cancelled', 'rejected')""",
    "create type shard_status as enum ('queued', 'leased', 'done', 'cancelled')",
    "create type attempt_status as enum ('running', 'done', 'failed', 'lost', 'released', 'cancelled')",
    "create type edge_kind as enum ('image', 'extend', 'connect', 'loop', 'edit')",
)

TABLES = (
    """
create table models (
    digest text not null,
    name text not null,
    path text,
    card jsonb default '{}'::jsonb not null,
    created_at timestamptz default now() not null,
    constraint pk_models primary key (digest)
)""",
    """
create table artifacts (
    sha256 text not null,
    key text not null,
    bytes bigint not null,
    media_type text not null,
    created_at timestamptz default now() not null,
    constraint pk_artifacts primary key (sha256),
    constraint uq_artifacts_key unique (key),
    constraint ck_artifacts_sha256 check (sha256 ~ '^[0-9a-f]{64}$'),
    constraint ck_artifacts_bytes check (bytes > 0)
)""",
    """
create table engines (
    id text not null,
    host text not null,
    pid integer not null,
    device text not null,
    partition text not null,
    model_digest text not null,
    code_version text not null,
    flow_run_id text,
    started_at timestamptz default now() not null,
    heartbeat_at timestamptz default now() not null,
    closed_at timestamptz,
    constraint pk_engines primary key (id)
)""",
    """
create table requests (
    id text not null,
    key text not null,
    name text not null,
    tenant text not null,
    model text not null,
    model_digest text not null,
    settings jsonb not null,
    source text not null,
    source_sha256 text not null,
    priority smallint default 50 not null,
    status request_status default 'open' not null,
    total integer,
    flow_run_id text,
    carrier jsonb default '{}'::jsonb not null,
    trace_id text,
    manifest_key text,
    sheet_key text,
    created_at timestamptz default now() not null,
    finished_at timestamptz,
    constraint pk_requests primary key (id),
    constraint uq_requests_key unique (key),
    constraint fk_requests_model_digest foreign key (model_digest) references models (digest),
    constraint ck_requests_priority check (priority between 0 and 100),
    constraint ck_requests_id check (id ~ '^req_[0-9a-f]{12}$'),
    constraint ck_requests_total check (total >= 0),
    constraint ck_requests_finished check ((status = 'open') = (finished_at is null))
)""",
    """
create table shards (
    id bigint generated always as identity,
    request_id text not null,
    status shard_status default 'queued' not null,
    priority smallint not null,
    width integer not null,
    height integer not null,
    frames integer not null,
    size integer not null,
    owner text,
    attempt integer default 0 not null,
    leased_until timestamptz,
    carrier jsonb default '{}'::jsonb not null,
    created_at timestamptz default now() not null,
    claimed_at timestamptz,
    finished_at timestamptz,
    constraint pk_shards primary key (id),
    constraint fk_shards_request_id foreign key (request_id) references requests (id),
    constraint ck_shards_lease
        check ((status = 'leased') = (owner is not null) and (owner is null) = (leased_until is null)),
    constraint ck_shards_attempt check (attempt >= 1 or status not in ('leased', 'done')),
    constraint ck_shards_finished check ((status in ('done', 'cancelled')) = (finished_at is not null)),
    constraint ck_shards_size check (size >= 1),
    constraint ck_shards_priority check (priority between 0 and 100)
)""",
    """
create table clips (
    id text not null,
    request_id text not null,
    index integer not null,
    sample integer not null,
    custom_id text,
    line integer,
    prompt text not null,
    rewritten_prompt text,
    negative_prompt text,
    width integer,
    height integer,
    frames integer,
    fps integer,
    steps integer,
    guidance double precision,
    solver text,
    shift double precision,
    seed bigint,
    recipe text,
    status clip_status default 'queued' not null,
    error text,
    attempts integer default 0 not null,
    tries smallint default 0 not null,
    found boolean default false not null,
    seconds double precision,
    shard_id bigint,
    artifact text,
    queued_at timestamptz default now() not null,
    started_at timestamptz,
    finished_at timestamptz,
    constraint pk_clips primary key (id),
    constraint uq_clips_request_id_index_sample unique (request_id, index, sample),
    constraint fk_clips_request_id foreign key (request_id) references requests (id),
    constraint fk_clips_shard_id foreign key (shard_id) references shards (id),
    constraint fk_clips_artifact foreign key (artifact) references artifacts (sha256),
    constraint ck_clips_position check (index >= 0 and sample >= 0),
    constraint ck_clips_renderable check (
        status = 'rejected'
        or (num_nulls(width, height, frames, fps, steps, guidance, solver, shift, seed, recipe) = 0
            and prompt <> '' and width > 0 and height > 0 and frames > 0 and fps > 0 and steps > 0 and seed >= 0
            and guidance >= 0 and guidance < 'infinity' and shift > 0 and shift < 'infinity')),
    constraint ck_clips_recipe check (recipe ~ '^[0-9a-f]{64}$'),
    constraint ck_clips_done check ((status = 'done') = (artifact is not null)),
    constraint ck_clips_running check (status <> 'running' or (shard_id is not null and started_at is not null)),
    constraint ck_clips_finished check ((status in ('queued', 'running')) = (finished_at is null)),
    constraint ck_clips_error check (status not in ('failed', 'quarantined', 'rejected') or error is not null),
    constraint ck_clips_tries check (tries between 0 and 3 and (status = 'quarantined') = (tries = 3)),
    constraint ck_clips_found check (not found or status = 'done')
)""",
    """
create table attempts (
    clip_id text not null,
    number integer not null,
    shard_id bigint not null,
    shard_attempt integer not null,
    owner text not null,
    engine text not null,
    partition text not null,
    code_version text not null,
    status attempt_status default 'running' not null,
    error text,
    text_seconds double precision,
    denoise_seconds double precision,
    decode_seconds double precision,
    encode_seconds double precision,
    put_seconds double precision,
    drift double precision,
    trace_id text,
    started_at timestamptz default now() not null,
    finished_at timestamptz,
    constraint pk_attempts primary key (clip_id, number),
    constraint fk_attempts_clip_id foreign key (clip_id) references clips (id),
    constraint fk_attempts_shard_id foreign key (shard_id) references shards (id),
    constraint ck_attempts_number check (number >= 1),
    constraint ck_attempts_finished check ((status = 'running') = (finished_at is null))
)""",
    """
create table takes (
    recipe text not null,
    sha256 text not null,
    clip_id text not null,
    created_at timestamptz default now() not null,
    constraint pk_takes primary key (recipe),
    constraint fk_takes_sha256 foreign key (sha256) references artifacts (sha256),
    constraint fk_takes_clip_id foreign key (clip_id) references clips (id),
    constraint ck_takes_recipe check (recipe ~ '^[0-9a-f]{64}$')
)""",
    """
create table edges (
    child text not null,
    parent text not null,
    kind edge_kind not null,
    constraint pk_edges primary key (child, parent, kind),
    constraint fk_edges_child foreign key (child) references clips (id),
    constraint fk_edges_parent foreign key (parent) references clips (id),
    constraint ck_edges_loop check (child <> parent)
)""",
)

INDEXES = (
    "create index ix_engines_live on engines (heartbeat_at) where closed_at is null",
    "create index ix_requests_open on requests (model_digest) where status = 'open'",
    "create index ix_requests_name on requests (name, created_at)",
    "create index ix_requests_created_at on requests (created_at)",
    "create index ix_requests_flow_run_id on requests (flow_run_id)",
    """create index ix_shards_active on shards (request_id, priority desc, id)
       where status in ('queued', 'leased')""",
    "create index ix_shards_leased on shards (leased_until) where status = 'leased'",
    "create index ix_shards_request_id on shards (request_id, id)",
    """create unique index uq_clips_recipe_active on clips (recipe)
       where status in ('queued', 'running') and shard_id is not null""",
    """create unique index uq_clips_custom_id on clips (request_id, custom_id, sample)
       where custom_id is not null and status <> 'rejected'""",
    """create index ix_clips_unplanned on clips (request_id, index, sample)
       where status = 'queued' and shard_id is null""",
    """create index ix_clips_unplanned_recipe on clips (request_id, recipe, index, sample)
       where status = 'queued' and shard_id is null""",
    "create index ix_clips_shard_id on clips (shard_id) where shard_id is not null",
    "create index ix_clips_progress on clips (request_id, status) include (found, seconds, started_at)",
    "create index ix_clips_newest on clips (queued_at desc, index, sample)",
    "create index ix_clips_artifact on clips (artifact) where artifact is not null",
    "create unique index uq_attempts_running on attempts (clip_id) where status = 'running'",
    "create index ix_attempts_engine on attempts (engine, started_at)",
    "create index ix_takes_sha256 on takes (sha256)",
    "create index ix_edges_parent on edges (parent)",
)

HISTORY = """
create view history as
select
    clip.request_id,
    request.name as request_name,
    clip.id as clip_id,
    clip.custom_id,
    clip.index,
    clip.sample,
    request.tenant,
    clip.prompt,
    clip.rewritten_prompt,
    clip.negative_prompt,
    request.model,
    request.model_digest,
    clip.width,
    clip.height,
    clip.frames,
    clip.fps,
    clip.steps,
    clip.guidance,
    clip.solver,
    clip.shift,
    clip.seed,
    clip.recipe,
    clip.status::text as status,
    clip.error,
    clip.attempts,
    clip.found,
    last.engine,
    last.partition,
    last.code_version,
    last.text_seconds,
    last.denoise_seconds,
    last.decode_seconds,
    last.encode_seconds,
    last.put_seconds,
    clip.seconds,
    clip.queued_at,
    clip.started_at,
    clip.finished_at,
    artifact.key as object_key,
    artifact.sha256,
    artifact.bytes,
    artifact.media_type,
    coalesce(last.trace_id, request.trace_id) as trace_id,
    (select edge.parent from edges edge where edge.child = clip.id order by edge.kind, edge.parent limit 1)
        as parent_clip_id,
    clip.line,
    request.flow_run_id,
    clip.shard_id
from clips clip
join requests request on request.id = clip.request_id
left join attempts last on last.clip_id = clip.id and last.number = clip.attempts
left join artifacts artifact on artifact.sha256 = clip.artifact
"""
