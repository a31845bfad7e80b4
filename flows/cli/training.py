"""Commands for training: train, recaption, eval, datasets."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from flows.cli.app import TRAINING, Format, app, current_settings
from flows.cli.errors import BAD_INPUT, DONE, FAILED, fail
from flows.cli.stack import start_stack

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

    from flows.clients.prefect import prefect_api
    from flows.request.submit import run_url

    settings = current_settings()
    with prefect_api(settings) as api:
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
    from flows.library.models import resolve
    from flows.train.evaluation import JUDGE, evaluate, find_judge

    settings = current_settings()
    card, jury = resolve(settings, model), find_judge(judge or JUDGE)
    if settings.database_url is None or settings.stack_file.exists():
        start_stack(settings)
        settings = current_settings()  # again: they now know where the stack is
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
    from flows.clients.ledger import reading
    from flows.show import show_rows

    with reading(current_settings()) as session:
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
