"""Errors that a person can mend, as one line on standard error and an exit code.

An exception class that a person can mend says so by a class attribute, which its subclasses inherit: `exit_code = 2`
for input to put right, before anything was done, and `exit_code = 1` for all else (a service away, memory too small).
So no command has to import a class to catch it. The few classes of other packages stand in `THIRD_PARTY`. An exception
with neither is a defect of Rushes and stays a traceback.
"""

from __future__ import annotations

import os
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

DONE, FAILED, BAD_INPUT = 0, 1, 2
THIRD_PARTY = {
    "sqlalchemy.exc.OperationalError": FAILED,
    "sqlalchemy.exc.ProgrammingError": FAILED,
    "pydantic_core._pydantic_core.ValidationError": BAD_INPUT,
    "builtins.OSError": FAILED,
}


class OneLineErrors(TyperGroup):
    """Turns exceptions that a person can mend into one line and an exit code; all others stay tracebacks."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (TyperException, typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if (code := exit_code_of(error)) is not None:
                fail(_say(error), code)
            raise


def exit_code_of(error: Exception) -> int | None:
    """The exit code that an exception's class deserves; None for defects."""
    for kind in type(error).__mro__:
        code = vars(kind).get("exit_code", THIRD_PARTY.get(f"{kind.__module__}.{kind.__qualname__}"))
        if code is not None:
            return code
    return None


def fail(message: str, code: int = FAILED) -> NoReturn:
    """Says why on standard error and ends the command."""
    typer.echo(f"rushes: {message}", err=True)
    raise typer.Exit(code)


def _say(error: Exception) -> str:
    module = type(error).__module__
    if module == "sqlalchemy.exc":
        from db.session import is_refused
        from infra.libpq import libpq_variables

        first = str(getattr(error, "orig", error)).strip().splitlines()[0]
        if "does not exist" in first:
            return f"the ledger has no such table or view ({first}): `rushes migrate` makes them"
        if is_refused(error):
            return f"the ledger refuses this login ({first}): RUSHES_DATABASE_URL names user, password and database"
        libpq = ", ".join(sorted(libpq_variables(os.environ)))
        hint = f"libpq also goes by {libpq}; " if libpq else ""
        return f"the ledger does not answer ({first}): {hint}{_hint()}"
    if module.startswith("pydantic"):
        return "; ".join(_say_option(each) for each in error.errors())  # type: ignore[attr-defined]
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {(error.strerror or str(error)).lower()}"
    if module == "db.history":
        lines = str(error).splitlines()
        return "; ".join([lines[0], *(line for line in lines if line.startswith("HINT"))])
    return str(error)


def _hint() -> str:
    from flows.settings import load_settings

    named = load_settings().elsewhere
    return f"is {named[0]} right?" if named else "is the stack up? `rushes up` starts it"


def _say_option(error: Any) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    where = ".".join(str(part) for part in error["loc"]).replace("_", "-")
    return f"--{where} {error['input']}: {message[:1].lower()}{message[1:]}" if where else message
