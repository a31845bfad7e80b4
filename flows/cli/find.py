"""Finding a request or a clip by what a person has at hand, also right after it was submitted."""

from __future__ import annotations

import re
import time
import uuid
from contextlib import suppress
from pathlib import Path

import typer
from sqlalchemy.orm import Session

from db.history import find_by_custom_id, find_by_digest, find_by_id
from db.requests import RequestNotFound, RequestRow, request_by
from db.view import HistoryRow
from flows.cli.errors import BAD_INPUT, fail
from flows.clients.prefect import PrefectApi, PrefectUnavailable, Run, prefect_api
from flows.request.submit import tag_of
from flows.settings import Settings
from infra.stack.prefect import reason_to_wait

LOOK = 0.5  # seconds between two looks at the ledger
PATIENCE = 120.0  # seconds that a request is waited for which its run has yet to open
REQUEST = re.compile(r"req_[0-9a-f]{12}")
DIGEST = re.compile(r"[0-9a-f]{8,64}")


def find_request(settings: Settings, session: Session, name: str) -> RequestRow:
    """The request of this id, name or flow run. One that was submitted and is not opened yet is waited for.

    Raises RequestNotFound, which says what became of its run.
    """
    if (row := request_by(session, name)) is not None:
        return row
    if settings.prefect_api_url is None:
        raise not_found(name)
    with prefect_api(settings) as api:
        try:
            run = run_for(api, name)
        except PrefectUnavailable:
            run = None
        if run is None:
            if (row := request_by(session, name)) is None:
                raise not_found(name)
            return row
        typer.echo(f"rushes: {name} is not opened yet: waiting for its flow run {run.name}", err=True)
        deadline = time.monotonic() + PATIENCE
        while (row := request_by(session, name)) is None:
            if (run := api.run(run.id) or run).final:  # looked at before the ledger is, a last time
                if (row := request_by(session, name)) is None:
                    raise not_found(name, run)
                return row
            if time.monotonic() > deadline:
                why = held_up(api, "control") or "see `rushes doctor`"
                raise RequestNotFound(
                    f"{name} has not been opened in {PATIENCE:.0f} s by its flow run {run.name}: {why}"
                )
            time.sleep(LOOK)
        return row


def run_for(api: PrefectApi, name: str) -> Run | None:
    """The newest flow run that makes a request of this id or name, or has this id."""
    if REQUEST.fullmatch(name):
        runs = api.tagged(tag_of(name), limit=1)
    elif _is_uuid(name):
        run = api.run(name)
        runs = [run] if run is not None else []
    else:
        runs = api.named(name, limit=1)
    return runs[0] if runs else None


def held_up(api: PrefectApi, pool: str) -> str | None:
    """Why no run of a work pool begins, as far as Prefect knows; None where nothing is in the way, or it is away."""
    with suppress(PrefectUnavailable):
        return reason_to_wait(api.pool(pool), api.queues(pool))
    return None


def not_found(name: str, run: Run | None = None) -> RequestNotFound:
    """The error about a request that is not in the ledger; run: that was to open it, and has ended."""
    if run is None:
        return RequestNotFound(f"no request {name!r} in the ledger: `rushes requests` lists those there are")
    said = f"{run.state_name or run.state}: {run.message}".rstrip(": ")
    return RequestNotFound(f"no request {name!r} in the ledger: its flow run {run.name} ended as {said}")


def _is_uuid(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text.lower()
    except ValueError:
        return False


def find_clip(session: Session, named: str) -> HistoryRow:
    """The clip of this id, custom_id (the newest), digest of its file or recipe (or their beginnings), or file.

    A file is known by its bytes, or by the id that is written in it. Ends the command where there is none.
    """
    if (row := find_by_id(session, named)) is not None:
        return row
    path = Path(named)
    if path.is_file():
        return _of_file(session, path)
    rows = find_by_custom_id(session, named) or (find_by_digest(session, named) if DIGEST.fullmatch(named) else [])
    if not rows and (request := request_by(session, named)) is not None:
        listing = f"`rushes history --request {request.id}` lists its clips, `rushes watch {request.id}` follows it"
        fail(f"{named!r} is no clip, but a request: {listing}", BAD_INPUT)
    if not rows:
        fail(f"no clip {named!r} in the ledger: `rushes history` lists those there are", BAD_INPUT)
    if len(rows) > 1:
        others = ", ".join(row.clip_id for row in rows[1:])
        typer.echo(f"rushes: {named!r} is the newest of several: also {others}", err=True)
    return rows[0]


def _of_file(session: Session, path: Path) -> HistoryRow:
    import hashlib

    from model.media.decode import read_tags

    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if rows := find_by_digest(session, digest):
        return rows[0]
    clip_id = read_tags(path).get("clip_id")
    row = find_by_id(session, clip_id) if clip_id else None
    if row is None:
        said = f"its tags name the clip {clip_id}, which is not there" if clip_id else "it has no tags of ours"
        fail(f"{path}: no clip of the ledger has these bytes, and {said}", BAD_INPUT)
    typer.echo(f"rushes: {path} was changed since it was rendered: it is {clip_id} by its tags", err=True)
    return row
