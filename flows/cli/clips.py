"""Commands about one clip: open, again, trace; and diff, about two requests."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from db.settings import SETTINGS
from flows.cli.app import QUESTIONS, REQUESTS, ClipName, Format, app, counted, current_settings
from flows.cli.errors import BAD_INPUT, DONE, FAILED, fail
from flows.cli.options import AgainCommand, given_fields

if TYPE_CHECKING:
    from db.history import AttemptRow, ClipStory
    from db.view import HistoryRow
    from flows.settings import Settings

BAR = 60  # characters of a waterfall
# Columns of history that say of two clips in what they differ.
COMPARED = (
    *("prompt", "rewritten_prompt", "negative_prompt", "model", "model_digest", "seed", "mode"),
    *("window_frames" if name == "window" else name for name in SETTINGS),
    *("source_sha256", "end_source_sha256", "direction", "status", "error", "sha256"),
)


def address_of(settings: Settings, clip: HistoryRow) -> str | None:
    """Where a clip plays: at the service of the stack, else in the store; None where it has no file."""
    from flows.web.links import Links

    if clip.object_key is None:
        return None
    return Links(settings.web_url).clip(clip.clip_id, clip.media_type) or settings.open_store().link(clip.object_key)


@app.command(name="open", rich_help_panel=QUESTIONS)
def open_(
    clip: ClipName,
    show_only: Annotated[bool, typer.Option("--print", "-p", help="Print the address alone.")] = False,
) -> None:
    """Play a clip in the browser. The address is printed; in a pipe, or with --print, nothing else is done."""
    from flows.cli.find import find_clip
    from flows.clients.ledger import reading

    settings = current_settings()
    with reading(settings) as session:
        row = find_clip(session, clip)
    if (address := address_of(settings, row)) is None:
        said = f": {row.error}" if row.error else ""
        fail(f"{row.clip_id} is {row.status}{said}: there is nothing to play")
    if row.object_key and not settings.open_store().exists(row.object_key):
        fail(f"{row.clip_id}: the store has lost its bytes: `rushes retry {row.request_id} --missing` renders it again")
    typer.echo(address)
    if not show_only and sys.stdout.isatty():
        typer.launch(address)


@app.command(cls=AgainCommand, rich_help_panel=REQUESTS)
def again(
    ctx: typer.Context,
    clip: ClipName,
    prompt: Annotated[str | None, typer.Option(help="Other words.")] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show progress until it is there.")] = False,
) -> None:
    """Make another take of a clip, with something changed: its seed, its words, any setting.

    What is not said stays as it was; with nothing said, the seed is the next
    one. The take is a request of its own, and the clip its parent: `rushes
    show` and the view `lineage` tell the family.
    """
    from db.history import show_clip
    from flows.cli.find import find_clip
    from flows.cli.requests import submit_file, watch_request
    from flows.clients.ledger import reading

    settings, given = current_settings(), given_fields(ctx)
    with reading(settings) as session:
        story = show_clip(session, find_clip(session, clip).clip_id)
    assert story is not None
    old = story.clip
    options: dict[str, Any] = {
        "model": old.model,
        "tenant": old.tenant,
        "name": f"again {old.custom_id or old.clip_id}",
    }
    options |= {name: given.pop(name) for name in ("model", "name", "priority") if name in given}
    if prompt is None and old.rewritten_prompt is None:
        options["rewrite"] = False  # its words were taken as they are
    changes = {**given, **({"prompt": prompt} if prompt is not None else {})}
    line: dict[str, Any] = line_of(settings, story) | changes
    if not changes and options["model"] == old.model:
        from flows.request.form import MAX_SEED

        line["seed"] = (line["seed"] + 1) & MAX_SEED
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", prefix="rushes-again-", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        request_id, run_id = submit_file(settings, file.name, options)
    if watch and run_id:
        raise typer.Exit(watch_request(settings, request_id, run_id))


def line_of(settings: Settings, story: ClipStory) -> dict[str, Any]:
    """The line of a prompt file that asks for a clip once more."""
    from flows.request.form import SETTINGS as OF_A_LINE

    clip = story.clip
    if clip.settings is None:
        fail(f"{clip.clip_id} was rejected: {clip.error}", BAD_INPUT)
    own = {**asdict(clip.settings), "negative_prompt": clip.negative_prompt, "seed": clip.seed}
    line = {name: own[name] for name in OF_A_LINE if own.get(name) is not None}
    line |= {"prompt": clip.prompt, "take_of": clip.clip_id, "samples": 1}
    line |= {"tags": list(clip.tags)} if clip.tags else {}
    line |= {"metadata": dict(clip.metadata)} if clip.metadata else {}
    if str(clip.mode) == "text-to-video":
        return line
    line |= {name: own[name] for name in ("strength", "overlap") if own.get(name) is not None}
    line |= {"mode": str(clip.mode)} | ({"direction": str(clip.direction)} if clip.direction else {})
    made_from = [parent for parent, kind in story.parents if kind != "take"]
    for end, digest in (("", clip.source_sha256), ("end_", clip.end_source_sha256)):
        if digest is not None:
            line |= _source(settings, end, digest, made_from)
    return line


def _source(settings: Settings, end: str, digest: str, parents: list[str]) -> dict[str, str]:
    """The key and the name by which a line gives what a clip was made from."""
    from db.history import find_by_id
    from flows.clients.ledger import reading
    from infra.store.contract import blob_key

    with reading(settings) as session:
        for parent in parents:
            if (row := find_by_id(session, parent)) is not None and row.sha256 == digest:
                return {f"{end}clip": parent}
    stored = settings.open_store().stat(blob_key(digest))
    if stored is None:
        fail(f"the store no longer has {digest[:12]}, which the clip was made from", FAILED)
    kind = "image" if stored.media_type.startswith("image/") else "video"
    return {f"{end}{kind}": f"store:{stored.key}"}


@app.command(rich_help_panel=QUESTIONS)
def trace(clip: ClipName, format: Format = "table") -> None:
    """Show where a clip's time went: waiting, then the stages of every attempt, as a waterfall.

    Stages are engine time, one after the other; what an attempt took beside
    them is its share of a batch, or waiting for the encoder and the store.
    """
    from db.history import show_clip
    from flows.cli.find import find_clip
    from flows.clients.ledger import reading
    from flows.show import printable, show_rows

    with reading(current_settings()) as session:
        story = show_clip(session, find_clip(session, clip).clip_id)
    assert story is not None
    rows = spans(story)
    if format != "table":
        show_rows(rows, ["attempt", "span", "start", "seconds", "status", "engine", "error"], format)
        return
    whole = max((row["start"] + row["seconds"] for row in rows), default=0.0)
    traced = f", trace {story.clip.trace_id}" if story.clip.trace_id else ""
    typer.echo(f"{story.clip.clip_id} {story.clip.status} after {whole:.2f} s{traced}")
    if story.clip.reused:
        typer.echo(f"reused: rendered for {story.clip.rendered_by}, `rushes trace {story.clip.rendered_by}`")
    told = 0
    for row in rows:
        if row["attempt"] != told and (told := row["attempt"]):
            error = f": {printable(row['error'].splitlines()[0])}" if row["error"] else ""
            typer.echo(f"attempt {told} {row['status']}, {row['engine']}{error}")
        typer.echo(f"  {row['span']:<8} {bar(row['start'], row['seconds'], whole)} {row['seconds']:9.3f} s")


def bar(start: float, seconds: float, whole: float) -> str:
    """A span on a line of BAR characters; the shortest is a thin mark."""
    first = min(BAR - 1, int(BAR * start / whole)) if whole else 0
    length = round(BAR * seconds / whole) if whole else 0
    return (" " * first + ("█" * max(1, length) if length else "▏")).ljust(BAR)[:BAR]


def spans(story: ClipStory) -> list[dict[str, Any]]:
    """Waiting and stages in the order in which they began; `start` counts seconds from when the clip was queued."""
    clip, rows = story.clip, list[dict[str, Any]]()
    before = clip.queued_at
    for attempt in story.attempts:
        about = {
            "attempt": attempt.number,
            "status": str(attempt.status),
            "engine": attempt.engine,
            "error": attempt.error,
        }
        start = (attempt.started_at - clip.queued_at).total_seconds()
        waited = (attempt.started_at - before).total_seconds()
        rows.append({"span": "waiting", "start": start - waited, "seconds": waited} | about)
        rows += [{"span": name, "start": start + at, "seconds": took} | about for name, at, took in _stages(attempt)]
        before = attempt.finished_at or before
    return rows


def _stages(attempt: AttemptRow) -> list[tuple[str, float, float]]:
    """(name, seconds after the attempt's begin, seconds) of each stage; of one that failed, all of it as one."""
    from db.leases import STAGES

    stages, at = list[tuple[str, float, float]](), 0.0
    for name in STAGES:
        if (took := getattr(attempt, f"{name}_seconds")) is not None:
            stages.append((name, at, took))
            at += took
    if not stages and attempt.finished_at is not None:
        stages.append(("lost", 0.0, (attempt.finished_at - attempt.started_at).total_seconds()))
    return stages


@app.command(rich_help_panel=QUESTIONS)
def diff(
    one: Annotated[str, typer.Argument(metavar="REQUEST", help="Request id, name or flow run id.")],
    other: Annotated[str, typer.Argument(metavar="REQUEST", help="Another one.")],
    limit: Annotated[int, typer.Option(min=1, help="At most so many clips.")] = 100,
    format: Format = "table",
) -> None:
    """Show in what two requests differ, clip by clip: settings, seeds, model, files, how they ended.

    Clips belong together that have the same id of yours, or else the same
    prompt, and are the same sample. Exit code 1 if anything differs.
    """
    from db.history import pairs_that_differ
    from flows.cli.find import find_request
    from flows.clients.ledger import reading
    from flows.show import printable, show_rows

    settings = current_settings()
    with reading(settings) as session:
        left, right = (find_request(settings, session, name) for name in (one, other))
        pairs = pairs_that_differ(session, left.id, right.id, COMPARED, limit=limit + 1)
    rows = [
        {
            "line": named,
            left.id: first and first["clip_id"],
            right.id: second and second["clip_id"],
            "differs": differences(first, second),
        }
        for named, first, second in pairs[:limit]
    ]
    if rows or format != "table":
        show_rows(rows, ["line", left.id, right.id, "differs"], format)
    if len(pairs) > limit:
        typer.echo(f"rushes: only the first {limit} are shown: --limit says how many", err=True)
    if format == "table":
        said = f"{counted(len(rows), 'clip')} differ{'s' * (len(rows) == 1)}" if rows else "nothing differs"
        typer.echo(f"{left.id} ({printable(left.name)}) and {right.id} ({printable(right.name)}): {said}")
    raise typer.Exit(FAILED if rows else DONE)


def differences(one: dict[str, Any] | None, other: dict[str, Any] | None) -> str:
    """In what two rows of history differ, in words; a digest by its beginning."""
    if one is None or other is None:
        return "only in the second" if one is None else "only in the first"

    def shown(value: Any) -> str:
        text = "none" if value is None else str(value)
        return text[:12] if len(text) == 64 else text

    changed = [name for name in COMPARED if one[name] != other[name]]
    return ", ".join(f"{name} {shown(one[name])} → {shown(other[name])}" for name in changed)
