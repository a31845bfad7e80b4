"""What may go wrong in the middle of a batch, done for real to a whole stack, and what must be true after it.

A fault strikes and, where a person would have to mend something (start what was killed), mends it. Then a clip that was
begun after it must be finished. Everything is drawn from one seed, which is printed.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import psycopg

from infra.stack.postgres import running_postgres
from infra.store.s3 import S3Store
from tests.collector import Collector
from tests.end_to_end.stack import Stack, wait_for
from tests.integration.s3 import S3Server, s3_server
from tests.tiny import tiny_model

LEASE = 10.0  # seconds
CLIPS = 48  # of a request
STEPS = 8  # a clip takes about a second of two cores
PLANTED = "planted-3b9d51f0c2e84a76"  # a secret that nothing needs, and so nothing may show
RECOVERY = 240.0  # seconds, on a machine that does other work as well


@dataclass
class FaultRig:
    """A stack to be broken: mini on two ranks, its store a real S3 server."""

    stack: Stack
    server: S3Server
    random: random.Random
    collector: Collector  # of the traces
    requests: list[str] = field(default_factory=list[str])

    def submit(self, clips: int = CLIPS, **settings: Any) -> str:
        """A request that nothing of is known; its id."""
        seed = self.stack.seed()
        colours, shapes = ("red", "blue", "green", "yellow"), ("sphere", "cube", "cone")
        lines: list[str | dict[str, Any]] = [
            {"prompt": f"a {colours[k % 4]} {shapes[k % 3]} slides to the left on grass", "seed": seed + k}
            for k in range(clips)
        ]
        run = self.stack.submit(request=self.stack.request(lines, **{"steps": STEPS, "frames": 9} | settings))
        request = self.stack.request_of(run)
        self.requests.append(request)
        return request

    def waiting(self) -> int:
        """Clips of all requests that have not come to an end."""
        query = "select count(*) as clips from clips where status in ('queued', 'running')"
        return int(self.stack.sql(query)[0]["clips"])

    def up(self) -> None:
        """What a person does, or an init system: starts what is not there. Again, while it says that it cannot yet."""

        def tried() -> bool:
            with self.stack.start("up") as process:
                process.communicate(timeout=120)
            return process.returncode == 0

        wait_for(tried, "`rushes up` to mend the stack", every=1.0)

    def part(self, name: str) -> list[psutil.Process]:
        """The process of a part of the stack itself, not what it has started."""
        pid = self.stack.info()["pids"].get(name)
        return [psutil.Process(pid)] if pid and psutil.pid_exists(pid) else []

    def engine(self) -> tuple[str, list[psutil.Process]]:
        """An engine of the pool that holds a lease: its flow run, and its processes without the ranks."""
        leased = "select distinct owner from shards where status = 'leased'"

        def look() -> list[tuple[str, list[psutil.Process]]]:
            runs = [str(row["owner"]).rpartition("/")[2] for row in self.stack.sql(leased)]
            return [(run, found) for run in runs if (found := self.stack.processes_of(run))]

        return self.random.choice(wait_for(look, "an engine at work", seconds=RECOVERY))

    def rendering(self) -> None:
        """Waits until clips are under way and more are to come, so that a fault has something to hit."""
        running = "select 1 from clips where status = 'running'"
        wait_for(lambda: self.stack.sql(running), "a clip to be rendered", seconds=RECOVERY)
        time.sleep(self.random.uniform(0, 1.5))

    def now(self) -> Any:
        return wait_for(lambda: self.tried("select clock_timestamp() as now"), "the ledger")[0]["now"]

    def tried(self, query: str, *values: Any) -> list[dict[str, Any]]:
        """Rows, or none while the ledger is away."""
        try:
            return self.stack.sql(query, *values)
        except psycopg.OperationalError:
            return []

    def recovered(self, since: Any) -> None:
        """Waits for a clip that was begun after the fault, and finished."""
        query = "select 1 from attempts where status = 'done' and started_at > %s"
        wait_for(lambda: self.tried(query, since), "a clip after the fault", seconds=RECOVERY)

    # What must be true

    def ended(self, request: str) -> None:
        """The request ends by itself, after one round of maintenance, all of its clips there, its run's state true."""

        def over() -> bool:
            return bool(self.tried("select 1 from requests where id = %s and status <> 'open'", request))

        deadline = time.monotonic() + 900
        while not over():
            assert time.monotonic() < deadline, f"{request} does not end: {self.stack.statuses(request)}"
            self.maintain()  # as its schedule does every ten minutes
            for _ in range(20):
                if over():
                    break
                time.sleep(1)
        assert set(self.stack.statuses(request)) == {"done"}, self.stack.statuses(request)
        assert self.stack.status_of(request) == "completed"
        (row,) = self.stack.sql("select flow_run_id from requests where id = %s", request)
        self.stack.ended(row["flow_run_id"])

    def maintain(self) -> None:
        self.stack.ended(self.stack.submit("maintenance/scheduled"))

    def check(self) -> dict[str, int]:
        """After a campaign, whose requests have ended: how many clips and attempts there are. Asserts the promise."""
        said = self.stack.rushes("audit")
        assert "no breaches" in said, said
        store = S3Store(self.server.endpoint, self.server.access_key, self.server.secret_key, self.bucket, secure=False)
        objects = {listed.key for listed in store.list("blobs/")}
        rows = {row["key"] for row in self.stack.sql("select key from artifacts")}
        assert objects == rows, f"objects without a row: {objects - rows}; rows without bytes: {rows - objects}"
        assert not list(store.list("checkpoints/")), "of clips that have ended"
        assert not self.stack.sql("select 1 from shards where status = 'leased'"), "capacity is not given back"
        twice = "select recipe from attempts a join clips c on c.id = a.clip_id where a.status = 'done'"
        assert not self.stack.sql(f"{twice} group by 1 having count(*) > 1"), "a recipe was rendered twice"
        assert not self.leaks(), "secrets were written down"
        clips = self.stack.sql("select count(*) as n from clips")[0]["n"]
        attempts = self.stack.sql("select count(*) as n from attempts")[0]["n"]
        return {"clips": clips, "attempts": attempts}

    def leaks(self) -> list[str]:
        """Where secrets can be read that belong nowhere but into the environment and the stack's own file."""
        postgres = running_postgres(self.stack.home / "postgres")
        assert postgres is not None
        passwords = [postgres.password_of(login) for login in ("rushes", "reader", "prefect")]
        assert passwords[0] == urlsplit(self.stack.info()["database_url"]).password
        secrets = [self.server.secret_key, PLANTED, urlsplit(postgres.url).password or "", *passwords]
        assert all(len(secret) >= 16 for secret in secrets)
        home, places = self.stack.home, dict[str, bytes]()
        for file in (*(home / "logs").rglob("*"), *(home / "prefect").rglob("*")):
            if file.is_file():
                places[str(file.relative_to(home))] = file.read_bytes()
        for database in ("rushes", "prefect"):  # Prefect's holds parameters, logs and artifacts
            with psycopg.connect(postgres.url_of(database).replace("+psycopg", "")) as session:
                for (table,) in session.execute(
                    "select tablename from pg_tables where schemaname = 'public'"
                ).fetchall():
                    rows = session.execute(f'select t::text from "{table}" t'.encode()).fetchall()
                    places[f"{database}.{table}"] = "\n".join(row for (row,) in rows).encode()
        places["traces"] = "".join(str(span) for _, span in self.collector.spans).encode()
        assert {"logs/gpu.log", "rushes.attempts", "prefect.log", "prefect.artifact"} <= places.keys() and places[
            "traces"
        ]
        return [f"{place}: {secret}" for place, data in places.items() for secret in secrets if secret.encode() in data]

    @property
    def bucket(self) -> str:
        return self.stack.settings["RUSHES_STORE_URL"].removeprefix("s3://").partition("?")[0]


