"""A real PgBouncer for tests, before a Postgres, with transaction pooling over few server connections."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import make_url

CONF = """
[databases]
* = host=127.0.0.1 port={server.port} user={server.username} password={server.password}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = {size}
logfile = {folder}/log
{more}
"""


@contextmanager
def pgbouncer(url: str, *, size: int = 3, more: str = "") -> Generator[str]:
    """The address of a PgBouncer before the database at `url`; skips the test where none is installed.

    size: its connections to the server. more: lines for its configuration.
    """
    program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        pytest.skip("missing server: pgbouncer (not installed)")
    server = make_url(url)
    with tempfile.TemporaryDirectory(prefix="pgbouncer-") as name, socket.socket() as taken:
        folder = Path(name)
        taken.bind(("127.0.0.1", 0))
        port = int(taken.getsockname()[1])
        taken.close()
        (folder / "pgbouncer.ini").write_text(
            CONF.format(server=server, port=port, size=size, folder=folder, more=more)
        )
        command = [program, str(folder / "pgbouncer.ini")]
        if os.geteuid() == 0:  # as which it does not run
            shutil.chown(folder, "nobody")
            command += ["-u", "nobody"]
        # The kernel ends it with this process, even when that is killed.
        with subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *command], stderr=subprocess.DEVNULL) as process:
            try:
                _wait(port, folder / "log")
                yield server.set(port=port).render_as_string(hide_password=False)
            finally:
                process.kill()


def _wait(port: int, log: Path) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.02)
    raise RuntimeError(f"pgbouncer did not start within 30 s: {log.read_text() if log.exists() else 'no log'}")
