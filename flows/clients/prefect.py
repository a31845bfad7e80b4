"""The few calls to the Prefect server that a person's commands need, over plain HTTP.

Importing Prefect's own client takes two seconds, which is fine for a flow and not for a command line.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, cast

import httpx

from flows.settings import Settings
from infra.stack.prefect import (
    DENIED,
    LOST,
    NOT_NOW,
    ask_patiently,
    credentials,
    is_loopback,
    refused_login,
    silence,
)

FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
FAULTS = 5  # times that a 500 is asked again, in some 3 s: its Postgres may be restarting, or it is a fault that stays
TAKEN = timedelta(minutes=2)  # that a run may be with a worker before it runs; after that the worker has died
PATIENCE = 30.0  # seconds that it is asked again: as long as a person would wait
TIMEOUT = httpx.Timeout(30.0, connect=15.0)  # seconds
QUIET = 10.0  # seconds after which a person is told what is waited for
TRACE_LABEL = "__OTEL_TRACEPARENT"  # where Prefect carries the submitter's trace to the run

log = logging.getLogger(__name__)


class PrefectRefused(RuntimeError):
    """The Prefect server answered and said no; the message is its own."""

    exit_code = 1


class PrefectUnavailable(RuntimeError):
    """The Prefect server did not answer, or was too busy to.

    Start the stack with `rushes up`, or mend RUSHES_PREFECT_API_URL.
    """

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Run:
    """A flow run as Prefect knows it now."""

    id: str
    name: str
    state: str  # SCHEDULED PENDING RUNNING CANCELLING COMPLETED FAILED CRASHED CANCELLED PAUSED
    state_name: str
    message: str
    parameters: dict[str, Any]
    now: datetime  # on the server's clock, when it was asked
    since: datetime | None = None  # in this state
    new: bool = False  # this very call made it

    @property
    def final(self) -> bool:
        return self.state in FINAL

    @property
    def under_way(self) -> bool:
        """It does its work, or will: who asks for the same may wait for it."""
        lost = self.state == "PENDING" and self.since is not None and self.now - self.since > TAKEN
        return not (self.final or lost or self.state == "CANCELLING")


def prefect_api(settings: Settings, *, url: str | None = None, patience: float = PATIENCE) -> PrefectApi:
    """A connection to the server that the settings name, with their password. Raises NotRunning.

    url: of another API than theirs.
    """
    return PrefectApi(url or settings.prefect_api, settings.prefect_password, patience, local=not settings.elsewhere)


class PrefectApi:
    """A connection to one server; use it in a with statement."""

    def __init__(self, url: str, auth: str | None = None, patience: float = PATIENCE, *, local: bool = True) -> None:
        """`url` ends in /api; `auth` is user:password where the server asks for it.

        `patience`: seconds for which a server that is there, but does not answer or is too busy to, is asked again.
        `local`: it is the local stack's, which `rushes up` starts.
        """
        self._url, self._auth, self._patience, self._local = url, auth, patience, local
        # No proxy: a proxy meant for the internet would swallow calls to loopback.
        self._http = httpx.Client(base_url=url, timeout=TIMEOUT, auth=credentials(auth), trust_env=not is_loopback(url))

    def __enter__(self) -> PrefectApi:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def version(self) -> str:
        """The server's version. Raises PrefectRefused where it asks for another password."""
        return str(self._answer("GET", "/admin/version").json())

    def submit(
        self,
        deployment: str,
        parameters: Mapping[str, Any],
        *,
        name: str | None = None,
        tags: tuple[str, ...] = (),
        traceparent: str | None = None,
        once: str | None = None,
    ) -> Run:
        """Creates a flow run of `flow/deployment`; the server checks the parameters against the form's schema.

        `once`: an idempotency key; given again, it returns the run that was made with it, even one that has ended.
        """
        once = once or str(uuid.uuid4())  # a submission whose answer was lost may be repeated, and stays one
        body: dict[str, Any] = {"parameters": parameters, "tags": list(tags), "idempotency_key": once}
        if name:
            body["name"] = name
        if traceparent:
            body["labels"] = {TRACE_LABEL: traceparent}
        found = self._call(
            "GET", f"/deployments/name/{deployment}", missing=f"no deployment {deployment} on {self._url}"
        )
        answer = self._answer("POST", f"/deployments/{found['id']}/create_flow_run", body)
        return replace(_run(answer.json(), date_of(answer.headers)), new=answer.status_code == httpx.codes.CREATED)

    def form(self, deployment: str) -> tuple[str, dict[str, Any]] | None:
        """The id of `flow/deployment` and the schema of its parameters; None where there is no such deployment."""
        try:
            found = self._call("GET", f"/deployments/name/{deployment}", missing="gone")
        except LookupError:
            return None
        return str(found["id"]), found.get("parameter_openapi_schema") or {}

    def change_form(self, deployment_id: str, schema: Mapping[str, Any]) -> None:
        """Gives a deployment another schema of its parameters."""
        self._call("PATCH", f"/deployments/{deployment_id}", {"parameter_openapi_schema": dict(schema)})

    def tagged(self, tag: str, limit: int = 20) -> list[Run]:
        """The flow runs with this tag, newest first."""
        return self._runs({"tags": {"all_": [tag]}}, limit)

    def named(self, name: str, limit: int = 20) -> list[Run]:
        """The flow runs of this name, newest first."""
        return self._runs({"name": {"any_": [name]}}, limit)

    def _runs(self, which: Mapping[str, Any], limit: int) -> list[Run]:
        wanted = {"flow_runs": which, "sort": "EXPECTED_START_TIME_DESC", "limit": limit}
        answer = self._answer("POST", "/flow_runs/filter", wanted)
        return [_run(each, date_of(answer.headers)) for each in answer.json()]

    def pool(self, name: str) -> dict[str, Any] | None:
        """A work pool as Prefect describes it; None where there is none."""
        try:
            return self._call("GET", f"/work_pools/{name}", missing="gone")
        except LookupError:
            return None

    def queues(self, pool: str) -> list[dict[str, Any]]:
        """The work queues of a pool, as Prefect describes them."""
        return list(self._answer("POST", f"/work_pools/{pool}/queues/filter", {}).json())

    def run(self, run_id: str) -> Run | None:
        """The flow run, or None if the server no longer has it."""
        try:
            answer = self._answer("GET", f"/flow_runs/{run_id}", missing="gone")
        except LookupError:
            return None
        return _run(answer.json(), date_of(answer.headers))

    def cancel(self, run_id: str) -> bool:
        """Asks Prefect to cancel the run; False if it had ended or is gone."""
        run = self.run(run_id)
        if run is None or run.final:
            return False
        kind = "CANCELLED" if run.state == "SCHEDULED" else "CANCELLING"
        self._call("POST", f"/flow_runs/{run_id}/set_state", {"state": {"type": kind}})
        return True

    def resume(self, run_id: str) -> None:
        """Has a suspended run go on, as the button Resume does."""
        self._call("POST", f"/flow_runs/{run_id}/resume")

    def _call(self, method: str, path: str, body: Any = None, *, missing: str | None = None) -> dict[str, Any]:
        answer = self._answer(method, path, body, missing=missing)
        return cast(dict[str, Any], answer.json()) if answer.content else {}

    def _answer(self, method: str, path: str, body: Any = None, *, missing: str | None = None) -> httpx.Response:
        answer = self._patiently(method, path, body)
        if answer.status_code == 404 and missing == "gone":
            raise LookupError(path)
        if answer.status_code == 404 and missing:
            raise PrefectRefused(f"{missing}: `rushes deploy` puts it there")
        if answer.status_code in DENIED:
            raise PrefectRefused(refused_login(self._url, self._auth))
        if answer.is_error:
            raise PrefectRefused(f"the Prefect server refused: {_detail(answer)}")
        return answer

    def _patiently(self, method: str, path: str, body: Any) -> httpx.Response:
        """The server's answer, once it is not busy; who cannot be reached at all is not asked again."""
        began, told = time.monotonic(), False

        def waiting(why: str, seconds: float) -> None:
            nonlocal told
            if seconds >= QUIET and not told:
                log.warning("the Prefect server %s: asking again, for %.0f s at most", why, self._patience)
                told = True

        try:
            answer = ask_patiently(
                lambda: self._http.request(method, path, json=body), self._patience, faults=FAULTS, waiting=waiting
            )
        except LOST as error:
            raise self._worn_out(silence(error), began) from None
        except httpx.TransportError as error:
            raise self._unavailable(f"{silence(error)}: {self._hint()}") from None
        if answer.status_code in NOT_NOW and answer.status_code != httpx.codes.INTERNAL_SERVER_ERROR:
            raise self._worn_out(f"is too busy ({answer.status_code})", began)
        return answer

    def _worn_out(self, said: str, began: float) -> PrefectUnavailable:
        waited = time.monotonic() - began
        return self._unavailable(f"{said}, for {waited:.0f} s by now: try again later, or see `rushes doctor`")

    def _hint(self) -> str:
        return "is the stack up? `rushes up` starts it" if self._local else "is RUSHES_PREFECT_API_URL right?"

    def _unavailable(self, said: str) -> PrefectUnavailable:
        return PrefectUnavailable(f"the Prefect server at {self._url} {said}")


def date_of(headers: Mapping[str, str]) -> datetime:
    """The time at which a server answered, on its own clock; on ours where it does not say."""
    said = headers.get("date")
    return parsedate_to_datetime(said) if said else datetime.now(UTC)


def _run(answer: dict[str, Any], now: datetime) -> Run:
    state = answer.get("state") or {}
    return Run(
        id=str(answer["id"]),
        name=str(answer.get("name") or ""),
        state=str(answer.get("state_type") or state.get("type") or "PENDING"),
        state_name=str(answer.get("state_name") or state.get("name") or ""),
        message=str(state.get("message") or ""),
        parameters=answer.get("parameters") or {},
        since=datetime.fromisoformat(state["timestamp"]) if state.get("timestamp") else None,
        now=now,
    )


def _detail(answer: httpx.Response) -> str:
    try:
        detail = answer.json().get("detail") or answer.json().get("exception_detail")
    except ValueError:
        detail = None
    return f"{answer.status_code}: {detail or answer.text[:500] or answer.reason_phrase}"