@contextmanager
def fault_rig(folder: Path, seed: int) -> Iterator[FaultRig]:
    """A stack of its own, ended after."""
    with s3_server() as server, Collector() as collector:
        stack = Stack(
            home=folder / "home",
            model=Path("mini"),
            settings={
                "RUSHES_STORE_URL": f"s3://chaos-{os.getpid()}?endpoint={server.endpoint}&secure=false",
                "RUSHES_STORE_ACCESS_KEY": server.access_key,
                "RUSHES_STORE_SECRET_KEY": server.secret_key,
                "RUSHES_PARTITION": "tp=2",
                "RUSHES_LINGER": "600",
                "RUSHES_LEASE_SECONDS": str(LEASE),
                "RUSHES_SHARD_SECONDS": "8",
                "RUSHES_VISION_KEY": PLANTED,
                "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint,
            },
        )
        with stack.up():
            yield FaultRig(stack, server, random.Random(seed), collector)
        collector.shutdown()


@contextmanager
def stack_without_engines(folder: Path, **settings: str) -> Iterator[Stack]:
    """A stack whose engines are started by hand, so that where they run and what they reach is ours to say."""
    own = {"RUSHES_PARTITION": "tp=2", "RUSHES_LEASE_SECONDS": str(LEASE), "RUSHES_SHARD_SECONDS": "1"}
    stack = Stack(home=folder / "home", model=tiny_model(folder / "tiny"), settings=own | settings)
    with stack.up():
        stack.kill(stack.of_pool("gpu"))
        yield stack


