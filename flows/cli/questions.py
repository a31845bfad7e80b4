"""Commands that ask the ledger: history, show, sql, psql, audit, reproduce."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flows.cli.app import QUESTIONS, ClipName, Format, app, counted, current_settings
from flows.cli.errors import BAD_INPUT, DONE, FAILED, fail
from flows.cli.operation import need

if TYPE_CHECKING:
    from flows.operate.audit import Breach
    from flows.settings import Settings

MOST_PROBLEMS = 20  # lines about clips of which none can be rendered again
BRIEF = ["clip_id", "custom_id", "status", "prompt", "width", "height", "frames", "seconds", "attempts", "error"]


@app.command(rich_help_panel=QUESTIONS)
def history(
    request: Annotated[str | None, typer.Option("--request", "-r", help="Of this request (id or name).")] = None,
    status: Annotated[
        Literal["queued", "running", "done", "failed", "quarantined", "cancelled", "rejected"] | None,
        typer.Option(help="In this state."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="With these words in the prompt.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="With this tag; given twice, with both.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Of this tenant.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Of this model, by its name or the beginning of its digest.")
    ] = None,
    since: Annotated[str | None, typer.Option(help="Asked for within the last 30m, 12h, 7d …")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, newest first.")] = 50,
    columns: Annotated[
        str | None,
        typer.Option(help="Columns of the view `history`, by comma; `all`, or `help` for what each means."),
    ] = None,
    format: Format = "table",
) -> None:
    """List clips, newest first. JSON and CSV hold every column unless --columns says otherwise."""
    within = _duration(since) if since else None
    from db.history import find_clips
    from db.tables import ClipStatus
    from db.view import COLUMNS
    from flows.clients.ledger import reading
    from flows.show import show_rows

    if columns == "help":
        meanings = [{"column": name, "means": column.means} for name, column in COLUMNS.items()]
        show_rows(meanings, ["column", "means"], format)
        return
    wanted = list(COLUMNS) if columns == "all" or (columns is None and format != "table") else BRIEF
    if columns is not None and columns != "all":
        wanted = [column.strip() for column in columns.split(",")]
        for column in wanted:
            if column not in COLUMNS:
                import difflib

                near = difflib.get_close_matches(column, COLUMNS, n=1)
                hint = f"did you mean {near[0]}?" if near else "`--columns help` lists them"
                fail(f"--columns: no column {column!r} in history: {hint}", BAD_INPUT)
    with reading(current_settings()) as session:
        found = find_clips(
            session,
            request=request,
            status=ClipStatus(status) if status else None,
            prompt=prompt,
            tags=tag or (),
            tenant=tenant,
            model=model,
            since=within,
            limit=limit,
        )
    show_rows((row.columns() for row in found), wanted, format)


def _duration(text: str) -> Any:
    import re
    from datetime import timedelta

    match = re.fullmatch(r"([0-9]{1,6})([smhdw])", text.strip())
    if not match:
        fail(f"--since {text!r} must be a number and s, m, h, d or w, like 12h", BAD_INPUT)
    names = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
    return timedelta(**{names[match[2]]: int(match[1])})


@app.command(rich_help_panel=QUESTIONS)
def show(clip: ClipName, format: Format = "table") -> None:
    """Show everything about one clip: its settings, every attempt, where its bytes are, what it came from.

    The clip may be named by its id, your own id for it, a digest of its file
    or recipe (8 digits do), or a file that it was exported to.
    """
    from db.history import show_clip
    from flows.cli.clips import address_of
    from flows.cli.find import find_clip
    from flows.clients.ledger import reading
    from flows.show import show_one, show_rows

    settings = current_settings()
    with reading(settings) as session:
        story = show_clip(session, find_clip(session, clip).clip_id)
    assert story is not None
    row = story.clip.columns()
    row["link"] = address_of(settings, story.clip)
    attempts = [asdict(attempt) for attempt in story.attempts]
    parents = [{"clip": parent, "kind": kind} for parent, kind in story.parents]
    children = [{"clip": child, "kind": kind} for child, kind in story.children]
    again = [asdict(reproduction) for reproduction in story.reproductions]
    if format == "json":
        show_one({**row, "tries": attempts, "parents": parents, "children": children, "reproduced": again}, format)
        return
    show_one(row, format)
    if format == "csv":
        return
    if attempts:
        seconds = ["text_seconds", "denoise_seconds", "decode_seconds", "encode_seconds", "put_seconds"]
        shown = ["number", "status", "engine", "started_at", "finished_at", *seconds, "error"]
        show_rows(attempts, shown, format, title="Attempts")
    for title, others in (("Made from", parents), ("Led to", children)):
        if others:
            show_rows(others, ["clip", "kind"], format, title=title)
    if again:
        shown = ["created_at", "partition", "device", "code_version", "identical", "psnr", "largest", "seconds"]
        show_rows(again, shown, format, title="Reproductions")


@app.command(rich_help_panel=QUESTIONS)
def sql(
    query: Annotated[str, typer.Argument(help="One query; - reads it from standard input.")],
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds it may take.")] = 30,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many rows (a table: 1000).")] = None,
    format: Format = "table",
) -> None:
    """Ask the ledger in SQL. The view `history` has one row per clip: `select * from history limit 1`.

    The views `requests`, `attempts`, `stages`, `engines`, `usage` and `lineage`
    answer the rest. Read only, and as the role rushes_reader, which sees these
    and no table; with the login's rights, where it may not become that role.
    """
    text = sys.stdin.read() if query == "-" else query
    if not text.strip():
        fail("the query is empty", BAD_INPUT)
    from db.history import run_sql
    from flows.clients.ledger import database
    from flows.show import show_rows

    settings = current_settings()
    with database(settings, url=settings.reader) as engine:
        answer = run_sql(engine, text, timeout=timeout, limit=limit or (1000 if format == "table" else None))
    columns = _distinct(answer.columns)
    show_rows((dict(zip(columns, row, strict=True)) for row in answer.rows), columns, format)
    if answer.truncated:
        typer.echo(f"rushes: only the first {len(answer.rows)} rows are shown: --limit says how many", err=True)


@app.command(
    rich_help_panel=QUESTIONS,
    context_settings={
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
        "help_option_names": ["--help"],
    },
)
def psql(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[PSQL OPTION]...", help='As psql takes them: -c "select 1"')
    ] = None,
) -> None:
    """Open psql on the ledger, by the login of those who ask: it reads `history`. Its exit code is psql's.

    With the embedded Postgres it is the psql that comes with it (its lines can
    be edited where rlwrap is installed), else the one on the PATH.
    """
    from infra.libpq import without_libpq
    from infra.stack.home import POSTGRES
    from infra.stack.postgres import client_command, client_program, running_postgres

    settings = current_settings()
    url = settings.reader
    own, installed = running_postgres(settings.home / POSTGRES), shutil.which("psql")
    embedded = own is not None and f"@127.0.0.1:{own.port}/" in url
    program = client_program("psql") if embedded or installed is None else Path(installed)
    command, environment = client_command(program, url, *(arguments or ()))
    editor = shutil.which("rlwrap") if embedded and sys.stdin.isatty() else None
    command = [editor, *command] if editor else command
    sys.stdout.flush()
    inherited = without_libpq(os.environ) if embedded else os.environ
    os.execve(command[0], command, {**inherited, **environment})


def _distinct(columns: Sequence[str]) -> list[str]:
    """Column names, each once: two columns of one name would hide each other."""
    names: list[str] = []
    for column in columns:
        name, count = column, 2
        while name in names:
            name, count = f"{column}_{count}", count + 1
        names.append(name)
    return names


@app.command(rich_help_panel=QUESTIONS)
def audit(
    quick: Annotated[bool, typer.Option("--quick", help="Compare presence and size, do not hash the bytes.")] = False,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Hash so many objects, drawn at random (default: all).")
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Have rendered again what the store lost; exit code 1 if that is not all.")
    ] = False,
    format: Format = "table",
) -> None:
    """Look for lost, doubled and contradictory things, in the ledger and between ledger and store.

    Rows that contradict each other, rows without bytes, bytes without rows,
    wrong digests. Exit code 1 on any. With --repair each of those that the
    store has lost or spoilt is looked at again, forgotten, and rendered again.
    """
    from flows.clients.ledger import reading
    from flows.operate.audit import AuditReport
    from flows.operate.audit import audit as compare
    from flows.show import show_rows

    settings, report = current_settings(), AuditReport()
    with reading(settings) as session:
        found = list(compare(session, settings.open_store(), report, hash_bytes=not quick, sample=sample))
    breaches = [asdict(each) for each in found]
    if breaches or format != "table":
        show_rows(breaches, ["problem", "key", "detail"], format)
    hashed = "not hashed" if quick else f"{report.hashed:,} bytes hashed"
    young = f" ({report.unclaimed} of them young and without a row yet)" if report.unclaimed else ""
    counts = f"{report.rows} rows and {report.blobs} blobs{young} compared, {hashed}"
    counts += f": {len(breaches) or 'no'} breaches"
    typer.echo(counts, err=format != "table")
    mendable = [each for each in found if each.repairable]
    if repair and mendable:
        repaired(settings, mendable)
    elif mendable:
        typer.echo("`rushes audit --repair` has rendered again what the store lost", err=True)
    raise typer.Exit(FAILED if len(found) > (len(mendable) if repair else 0) else DONE)


def repaired(settings: Settings, breaches: Sequence[Breach]) -> None:
    """Mends what can be, and says so; ends the command with 1 where something cannot."""
    from db.requests import request_by
    from flows.cli.requests import go_on
    from flows.clients.ledger import ledger
    from flows.clients.ownership import check_owner
    from flows.generate.publish import publish_manifest, publish_sheet
    from flows.operate.repair import repair

    with ledger(settings) as sessions:
        store = settings.open_store()
        check_owner(sessions, store)
        done = repair(sessions, store, breaches, (publish_manifest, publish_sheet))
        for request, count in done.queued.items():
            typer.echo(f"{request}: {counted(count, 'clip')} queued again", err=True)
            with sessions() as session:
                row = request_by(session, request)
            if row is not None:
                go_on(settings, row)
    if done.anew:
        typer.echo(f"{counted(done.anew, 'clip')} begin anew, without their checkpoint", err=True)
    if done.published:
        typer.echo(f"{counted(done.published, 'manifest or sheet')} made again", err=True)
    for sentence in done.beyond:
        typer.echo(f"rushes: {sentence}", err=True)
    if done.beyond:
        raise typer.Exit(FAILED)


@app.command(rich_help_panel=QUESTIONS)
def reproduce(
    clips: Annotated[list[str] | None, typer.Argument(metavar="[CLIP]", help="Ids of done clips.")] = None,
    request: Annotated[
        str | None, typer.Option("--request", "-r", help="Of this request (id or name), in place of ids.")
    ] = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help="So many clips of the request, drawn at random (default: all).")
    ] = None,
    partition: Annotated[
        str | None, typer.Option(help="Another than it was made on: tp=2, or cfg=2,sp=2.", show_default=False)
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Without the step cache that it was made with: what does that cost?")
    ] = False,
    tolerance_db: Annotated[
        float | None, typer.Option(min=0, help="The lowest PSNR that passes (default: nothing may differ).")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The same as --format json.", rich_help_panel="Output")
    ] = False,
    format: Format = "table",
) -> None:
    """Render clips of history again, with their own settings and model, and say whether the same comes of it.

    On its own partition a clip comes out identical, to the byte. Where it does
    not, or on another partition, the PSNR over all frames, the largest
    difference of any value of 255 and the first frame that differs are shown.
    Every comparison is recorded: `rushes show` lists them, `history` sums up.

    An engine runs here, in the foreground. Exit code 1 if anything differs by
    more than --tolerance-db, 2 if a clip cannot be rendered again.
    """
    if bool(clips) == (request is not None):
        fail("name either clips or a --request", BAD_INPUT)
    if sample is not None and request is None:
        fail("--sample draws from the clips of a --request: name one", BAD_INPUT)
    settings, format = current_settings(), "json" if as_json else format
    need(settings.database)
    from db.reproductions import done_clips
    from flows.cli.find import find_request
    from flows.clients.ledger import ledger
    from flows.operate.reproduce import COLUMNS, display, plan, summary
    from flows.operate.reproduce import reproduce as render_again
    from flows.show import show_rows

    with ledger(settings) as sessions:
        if request is not None:
            with sessions() as session:
                asked = find_request(settings, session, request)
                clips = done_clips(session, asked.id, sample)
            if not clips:
                fail(f"{asked.id} has no clip that is done: there is nothing to compare with", BAD_INPUT)
        jobs, problems = plan(settings, sessions, clips or [], partition, exact=exact)
        for problem in problems[:MOST_PROBLEMS]:
            typer.echo(f"rushes: {problem}", err=True)
        if problems:
            missing = f"{len(problems)} of {counted(len(jobs) + len(problems), 'clip')}"
            fail(f"{missing} cannot be rendered again: nothing was rendered", BAD_INPUT)
        with display(len(jobs)) as progress:
            results = render_again(settings, sessions, jobs, progress)
    rows = [asdict(each) for each in results]
    told = [name for name in COLUMNS if format != "table" or any(row[name] not in (None, "") for row in rows)]
    show_rows(rows, told, format)
    typer.echo(summary(results), err=format != "table")
    raise typer.Exit(DONE if all(each.passes(tolerance_db) for each in results) else FAILED)
