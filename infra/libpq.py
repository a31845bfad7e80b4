"""The variables of libpq (PGSSLMODE, PGSERVICE, PGTZ …), which reach every connection of a process that has them.

They are for other servers than the embedded one. There are thirty and more with every version: all that begin with PG.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager

PREFIX = "PG"


def libpq_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those of an environment, by name."""
    return {name: value for name, value in environment.items() if name.startswith(PREFIX)}


def without_libpq(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without them."""
    return {name: value for name, value in environment.items() if not name.startswith(PREFIX)}


def forget_libpq() -> None:
    """Take them out of the environment of this process and of its children to come."""
    for name in libpq_variables(os.environ):
        del os.environ[name]


@contextmanager
def hidden_libpq() -> Generator[None]:
    """Forget them within a block."""
    hidden = libpq_variables(os.environ)
    forget_libpq()
    try:
        yield
    finally:
        os.environ.update(hidden)