# --- faults -----------------------------------------------------------------------------------------------------------


def kill_a_rank(rig: FaultRig) -> None:
    rig.random.choice(wait_for(rig.stack.ranks, "a rank", seconds=RECOVERY)).kill()


def kill_the_engine(rig: FaultRig) -> None:
    _, processes = rig.engine()
    rig.stack.kill(processes)


def kill_a_worker(rig: FaultRig) -> None:
    rig.stack.kill(rig.part(rig.random.choice(("gpu", "control"))))
    time.sleep(2)
    rig.up()


def kill_prefect(rig: FaultRig) -> None:
    rig.stack.kill(rig.part("prefect"))
    time.sleep(rig.random.uniform(1, 8))
    rig.up()


def kill_postgres(rig: FaultRig) -> None:
    rig.stack.kill(rig.part("postgres"))
    time.sleep(rig.random.uniform(0, 5))
    rig.up()


def kill_the_store(rig: FaultRig) -> None:
    gateway = rig.server.gateway
    assert gateway is not None, "RUSHES_TEST_S3 names a server that is not ours to kill"
    gateway.kill()
    time.sleep(rig.random.uniform(1, 8))
    gateway.start()


def stop_the_engine(rig: FaultRig) -> None:
    """SIGSTOP past its lease, while maintenance and another engine go on; then it wakes up, and may not write."""
    stack, (run, processes) = rig.stack, rig.engine()
    of_run = "select id, attempt, owner from shards where status = 'leased' and owner like %s"
    (lease,) = wait_for(lambda: stack.sql(of_run, f"%{run}"), "its lease", seconds=RECOVERY)
    stopped = [*processes, *(child for process in processes for child in process.children(recursive=True))]
    for process in stopped:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGSTOP)
    since = rig.now()
    try:
        time.sleep(LEASE + 1)
        rig.maintain()
        (now,) = stack.sql("select status, attempt from shards where id = %s", lease["id"])
        assert now["status"] != "leased" or now["attempt"] > lease["attempt"], "the lease outlived its end"
        with stack.start("engine", "--linger", "1") as other:
            made = "select 1 from attempts where status = 'done' and owner <> %s and started_at > %s"
            wait_for(lambda: stack.sql(made, lease["owner"], since), "another engine to go on")
            other.send_signal(signal.SIGTERM)
            other.communicate(timeout=60)
    finally:
        for process in stopped:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
    time.sleep(2)
    late = "select 1 from attempts where owner = %s and shard_id = %s and shard_attempt = %s and status = 'done'"
    wrote = stack.sql(late + " and finished_at > %s", lease["owner"], lease["id"], lease["attempt"], since)
    assert not wrote, f"engine {run} wrote under a lease that it had lost"


def end_the_stack(rig: FaultRig) -> None:
    """SIGTERM to everything at once, as when a host shuts down."""
    processes = rig.stack.processes()
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # it followed another one
            process.terminate()
    _, left = psutil.wait_procs(processes, timeout=30)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=10)
    rig.up()
    rig.maintain()


@dataclass(frozen=True)
class Fault:
    what: str
    strike: Callable[[FaultRig], None]


FAULTS = (
    Fault("a rank is killed", kill_a_rank),
    Fault("the engine is killed", kill_the_engine),
    Fault("a Prefect worker is killed", kill_a_worker),
    Fault("the Prefect server is killed", kill_prefect),
    Fault("Postgres is killed", kill_postgres),
    Fault("the S3 server is killed", kill_the_store),
    Fault("the engine is stopped for longer than its lease", stop_the_engine),
    Fault("everything is sent SIGTERM", end_the_stack),
)


