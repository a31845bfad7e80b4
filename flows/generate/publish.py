"""The end of a request: its manifest, its contact sheet, its outcome."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import BinaryIO

from opentelemetry import trace
from sqlalchemy.orm import Session, sessionmaker

from db import history, requests
from db.requests import Progress, finish_request
from flows.clients.ledger import Ledger
from flows.clients.retry import best_effort, with_retry
from flows.generate.outcome import Outcome
from flows.generate.page import Page, Report, show_clips, summarise
from infra.store.contract import Store, StoreUnavailable

SHEET_CLIPS = 24  # clips on a contact sheet


def publish(
    ledgers: sessionmaker[Session],
    store: Store,
    page: Page,
    progress: Progress,
    cache_hits: int,
) -> Outcome:
    """Writes manifest and contact sheet, closes the request, and says how it ended.

    cache_hits: clips that this run did not have to render.
    """
    request_id = progress.request_id

    def files(session: Session) -> tuple[str, str | None]:
        return publish_manifest(session, store, request_id), publish_sheet(session, store, request_id)

    with trace.get_tracer(__name__).start_as_current_span("publish"):
        manifest, sheet = Ledger(ledgers).read(files)
    status = Ledger(ledgers).write(
        lambda session: finish_request(session, request_id, manifest_key=manifest, sheet_key=sheet)
    )
    outcome = Outcome.of_request(request_id, status, progress, cache_hits)
    best_effort(partial(show_clips, page, ledgers, store, progress))
    with_retry(lambda: summarise(page, store, outcome, progress, manifest=manifest, sheet=sheet))
    return outcome


def publish_cancelled(ledgers: sessionmaker[Session], store: Store, page: Page, request_id: str) -> None:
    """Publishes what was finished of a request whose run was cancelled, and so cannot do it itself.

    Nothing of a request that was cancelled before it had all its clips.
    """
    progress = Ledger(ledgers).read(lambda session: requests.progress(session, request_id))
    if progress.finished:
        Report(page, request_id).send(ledgers, progress, last=True)
        page.info(publish(ledgers, store, page, progress, progress.reused).message)


def publish_manifest(session: Session, store: Store, request_id: str) -> str:
    """requests/<id>/manifest.jsonl: one line a clip, in the order of the prompt file, with all that `history` says."""
    with spooled() as file:
        for row in history.clips_of(session, request_id):
            file.write(json.dumps(row.columns(), default=str, separators=(",", ":")).encode() + b"\n")
        file.seek(0)
        return store.put_at(f"requests/{request_id}/manifest.jsonl", file, "application/x-ndjson").key


@contextmanager
def spooled() -> Generator[BinaryIO]:
    """A temporary file that lies in memory while it is small."""
    with tempfile.SpooledTemporaryFile(max_size=16_000_000) as file:
        yield file  # type: ignore[misc]


def publish_sheet(session: Session, store: Store, request_id: str) -> str | None:
    """requests/<id>/contact_sheet.png: some frames of each of the first clips, with their prompts."""
    from model.media.encode import Frame, SheetRow, contact_sheet, decode_frames

    rows: list[SheetRow] = []
    for row in islice(history.clips_of(session, request_id), SHEET_CLIPS):
        frames: Sequence[Frame] = ()
        if row.object_key and (made := row.settings):
            note = f"{made.width}x{made.height}, {made.frames} frame{'s' * (made.frames != 1)}"
            try:
                frames = decode_frames(store.get(row.object_key), 5)
            except StoreUnavailable:
                raise
            except Exception as error:  # lost or spoilt since, in any way: a sheet is no reason to fail a request
                note = f"{note}: cannot be shown ({type(error).__name__})"
        else:
            note = f"{row.status}: {row.error or ''}"
        rows.append(SheetRow(clip_id=row.custom_id or row.clip_id, prompt=row.prompt, frames=frames, note=note))
    if not rows:
        return None
    return store.put_at(f"requests/{request_id}/contact_sheet.png", contact_sheet(rows), "image/png").key
