"""Looking at a stack that runs elsewhere, service by service, as its settings name them.

It starts nothing and asks nothing of this machine but what a program of the platform needs here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from infra.stack.doctor import Check, check, describe_deployments, describe_pool, machine_checks
from infra.stack.home import CONTROL, DEPLOYMENTS, GPU, POOLS
from infra.stack.prefect import Api
from infra.stack.up import PartStatus

LEDGER, PREFECT, STORE = "ledger", "prefect", "store"
START = {
    CONTROL: "Run `rushes worker control` on a host.",
    GPU: "Run `rushes worker gpu` on every host that is to render.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Servers:
    """The services, each as a call that gives what it saw, and raises where that is wrong."""

    ledger: Callable[[], str]
    store: Callable[[], str]
    api_url: str | None
    auth: str | None = None


def doctor_elsewhere(
    home: Path, servers: Servers, *, weights: Callable[[], str], deployments: Path = DEPLOYMENTS
) -> list[Check]:
    """Looks at the services and at what programs here need from the machine."""
    api = _api(servers)

    def in_prefect() -> str:
        runs, installed = _version(api), metadata.version("prefect")
        if runs.split(".")[:2] != installed.split(".")[:2]:
            raise ValueError(f"version {runs} runs, {installed} is installed here")
        return f"{runs} at {api.url.removesuffix('/api')}"

    deploy = "Run `rushes deploy`, which puts it there; resume what is paused in the Prefect UI."
    return [
        *machine_checks(home, mounted=True),
        check(LEDGER, servers.ledger, "See RUSHES_DATABASE_URL, and that its server runs."),
        check(PREFECT, in_prefect, "See RUSHES_PREFECT_API_URL and RUSHES_PREFECT_AUTH, and that its server runs."),
        check("work pools", lambda: ", ".join(describe_pool(api, pool) for pool in POOLS), deploy),
        check("workers", lambda: ", ".join(_workers(api, pool) for pool in POOLS), " ".join(START.values())),
        check("deployments", lambda: describe_deployments(api, deployments), deploy),
        check(STORE, servers.store, "See RUSHES_STORE_URL and the store's keys, and that its server runs."),
        check("weights", weights, "Name a model that is there in RUSHES_MODEL, or restore model/weights."),
    ]


def status_elsewhere(servers: Servers) -> list[PartStatus]:
    """Each service: whether it answers, and in which words."""
    api = _api(servers)
    looks: dict[str, Callable[[], str]] = {
        LEDGER: servers.ledger,
        PREFECT: lambda: f"{_version(api)} at {api.url.removesuffix('/api')}",
        CONTROL: lambda: _workers(api, CONTROL),
        GPU: lambda: _workers(api, GPU),
        STORE: servers.store,
    }
    seen = [check(name, look, "") for name, look in looks.items()]
    return [PartStatus(each.name, each.ok, each.detail) for each in seen]


def _api(servers: Servers) -> Api:
    return Api(servers.api_url or "", servers.auth, patience=5.0)


def _version(api: Api) -> str:
    if not api.url:
        raise RuntimeError("RUSHES_PREFECT_API_URL is not set")
    if not api.healthy(patience=5.0):
        raise RuntimeError(f"nothing answers at {api.url}")
    return api.version()


def _workers(api: Api, pool: str) -> str:
    """How many workers of a pool the server calls online."""
    _version(api)
    online = [worker for worker in api.workers(pool) if worker["status"] == "ONLINE"]
    if not online:
        raise RuntimeError(f"no {pool} worker is online")
    return f"{len(online)} {pool} worker{'s' * (len(online) > 1)} online"
