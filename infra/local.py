"""The embedded stack: Postgres, a Prefect server with its UI, a control worker and a GPU worker, all on loopback.

`up` starts what is missing and leaves what runs, `down` ends all of it, `status` and `doctor` look. State lies under
one home folder, so stacks with different homes run side by side. The parts outlive the program that started them, and
`home/stack.json` tells programs where they are.

No process id is ever remembered. A stack's processes, and everything they start (flow runs, engines, ranks), carry
RUSHES_STACK=<home> in their environment, and by that they are found: after a reboot nobody is mistaken for them, and a
lost stack.json loses nothing.

This module knows nothing about tables, flows or models; what it needs of them is passed in as functions.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import psycopg

from infra.deploy import read_deployments
from infra.postgres import Postgres, PostgresFailed, running_postgres, start_postgres, stop_postgres

DEPLOYMENTS = Path(__file__).with_name("prefect.yaml")
POSTGRES, SERVER, CONTROL, GPU = "postgres", "prefect", "control", "gpu"
PARTS = (POSTGRES, SERVER, CONTROL, GPU)
READER = "reader"  # the login of those who ask
POOLS = (CONTROL, GPU)

PREFERRED_PORT = 4200  # Prefect's own
CONTROL_RUNS = 8  # flow runs of the control pool at once; each is a process of some 200 MB
SERVER_SECONDS = 180.0  # a fresh database on a busy machine
DEPLOY_SECONDS = 180.0
WORKER_SECONDS = 90.0
LOCK_SECONDS = 300.0
GRACE_SECONDS = 15.0  # what engines get to keep clips that are under way and to give back their shards
HEARTBEAT_SECONDS = 30.0  # between two signs of life of a worker; Prefect's default
SOON_SECONDS = 30.0  # what one answer may take where the stack is only looked at, or ended with or without it
ANSWER_SECONDS = 90.0  # its server on SQLite may stand still for a minute after two transactions have met
BEAT_SECONDS = 30  # between two signs of life of a flow run; tidy's automation calls it crashed after 90 of silence
LOG_BYTES = 16 * 2**20  # a longer log is moved aside at the next start

MARK = "RUSHES_STACK"  # in the environment of every process of a stack: its home
PART = "RUSHES_STACK_PART"  # the part that it is or that started it
RUN = "PREFECT__FLOW_RUN_ID"  # Prefect's own: the flow run that a process executes

Say = Callable[[str], None]
_T = TypeVar("_T")


class StackFailed(RuntimeError):
    """The stack could not be started or ended. What the failed start had started has been ended again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A running stack."""

    home: Path
    database_url: str
    reader_url: str
    store_url: str
    prefect_api_url: str
    prefect_ui_url: str
    ports: Mapping[str, int]
    pids: Mapping[str, int]
    started: tuple[str, ...]  # the parts that this call of `up` had to start


@dataclass(frozen=True, slots=True)
class PartStatus:
    name: str
    running: bool
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What runs of a stack now."""

    home: Path
    parts: tuple[PartStatus, ...]
    flow_runs: int  # processes that execute flow runs

    @property
    def running(self) -> bool:
        """All of it runs."""
        return all(part.running for part in self.parts)


@dataclass(frozen=True, slots=True)
class Check:
    """One line of `rushes doctor`; `mend` says what to do when it is not ok."""

    name: str
    ok: bool
    detail: str
    mend: str = ""


def up(
    home: Path,
    *,
    repo: Path,
    migrate: Callable[[str, str], object],
    engines: int = 1,
    deployments: Path = DEPLOYMENTS,
    say: Say = lambda _: None,
) -> Stack:
    """Starts the stack of `home`, or what of it does not run, and returns when it takes work.

    `repo` is the folder that flow runs work in; `migrate` brings the ledger at a URL up to date, and makes the login of
    another, which may only look at it; `engines` is how many
    engines may run at once. On a healthy stack it only looks (half a second). Raises StackFailed; then, and on Ctrl-C
    or SIGTERM, everything that this call had started is ended again.
    """
    home = home.absolute()
    _make_private(home)
    with _signals_raise(), _locked(home):
        start = _Start(home, repo.absolute(), migrate, engines, deployments.absolute(), say)
        try:
            return start.run()
        except BaseException as error:
            with _signals_wait():
                start.undo()
            if isinstance(error, httpx.HTTPError):
                what = f"the Prefect server stopped answering ({error or type(error).__name__})"
                raise StackFailed(f"{what}: see {home}/logs/prefect.log") from error
            raise


