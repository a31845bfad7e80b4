"""The command `rushes`: every way to run and ask the platform from a terminal.

`rushes --help` must answer at once, so nothing heavy is imported before a command runs, and submitting, watching and
asking never load torch. Errors that a person can mend are one line on standard error, never a traceback.
"""

from __future__ import annotations

import signal
import sys
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, cast

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from flows.settings import Settings
    from flows.submit import Good
    from infra.local import Stack
    from model.weights import ModelCard

DONE, FAILED, BAD_INPUT = 0, 1, 2
CONTROL_RUNS = 100  # requests that the control pool watches at once
MOST_PROBLEMS = 20  # lines about clips of which none can be rendered again
REPOSITORY = Path(__file__).resolve().parent.parent

# What a person can mend, by name so that nothing has to be imported to catch it, and the exit code it deserves.
EXITS = {
    "flows.settings.WrongSetting": BAD_INPUT,
    "flows.settings.NotRunning": FAILED,
    "flows.prompts.BadFile": BAD_INPUT,
    "flows.prompts.BadUri": BAD_INPUT,
    "flows.submit.BadOptions": BAD_INPUT,
    "db.datasets.DatasetNotFound": BAD_INPUT,
    "flows.prefect_api.PrefectRefused": FAILED,
    "flows.rewriting.RewriterFailed": FAILED,
    "flows.evaluation.NoJudge": BAD_INPUT,
    "flows.evaluation.EvaluationFailed": FAILED,
    "flows.prefect_api.PrefectUnavailable": FAILED,
    "model.weights.ModelNotFound": BAD_INPUT,
    "model.checkpoint.BadCheckpoint": BAD_INPUT,
    "model.checkpoint.NotEnoughMemory": FAILED,
    "model.engine.EngineError": FAILED,
    "flows.models.BadName": BAD_INPUT,
    "flows.variants.BadVariant": BAD_INPUT,
    "flows.layout.BadGpus": BAD_INPUT,
    "flows.reproduce.BadPartition": BAD_INPUT,
    "flows.layout.CannotFit": FAILED,
    "flows.devices.NoDevices": FAILED,
    "flows.models.BrokenModel": FAILED,
    "db.models.NameTaken": BAD_INPUT,
    "db.models.ModelNeeded": BAD_INPUT,
    "db.ledger.RequestNotFound": BAD_INPUT,
    "db.ledger.RequestNotReady": FAILED,
    "db.history.SqlFailed": BAD_INPUT,
    "infra.store.NoSuchKey": FAILED,
    "infra.store.StoreUnavailable": FAILED,
    "infra.postgres.PostgresFailed": FAILED,
    "infra.local.StackFailed": FAILED,
    "sqlalchemy.exc.OperationalError": FAILED,
    "sqlalchemy.exc.ProgrammingError": FAILED,
    "pydantic_core._pydantic_core.ValidationError": BAD_INPUT,
    "builtins.OSError": FAILED,
}

MANUAL = """
Makes a video for every prompt of a file, and accounts for every one of them.

Submit a file of prompts, watch it render, export the clips, and ask about
any of them in SQL. Prefect schedules the work and shows it on a web page;
engines, each a model divided over several processes or GPUs, do it; Postgres
records it: nothing is rendered twice, nothing is lost.
"""

EPILOG = """
[bold]Examples[/bold]
  Start the local stack (Postgres, Prefect, workers):
    rushes up
  Check a file, render it, show progress:
    rushes submit prompts.jsonl --watch
  What a prompt is rewritten to before it is rendered:
    rushes rewrite "a crimson ball rolls off to the left"
  A prompt a line, four clips of each, all of one size:
    rushes submit list.txt --size 96x64 --samples 4
  Copy the clips and a manifest into a folder:
    rushes export req_0123456789ab clips/
  What went wrong since yesterday, and anything else:
    rushes history --status failed --since 1d
    rushes sql "select status, count(*) from history group by 1"

[bold]Prompt files[/bold]
  .jsonl  an object a line: {"prompt": "a red ball spins"}, and if wanted
          custom_id negative_prompt width height size frames fps steps
          guidance solver shift step_cache samples seed; and what to make
          it from:
          mode image video clip end_image end_video end_clip direction
          strength overlap
  .csv    the same names in a header row
  .txt    a prompt a line

[bold]Exit codes[/bold]
  0  done
  1  failed, or the stack is not running
  2  bad input: nothing was done

[bold]Settings[/bold]
  RUSHES_HOME          folder of all state (default ~/.local/share/rushes)
  RUSHES_DATABASE_URL  RUSHES_STORE_URL  RUSHES_PREFECT_API_URL
                       services elsewhere, in place of the local stack's
  RUSHES_MODEL  RUSHES_PARTITION  RUSHES_DEVICE  RUSHES_ENGINES
                       what engines load, how they divide it, where, how many
  RUSHES_REWRITER_URL  RUSHES_REWRITER_MODEL  RUSHES_REWRITER_KEY
                       a language model that rewrites prompts in place of
                       the model's own rewriter
"""

Format = Annotated[
    Literal["table", "json", "csv"], typer.Option("--format", "-f", help="How to print it.", rich_help_panel="Output")
]


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


