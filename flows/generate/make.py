"""Making the clips of a request, from its prompts to its manifest. It knows nothing of Prefect.

It renders nothing itself and holds no state: killed at any moment it may simply run again, since the ledger says what
is done.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

from sqlalchemy.orm import Session, sessionmaker

from db.models import model_path
from db.requests import (
    QuotaExceeded,
    RequestRow,
    hand_over,
    request_by,
    resume_request,
    retry_request,
    seconds_left,
)
from db.tables import ClipStatus
from flows.clients.ledger import Ledger
from flows.clients.ownership import ForeignStore, check_owner
from flows.clients.retry import best_effort, with_retry
from flows.generate.outcome import Ending, Outcome
from flows.generate.page import Button, Page, refuse, tell_deadline
from flows.generate.publish import publish
from flows.generate.request import RequestChanged, find_source, forecast, opened_with, record, reuse_cached, too_large
from flows.generate.status import count_of
from flows.generate.watch import EnginePool, Watched, watch
from flows.library.models import BrokenModel
from flows.request.files import BadUri
from flows.request.form import GenerationRequest
from flows.request.read import check_defaults, warnings_of
from flows.request.rewriting import RewriterFailed, rewriter_of
from flows.request.unpack import BadFile
from flows.settings import Settings
from infra.logs import about
from infra.store.contract import NoSuchKey, Store
from model.loading.card import ModelCard, ModelNotFound


def make_clips(
    settings: Settings,
    ledgers: sessionmaker[Session],
    store: Store,
    request: GenerationRequest,
    *,
    run_id: str | None,
    page: Page,
    engines: EnginePool,
    resumes: str | None = None,
    pressed: Button | None = None,
) -> Outcome:
    """Reads and checks the prompts, opens the request, plans shards, sees to engines, watches, publishes.

    run_id: the flow run that this is: made again with the same one, a `fresh` request is the same request. resumes: the
    request whose run has ended without it. pressed: the button by which this very run begins again. If all clips of
    the request are in, nothing is read or decided again.
    """
    known = resumes or (run_id if pressed else None)
    begun = None if known is None else Ledger(ledgers).read(lambda session: request_by(session, known))
    if begun is not None and pressed is not None:
        press(ledgers, page, begun.id, pressed)
    if begun is not None and begun.total is not None:
        with about(request_id=begun.id):
            return resume(settings, ledgers, store, begun, run_id=run_id, page=page, engines=engines)
    if request.fresh and request.idempotency_key is None:
        request = request.model_copy(update={"idempotency_key": f"fresh-{run_id}"})
    try:
        with_retry(lambda: check_owner(ledgers, store))
    except ForeignStore as error:
        return refuse(page, [str(error)], reason="ForeignStore")
    try:
        source = with_retry(lambda: find_source(settings, ledgers, store, request))
    except (BadUri, BadFile, ModelNotFound, BrokenModel, NoSuchKey) as error:
        return refuse(page, [str(error)])
    checked, wrong = source.checked, check_defaults(source.defaults)  # what is wrong for all lines cannot be skipped
    wrong += too_large(settings, source)
    if wrong or (checked.bad and not request.skip_invalid):
        more = checked.faults - len(checked.messages)
        messages = [*wrong, *checked.messages, *([f"… and {more} more"] if more else [])]
        return refuse(page, messages, count=len(wrong) + checked.faults)
    warnings = warnings_of(source.card, checked)
    if warnings and request.strict:
        return refuse(page, warnings, count=len(warnings))

    try:
        with rewriter_of(settings, source.card) if request.rewrite else nullcontext() as rewriter:
            opened = with_retry(
                lambda: record(
                    settings, ledgers, store, source, request, rewriter, run_id=run_id, say=page.info, begun=begun
                )
            )
    except RequestChanged as error:
        return gone(page, begun.id if begun else "", error)
    except BadFile as error:
        return refuse(page, [str(error)])
    except RewriterFailed as error:
        return refuse(page, [str(error)], reason="RewriterFailed")
    except QuotaExceeded as error:
        return refuse(page, [str(error)], reason="QuotaExceeded")
    request_id = opened.id
    if begun is None and pressed is not None and not opened.created:  # its run is another one by now
        press(ledgers, page, request_id, pressed)
        Ledger(ledgers).write(lambda session: hand_over(session, request_id, run_id))
    with about(request_id=request_id):
        page.info(f"request {request_id}: {source.checked.clips} clips asked for by {source.name}")
        for warning in warnings:
            page.warn(warning)
        if opened.created:
            query = f"select status, count(*) from history where request_id = '{request_id}' group by 1"
            page.info(f'ask about it with: rushes sql "{query}"')

        if opened.created and request.deadline is not None:
            expected = with_retry(lambda: forecast(settings, ledgers, source, request))
            best_effort(partial(tell_deadline, page, request_id, request.deadline, expected))

        return finish(settings, ledgers, store, request_id, run_id, source.model, source.card, page, engines)


def resume(
    settings: Settings,
    ledgers: sessionmaker[Session],
    store: Store,
    row: RequestRow,
    *,
    run_id: str | None,
    page: Page,
    engines: EnginePool,
) -> Outcome:
    """Goes on with a request whose clips are all in: with the model, settings and deadline it was opened with."""
    page.info(f"request {row.id} goes on")
    path = Ledger(ledgers).read(lambda session: model_path(session, row.model_digest))
    try:
        model, card = with_retry(lambda: opened_with(settings, row, path))
    except (ModelNotFound, BrokenModel) as error:
        return gone(page, row.id, error)
    Ledger(ledgers).write(lambda session: hand_over(session, row.id, run_id))
    return finish(settings, ledgers, store, row.id, run_id, model, card, page, engines)


def press(ledgers: sessionmaker[Session], page: Page, request_id: str, button: Button) -> None:
    """Does to the request what the button of its run's page says."""
    if button is Button.RESUME:
        Ledger(ledgers).write(lambda session: resume_request(session, request_id))
        return
    again = Ledger(ledgers).write(lambda session: retry_request(session, request_id, unsealed=True))
    page.info(f"request {request_id}: {count_of(again, 'clip')} queued again")


def gone(page: Page, request_id: str, error: Exception) -> Outcome:
    """The end of a run that cannot go on with its request: the request stays as it is."""
    page.warn(str(error))
    return Outcome(ending=Ending.FAILED, message=str(error), request_id=request_id)


def finish(
    settings: Settings,
    ledgers: sessionmaker[Session],
    store: Store,
    request_id: str,
    run_id: str | None,
    model: str,
    card: ModelCard,
    page: Page,
    engines: EnginePool,
) -> Outcome:
    """Watches an open request to its end and publishes it; one that is paused it leaves as it is."""
    before = reuse_cached(ledgers, store, request_id, page.warn)
    left = Ledger(ledgers).read(lambda session: seconds_left(session, request_id))
    watched = Watched(run_id=run_id, model=model, card=card, deadline=left)
    progress = watch(settings, ledgers, store, request_id, watched, page=page, engines=engines)
    if not progress.finished:
        return Outcome.paused(progress)
    cache_hits = before.counts[ClipStatus.DONE] + progress.reused - before.reused
    return publish(ledgers, store, page, progress, cache_hits)
