"""Tenants and what they used, kept counts, tries that wait, and renderings that go on where another engine stopped.

Revision: 0006, after 0005

Priorities go from 0..100 to 0..9. Counts of the clips there are, and the tenants, are made from what is there.
"""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("drop view history")
    for statement in UP:
        op.execute(statement)
    op.execute(HISTORY.format(columns=NEW_COLUMNS))


def downgrade() -> None:
    """Clips stay; weights, quotas, usage, kinds of failure and unfinished latents are forgotten."""
    op.execute("drop view history")
    for statement in DOWN:
        op.execute(statement)
    op.execute(HISTORY.format(columns=""))


# What changed, put into `tallies`: a row for every status of every request that has more or fewer clips now.
SUMMED = """
        insert into tallies (request_id, status, clips, found, rendered, seconds, started_at)
        select each.request_id, each.status, sum(each.clips), sum(each.found), sum(each.rendered), sum(each.seconds),
               min(each.started_at)
        from {changes} each
        group by each.request_id, each.status
        having sum(each.clips) <> 0 or sum(each.found) <> 0 or sum(each.rendered) <> 0 or sum(each.seconds) <> 0"""
_CAME = "select now.* from after, tally(false, after) now"
_WENT = "select was.* from before, tally(true, before) was"
INSERTED, DELETED = SUMMED.format(changes=f"({_CAME})"), SUMMED.format(changes=f"({_WENT})")
UPDATED = SUMMED.format(changes=f"({_WENT} union all {_CAME})")

UP = (
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
    "insert into tenants (name) select distinct tenant from requests",
    """
create table usage (
    tenant text not null,
    minute timestamptz not null,
    gpu_seconds double precision not null,
    constraint pk_usage primary key (tenant, minute),
    constraint fk_usage_tenant foreign key (tenant) references tenants (name),
    constraint ck_usage_gpu_seconds check (gpu_seconds >= 0)
)""",
    "create index ix_usage_minute on usage (minute) include (tenant, gpu_seconds)",
    """
alter table requests
    drop constraint ck_requests_priority,
    drop constraint ck_requests_total,
    alter priority set default 5,
    add deadline timestamptz,
    add asked integer""",
    "update requests set priority = round(priority * 0.09)",
    """
alter table requests
    add constraint ck_requests_priority check (priority between 0 and 9),
    add constraint ck_requests_total check (total >= 0 and asked >= 0),
    add constraint fk_requests_tenant foreign key (tenant) references tenants (name)""",
    "create index ix_requests_open_tenant on requests (tenant) where status = 'open'",
    """
alter table shards
    drop constraint ck_shards_priority,
    drop constraint ck_shards_size,
    add avoid text[],
    add ranks integer default 1 not null""",
    "update shards set priority = round(priority * 0.09)",
    """
alter table shards
    add constraint ck_shards_priority check (priority between 0 and 9),
    add constraint ck_shards_size check (size >= 1 and ranks >= 1)""",
    "create index ix_shards_claimed_at on shards (request_id, claimed_at)",
    """
alter table clips
    add fresh boolean default false not null,
    add not_before timestamptz,
    add checkpoint text,
    add checkpoint_step integer,
    add checkpoint_of text,
    add constraint ck_clips_checkpoint check (
        (checkpoint is null or status in ('queued', 'running')) and checkpoint_step >= 1
        and num_nulls(checkpoint, checkpoint_step, checkpoint_of) in (0, 3))""",
    "create unique index uq_clips_checkpoint on clips (checkpoint) where checkpoint is not null",
    "drop index ix_clips_progress",
    """
alter table attempts
    drop constraint ck_attempts_measured,
    add error_class text,
    add host text,
    add resumed_step integer""",
    "update attempts set error_class = 'unknown' where status = 'failed'",
    """
alter table attempts
    add constraint ck_attempts_measured check (skipped_steps >= 0 and peak_bytes > 0 and resumed_step >= 1),
    add constraint ck_attempts_error_class check (status <> 'failed' or error_class is not null)""",
    """
create table tallies (
    id bigint generated always as identity,
    request_id text not null,
    status clip_status not null,
    clips integer not null,
    found integer not null,
    rendered integer not null,
    seconds double precision not null,
    started_at timestamptz,
    constraint pk_tallies primary key (id)
)""",
    "create index ix_tallies_request_id on tallies (request_id)",
    """
create function tally(was boolean, clip clips) returns table (
    request_id text, status clip_status, clips integer, found integer, rendered integer, seconds double precision,
    started_at timestamptz
) language sql immutable as $$
    select clip.request_id, clip.status, sign, sign * clip.found::integer, sign * rendered,
           sign * rendered * coalesce(clip.seconds, 0), clip.started_at
    from (select case when was then -1 else 1 end, (clip.status = 'done' and not clip.found)::integer)
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
    SUMMED.format(changes="(select now.* from clips, tally(false, clips) now)"),
)

DOWN = (
    "drop trigger tally_inserted on clips",
    "drop trigger tally_updated on clips",
    "drop trigger tally_deleted on clips",
    "drop function tally_clips()",
    "drop function tally(boolean, clips)",
    "drop table tallies",
    """
alter table attempts
    drop constraint ck_attempts_measured,
    drop error_class,
    drop host,
    drop resumed_step,
    add constraint ck_attempts_measured check (skipped_steps >= 0 and peak_bytes > 0)""",
    """
create index ix_clips_progress on clips (request_id, status) include (found, seconds, started_at)""",
    "alter table clips drop fresh, drop not_before, drop checkpoint, drop checkpoint_step, drop checkpoint_of",
    "drop index ix_shards_claimed_at",
    """
alter table shards
    drop constraint ck_shards_priority,
    drop constraint ck_shards_size,
    drop avoid,
    drop ranks""",
    "update shards set priority = round(priority / 0.09)",
    """
alter table shards
    add constraint ck_shards_priority check (priority between 0 and 100),
    add constraint ck_shards_size check (size >= 1)""",
    "drop index ix_requests_open_tenant",
    """
alter table requests
    drop constraint ck_requests_priority,
    drop constraint ck_requests_total,
    drop constraint fk_requests_tenant,
    alter priority set default 50,
    drop deadline,
    drop asked""",
    "update requests set priority = round(priority / 0.09)",
    """
alter table requests
    add constraint ck_requests_priority check (priority between 0 and 100),
    add constraint ck_requests_total check (total >= 0)""",
    "drop table usage",
    "drop table tenants",
)

NEW_COLUMNS = """,
    request.priority::integer as priority,
    request.deadline,
    clip.fresh,
    last.host,
    last.error_class,
    last.resumed_step"""

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
    clip.shard_id,
    clip.mode::text as mode,
    clip.source as source_sha256,
    clip.end_source as end_source_sha256,
    clip.direction::text as direction,
    clip.strength,
    clip."window",
    clip.overlap,
    clip.made_frames,
    shard.predicted_seconds / shard.size as predicted_seconds,
    shard.predicted_bytes,
    last.peak_bytes,
    clip.step_cache,
    last.skipped_steps,
    again.reproductions,
    again.psnr as lowest_psnr,
    again.largest as largest_difference{columns}
from clips clip
join requests request on request.id = clip.request_id
left join attempts last on last.clip_id = clip.id and last.number = clip.attempts
left join artifacts artifact on artifact.sha256 = clip.artifact
left join shards shard on shard.id = clip.shard_id
left join lateral (
    select count(*)::integer as reproductions, min(psnr) as psnr, max(reproductions.largest) as largest
    from reproductions
    where reproductions.clip_id = clip.id
) again on true
"""
