"""Commands about requests: submit, plan, watch, cancel, retry, export, rewrite, tenants."""

from __future__ import annotations

import uuid
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.app import REQUESTS, Format, RequestName, app, counted, current_settings, in_words
from flows.cli.errors import BAD_INPUT, DONE, FAILED, fail
from flows.cli.options import FormCommand, PlanCommand, given_fields

if TYPE_CHECKING:
    from db.requests import RequestRow
    from flows.request.submit import CheckedFile
    from flows.settings import Settings
    from model.loading.card import ModelCard


@app.command(cls=FormCommand, rich_help_panel=REQUESTS)
def submit(
    ctx: typer.Context,
    file: Annotated[str, typer.Argument(help="Prompts as JSONL, CSV or text; - reads standard input.")],
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show progress until all clips are there.")] = False,
) -> None:
    """Check a prompt file and submit it.

    The whole file is checked first. If anything is wrong, every error is
    printed and nothing is submitted (exit code 2).

    The same file with the same settings is the same request: submitted again,
    it renders nothing that is there already. With --watch the exit code is 0
    if all clips were made, else 1.
    """
    options = given_fields(ctx)
    if options["fresh"]:  # known here, so that the request can be watched
        options.setdefault("idempotency_key", f"fresh-{uuid.uuid4()}")
    settings = current_settings()
    request_id, run_id = submit_file(settings, file, options)
    if watch and run_id:
        raise typer.Exit(watch_request(settings, request_id, run_id))


def submit_file(settings: Settings, file: str, options: dict[str, Any]) -> tuple[str, str | None]:
    """Checks and submits; (request id, flow run id or None if the ledger has all of it already).

    `options` are fields of GenerationRequest.
    """
    from flows.library.models import card_of
    from flows.request.read import warnings_of
    from flows.request.submit import check_file, readable
    from flows.request.submit import submit as send
    from flows.request.unpack import BadFile

    options = {"model": settings.model, **options}
    skip_invalid = options.get("skip_invalid", False)
    card = card_of(settings, options["model"])
    with readable(file) as (source, path):
        options.setdefault("name", Path(source).name)
        try:
            good = check_file(source, path, options, card, lambda said: typer.echo(said, err=True), settings)
        except BadFile as error:
            fail(f"{error}", BAD_INPUT)
        checked = good.checked
        if checked.bad and not (skip_invalid and checked.prompts):
            lines = counted(checked.prompts + checked.bad, "line")
            errors = f"{counted(checked.faults, 'error')} in {checked.bad} of {lines}"
            hint = "" if skip_invalid or not checked.prompts else "; --skip-invalid goes on without these lines"
            fail(f"{errors}: nothing was submitted{hint}", BAD_INPUT)
        warnings = warnings_of(card, checked)
        for warning in warnings:
            typer.echo(f"rushes: warning: {warning}", err=True)
        if warnings and good.request.strict:
            fail(f"{counted(len(warnings), 'warning')} under --strict: nothing was submitted", BAD_INPUT)
        finished = _finished(settings, good.request_id)
        if finished:
            typer.echo(f"{good.request_id} is complete: all {finished} clips were found, nothing is to be rendered")
            return good.request_id, None
        sent = send(settings, good)
    clips = f"{counted(checked.clips, 'clip')} of {counted(checked.prompts, 'prompt')}"
    skipped = f"; {counted(checked.bad, 'bad line')} recorded as rejected" if checked.bad else ""
    typer.echo(f"{sent.request_id}  {'is under way already' if sent.already else clips}{skipped}")
    typer.echo(f"{sent.url}")
    if good.request.deadline is not None and not sent.already:
        _tell_deadline(settings, card, good)
    return sent.request_id, sent.flow_run_id


def _tell_deadline(settings: Settings, card: ModelCard, good: CheckedFile) -> None:
    """Before anybody waits: when all will be done, and whether that is in time."""
    if settings.database_url is None:  # the run's page says it
        return
    from flows.clients.ledger import reading
    from flows.generate.estimates import as_duration, estimate

    request, shapes = good.request, good.checked.shapes
    assert request.deadline is not None
    with reading(settings) as session:
        expected = estimate(session, settings, card, request.resolve(card), shapes, request.priority)
    if warning := expected.misses(request.deadline):
        typer.echo(f"rushes: warning: {warning}", err=True)
    else:
        typer.echo(f"expected to be done in {as_duration(expected.seconds)}")


