"""Two hosts, an engine on each, share one request: every clip once, and the work in equal parts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

import pytest

from tests.chaos.faults import cable, may_make_namespaces, relay, stack_without_engines
from tests.end_to_end.stack import Stack, finished
from tests.integration.s3 import s3_server

pytestmark = [pytest.mark.chaos, pytest.mark.xdist_group("kills"), pytest.mark.timeout(1800)]

CLIPS = 160
STEPS = 60  # a clip takes a third of a second, and is a shard
OTHER = "rushes-other"  # the second host's name, where it may have one


@dataclass(frozen=True)
class Host:
    """A computer that has nothing of the stack but what its settings name."""

    stack: Stack
    within: tuple[str, ...] = ()  # what runs a command there

    @contextmanager
    def engine(self) -> Iterator[subprocess.Popen[str]]:
        """An engine that has loaded its model and asks for work; gone after, whatever happens."""
        engine = self.stack.start("engine", "--linger", "600", within=self.within)
        assert engine.stdout
        try:
            assert any("is ready" in line for line in iter(engine.stdout.readline, "")), finished(engine)
            yield engine
        finally:
            engine.kill()
            engine.wait()


@contextmanager
def other_host(near: Stack, folder: Path) -> Iterator[Host]:
    """A home of its own; for root a network and a name of its own as well, and nothing but a cable between."""
    database, store = urlsplit(near.info()["database_url"]), urlsplit(near.settings["RUSHES_STORE_URL"])
    query = dict(parse_qsl(store.query))
    with ExitStack() as exits:
        within: tuple[str, ...] = ()
        if may_make_namespaces():
            line = exits.enter_context(cable())
            ports = database.port, urlsplit(f"//{query['endpoint']}").port
            ledger, objects = (exits.enter_context(relay(line, port)) for port in ports if port)
            account = database.netloc.rpartition("@")[0]
            database = database._replace(netloc=f"{account}@{line.ours}:{ledger}")
            store = store._replace(query=urlencode(query | {"endpoint": f"{line.ours}:{objects}"}))
            within = (*line.within, "unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', OTHER)
        reach = {"RUSHES_DATABASE_URL": database.geturl(), "RUSHES_STORE_URL": store.geturl()}
        folder.mkdir()
        yield Host(Stack(folder / "home", near.model, near.settings | reach), within)


def test_two_hosts_share_one_request(tmp_path: Path) -> None:
    """Both have an engine when the request comes, and neither stands still while there is work.

    So seconds of work are in equal parts, but for a shard; how many clips that is for each its core decides, which
    here does other things as well.
    """
    with s3_server() as s3:
        settings = {
            "RUSHES_STORE_URL": f"s3://two-hosts-{os.getpid()}?endpoint={s3.endpoint}&secure=false",
            "RUSHES_STORE_ACCESS_KEY": s3.access_key,
            "RUSHES_STORE_SECRET_KEY": s3.secret_key,
            "RUSHES_PARTITION": "tp=1",
        }
        with (
            stack_without_engines(tmp_path / "one", **settings) as near,
            other_host(near, tmp_path / "two") as far,
            Host(near).engine() as here,
            far.engine() as there,
        ):
            lines = [f"a red ball moves left slowly {k}" for k in range(CLIPS)]
            run = near.submit(request=near.request(lines, steps=STEPS, seed=near.seed()))
            request = near.request_of(run)
            near.ended(run)
            for engine in (here, there):
                engine.send_signal(signal.SIGTERM)
                finished(engine, 128 + signal.SIGTERM)

            clips = near.clips(request)
            assert len(clips) == CLIPS and {clip["status"] for clip in clips} == {"done"}
            made = [attempt["clip_id"] for attempt in near.attempts(request)]
            assert len(made) == len(set(made)) == CLIPS, "a clip was begun twice"
            assert "no breaches" in near.rushes("audit")

            work, shards = Counter[str](), Counter[int]()
            for clip in clips:
                work[clip["engine"]] += clip["seconds"]
                shards[clip["shard_id"]] += clip["seconds"]
            one, other = work.values()
            half = (one + other) / 2
            assert len(shards) >= 40, "shards so long that they cannot be divided"
            assert abs(one - half) <= 0.1 * half + max(shards.values()), work
            named = {clip["engine"]: clip["host"] for clip in clips}
            assert all(engine.startswith(f"{host}/") for engine, host in named.items())
            if far.within:
                assert set(named.values()) == {socket.gethostname(), OTHER}
