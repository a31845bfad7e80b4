"""What was predicted of a shard, what a step cache did, and what came of rendering a clip again; and `history` says so.

Revision: 0005, after 0004

The new columns are null, so no row is rewritten. Checks read their tables once, under their locks.
"""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("drop view history")
    for statement in UP:
        op.execute(statement)
    op.execute(HISTORY.format(columns=NEW_COLUMNS, joins=NEW_JOINS))


def downgrade() -> None:
    """Clips stay; predictions and reproductions are forgotten."""
    op.execute("drop view history")
    for statement in DOWN:
        op.execute(statement)
    op.execute(HISTORY.format(columns="", joins=""))


UP = (
    """
alter table shards
    add partition text,
    add predicted_seconds double precision,
    add predicted_bytes bigint,
    add constraint ck_shards_predicted check (predicted_seconds > 0 and predicted_bytes > 0)""",
    """
alter table clips
    add step_cache double precision,
    add constraint ck_clips_step_cache check (step_cache > 0 and step_cache < 'infinity')""",
    """
alter table attempts
    add skipped_steps integer,
    add peak_bytes bigint,
    add constraint ck_attempts_measured check (skipped_steps >= 0 and peak_bytes > 0)""",
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
    "create index ix_reproductions_clip_id on reproductions (clip_id, id)",
)

DOWN = (
    "drop table reproductions",
    "alter table attempts drop skipped_steps, drop peak_bytes",
    "alter table clips drop step_cache",
    "alter table shards drop partition, drop predicted_seconds, drop predicted_bytes",
)

NEW_COLUMNS = """,
    shard.predicted_seconds / shard.size as predicted_seconds,
    shard.predicted_bytes,
    last.peak_bytes,
    clip.step_cache,
    last.skipped_steps,
    again.reproductions,
    again.psnr as lowest_psnr,
    again.largest as largest_difference"""

NEW_JOINS = """
left join shards shard on shard.id = clip.shard_id
left join lateral (
    select count(*)::integer as reproductions, min(psnr) as psnr, max(reproductions.largest) as largest
    from reproductions
    where reproductions.clip_id = clip.id
) again on true"""

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
    clip.made_frames{columns}
from clips clip
join requests request on request.id = clip.request_id
left join attempts last on last.clip_id = clip.id and last.number = clip.attempts
left join artifacts artifact on artifact.sha256 = clip.artifact{joins}
"""
