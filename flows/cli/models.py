"""Commands about models: list, add, remove."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from flows.cli.app import Format, counted, current_settings
from flows.cli.stack import fill_forms

models = typer.Typer(invoke_without_command=True)


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
    from flows.clients.ledger import reading
    from flows.library.models import as_row
    from flows.show import show_rows

    with reading(current_settings()) as session:
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
    from flows.library.models import add as add_model
    from flows.library.variants import Lora
    from flows.show import show_one

    loras = [Lora.parse(each) for each in lora or ()]
    added = add_model(current_settings(), base, name, loras=loras, weights=weights)
    fill_forms()
    show_one(added.facts(), format)
    if added.already:
        sent = f"{counted(added.sent, 'lost file')} sent again" if added.sent else "nothing was sent"
        typer.echo(f"rushes: {added.name} is there already: {sent}", err=True)


@models.command()
def remove(name: Annotated[str, typer.Argument(help="The name that it was added under, or its digest.")]) -> None:
    """Take a model out of the store.

    Its clips and its row stay. What no other model needs of its files is
    deleted by maintenance after a day. Refused while an open request needs it.
    """
    from flows.library.models import remove as remove_model

    row, objects = remove_model(current_settings(), name)
    fill_forms()
    files = counted(objects, "file") if objects else "no file"
    typer.echo(f"Removed  {row.name} {row.digest[:12]}: {files} will be deleted in a day")