@dataclass(frozen=True, slots=True)
class Struck:
    """One fault that came and went."""

    what: str
    seconds: float  # until a clip was finished that had been begun after it
    repeated: int  # attempts that ended in vain from then on, until the next one struck


def campaign(rig: FaultRig, faults: Sequence[Fault], *, clips: int = CLIPS) -> list[Struck]:
    """Strikes with each in turn, at random moments of requests that are being rendered, and sees all of them end."""
    took: list[float] = []
    moments: list[Any] = []
    rig.submit(clips)
    for fault in faults:
        if rig.waiting() < 12:
            rig.submit(clips)
        rig.rendering()
        began, since = time.monotonic(), rig.now()
        moments.append(since)
        print(f"{time.strftime('%H:%M:%S')} {fault.what}", flush=True)
        fault.strike(rig)
        rig.recovered(since)
        took.append(time.monotonic() - began)
    for request in rig.requests:
        rig.ended(request)
    lost = "select count(*) as n from attempts where status in ('lost', 'failed', 'released')"
    lost += " and finished_at > %s and finished_at <= %s"
    repeated = [rig.stack.sql(lost, since, until)[0]["n"] for since, until in pairwise([*moments, rig.now()])]
    return [Struck(fault.what, *figures) for fault, *figures in zip(faults, took, repeated, strict=True)]


# --- a namespace of its own, whose cable can be pulled --------------------------------------------------------------


def may_make_namespaces() -> bool:
    """True for root with the tools, and a kernel that lets it."""
    name = f"rushes-{os.getpid()}-try"
    try:
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    except OSError:
        return False
    if made:
        subprocess.run(["ip", "netns", "del", name], check=True)
    return made


@dataclass
class Cable:
    """A network namespace `name`, joined to ours by a pair of devices; hosts are ours and theirs."""

    name: str
    ours: str
    theirs: str
    device: str

    def pull(self) -> None:
        """From now on whatever is sent is lost, and nobody is told."""
        _ip("link", "set", self.device, "down")

    def plug(self) -> None:
        _ip("link", "set", self.device, "up")

    @property
    def within(self) -> tuple[str, ...]:
        """What runs a command at the other end."""
        return "ip", "netns", "exec", self.name


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def cable() -> Iterator[Cable]:
    """Two ends of a cable, with addresses of a net that nobody else here uses."""
    number = os.getpid() % 250 + 1
    name, device, peer = f"rushes-{os.getpid()}", f"ru{os.getpid()}a", f"ru{os.getpid()}b"
    made = Cable(name, f"10.213.{number}.1", f"10.213.{number}.2", device)
    _ip("netns", "add", name)
    try:
        _ip("link", "add", device, "type", "veth", "peer", "name", peer, "netns", name)
        _ip("addr", "add", f"{made.ours}/30", "dev", device)
        _ip("link", "set", device, "up")
        for command in (
            ("addr", "add", f"{made.theirs}/30", "dev", peer),
            ("link", "set", peer, "up"),
            ("link", "set", "lo", "up"),
        ):
            _ip("-n", name, *command)
        yield made
    finally:
        _ip("netns", "del", name)  # takes its end of the cable with it, and so ours


@contextmanager
def relay(line: Cable, port: int) -> Iterator[int]:
    """Makes a port of loopback reachable through the cable, and only there."""
    with socket.create_server((line.ours, 0)) as listener:

        def pump(source: socket.socket, sink: socket.socket) -> None:
            try:
                while data := source.recv(65536):
                    sink.sendall(data)
            except OSError:
                pass
            for end in (source, sink):
                end.close()

        def serve() -> None:
            while True:
                try:
                    theirs, _ = listener.accept()
                except OSError:
                    return
                ours = socket.create_connection(("127.0.0.1", port))
                for pair in ((theirs, ours), (ours, theirs)):
                    threading.Thread(target=pump, args=pair, daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield int(listener.getsockname()[1])
        listener.shutdown(socket.SHUT_RDWR)


# --- a small disk ---------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of so many megabytes at `folder`; root alone may have one."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def may_mount(folder: Path) -> bool:
    try:
        with small_disk(folder, 1):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def fill(folder: Path) -> Path:
    """Takes all the room that is left there; remove the file to give it back."""
    file = folder / "filler"
    with file.open("wb", buffering=0) as out:
        try:
            while True:
                out.write(b"\0" * 65536)
        except OSError:
            pass
    return file
