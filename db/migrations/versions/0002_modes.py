"""What a clip is made from beside its words: mode, sources, windows; and `history` says so.

Revision: 0002, after 0001

The new columns are null or have a constant default, so no row is rewritten. The checks, foreign keys and the index read
the table of clips once, under its lock: about a second for a million clips.
"""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("drop view history")
    for statement in UP:
        op.execute(statement)
    op.execute(HISTORY.format(more=NEW_COLUMNS))


def downgrade() -> None:
    """Clips stay; what they were made from is forgotten."""
    op.execute("drop view history")
    for statement in DOWN:
        op.execute(statement)
    op.execute(HISTORY.format(more=""))


UP = (
    """create type clip_mode as enum
       ('text-to-video', 'image', 'image-to-video', 'extend', 'connect', 'loop', 'edit')""",
    "create type clip_direction as enum ('forward', 'backward')",
    """
alter table clips
    add mode clip_mode default 'text-to-video' not null,
    add source text,
    add end_source text,
    add direction clip_direction,
    add strength double precision,
    add "window" integer,
    add overlap integer,
    add made_frames integer,
    add constraint fk_clips_source foreign key (source) references artifacts (sha256),
    add constraint fk_clips_end_source foreign key (end_source) references artifacts (sha256),
    add constraint ck_clips_mode check (
        status = 'rejected'
        or ((mode not in ('image-to-video', 'extend', 'connect', 'edit') or source is not null)
            and (mode not in ('text-to-video', 'image') or source is null)
            and (mode = 'connect') = (end_source is not null) and (mode = 'extend') = (direction is not null)
            and (mode = 'edit') = (strength is not null) and (strength is null or strength > 0 and strength <= 1))),
    add constraint ck_clips_windows check (overlap >= 1 and "window" > overlap and made_frames >= 1)""",
    "create index ix_clips_source on clips (source) where source is not null",
)

DOWN = (
    """
alter table clips
    drop mode, drop source, drop end_source, drop direction, drop strength, drop "window", drop overlap,
    drop made_frames""",
    "drop type clip_mode",
    "drop type clip_direction",
)

NEW_COLUMNS = """,
    clip.mode::text as mode,
    clip.source as source_sha256,
    clip.end_source as end_source_sha256,
    clip.direction::text as direction,
    clip.strength,
    clip."window",
    clip.overlap,
    clip.made_frames"""

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
    clip.shard_id{more}
from clips clip
join requests request on request.id = clip.request_id
left join attempts last on last.clip_id = clip.id and last.number = clip.attempts
left join artifacts artifact on artifact.sha256 = clip.artifact
"""
