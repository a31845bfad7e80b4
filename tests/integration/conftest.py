"""What several files of this folder need."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from sqlalchemy.orm import Session, sessionmaker

from tests.integration.s3 import S3Server, s3_server
from tests.platform import Platform, running_platform


@pytest.fixture(scope="session")
def server() -> Generator[S3Server]:
    """One S3 server a test process; tests that use it belong to the xdist group `radosgw`."""
    with s3_server() as running:
        yield running


@pytest.fixture
def platform(
    database_url: str, ledger: sessionmaker[Session], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Generator[Platform]:
    """Requests, ledger, store and engines in this process, with renderers that take a millisecond a clip."""
    with running_platform(database_url, ledger, tmp_path / "home", monkeypatch) as platform:
        yield platform


@pytest.fixture
def told_by_usr1() -> Iterator[None]:
    """What SIGTERM does to an engine, by a signal that means nothing to others."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGUSR1, leave)
    yield
    signal.signal(signal.SIGUSR1, before)
