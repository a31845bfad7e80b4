"""Checks of a local stack: what is wrong with it, and what to do."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path

import httpx
import psutil

from infra.stack.databases import LEDGER
from infra.stack.deploy import read_deployments
from infra.stack.home import DEPLOYMENTS, HEARTBEAT_SECONDS, POOLS, POSTGRES, SERVER, WEB, T
from infra.stack.postgres import connect, running_postgres
from infra.stack.prefect import Api, api_of, reason_to_wait
from infra.stack.processes import Member, part_of, process_family


@dataclass(frozen=True, slots=True)
class Check:
    """One line of `rushes doctor`; `mend` says what to do when it is not ok."""

    name: str
    ok: bool
    detail: str
    mend: str = ""


def doctor(
    home: Path,
    *,
    schema: Callable[[str], str],
    store: Callable[[], str],
    weights: Callable[[], str],
    engines: Callable[[], str] | None = None,
    deployments: Path = DEPLOYMENTS,
) -> list[Check]:
    """Looks at every part, and at what the parts need from the machine.

    `schema` looks at the ledger at a URL, `store` writes to the store, `weights` looks at the model, `engines` at
    whether they can start; each returns what it saw and raises when that is wrong.
    """
    home = home.absolute()
    family = process_family(home)
    postgres = running_postgres(home / POSTGRES)
    server = part_of(family, SERVER)
    api = Api(api_of(server.port)) if server else None

    def in_ledger() -> str:
        return schema(_running(postgres).url_of(LEDGER.name))

    def in_postgres() -> str:
        with connect(_running(postgres).url, connect_timeout=5) as connection:
            return f"{connection.info.server_version // 10000} on port {_running(postgres).port}"

    def in_prefect() -> str:
        runs, installed = _running(api).version(), metadata.version("prefect")
        if runs != installed:
            raise ValueError(f"version {runs} runs, {installed} is installed")
        return f"{runs} at {_running(api).url.removesuffix('/api')}"

    def in_pools() -> str:
        return ", ".join(describe_pool(_running(api), pool) for pool in POOLS)

    def in_workers() -> str:
        return ", ".join(_describe_worker(_running(api), family, pool) for pool in POOLS)

    def in_web() -> str:
        port = _running(part_of(family, WEB)).port
        answer = httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=10.0, trust_env=False)
        if answer.is_error:
            raise RuntimeError(f"port {port} answers {answer.status_code}: {answer.text[:200]}")
        return f"http://127.0.0.1:{port}"

    def in_deployments() -> str:
        return describe_deployments(_running(api), deployments)

    start = "Run `rushes up`: it starts what does not run."
    mend = "Mend what the engine says; its flow run's log in Prefect has more. `rushes engine` tries one here, at once."
    starts = [check("engines", engines, mend)] if engines else []
    return [
        *machine_checks(home),
        check("postgres", in_postgres, f"{start} Its log: {home / POSTGRES / 'postgres.log'}"),
        check("ledger", in_ledger, f"{start} That also brings the tables up to date."),
        check("prefect", in_prefect, f"{start} After an upgrade, `rushes down` first. Log: {home}/logs/prefect.log"),
        check("work pools", in_pools, f"{start} Resume a paused pool in the Prefect UI."),
        check("workers", in_workers, f"{start} Their logs: {home}/logs/control.log and gpu.log"),
        check("deployments", in_deployments, f"{start} Resume a paused deployment in the Prefect UI."),
        check("clips over HTTP", in_web, f"{start} Its log: {home}/logs/web.log"),
        check("store", store, f"See that {home / 'store'} (or RUSHES_STORE_URL) exists and may be written to."),
        check("weights", weights, "Name a model that is there in RUSHES_MODEL, or restore model/weights."),
        *starts,
    ]


def machine_checks(home: Path, *, mounted: bool = False) -> list[Check]:
    """The checks of this machine. mounted: the home may be a volume that belongs to somebody else."""
    reinstall = "Run `make up` (or `pip install -c constraints.txt -e .`) to install what fits together."
    return [
        check("packages", _see_packages, reinstall),
        check(
            "home",
            lambda: _see_home(home, mounted),
            f"Make {home} yours alone: chmod 700, or name another in RUSHES_HOME.",
        ),
        check("disk", lambda: _see_space(home, 2.0), f"Free some space below {home}, or move RUSHES_HOME."),
        check("memory", _see_memory, "End other programs: an engine and the stack want 2 GB."),
        check("temporary files", lambda: _see_space(Path(tempfile.gettempdir()), 0.5), "Free some, or set TMPDIR."),
        check("shared memory", _see_shared_memory, "Give /dev/shm 256 MB (docker run --shm-size); ranks use it."),
    ]


def check(name: str, look: Callable[[], str], mend: str) -> Check:
    """The line of a part: `look` gives what it saw, and raises where that is wrong; then `mend` says what to do."""
    try:
        return Check(name, True, look())
    except Exception as error:  # whatever goes wrong in a part is what this is about
        return Check(name, False, " ".join(str(error).split()) or type(error).__name__, mend)


def _running(part: T | None) -> T:
    if part is None:
        raise RuntimeError("not running")
    return part


def _see_packages() -> str:
    found = {name: metadata.version(name) for name in ("torch", "deepspeed", "prefect", "fastapi", "minio")}
    if found["torch"].split("+")[0] != "2.13.0":
        raise RuntimeError(f"torch {found['torch']} is installed, not 2.13.0")
    if tuple(int(part) for part in found["fastapi"].split(".")[:2]) >= (0, 151):
        raise RuntimeError(f"fastapi {found['fastapi']} keeps Prefect from starting: it must be below 0.151")
    return ", ".join(f"{name} {version}" for name, version in {"Python": sys.version.split()[0], **found}.items())


def _see_home(home: Path, mounted: bool) -> str:
    found = home.stat()
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o077 and not (mounted and found.st_uid != os.geteuid()):
        raise RuntimeError(f"others may enter {home} (mode {mode:04o})")
    if not os.access(home, os.W_OK):
        raise RuntimeError(f"{home} cannot be written to")
    return str(home)


def _see_space(folder: Path, least: float) -> str:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 1e9
    if free < least:
        raise RuntimeError(f"{free:.1f} GB free in {folder}, fewer than {least}")
    return f"{free:.1f} GB free in {folder}"


def _see_memory() -> str:
    free = psutil.virtual_memory().available / 1e9
    if free < 2.0:
        raise RuntimeError(f"{free:.1f} GB available, fewer than 2")
    return f"{free:.1f} GB available"


def _see_shared_memory() -> str:
    return _see_space(Path("/dev/shm"), 0.25) if Path("/dev/shm").exists() else "none on this system"


def describe_deployments(api: Api, file: Path) -> str:
    """The deployments of a prefect.yaml by name. Raises ValueError where one is missing or paused."""
    names = [deployment.full_name for deployment in read_deployments(file)]
    found = {name: api.get(f"/deployments/name/{name}") for name in names}
    if wrong := [name for name, row in found.items() if row is None or row["paused"]]:
        raise ValueError(f"missing or paused: {', '.join(wrong)}")
    return ", ".join(names)


def describe_pool(api: Api, pool: str) -> str:
    """Name and limit of a work pool. Raises RuntimeError where it is missing or paused."""
    row = api.get(f"/work_pools/{pool}")
    if wrong := reason_to_wait(row, api.queues(pool) if row else ()):
        raise RuntimeError(wrong)
    assert row is not None
    return f"{pool} (limit {row['concurrency_limit']})"


def _describe_worker(api: Api, family: Sequence[Member], pool: str) -> str:
    worker = part_of(family, pool)
    if worker is None:
        raise RuntimeError(f"the {pool} worker does not run")
    if not api.has_worker(pool, f"{pool}-worker", datetime.now(UTC) - timedelta(seconds=HEARTBEAT_SECONDS * 3)):
        raise RuntimeError(f"the {pool} worker (pid {worker.pid}) has been silent for {HEARTBEAT_SECONDS * 3:.0f} s")
    return f"{pool} (pid {worker.pid})"
