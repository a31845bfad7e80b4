"""Files appear whole or not at all."""

from __future__ import annotations

import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from infra.files import atomic_path
from infra.stack.home import Log
from model.train.files import atomic_path as atomic_path_of_training

Atomic = Callable[[Path], AbstractContextManager[Path]]


@pytest.mark.parametrize("atomic", [atomic_path, atomic_path_of_training])
def test_an_error_leaves_the_old_file_and_no_other(atomic: Atomic, tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"old", b"new"):
        with atomic(path) as part:
            part.write_bytes(content)
            assert not path.exists() or path.read_bytes() == b"old"
    with pytest.raises(ZeroDivisionError), atomic(path) as part:
        part.write_bytes(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_a_private_file_is_never_others_to_read(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "secret", private=True) as part:
        assert stat.S_IMODE(part.stat().st_mode) == 0o600
        part.write_text("secret")
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


def test_a_log_knows_what_was_said_first_and_shows_its_end(tmp_path: Path) -> None:
    """A server that finds its port taken says so before all the rest of its end."""
    log = Log(tmp_path / "logs" / "server.log")
    with log.open() as file:
        file.write(b"address already in use\n" + b"Traceback\n" * 5000 + b"the end\n")
    assert "address already in use" in log.said()
    assert len(str(log)) < 3000 and str(log).endswith("the end")
