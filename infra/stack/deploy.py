"""Registers the embedded stack's work pools and deployments with its Prefect server.

A process of its own, `python -m infra.stack.deploy …`, because importing Prefect and the flows takes seconds: it
imports while the server starts, and waits for the server's address on its standard input. It loads the flows by the
import paths in prefect.yaml and knows nothing about them.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from infra.stack.prefect import RUN_SETTINGS
from infra.stack.worker import PYTHON

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.flows import Flow


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """One entry of prefect.yaml."""

    flow: str
    name: str
    entrypoint: str  # module.function
    pool: str
    tags: tuple[str, ...] = ()
    every: float | None = None  # seconds between two scheduled runs

    @property
    def full_name(self) -> str:
        return f"{self.flow}/{self.name}"


def read_deployments(path: Path) -> tuple[Deployment, ...]:
    """The deployments of a prefect.yaml; only the keys that ours uses. Raises ValueError, naming file and entry."""
    try:
        entries = yaml.safe_load(path.read_text())["deployments"]
        return tuple(_deployment(entry) for entry in entries)
    except (KeyError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not a list of deployments as in infra/prefect.yaml ({error})") from error


def _deployment(entry: Mapping[str, Any]) -> Deployment:
    schedules: Sequence[Mapping[str, float]] = entry.get("schedules", ())
    return Deployment(
        flow=entry["flow_name"],
        name=entry["name"],
        entrypoint=entry["entrypoint"],
        pool=entry["work_pool"]["name"],
        tags=tuple(entry.get("tags", ())),
        every=schedules[0]["interval"] if schedules else None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m infra.stack.deploy")
    parser.add_argument("file", type=Path, help="prefect.yaml")
    parser.add_argument("--pool", action="append", default=[], metavar="NAME=LIMIT", help="a process work pool")
    arguments = parser.parse_args()

    deployments = read_deployments(arguments.file)
    flows = {deployment: _load(deployment) for deployment in deployments}
    template = _job_template()

    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    api = sys.stdin.readline().strip()
    if not api:
        sys.exit("no server to register with")
    # Nothing but the address is ours to say: the password and whatever else a client needs is in its environment.
    with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
        for pool in arguments.pool:
            name, _, limit = pool.partition("=")
            _register_pool(client, name, int(limit), template)
        for deployment, flow in flows.items():
            _register(client, deployment, flow)


def _load(deployment: Deployment) -> Flow[..., Any]:
    module, _, name = deployment.entrypoint.rpartition(".")
    flow: Flow[..., Any] = getattr(import_module(module), name)
    if flow.name != deployment.flow:
        raise ValueError(f"{deployment.entrypoint} is the flow {flow.name!r}: prefect.yaml says {deployment.flow!r}")
    return flow


def _job_template() -> dict[str, Any]:
    """Prefect's template for process pools, with our defaults. Nothing in it is true of one host alone.

    With a command of our own a flow run starts 2 to 3 s sooner: Prefect then leaves out the extra process that would
    prepare a workspace, of which an installed package has no need. Python and working directory are those of the
    worker (`infra.stack.worker`), wherever its host has them.
    """
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    variables = template["variables"]["properties"]
    variables["working_dir"]["default"] = "."
    variables["command"]["default"] = shlex.join([PYTHON, "-m", "prefect.engine"])
    variables["env"]["default"] = dict(RUN_SETTINGS)  # also of runs that a worker of somebody else's starts
    return template


def _register_pool(client: SyncPrefectClient, name: str, limit: int, template: dict[str, Any]) -> None:
    from prefect.client.schemas.actions import WorkPoolCreate

    pool = WorkPoolCreate(name=name, type="process", base_job_template=template, concurrency_limit=limit)
    client.create_work_pool(pool, overwrite=True)


def _register(client: SyncPrefectClient, deployment: Deployment, flow: Flow[..., Any]) -> None:
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import IntervalSchedule
    from prefect.utilities.callables import parameter_schema

    schedules: list[DeploymentScheduleCreate] = []
    if deployment.every is not None:
        schedules.append(
            DeploymentScheduleCreate(schedule=IntervalSchedule(interval=timedelta(seconds=deployment.every)))
        )
    client.create_deployment(  # replaces one of the same name
        flow_id=client.create_flow_from_name(deployment.flow),
        name=deployment.name,
        entrypoint=deployment.entrypoint,
        work_pool_name=deployment.pool,
        description=flow.description,
        tags=list(deployment.tags),
        schedules=schedules,
        parameter_openapi_schema=parameter_schema(flow).model_dump(exclude_unset=True),
        enforce_parameter_schema=True,
        pull_steps=[],
    )


if __name__ == "__main__":
    main()
