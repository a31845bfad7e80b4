"""Production as infra/compose.yaml ships it, service by service as processes of this machine.

Environment and commands are the file's own; only names of services become addresses on loopback, and images become what
is installed here: the wheel's Postgres prepared by postgres-init.sh, the Prefect server with its password, Ceph's S3
server. Every host has a name, a home, a Python and a checkout of its own, at a path that no other has.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
import yaml
from psycopg.rows import dict_row

from infra.stack.postgres import Postgres, client_program, start_postgres, stop_postgres
from infra.stack.processes import free_port
from tests.collector import Collector
from tests.end_to_end.stack import FINAL, finished, wait_for
from tests.integration.s3 import S3Server, s3_server

ROOT = Path(__file__).parents[1]
INFRA = ROOT / "infra"
SECRETS = ("POSTGRES", "LEDGER", "PREFECT_DB", "PLATFORM", "READER", "STORE_ROOT")  # …_PASSWORD of infra/.env


@dataclass
class Host:
    """A computer: its name, its home, its Python and its checkout."""

    name: str
    folder: Path
    settings: dict[str, str]
    within: tuple[str, ...] = ()  # what gives a command the host's name
    processes: list[subprocess.Popen[str]] = field(default_factory=list[subprocess.Popen[str]])

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def python(self) -> Path:
        return self.folder / "python" / "bin" / "python3"

    @property
    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RUSHES_", "PREFECT_", "OTEL_", "PYTHON"))}
        own = {"RUSHES_HOME": str(self.home), "PYTHONPATH": str(self.folder / "checkout"), "OMP_NUM_THREADS": "1"}
        return {**kept, **own, **self.settings}

    def install(self) -> None:
        """Puts a checkout and a virtual environment onto the host."""
        checkout, python = self.folder / "checkout", self.folder / "python"
        checkout.mkdir(parents=True)
        for each in ("flows", "model", "db", "infra"):
            left_out = shutil.ignore_patterns("__pycache__", ".env", "weights")
            shutil.copytree(ROOT / each, checkout / each, ignore=left_out)
        (checkout / "model" / "weights").symlink_to(ROOT / "model" / "weights")
        for each in ("pyproject.toml", "alembic.ini"):
            shutil.copy(ROOT / each, checkout / each)
        (python / "bin").mkdir(parents=True)
        for each in ("python", "python3"):
            (python / "bin" / each).symlink_to(Path(sys.executable).resolve())
        packages = python / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        packages.mkdir(parents=True)
        (packages / "all.pth").write_text(sysconfig.get_path("purelib"))  # what pip would have put there
        (python / "pyvenv.cfg").write_text(f"home = {Path(sys.executable).resolve().parent}\n")

    def start(self, *arguments: str, **settings: str) -> subprocess.Popen[str]:
        """A command of `rushes`, as it begins. What it says is in `logs`."""
        log = self.folder / f"{arguments[0]}.log"
        command = [*self.within, str(self.python), "-m", "flows.cli.main", *arguments]
        with log.open("ab") as output:
            self.processes.append(
                subprocess.Popen(
                    command,
                    cwd=self.folder,
                    env=self.environment | settings,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    text=True,
                    start_new_session=True,
                )
            )
        return self.processes[-1]

    def rushes(self, *arguments: str, code: int = 0, **settings: str) -> str:
        """Runs a command to its end, asserts its exit code, and returns what it printed."""
        command = [*self.within, str(self.python), "-m", "flows.cli.main", *arguments]
        started = subprocess.Popen(
            command, cwd=self.folder, env=self.environment | settings, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        return finished(started, code)

    def running(self) -> list[psutil.Process]:
        """Every living process of the host, the workers and what they started."""
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get("RUSHES_HOME") == str(self.home) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def logs(self) -> str:
        return "".join(
            f"\n--- {self.name} {file.name}\n{file.read_text(errors='replace')[-6000:]}"
            for file in self.folder.glob("*.log")
        )

    def crash(self) -> None:
        """The host's power is cut."""
        for process in self.running():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for process in self.processes:
            process.wait(60)
        self.processes.clear()


