"""Taking up open requests whose run has ended without them, as soon as there is a worker to run them again."""

from __future__ import annotations

import hashlib
import logging
import threading
import time

from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker

from db.requests import is_watched
from db.watching import open_requests
from flows.clients.ledger import ledger
from flows.clients.prefect import PrefectApi, PrefectRefused, PrefectUnavailable, prefect_api
from flows.settings import Settings

MAINTENANCE = "maintenance/scheduled"
WATCH = 300.0  # seconds after a worker's start: Prefect calls a run whose host is gone crashed after 90
LOOK = 5.0  # seconds between two looks

log = logging.getLogger(__name__)


def take_up(sessions: sessionmaker[Session], api: PrefectApi) -> bool:
    """Has maintenance look at once, not within ten minutes, where the run of an open request has ended without it.

    Returns True when there is no more to be seen: nobody's run is unclear, one that Prefect calls running and of which
    the ledger has not heard. Raises the errors of ledger and Prefect.
    """
    with sessions() as session:
        runs = {
            request.flow_run_id: is_watched(session, request.id, request.flow_run_id)
            for request in open_requests(session)
            if request.flow_run_id
        }
    found = {run: api.run(run) for run in runs}
    if ended := sorted(id for id, run in found.items() if run is None or not run.under_way):
        digest = hashlib.sha256(" ".join(ended).encode()).hexdigest()[:16]
        api.submit(MAINTENANCE, {}, once=f"take-up-{digest}")  # one, by however many workers that start
        return True
    waiting = {id for id, run in found.items() if run is not None and run.state == "SCHEDULED"}
    return all(watched or run in waiting for run, watched in runs.items())


def take_up_at_start(settings: Settings, seconds: float = WATCH) -> None:
    """Look again and again until all is clear, at most for so many seconds; servers that are away may be so."""
    until = time.monotonic() + seconds
    with ledger(settings) as sessions, prefect_api(settings) as api:
        while time.monotonic() < until:
            try:
                if take_up(sessions, api):
                    return
            except (OperationalError, PrefectRefused, PrefectUnavailable) as error:
                log.warning("open requests cannot be looked at yet: %s", str(error).splitlines()[0])
            time.sleep(LOOK)


def take_up_beside(settings: Settings) -> None:
    """Begins `take_up_at_start` in a thread that ends with the program."""
    threading.Thread(target=take_up_at_start, args=[settings], name="take-up", daemon=True).start()
