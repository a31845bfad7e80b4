"""The command `rushes`: its help, its groups, and what every command shares.

`rushes --help` must answer at once, so nothing heavy is imported before a command runs, and submitting, watching and
asking never load torch."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from db.settings import OF_SOURCES, SETTINGS
from flows.cli.errors import OneLineErrors

if TYPE_CHECKING:
    from flows.settings import Settings

INDENT = " " * 10  # of the second column of the epilog
REPOSITORY = Path(__file__).resolve().parents[2]
MANUAL = """
Makes a video for every prompt of a file, and accounts for every one of them.

Submit a file of prompts, watch it render, export the clips, and ask about
any of them in SQL. Prefect schedules the work and shows it on a web page;
engines, each a model divided over several processes or GPUs, do it; Postgres
records it: nothing is rendered twice, nothing is lost.
"""
_FIELDS = ("custom_id", "negative_prompt", "size", *(name for name in SETTINGS if name not in OF_SOURCES))
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
{FIELDS}; and what
          to make it from:
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
  RUSHES_LOG           text, or json: a JSON object a line from the commands
                       of Operation and from the runs of workers
  RUSHES_REWRITER_URL  RUSHES_REWRITER_MODEL  RUSHES_REWRITER_KEY
                       a language model that rewrites prompts in place of
                       the model's own rewriter
"""
RequestName = Annotated[str, typer.Argument(help="Request id, name or flow run id.")]
ClipName = Annotated[str, typer.Argument(help="Clip id, your own id, a digest, or a file.")]
Format = Annotated[
    Literal["table", "json", "csv"], typer.Option("--format", "-f", help="How to print it.", rich_help_panel="Output")
]
app = typer.Typer(
    cls=OneLineErrors,
    help=MANUAL,
    epilog=EPILOG.replace(
        "{FIELDS}", fill(" ".join((*_FIELDS, "samples", "seed")), 76, initial_indent=INDENT, subsequent_indent=INDENT)
    ),
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
STACK, REQUESTS, QUESTIONS = "The stack", "Requests", "Questions"
TRAINING, OPERATION = "Training", "Operation"
SERVICES = {"worker", "engine", "serve", "migrate", "deploy"}  # whose output is a log


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"rushes {version('rushes')}")
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand in SERVICES:
        from flows.settings import log_format
        from infra.logs import setup_logs

        setup_logs(log_format(), f"rushes-{context.invoked_subcommand}")


def current_settings(**given: Any) -> Settings:
    from flows.settings import load_settings

    return load_settings(**given)


def working_folder(settings: Settings) -> Path:
    """Where flow runs work: the checkout, or the home folder where Rushes is installed as a package."""
    return REPOSITORY if (REPOSITORY / "pyproject.toml").is_file() else settings.home


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def in_words(status: str) -> str:
    """A status as people read it: `completed with gaps`."""
    return status.replace("_", " ")
