"""A whole stack as its users see it: commands, HTTP, SQL, files and processes, and nothing of the code inside."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import psycopg
from psycopg.rows import dict_row

ROOT = Path(__file__).parents[2]
RUSHES = Path(sys.executable).with_name("rushes")
PREFECT = Path(sys.executable).with_name("prefect")
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
LONG = {"width": 192, "height": 192, "frames": 33, "guidance": 4.0}  # a step takes a tenth of a second, not a hundredth
SLOW = 60  # denoising steps: with them a clip takes a second or two, so that there is a middle to kill and cancel in
PATIENCE = 400.0  # seconds: a fifth of that is plenty where nothing else runs

T = TypeVar("T")


def wait_for(look: Callable[[], T | None], what: str, *, seconds: float = PATIENCE, every: float = 0.25) -> T:
    """What `look` gives as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(every)
    return seen


@dataclass
class Stack:
    """One home folder with its stack. All settings are in `environment`, as a person would set them."""

    home: Path
    model: Path
    settings: dict[str, str] = field(default_factory=dict[str, str])
    last_seed: int = 0
    _database: psycopg.Connection[dict[str, Any]] | None = None
    _url: str = ""
    _http: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=120, trust_env=False))

    @contextmanager
    def up(self) -> Iterator[Stack]:
        """The stack runs; nothing of it is left after."""
        try:
            self.rushes("up")
            yield self
        finally:
            self._http.close()
            if self._database is not None:
                self._database.close()
            self.rushes("down")
        assert self.processes() == []

    def seed(self) -> int:
        """A seed that no other test uses, with room for samples above it: so what is asked for with it is rendered."""
        self.last_seed += 1000
        return self.last_seed

    @property
    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RUSHES_", "PREFECT_", "OTEL_"))}
        own = {"RUSHES_HOME": str(self.home), "RUSHES_MODEL": str(self.model), "OMP_NUM_THREADS": "1"}
        return {**kept, **own, **self.settings}

    def info(self) -> dict[str, Any]:
        """Where the parts are."""
        return dict(json.loads((self.home / "stack.json").read_text()))

    # The command line

    def start(
        self, *arguments: str, program: Path = RUSHES, within: Sequence[str] = (), **settings: str
    ) -> subprocess.Popen[str]:
        """A command as it begins; `within`: the command that it is to be run by."""
        return subprocess.Popen(
            [*within, str(program), *arguments],
            cwd=self.home.parent,
            env=self.environment | settings,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def rushes(self, *arguments: str, code: int = 0, program: Path = RUSHES, **settings: str) -> str:
        """Runs a command to its end, asserts its exit code, and returns what it printed."""
        return finished(self.start(*arguments, program=program, **settings), code)

    def sql(self, query: str, *values: Any) -> list[dict[str, Any]]:
        """On one connection for as long as it lasts: a new one at every look would be half of what the tests cost."""
        url = self.info()["database_url"].replace("+psycopg", "")
        if self._database is not None and (self._database.closed or self._database.broken or url != self._url):
            self._database = None
        if self._database is None:
            self._url = url
            self._database = psycopg.Connection[dict[str, Any]].connect(url, row_factory=dict_row, autocommit=True)
        try:
            return self._database.execute(query.encode(), values).fetchall()
        except psycopg.OperationalError:
            if not self._database.broken:
                raise
            return self.sql(query, *values)

    # Prefect, as its page in the browser talks to it

    def api(self, method: str, path: str, body: Any = None) -> Any:
        url = self.info()["prefect_api_url"]
        answer = wait_for(
            lambda: self._ask(method, url + path, body),
            "the server, which says 500 or 503 while its Postgres restarts",
        )
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text[:1000]}"
        return answer.json() if answer.content else None

    def _ask(self, method: str, url: str, body: Any) -> httpx.Response | None:
        """None where it is to be asked again, as every request of the tests may be."""
        try:
            answer = self._http.request(method, url, json=body)
        except (httpx.ReadTimeout, httpx.ReadError, httpx.RemoteProtocolError):
            return None
        return None if answer.status_code in (500, 503) else answer

    def submit(self, deployment: str = "generate/default", **parameters: Any) -> str:
        """What the button Run of the form does; the id of the flow run."""
        return self.created(deployment, parameters=parameters)

    def created(self, deployment: str, **fields: Any) -> str:
        """A flow run with these fields, its state among them; its id. It is one, however often the server is asked."""
        fields = {"idempotency_key": str(uuid.uuid4()), **fields}
        found = self.api("GET", f"/deployments/name/{deployment}")
        return str(self.api("POST", f"/deployments/{found['id']}/create_flow_run", fields)["id"])

    def request(self, prompts: Sequence[str | dict[str, Any]], **settings: Any) -> dict[str, Any]:
        """A request as the form gives it."""
        return {"model": str(self.model), "prompts": list(prompts), **settings}

    def run(self, run_id: str) -> dict[str, Any]:
        return dict(self.api("GET", f"/flow_runs/{run_id}"))

    def runs(self, *, idempotency_key: str) -> list[dict[str, Any]]:
        """The flow runs that were created with this key: one or none."""
        filters = {"flow_runs": {"idempotency_key": {"any_": [idempotency_key]}}}
        return list(self.api("POST", "/flow_runs/filter", filters))

    def ended(self, run_id: str, *, state: str = "Completed") -> dict[str, Any]:
        """The flow run once it has ended; asserts how."""

        def look() -> dict[str, Any] | None:
            found = self.run(run_id)
            return found if found["state_type"] in FINAL else None

        ended = wait_for(look, "a flow run to end", every=0.5)
        assert ended["state_name"] == state, (ended["state_name"], ended["state"]["message"])
        return ended

    def cancel(self, run_id: str) -> None:
        """What the button Cancel does."""
        self.api("POST", f"/flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})

    def artifacts(self, run_id: str) -> dict[str, dict[str, Any]]:
        """What the page of a run shows, by the last words of its key (0-status, shards, summary, …)."""
        filters = {"artifacts": {"flow_run_id": {"any_": [run_id]}}, "sort": "UPDATED_DESC"}
        found: dict[str, dict[str, Any]] = {}
        for artifact in self.api("POST", "/artifacts/filter", filters):
            name = re.sub(r"^req-[0-9a-f]{12}-", "", artifact["key"])
            found.setdefault(name, artifact)
        return found

    # The ledger

    def request_of(self, run_id: str) -> str:
        """The request that a flow run is making, as soon as it is in the ledger with all its clips."""
        query = "select id from requests where flow_run_id = %s and total is not null"

        def look() -> str | None:
            if found := self.sql(query, run_id):
                return str(found[0]["id"])
            state = self.run(run_id)
            assert state["state_type"] not in FINAL, state["state"]["message"]
            return None

        return wait_for(look, "the request to be opened", every=0.3)

    def clips(self, request_id: str) -> list[dict[str, Any]]:
        return self.sql('select * from history where request_id = %s order by "index", sample', request_id)

    def statuses(self, request_id: str) -> list[str]:
        return [clip["status"] for clip in self.clips(request_id)]

    def attempts(self, request_id: str) -> list[dict[str, Any]]:
        query = "select a.* from attempts a join clips c on c.id = a.clip_id where c.request_id = %s order by 1, 2"
        return self.sql(query, request_id)

    def engines(self, request_id: str) -> set[str]:
        """The flow runs of the engines that worked on a request."""
        return {attempt["owner"].rpartition("/")[2] for attempt in self.attempts(request_id)}

    def status_of(self, request_id: str) -> str:
        return str(self.sql("select status::text from requests where id = %s", request_id)[0]["status"])

    # The store

    def prompts(self, request_id: str) -> str:
        """The prompt file of a request, as it was kept."""
        source = self.sql("select source from requests where id = %s", request_id)[0]["source"]
        return self.blob(source.removeprefix("store:")).read_text()

    def blob(self, key: str) -> Path:
        return self.home / "store" / key

    def checkpoints(self) -> list[Path]:
        """What is kept of clips that are under way."""
        return [path for path in (self.home / "store" / "checkpoints").rglob("*") if path.is_file()]

    # Processes

    def processes(self) -> list[psutil.Process]:
        """Everything that has this home in its environment, this test's own program left out."""
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            try:
                theirs = process.environ()
                mine = str(self.home) in (theirs.get("RUSHES_HOME"), theirs.get("RUSHES_STACK"))
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def ranks(self) -> list[psutil.Process]:
        """Ranks of any engine of this stack."""
        return [process for process in self.processes() if "model.engine.rank" in command(process)]

    def of_pool(self, pool: str) -> list[psutil.Process]:
        """The stack's worker of a pool and the flow runs that it started, without the ranks of an engine."""
        return [
            process
            for process in self.processes()
            if environment(process).get("RUSHES_STACK_PART") == pool and "model.engine.rank" not in command(process)
        ]

    def processes_of(self, run_id: str) -> list[psutil.Process]:
        """The processes that execute a flow run, without the ranks of an engine."""
        return [
            process
            for process in self.processes()
            if environment(process).get("PREFECT__FLOW_RUN_ID") == run_id
            and "model.engine.rank" not in command(process)
        ]

    def engine_run(self) -> str:
        """The flow run of the engine that holds a lease now."""
        owners = "select distinct owner from shards where status = 'leased' and owner is not null"
        (owner,) = wait_for(lambda: self.sql(owners), "an engine to lease a shard")
        return str(owner["owner"]).rpartition("/")[2]

    def kill(self, processes: Sequence[psutil.Process]) -> None:
        assert processes, "there is nothing to kill"
        for process in processes:
            with suppress(psutil.NoSuchProcess):  # a short-lived child of theirs
                process.send_signal(signal.SIGKILL)


def assert_as_if_undisturbed(stack: Stack, clip: dict[str, Any]) -> None:
    """The same bytes come of the clip when nothing disturbs it; nothing is left of its checkpoints; all is sound."""
    said = stack.rushes("reproduce", clip["clip_id"], "--json")
    (again,) = json.JSONDecoder().raw_decode(said)[0]
    assert again["verdict"].startswith("identical"), again
    wait_for(lambda: not stack.checkpoints(), "the checkpoints to be deleted")
    stack.rushes("audit")


def finished(process: subprocess.Popen[str], code: int = 0) -> str:
    """What a command printed (with code 0: to standard output alone), once it has ended with this exit code."""
    with process:
        try:
            out, err = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert process.returncode == code, f"{process.args} ended with {process.returncode}\n{out}\n{err}"
    return out if code == 0 else out + err


def command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.NoSuchProcess:
        return {}


def decode(data: bytes) -> tuple[tuple[int, int, int], dict[str, str]]:
    """(frames, height, width) of a clip's file as a player sees it, and the metadata of its container."""
    if data[:4] == b"\x89PNG":
        from PIL import Image

        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return (1, image.height, image.width), {str(k): str(v) for k, v in image.info.items()}
    import av

    with av.open(io.BytesIO(data), "r") as container:
        metadata = dict(container.metadata)
        frames = list(container.decode(video=0))
        assert container.streams.video[0].codec_context.name == "h264"
    assert {frame.format.name for frame in frames} == {"yuv420p"}
    return (len(frames), frames[0].height, frames[0].width), metadata
