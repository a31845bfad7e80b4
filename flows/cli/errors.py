"""Errors that a person can mend, as one line on standard error and an exit code."""

from __future__ import annotations

from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

DONE, FAILED, BAD_INPUT = 0, 1, 2
# What a person can mend, by name so that nothing has to be imported to catch it, and the exit code it deserves.
EXITS = {
    "flows.settings.WrongSetting": BAD_INPUT,
    "flows.settings.NotRunning": FAILED,
    "flows.request.lines.BadFile": BAD_INPUT,
    "flows.request.files.BadUri": BAD_INPUT,
    "flows.request.submit.BadOptions": BAD_INPUT,
    "db.datasets.DatasetNotFound": BAD_INPUT,
    "flows.clients.prefect.PrefectRefused": FAILED,
    "flows.request.rewriting.RewriterFailed": FAILED,
    "flows.train.evaluation.NoJudge": BAD_INPUT,
    "flows.train.evaluation.EvaluationFailed": FAILED,
    "flows.clients.prefect.PrefectUnavailable": FAILED,
    "model.loading.card.ModelNotFound": BAD_INPUT,
    "model.loading.inspect.BadCheckpoint": BAD_INPUT,
    "model.parallel.memory.NotEnoughMemory": FAILED,
    "model.engine.clip.EngineError": FAILED,
    "flows.library.models.BadName": BAD_INPUT,
    "flows.library.variants.BadVariant": BAD_INPUT,
    "flows.plan.layout.BadGpus": BAD_INPUT,
    "flows.operate.reproduce.BadPartition": BAD_INPUT,
    "flows.plan.layout.CannotFit": FAILED,
    "flows.render.devices.NoDevices": FAILED,
    "flows.library.models.BrokenModel": FAILED,
    "db.models.NameTaken": BAD_INPUT,
    "db.models.ModelNeeded": BAD_INPUT,
    "db.requests.RequestNotFound": BAD_INPUT,
    "db.requests.RequestNotReady": FAILED,
    "db.history.SqlFailed": BAD_INPUT,
    "infra.store.contract.NoSuchKey": FAILED,
    "infra.store.contract.StoreUnavailable": FAILED,
    "infra.stack.postgres.PostgresFailed": FAILED,
    "infra.stack.home.StackFailed": FAILED,
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
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            for kind in type(error).__mro__:
                code = EXITS.get(f"{kind.__module__}.{kind.__qualname__}")
                if code is not None:
                    fail(_say(error, kind.__module__), code)
            raise


def fail(message: str, code: int = FAILED) -> NoReturn:
    """Says why on standard error and ends the command."""
    typer.echo(f"rushes: {message}", err=True)
    raise typer.Exit(code)


def _say(error: Exception, module: str) -> str:
    if module == "sqlalchemy.exc":
        first = str(getattr(error, "orig", error)).strip().splitlines()[0]
        if "does not exist" in first:
            return f"the ledger has no such table or view ({first}): `rushes migrate` makes them"
        return f"the ledger does not answer ({first}): is the stack up? `rushes up` starts it"
    if module.startswith("pydantic"):
        return "; ".join(_say_option(each) for each in error.errors())  # type: ignore[attr-defined]
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {(error.strerror or str(error)).lower()}"
    if module == "db.history":
        lines = str(error).splitlines()
        return "; ".join([lines[0], *(line for line in lines if line.startswith("HINT"))])
    return str(error)


def _say_option(error: Any) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    where = ".".join(str(part) for part in error["loc"]).replace("_", "-")
    return f"--{where} {error['input']}: {message[:1].lower()}{message[1:]}" if where else message
