"""Attempts that were lost with their engine are counted apart from those that failed.

Revision: 0010, after 0009

What a clip counts goes to the column of its kind: the last `tries` of its attempts that failed or were lost are those
that count. What is quarantined stays so, under the rule of its time.
"""

from __future__ import annotations

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for statement in UP:
        op.execute(statement)


def downgrade() -> None:
    """What waits counts two tries at most; it is not put aside for what was not enough before."""
    for statement in DOWN:
        op.execute(statement)


UP = (
    "alter table clips drop constraint ck_clips_tries, add losses smallint default 0 not null",
    """
update clips c set tries = c.tries - lost.n, losses = lost.n
from (
    select a.clip_id, count(*) filter (where a.status = 'lost') as n
    from (
        select a.clip_id, a.status, c.tries, row_number() over (partition by a.clip_id order by a.number desc) as back
        from attempts a join clips c on c.id = a.clip_id
        where c.tries > 0 and c.status <> 'quarantined' and a.status in ('failed', 'lost')
    ) a
    where a.back <= a.tries
    group by a.clip_id
) lost
where lost.clip_id = c.id and lost.n > 0""",
    """
alter table clips add constraint ck_clips_tries check (
    tries between 0 and 3 and losses between 0 and 6 and (status = 'quarantined') = (tries = 3 or losses = 6))""",
)

DOWN = (
    "alter table clips drop constraint ck_clips_tries",
    """
update clips set tries = case when status = 'quarantined' then 3 else least(tries + losses, 2) end where losses > 0""",
    """
alter table clips
    drop column losses,
    add constraint ck_clips_tries check (tries between 0 and 3 and (status = 'quarantined') = (tries = 3))""",
)