app = typer.Typer(
    cls=OneLineErrors,
    help=MANUAL,
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

STACK, REQUESTS, QUESTIONS = "The stack", "Requests", "Questions"
TRAINING, OPERATION = "Training", "Operation"


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"rushes {version('rushes')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _settings(**given: Any) -> Settings:
    from flows.settings import load_settings

    return load_settings(**given)


# --- the stack -------------------------------------------------------------------------------------------------------


@app.command(rich_help_panel=STACK)
def up() -> None:
    """Start the local stack, or mend it: Postgres, the Prefect server and its page, the workers."""
    stack = _up(_settings())
    typer.echo(f"Prefect  {stack.prefect_ui_url}")
    typer.echo(f"State    {stack.home}")


def _up(settings: Settings) -> Stack:
    from flows.ledgers import settle
    from infra import local

    stack = local.up(
        settings.home, repo=_working_folder(settings), migrate=settle, engines=settings.most_engines, say=typer.echo
    )
    _take_up(settings, stack)
    return stack


def _take_up(settings: Settings, stack: Stack) -> None:
    """Has `tidy` look at once, and not within ten minutes, where the run of an open request has ended without it.

    That is what becomes of a run whose worker was killed. While Prefect cannot say, the schedule will do.
    """
    from db.session import sessions
    from db.watching import open_requests
    from flows.ledgers import database
    from flows.prefect_api import PrefectApi, PrefectRefused, PrefectUnavailable

    with database(settings, url=stack.database_url) as engine, sessions(engine)() as session:
        runs = [request.flow_run_id for request in open_requests(session) if request.flow_run_id]
    if not runs:
        return
    try:
        with PrefectApi(stack.prefect_api_url, settings.prefect_password) as api:
            states = [api.run(run) for run in runs]
            if any(run is None or not run.under_way for run in states):
                api.submit("tidy/scheduled", {})
    except (PrefectRefused, PrefectUnavailable) as error:
        typer.echo(f"tidy will take up what was left: {error}")


def _working_folder(settings: Settings) -> Path:
    """Where flow runs work: the checkout, or the home folder where Rushes is installed as a package."""
    return REPOSITORY if (REPOSITORY / "pyproject.toml").is_file() else settings.home


@app.command(rich_help_panel=STACK)
def down() -> None:
    """Stop the local stack. Nothing is left running; what was rendered stays."""
    from infra import local

    settings = _settings()
    stopped = local.down(settings.home, say=typer.echo)
    typer.echo(f"Stopped: {', '.join(stopped)}" if stopped else f"No stack was running under {settings.home}")


@app.command(rich_help_panel=STACK)
def status(format: Format = "table") -> None:
    """Show which parts of the local stack run. Exit code 1 if one does not."""
    from flows.show import show_rows
    from infra import local

    now = local.status(_settings().home)
    rows = [{"part": p.name, "state": "running" if p.running else "stopped", "detail": p.detail} for p in now.parts]
    rows.append({"part": "flow runs", "state": str(now.flow_runs), "detail": "processes that execute one now"})
    show_rows(rows, ["part", "state", "detail"], format)
    raise typer.Exit(DONE if now.running else FAILED)


@app.command(rich_help_panel=STACK)
def doctor(format: Format = "table") -> None:
    """Check every part (settings, ledger, store, Prefect, workers, model) and say how to mend what is wrong."""
    from flows import checks as look
    from flows.show import show_rows
    from infra import local

    settings = _settings()
    checks = local.doctor(
        settings.home,
        schema=look.schema,
        store=lambda: look.store(settings),
        weights=lambda: look.weights(settings),
    )
    rows = [
        {"check": "ok" if check.ok else "wrong", "part": check.name, "detail": check.detail, "mend": check.mend}
        for check in checks
    ]
    show_rows(rows, ["check", "part", "detail", "mend"], format)
    if not all(check.ok for check in checks):
        raise typer.Exit(FAILED)


@app.command(rich_help_panel=STACK)
def demo() -> None:
    """Start the stack, render the eight example prompts, and say where to look."""
    import time

    from flows.show import show_rows

    began = time.monotonic()
    _up(_settings())
    settings = _settings()  # again: they now know where the stack is
    example = REPOSITORY / "examples" / "prompts.jsonl"
    submitted = _submit(settings, str(example), {"name": "demo"}, skip_invalid=False)
    request_id, code = submitted[0], DONE
    if submitted[1]:
        code = _watch(settings, request_id, submitted[1])
    if code == DONE:
        folder = settings.home / "clips" / request_id
        _export(settings, request_id, folder, quiet=True)
        rows = list(_clip_files(settings, request_id, folder))
        typer.echo("")
        show_rows(rows, ["clip", "prompt", "status", "seconds", "file"], "table")
        found = sum(row["found"] for row in rows)
        if found == len(rows) or not submitted[1]:
            typer.echo(f"All {len(rows)} clips were found: nothing was rendered.")
        typer.echo(f"Clips          {folder}")
        typer.echo(f"Contact sheet  {folder / 'contact_sheet.png'}")
    typer.echo(f"Prefect        {settings.ui_url}")
    typer.echo('Ask            rushes sql "select status, count(*) from history group by 1"')
    typer.echo(f"It took        {time.monotonic() - began:.0f} s")
    raise typer.Exit(code)


def _clip_files(settings: Settings, request_id: str, folder: Path) -> Iterator[dict[str, Any]]:
    import json

    with (folder / "manifest.jsonl").open(encoding="utf-8") as manifest:
        for line in manifest:
            clip = json.loads(line)
            yield {
                "clip": Path(clip["file"]).stem if clip["file"] else clip["custom_id"] or clip["clip_id"],
                "prompt": clip["prompt"],
                "status": clip["status"],
                "found": bool(clip["found"]),
                "seconds": round(clip["seconds"], 2) if clip["seconds"] is not None else None,
                "file": clip["file"],
            }


# --- requests --------------------------------------------------------------------------------------------------------


SETTING = "Settings of prompts that bring none of their own (default: the model's)"
MADE_FROM = "What prompts are made from that do not say so themselves"


@app.command(rich_help_panel=REQUESTS)
def submit(
    file: Annotated[str, typer.Argument(help="Prompts as JSONL, CSV or text; - reads standard input.")],
    name: Annotated[str | None, typer.Option(help="What you call this batch (default: the file's name).")] = None,
    model: Annotated[str | None, typer.Option(help="Name or folder of the model.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT, like 96x64.", rich_help_panel=SETTING)] = None,
    frames: Annotated[int | None, typer.Option(help="4n+1; 1 makes an image.", rich_help_panel=SETTING)] = None,
    fps: Annotated[int | None, typer.Option(help="Frames per second.", rich_help_panel=SETTING)] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", rich_help_panel=SETTING)] = None,
    guidance: Annotated[
        float | None, typer.Option(help="How closely to follow the prompt; 1 is off.", rich_help_panel=SETTING)
    ] = None,
    solver: Annotated[
        Literal["euler", "ab2", "unipc"] | None,
        typer.Option(help="How the equation is stepped.", rich_help_panel=SETTING),
    ] = None,
    shift: Annotated[float | None, typer.Option(help="Time shift.", rich_help_panel=SETTING)] = None,
    step_cache: Annotated[
        float | None,
        typer.Option(help="Skip steps that change by less than this share, 0 to 1.", rich_help_panel=SETTING),
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What should not be seen.", rich_help_panel=SETTING)
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Clips of each prompt.", rich_help_panel=SETTING)] = None,
    seed: Annotated[
        int | None, typer.Option(help="Another number makes other clips of the same prompts.", rich_help_panel=SETTING)
    ] = None,
    priority: Annotated[int | None, typer.Option(help="0 to 9, higher goes first (default 5).")] = None,
    tenant: Annotated[str | None, typer.Option(help="On whose account.")] = None,
    idempotency_key: Annotated[
        str | None,
        typer.Option(
            "--idempotency-key",
            "--key",
            help="Two requests of one key are one (default: a digest of file, settings, tenant and model).",
        ),
    ] = None,
    mode: Annotated[
        Literal["text-to-video", "image", "image-to-video", "extend", "connect", "loop", "edit"] | None,
        typer.Option(help="What clips are made from (default: their words alone).", rich_help_panel=MADE_FROM),
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="A picture: a file, or store:KEY.", rich_help_panel=MADE_FROM)
    ] = None,
    video: Annotated[str | None, typer.Option(help="A video: a file, or store:KEY.", rich_help_panel=MADE_FROM)] = None,
    clip: Annotated[str | None, typer.Option(help="The id of a finished clip.", rich_help_panel=MADE_FROM)] = None,
    end_image: Annotated[str | None, typer.Option(help="What to connect to.", rich_help_panel=MADE_FROM)] = None,
    end_video: Annotated[str | None, typer.Option(help="What to connect to.", rich_help_panel=MADE_FROM)] = None,
    end_clip: Annotated[str | None, typer.Option(help="What to connect to.", rich_help_panel=MADE_FROM)] = None,
    direction: Annotated[
        Literal["forward", "backward"] | None, typer.Option(help="Where to extend.", rich_help_panel=MADE_FROM)
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="Of an edit: 1 keeps nothing (default 0.6).", rich_help_panel=MADE_FROM)
    ] = None,
    overlap: Annotated[
        int | None, typer.Option(help="Known frames that new ones begin with, 4n+1.", rich_help_panel=MADE_FROM)
    ] = None,
    prompts_format: Annotated[
        Literal["auto", "jsonl", "csv", "text"], typer.Option("--prompts-format", help="Format of the file.")
    ] = "auto",
    rewrite: Annotated[
        bool, typer.Option("--rewrite/--no-rewrite", help="Put prompts into words that the model was trained on.")
    ] = True,
    skip_invalid: Annotated[
        bool, typer.Option("--skip-invalid", help="Record bad lines as rejected and go on with the others.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Render all of it anew, also what is there already.")] = False,
    deadline: Annotated[
        str | None, typer.Option(help="In what time all should be done: 45m, 2h30m, or seconds. Says if it cannot be.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show progress until all clips are there.")] = False,
) -> None:
    """Check a prompt file and submit it.

    The whole file is checked first. If anything is wrong, every error is
    printed and nothing is submitted (exit code 2).

    The same file with the same settings is the same request: submitted again,
    it renders nothing that is there already. With --watch the exit code is 0
    if all clips were made, else 1.
    """
    given: dict[str, Any] = {
        "name": name,
        "model": model,
        "frames": frames,
        "fps": fps,
        "steps": steps,
        "guidance": guidance,
        "solver": solver,
        "shift": shift,
        "step_cache": step_cache,
        "negative_prompt": negative_prompt,
        "samples": samples,
        "seed": seed,
        "priority": priority,
        "tenant": tenant,
        "idempotency_key": idempotency_key,
        "prompts_format": prompts_format,
        "mode": mode,
        "image": image,
        "video": video,
        "clip": clip,
        "end_image": end_image,
        "end_video": end_video,
        "end_clip": end_clip,
        "direction": direction,
        "strength": strength,
        "overlap": overlap,
        "rewrite": rewrite,
        "fresh": fresh or None,
        "deadline": None if deadline is None else _seconds(deadline),
    }
    if fresh and idempotency_key is None:  # known here, so that the request can be watched
        given["idempotency_key"] = f"fresh-{uuid.uuid4()}"
    options = {option: value for option, value in given.items() if value is not None}
    if size is not None:
        options |= _sides(size, like="96x64")
    settings = _settings()
    request_id, run_id = _submit(settings, file, options, skip_invalid=skip_invalid)
    if watch and run_id:
        raise typer.Exit(_watch(settings, request_id, run_id))


