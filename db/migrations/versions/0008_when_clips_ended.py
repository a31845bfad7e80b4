"""An index on when clips ended, for questions about the last day.

Revision: 0008, after 0007
"""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("create index ix_clips_finished_at on clips (finished_at) where finished_at is not null")


def downgrade() -> None:
    """Questions about the last day read all clips again."""
    op.execute("drop index ix_clips_finished_at")
