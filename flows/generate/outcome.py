"""How the run of a request ended, as a value that knows nothing of Prefect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from db.requests import Progress
from db.tables import ClipStatus, RequestStatus

MESSAGE_MOST = 4000  # characters of a refusal's message: what Prefect shows beside a state


class Ending(StrEnum):
    """The ways in which a run ends."""

    COMPLETED = "completed"
    COMPLETED_WITH_GAPS = "completed_with_gaps"
    CANCELLED = "cancelled"
    PAUSED = "paused"  # the run ends, the request does not
    FAILED = "failed"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """An ending with its message; `counts` and `cache_hits` are those of the request's clips, empty when refused."""

    ending: Ending
    message: str
    reason: str | None = None  # of a refusal: BadInput, QuotaExceeded, RewriterFailed
    request_id: str | None = None  # None when refused
    counts: Mapping[ClipStatus, int] = field(default_factory=dict[ClipStatus, int])
    cache_hits: int = 0  # clips that were there already, and not rendered again

    @classmethod
    def of_request(cls, request_id: str, status: RequestStatus, progress: Progress, cache_hits: int) -> Outcome:
        """The ending of a request whose clips have all come to an end."""
        counts = ", ".join(f"{count} {status}" for status, count in sorted(progress.counts.items()) if count)
        return cls(
            ending=ENDINGS.get(status, Ending.FAILED),
            message=f"{request_id}: {counts} ({cache_hits} found, not rendered again)",
            request_id=request_id,
            counts=progress.counts,
            cache_hits=cache_hits,
        )

    @classmethod
    def paused(cls, progress: Progress) -> Outcome:
        """The run leaves its request as it is, until it is resumed."""
        counts, request_id = progress.counts, progress.request_id
        return cls(
            ending=Ending.PAUSED,
            message=f"{request_id} is paused for as long as you like, {counts[ClipStatus.DONE]:,} of "
            f"{progress.added:,} clips are done. Resume, here or by `rushes resume {request_id}`, goes on from there",
            request_id=request_id,
            counts=counts,
        )

    @classmethod
    def refused(cls, text: str, *, count: int, reason: str) -> Outcome:
        """Nothing was recorded or planned. text: every error, one a line."""
        errors = f"{count} error{'s' * (count != 1)}: nothing was submitted"
        return cls(ending=Ending.REFUSED, message=f"{errors}\n{text}"[:MESSAGE_MOST], reason=reason)


ENDINGS = {
    RequestStatus.COMPLETED: Ending.COMPLETED,
    RequestStatus.COMPLETED_WITH_GAPS: Ending.COMPLETED_WITH_GAPS,
    RequestStatus.CANCELLED: Ending.CANCELLED,
}
