"""A file of prompts in, an accounted-for clip for every one of them out.

Read this file first, then `flows.generate.make`. `generate` is the flow that a request runs in: it reads and checks the
prompts, writes them into the ledger, cuts them into shards, sees to it that engines run, watches until every clip has
come to an end, and publishes the manifest and the contact sheet. This file and `flows.clients.page` are all of
it that knows Prefect.
"""

from __future__ import annotations

import logging
from typing import Any, NoReturn

from prefect import flow
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import FlowRunContext
from prefect.runtime import flow_run as this_run
from prefect.states import Cancelled, Completed, Failed, Suspended
from sqlalchemy.orm import Session, sessionmaker

from db import requests, watching
from db.requests import cancel_request
from flows.clients.ledger import Ledger
from flows.clients.ledger import ledger as ledger_of
from flows.clients.page import PrefectPage
from flows.clients.retry import with_retry
from flows.generate.make import make_clips
from flows.generate.outcome import Ending, Outcome
from flows.generate.page import Button
from flows.generate.publish import publish_cancelled
from flows.render.pool import PrefectPool
from flows.request.form import GenerationRequest, ShortRequest
from flows.settings import load_settings
from infra.tracing import continued, flush, setup_tracing

BUTTONS = {"Resuming": Button.RESUME, "AwaitingRetry": Button.RETRY}  # this flow never retries by itself


def name_run() -> str:
    """The run's name in the Prefect UI: the request's own when it has one."""
    request: dict[str, Any] | GenerationRequest = this_run.parameters.get("request", {})
    name = request.name if isinstance(request, GenerationRequest) else request.get("name")
    return str(name or "request")


def cancel_in_ledger(flow: Any, flow_run: FlowRun, state: State[Any]) -> None:
    """Cancelling the run in the UI cancels its clips, and shows what was finished.

    Engines stop at their next denoising step. The run's own process has ended; Prefect's worker calls this.
    """

    def cancel(session: Session) -> list[str]:
        ids = [request.id for request in watching.open_requests(session, flow_run_id=str(flow_run.id))]
        for request_id in ids:
            cancel_request(session, request_id)
        return ids

    settings = load_settings()
    with ledger_of(settings) as ledgers:
        for request_id in Ledger(ledgers).within(60).write(cancel):
            publish_cancelled(ledgers, settings.open_store(), PrefectPage(flow_run, web=settings.web_url), request_id)


def run_request(request: GenerationRequest) -> State[Any]:
    """Read and check the prompts, open the request, plan shards, start engines, watch, publish."""
    settings = load_settings()
    page = PrefectPage(web=settings.web_url)
    setup_tracing("rushes-generate")
    try:
        pressed = BUTTONS.get(with_retry(page.begun_by) or "")
        with ledger_of(settings) as ledgers, continued(submitted_from(), "generate", request_name=request.name or ""):
            outcome = make_clips(
                settings,
                ledgers,
                settings.open_store(),
                request,
                run_id=str(this_run.id),
                page=page,
                engines=PrefectPool(settings, ledgers),
                resumes=request.resumes,
                pressed=pressed,
            )
            if outcome.ending is Ending.PAUSED:
                hold(ledgers, page, outcome)
            if page.suspended():  # just as it ended
                page.settle(state_of(outcome))
                page.leave()
            return state_of(outcome)
    finally:
        flush()


def hold(ledgers: sessionmaker[Session], page: PrefectPage, outcome: Outcome) -> NoReturn:
    """Ends the process of a paused request; its run waits for Resume, for as long as one likes."""
    request_id = outcome.request_id or ""

    def paused(session: Session) -> bool:
        return requests.is_paused(session, request_id)

    page.info(outcome.message)
    if Ledger(ledgers).read(paused):
        page.settle(state_of(outcome))
        if not Ledger(ledgers).read(paused):  # resumed at this very moment
            page.resume()
    page.leave()


_FLOW: dict[str, Any] = {"name": "generate", "flow_run_name": name_run, "on_cancellation": [cancel_in_ledger]}


@flow(**_FLOW, description="Makes a clip for every prompt of a request.")
def generate(request: ShortRequest) -> State[Any]:
    """Make the clips of a request. Its form shows what most requests need."""
    return run_request(request)


@flow(**_FLOW, description="Makes clips from pictures, videos and other clips. The form has every field of a request.")
def generate_from_media(request: GenerationRequest) -> State[Any]:
    """Make the clips of a request. Its form shows every field there is."""
    return run_request(request)


def state_of(outcome: Outcome) -> State[Any]:
    """The state in which Prefect's run of the request ends."""
    match outcome.ending:
        case Ending.COMPLETED:
            return Completed(message=outcome.message)
        case Ending.COMPLETED_WITH_GAPS:
            return Completed(message=outcome.message, name="CompletedWithGaps")
        case Ending.CANCELLED:
            return Cancelled(message=outcome.message)
        case Ending.PAUSED:
            return Suspended(message=outcome.message)
        case Ending.FAILED:
            return Failed(message=outcome.message)
        case Ending.REFUSED:
            return Failed(message=outcome.message, name=outcome.reason or "BadInput")


def submitted_from() -> dict[str, str]:
    """The trace that the submitter began, as Prefect's flow run label carries it; empty when there is none."""
    context = FlowRunContext.get()
    labels = context.flow_run.labels if context and context.flow_run else {}
    parent = labels.get("__OTEL_TRACEPARENT")
    return {"traceparent": str(parent)} if parent else {}


logging.getLogger("alembic").setLevel(logging.WARNING)
