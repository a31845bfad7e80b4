"""The embedded Prefect server: its settings, its environment, and calls to its API."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

from infra.libpq import without_libpq
from infra.stack.home import CONTROL, SERVER, StackFailed
from infra.stack.processes import MARK, PART

ANSWER_SECONDS = 30.0  # what one answer may take, repetitions included
# Says nothing about what was asked, which is asked again. Prefect says 500 while its Postgres restarts.
NOT_NOW = (408, 429, 500, 502, 503, 504)
DENIED = (401, 403)
# The question arrived, or may have, and the answer is lost.
LOST = (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError, httpx.ReadTimeout, httpx.WriteTimeout)
# Between two signs of life of a flow run; maintenance's automation calls it crashed after 90 of silence.
BEAT_SECONDS = 30


# Of every process that executes a flow run, wherever and by whichever worker it is started.
RUN_SETTINGS = {
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(BEAT_SECONDS),
    "PREFECT_CLIENT_RETRY_EXTRA_CODES": "500,504",  # its clients ask again for the others of NOT_NOW by themselves
}
# Of every worker and of what it starts; what a person has set is theirs.
WORKER_SETTINGS = {
    **RUN_SETTINGS,
    "PREFECT_WORKER_QUERY_SECONDS": "2",  # 10 by default, which a person at a terminal feels
    "PREFECT_WORKER_CANCELLATION_POLL_SECONDS": "10",  # 120 by default, where the events stream is lost
}


def prefect_settings(home: Path, api_url: str | None = None) -> dict[str, str]:
    """Settings of every Prefect process of a stack; nothing of the caller's own Prefect settings comes in."""
    return {
        "PREFECT_HOME": str(home / SERVER),
        **({"PREFECT_API_URL": api_url} if api_url else {}),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
        **WORKER_SETTINGS,
        "PREFECT_LOGGING_COLORS": "false",
        "PREFECT_CLI_COLORS": "false",
    }


# Rows are written in batches (the defaults lose task runs in bursts), and old runs are vacuumed as well as old events.
# Signs of life and changes of progress are of no use once a later one is there, and grow with time alone: they are kept
# for an hour.
# Of a schedule only the next run is made: a stack that was down for a week wakes up to one late run, not to many.
SERVER_SETTINGS = {
    "PREFECT__SERVER_FINAL": "1",
    # On a busy machine a late answer is better than none (5 and 10 s by default).
    "PREFECT_SERVER_DATABASE_CONNECTION_TIMEOUT": "30",
    "PREFECT_SERVER_DATABASE_TIMEOUT": "30",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "500",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "500",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_BATCH_SIZE": "500",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_READ_BATCH_SIZE": "500",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_FLUSH_INTERVAL": "1",
    "PREFECT_SERVER_SERVICES_TRIGGERS_READ_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_EVENT_RETENTION_OVERRIDES": json.dumps(
        dict.fromkeys(("prefect.flow-run.heartbeat", "prefect.artifact.updated"), 3600)
    ),
    "PREFECT_SERVER_SERVICES_SCHEDULER_MIN_RUNS": "1",
    "PREFECT_SERVER_SERVICES_SCHEDULER_MIN_SCHEDULED_TIME": "PT1M",
}


def prefect_environment(home: Path, part: str) -> dict[str, str]:
    """The caller's environment without its settings of Prefect and libpq, and with the marks of this stack."""
    kept = {name: value for name, value in without_libpq(os.environ).items() if not name.startswith("PREFECT_")}
    loopback = ",".join(filter(None, [kept.get("NO_PROXY") or kept.get("no_proxy"), "127.0.0.1", "localhost"]))
    return {
        **kept,
        "RUSHES_HOME": str(home),
        MARK: str(home),
        PART: part,
        "DO_NOT_TRACK": "1",
        "NO_PROXY": loopback,
        "no_proxy": loopback,
        "PYTHONUNBUFFERED": "1",  # logs are read while they grow
    }


def settle_runs(api: Api, pool: str, runs: Iterable[Mapping[str, Any]]) -> None:
    """Gives runs whose process is gone a state that is true.

    A control run repeats safely and is scheduled again; an engine's is over, and its request starts another.
    """
    for run in runs:
        now = api.get(f"/flow_runs/{run['id']}")
        kind = now["state_type"] if now else None
        if kind == "CANCELLING":
            api.set_state(run["id"], "CANCELLED", "Cancelled", "Its process is gone.")
        elif kind in ("RUNNING", "PENDING", "CRASHED") and pool == CONTROL:
            api.set_state(run["id"], "SCHEDULED", "Scheduled", "The stack ended; the run goes on when it is up again.")
        elif kind in ("RUNNING", "PENDING"):
            api.set_state(run["id"], "CRASHED", "Crashed", "The stack ended.")


def reason_to_wait(pool: Mapping[str, Any] | None, queues: Iterable[Mapping[str, Any]]) -> str | None:
    """Why no run of a work pool begins, by what Prefect says of it and its queues; None where nothing is in the way.

    pool: None where there is none. A queue counts that our deployments use, the pool's own.
    """
    if pool is None:
        return "its work pool is missing: `rushes deploy` makes it"
    name = pool["name"]
    if pool["is_paused"]:
        return f"the work pool {name} is paused: resume it in the Prefect UI, or `prefect work-pool resume {name}`"
    if pool.get("concurrency_limit") == 0:
        return f"the work pool {name} may run 0 flow runs at once: raise its limit, or `rushes deploy` sets ours again"
    for queue in queues:
        if queue["id"] != pool.get("default_queue_id"):
            continue
        if queue["is_paused"]:
            return f"the queue {queue['name']} of the work pool {name} is paused: resume it in the Prefect UI"
        if queue.get("concurrency_limit") == 0:
            return f"the queue {queue['name']} of the work pool {name} may run 0 flow runs at once: raise its limit"
    return None


