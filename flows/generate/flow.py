"""A file of prompts in, an accounted-for clip for every one of them out.

Read this file first. `generate` is the flow that a request runs in: it reads and checks the prompts, writes them into
the ledger, cuts them into shards, sees to it that engines run, watches until every clip has come to an end, and
publishes the manifest and the contact sheet. It renders nothing itself and holds no state: killed at any moment it may
simply run again, since the ledger says what is done.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import partial
from typing import Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import FlowRunContext
from prefect.runtime import flow_run as this_run
from sqlalchemy.orm import Session, sessionmaker

from db import watching
from db.requests import QuotaExceeded, cancel_request
from db.tables import ClipStatus
from flows.clients.ledger import ledger as ledger_of
from flows.clients.retry import if_there, patiently, transact
from flows.generate.page import refuse, tell_deadline
from flows.generate.publish import publish
from flows.generate.request import adopt, find_source, forecast, record, too_large
from flows.generate.watch import watch
from flows.library.models import BrokenModel
from flows.request.files import BadUri
from flows.request.form import GenerationRequest
from flows.request.lines import BadFile
from flows.request.read import check_defaults, strange_shapes
from flows.request.rewriting import RewriterFailed, rewriter_of
from flows.settings import Settings, load_settings
from infra.store.contract import NoSuchKey, Store
from infra.tracing import continued, flush, setup_tracing
from model.loading.card import ModelNotFound


def name_run() -> str:
    """What the Prefect UI calls the run: the request's own name when it has one."""
    request: dict[str, Any] | GenerationRequest = this_run.parameters.get("request", {})
    name = request.name if isinstance(request, GenerationRequest) else request.get("name")
    return str(name or "request")


def cancel_in_ledger(flow: Any, flow_run: FlowRun, state: State[Any]) -> None:
    """Cancelling the run in the UI cancels its clips; engines stop at their next denoising step."""

    def cancel(session: Session) -> None:
        for request in watching.open_requests(session, flow_run_id=str(flow_run.id)):
            cancel_request(session, request.id)

    with ledger_of(load_settings()) as ledgers:
        transact(ledgers, cancel, seconds=60)


@flow(
    name="generate",
    description="Makes a clip for every prompt of a request.",
    flow_run_name=name_run,
    on_cancellation=[cancel_in_ledger],
)
def generate(request: GenerationRequest) -> State[Any]:
    """Read and check the prompts, open the request, plan shards, start engines, watch, publish."""
    settings = load_settings()
    setup_tracing("rushes-generate")
    try:
        with ledger_of(settings) as ledgers, continued(submitted_from(), "generate", request_name=request.name or ""):
            return make_clips(settings, ledgers, settings.open_store(), request)
    finally:
        flush()


def make_clips(
    settings: Settings, ledgers: sessionmaker[Session], store: Store, request: GenerationRequest
) -> State[Any]:
    log = get_run_logger()
    if (
        request.fresh and request.idempotency_key is None
    ):  # a request of its own, and the same one when this run is tried again
        request = request.model_copy(update={"idempotency_key": f"fresh-{this_run.id}"})
    try:
        source = patiently(lambda: find_source(settings, ledgers, store, request))
    except (BadUri, BadFile, ModelNotFound, BrokenModel, NoSuchKey) as error:
        return refuse([str(error)])
    checked, wrong = source.checked, check_defaults(source.defaults)  # what is wrong for all lines cannot be skipped
    wrong += too_large(settings, source)
    if wrong or (checked.bad and not request.skip_invalid):
        more = checked.faults - len(checked.messages)
        messages = [*wrong, *checked.messages, *([f"… and {more} more"] if more else [])]
        return refuse(messages, count=len(wrong) + checked.faults)

    try:
        with rewriter_of(settings, source.card) if request.rewrite else nullcontext() as rewriter:
            opened = patiently(lambda: record(settings, ledgers, store, source, request, rewriter, say=log.info))
    except RewriterFailed as error:
        return refuse([str(error)], name="RewriterFailed")
    except QuotaExceeded as error:
        return refuse([str(error)], name="QuotaExceeded")
    request_id = opened.id
    log.info("request %s: %s clips asked for by %s", request_id, source.checked.clips, source.name)
    if warning := strange_shapes(source.card, source.checked.shapes):
        log.warning("%s", warning)
    if opened.created:
        log.info(
            "ask about it with: rushes sql \"select status, count(*) from history where request_id = '%s' group by 1\"",
            request_id,
        )

    if opened.created and request.deadline is not None:
        expected = patiently(lambda: forecast(settings, ledgers, source, request))
        if_there(partial(tell_deadline, request_id, request.deadline, expected))

    before = adopt(ledgers, request_id)
    progress = watch(settings, ledgers, request_id, source)
    found = before.counts[ClipStatus.DONE] + progress.found - before.found
    return publish(settings, ledgers, store, request_id, progress, found)


def submitted_from() -> dict[str, str]:
    """The trace that the submitter began, as Prefect's flow run label carries it; empty when there is none."""
    context = FlowRunContext.get()
    labels = context.flow_run.labels if context and context.flow_run else {}
    parent = labels.get("__OTEL_TRACEPARENT")
    return {"traceparent": str(parent)} if parent else {}


logging.getLogger("alembic").setLevel(logging.WARNING)
