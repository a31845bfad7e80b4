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

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path

import httpx
import psutil

from infra.stack.databases import LEDGER, POSTGRES_SETTINGS, PREFECT, prefect_url, supply_prefect
from infra.stack.deploy import read_deployments
from infra.stack.home import (
    CONTROL,
    DEPLOYMENTS,
    GPU,
    PARTS,
    POOLS,
    POSTGRES,
    READER,
    SERVER,
    WEB,
    Log,
    Say,
    Stack,
    StackFailed,
    locked,
    make_private,
    read_text,
    signals_raise,
    signals_wait,
    stack_file,
    write_stack,
)
from infra.stack.postgres import Postgres, running_postgres, start_postgres, stop_postgres
from infra.stack.prefect import SERVER_SETTINGS, Api, api_of, prefect_environment, prefect_settings, settle_runs
from infra.stack.processes import (
    Member,
    end_processes,
    free_port,
    is_free,
    listens,
    lives,
    part_of,
    process_family,
    runs_below,
)
from infra.stack.worker import path_with_own_python

PREFERRED_PORT = 4200  # Prefect's own
CONTROL_RUNS = 8  # flow runs of the control pool at once; each is a process of some 200 MB
SERVER_SECONDS = 180.0  # a fresh database on a busy machine
DEPLOY_SECONDS = 180.0
WORKER_SECONDS = 90.0


