"""Tenants: their weights and quotas, and what they have used."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import case, func, select
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from db.session import change
from db.tables import ACTIVE, UNENDED, Request, Tally, Tenant, Usage


def clips_waiting(session: Session, tenant: str, *, apart_from: str = "") -> int:
    """Clips of a tenant's open and paused requests that have not ended, those announced and not yet added too."""
    theirs = select(Request.id, Request.total, Request.asked).where(
        Request.tenant == tenant, Request.status.in_(UNENDED), Request.id != apart_from
    )
    of_request = theirs.subquery("theirs")
    active = select(func.sum(Tally.clips)).where(Tally.request_id == of_request.c.id, Tally.status.in_(ACTIVE))
    counted = func.coalesce(active.correlate(of_request).scalar_subquery(), 0)
    waiting = case((of_request.c.total.is_(None), func.greatest(of_request.c.asked, counted)), else_=counted)
    return session.scalar(select(func.coalesce(func.sum(waiting), 0))) or 0


def gpu_seconds_of(session: Session, tenant: str, seconds: float) -> float:
    """GPU-seconds of a tenant's leases that ended within the last `seconds`."""
    since = func.statement_timestamp() - timedelta(seconds=seconds)
    used = select(func.sum(Usage.gpu_seconds)).where(Usage.tenant == tenant, Usage.minute > since)
    return session.scalar(used) or 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantRow:
    """A tenant, its share and bounds, and where it stands."""

    name: str
    weight: float
    max_clips: int | None
    max_gpu_seconds: float | None
    waiting: int  # clips that have not ended
    gpu_seconds: float  # of leases that ended in the last 24 hours


def set_tenant(session: Session, name: str, **bounds: Any) -> None:
    """Sets `weight`, `max_clips`, `max_gpu_seconds` (None: any number), those that are given; makes the tenant."""
    known = upsert(Tenant).values(name=name, **bounds)
    if bounds:
        change(session, known.on_conflict_do_update(index_elements=[Tenant.name], set_=bounds))
    else:
        change(session, known.on_conflict_do_nothing(index_elements=[Tenant.name]))


def tenants(session: Session) -> list[TenantRow]:
    """All tenants, by name."""
    return [
        TenantRow(
            name=tenant.name,
            weight=tenant.weight,
            max_clips=tenant.max_clips,
            max_gpu_seconds=tenant.max_gpu_seconds,
            waiting=clips_waiting(session, tenant.name),
            gpu_seconds=gpu_seconds_of(session, tenant.name, 86400.0),
        )
        for tenant in session.scalars(select(Tenant).order_by(Tenant.name))
    ]
