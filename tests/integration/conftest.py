"""What several files of this folder need."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.integration.s3 import S3Server, s3_server


@pytest.fixture(scope="session")
def server() -> Generator[S3Server]:
    """One S3 server a test process; tests that use it belong to the xdist group `radosgw`."""
    with s3_server() as running:
        yield running