def down(home: Path, *, say: Say = lambda _: None) -> tuple[str, ...]:
    """Ends the stack of `home` with everything it started; returns the parts that ran.

    Engines get 15 seconds to keep the clips that are under way and to give back their shards. Runs of the control pool
    that were under way go back to Scheduled, so that the next `up` takes them up again. Raises StackFailed when
    something does not end.
    """
    home = home.absolute()
    if not home.is_dir():
        return ()
    with _signals_raise(), _locked(home):
        return _end(home, say)


def status(home: Path) -> Status:
    """What runs of the stack of `home`; takes a second or two when a part hangs, else much less."""
    home = home.absolute()
    family = _family(home)
    postgres = running_postgres(home / POSTGRES)
    parts = [PartStatus(POSTGRES, postgres is not None, f"port {postgres.port}" if postgres else "not running")]
    server = _part(family, SERVER)
    if server is None:
        parts.append(PartStatus(SERVER, False, "not running"))
    else:
        healthy = _Api(_api_url(server.port)).healthy()
        parts.append(PartStatus(SERVER, healthy, f"port {server.port}" + ("" if healthy else " does not answer")))
    for pool in POOLS:
        worker = _part(family, pool)
        parts.append(PartStatus(pool, worker is not None, f"pid {worker.pid}" if worker else "not running"))
    return Status(home=home, parts=tuple(parts), flow_runs=len({member.run for member in family if member.run}))


# Starting