def _sides(size: str, like: str) -> dict[str, int]:
    """The options that --size stands for."""
    from flows.prompts import parse_size

    sides = parse_size(size)
    if sides is None:
        fail(f"--size {size!r} must be WIDTHxHEIGHT, like {like}", BAD_INPUT)
    return dict(zip(("width", "height"), sides, strict=True))


def _submit(settings: Settings, file: str, options: dict[str, Any], *, skip_invalid: bool) -> tuple[str, str | None]:
    """Checks and submits; (request id, flow run id or None if the ledger has all of it already)."""
    from flows.models import card_of
    from flows.prompts import BadFile, strange_shapes
    from flows.submit import check_file, readable
    from flows.submit import submit as send

    options = {"model": settings.model, **options, "skip_invalid": skip_invalid}
    card = card_of(settings, options["model"])
    with readable(file) as (source, path):
        options.setdefault("name", Path(source).name)
        try:
            good = check_file(source, path, options, card, lambda said: typer.echo(said, err=True), settings)
        except BadFile as error:
            fail(f"{error}", BAD_INPUT)
        checked = good.checked
        if checked.bad and not (skip_invalid and checked.prompts):
            lines = _count(checked.prompts + checked.bad, "line")
            errors = f"{_count(checked.faults, 'error')} in {checked.bad} of {lines}"
            hint = "" if skip_invalid or not checked.prompts else "; --skip-invalid goes on without these lines"
            fail(f"{errors}: nothing was submitted{hint}", BAD_INPUT)
        if warning := strange_shapes(card, checked.shapes):
            typer.echo(f"rushes: warning: {warning}", err=True)
        finished = _finished(settings, good.request_id)
        if finished:
            typer.echo(f"{good.request_id} is complete: all {finished} clips were found, nothing is to be rendered")
            return good.request_id, None
        sent = send(settings, good)
    clips = f"{_count(checked.clips, 'clip')} of {_count(checked.prompts, 'prompt')}"
    skipped = f"; {_count(checked.bad, 'bad line')} recorded as rejected" if checked.bad else ""
    typer.echo(f"{sent.request_id}  {'is under way already' if sent.already else clips}{skipped}")
    typer.echo(f"{sent.url}")
    if good.request.deadline is not None and not sent.already:
        _tell_deadline(settings, card, good)
    return sent.request_id, sent.flow_run_id