def credentials(auth: str | None) -> tuple[str, str] | None:
    """User and password, as httpx takes them, of `user:password`."""
    user, _, password = (auth or "").partition(":")
    return (user, password) if auth else None


def refused_login(url: str, auth: str | None) -> str:
    """The one line that says what to do where a server answers 401 or 403."""
    said = "refuses the user and password of RUSHES_PREFECT_AUTH" if auth else "asks for a password"
    return f"the Prefect server at {url} {said}: set RUSHES_PREFECT_AUTH to the user:password that it was started with"


def ask_patiently(
    send: Callable[[], httpx.Response],
    patience: float,
    *,
    faults: int | None = None,
    waiting: Callable[[str, float], None] = lambda why, seconds: None,
) -> httpx.Response:
    """The server's answer, asked for `patience` seconds while it is busy or drops connections; at last the busy one.

    send: may be called twice for one question. faults: times that a 500 is asked again; None: any number.
    waiting(why, seconds): told before each new try. Raises httpx.TransportError, at once where there is no server.
    """
    began, pause, broken = time.monotonic(), 0.1, 0
    while True:
        try:
            answer = send()
            waited = time.monotonic() - began
            broken += answer.status_code == httpx.codes.INTERNAL_SERVER_ERROR
            enough = waited >= patience or (faults is not None and broken > faults)
            if answer.status_code not in NOT_NOW or enough:
                return answer
            why = f"is too busy ({answer.status_code})"
        except LOST as error:
            waited, why = time.monotonic() - began, silence(error)
            if waited >= patience:
                raise
        waiting(why, waited)
        time.sleep(random.uniform(pause / 2, pause))  # who met here would meet again
        pause = min(2 * pause, 4.0)


def silence(error: httpx.TransportError) -> str:
    """How a server that gave no answer is told of."""
    return f"does not answer ({str(error) or type(error).__name__})"


class Api:
    """The Prefect server's REST interface, as far as the stack needs it."""

    def __init__(self, url: str, auth: str | None = None, *, patience: float = ANSWER_SECONDS) -> None:
        """`auth`: user:password where the server asks for it. `patience`: seconds that one answer may take."""
        self.url, self.auth, self.patience = url, auth, patience

    def healthy(self, *, patience: float = 2.0) -> bool:
        try:
            return self._send("GET", "/health", None, patience).is_success
        except httpx.HTTPError:
            return False

    def get(self, path: str) -> Any | None:
        """None where there is nothing."""
        answer = self._call("GET", path)
        return None if answer.status_code == 404 else self._content(answer)

    def version(self) -> str:
        return str(self.get("/admin/version"))

    def active_runs(self, pool: str) -> list[dict[str, Any]]:
        """Flow runs of a work pool that are said to be under way."""
        filters = {
            "flow_runs": {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}},
            "work_pools": {"name": {"any_": [pool]}},
        }
        return list(self._content(self._call("POST", "/flow_runs/filter", filters)))

    def set_state(self, run: str, kind: str, name: str, message: str) -> None:
        state = {"type": kind, "name": name, "message": message}
        self._content(self._call("POST", f"/flow_runs/{run}/set_state", {"state": state, "force": True}))

    def workers(self, pool: str) -> list[dict[str, Any]]:
        answer = self._call("POST", f"/work_pools/{pool}/workers/filter", {})
        return [] if answer.status_code == 404 else list(self._content(answer))

    def queues(self, pool: str) -> list[dict[str, Any]]:
        answer = self._call("POST", f"/work_pools/{pool}/queues/filter", {})
        return [] if answer.status_code == 404 else list(self._content(answer))

    def has_worker(self, pool: str, name: str, since: datetime) -> bool:
        """A worker of this name has reported since then."""
        return any(
            worker["name"] == name and datetime.fromisoformat(worker["last_heartbeat_time"]) >= since
            for worker in self.workers(pool)
        )

    def _call(self, method: str, path: str, body: Any = None) -> httpx.Response:
        """Asks until there is an answer. Raises httpx.HTTPError if none comes."""
        until = time.monotonic() + self.patience
        return ask_patiently(lambda: self._send(method, path, body, max(until - time.monotonic(), 5.0)), self.patience)

    def _send(self, method: str, path: str, body: Any, timeout: float) -> httpx.Response:
        # No proxy from the environment for loopback: it would swallow the calls.
        login, loopback = credentials(self.auth), is_loopback(self.url)
        return httpx.request(
            method, self.url + path, json=body, auth=login, timeout=timeout, trust_env=not loopback, verify=not loopback
        )

    def _content(self, answer: httpx.Response) -> Any:
        if answer.status_code in DENIED:
            raise StackFailed(refused_login(self.url, self.auth))
        if answer.is_error:
            where = f"{answer.request.method} {answer.request.url}"
            raise StackFailed(f"the Prefect server refused {where}: {answer.status_code} {answer.text[:500]}")
        return answer.json()


def is_loopback(url: str) -> bool:
    return httpx.URL(url).host in ("127.0.0.1", "localhost", "::1")


def api_of(port: int) -> str:
    return f"http://127.0.0.1:{port}/api"