def _finished(settings: Settings, request_id: str) -> int | None:
    """How many clips the request has, if it was completed before."""
    if settings.database_url is None:
        return None
    from db.requests import request_by
    from flows.clients.ledger import reading

    with reading(settings) as session:
        row = request_by(session, request_id)
    return row.total if row and row.status == "completed" else None


@app.command(name="plan", cls=PlanCommand, rich_help_panel=REQUESTS)
def plan_(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(help="Prompts as JSONL, CSV or text.")],
    gpus: Annotated[str, typer.Option(help="How many of which kind, like 8xh200.")],
    model: Annotated[str | None, typer.Option(help="A model, or one of Wan's releases by size, like wan-14b.")] = None,
    format: Format = "table",
) -> None:
    """Say how a file would best be divided over GPUs, and how long it would take.

    Nothing is submitted, and neither GPUs nor weights need to be here. Speeds
    are those of clips that this model rendered here on such devices; where
    there are none, they are assumed from data sheets and from what was
    published of Wan 2.2.
    """
    from flows.generate.forecast import forecast
    from flows.show import show_rows

    options, settings = given_fields(ctx), current_settings()
    planned = forecast(settings, file, gpus, model or settings.model, options, lambda said: typer.echo(said, err=True))
    rows = planned.rows()
    show_rows(rows, list(rows[0]), format)
    if format == "table":
        layout = planned.layout
        assumed = "Assumed, not measured: half of the stated speed, and what Wan 2.2's table shows beside the denoising"
        by = "By what clips of this model took here" if planned.measured else assumed
        took = f"{layout.seconds / 3600:.2f} hours, {layout.gpu_hours:.1f} GPU-hours"
        typer.echo(f"{counted(planned.clips, 'clip')}: {took}. {by}")
    if planned.bad:
        fail(f"{counted(planned.bad, 'line')} cannot be read as prompts and were left out of the plan", BAD_INPUT)


@app.command(rich_help_panel=REQUESTS)
def watch(request: RequestName) -> None:
    """Show progress of a request until it has ended. Exit code 0 if all clips were made, else 1."""
    raise typer.Exit(watch_request(current_settings(), request, None))


def watch_request(settings: Settings, request: str, run_id: str | None) -> int:
    from flows.cli.watch import watch as follow

    ended = follow(settings, request, flow_run_id=run_id)
    code = {"completed": DONE, "BadInput": BAD_INPUT}.get(ended.status, FAILED)
    if ended.request_id is None:
        fail(f"{request} was {'refused' if ended.refused else 'not opened'}: {ended.message}", code)
    typer.echo(f"{ended.request_id} {in_words(ended.status)}: {ended.message}")
    return code


@app.command(rich_help_panel=REQUESTS)
def cancel(request: RequestName) -> None:
    """Cancel a request: engines stop at their next denoising step; finished clips stay."""
    from db.requests import cancel_request
    from db.tables import UNENDED
    from flows.cli.find import find_request
    from flows.clients.ledger import ledger
    from flows.clients.prefect import prefect_api

    settings = current_settings()
    with ledger(settings) as sessions, sessions.begin() as session:
        row = find_request(settings, session, request)
        count = cancel_request(session, row.id)
    if row.status not in UNENDED:
        typer.echo(f"{row.id} is {in_words(row.status)}: nothing was left to cancel")
        return
    if row.flow_run_id and settings.prefect_api_url:
        with prefect_api(settings) as api:
            api.cancel(row.flow_run_id)
    typer.echo(f"{row.id}: {counted(count, 'clip')} cancelled")


@app.command(rich_help_panel=REQUESTS)
def pause(request: RequestName) -> None:
    """Hold a request: engines keep what is under way and render nothing more of it, until `rushes resume`."""
    from db.requests import pause_request
    from flows.cli.find import find_request
    from flows.clients.ledger import ledger

    settings = current_settings()
    with ledger(settings) as sessions, sessions.begin() as session:
        row = find_request(settings, session, request)
        paused = pause_request(session, row.id)
    if not paused:
        fail(f"{row.id} is {in_words(row.status)}: there is nothing to pause")
    typer.echo(f"{row.id} is paused: `rushes resume {row.id}` goes on")