@dataclass(frozen=True, slots=True)
class PartStatus:
    name: str
    running: bool
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The parts of a stack that run now."""

    home: Path
    parts: tuple[PartStatus, ...]
    flow_runs: int  # processes that execute flow runs

    @property
    def running(self) -> bool:
        """All of it runs."""
        return all(part.running for part in self.parts)


def up(
    home: Path,
    *,
    repo: Path,
    migrate: Callable[[str, str], object],
    engines: int = 1,
    deployments: Path = DEPLOYMENTS,
    prefect_database: str | None = None,
    web: str | None = None,
    environment: Mapping[str, str] | None = None,
    say: Say = lambda _: None,
) -> Stack:
    """Starts the stack of `home`, or what of it does not run, and returns when it takes work.

    `repo` is the folder that flow runs work in; `migrate` brings the ledger at a URL up to date, and makes the login of
    another, which may only look at it; `engines` is how many engines may run at once; `prefect_database` is where
    Prefect keeps its tables (postgresql+asyncpg://…), if not in the stack's own Postgres; `web` is the import path of
    what makes the service that shows clips (an ASGI application that answers /healthz), if there is to be one;
    `environment` is for all processes but Postgres. On a healthy stack it only looks (half a second). Raises
    StackFailed; then, and on Ctrl-C or SIGTERM, everything that this call had started is ended again.
    """
    home = home.absolute()
    make_private(home)
    with signals_raise(), locked(home):
        more = environment or {}
        start = _Start(
            home, repo.absolute(), migrate, engines, deployments.absolute(), prefect_database, web, more, say
        )
        try:
            return start.run()
        except BaseException as error:
            with signals_wait():
                start.undo()
            if isinstance(error, httpx.HTTPError):
                what = f"the Prefect server stopped answering ({error or type(error).__name__})"
                raise StackFailed(f"{what}: see {home}/logs/prefect.log") from error
            raise


def status(home: Path) -> Status:
    """Status of the stack of `home`; takes a second or two when a part hangs, else much less."""
    home = home.absolute()
    family = process_family(home)
    postgres = running_postgres(home / POSTGRES)
    parts = [PartStatus(POSTGRES, postgres is not None, f"port {postgres.port}" if postgres else "not running")]
    server = part_of(family, SERVER)
    if server is None:
        parts.append(PartStatus(SERVER, False, "not running"))
    else:
        healthy = Api(api_of(server.port)).healthy()
        parts.append(PartStatus(SERVER, healthy, f"port {server.port}" + ("" if healthy else " does not answer")))
    web = part_of(family, WEB)
    if web is None:
        parts.append(PartStatus(WEB, False, "not running"))
    else:
        healthy = web_answers(web.port)
        parts.append(PartStatus(WEB, healthy, f"port {web.port}" + ("" if healthy else " does not answer")))
    for pool in POOLS:
        worker = part_of(family, pool)
        parts.append(PartStatus(pool, worker is not None, f"pid {worker.pid}" if worker else "not running"))
    return Status(home=home, parts=tuple(parts), flow_runs=len({member.run for member in family if member.run}))


class _Start:
    """One call of `up`. It remembers what it has started, so that all of it can be ended again."""

    def __init__(
        self,
        home: Path,
        repo: Path,
        migrate: Callable[[str, str], object],
        engines: int,
        deployments: Path,
        prefect_database: str | None,
        web: str | None,
        environment: Mapping[str, str],
        say: Say,
    ) -> None:
        self.home = home
        self.repo = repo
        self.migrate = migrate
        self.limits = {CONTROL: CONTROL_RUNS, GPU: engines}
        self.file = deployments
        self.deployments = read_deployments(deployments)
        self.prefect_database = prefect_database
        self.web = web
        self.environment = environment
        self.say = say
        self.began = time.monotonic()
        self.content = _fingerprint(deployments, repo, self.limits)
        self.registered = home / SERVER / "registered"  # the fingerprint of what the server knows
        self.started: list[str] = []
        self.children: list[psutil.Process] = []
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="rushes-ledger")
        self.ledger: Future[None] = Future()
        self.deploying: subprocess.Popen[bytes] | None = None
        self.deploy_log = Log(home / "logs" / "deploy.log")

    def run(self) -> Stack:
        changed = read_text(self.registered) != self.content
        postgres = self.ensure_postgres()
        self.ledger = self.thread.submit(
            self.migrate_ledger, postgres, changed
        )  # beside the server, which takes longest
        database = self.prefect_database or prefect_url(postgres)
        family = process_family(self.home)
        server = part_of(family, SERVER)
        if server is not None and _uses(server, database) and Api(api_of(server.port)).healthy(patience=10.0):
            api = Api(api_of(server.port))
        else:
            # The old server may hang; workers without a run to lose are better off with a fresh connection.
            old = [member for member in family if member.is_part and not runs_below(family, member)]
            end_processes([member.process for member in old], grace=3.0)
            if changed:
                self.begin_deploy()  # imports the flows while the server starts
            api = self.start_server(postgres, database)
        if changed or not self.is_deployed(api):
            self.deploy(api)
        self.ledger.result()
        self.thread.shutdown()
        write_stack(self.stack(postgres, api), self.limits[GPU])  # flow runs read it, so before the workers
        if self.ensure_web():
            write_stack(self.stack(postgres, api), self.limits[GPU])
        if self.ensure_workers(api):
            write_stack(self.stack(postgres, api), self.limits[GPU])
        if self.started:
            self.tell("The stack is up")
        return self.stack(postgres, api)

    def ensure_postgres(self) -> Postgres:
        folder = self.home / POSTGRES
        if running_postgres(folder) is None:
            self.started.append(POSTGRES)
        postgres = start_postgres(folder, settings=POSTGRES_SETTINGS, databases=(LEDGER, PREFECT))
        if POSTGRES in self.started:
            self.tell(f"Postgres runs on port {postgres.port}")
        return postgres

    def migrate_ledger(self, postgres: Postgres, changed: bool) -> None:
        """Runs in a thread of its own."""
        if changed or POSTGRES in self.started:
            self.migrate(postgres.url_of(LEDGER.name), postgres.url_of(READER, LEDGER.name))

    def start_server(self, postgres: Postgres, database: str) -> Api:
        folder = self.home / SERVER
        folder.mkdir(mode=0o700, exist_ok=True)
        if (old := folder / "prefect.db").exists():
            self.say(
                f"{old} is an earlier version's: its flow runs are not taken over. Delete it when you need them no more"
            )
        settings = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": database, **SERVER_SETTINGS}
        if self.prefect_database is None:
            supply_prefect(postgres, lambda: self.migrate_prefect(settings))
        port = self.serve(
            SERVER,
            "the Prefect server",
            ["prefect.server.api.server:create_app", "--timeout-keep-alive", "5"],
            folder,
            settings=lambda port: prefect_settings(self.home, api_of(port)) | settings,
            healthy=lambda port: Api(api_of(port)).healthy(),
            preferred=PREFERRED_PORT,
        )
        self.tell(f"Prefect runs on port {port}")
        return Api(api_of(port))

    def serve(
        self,
        part: str,
        name: str,
        application: Sequence[str],
        folder: Path,
        *,
        settings: Callable[[int], dict[str, str]],
        healthy: Callable[[int], bool],
        preferred: int | None = None,
    ) -> int:
        """Starts an ASGI application, and returns its port once it answers: the last one, else the preferred, if free.

        application: its factory and options of uvicorn. folder: where it works. settings: by its port.
        """
        remembered = read_text(self.home / part / "port")
        wanted = [port for port in (remembered and int(remembered), preferred) if port]
        for _ in range(5):
            port = next(filter(is_free, wanted), None) or free_port()
            command = ["uvicorn", "--factory", *application, "--host", "127.0.0.1", "--port", str(port)]
            process, log = self.spawn(part, [*command, "--no-access-log"], folder, settings(port))
            if self.wait_for_server(name, process, port, partial(healthy, port), log):
                (self.home / part / "port").write_text(str(port))
                return port
        raise StackFailed(f"five free ports in a row were taken by others before {name} could have them")

    def wait_for_server(
        self, name: str, process: psutil.Process, port: int, healthy: Callable[[], bool], log: Log
    ) -> bool:
        """True when it answers, False when another program has taken its port meanwhile."""
        deadline = time.monotonic() + SERVER_SECONDS
        while time.monotonic() < deadline:
            if not lives(process):
                if "address already in use" in log.said():
                    return False
                raise StackFailed(f"{name} ended while it started: {log}")
            self.check_companions()
            # An answer alone proves nothing: another stack's server may have the port.
            if listens(process, port) and healthy():
                return True
            time.sleep(0.05)
        raise StackFailed(f"{name} did not answer within {SERVER_SECONDS:.0f} s: {log}")

    def ensure_web(self) -> bool:
        """True when it had to start one: anew also where our code is, or Postgres, which may have another port."""
        if self.web is None:
            return False
        folder, code = self.home / WEB, _fingerprint(self.file, self.repo, {})
        old = part_of(process_family(self.home), WEB)
        same = read_text(folder / "code") == code
        if old is not None and same and POSTGRES not in self.started and web_answers(old.port):
            return False
        end_processes([old.process] if old else [], grace=3.0)
        folder.mkdir(mode=0o700, exist_ok=True)
        port = self.serve(WEB, "the clips' service", [self.web], self.repo, settings=lambda _: {}, healthy=web_answers)
        (folder / "code").write_text(code)
        self.tell(f"Clips are shown on port {port}")
        return True

    def check_companions(self) -> None:
        """Fails at once when what goes on beside the server's start has failed."""
        if self.ledger.done():
            self.ledger.result()
        if self.deploying is not None and self.deploying.poll():
            raise StackFailed(f"the deployments could not be registered: {self.deploy_log}")

    def migrate_prefect(self, settings: Mapping[str, str]) -> None:
        log = Log(self.home / "logs" / "prefect-database.log")
        environment = {**self.own(SERVER), **prefect_settings(self.home), **settings}
        command = ["prefect", "server", "database", "upgrade", "--yes"]
        if self.start_process(command, self.home / SERVER, environment, log).wait() != 0:
            raise StackFailed(f"the Prefect server's database could not be made: {log}")

    def begin_deploy(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "infra.stack.deploy", str(self.file)]
        command += [f"--pool={pool}={limit}" for pool, limit in self.limits.items()]
        with self.deploy_log.open() as output:
            self.deploying = subprocess.Popen(
                command,
                cwd=self.repo,
                env=self.own("deploy") | prefect_settings(self.home),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return self.deploying

    def deploy(self, api: Api) -> None:
        process = self.deploying or self.begin_deploy()
        try:
            process.communicate(f"{api.url}\n".encode(), timeout=DEPLOY_SECONDS)
        except subprocess.TimeoutExpired:
            raise StackFailed(f"deploying did not end within {DEPLOY_SECONDS:.0f} s: {self.deploy_log}") from None
        if process.returncode:
            raise StackFailed(f"the deployments could not be registered: {self.deploy_log}")
        self.registered.write_text(self.content)
        self.tell(f"{len(self.deployments)} deployments are registered")

    def is_deployed(self, api: Api) -> bool:
        paths = [f"/work_pools/{pool}" for pool in POOLS]
        paths += [f"/deployments/name/{deployment.full_name}" for deployment in self.deployments]
        return all(api.get(path) is not None for path in paths)

    def ensure_workers(self, api: Api) -> bool:
        """True when it had to start one."""
        family = process_family(self.home)
        missing = [pool for pool in POOLS if part_of(family, pool) is None]
        if not missing:
            return False
        live = {member.run for member in family}
        since = datetime.now(UTC)
        workers: dict[str, tuple[psutil.Process, Log]] = {}
        for pool in missing:
            settle_runs(api, pool, [run for run in api.active_runs(pool) if run["id"] not in live])
            command = ["prefect", "worker", "start", "--pool", pool, "--type", "process", "--name", f"{pool}-worker"]
            command += ["--install-policy", "never"]
            own_python = {"PATH": path_with_own_python(os.environ.get("PATH"))}
            workers[pool] = self.spawn(pool, command, self.repo, own_python | prefect_settings(self.home, api.url))
        deadline = time.monotonic() + WORKER_SECONDS
        for pool, (process, log) in workers.items():
            while not api.has_worker(pool, f"{pool}-worker", since):
                if not lives(process):
                    raise StackFailed(f"the {pool} worker ended while it started: {log}")
                if time.monotonic() > deadline:
                    raise StackFailed(f"the {pool} worker did not report within {WORKER_SECONDS:.0f} s: {log}")
                time.sleep(0.05)
        self.tell(f"Workers wait for flow runs in {' and '.join(missing)}")
        return True

    def spawn(
        self, part: str, command: Sequence[str], folder: Path, settings: dict[str, str]
    ) -> tuple[psutil.Process, Log]:
        log = Log(self.home / "logs" / f"{part}.log")
        if part not in self.started:
            self.started.append(part)
        return self.start_process(command, folder, self.own(part) | settings, log), log

    def own(self, part: str) -> dict[str, str]:
        """The environment of a process of this stack."""
        return {**prefect_environment(self.home, part), **self.environment}

    def start_process(
        self, module: Sequence[str], folder: Path, environment: Mapping[str, str], log: Log
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

    def stack(self, postgres: Postgres, api: Api) -> Stack:
        family = process_family(self.home)
        members = {part: part_of(family, part) for part in PARTS}
        web = members[WEB]
        return Stack(
            home=self.home,
            database_url=postgres.url_of(LEDGER.name),
            reader_url=postgres.url_of(READER, LEDGER.name).replace("+psycopg", "", 1),  # as psql takes it
            store_url=(self.home / "store").as_uri(),
            prefect_api_url=api.url,
            prefect_ui_url=api.url.removesuffix("/api"),
            web_url=f"http://127.0.0.1:{web.port}" if web else None,
            ports={POSTGRES: postgres.port, SERVER: httpx.URL(api.url).port or 0} | ({WEB: web.port} if web else {}),
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
        family = process_family(self.home)
        # A worker of ours may have started a flow run already.
        end_processes(self.children + [m.process for m in family if m.ancestors & mine], grace=3.0)
        if POSTGRES in self.started:
            stop_postgres(self.home / POSTGRES)
        if {POSTGRES, SERVER} & set(self.started):
            stack_file(self.home).unlink(missing_ok=True)


def web_answers(port: int) -> bool:
    """The clips' service answers, and the ledger and the store answer it."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=10.0, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def _uses(server: Member, database: str) -> bool:
    """The Prefect server keeps its tables there: Postgres may have another port since, or a setting has changed."""
    try:
        return server.process.environ().get("PREFECT_SERVER_DATABASE_CONNECTION_URL") == database
    except psutil.NoSuchProcess:
        return False


def _fingerprint(deployments: Path, repo: Path, limits: Mapping[str, int]) -> str:
    """Changes with our code and these settings: then the deployments are registered and the ledger migrated anew."""
    digest = hashlib.sha256(repr((str(repo), sys.executable, metadata.version("prefect"), dict(limits))).encode())
    sources = (path for package in repo.glob("*/__init__.py") for path in package.parent.rglob("*.py"))
    for path in (deployments, *sorted(sources)):
        digest.update(str(path).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
