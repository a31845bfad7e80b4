"""Commands of the stack: up and down of the local one, status and doctor of whichever the settings name."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import typer

from flows.cli.app import STACK, Format, app, current_settings, working_folder
from flows.cli.errors import DONE, FAILED

if TYPE_CHECKING:
    from flows.settings import Settings
    from infra.stack.elsewhere import Servers
    from infra.stack.home import Stack


UNNAMED = "none is named here, so requests can be submitted and not asked about"


@app.command(rich_help_panel=STACK)
def up() -> None:
    """Start the local stack, or mend it: Postgres, the Prefect server and its page, the workers."""
    stack = start_stack(current_settings())
    typer.echo(f"Prefect  {stack.prefect_ui_url}")
    typer.echo(f"Clips    {stack.web_url}")
    typer.echo(f"State    {stack.home}")


def start_stack(settings: Settings) -> Stack:
    """Starts the local stack. Raises WrongSetting where settings name servers elsewhere, which it would work on."""
    from flows.clients.ledger import prepare_ledger
    from infra.stack.up import up as bring_up

    refuse_elsewhere(settings)
    stack = bring_up(
        settings.home,
        repo=working_folder(settings),
        migrate=prepare_ledger,
        engines=max(1, settings.most_engines),
        prefect_database=settings.prefect_database_url,
        web="flows.web.app:create_app",
        environment=settings.log_environment,
        say=typer.echo,
    )
    _take_up(settings, stack)
    fill_forms()
    return stack


def fill_forms() -> None:
    """Has the forms in Prefect show the models that there are now; maintenance will, while Prefect cannot be asked."""
    from flows.clients.prefect import PrefectRefused, PrefectUnavailable
    from flows.operate.forms import refresh_forms

    settings = current_settings()  # read anew: a stack that has just been started is where its file says
    if settings.prefect_api_url is None:
        return
    try:
        refresh_forms(settings)
    except (PrefectRefused, PrefectUnavailable) as error:
        typer.echo(f"rushes: warning: the forms in Prefect do not show all models yet: {error}", err=True)


def refuse_elsewhere(settings: Settings) -> None:
    """Raises WrongSetting where settings name a ledger or a Prefect server that is not the local stack's."""
    from flows.settings import WrongSetting

    if named := settings.elsewhere:
        raise WrongSetting(
            f"{' and '.join(named)}: the local stack has servers of its own, and would work on those that are named: "
            "unset to start it. Elsewhere `rushes migrate`, `rushes deploy` and `rushes worker` are what runs"
        )


def _take_up(settings: Settings, stack: Stack) -> None:
    """Has open requests taken up whose run has ended without them, as that of a killed worker does.

    While Prefect cannot say, the schedule will do.
    """
    from db.session import sessions
    from flows.clients.ledger import database
    from flows.clients.prefect import PrefectRefused, PrefectUnavailable, prefect_api
    from flows.operate.take_up import take_up

    with (
        database(settings, url=stack.database_url) as engine,
        prefect_api(settings, url=stack.prefect_api_url) as api,
    ):
        try:
            take_up(sessions(engine), api)
        except (PrefectRefused, PrefectUnavailable) as error:
            typer.echo(f"maintenance will take up what was left: {error}")


@app.command(rich_help_panel=STACK)
def env() -> None:
    """Print what a shell needs so that Prefect's own commands find the stack: eval "$(rushes env)"."""
    import shlex

    settings = current_settings()
    exports = {"RUSHES_HOME": str(settings.home), "PREFECT_API_URL": settings.prefect_api}
    if settings.prefect_password:
        exports["PREFECT_API_AUTH_STRING"] = settings.prefect_password
    for name, value in exports.items():
        typer.echo(f"export {name}={shlex.quote(value)}")


@app.command(rich_help_panel=STACK)
def down() -> None:
    """Stop the local stack. Nothing is left running; what was rendered stays."""
    from infra.stack.down import down as end_stack

    settings = current_settings()
    stopped = end_stack(settings.home, say=typer.echo)
    typer.echo(f"Stopped: {', '.join(stopped)}" if stopped else f"No stack was running under {settings.home}")


@app.command(rich_help_panel=STACK)
def status(format: Format = "table") -> None:
    """Show which parts of the stack run, the local one or that of the settings. Exit code 1 if one does not."""
    from flows.operate import checks
    from flows.show import show_rows

    settings, more = current_settings(), list[dict[str, str]]()
    if settings.elsewhere:
        from infra.stack.elsewhere import status_elsewhere

        parts = status_elsewhere(_servers(settings))
    else:
        from infra.stack.up import status as status_of

        now = status_of(settings.home)
        parts = list(now.parts)
        more.append({"part": "flow runs", "state": str(now.flow_runs), "detail": "processes that execute one now"})
    rows = [{"part": p.name, "state": "running" if p.running else "stopped", "detail": p.detail} for p in parts]
    running = all(part.running for part in parts)
    if running:
        with suppress(Exception):  # doctor says what is wrong with the ledger
            more += [{"part": "engines", "state": "failing", "detail": said} for said in checks.failing(settings)]
    show_rows(rows + more, ["part", "state", "detail"], format)
    raise typer.Exit(DONE if running else FAILED)


@app.command(rich_help_panel=STACK)
def doctor(format: Format = "table") -> None:
    """Check every part (settings, ledger, store, Prefect, workers, model) and say how to mend what is wrong."""
    from flows.operate import checks
    from flows.show import show_rows

    settings = current_settings()
    if settings.elsewhere:
        from infra.stack.elsewhere import doctor_elsewhere

        seen = doctor_elsewhere(settings.home, _servers(settings), weights=lambda: checks.weights(settings))
    else:
        from infra.stack.doctor import doctor as examine

        seen = examine(
            settings.home,
            schema=checks.schema,
            store=lambda: checks.store(settings),
            weights=lambda: checks.weights(settings),
            engines=lambda: checks.engines(settings),
        )
    rows = [
        {"check": "ok" if check.ok else "wrong", "part": check.name, "detail": check.detail, "mend": check.mend}
        for check in seen
    ]
    show_rows(rows, ["check", "part", "detail", "mend"], format)
    if not all(check.ok for check in seen):
        raise typer.Exit(FAILED)


def _servers(settings: Settings) -> Servers:
    """The servers that the settings name."""
    from flows.operate import checks
    from infra.stack.elsewhere import Servers

    return Servers(
        ledger=lambda: checks.schema(settings.database) if settings.database_url else UNNAMED,
        store=lambda: checks.store(settings),
        api_url=settings.prefect_api_url,
        auth=settings.prefect_password,
    )