@app.command(rich_help_panel=REQUESTS)
def resume(
    request: RequestName,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show progress until all clips are there.")] = False,
) -> None:
    """Let a paused request go on: its clips go on from the step they had come to, to the same bits."""
    from db.requests import resume_request
    from flows.cli.find import find_request
    from flows.clients.ledger import ledger
    from flows.clients.prefect import prefect_api
    from flows.request.submit import run_url, start_run

    settings = current_settings()
    with (
        prefect_api(settings) as api,
        ledger(settings) as sessions,
    ):
        with sessions.begin() as session:
            row = find_request(settings, session, request)
            if not resume_request(session, row.id):
                fail(f"{row.id} is {in_words(row.status)}: there is nothing to resume (`rushes retry`?)")
        run = api.run(row.flow_run_id) if row.flow_run_id else None
        if run is not None and run.state == "PAUSED":
            api.resume(run.id)
        elif run is not None and run.final:  # as of a run that crashed while its request was paused
            run = start_run(api, row.id, run.parameters, name=row.name, tenant=row.tenant)
    typer.echo(f"{row.id} goes on")
    if run is None:
        fail("Prefect no longer has its run: submit its prompts again, which takes up what is missing")
    typer.echo(run_url(settings.ui_url, run.id))
    if watch:
        raise typer.Exit(watch_request(settings, row.id, run.id))


@app.command(rich_help_panel=REQUESTS)
def retry(
    request: RequestName,
    failed: Annotated[bool, typer.Option("--failed", help="Only those that failed.")] = False,
    quarantined: Annotated[bool, typer.Option("--quarantined", help="Only those set aside as poison.")] = False,
    missing: Annotated[
        bool, typer.Option("--missing", help="Only finished ones whose bytes the store has no longer.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show progress until all clips are there.")] = False,
) -> None:
    """Queue the failed, quarantined and cancelled clips of a request again, with all attempts anew.

    With --missing those that were made, too, where their bytes are gone.
    """
    from db.requests import AGAIN, retry_request
    from db.tables import ClipStatus
    from flows.cli.find import find_request
    from flows.clients.ledger import ledger
    from flows.clients.ownership import check_owner
    from flows.clients.prefect import prefect_api
    from flows.operate.repair import queue_missing
    from flows.request.submit import run_url, start_run

    settings = current_settings()
    with (
        prefect_api(settings) as api,
        ledger(settings) as sessions,
    ):
        with sessions() as session:
            row = find_request(settings, session, request)
        old = api.run(row.flow_run_id) if row.flow_run_id else None
        if old is None:
            fail(f"Prefect no longer has the run of {row.id}: submit its prompts again, which takes up what is missing")
        with sessions.begin() as session:
            asked = {ClipStatus.FAILED: failed, ClipStatus.QUARANTINED: quarantined}
            chosen = [status for status in asked if asked[status]]
            count = 0 if missing and not chosen else retry_request(session, row.id, chosen or AGAIN)
        if missing:
            store = settings.open_store()
            check_owner(sessions, store)
            count += queue_missing(sessions, store, row.id)
        if not count:
            typer.echo(f"{row.id}: nothing to retry")
            return
        run = start_run(api, row.id, old.parameters, name=row.name, tenant=row.tenant) if old.final else old
    typer.echo(f"{row.id}: {counted(count, 'clip')} queued again")
    typer.echo(run_url(settings.ui_url, run.id))
    if watch:
        raise typer.Exit(watch_request(settings, row.id, run.id))


def go_on(settings: Settings, row: RequestRow) -> None:
    """Sees to it that a request which was opened again has a run that makes it, and says which."""
    from flows.clients.prefect import PrefectUnavailable, prefect_api
    from flows.request.submit import run_url, start_run
    from flows.settings import NotRunning

    try:
        with prefect_api(settings) as api:
            run = api.run(row.flow_run_id) if row.flow_run_id else None
            if run is None:
                typer.echo(f"{row.id}: Prefect no longer has its run: submit its prompts again", err=True)
                return
            if run.final:
                run = start_run(api, row.id, run.parameters, name=row.name, tenant=row.tenant)
            typer.echo(run_url(settings.ui_url, run.id), err=True)
    except (NotRunning, PrefectUnavailable):
        typer.echo(f"{row.id}: Prefect is not there: the next round of maintenance takes it up", err=True)


@app.command(rich_help_panel=REQUESTS)
def export(
    request: RequestName,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to; made if it is missing.", file_okay=False)],
) -> None:
    """Copy a request's clips into a folder, named by custom_id or clip id, with manifest.jsonl and the contact sheet.

    Run again, it copies what is missing. Exit code 1 if a finished clip's bytes are gone or wrong.
    """
    raise typer.Exit(export_request(current_settings(), request, folder))