class _Start:
    """One call of `up`. It remembers what it has started, so that all of it can be ended again."""

    def __init__(
        self, home: Path, repo: Path, migrate: Callable[[str, str], object], engines: int, deployments: Path, say: Say
    ) -> None:
        self.home = home
        self.repo = repo
        self.migrate = migrate
        self.limits = {CONTROL: CONTROL_RUNS, GPU: engines}
        self.file = deployments
        self.deployments = read_deployments(deployments)
        self.say = say
        self.began = time.monotonic()
        self.content = _fingerprint(deployments, repo, self.limits)
        self.registered = home / SERVER / "registered"  # the fingerprint of what the server knows
        self.started: list[str] = []
        self.children: list[psutil.Process] = []
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="rushes-ledger")
        self.ledger: Future[Postgres] = Future()
        self.deploying: subprocess.Popen[bytes] | None = None
        self.deploy_log = _Log(home / "logs" / "deploy.log")

    def run(self) -> Stack:
        changed = _read_text(self.registered) != self.content
        self.ledger = self.thread.submit(self.ensure_ledger, changed)  # beside the server, which takes longest
        family = _family(self.home)
        server = _part(family, SERVER)
        if server is not None and _Api(_api_url(server.port)).healthy(patience=10.0):
            api = _Api(_api_url(server.port))
        else:
            # The old server may hang; workers without a run to lose are better off with a fresh connection.
            old = [member for member in family if member.is_part and not _runs_below(family, member)]
            _end_processes([member.process for member in old], grace=3.0)
            if changed:
                self.begin_deploy()  # imports the flows while the server starts
            api = self.start_server()
        if changed or not self.is_deployed(api):
            self.deploy(api)
        postgres = self.ledger.result()
        self.thread.shutdown()
        _write_stack(self.stack(postgres, api), self.limits[GPU])  # flow runs read it, so before the workers
        if self.ensure_workers(api):
            _write_stack(self.stack(postgres, api), self.limits[GPU])
        if self.started:
            self.tell("The stack is up")
        return self.stack(postgres, api)

    def ensure_ledger(self, changed: bool) -> Postgres:
        """Runs in a thread of its own."""
        folder = self.home / POSTGRES
        postgres = running_postgres(folder)
        if postgres is None:
            self.started.append(POSTGRES)
            postgres = start_postgres(folder)
            self.tell(f"Postgres runs on port {postgres.port}")
            changed = True
        if changed:
            self.migrate(postgres.url, postgres.url_of(READER))
        return postgres

    def start_server(self) -> _Api:
        folder = self.home / SERVER
        folder.mkdir(mode=0o700, exist_ok=True)
        self.supply_database(folder / "prefect.db")
        remembered = int(_read_text(folder / "port") or PREFERRED_PORT)
        for _ in range(5):
            port = next((p for p in (remembered, PREFERRED_PORT) if _is_free(p)), None) or _free_port()
            api = _Api(_api_url(port))
            command = ["uvicorn", "--factory", "prefect.server.api.server:create_app", "--host", "127.0.0.1"]
            command += ["--port", str(port), "--timeout-keep-alive", "5", "--no-access-log"]
            process, log = self.spawn(SERVER, command, folder, {**_prefect_settings(self.home, api.url), **_SERVER})
            if self.wait_for_server(process, port, api, log):
                (folder / "port").write_text(str(port))
                self.tell(f"Prefect runs on port {port}")
                return api
        raise StackFailed("five free ports in a row were taken by others before the Prefect server could have them")

    def wait_for_server(self, process: psutil.Process, port: int, api: _Api, log: _Log) -> bool:
        """True when it answers, False when another program has taken its port meanwhile."""
        deadline = time.monotonic() + SERVER_SECONDS
        while time.monotonic() < deadline:
            if not _lives(process):
                if "address already in use" in log.said():
                    return False
                raise StackFailed(f"the Prefect server ended while it started: {log}")
            self.check_companions()
            # An answer alone proves nothing: another stack's server may have the port.
            if _listens(process, port) and api.healthy():
                return True
            time.sleep(0.05)
        raise StackFailed(f"the Prefect server did not answer within {SERVER_SECONDS:.0f} s: {log}")

    def check_companions(self) -> None:
        """Fails at once when what goes on beside the server's start has failed."""
        if self.ledger.done():
            self.ledger.result()
        if self.deploying is not None and self.deploying.poll():
            raise StackFailed(f"the deployments could not be registered: {self.deploy_log}")

    def supply_database(self, path: Path) -> None:
        """Gives a new home a copy of a migrated database, kept in the virtual environment: migrating takes 8 s."""
        if path.exists() or sys.prefix == sys.base_prefix or not os.access(sys.prefix, os.W_OK):
            return
        template = Path(sys.prefix, "share", "rushes", f"prefect-{metadata.version('prefect')}.db")
        if not template.exists():
            template.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=template.parent) as scratch:
                made = Path(scratch, "prefect.db")
                environment = {
                    **_environment(self.home, SERVER),
                    **_SERVER,
                    "PREFECT_HOME": scratch,
                    "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{made}",
                }
                command = ["prefect", "server", "database", "upgrade", "--yes"]
                log = _Log(self.home / "logs" / "prefect-database.log")
                process = self.start_process(command, self.home / SERVER, environment, log)
                if process.wait() != 0:
                    raise StackFailed(f"the Prefect server's database could not be made: {log}")
                with contextlib.closing(sqlite3.connect(made)) as connection:  # leaves one file, without a journal
                    connection.execute("pragma wal_checkpoint(truncate)")
                    connection.execute("pragma journal_mode=delete")
                made.replace(template)
        half = path.with_suffix(".half")
        shutil.copyfile(template, half)
        half.replace(path)

    def begin_deploy(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "infra.deploy", str(self.file), "--folder", str(self.repo)]
        command += [f"--pool={pool}={limit}" for pool, limit in self.limits.items()]
        with self.deploy_log.open() as output:
            self.deploying = subprocess.Popen(
                command,
                cwd=self.repo,
                env=_environment(self.home, "deploy") | _prefect_settings(self.home),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return self.deploying

    def deploy(self, api: _Api) -> None:
        process = self.deploying or self.begin_deploy()
        try:
            process.communicate(f"{api.url}\n".encode(), timeout=DEPLOY_SECONDS)
        except subprocess.TimeoutExpired:
            raise StackFailed(f"deploying did not end within {DEPLOY_SECONDS:.0f} s: {self.deploy_log}") from None
        if process.returncode:
            raise StackFailed(f"the deployments could not be registered: {self.deploy_log}")
        self.registered.write_text(self.content)
        self.tell(f"{len(self.deployments)} deployments are registered")

    def is_deployed(self, api: _Api) -> bool:
        paths = [f"/work_pools/{pool}" for pool in POOLS]
        paths += [f"/deployments/name/{deployment.full_name}" for deployment in self.deployments]
        return all(api.get(path) is not None for path in paths)

    def ensure_workers(self, api: _Api) -> bool:
        """True when it had to start one."""
        family = _family(self.home)
        missing = [pool for pool in POOLS if _part(family, pool) is None]
        if not missing:
            return False
        live = {member.run for member in family}
        since = datetime.now(UTC)
        workers: dict[str, tuple[psutil.Process, _Log]] = {}
        for pool in missing:
            _settle_runs(api, pool, [run for run in api.active_runs(pool) if run["id"] not in live])
            command = ["prefect", "worker", "start", "--pool", pool, "--type", "process", "--name", f"{pool}-worker"]
            command += ["--install-policy", "never"]
            workers[pool] = self.spawn(pool, command, self.repo, _prefect_settings(self.home, api.url))
        deadline = time.monotonic() + WORKER_SECONDS
        for pool, (process, log) in workers.items():
            while not api.has_worker(pool, f"{pool}-worker", since):
                if not _lives(process):
                    raise StackFailed(f"the {pool} worker ended while it started: {log}")
                if time.monotonic() > deadline:
                    raise StackFailed(f"the {pool} worker did not report within {WORKER_SECONDS:.0f} s: {log}")
                time.sleep(0.05)
        self.tell(f"Workers wait for flow runs in {' and '.join(missing)}")
        return True

    def spawn(
        self, part: str, command: Sequence[str], folder: Path, settings: dict[str, str]
    ) -> tuple[psutil.Process, _Log]:
        log = _Log(self.home / "logs" / f"{part}.log")
        if part not in self.started:
            self.started.append(part)
        return self.start_process(command, folder, _environment(self.home, part) | settings, log), log

    def start_process(
        self, module: Sequence[str], folder: Path, environment: Mapping[str, str], log: _Log
    ) -> psutil.Process:
        """Starts `python -m module…` in a session of its own: it outlives us, and a Ctrl-C at our terminal is ours."""
        with log.open() as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *module],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        process.returncode = 0  # tells Popen, which warns of children left running, that we mean it
        child = psutil.Process(process.pid)
        self.children.append(child)
        return child

    def stack(self, postgres: Postgres, api: _Api) -> Stack:
        family = _family(self.home)
        members = {part: _part(family, part) for part in PARTS}
        return Stack(
            home=self.home,
            database_url=postgres.url,
            reader_url=postgres.url_of(READER),
            store_url=(self.home / "store").as_uri(),
            prefect_api_url=api.url,
            prefect_ui_url=api.url.removesuffix("/api"),
            ports={POSTGRES: postgres.port, SERVER: httpx.URL(api.url).port or 0},
            pids={POSTGRES: postgres.pid} | {part: member.pid for part, member in members.items() if member},
            started=tuple(part for part in PARTS if part in self.started),
        )

    def tell(self, message: str) -> None:
        self.say(f"{message} ({time.monotonic() - self.began:.1f} s)")

    def undo(self) -> None:
        self.thread.shutdown(cancel_futures=True)  # waits: Postgres is then either started or not
        if self.deploying is not None:
            self.deploying.kill()
            self.deploying.communicate()
        mine = {child.pid for child in self.children}
        family = _family(self.home)
        # A worker of ours may have started a flow run already.
        _end_processes(self.children + [m.process for m in family if m.ancestors & mine], grace=3.0)
        if POSTGRES in self.started:
            stop_postgres(self.home / POSTGRES)
        if {POSTGRES, SERVER} & set(self.started):
            _stack_file(self.home).unlink(missing_ok=True)


