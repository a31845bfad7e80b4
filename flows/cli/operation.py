"""Commands that run parts of the platform: worker, engine, migrate, deploy."""

from __future__ import annotations

import contextlib
import signal
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flows.cli.app import OPERATION, REPOSITORY, app, current_settings, working_folder
from flows.cli.errors import DONE, FAILED
from flows.cli.stack import fill_forms

if TYPE_CHECKING:
    from flows.settings import Settings

CONTROL_RUNS = 100  # requests that the control pool watches at once


@app.command(rich_help_panel=OPERATION)
def worker(
    pool: Annotated[Literal["control", "gpu"], typer.Argument(help="control runs requests, gpu runs engines.")],
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Flow runs at once (gpu: RUSHES_HOST_ENGINES, or what fits; control: no limit)."),
    ] = None,
) -> None:
    """Run a Prefect worker for one of the two pools, until it is stopped. Its engines keep what they are at then."""
    from infra.stack.worker import run_worker

    settings = current_settings()
    need(settings.prefect_api)
    need_login(settings)
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process"]
    if pool == "gpu":
        from flows.render.devices import engines_here
        from flows.render.watchdog import watch_beside

        limit = engines_here(settings, limit)
        need(settings.database)
        watch_beside(settings)
    if pool == "control":
        from flows.operate.take_up import take_up_beside

        need(settings.database)
        take_up_beside(settings)
    if limit:
        command += ["--limit", str(limit)]
    environment, folder = settings.child_environment(), working_folder(settings)
    raise typer.Exit(run_worker(command, environment, folder, relays=settings.log == "json"))


def need(_: str) -> None:
    """Looking a setting up says what is missing before anything is loaded."""


def need_login(settings: Settings) -> None:
    """Says at once that the Prefect server refuses our password; one that is away may come back."""
    from flows.clients.prefect import PrefectUnavailable, prefect_api

    with contextlib.suppress(PrefectUnavailable), prefect_api(settings, patience=0) as api:
        api.version()


@app.command(rich_help_panel=OPERATION)
def engine(
    model: Annotated[str | None, typer.Option(help="Name or folder of the model.")] = None,
    partition: Annotated[str | None, typer.Option(help="How to divide it over ranks: tp=2, or cfg=2,sp=2.")] = None,
    device: Annotated[Literal["cpu", "cuda"] | None, typer.Option(help="Where the ranks compute.")] = None,
    linger: Annotated[float | None, typer.Option(min=0, help="Seconds to wait for more work.")] = None,
) -> None:
    """Run an engine here, without a Prefect worker: lease shards and render until no work is left."""
    given = {"model": model, "partition": partition, "device": device, "linger": linger}
    settings = current_settings(**{name: value for name, value in given.items() if value is not None})
    need(settings.database)
    from flows.render.engine import run_engine
    from infra.metrics import setup_metrics
    from infra.tracing import flush, setup_tracing

    setup_tracing("rushes-engine")
    metrics = setup_metrics("rushes-engine")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # as at Ctrl-C, clips under way are kept
    try:
        done = run_engine(settings, say=typer.echo)
    finally:
        flush()
        metrics.shutdown()
    typer.echo(f"{done.clips} clips in {done.shards} shards; busy {done.busy:.0f} of {done.alive:.0f} s")


@app.command(rich_help_panel=OPERATION)
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port (default: a free one, told).")] = None,
) -> None:
    """Serve clips, their facts and manifests over HTTP, until it is stopped; `rushes up` runs one of its own.

    It asks the ledger as its reader, and changes nothing. It knows no
    passwords: put a proxy with TLS and a login before what others should
    reach, and name its address in RUSHES_WEB_URL.
    """
    settings = current_settings()
    need(settings.reader)
    from urllib.parse import urlsplit

    import uvicorn

    from flows.web.app import LOOPBACK, create_app
    from infra.stack.processes import free_port

    port = port or free_port()
    typer.echo(f"Clips    http://{host}:{port}")
    known = urlsplit(settings.web_url).hostname if settings.web_url else None
    hosts = (*LOOPBACK, *filter(None, [known])) if known or host in LOOPBACK else ("*",)
    service = create_app(settings, hosts=hosts)
    how: dict[str, Any] = {"log_config": None} if settings.log == "json" else {}
    uvicorn.run(service, host=host, port=port, access_log=False, log_level="warning", **how)


@app.command(rich_help_panel=OPERATION)
def migrate() -> None:
    """Bring the ledger's tables up to date, and what its roles may do.

    Safe to run at any time, also by several starters at once. What the login
    has no right to do for the roles is printed, for an administrator to run.
    """
    from db.session import upgrade

    left = upgrade(current_settings().database)
    typer.echo("The ledger is up to date.")
    if left:
        typer.echo("rushes: warning: an administrator has to run this, and then `rushes migrate` again:", err=True)
        for statement in left:
            typer.echo(f"  {statement};", err=True)


@app.command("adopt", rich_help_panel=OPERATION)
def take_over_store() -> None:
    """Make the store this ledger's, in place of another ledger that is gone for good.

    A store is one ledger's. A ledger that was restored from a dump is another
    one: it refuses to render into the store, or to sweep it, until this is
    run. What the other ledger alone knew is then deleted after a day.
    """
    from flows.clients.ledger import ledger
    from flows.clients.ownership import take_over

    settings = current_settings()
    with ledger(settings) as ledgers:
        before = take_over(ledgers, settings.open_store())
    typer.echo(f"{settings.store} is this ledger's{f'; it was that of {before}' if before else ''}")


@app.command(rich_help_panel=OPERATION)
def deploy(
    engines: Annotated[
        int | None, typer.Option(min=1, help="Most engines at once in the pool (default: RUSHES_ENGINES).")
    ] = None,
) -> None:
    """Put the deployments and the two work pools on the Prefect server."""
    import subprocess

    from infra.logs import relay

    settings = current_settings()
    need_login(settings)
    command = [sys.executable, "-m", "infra.stack.deploy", str(REPOSITORY / "infra" / "prefect.yaml")]
    command += ["--pool", f"control={CONTROL_RUNS}", "--pool", f"gpu={engines or max(1, settings.most_engines)}"]
    relays = settings.log == "json"
    out, error = (subprocess.PIPE, subprocess.STDOUT) if relays else (None, None)
    environment = settings.child_environment()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=error, env=environment) as process:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(f"{settings.prefect_api}\n".encode())
        if process.stdout is not None:
            relay(process.stdout, "output", passes=True)
    if not process.returncode:
        fill_forms()
    raise typer.Exit(FAILED if process.returncode else DONE)
