"""What prompts were rewritten to.

Revision: 0004

A new table: it locks nothing that anybody uses.
"""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
create table rewrites (
    key text not null,
    rewriter text not null,
    prompt text not null,
    moving boolean not null,
    rewritten text,
    created_at timestamptz default now() not null,
    constraint pk_rewrites primary key (key),
    constraint ck_rewrites_key check (key ~ '^[0-9a-f]{64}$'),
    constraint ck_rewrites_rewritten check (rewritten <> '')
)""")


def downgrade() -> None:
    op.execute("drop table rewrites")
