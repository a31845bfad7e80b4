"""The account of GPU-seconds: what a lease took is charged to its tenant when it ends, however it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, text
from sqlalchemy.orm import Session

from db.fence import Lease, held_params, lost
from db.tables import ShardStatus

_PARTS = 8  # rows in which a tenant's usage of a minute lies
# Adds to their tenants' usage what the leases in the table `ended` took, minute by minute.
_SPEND = f"""
insert into usage (tenant, minute, part, gpu_seconds)
select request.tenant, each.minute, min(ended.id) % {_PARTS}, greatest(0, sum(ended.ranks * extract(epoch from
           least(each.minute + interval '1 minute', ended.until) - greatest(each.minute, ended.claimed_at))::float8))
from (select *, least(leased_until, statement_timestamp()) as until from ended) ended
join requests request on request.id = ended.request_id
cross join generate_series(date_trunc('minute', ended.claimed_at), ended.until, interval '1 minute') each (minute)
group by request.tenant, each.minute
order by request.tenant, each.minute
on conflict (tenant, minute, part) do update set gpu_seconds = usage.gpu_seconds + excluded.gpu_seconds"""
_ENDS = """set status = cast(:status as shard_status), owner = null, leased_until = null,
        finished_at = case when :status <> 'queued' then statement_timestamp() end"""
_END = text(f"""
with ended as (
    select id, request_id, ranks, claimed_at, leased_until from shards
    where id = any (:shard_ids) and leased_until is not null
), changed as (
    update shards {_ENDS}
    where id = any (:shard_ids)
)
{_SPEND}""")
# The same of a lease that is still held, and of which nothing is left to be told: in one statement what is so nearly
# always. A cancellation that has come between has ended the lease; it ends clips, and begins none.
_END_HELD = text(f"""
with held as materialized (
    select id, request_id, ranks, claimed_at, status,
           case when leased_until is not null
                then least(leased_until, statement_timestamp() - make_interval(secs => :beside)) end as leased_until,
           exists (select from clips where shard_id = shards.id and status = 'running') as running,
           exists (select from clips where shard_id = shards.id and status = 'queued') as waiting
    from shards
    where id = :held_shard and attempt = :held_attempt and status in ('leased', 'cancelled')
    for no key update
), ended as (
    select * from held
    where status = 'leased' and not running and (:status = 'queued' or not waiting) and leased_until is not null
), changed as (
    update shards {_ENDS}
    from ended where shards.id = ended.id
    returning shards.id
), spent as ({_SPEND})
select running, waiting, status = 'leased' and not exists (select from changed) as open from held""")
_CHARGE = text(f"""
with ended (id, request_id, ranks, claimed_at, leased_until) as (
    values (cast(:id as bigint), :request_id, cast(:ranks as integer), cast(:claimed_at as timestamptz),
            cast(:leased_until as timestamptz))
)
{_SPEND}""")


def end(session: Session, lease: Lease, status: ShardStatus, beside: float = 0.0) -> Row[Any]:
    """Holds the shard, and ends the lease where none of its clips asks for more: it is no longer `open` then.

    beside: seconds before now that it is not charged with.
    """
    told = {**held_params(lease), "status": str(status), "beside": beside}
    shard = session.execute(_END_HELD, told).one_or_none()
    if shard is None:
        raise lost(lease)
    return shard


def end_leases(session: Session, shard_ids: Sequence[int], status: ShardStatus) -> None:
    """Gives these shards, which the caller has locked, another status, and charges what of them was leased.

    Call it last in a transaction: tenants' rows are in demand.
    """
    session.execute(_END, {"shard_ids": list(shard_ids), "status": str(status)})


def charge(session: Session, before: Row[Any]) -> None:
    """Charges a lease that somebody else's has replaced: the shard as it was then. Call it last."""
    taken = {name: getattr(before, name) for name in ("id", "request_id", "ranks", "claimed_at", "leased_until")}
    session.execute(_CHARGE, taken)
