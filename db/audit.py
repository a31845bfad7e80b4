"""Rules that a sound ledger never breaks: one query a rule, each returning what breaks it.

Every transition of the ledger is one transaction, so these hold at any moment, while engines run too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from db.tables import Clip


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Something of which the ledger says two things."""

    rule: str
    key: str  # of the clip, shard, request, recipe or engine


RULES = {
    "a clip of a closed request is not over": """
        select c.id from clips c join requests r on r.id = c.request_id
        where r.status not in ('open', 'paused') and c.status in ('queued', 'running')""",
    "a sealed request has another number of clips": """
        select r.id from requests r left join clips c on c.request_id = r.id
        where r.total is not null group by r.id having count(c.id) <> r.total""",
    "the kept counts are not those of the clips": """
        select coalesce(kept.request_id, there.request_id)
        from (select request_id, status, sum(clips) as clips, sum(bytes) as bytes from tallies group by 1, 2) kept
        full join (
            select request_id, status, count(*) as clips,
                   sum(file.bytes) filter (where status = 'done' and not reused) as bytes
            from clips left join artifacts file on file.sha256 = artifact group by 1, 2
        ) there using (request_id, status)
        where (coalesce(kept.clips, 0), coalesce(kept.bytes, 0)) <> (coalesce(there.clips, 0), coalesce(there.bytes, 0))
        group by 1""",
    "a request ended otherwise than its clips": """
        select r.id from requests r left join clips c on c.request_id = r.id
        where r.status not in ('open', 'paused', 'cancelled') group by r.id, r.status
        having r.status <> case
            when count(*) filter (where c.status = 'done') = count(c.id) then 'completed'
            when count(*) filter (where c.status = 'done') > 0 then 'completed_with_gaps'
            else 'failed' end::request_status""",
    "a recipe was rendered twice": """
        select recipe from clips c join artifacts a on a.sha256 = c.artifact
        where c.status = 'done' and not c.reused and not c.fresh and a.lost_at is null
        group by recipe having count(*) > 1""",
    "a clip was finished twice": """
        select clip_id from attempts where status = 'done' group by clip_id having count(*) > 1""",
    "a done clip has other bytes than its recipe's render": """
        select c.id from clips c join artifacts a on a.sha256 = c.artifact
        left join renders r using (recipe) left join clips maker on maker.id = r.clip_id
        where c.status = 'done' and c.artifact is distinct from r.sha256 and a.lost_at is null
        and (c.id = r.clip_id or maker.fresh is not true)  -- a fresh one leaves the others what they had""",
    "an attempt runs and its clip does not, or the other way": """
        select c.id from clips c where (c.status = 'running')
        <> exists (select from attempts a where a.clip_id = c.id and a.status = 'running')""",
    "a clip has another number of attempts than it counts": """
        select c.id from clips c left join attempts a on a.clip_id = c.id
        group by c.id, c.attempts having count(a.clip_id) <> c.attempts""",
    "a clip counts more failures and lost attempts than it has attempts that ended so": """
        select c.id from clips c left join attempts a on a.clip_id = c.id and a.status in ('failed', 'lost')
        where c.failures + c.lost_attempts > 0 group by c.id, c.failures, c.lost_attempts
        having count(a.clip_id) < c.failures + c.lost_attempts""",
    "an unfinished clip lies in a shard that is over": """
        select c.id from clips c join shards s on s.id = c.shard_id
        where c.status in ('queued', 'running') and s.status in ('done', 'cancelled')""",
    "a clip runs in a shard that nobody leases": """
        select c.id from clips c join shards s on s.id = c.shard_id
        where c.status = 'running' and s.status <> 'leased'""",
    "an engine that has left holds a lease": """
        select s.id::text from shards s join engines e on e.id = s.owner
        where s.status = 'leased' and e.closed_at is not null""",
}


def contradictions(session: Session) -> Iterator[Contradiction]:
    """Everything that breaks a rule, rule by rule, at one moment each."""
    for rule, query in RULES.items():
        for key in session.scalars(text(query)).all():
            yield Contradiction(rule, key)


def resume_keys(session: Session, keys: Sequence[str] | None = None) -> set[str]:
    """Keys of the resume states that unfinished clips would go on from; with `keys` those of them."""
    named = select(Clip.resume_key).where(Clip.resume_key.is_not(None))
    if keys is not None:
        named = named.where(Clip.resume_key.in_(keys))
    return {key for key in session.scalars(named) if key is not None}