@dataclass
class Production:
    """The services, and hosts that know nothing of each other but the settings."""

    folder: Path
    services: Mapping[str, Any]
    addresses: Mapping[str, str]
    postgres: Postgres
    prefect: subprocess.Popen[bytes] | None
    auth: str
    api: str
    store: S3Server
    hosts: list[Host] = field(default_factory=list[Host])

    def host(self, name: str, service: str, **settings: str) -> Host:
        """A host, named `name`, that has the environment of a service."""
        host = Host(
            name, self.folder / name / secrets.token_hex(2), self.environment(service) | settings, as_host(name)
        )
        host.install()
        self.hosts.append(host)
        return host

    def named(self, name: str) -> Host:
        return next(host for host in self.hosts if host.name == name)

    def environment(self, service: str) -> dict[str, str]:
        given: Mapping[str, str] = self.services[service]["environment"]
        told = {name: self.reached("" if value is None else str(value)) for name, value in given.items()}
        return told | ({"RUSHES_STORE_ACCESS_KEY": self.store.access_key} if "RUSHES_STORE_URL" in told else {})

    def command(self, service: str) -> list[str]:
        return [self.reached(part) for part in self.services[service]["command"]]

    def reached(self, value: str) -> str:
        """A setting whose names of services are addresses here."""
        for name, address in self.addresses.items():
            value = value.replace(name, address)
        return value

    # What people see

    def sql(self, query: str, *values: Any) -> list[dict[str, Any]]:
        address = self.postgres.libpq_url.rpartition("/")[0] + "/rushes"
        with psycopg.Connection[dict[str, Any]].connect(address, row_factory=dict_row, autocommit=True) as connection:
            return connection.execute(query.encode(), values).fetchall()

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Prefect's API, as its page in the browser talks to it."""
        user, _, password = self.auth.partition(":")
        answer = httpx.request(method, self.api + path, json=body, auth=(user, password), timeout=60, trust_env=False)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def maintain(self) -> None:
        """A round of maintenance, as its schedule makes every ten minutes."""
        found = self.ask("GET", "/deployments/name/maintenance/scheduled")
        self.ended(str(self.ask("POST", f"/deployments/{found['id']}/create_flow_run", {})["id"]))

    def ended(self, run_id: str, *, state: str = "Completed", seconds: float = 400.0) -> dict[str, Any]:
        """The flow run once it has ended; asserts how."""

        def look() -> dict[str, Any] | None:
            found = self.ask("GET", f"/flow_runs/{run_id}")
            return found if found["state_type"] in FINAL else None

        ended = wait_for(look, f"a flow run to end{self.logs()}", seconds=seconds, every=0.5)
        assert ended["state_name"] == state, (ended["state_name"], ended["state"]["message"], self.logs())
        return ended

    def logs(self) -> str:
        return "".join(host.logs() for host in self.hosts)

    # Prefect, as its service runs it

    def start_prefect(self) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RUSHES_", "PREFECT_", "OTEL_"))}
        environment |= self.environment("prefect") | {"PREFECT_HOME": str(self.folder / "prefect")}
        _, *arguments = self.command("prefect")
        with (self.folder / "prefect.log").open("ab") as output:
            self.prefect = subprocess.Popen(
                [sys.executable, "-m", "prefect", *arguments],
                cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip

    def prefect_answers(self) -> None:
        def answers() -> bool:
            assert self.prefect is not None and self.prefect.poll() is None, (self.folder / "prefect.log").read_text()
            with suppress(httpx.HTTPError):
                return httpx.get(f"{self.api}/health", timeout=4, trust_env=False).is_success
            return False

        wait_for(answers, "the Prefect server")

    def stop_prefect(self) -> None:
        if self.prefect is not None:
            for process in [*psutil.Process(self.prefect.pid).children(recursive=True), self.prefect]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self.prefect.wait()
            self.prefect = None


def as_host(name: str) -> tuple[str, ...]:
    """What a command is run by so that its computer has this name; nothing where that takes rights that we lack."""
    within = ("unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name)
    with suppress(OSError):
        if subprocess.run([*within, "true"], capture_output=True).returncode == 0:
            return within
    return ()


def compose(values: Mapping[str, str]) -> dict[str, Any]:
    """The services of compose.yaml, with an .env of these values."""

    def filled(found: re.Match[str]) -> str:
        name, kind, rest = found.groups()
        if name in values:
            return values[name]
        assert kind == "-", f"infra/.env lacks {name}"
        return rest

    text = re.sub(r"\$\{([A-Z_]+):([-?])([^}]*)\}", filled, (INFRA / "compose.yaml").read_text())
    return dict(yaml.safe_load(text)["services"])


@contextmanager
def production(folder: Path, **choices: str) -> Iterator[Production]:
    """Postgres, Prefect, S3 and a collector as compose.yaml runs them; nothing of them or of a host is left after.

    choices: of infra/.env, such as ENGINES="2".
    """
    values = {f"{name}_PASSWORD": secrets.token_hex(24) for name in SECRETS} | choices
    values["PREFECT_AUTH"] = f"rushes:{secrets.token_hex(24)}"
    values["PREFECT_PORT"] = str(free_port())
    (folder / "prompts").mkdir()
    with ExitStack() as exits:
        collector = exits.enter_context(Collector())
        exits.callback(collector.shutdown)
        postgres = start_postgres(folder / "postgres", settings={"fsync": "off", "max_connections": "200"})
        exits.callback(stop_postgres, folder / "postgres")
        prepare(postgres, values)
        started = Production(
            folder, {}, {}, postgres, None, values["PREFECT_AUTH"], f"http://127.0.0.1:{values['PREFECT_PORT']}/api",
            S3Server("", "", "", False),
        )  # fmt: skip
        started.addresses = {
            "@postgres:5432": f"@127.0.0.1:{postgres.port}",
            "//prefect:4200": f"//127.0.0.1:{values['PREFECT_PORT']}",
            "http://collector:4318": collector.endpoint,
            "/prompts": str(folder / "prompts"),
            "0.0.0.0": "127.0.0.1",
        }
        started.services = compose(values | {"STORE_SECRET_KEY": "later"})
        started.services["prefect"]["command"][-1] = values["PREFECT_PORT"]  # which in a container is its own
        exits.callback(started.stop_prefect)
        started.start_prefect()  # the slowest, so beside the store
        server = exits.enter_context(s3_server())
        started.store = server
        started.services = compose(values | {"STORE_SECRET_KEY": server.secret_key})
        started.services["prefect"]["command"][-1] = values["PREFECT_PORT"]
        started.addresses = {
            **started.addresses,
            "store:9000": server.endpoint,
            "s3://rushes?": f"s3://production-{os.getpid()}?",
        }
        exits.callback(lambda: [host.crash() for host in started.hosts])
        started.prefect_answers()
        yield started


def prepare(server: Postgres, values: Mapping[str, str]) -> None:
    """Runs the script that the image runs on an empty volume."""
    with psycopg.connect(server.libpq_url) as session:
        password = session.info.password
    environment = dict(values) | {
        "PATH": f"{client_program('psql').parent}:{os.environ['PATH']}",
        "PGHOST": "127.0.0.1",
        "PGPORT": str(server.port),
        "PGPASSWORD": password,
    }
    subprocess.run(["sh", INFRA / "postgres-init.sh"], env=environment, check=True, capture_output=True)