def _prefect_settings(home: Path, api_url: str | None = None) -> dict[str, str]:
    """What every Prefect process of a stack is told; nothing of the caller's own Prefect settings comes in."""
    return {
        "PREFECT_HOME": str(home / SERVER),
        **({"PREFECT_API_URL": api_url} if api_url else {}),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(BEAT_SECONDS),
        "PREFECT_WORKER_QUERY_SECONDS": "2",  # 10 by default, which a person at a terminal feels
        "PREFECT_WORKER_CANCELLATION_POLL_SECONDS": "10",  # 120 by default, where the events stream is lost
        "PREFECT_LOGGING_COLORS": "false",
        "PREFECT_CLI_COLORS": "false",
    }


# Rows are written in batches (the defaults lose task runs in bursts), and old runs are vacuumed as well as old events.
# Signs of life and changes of progress are of no use once a later one is there, and grow with time alone: they are kept
# for an hour.
# Of a schedule only the next run is made: a stack that was down for a week wakes up to one late run, not to many.
_SERVER = {
    "PREFECT__SERVER_FINAL": "1",
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


def _environment(home: Path, part: str) -> dict[str, str]:
    """The caller's environment without its Prefect settings, and with the marks of this stack."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
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


def _fingerprint(deployments: Path, repo: Path, limits: Mapping[str, int]) -> str:
    """Changes with our code and these settings: then the deployments are registered and the ledger migrated anew."""
    digest = hashlib.sha256(repr((str(repo), sys.executable, metadata.version("prefect"), dict(limits))).encode())
    sources = (path for package in repo.glob("*/__init__.py") for path in package.parent.rglob("*.py"))
    for path in (deployments, *sorted(sources)):
        digest.update(str(path).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


# Examining


def doctor(
    home: Path,
    *,
    schema: Callable[[str], str],
    store: Callable[[], str],
    weights: Callable[[], str],
    deployments: Path = DEPLOYMENTS,
) -> list[Check]:
    """Looks at every part, and at what the parts need from the machine.

    `schema` looks at the ledger at a URL, `store` writes to the store, `weights` looks at the model; each returns what
    it saw and raises when that is wrong.
    """
    home = home.absolute()
    family = _family(home)
    postgres = running_postgres(home / POSTGRES)
    server = _part(family, SERVER)
    api = _Api(_api_url(server.port), patience=SOON_SECONDS) if server else None

    def in_ledger() -> str:
        return schema(_running(postgres).url)

    def in_postgres() -> str:
        with psycopg.connect(_running(postgres).libpq_url, connect_timeout=5) as connection:
            return f"{connection.info.server_version // 10000} on port {_running(postgres).port}"

    def in_prefect() -> str:
        runs, installed = _running(api).version(), metadata.version("prefect")
        if runs != installed:
            raise ValueError(f"version {runs} runs, {installed} is installed")
        return f"{runs} at {_running(api).url.removesuffix('/api')}"

    def in_pools() -> str:
        return ", ".join(_describe_pool(_running(api), pool) for pool in POOLS)

    def in_workers() -> str:
        return ", ".join(_describe_worker(_running(api), family, pool) for pool in POOLS)

    def in_deployments() -> str:
        names = [deployment.full_name for deployment in read_deployments(deployments)]
        found = {name: _running(api).get(f"/deployments/name/{name}") for name in names}
        if wrong := [name for name, row in found.items() if row is None or row["paused"]]:
            raise ValueError(f"missing or paused: {', '.join(wrong)}")
        return ", ".join(names)

    reinstall = "Run `make up` (or `pip install -c constraints.txt -e .`) to install what fits together."
    start = "Run `rushes up`: it starts what does not run."
    return [
        _check("packages", _see_packages, reinstall),
        _check("home", lambda: _see_home(home), f"Make {home} yours alone: chmod 700, or name another in RUSHES_HOME."),
        _check("disk", lambda: _see_space(home, 2.0), f"Free some space below {home}, or move RUSHES_HOME."),
        _check("memory", _see_memory, "End other programs: an engine and the stack want 2 GB."),
        _check("temporary files", lambda: _see_space(Path(tempfile.gettempdir()), 0.5), "Free some, or set TMPDIR."),
        _check("shared memory", _see_shared_memory, "Give /dev/shm 256 MB (docker run --shm-size); ranks use it."),
        _check("postgres", in_postgres, f"{start} Its log: {home / POSTGRES / 'postgres.log'}"),
        _check("ledger", in_ledger, f"{start} That also brings the tables up to date."),
        _check("prefect", in_prefect, f"{start} After an upgrade, `rushes down` first. Log: {home}/logs/prefect.log"),
        _check("work pools", in_pools, f"{start} Resume a paused pool in the Prefect UI."),
        _check("workers", in_workers, f"{start} Their logs: {home}/logs/control.log and gpu.log"),
        _check("deployments", in_deployments, f"{start} Resume a paused deployment in the Prefect UI."),
        _check("store", store, f"See that {home / 'store'} (or RUSHES_STORE_URL) exists and may be written to."),
        _check("weights", weights, "Name a model that is there in RUSHES_MODEL, or restore model/weights."),
    ]


def _check(name: str, look: Callable[[], str], mend: str) -> Check:
    try:
        return Check(name, True, look())
    except Exception as error:  # whatever goes wrong in a part is what this is about
        return Check(name, False, " ".join(str(error).split()) or type(error).__name__, mend)


def _running(part: _T | None) -> _T:
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


def _see_home(home: Path) -> str:
    mode = stat.S_IMODE(home.stat().st_mode)
    if mode & 0o077:
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


def _describe_pool(api: _Api, pool: str) -> str:
    row = api.get(f"/work_pools/{pool}")
    if row is None:
        raise RuntimeError(f"{pool} is missing")
    if row["is_paused"]:
        raise RuntimeError(f"{pool} is paused")
    return f"{pool} (limit {row['concurrency_limit']})"


def _describe_worker(api: _Api, family: Sequence[_Member], pool: str) -> str:
    worker = _part(family, pool)
    if worker is None:
        raise RuntimeError(f"the {pool} worker does not run")
    if not api.has_worker(pool, f"{pool}-worker", datetime.now(UTC) - timedelta(seconds=HEARTBEAT_SECONDS * 3)):
        raise RuntimeError(f"the {pool} worker (pid {worker.pid}) has been silent for {HEARTBEAT_SECONDS * 3:.0f} s")
    return f"{pool} (pid {worker.pid})"


# Ending


def _end(home: Path, say: Say) -> tuple[str, ...]:
    family = _family(home)
    postgres = running_postgres(home / POSTGRES)
    ran = tuple(p for p in PARTS if _part(family, p) or (p == POSTGRES and postgres))
    server = _part(family, SERVER)
    api = _Api(_api_url(server.port), patience=SOON_SECONDS) if server is not None else None
    if api is not None and not api.healthy():
        api = None
    under_way: dict[str, list[dict[str, Any]]] = {}
    if api is not None:
        with _prefect_may_fail(say):
            under_way = {pool: api.active_runs(pool) for pool in POOLS}

    _stack_file(home).unlink(missing_ok=True)
    _end_flow_runs(home, say)
    _end_processes([m.process for m in _family(home) if m.is_part and m.part != SERVER], grace=2.0)
    _end_processes([m.process for m in _family(home) if m.part != SERVER or m.run], grace=0.0)
    if api is not None:
        with _prefect_may_fail(say):
            for pool, runs in under_way.items():
                _settle_runs(api, pool, runs)
    with ThreadPoolExecutor(1) as beside:
        stopping = beside.submit(stop_postgres, home / POSTGRES)
        _end_processes([m.process for m in _family(home)], grace=5.0)
    try:
        stopping.result()
    except PostgresFailed as error:
        raise StackFailed(str(error)) from error
    left = _family(home)
    if left:
        raise StackFailed(f"processes {[member.pid for member in left]} of {home} do not end, not even by SIGKILL")
    return ran


@contextlib.contextmanager
def _prefect_may_fail(say: Say) -> Generator[None]:
    """A Prefect server in trouble must not keep the stack from ending; the next `up` settles what is open."""
    try:
        yield
    except (httpx.HTTPError, StackFailed) as error:
        say(f"Prefect does not answer as it should ({error or type(error).__name__}); ending the stack all the same")


def _end_flow_runs(home: Path, say: Say) -> None:
    """SIGTERM to every process that executes a flow run, while their workers still watch; waits until they are gone."""
    told: set[int] = set()
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline:
        runs = [member for member in _family(home) if member.run]
        if not runs:
            return
        if not told:
            count = len({member.run for member in runs})
            say(f"Ending {count} flow {'run' if count == 1 else 'runs'}")
        for member in runs:
            # Only the top of each: an engine ends its own ranks.
            if member.pid not in told and not member.ancestors & {other.pid for other in runs}:
                told.add(member.pid)
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.process.terminate()
        time.sleep(0.1)


def _settle_runs(api: _Api, pool: str, runs: Iterable[Mapping[str, Any]]) -> None:
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


def _end_processes(processes: Iterable[psutil.Process], *, grace: float) -> None:
    """SIGTERM, and after `grace` seconds SIGKILL; with no grace SIGKILL at once. Our own children are reaped."""
    processes = list(processes)
    living = [process for process in processes if _lives(process)]
    for how, patience in ((psutil.Process.terminate, grace), (psutil.Process.kill, 5.0)):
        if patience and living:
            for process in living:
                with contextlib.suppress(psutil.NoSuchProcess):
                    how(process)
            # Not psutil's wait: where the init process is slow to reap, it would sit through that too.
            deadline = time.monotonic() + patience
            while (living := [process for process in living if _lives(process)]) and time.monotonic() < deadline:
                time.sleep(0.02)
    for process in processes:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process.pid, os.WNOHANG)


# Looking


@dataclass(frozen=True, slots=True)
class _Member:
    """A living process of a stack."""

    process: psutil.Process
    part: str  # the part that it is or belongs to
    run: str | None  # the flow run that it works for
    command: tuple[str, ...]

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def is_part(self) -> bool:
        """It is the part itself, not something started by it."""
        named = "prefect.server.api.server:create_app" if self.part == SERVER else "worker"
        return self.run is None and named in self.command

    @property
    def port(self) -> int:
        """The port in its command line."""
        return int(self.command[self.command.index("--port") + 1])

    @property
    def ancestors(self) -> set[int]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return {process.pid for process in self.process.parents()}
        return set()


def _family(home: Path) -> list[_Member]:
    """Every living process of the stack of `home`, oldest first (about 30 ms).

    Postgres is not among them: infra/postgres.py knows its own.
    """
    found: list[_Member] = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            marked = environment.get(MARK) == str(home)
            if not marked and environment.get("RUSHES_HOME") != str(home):
                continue
            command = tuple(process.cmdline())
            if (marked or _is_lost_rank(process, command, home)) and process.pid != os.getpid() and _lives(process):
                found.append(_Member(process, environment.get(PART, ""), environment.get(RUN), command))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return sorted(found, key=lambda member: member.process.create_time())


def _is_lost_rank(process: psutil.Process, command: Sequence[str], home: Path) -> bool:
    """A rank that a killed `rushes engine` left behind: nobody else would end it."""
    if "model.rank" not in command:
        return False
    parent = process.parent()
    return parent is None or parent.environ().get("RUSHES_HOME") != str(home)


def _part(family: Sequence[_Member], part: str) -> _Member | None:
    return next((member for member in family if member.part == part and member.is_part), None)


def _runs_below(family: Sequence[_Member], worker: _Member) -> bool:
    return any(member.run and worker.pid in member.ancestors for member in family)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _listens(process: psutil.Process, port: int) -> bool:
    try:
        connections = process.net_connections(kind="tcp")
    except psutil.NoSuchProcess:
        return False
    return any(c.status == psutil.CONN_LISTEN and c.laddr and c.laddr[1] == port for c in connections)


class _Api:
    """The Prefect server's REST interface, as far as the stack needs it."""

    def __init__(self, url: str, *, patience: float = ANSWER_SECONDS) -> None:
        """`patience`: seconds that one answer may take, repetitions included."""
        self.url, self.patience = url, patience

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

    def has_worker(self, pool: str, name: str, since: datetime) -> bool:
        """A worker of this name has reported since then."""
        return any(
            worker["name"] == name and datetime.fromisoformat(worker["last_heartbeat_time"]) >= since
            for worker in self.workers(pool)
        )

    def _call(self, method: str, path: str, body: Any = None) -> httpx.Response:
        """Asks until there is an answer; every request here may be made twice. Raises httpx.HTTPError if none comes."""
        until, pause = time.monotonic() + self.patience, 0.1
        while True:
            left = until - time.monotonic()
            try:
                answer = self._send(method, path, body, max(left, 5.0))
                if answer.status_code not in (500, 503) or left <= 0:
                    return answer
            except (httpx.ReadError, httpx.RemoteProtocolError):  # it closed a connection that was made just then
                if left <= 0:
                    raise
            time.sleep(pause)  # two transactions of its SQLite have met (503), or all connections wait for it (500)
            pause = min(2 * pause, 4.0)

    def _send(self, method: str, path: str, body: Any, timeout: float) -> httpx.Response:
        # No proxy from the environment: it would swallow calls to loopback.
        return httpx.request(method, self.url + path, json=body, timeout=timeout, trust_env=False, verify=False)

    def _content(self, answer: httpx.Response) -> Any:
        if answer.is_error:
            where = f"{answer.request.method} {answer.request.url}"
            raise StackFailed(f"the Prefect server refused {where}: {answer.status_code} {answer.text[:500]}")
        return answer.json()


def _api_url(port: int) -> str:
    return f"http://127.0.0.1:{port}/api"


class _Log:
    """A log file of a process, and what has been written to it since we opened it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if path.exists() and path.stat().st_size > LOG_BYTES:
            path.replace(path.with_suffix(".log.1"))
        self.start = path.stat().st_size if path.exists() else 0

    def open(self) -> Any:
        return open(self.path, "ab")

    def said(self) -> str:
        with open(self.path, "rb") as file:
            file.seek(self.start)
            return file.read()[-2000:].decode(errors="replace")

    def __str__(self) -> str:
        return f"{self.path} ends with\n{self.said().strip() or '(nothing)'}"


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# The home folder


def _make_private(home: Path) -> None:
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        if home.stat().st_uid != os.geteuid():
            raise StackFailed(f"{home} belongs to another user: name a folder of your own in RUSHES_HOME")
        home.chmod(stat.S_IRWXU)
    except OSError as error:
        raise StackFailed(f"{home} cannot be used as RUSHES_HOME: {error.strerror}") from error


@contextlib.contextmanager
def _locked(home: Path) -> Generator[None]:
    """One `up` or `down` at a time; a second one waits for the first."""
    with open(home / "lock", "w") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StackFailed(f"another `rushes up` or `down` has been at work in {home} for minutes") from None
                time.sleep(0.1)
        yield


def _stack_file(home: Path) -> Path:
    return home / "stack.json"


def _write_stack(stack: Stack, engines: int) -> None:
    content = {
        "database_url": stack.database_url,
        "reader_url": stack.reader_url,
        "store_url": stack.store_url,
        "prefect_api_url": stack.prefect_api_url,
        "prefect_ui_url": stack.prefect_ui_url,
        "ports": dict(stack.ports),
        "pids": dict(stack.pids),  # for people; no program trusts them
        "engines": engines,
    }
    handle, path = tempfile.mkstemp(dir=stack.home, prefix=".stack-")  # made with mode 0600
    with os.fdopen(handle, "w") as file:
        json.dump(content, file, indent=1)
    os.replace(path, _stack_file(stack.home))


def _read_text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""


# Signals


@contextlib.contextmanager
def _signals_raise() -> Generator[None]:
    """SIGTERM and SIGHUP end us by an exception, as Ctrl-C does, so that what was started is ended.

    A shell starts background jobs with SIGINT ignored, and our children would inherit that: then no worker would ever
    stop for a signal, since Prefect's turn SIGTERM into SIGINT.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    signal.signal(signal.SIGTERM, leave)
    if before[signal.SIGHUP] is not signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, leave)
    if before[signal.SIGINT] is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _signals_wait() -> Generator[None]:
    """A second Ctrl-C does not interrupt the clearing up after the first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
