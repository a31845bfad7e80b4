"""The ledger as it was first released: enums, tables, indexes, kept counts and roles.

Revision: 0001, the first

Written as SQL, since that is what it is about. db/tables.py says of every constraint and index what it prevents; a test
compares the two by the database's own catalogs. Creates everything, so it locks nothing that anybody uses. The view
`history` is made after the migrations, from the columns that db/view.py lists (see `settle_views`).
"""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    for statement in (*ENUMS, *TABLES, *INDEXES, *STATISTICS, *COUNTS, TRIGRAMS):
        op.execute(statement)
    # Where somebody made the schema by hand, everybody could make tables in it before Postgres 15.
    op.execute("revoke create on schema public from public")
    for role in ROLES:
        op.execute(MAKE.format(role=role))
    op.execute(GRANT)


def downgrade() -> None:
    """Remove everything. Logins that were let in by the roles alone are locked out."""
    for role in ROLES:
        op.execute(DROP.format(role=role))
    op.execute("drop view if exists history")
    op.execute("drop schema if exists ask cascade")  # whose views are made after the migrations, as history is
    op.execute("drop function tally_clips() cascade")  # with its triggers
    op.execute("drop function tally(boolean, clips)")
    for kind, statements in (("table", TABLES), ("type", ENUMS)):
        names = [statement.split()[2] for statement in statements]
        op.execute(f"drop {kind} {', '.join(names)}")


ENUMS = (
    "create type request_status as enum ('open', 'paused', 'completed', 'completed_with_gaps', 'failed', 'cancelled')",
    """create type clip_status as enum
       ('queued', 'running', 'done', 'failed', 'quarantined', 'cancelled', 'rejected')""",
    "create type shard_status as enum ('queued', 'leased', 'done', 'cancelled')",
    "create type attempt_status as enum ('running', 'done', 'failed', 'lost', 'released', 'cancelled', 'gone')",
    "create type edge_kind as enum ('image', 'extend', 'connect', 'loop', 'edit', 'take')",
    """create type clip_mode as enum
       ('text-to-video', 'image', 'image-to-video', 'extend', 'connect', 'loop', 'edit')""",
    "create type clip_direction as enum ('forward', 'backward')",
    "create type caption_origin as enum ('world', 'files', 'captioner', 'vision')",
)

