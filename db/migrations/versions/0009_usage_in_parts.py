"""A tenant's usage of a minute lies in several rows, so that engines which end leases at once do not wait in line.

Revision: 0009, after 0008
"""

from __future__ import annotations

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
        alter table usage
            add part smallint default 0 not null,
            drop constraint pk_usage,
            add constraint pk_usage primary key (tenant, minute, part)""")
    op.execute("alter table usage alter part drop default")


def downgrade() -> None:
    op.execute(
        "create temporary table summed on commit drop as"
        " select tenant, minute, sum(gpu_seconds) as gpu_seconds from usage group by tenant, minute"
    )
    op.execute("delete from usage")
    op.execute("""
        alter table usage
            drop constraint pk_usage,
            drop column part,
            add constraint pk_usage primary key (tenant, minute)""")
    op.execute("insert into usage (tenant, minute, gpu_seconds) select tenant, minute, gpu_seconds from summed")
