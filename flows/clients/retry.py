"""Asking again while a server is away: the ledger, the store, Prefect, the disk.

A batch outlives restarts of everything that it talks to. A call is repeated as a whole, with growing pauses and for a
bounded time, so it must be safe to repeat, as all transactions of the ledger are.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import TypeVar

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

from db.session import is_away
from infra.stack.prefect import NOT_NOW
from infra.store.contract import StoreUnavailable

OUTAGE_SECONDS = 900.0  # a restart takes less, and what is away for longer needs a person
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)

log = logging.getLogger(__name__)
T = TypeVar("T")


def unavailable_service(error: BaseException) -> str | None:
    """Name the server that did not answer, where that is all that the error says; else None."""
    if is_away(error):
        return "the ledger"
    if isinstance(error, StoreUnavailable):
        return "the store"
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return "the disk"
    cause: BaseException | None = error
    while cause is not None:  # Prefect's client raises errors of its own from those of HTTP
        refused = isinstance(cause, httpx.HTTPStatusError) and cause.response.status_code in NOT_NOW
        if refused or isinstance(cause, httpx.TransportError):
            return "Prefect"
        cause = cause.__cause__
    return None


def never() -> bool:
    """False: nothing abandons the work."""
    return False


def with_retry(ask: Callable[[], T], *, seconds: float = OUTAGE_SECONDS, abandoned: Callable[[], bool] = never) -> T:
    """Call `ask` until no server that it needs is away, for at most `seconds` or until it is `abandoned`.

    Returns what `ask` returns, raises what it raised last.
    """

    def warn(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        pause = state.next_action.sleep if state.next_action else 0.0
        if error is not None:
            log.warning("%s is away, trying again in %.1f s: %s", unavailable_service(error), pause, _first_line(error))

    def enough(state: RetryCallState) -> bool:
        return abandoned() or (state.seconds_since_start or 0.0) >= seconds

    return Retrying(
        retry=retry_if_exception(lambda error: unavailable_service(error) is not None),
        wait=wait_random_exponential(multiplier=0.25, max=5),
        stop=enough,
        before_sleep=warn,
        reraise=True,
    )(ask)


def best_effort(ask: Callable[[], object]) -> bool:
    """Call `ask` once; False, with a warning, where a server that it needs is away, for work that can be done later."""
    try:
        ask()
    except Exception as error:
        service = unavailable_service(error)
        if service is None:
            raise
        log.warning("%s is away: %s", service, _first_line(error))
        return False
    return True


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