TABLES = (
    """
create table datasets (
    id text not null,
    key text not null,
    name text not null,
    source text not null,
    licence text,
    seed bigint,
    fps integer not null,
    captions caption_origin not null,
    author text,
    parent text,
    digest text,
    clips integer,
    shapes jsonb default '{}'::jsonb not null,
    created_at timestamptz default now() not null,
    sealed_at timestamptz,
    constraint pk_datasets primary key (id),
    constraint uq_datasets_key unique (key),
    constraint fk_datasets_parent foreign key (parent) references datasets (id),
    constraint ck_datasets_id check (id ~ '^set_[0-9a-f]{12}$'),
    constraint ck_datasets_digest check (digest ~ '^[0-9a-f]{64}$'),
    constraint ck_datasets_sealed check (num_nulls(digest, clips, sealed_at) in (0, 3) and clips > 0),
    constraint ck_datasets_author check (
        (captions in ('captioner', 'vision')) = (author is not null) and (author is null) = (parent is null)),
    constraint ck_datasets_seed check ((source = 'world') = (seed is not null)),
    constraint ck_datasets_fps check (fps > 0)
)""",
    """
create table models (
    digest text not null,
    name text not null,
    path text,
    card jsonb default '{}'::jsonb not null,
    created_at timestamptz default now() not null,
    dataset_id text,
    constraint pk_models primary key (digest),
    constraint fk_models_dataset_id foreign key (dataset_id) references datasets (id)
)""",
    """
create table artifacts (
    sha256 text not null,
    key text not null,
    bytes bigint not null,
    media_type text not null,
    created_at timestamptz default now() not null,
    lost_at timestamptz,
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
    ready_at timestamptz,
    error text,
    constraint pk_engines primary key (id)
)""",
    """
create table tenants (
    name text not null,
    weight double precision default 1 not null,
    max_clips integer,
    max_gpu_seconds double precision,
    created_at timestamptz default now() not null,
    constraint pk_tenants primary key (name),
    constraint ck_tenants_weight check (weight > 0 and weight < 'infinity'),
    constraint ck_tenants_quota check (max_clips >= 0 and max_gpu_seconds >= 0 and max_gpu_seconds < 'infinity')
)""",
    """
create table usage (
    tenant text not null,
    minute timestamptz not null,
    part smallint not null,
    gpu_seconds double precision not null,
    constraint pk_usage primary key (tenant, minute, part),
    constraint fk_usage_tenant foreign key (tenant) references tenants (name),
    constraint ck_usage_gpu_seconds check (gpu_seconds >= 0)
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
    priority smallint default 5 not null,
    deadline timestamptz,
    asked integer,
    status request_status default 'open' not null,
    total integer,
    flow_run_id text,
    watched_at timestamptz,
    tries smallint default 0 not null,
    ended_before integer default 0 not null,
    carrier jsonb default '{}'::jsonb not null,
    trace_id text,
    manifest_key text,
    sheet_key text,
    tags text[],
    metadata jsonb,
    created_at timestamptz default now() not null,
    finished_at timestamptz,
    constraint pk_requests primary key (id),
    constraint uq_requests_key unique (key),
    constraint fk_requests_tenant foreign key (tenant) references tenants (name),
    constraint fk_requests_model_digest foreign key (model_digest) references models (digest),
    constraint ck_requests_priority check (priority between 0 and 9),
    constraint ck_requests_id check (id ~ '^req_[0-9a-f]{12}$'),
    constraint ck_requests_total check (total >= 0 and asked >= 0),
    constraint ck_requests_finished check ((status in ('open', 'paused')) = (finished_at is null)),
    constraint ck_requests_labels check (
        cardinality(tags) > 0 and array_position(tags, null) is null and jsonb_typeof(metadata) = 'object')
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
    partition text,
    predicted_seconds double precision,
    predicted_bytes bigint,
    avoid text[],
    owner text,
    ranks integer default 1 not null,
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
    constraint ck_shards_size check (size >= 1 and ranks >= 1),
    constraint ck_shards_predicted check (predicted_seconds > 0 and predicted_bytes > 0),
    constraint ck_shards_priority check (priority between 0 and 9)
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
    not_understood text,
    unread_words integer,
    negative_prompt text,
    width integer,
    height integer,
    frames integer,
    fps integer,
    steps integer,
    guidance double precision,
    solver text,
    shift double precision,
    step_cache double precision,
    guidance_2 double precision,
    strength double precision,
    "window" integer,
    overlap integer,
    seed bigint,
    recipe text,
    mode clip_mode default 'text-to-video' not null,
    source text,
    end_source text,
    direction clip_direction,
    made_frames integer,
    tags text[],
    metadata jsonb,
    status clip_status default 'queued' not null,
    error text,
    attempts integer default 0 not null,
    failures smallint default 0 not null,
    lost_attempts smallint default 0 not null,
    reused boolean default false not null,
    rendered_by text,
    fresh boolean default false not null,
    not_before timestamptz,
    resume_key text,
    resume_step integer,
    resume_fingerprint text,
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
    constraint fk_clips_rendered_by foreign key (rendered_by) references clips (id),
    constraint fk_clips_artifact foreign key (artifact) references artifacts (sha256),
    constraint fk_clips_source foreign key (source) references artifacts (sha256),
    constraint fk_clips_end_source foreign key (end_source) references artifacts (sha256),
    constraint ck_clips_position check (index >= 0 and sample >= 0),
    constraint ck_clips_renderable check (
        status = 'rejected'
        or (num_nulls(width, height, frames, fps, steps, guidance, solver, shift, seed, recipe) = 0
            and prompt <> '' and width > 0 and height > 0 and frames > 0 and fps > 0 and steps > 0 and seed >= 0
            and guidance >= 0 and guidance < 'infinity' and shift > 0 and shift < 'infinity')),
    constraint ck_clips_recipe check (recipe ~ '^[0-9a-f]{64}$'),
    constraint ck_clips_mode check (
        status = 'rejected'
        or ((mode not in ('image-to-video', 'extend', 'connect', 'edit') or source is not null)
            and (mode not in ('text-to-video', 'image') or source is null)
            and (mode = 'connect') = (end_source is not null) and (mode = 'extend') = (direction is not null)
            and (mode = 'edit') = (strength is not null) and (strength is null or strength > 0 and strength <= 1))),
    constraint ck_clips_windows check (overlap >= 1 and "window" > overlap and made_frames >= 1),
    constraint ck_clips_step_cache check (step_cache > 0 and step_cache < 'infinity'),
    constraint ck_clips_guidance_2 check (guidance_2 >= 0 and guidance_2 < 'infinity'),
    constraint ck_clips_labels check (
        cardinality(tags) > 0 and array_position(tags, null) is null and jsonb_typeof(metadata) = 'object'),
    constraint ck_clips_done check ((status = 'done') = (artifact is not null)),
    constraint ck_clips_running check (status <> 'running' or (shard_id is not null and started_at is not null)),
    constraint ck_clips_finished check ((status in ('queued', 'running')) = (finished_at is null)),
    constraint ck_clips_error check (status not in ('failed', 'quarantined', 'rejected') or error is not null),
    constraint ck_clips_failures check (
        failures between 0 and 3 and lost_attempts between 0 and 6
        and (status = 'quarantined') = (failures = 3 or lost_attempts = 6)),
    constraint ck_clips_reused check (not reused or (status = 'done' and rendered_by is not null)),
    constraint ck_clips_resume check (
        (resume_key is null or status in ('queued', 'running')) and resume_step >= 1
        and num_nulls(resume_key, resume_step, resume_fingerprint) in (0, 3))
)""",
    """
create table tallies (
    id bigint generated always as identity,
    request_id text not null,
    status clip_status not null,
    clips integer not null,
    reused integer not null,
    rendered integer not null,
    seconds double precision not null,
    bytes bigint not null,
    started_at timestamptz,
    constraint pk_tallies primary key (id)
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
    error_class text,
    host text,
    resumed_step integer,
    text_seconds double precision,
    denoise_seconds double precision,
    decode_seconds double precision,
    encode_seconds double precision,
    put_seconds double precision,
    skipped_steps integer,
    peak_bytes bigint,
    trace_id text,
    started_at timestamptz default now() not null,
    finished_at timestamptz,
    constraint pk_attempts primary key (clip_id, number),
    constraint fk_attempts_clip_id foreign key (clip_id) references clips (id),
    constraint fk_attempts_shard_id foreign key (shard_id) references shards (id),
    constraint ck_attempts_number check (number >= 1),
    constraint ck_attempts_measured check (skipped_steps >= 0 and peak_bytes > 0 and resumed_step >= 1),
    constraint ck_attempts_error_class check (status <> 'failed' or error_class is not null),
    constraint ck_attempts_finished check ((status = 'running') = (finished_at is null))
)""",
    """
create table renders (
    recipe text not null,
    sha256 text not null,
    clip_id text not null,
    created_at timestamptz default now() not null,
    constraint pk_renders primary key (recipe),
    constraint fk_renders_sha256 foreign key (sha256) references artifacts (sha256),
    constraint fk_renders_clip_id foreign key (clip_id) references clips (id),
    constraint ck_renders_recipe check (recipe ~ '^[0-9a-f]{64}$')
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
    """
create table reproductions (
    id bigint generated always as identity,
    clip_id text not null,
    partition text not null,
    device text not null,
    code_version text not null,
    step_cache double precision,
    sha256 text not null,
    identical boolean not null,
    psnr double precision,
    largest integer not null,
    seconds double precision not null,
    created_at timestamptz default now() not null,
    constraint pk_reproductions primary key (id),
    constraint fk_reproductions_clip_id foreign key (clip_id) references clips (id),
    constraint ck_reproductions_sha256 check (sha256 ~ '^[0-9a-f]{64}$'),
    constraint ck_reproductions_drift check (
        largest between 0 and 255 and identical = (largest = 0) and identical = (psnr is null))
)""",
    """
create table rewrites (
    key text not null,
    rewriter text not null,
    prompt text not null,
    moving boolean not null,
    rewritten text,
    not_understood text,
    created_at timestamptz default now() not null,
    constraint pk_rewrites primary key (key),
    constraint ck_rewrites_key check (key ~ '^[0-9a-f]{64}$'),
    constraint ck_rewrites_rewritten check (rewritten <> '')
)""",
    """
create table dataset_clips (
    dataset_id text not null,
    index integer not null,
    file text not null,
    sha256 text not null,
    start integer not null,
    width integer not null,
    height integer not null,
    frames integer not null,
    caption text not null,
    constraint pk_dataset_clips primary key (dataset_id, index),
    constraint fk_dataset_clips_dataset_id foreign key (dataset_id) references datasets (id),
    constraint ck_dataset_clips_position check (index >= 0 and start >= 0),
    constraint ck_dataset_clips_sha256 check (sha256 ~ '^[0-9a-f]{64}$'),
    constraint ck_dataset_clips_shape check (width > 0 and height > 0 and frames > 0)
)""",
)

INDEXES = (
    "create index ix_engines_live on engines (heartbeat_at) where closed_at is null",
    "create index ix_usage_minute on usage (minute) include (tenant, gpu_seconds)",
    "create index ix_requests_open on requests (model_digest) where status = 'open'",
    "create index ix_requests_open_tenant on requests (tenant) where status in ('open', 'paused')",
    "create index ix_requests_name on requests (name, created_at)",
    "create index ix_requests_created_at on requests (created_at)",
    "create index ix_requests_flow_run_id on requests (flow_run_id)",
    "create index ix_requests_tags on requests using gin (tags) where tags is not null",
    "create index ix_requests_metadata on requests using gin (metadata jsonb_path_ops) where metadata is not null",
    """create index ix_shards_active on shards (request_id, priority desc, id)
       where status in ('queued', 'leased')""",
    "create index ix_shards_leased on shards (leased_until) where status = 'leased'",
    "create index ix_shards_request_id on shards (request_id, id)",
    "create index ix_shards_claimed_at on shards (request_id, claimed_at)",
    """create unique index uq_clips_recipe_active on clips (recipe)
       where status in ('queued', 'running') and shard_id is not null""",
    """create unique index uq_clips_custom_id on clips (request_id, custom_id, sample)
       where custom_id is not null and status <> 'rejected'""",
    "create unique index uq_clips_resume_key on clips (resume_key) where resume_key is not null",
    """create index ix_clips_unplanned on clips (request_id, index, sample)
       where status = 'queued' and shard_id is null""",
    """create index ix_clips_unplanned_recipe on clips (request_id, recipe, index, sample)
       where status = 'queued' and shard_id is null""",
    "create index ix_clips_shard_id on clips (shard_id) where shard_id is not null",
    "create index ix_clips_finished_at on clips (finished_at) where finished_at is not null",
    "create index ix_clips_newest on clips (queued_at desc, index, sample)",
    "create index ix_clips_tags on clips using gin (tags) where tags is not null",
    "create index ix_clips_metadata on clips using gin (metadata jsonb_path_ops) where metadata is not null",
    "create index ix_clips_artifact on clips (artifact) where artifact is not null",
    "create index ix_clips_source on clips (source) where source is not null",
    "create index ix_clips_ended_badly on clips (request_id, index, sample)"
    " where status in ('failed', 'quarantined', 'rejected')",
    "create index ix_tallies_request_id on tallies (request_id)",
    "create unique index uq_attempts_running on attempts (clip_id) where status = 'running'",
    "create index ix_attempts_engine on attempts (engine, started_at)",
    """create index ix_attempts_started_at on attempts using brin
       (started_at, ((started_at at time zone 'UTC')::date)) with (pages_per_range = 32, autosummarize = on)""",
    "create index ix_renders_sha256 on renders (sha256)",
    "create index ix_edges_parent on edges (parent)",
    "create index ix_reproductions_clip_id on reproductions (clip_id, id)",
    "create index ix_datasets_name on datasets (name, created_at)",
    "create index ix_datasets_digest on datasets (digest)",
)

# Views show states as text, of which Postgres knows nothing else: it would take one clip in two hundred to be done, and
# plan for a handful of rows where there are all.
STATISTICS = tuple(
    f"create statistics st_{table}_status on (status::text) from {table}" for table in ("clips", "attempts")
)

# What changed, put into `tallies`: a row for every status of every request that has more or fewer clips now.
SUMMED = """
        insert into tallies (request_id, status, clips, reused, rendered, seconds, bytes, started_at)
        select each.request_id, each.status, sum(each.clips), sum(each.reused), sum(each.rendered), sum(each.seconds),
               sum(each.bytes), min(each.started_at)
        from {changes} each
        group by each.request_id, each.status
        having sum(each.clips) <> 0 or sum(each.reused) <> 0 or sum(each.rendered) <> 0 or sum(each.seconds) <> 0"""
_CAME = "select now.* from after, tally(false, after) now"
_WENT = "select was.* from before, tally(true, before) was"
INSERTED, DELETED = SUMMED.format(changes=f"({_CAME})"), SUMMED.format(changes=f"({_WENT})")
UPDATED = SUMMED.format(changes=f"({_WENT} union all {_CAME})")

COUNTS = (
    """
create function tally(was boolean, clip clips) returns table (
    request_id text, status clip_status, clips integer, reused integer, rendered integer, seconds double precision,
    bytes bigint, started_at timestamptz
) language sql stable as $$
    select clip.request_id, clip.status, sign, sign * clip.reused::integer, sign * rendered,
           sign * rendered * coalesce(clip.seconds, 0),
           case rendered when 0 then 0
               else sign * coalesce((select file.bytes from artifacts file where file.sha256 = clip.artifact), 0) end,
           clip.started_at
    from (select case when was then -1 else 1 end, (clip.status = 'done' and not clip.reused)::integer)
        as of_it (sign, rendered)
$$""",
    f"""
create function tally_clips() returns trigger language plpgsql as $$
begin
    if tg_op = 'INSERT' then
        {INSERTED};
    elsif tg_op = 'DELETE' then
        {DELETED};
    else
        {UPDATED};
    end if;
    return null;
end $$""",
    """
create trigger tally_inserted after insert on clips referencing new table as after
    for each statement execute function tally_clips()""",
    """
create trigger tally_updated after update on clips referencing old table as before new table as after
    for each statement execute function tally_clips()""",
    """
create trigger tally_deleted after delete on clips referencing old table as before
    for each statement execute function tally_clips()""",
)

# Likeness of prompts, where the server has it: who owns a database may take in what is trusted. Nothing of ours needs
# it, so it is no error where it cannot be had, and it stays when the ledger goes: others may use it too.
TRIGRAMS = """
do $$ begin
    if exists (select from pg_available_extensions where name = 'pg_trgm') then
        create extension if not exists pg_trgm;
    end if;
exception
    when insufficient_privilege or undefined_file or duplicate_object or unique_violation then
        raise notice 'pg_trgm is not there, and % may not create it: prompts cannot be compared', current_user;
end $$"""

# Roles belong to the whole server, so they are made where they are missing, and stay while another database of the
# server grants to them. Without the right to make roles there is a notice and no grants: `settle_roles` comes later.
ROLES = ("rushes_app", "rushes_reader")

MAKE = """
do $$ begin
    if not exists (select from pg_roles where rolname = '{role}') then
        create role {role} nologin;
    end if;
exception
    when duplicate_object or unique_violation then null;  -- another database of this server did it at this moment
    when insufficient_privilege then
        raise notice 'role {role} is missing, and % may not make it: have it made before migrating', current_user;
end $$"""

GRANT = """
do $$ begin
    if exists (select from pg_roles where rolname = 'rushes_app') then
        grant usage on schema public to rushes_app;
        grant select, insert, update, delete on all tables in schema public to rushes_app;
        revoke insert, update, delete on alembic_version from rushes_app;
        grant usage on all sequences in schema public to rushes_app;
        alter default privileges in schema public grant select, insert, update, delete on tables to rushes_app;
        alter default privileges in schema public grant usage on sequences to rushes_app;
        if current_setting('server_version_num')::int >= 170000 then
            execute 'grant maintain on clips to rushes_app';  -- analyze, after a large request came in
        end if;
    end if;
    if exists (select from pg_roles where rolname = 'rushes_reader') then
        grant usage on schema public to rushes_reader;
    end if;
end $$"""

DROP = """
do $$ begin
    if exists (select from pg_roles where rolname = '{role}') then
        alter default privileges in schema public revoke all on tables from {role};
        alter default privileges in schema public revoke all on sequences from {role};
        revoke all on all tables in schema public from {role};
        revoke all on all sequences in schema public from {role};
        revoke all on schema public from {role};
        drop role {role};
    end if;
exception
    when dependent_objects_still_exist or insufficient_privilege then null;  -- others still use it, or it is not ours
end $$"""