def _tell_deadline(settings: Settings, card: ModelCard, good: Good) -> None:
    """Before anybody waits: when all will be done, and whether that is in time."""
    if settings.database_url is None:  # the run's page says it
        return
    from flows.estimates import as_duration, estimate
    from flows.ledgers import reading

    request, shapes = good.request, good.checked.shapes
    assert request.deadline is not None
    with reading(settings) as session:
        expected = estimate(session, settings, card, request.resolve(card), shapes, request.priority)
    if warning := expected.misses(request.deadline):
        typer.echo(f"rushes: warning: {warning}", err=True)
    else:
        typer.echo(f"expected to be done in {as_duration(expected.seconds)}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _finished(settings: Settings, request_id: str) -> int | None:
    """How many clips the request has, if it was completed before."""
    if settings.database_url is None:
        return None
    from db.ledger import request_by
    from flows.ledgers import reading

    with reading(settings) as session:
        row = request_by(session, request_id)
    return row.total if row and row.status == "completed" else None


@app.command(name="plan", rich_help_panel=REQUESTS)
def plan_(
    file: Annotated[Path, typer.Argument(help="Prompts as JSONL, CSV or text.")],
    gpus: Annotated[str, typer.Option(help="How many of which kind, like 8xh200.")],
    model: Annotated[str | None, typer.Option(help="A model, or one of Wan's releases by size, like wan-14b.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT, like 832x480.", rich_help_panel=SETTING)] = None,
    frames: Annotated[int | None, typer.Option(help="4n+1; 1 makes an image.", rich_help_panel=SETTING)] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", rich_help_panel=SETTING)] = None,
    guidance: Annotated[float | None, typer.Option(help="1 is off.", rich_help_panel=SETTING)] = None,
    samples: Annotated[int | None, typer.Option(help="Clips of each prompt.", rich_help_panel=SETTING)] = None,
    format: Format = "table",
) -> None:
    """Say how a file would best be divided over GPUs, and how long it would take.

    Nothing is submitted, and neither GPUs nor weights need to be here. Speeds
    are those of clips that this model rendered here on such devices; where
    there are none, they are assumed from data sheets and from what was
    published of Wan 2.2.
    """
    from flows.forecast import forecast
    from flows.show import show_rows

    given: dict[str, Any] = {"frames": frames, "steps": steps, "guidance": guidance, "samples": samples}
    options = {option: value for option, value in given.items() if value is not None}
    if size is not None:
        options |= _sides(size, like="832x480")
    settings = _settings()
    planned = forecast(settings, file, gpus, model or settings.model, options, lambda said: typer.echo(said, err=True))
    rows = planned.rows()
    show_rows(rows, list(rows[0]), format)
    if format == "table":
        layout = planned.layout
        assumed = "Assumed, not measured: half of the stated speed, and what Wan 2.2's table shows beside the denoising"
        by = "By what clips of this model took here" if planned.measured else assumed
        took = f"{layout.seconds / 3600:.2f} hours, {layout.gpu_hours:.1f} GPU-hours"
        typer.echo(f"{_count(planned.clips, 'clip')}: {took}. {by}")
    if planned.bad:
        fail(f"{_count(planned.bad, 'line')} cannot be read as prompts and were left out of the plan", BAD_INPUT)


@app.command(rich_help_panel=REQUESTS)
def watch(request: Annotated[str, typer.Argument(help="Request id, name or flow run id.")]) -> None:
    """Show progress of a request until it has ended. Exit code 0 if all clips were made, else 1."""
    raise typer.Exit(_watch(_settings(), request, None))


def _watch(settings: Settings, request: str, run_id: str | None) -> int:
    from flows.watch import watch as follow

    ended = follow(settings, request, flow_run_id=run_id)
    code = {"completed": DONE, "BadInput": BAD_INPUT}.get(ended.status, FAILED)
    if ended.request_id is None:
        fail(f"{request} was {'refused' if ended.refused else 'not opened'}: {ended.message}", code)
    typer.echo(f"{ended.request_id} {ended.status.replace('_', ' ')}: {ended.message}")
    return code


@app.command(rich_help_panel=REQUESTS)
def cancel(request: Annotated[str, typer.Argument(help="Request id, name or flow run id.")]) -> None:
    """Cancel a request: engines stop at their next denoising step; finished clips stay."""
    from db.ledger import cancel_request
    from flows.ledgers import ledger, the_request
    from flows.prefect_api import PrefectApi

    settings = _settings()
    with ledger(settings) as sessions, sessions.begin() as session:
        row = the_request(session, request)
        count = cancel_request(session, row.id)
    if row.status != "open":
        typer.echo(f"{row.id} is {row.status.value.replace('_', ' ')}: nothing was left to cancel")
        return
    if row.flow_run_id and settings.prefect_api_url:
        with PrefectApi(settings.prefect_api, settings.prefect_password) as api:
            api.cancel(row.flow_run_id)
    typer.echo(f"{row.id}: {_count(count, 'clip')} cancelled")


@app.command(rich_help_panel=REQUESTS)
def retry(
    request: Annotated[str, typer.Argument(help="Request id, name or flow run id.")],
    failed: Annotated[bool, typer.Option("--failed", help="Only those that failed.")] = False,
    quarantined: Annotated[bool, typer.Option("--quarantined", help="Only those set aside as poison.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show progress until all clips are there.")] = False,
) -> None:
    """Queue the failed, quarantined and cancelled clips of a request again, with all attempts anew."""
    from db.ledger import AGAIN, retry_request
    from db.tables import ClipStatus
    from flows.ledgers import ledger, the_request
    from flows.prefect_api import PrefectApi
    from flows.submit import run_url, start_run

    settings = _settings()
    with (
        PrefectApi(settings.prefect_api, settings.prefect_password) as api,
        ledger(settings) as sessions,
    ):
        with sessions() as session:
            row = the_request(session, request)
        old = api.run(row.flow_run_id) if row.flow_run_id else None
        if old is None:
            fail(f"Prefect no longer has the run of {row.id}: submit its prompts again, which takes up what is missing")
        with sessions.begin() as session:
            asked = {ClipStatus.FAILED: failed, ClipStatus.QUARANTINED: quarantined}
            count = retry_request(session, row.id, [status for status in asked if asked[status]] or AGAIN)
        if not count:
            typer.echo(f"{row.id}: nothing to retry")
            return
        run = start_run(api, row.id, old.parameters, name=row.name, tenant=row.tenant) if old.final else old
    typer.echo(f"{row.id}: {_count(count, 'clip')} queued again")
    typer.echo(run_url(settings.ui_url, run.id))
    if watch:
        raise typer.Exit(_watch(settings, row.id, run.id))


@app.command(rich_help_panel=REQUESTS)
def export(
    request: Annotated[str, typer.Argument(help="Request id, name or flow run id.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to; made if it is missing.", file_okay=False)],
) -> None:
    """Copy a request's clips into a folder, named by custom_id or clip id, with manifest.jsonl and the contact sheet.

    Run again, it copies what is missing. Exit code 1 if a finished clip's bytes are gone or wrong.
    """
    raise typer.Exit(_export(_settings(), request, folder))


def _export(settings: Settings, request: str, folder: Path, *, quiet: bool = False) -> int:
    from flows.export import export as copy
    from flows.export import export_sheet
    from flows.ledgers import reading, the_request

    store = settings.open_store()
    with reading(settings) as session:
        row = the_request(session, request)
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
    """Show what a prompt would be rewritten to, and which of its words mean nothing to the model."""
    from flows.models import card_of
    from flows.rewriting import rewriter_of, try_out
    from flows.show import show_one

    settings = _settings()
    card = card_of(settings, model or settings.model)
    with rewriter_of(settings, card) as rewriter:
        if rewriter is None:
            fail(f"{card.name} brings no rewriter and RUSHES_REWRITER_URL is not set: prompts stay as they are")
        rewritten, unknown = try_out(rewriter, card, prompt, moving=not image)
    if format == "table" and rewritten is None:
        typer.echo("rushes: left as it is", err=True)
    show_one({"prompt": prompt, "rewritten_prompt": rewritten, "unknown_words": ", ".join(unknown) or None}, format)


@app.command(name="requests", rich_help_panel=REQUESTS)
def requests_(
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20, format: Format = "table"
) -> None:
    """List the latest requests."""
    from db.ledger import latest_requests
    from flows.ledgers import reading
    from flows.show import show_rows

    with reading(_settings()) as session:
        rows = [{**asdict(row), "request": row.id} for row in latest_requests(session, limit)]
    columns = ["request", "name", "status", "total", "tenant", "priority", "model", "created_at", "finished_at"]
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
    from db import ledger as books
    from flows.ledgers import ledger
    from flows.show import show_rows

    bounds: dict[str, Any] = {"weight": weight, "max_clips": max_clips, "max_gpu_seconds": max_gpu_seconds}
    bounds = {what: None if value == -1 else value for what, value in bounds.items() if value is not None}
    if bounds and name is None:
        fail("name the tenant whose share or bounds to set")
    if any(value is not None and not (0 <= value < float("inf")) for value in bounds.values()) or weight in (0, -1):
        fail("a weight must be above 0, a bound at least 0, or -1 for none")
    with ledger(_settings()) as sessions, sessions.begin() as session:
        if name is not None and bounds:
            books.set_tenant(session, name, **bounds)
        rows = [asdict(row) for row in books.tenants(session) if name in (None, row.name)]
    show_rows(rows, ["name", "weight", "max_clips", "max_gpu_seconds", "waiting", "gpu_seconds"], format)


# --- questions -------------------------------------------------------------------------------------------------------

BRIEF = ["clip_id", "custom_id", "status", "prompt", "width", "height", "frames", "seconds", "attempts", "error"]


@app.command(rich_help_panel=QUESTIONS)
def history(
    request: Annotated[str | None, typer.Option("--request", "-r", help="Of this request (id or name).")] = None,
    status: Annotated[
        Literal["queued", "running", "done", "failed", "quarantined", "cancelled", "rejected"] | None,
        typer.Option(help="In this state."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="With these words in the prompt.")] = None,
    since: Annotated[str | None, typer.Option(help="Asked for within the last 30m, 12h, 7d …")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, newest first.")] = 50,
    columns: Annotated[
        str | None, typer.Option(help="Columns of the view `history`, by comma; `all` for all of them.")
    ] = None,
    format: Format = "table",
) -> None:
    """List clips, newest first. JSON and CSV hold every column unless --columns says otherwise."""
    within = _duration(since) if since else None
    from db.history import COLUMNS, find_clips
    from db.tables import ClipStatus
    from flows.ledgers import reading
    from flows.show import show_rows

    wanted = list(COLUMNS) if columns == "all" or (columns is None and format != "table") else BRIEF
    if columns is not None and columns != "all":
        wanted = [column.strip() for column in columns.split(",")]
        for column in wanted:
            if column not in COLUMNS:
                import difflib

                near = difflib.get_close_matches(column, COLUMNS, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(COLUMNS)}"
                fail(f"--columns: no column {column!r} in history: {hint}", BAD_INPUT)
    with reading(_settings()) as session:
        found = find_clips(
            session,
            request=request,
            status=ClipStatus(status) if status else None,
            prompt=prompt,
            since=within,
            limit=limit,
        )
    show_rows((asdict(row) for row in found), wanted, format)


def _seconds(text: str) -> float:
    """2h30m, 45m, 90s, or a number of seconds."""
    import re

    text = text.strip()
    parts = re.fullmatch(r"(?:([0-9]{1,6})d)?(?:([0-9]{1,6})h)?(?:([0-9]{1,6})m)?(?:([0-9]{1,6})s)?", text)
    if text and parts:
        return sum(int(part or 0) * size for part, size in zip(parts.groups(), (86400, 3600, 60, 1), strict=True))
    try:
        return float(text)
    except ValueError:
        fail(f"--deadline {text!r} must be a time like 45m or 2h30m, or a number of seconds", BAD_INPUT)


def _duration(text: str) -> Any:
    import re
    from datetime import timedelta

    match = re.fullmatch(r"([0-9]{1,6})([smhdw])", text.strip())
    if not match:
        fail(f"--since {text!r} must be a number and s, m, h, d or w, like 12h", BAD_INPUT)
    names = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
    return timedelta(**{names[match[2]]: int(match[1])})


@app.command(rich_help_panel=QUESTIONS)
def show(clip: Annotated[str, typer.Argument(help="Clip id.")], format: Format = "table") -> None:
    """Show everything about one clip: its settings, every attempt, where its bytes are, what it came from."""
    from db.history import show_clip
    from flows.ledgers import reading
    from flows.show import show_one, show_rows

    settings = _settings()
    with reading(settings) as session:
        story = show_clip(session, clip)
    if story is None:
        fail(f"no clip {clip!r} in the ledger: `rushes history` lists those there are", BAD_INPUT)
    row = asdict(story.clip)
    row["link"] = settings.open_store().link(story.clip.object_key) if story.clip.object_key else None
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

    Read only, and as the role rushes_reader, which sees `history` and no other
    table; with the rights of the login, where it may not become that role.
    """
    text = sys.stdin.read() if query == "-" else query
    if not text.strip():
        fail("the query is empty", BAD_INPUT)
    from db.history import run_sql
    from flows.ledgers import database
    from flows.show import show_rows

    settings = _settings()
    with database(settings, url=settings.reader) as engine:
        answer = run_sql(engine, text, timeout=timeout, limit=limit or (1000 if format == "table" else None))
    columns = _distinct(answer.columns)
    show_rows((dict(zip(columns, row, strict=True)) for row in answer.rows), columns, format)
    if answer.truncated:
        typer.echo(f"rushes: only the first {len(answer.rows)} rows are shown: --limit says how many", err=True)


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
    format: Format = "table",
) -> None:
    """Look for lost, doubled and contradictory things, in the ledger and between ledger and store.

    Rows that contradict each other, rows without bytes, bytes without rows,
    wrong digests. Exit code 1 on any.
    """
    from flows.audit import Audited
    from flows.audit import audit as compare
    from flows.ledgers import reading
    from flows.show import show_rows

    settings, audited = _settings(), Audited()
    with reading(settings) as session:
        found = compare(session, settings.open_store(), audited, hash_bytes=not quick, sample=sample)
        breaches = [asdict(each) for each in found]
    if breaches or format != "table":
        show_rows(breaches, ["problem", "key", "detail"], format)
    hashed = "not hashed" if quick else f"{audited.hashed:,} bytes hashed"
    young = f" ({audited.young} younger than a minute left alone)" if audited.young else ""
    counts = f"{audited.rows} rows and {audited.blobs} blobs{young} compared, {hashed}"
    counts += f": {len(breaches) or 'no'} breaches"
    typer.echo(counts, err=format != "table")
    raise typer.Exit(FAILED if breaches else DONE)


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
    settings, format = _settings(), "json" if as_json else format
    _need(settings.database)
    from db.reproductions import done_clips
    from flows.ledgers import ledger, the_request
    from flows.reproduce import COLUMNS, display, plan, summary
    from flows.reproduce import reproduce as render_again
    from flows.show import show_rows

    with ledger(settings) as sessions:
        if request is not None:
            with sessions() as session:
                asked = the_request(session, request)
                clips = done_clips(session, asked.id, sample)
            if not clips:
                fail(f"{asked.id} has no clip that is done: there is nothing to compare with", BAD_INPUT)
        jobs, problems = plan(settings, sessions, clips or [], partition, exact=exact)
        for problem in problems[:MOST_PROBLEMS]:
            typer.echo(f"rushes: {problem}", err=True)
        if problems:
            missing = f"{len(problems)} of {_count(len(jobs) + len(problems), 'clip')}"
            fail(f"{missing} cannot be rendered again: nothing was rendered", BAD_INPUT)
        with display(len(jobs)) as progress:
            results = render_again(settings, sessions, jobs, progress)
    rows = [asdict(each) for each in results]
    told = [name for name in COLUMNS if format != "table" or any(row[name] not in (None, "") for row in rows)]
    show_rows(rows, told, format)
    typer.echo(summary(results), err=format != "table")
    raise typer.Exit(DONE if all(each.passes(tolerance_db) for each in results) else FAILED)


# --- operation -------------------------------------------------------------------------------------------------------


@app.command(rich_help_panel=OPERATION)
def worker(
    pool: Annotated[Literal["control", "gpu"], typer.Argument(help="control runs requests, gpu runs engines.")],
    limit: Annotated[
        int | None, typer.Option(min=1, help="Flow runs at once (gpu: RUSHES_ENGINES, control: no limit).")
    ] = None,
) -> None:
    """Run a Prefect worker for one of the two pools, until it is stopped. Its engines keep what they are at then."""
    from infra.worker import run_worker

    settings = _settings()
    _need(settings.prefect_api)
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process"]
    if limit or pool == "gpu":
        command += ["--limit", str(limit or settings.most_engines)]
    raise typer.Exit(run_worker(command, settings.child_environment()))


def _need(_: str) -> None:
    """Looking a setting up says what is missing before anything is loaded."""


@app.command(rich_help_panel=OPERATION)
def engine(
    model: Annotated[str | None, typer.Option(help="Name or folder of the model.")] = None,
    partition: Annotated[str | None, typer.Option(help="How to divide it over ranks: tp=2, or cfg=2,sp=2.")] = None,
    device: Annotated[Literal["cpu", "cuda"] | None, typer.Option(help="Where the ranks compute.")] = None,
    linger: Annotated[float | None, typer.Option(min=0, help="Seconds to wait for more work.")] = None,
) -> None:
    """Run an engine here, without a Prefect worker: lease shards and render until no work is left."""
    given = {"model": model, "partition": partition, "device": device, "linger": linger}
    settings = _settings(**{name: value for name, value in given.items() if value is not None})
    _need(settings.database)
    from flows.render import run_engine
    from infra.tracing import flush, setup_tracing

    setup_tracing("rushes-engine")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # as at Ctrl-C, clips under way are kept
    try:
        done = run_engine(settings, say=typer.echo)
    finally:
        flush()
    typer.echo(f"{done.clips} clips in {done.shards} shards; busy {done.busy:.0f} of {done.alive:.0f} s")


@app.command(rich_help_panel=OPERATION)
def migrate() -> None:
    """Bring the ledger's tables up to date, and what its roles may do.

    Safe to run at any time, also by several starters at once. What the login
    has no right to do for the roles is printed, for an administrator to run.
    """
    from db.session import upgrade

    left = upgrade(_settings().database)
    typer.echo("The ledger is up to date.")
    if left:
        typer.echo("rushes: warning: an administrator has to run this, and then `rushes migrate` again:", err=True)
        for statement in left:
            typer.echo(f"  {statement};", err=True)


@app.command(rich_help_panel=OPERATION)
def deploy(
    engines: Annotated[
        int | None, typer.Option(min=1, help="Most engines at once in the pool (default: RUSHES_ENGINES).")
    ] = None,
) -> None:
    """Put the deployments and the two work pools on the Prefect server."""
    import subprocess

    settings = _settings()
    command = [sys.executable, "-m", "infra.deploy", str(REPOSITORY / "infra" / "prefect.yaml")]
    command += ["--folder", str(_working_folder(settings)), "--pool", f"control={CONTROL_RUNS}"]
    command += ["--pool", f"gpu={engines or settings.most_engines}"]
    done = subprocess.run(command, input=f"{settings.prefect_api}\n", text=True, env=settings.child_environment())
    raise typer.Exit(FAILED if done.returncode else DONE)


# --- training --------------------------------------------------------------------------------------------------------

DATA = "world, ./FOLDER, s3://BUCKET/PREFIX, or a data set's name or id."


@app.command(rich_help_panel=TRAINING)
def train(
    data: Annotated[str, typer.Option(help=f"What to learn from: {DATA}")] = "world",
    name: Annotated[str, typer.Option(help="Of the model.")] = "mini",
    seed: Annotated[int, typer.Option(min=0, help="Another number makes other weights.")] = 0,
    recipe: Annotated[
        Path | None, typer.Option(help="JSON file with settings of the recipe, like dit_steps.", dir_okay=False)
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of a process.")] = 2,
    ranks: Annotated[int, typer.Option(min=1, help="Processes, or GPUs, that divide the transformer's batches.")] = 1,
    licence: Annotated[str | None, typer.Option(help="Of the videos.")] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Wait for the model.")] = False,
) -> None:
    """Train a model on the procedural world or on your own videos and images.

    A folder's captions come from a .txt or .json beside each file, or from a
    metadata.jsonl or metadata.csv with file_name and caption. Asked for again,
    the same training goes on from its last checkpoint. Single stages run
    without Prefect: `python -m model.train --help`.
    """
    request: dict[str, Any] = {"data": _place(data), "name": name, "seed": seed, "threads": threads, "ranks": ranks}
    if licence:
        request["licence"] = licence
    if recipe:
        request["recipe"] = _object_in(recipe)
    _submit_run("train/default", request, watch)


@app.command(rich_help_panel=TRAINING)
def recaption(
    data: Annotated[str, typer.Argument(metavar="DATA", help=f"Whose clips: {DATA}")],
    author: Annotated[
        Literal["captioner", "vision"],
        typer.Option(help="The model's captioner, or the vision-language model of RUSHES_VISION_URL."),
    ] = "captioner",
    model: Annotated[str, typer.Option(help="Whose captioner: a name or a folder.")] = "mini",
    name: Annotated[str | None, typer.Option(help="Of the new data set (default: that of the old).")] = None,
    licence: Annotated[str | None, typer.Option(help="Of the videos.")] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Wait for the captions.")] = False,
) -> None:
    """Write new captions for a data set. They make a child of it; the old ones stay.

    What is captioned already is not looked at again.
    """
    given = {"author": author, "model": model, "name": name, "licence": licence}
    request = {"data": _place(data), **{key: value for key, value in given.items() if value is not None}}
    _submit_run("recaption/default", request, watch)


def _place(data: str) -> str:
    """A folder as an absolute path, so that it means the same to the worker."""
    return str(Path(data).expanduser().absolute()) if "/" in data and not data.startswith("s3://") else data


def _object_in(file: Path) -> dict[str, Any]:
    import json

    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        fail(f"{file}: is not JSON ({error})", BAD_INPUT)
    if not isinstance(values, dict):
        fail(f'{file}: must be a JSON object, like {{"dit_steps": 1000}}', BAD_INPUT)
    return cast("dict[str, Any]", values)


def _submit_run(deployment: str, request: dict[str, Any], watch: bool) -> None:
    import time

    from flows.prefect_api import PrefectApi
    from flows.submit import run_url

    settings = _settings()
    with PrefectApi(settings.prefect_api, settings.prefect_password) as api:
        run = api.submit(deployment, {"request": request}, tags=("rushes",))
        typer.echo(run_url(settings.ui_url, run.id))
        while watch and not run.final:
            time.sleep(1)
            now = api.run(run.id)
            if now is None:
                fail("Prefect no longer has the run")
            run = now
    if watch:
        typer.echo(f"{run.state_name}: {run.message}")
        raise typer.Exit(BAD_INPUT if run.state_name == "BadInput" else DONE if run.state == "COMPLETED" else FAILED)


@app.command(name="eval", rich_help_panel=TRAINING)
def eval_(
    model: Annotated[str, typer.Argument(help="A name or a folder.")] = "mini",
    prompts: Annotated[int, typer.Option(min=1, help="How many; all else that is measured grows with it.")] = 256,
    modes: Annotated[int, typer.Option(min=0, help="Clips of every mode; 0 leaves modes out.")] = 4,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    judge: Annotated[
        Path | None, typer.Option(metavar="DIR", help="What looks at the clips (default: the one that is shipped).")
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to put a PNG of clips that fail.", dir_okay=False)
    ] = None,
) -> None:
    """Measure a model of mini's world: how often it does what a prompt says, and how steady its clips are.

    Renders several hundred clips, which takes minutes. The tables are printed
    and the figures recorded in the model's row of the ledger; the local stack
    is started unless the ledger is elsewhere.
    """
    from flows.evaluation import JUDGE, evaluate, find_judge
    from flows.models import resolve

    settings = _settings()
    card, jury = resolve(settings, model), find_judge(judge or JUDGE)
    if settings.database_url is None or settings.stack_file.exists():
        _up(settings)
        settings = _settings()  # again: they now know where the stack is
    figures = evaluate(settings, card, jury, prompts=prompts, modes=modes, threads=threads, sheet=sheet)
    typer.echo("")
    typer.echo(f"Figures  {figures}")
    if sheet:
        typer.echo(f"Sheet    {sheet}")
    query = f"select card->'scores'->'evaluation' from models where digest = '{card.digest}'"
    typer.echo(f'Ask      rushes sql "{query}"')


@app.command(name="datasets", rich_help_panel=TRAINING)
def datasets_(
    data: Annotated[str | None, typer.Argument(metavar="[DATA]", help="Name or id: list its clips.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    format: Format = "table",
) -> None:
    """List the data sets, or the clips of one with their captions (and those they had before)."""
    from db.datasets import captions_beside, dataset_by, dataset_clips, latest_datasets
    from flows.ledgers import reading
    from flows.show import show_rows

    with reading(_settings()) as session:
        if data is None:
            rows = [asdict(row) for row in latest_datasets(session, limit)]
            columns = ["id", "name", "source", "clips", "captions", "author", "parent", "licence", "created_at"]
        else:
            found = dataset_by(session, data)
            before = {index: old for index, old, _ in captions_beside(session, found.id, limit)}
            rows = [
                asdict(clip) | {"before": before.get(clip.index)}
                for clip in dataset_clips(session, found.id, limit=limit)
            ]
            columns = ["index", "file", "start", "width", "height", "frames", "caption"]
            columns += ["before"] if found.parent else []
    show_rows(rows, columns, format)


models = typer.Typer(invoke_without_command=True)
app.add_typer(models, name="models", rich_help_panel=TRAINING)


@models.callback()
def models_(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    format: Format = "table",
) -> None:
    """List the models that the ledger knows, add one, or remove one.

    Those with bytes were added: their files lie in the store, and wherever a
    model is asked for, their name or digest will do.
    """
    if context.invoked_subcommand:
        return
    from db.models import latest_models
    from flows.ledgers import reading
    from flows.models import as_row
    from flows.show import show_rows

    with reading(_settings()) as session:
        rows = [as_row(model) for model in latest_models(session, limit)]
    if format == "table":
        rows = [{**row, "digest": row["digest"][:12]} for row in rows]
    show_rows(rows, ["name", "digest", "parameters", "bytes", "trained", "dataset", "created_at"], format)


@models.command()
def add(
    base: Annotated[
        str, typer.Argument(help="A folder in the diffusers layout, with safetensors; of a variant any model.")
    ],
    name: Annotated[str | None, typer.Option(help="What it is to be called (default: its own name).")] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:SCALE]",
            help="Merge this adapter into its weights; repeatable. transformer_2=FILE[:SCALE] for a second expert.",
        ),
    ] = None,
    weights: Annotated[
        Literal["int8"] | None, typer.Option(help="Keep the linear layers of its blocks in 8 bits.")
    ] = None,
    format: Format = "table",
) -> None:
    """Check a model folder, put it into the store, and record it.

    Every engine can fetch it then: by the name that it was added under, or by
    its digest. Added again, nothing is sent that is there.

    With --lora or --weights it is a variant of BASE that is added, a model of
    its own whose files the store does not keep twice. BASE may then be a name
    as well.
    """
    from flows.models import add as add_model
    from flows.show import show_one
    from flows.variants import Lora

    loras = [Lora.parse(each) for each in lora or ()]
    added = add_model(_settings(), base, name, loras=loras, weights=weights)
    show_one(added.facts(), format)
    if added.already:
        sent = f"{_count(added.sent, 'lost file')} sent again" if added.sent else "nothing was sent"
        typer.echo(f"rushes: {added.name} is there already: {sent}", err=True)


@models.command()
def remove(name: Annotated[str, typer.Argument(help="The name that it was added under, or its digest.")]) -> None:
    """Take a model out of the store.

    Its clips and its row stay. What no other model needs of its files is
    deleted by tidy after a day. Refused while an open request needs it.
    """
    from flows.models import remove as remove_model

    row, objects = remove_model(_settings(), name)
    files = _count(objects, "file") if objects else "no file"
    typer.echo(f"Removed  {row.name} {row.digest[:12]}: {files} will be deleted in a day")


def main() -> None:
    """The entry point of the package."""
    app(prog_name="rushes")


if __name__ == "__main__":
    main()
