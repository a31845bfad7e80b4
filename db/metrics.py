"""The ledger in numbers for those who watch over it: how it stands now, and the attempts that ended since a moment.

Reads views alone, so that `rushes_reader` may ask. It knows nothing of how the numbers travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import text
from sqlalchemy.orm import Session

from db.tables import ClipStatus

LAG = 5.0  # seconds after which what ended in a moment is taken to be in the ledger
LONGEST = 1.0  # days that an attempt may take to be counted


@dataclass(frozen=True, slots=True)
class Count:
    """So many of what the labels say."""

    labels: dict[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Standing:
    """How the ledger stands."""

    clips: Sequence[Count]  # by status, of all time
    queued: Sequence[Count]  # clips that wait, of requests that are open, by tenant and model
    oldest: Sequence[Count]  # seconds since the submission of the oldest request with such clips, likewise
    engines: Sequence[Count]  # that have not left, by state and model
    busy: Sequence[Count]  # share of their time that these have been at work, by model


@dataclass(frozen=True, slots=True)
class Ended:
    """Attempts that ended from one moment to another, the moment itself not included."""

    until: datetime
    attempts: Sequence[Count]  # by status, error class and model
    stages: Sequence[Count]  # seconds of each stage of each of them, by stage and model


def standing(session: Session) -> Standing:
    """The ledger as it is now."""
    return Standing(*(_counts(session, query) for query in (_CLIPS, _QUEUED, _OLDEST, _ENGINES, _BUSY)))


def ended_since(session: Session, since: datetime | None) -> Ended:
    """Attempts that ended after `since` and LAG seconds ago at the latest; none, but the moment, for None.

    One that took longer than LONGEST days is left out: by their beginnings attempts are found quickly.
    """
    until = session.execute(text("select statement_timestamp() - make_interval(secs => :lag)"), {"lag": LAG})
    moment: datetime = until.scalar_one()
    if since is None or since >= moment:
        return Ended(since or moment, (), ())
    window = {"since": since, "until": moment, "days": LONGEST}
    return Ended(moment, _counts(session, _ATTEMPTS, **window), _counts(session, _STAGES, **window))


def _counts(session: Session, query: str, **values: object) -> list[Count]:
    """The last column is the value, the others are labels."""
    rows = session.execute(text(query), values)
    *names, _ = rows.keys()
    return [
        Count({name: str(label or "") for name, label in zip(names, row, strict=False)}, float(row[-1])) for row in rows
    ]


_STATES = tuple(str(status) for status in ClipStatus)
_CLIPS = f"""
select status, clips
from (select {", ".join(f"coalesce(sum({state}), 0) as {state}" for state in _STATES)} from ask.requests) counted
cross join lateral (values {", ".join(f"('{state}', {state})" for state in _STATES)}) each (status, clips)"""
_QUEUED = """
select tenant, model, sum(queued) from ask.requests where status in ('open', 'paused') group by tenant, model"""
_OLDEST = """
select tenant, model, max(extract(epoch from statement_timestamp() - created_at))
from ask.requests where status = 'open' and queued > 0 group by tenant, model"""
_LIVING = "from ask.engines where closed_at is null and heartbeat_at > statement_timestamp() - interval '1 day'"
_ENGINES = f"select state, model, count(*) {_LIVING} group by state, model"
_BUSY = f"select model, coalesce(avg(least(1, busy_share)), 0) {_LIVING} and state <> 'silent' group by model"
_WINDOW = """
where started_at > cast(:since as timestamptz) - :days * interval '1 day'
and finished_at > :since and finished_at <= :until"""
_ATTEMPTS = f"""
select status, coalesce(error_class, '') as error_class, model, count(*) from ask.attempts {_WINDOW}
group by status, error_class, model"""
_STAGES = f"select stage, model, seconds from ask.stages {_WINDOW}"