def export_request(settings: Settings, request: str, folder: Path, *, quiet: bool = False) -> int:
    from flows.cli.find import find_request
    from flows.clients.ledger import reading
    from flows.operate.export import export as copy
    from flows.operate.export import export_sheet

    store = settings.open_store()
    with reading(settings) as session:
        row = find_request(settings, session, request)
        done = copy(session, store, row.id, folder)
        sheet = export_sheet(store, row.sheet_key, folder)
    for problem in done.broken:
        typer.echo(f"rushes: {problem}", err=True)
    if not quiet:
        there = f", {done.there} there already" if done.there else ""
        missing = f"; {done.missing} clips of the request are not done (see manifest.jsonl)" if done.missing else ""
        typer.echo(f"{folder}: {done.copied} clips copied{there}{' and the contact sheet' * sheet}{missing}")
    return FAILED if done.broken else DONE


@app.command(rich_help_panel=REQUESTS)
def rewrite(
    prompt: Annotated[str, typer.Argument(help="In your own words.")],
    model: Annotated[str | None, typer.Option(help="Name or folder of the model.")] = None,
    image: Annotated[bool, typer.Option("--image", help="For a picture, which tells no motion.")] = False,
    format: Format = "table",
) -> None:
    """Show what a prompt would be rewritten to, and what of it is not understood."""
    from flows.library.models import card_of
    from flows.request.rewriting import rewriter_of, try_out
    from flows.show import show_one

    settings = current_settings()
    card = card_of(settings, model or settings.model)
    with rewriter_of(settings, card) as rewriter:
        if rewriter is None:
            fail(f"{card.name} brings no rewriter and RUSHES_REWRITER_URL is not set: prompts stay as they are")
        answer = try_out(rewriter, card, prompt, moving=not image)
    if format == "table" and answer.text is None:
        typer.echo("rushes: left as it is", err=True)
    show_one({"prompt": prompt, "rewritten_prompt": answer.text, "not_understood": answer.not_understood}, format)


@app.command(name="requests", rich_help_panel=REQUESTS)
def requests_(
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20, format: Format = "table"
) -> None:
    """List the latest requests: what is done, failed and left, how fast it goes, when it will be done."""
    from db.history import STANDING, standings
    from flows.clients.ledger import reading
    from flows.show import show_rows

    with reading(current_settings()) as session:
        rows = standings(session, limit=limit)
    for row in rows:
        row["request"], row["left"] = row.pop("request_id"), row.pop("clips_left")
        if format == "table":  # for people: what ended badly in one number, a rate as one reads it
            row["failed"] += row["quarantined"] + row["rejected"]
            row["rate"] = None if row["clips_per_minute"] is None else f"{row['clips_per_minute']:.3g}/min"
    if format == "table":
        columns = ["request", "name", "status", "done", "failed", "left", "total", "rate", "eta"]
        columns += ["tenant", "priority", "model", "created_at"]
    else:
        columns = ["request", *(name for name in STANDING if name not in ("request_id", "clips_left")), "left"]
    show_rows(rows, columns, format)


@app.command(name="tenants", rich_help_panel=REQUESTS)
def tenants_(
    name: Annotated[str | None, typer.Argument(help="Whose share or bounds to set; empty: list all.")] = None,
    weight: Annotated[float | None, typer.Option(help="GPU-seconds are shared in proportion to it.")] = None,
    max_clips: Annotated[int | None, typer.Option(help="Clips that may wait or run at once; -1: any number.")] = None,
    max_gpu_seconds: Annotated[float | None, typer.Option(help="In 24 hours; -1: any number.")] = None,
    format: Format = "table",
) -> None:
    """List the tenants with what they use, or set the share and the bounds of one."""
    from db.tenants import set_tenant, tenants
    from flows.clients.ledger import ledger
    from flows.show import show_rows

    bounds: dict[str, Any] = {"weight": weight, "max_clips": max_clips, "max_gpu_seconds": max_gpu_seconds}
    bounds = {what: None if value == -1 else value for what, value in bounds.items() if value is not None}
    if bounds and name is None:
        fail("name the tenant whose share or bounds to set")
    if any(value is not None and not (0 <= value < float("inf")) for value in bounds.values()) or weight in (0, -1):
        fail("a weight must be above 0, a bound at least 0, or -1 for none")
    with ledger(current_settings()) as sessions, sessions.begin() as session:
        if name is not None and bounds:
            set_tenant(session, name, **bounds)
        rows = [asdict(row) for row in tenants(session) if name in (None, row.name)]
    show_rows(rows, ["name", "weight", "max_clips", "max_gpu_seconds", "waiting", "gpu_seconds"], format)
