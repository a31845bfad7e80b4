"""A real S3 server for tests: Ceph's radosgw on one monitor and one small sparse OSD file, without systemd or root.

`RUSHES_TEST_S3=http://KEY:SECRET@host:port` names another server to use in its place.
"""

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import urllib3

TOOLS = ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "ceph", "ceph-authtool", "monmaptool", "setpriv")


@dataclass(frozen=True, slots=True)
class S3Server:
    endpoint: str  # host:port
    access_key: str
    secret_key: str
    secure: bool
    gateway: "Gateway | None" = None  # None: a server that is not ours to kill


class Gateway:
    """The process that answers requests: it may be killed and started again, and keeps what it has stored."""

    def __init__(self, start: Callable[[], subprocess.Popen[bytes]], wait: Callable[[], None]) -> None:
        self._start, self._wait = start, wait
        self._process = start()
        wait()

    def kill(self) -> None:
        _end(self._process)

    def start(self) -> None:
        self._process = self._start()
        self._wait()


@contextmanager
def s3_server() -> Generator[S3Server]:
    """The server that RUSHES_TEST_S3 names, or a radosgw of our own; skips the test when there is neither."""
    if named := os.environ.get("RUSHES_TEST_S3"):
        url = urlsplit(named)
        assert url.hostname and url.username and url.password, "RUSHES_TEST_S3 must be http://KEY:SECRET@host:port"
        endpoint = url.netloc.rpartition("@")[2]
        yield S3Server(endpoint, unquote(url.username), unquote(url.password), url.scheme == "https")
        return
    if lacking := [tool for tool in TOOLS if shutil.which(tool) is None]:
        pytest.skip(f"missing server: radosgw ({', '.join(lacking)} not installed)")
    # A short path: the daemons' sockets lie in it, and those may have 107 bytes.
    home = tempfile.TemporaryDirectory(prefix="rgw-", dir="/tmp", ignore_cleanup_errors=True)
    with home as folder, _radosgw(Path(folder)) as server:
        yield server


@contextmanager
def _radosgw(folder: Path) -> Generator[S3Server]:
    mon_port, port = _free_ports(2)
    (folder / "mon").mkdir()
    (folder / "osd").mkdir()
    conf, fsid, osd = folder / "ceph.conf", str(uuid.uuid4()), str(uuid.uuid4())
    conf.write_text(CONF.format(folder=folder, fsid=fsid, mon_port=mon_port, port=port))

    def call(*command: str | Path) -> str:
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, timeout=60, env=_env(conf), cwd=folder
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr[-2000:]}{_logs(folder)}")
        return done.stdout

    with ExitStack() as stack:

        def daemon(*command: str) -> subprocess.Popen[bytes]:
            # The kernel ends a daemon with this process, even when that is killed.
            log = stack.enter_context((folder / f"{command[0]}.out").open("wb"))
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_env(conf), cwd=folder,
            )  # fmt: skip
            stack.callback(_end, process)
            return process

        every = ["--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *"]
        call("ceph-authtool", "--create-keyring", folder / "mon.keyring", "--gen-key", "-n", "mon.", *every[:3])
        call("ceph-authtool", "--create-keyring", folder / "admin.keyring", "--gen-key", "-n", "client.admin", *every)
        call("ceph-authtool", folder / "admin.keyring", "--gen-key", "-n", "client.rgw", *every[:6])
        call("ceph-authtool", folder / "mon.keyring", "--import-keyring", folder / "admin.keyring")
        call("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{mon_port}]", folder / "monmap")
        call("ceph-mon", "--mkfs", "-i", "a", "--monmap", folder / "monmap", "--keyring", folder / "mon.keyring")
        daemon("ceph-mon", "-i", "a", "-f")
        _until(lambda: "quorum" in call("ceph", "--connect-timeout", "5", "mon", "stat"), "ceph-mon", folder)
        call("ceph", "osd", "new", osd)
        call("ceph-osd", "-i", "0", "--no-mon-config", "--mkfs", "--osd-uuid", osd, "--mkkey")
        caps = ["osd", "allow *", "mon", "allow profile osd", "mgr", "allow profile osd"]
        call("ceph", "auth", "add", "osd.0", *caps, "-i", folder / "osd" / "keyring")
        daemon("ceph-osd", "-i", "0", "-f")
        _until(lambda: json.loads(call("ceph", "osd", "stat", "-f", "json"))["num_up_osds"] == 1, "ceph-osd", folder)
        pool = urllib3.PoolManager(retries=False, timeout=2)
        gateway = Gateway(
            lambda: daemon("radosgw", "-n", "client.rgw", "-f"),
            lambda: _until(lambda: pool.request("GET", f"http://127.0.0.1:{port}/").status == 200, "radosgw", folder),
        )
        keys = f"key{uuid.uuid4().hex[:12]}", uuid.uuid4().hex
        user = ["--uid=test", "--display-name=test", f"--access-key={keys[0]}", f"--secret={keys[1]}"]
        call("radosgw-admin", "user", "create", *user)
        yield S3Server(f"127.0.0.1:{port}", *keys, secure=False, gateway=gateway)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _env(conf: Path) -> dict[str, str]:
    return os.environ | {"CEPH_CONF": str(conf)}


def _until(ready: Callable[[], bool], what: str, folder: Path, seconds: float = 90) -> None:
    deadline, last = time.monotonic() + seconds, "not ready"
    while time.monotonic() < deadline:
        try:
            if ready():
                return
        except (RuntimeError, subprocess.TimeoutExpired, urllib3.exceptions.HTTPError) as error:
            last = str(error)
        time.sleep(0.1)
    raise RuntimeError(f"{what} did not start within {seconds:.0f} s: {last}{_logs(folder)}")


def _logs(folder: Path) -> str:
    return "".join(f"\n--- {file.name}\n{file.read_text(errors='replace')[-1500:]}" for file in folder.glob("*.out"))


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()  # nothing in there is worth a slow goodbye
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)


CONF = """\
[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:{mon_port}]
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
keyring = {folder}/admin.keyring
run_dir = {folder}
log_file = /dev/null
admin_socket = {folder}/$name.asok
pid_file =
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pgp_num = 1
osd_pool_default_pg_autoscale_mode = off
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 2000
osd_crush_chooseleaf_type = 0
mon_data_avail_warn = 2
mon_data_avail_crit = 1
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
[mon.a]
mon_data = {folder}/mon
[osd.0]
keyring = {folder}/osd/keyring
osd_data = {folder}/osd
osd_objectstore = bluestore
bluestore_block_size = 4294967296
osd_memory_target = 939524096
bluestore_block_db_create = false
bluestore_block_wal_create = false
[client.rgw]
rgw_frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw_enable_usage_log = false
rgw_enable_apis = s3
rgw_thread_pool_size = 64
"""
