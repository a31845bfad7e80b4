"""Data sets: what models are trained on, their clips with captions, and which model came of which.

Revision: 0003, after 0001

Two new tables; `models` gets a nullable column, for which Postgres only touches the catalogue.
"""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    op.execute("alter table models drop column dataset_id")
    for table in ("dataset_clips", "datasets"):
        op.execute(f"drop table {table}")
    op.execute("drop type caption_origin")


STATEMENTS = (
    "create type caption_origin as enum ('world', 'files', 'captioner', 'vision')",
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
    "create index ix_datasets_name on datasets (name, created_at)",
    "create index ix_datasets_digest on datasets (digest)",
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
    "alter table models add column dataset_id text",
    """alter table models add constraint fk_models_dataset_id
       foreign key (dataset_id) references datasets (id)""",
)
