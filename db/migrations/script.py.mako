"""${message}

Revision: ${up_revision}, after ${down_revision}

Say here what it locks and for how long. The whole upgrade is one transaction with lock_timeout 5 s and statement_timeout
10 min (env.py): split what takes longer, and build indexes of large tables in an autocommit block, concurrently.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}
