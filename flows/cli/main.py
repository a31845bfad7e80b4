"""The entry point of `rushes`: every command, registered."""

from __future__ import annotations

from flows.cli import clips, demo, operation, questions, requests, stack, training
from flows.cli.app import TRAINING, app
from flows.cli.models import models

COMMANDS = (requests, clips, stack, operation, questions, training, demo)  # each registers its own when it is imported

app.add_typer(models, name="models", rich_help_panel=TRAINING)


def main() -> None:
    """The entry point of the package."""
    app(prog_name="rushes")


if __name__ == "__main__":
    main()
