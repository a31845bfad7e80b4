"""The command `rushes demo`: the whole way of eight prompts, and where to look afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from flows.cli.app import REPOSITORY, STACK, app, current_settings
from flows.cli.errors import DONE
from flows.cli.requests import export_request, submit_file, watch_request
from flows.cli.stack import start_stack

if TYPE_CHECKING:
    from flows.settings import Settings


@app.command(rich_help_panel=STACK)
def demo() -> None:
    """Start the stack, render the eight example prompts, and say where to look."""
    import time

    from flows.show import show_rows

    began = time.monotonic()
    start_stack(current_settings())
    settings = current_settings()  # again: they now know where the stack is
    example = REPOSITORY / "examples" / "prompts.jsonl"
    submitted = submit_file(settings, str(example), {"name": "demo"})
    request_id, code = submitted[0], DONE
    if submitted[1]:
        code = watch_request(settings, request_id, submitted[1])
    if code == DONE:
        folder = settings.home / "clips" / request_id
        export_request(settings, request_id, folder, quiet=True)
        rows = list(_clip_files(settings, request_id, folder))
        typer.echo("")
        show_rows(rows, ["clip", "prompt", "status", "seconds", "file"], "table")
        found = sum(row["reused"] for row in rows)
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
                "reused": bool(clip["reused"]),
                "seconds": round(clip["seconds"], 2) if clip["seconds"] is not None else None,
                "file": clip["file"],
            }
