"""A file of prompts in, an accounted-for clip for every one of them out.

Read this file first. `generate` is the flow that a request runs in: it reads and checks the prompts, writes them into
the ledger, cuts them into shards, sees to it that engines run, watches until every clip has come to an end, and
publishes the manifest and the contact sheet. It renders nothing itself and holds no state: killed at any moment it may
simply run again, since the ledger says what is done.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice
from typing import Any, BinaryIO

from opentelemetry import trace
from prefect import flow, get_run_logger
from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import FlowRunContext
from prefect.runtime import flow_run as this_run
from prefect.states import Cancelled, Completed, Failed
from sqlalchemy.orm import Session, sessionmaker

from db import leases, ledger, watching
from db.ledger import NewClip, NewRequest, Progress
from db.tables import ClipDirection, ClipMode, ClipStatus, EdgeKind, RequestStatus
from flows import engines, plan
from flows.estimates import Estimate, as_duration, cost_model, estimate
from flows.layout import CannotFit, Rates, Work, best_layout
from flows.ledgers import ledger as ledger_of
from flows.models import BrokenModel, card_of, gpus_of, network_of
from flows.modes import Conditions
from flows.patience import if_there, patiently, transact
from flows.prompts import (
    BadFile,
    BadLine,
    BadUri,
    Checked,
    Prompt,
    check_defaults,
    check_prompts,
    digest_stream,
    open_uri,
    prompts_key,
    read_prompts,
    recipe,
    strange_shapes,
)
from flows.request import Defaults, GenerationRequest, Mode, request_id, request_key
from flows.rewriting import Rewriter, RewriterFailed, rewrite_all, rewriter_of, with_new_words
from flows.settings import AUTO, Settings, load_settings
from flows.sources import Sources, of_run
from infra.store import LINK_SECONDS, NoSuchKey, Store
from infra.tracing import carrier, continued, current_trace_id, flush, setup_tracing
from model.config import Partition, Shape
from model.weights import TRANSFORMER, ModelCard, ModelNotFound

POLL = 1.0  # seconds between two looks at the ledger
SHORT = 30.0  # seconds that shards wait for engines of their own partition when others have the GPUs
ROUND = 5.0  # seconds between two rounds of asking and telling Prefect, at least
REPORT_MOST = 60.0  # seconds between two reports to the UI, at most
UNSEEN = 120.0  # seconds for which what a transaction has written may stay unseen: none of ours lasts so long
EVERY_TAKE = 300.0  # seconds between two looks at all takes and not at new ones alone, which should find nothing
TABLE_ROWS = 200  # shards that the UI's table shows
SHEET_CLIPS = 24  # clips on a contact sheet
IMAGE_BYTES = 2_000_000  # of a picture that is kept inside an artifact


def name_run() -> str:
    """What the Prefect UI calls the run: the request's own name when it has one."""
    request: dict[str, Any] | GenerationRequest = this_run.parameters.get("request", {})
    name = request.name if isinstance(request, GenerationRequest) else request.get("name")
    return str(name or "request")


def cancel_in_ledger(flow: Any, flow_run: FlowRun, state: State[Any]) -> None:
    """Cancelling the run in the UI cancels its clips; engines stop at their next denoising step."""

    def cancel(session: Session) -> None:
        for request in watching.open_requests(session, flow_run_id=str(flow_run.id)):
            ledger.cancel_request(session, request.id)

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
    except ledger.QuotaExceeded as error:
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


# --- what was asked for -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A prompt file that was found, digested and checked."""

    name: str  # for messages: prompts.jsonl
    uri: str  # where it can be read again
    sha256: str
    model: str  # as the request names it
    card: ModelCard
    defaults: Defaults
    checked: Checked
    sources: Sources  # what lines are made from, found and stored
    deadline: float | None  # seconds in which all should be done
    fresh: bool = False  # what was rendered before will not do


def find_source(settings: Settings, ledgers: sessionmaker[Session], store: Store, request: GenerationRequest) -> Source:
    """Finds the prompts, puts inline ones into the store (so that every request can be read again), checks all of them.

    Raises BadUri, BadFile, NoSuchKey, ModelNotFound and BrokenModel.
    """
    card = card_of(settings, request.model)
    defaults = request.resolve(card)
    if request.prompts:
        data = request.inline_bytes()
        key = prompts_key(hashlib.sha256(data).hexdigest())
        if not store.exists(key):
            store.put_at(key, data, "application/x-ndjson")
        uri, name = f"store:{key}", "prompts"
    else:
        assert request.prompts_uri is not None
        uri, name = request.prompts_uri, request.prompts_uri.rpartition("/")[2]
        name = request.name or "prompts" if uri.startswith("store:") else name
    with open_source(settings, store, uri) as stream:
        sha256, _ = digest_stream(stream)
    sources = of_run(ledgers, store, settings.prompts, request.files)
    with open_source(settings, store, uri) as stream:
        checked = check_prompts(stream, source=name, format=request.format, defaults=defaults, find=sources.find)
    return Source(
        name=name,
        uri=uri,
        sha256=sha256,
        model=request.model,
        card=card,
        defaults=defaults,
        checked=checked,
        sources=sources,
        deadline=request.deadline,
        fresh=request.fresh,
    )


def too_large(settings: Settings, source: Source) -> list[str]:
    """Why clips cannot be rendered on the GPUs that the plan may use, a line for every such shape."""
    if settings.partition != AUTO or not (source.card.path / TRANSFORMER).is_dir():
        return []  # a fixed partition is the operator's word; of a model that is elsewhere the engine will say
    gpu, count = gpus_of(settings)
    network, wrong = network_of(source.card, settings.bytes_each), list[str]()
    for shape in source.checked.shapes:
        size = Shape(*map(int, shape.split("x")))
        try:
            best_layout([Work(size=size, steps=1, guided=True)], network, Rates.of(gpu), gpu, count)
        except CannotFit as error:
            wrong.append(str(error))
    return wrong


@contextmanager
def open_source(settings: Settings, store: Store, uri: str) -> Generator[BinaryIO]:
    with open_uri(uri, store=store, folder=settings.prompts) as stream:
        yield stream


def refuse(messages: Sequence[str], *, count: int = 1, name: str = "BadInput") -> State[Any]:
    """All errors at once, in the UI and in the state's message; nothing was recorded or planned."""
    text = "\n".join(messages)
    what = {"RewriterFailed": "The rewriter failed", "QuotaExceeded": "Too much at once"}.get(name, "Bad input")
    create_markdown_artifact(f"# {what}: nothing was submitted\n```\n{text}\n```", key="bad-input")
    errors = f"{count} error{'s' * (count != 1)}: nothing was submitted"
    return Failed(message=f"{errors}\n{text}"[:4000], name=name)


def record(
    settings: Settings,
    ledgers: sessionmaker[Session],
    store: Store,
    source: Source,
    request: GenerationRequest,
    rewriter: Rewriter | None,
    *,
    say: Callable[[str], None],
) -> ledger.OpenedRequest:
    """Opens the request in the ledger and writes all its clips. Doing it again changes nothing.

    Raises RewriterFailed before anything of it is in the ledger.
    """
    card, checked = source.card, source.checked
    key = request_key(
        request,
        source.defaults,
        source_sha256=source.sha256,
        model_digest=card.digest,
        made_from=checked.made_from,
        rewriter=card.rewriter,
    )
    with ledgers() as session:
        before = ledger.request_by(session, request_id(key))
    if rewriter and (before is None or before.total is None):
        with open_source(settings, store, source.uri) as stream:
            say(str(rewrite_all(ledgers, rewriter, card, lines_of(stream, source, request))))
    seconds = 0.0 if before else forecast(settings, ledgers, source, request).gpu_seconds
    deadline = None if request.deadline is None else datetime.now(UTC) + timedelta(seconds=request.deadline)
    with ledgers.begin() as session:
        ledger.register_model(session, card.digest, card.name, str(card.path), card.to_json())
        opened = ledger.open_request(
            session,
            NewRequest(
                key=key,
                name=request.name or source.name,
                tenant=request.tenant,
                model=request.model,
                model_digest=card.digest,
                settings=asdict(source.defaults),
                source=source.uri,
                source_sha256=source.sha256,
                priority=request.priority,
                deadline=deadline,
                clips=checked.clips,
                gpu_seconds=seconds,
                flow_run_id=str(this_run.id) if this_run.id else None,
                carrier=carrier(),
                trace_id=current_trace_id(),
            ),
        )
        sealed = ledger.progress(session, opened.id).total is not None
    if not sealed:
        with ledgers.begin() as session, open_source(settings, store, source.uri) as stream:
            ledger.add_artifacts(session, source.sources.artifacts())
            read = with_new_words(ledgers, rewriter, lines_of(stream, source, request))
            clips = (clip for line, rewritten in read for clip in clips_of(line, source, rewritten))
            ledger.add_clips(session, opened.id, clips)
        with ledgers.begin() as session:
            ledger.seal_request(session, opened.id, checked.clips + checked.bad)
    return opened


def forecast(
    settings: Settings, ledgers: sessionmaker[Session], source: Source, request: GenerationRequest
) -> Estimate:
    with ledgers() as session:
        return estimate(session, settings, source.card, source.defaults, source.checked.shapes, request.priority)


def tell_deadline(request_id: str, deadline: float, expected: Estimate) -> None:
    """On the run's page and in its log, before anything is rendered."""
    if (warning := expected.misses(deadline)) is None:
        get_run_logger().info("expected to be done in %s, in time", as_duration(expected.seconds))
        return
    get_run_logger().warning("%s", warning)
    key = f"{request_id.replace('_', '-')}-deadline"
    create_markdown_artifact(f"# The deadline will not be met\n{warning}.", key=key, description="Told at submission")


def lines_of(stream: BinaryIO, source: Source, request: GenerationRequest) -> Iterator[Prompt | BadLine]:
    find = source.sources.find
    return read_prompts(stream, source=source.name, format=request.format, defaults=source.defaults, find=find)


def clips_of(line: Prompt | BadLine, source: Source, rewritten: str | None = None) -> Iterator[NewClip]:
    """The rows of one line of the file: a clip for each sample, or one rejected row."""
    if isinstance(line, BadLine):
        yield NewClip(
            index=line.index,
            sample=0,
            line=line.line,
            custom_id=line.custom_id,
            prompt=line.prompt,
            rejected=line.reason,
        )
        return
    made: Conditions = line.conditions
    for sample in range(line.samples):
        yield NewClip(
            index=line.index,
            sample=sample,
            line=line.line,
            custom_id=line.custom_id,
            prompt=line.prompt,
            rewritten_prompt=rewritten,
            negative_prompt=line.negative_prompt,
            width=line.width,
            height=line.height,
            frames=line.frames,
            fps=line.fps,
            steps=line.steps,
            guidance=line.guidance,
            solver=line.solver,
            shift=line.shift,
            step_cache=line.step_cache,
            fresh=source.fresh,
            seed=line.seed_of(sample),
            recipe=recipe(line, sample, model_digest=source.card.digest, rewritten=rewritten),
            mode=ClipMode(made.mode),
            source=made.source and made.source.sha256,
            end_source=made.end_source and made.end_source.sha256,
            direction=None if made.direction is None else ClipDirection(made.direction),
            strength=made.strength,
            window=made.window,
            overlap=made.overlap,
            made_frames=made.made_frames,
            parents=parents_of(made),
        )


KIND = {
    Mode.IMAGE_TO_VIDEO: EdgeKind.IMAGE,
    Mode.EXTEND: EdgeKind.EXTEND,
    Mode.CONNECT: EdgeKind.CONNECT,
    Mode.LOOP: EdgeKind.LOOP,
    Mode.EDIT: EdgeKind.EDIT,
}


def parents_of(made: Conditions) -> tuple[tuple[str, EdgeKind], ...]:
    """The clips of history that a clip is made from, and how."""
    named = dict.fromkeys(each.clip_id for each in (made.source, made.end_source) if each and each.clip_id)
    return tuple((parent, KIND[made.mode]) for parent in named)


def adopt(ledgers: sessionmaker[Session], request_id: str) -> Progress:
    """Where the request stands before this run renders anything: what it made earlier is done, and what others made."""

    def found(session: Session) -> Progress:
        ledger.adopt_takes(session, request_id)
        return ledger.progress(session, request_id)

    return transact(ledgers, found)


# --- until every clip has come to an end ------------------------------------------------------------------------------


def watch(settings: Settings, ledgers: sessionmaker[Session], request_id: str, source: Source) -> Progress:
    """Plans what is not planned, keeps engines running, reports; returns when no clip is queued or running."""
    planner, report = Planner(settings, ledgers, request_id, source), Report(request_id)
    next_round = 0.0
    looked: float | None = None  # when it looked for takes
    every_take = time.monotonic() + EVERY_TAKE

    def look(session: Session) -> Progress:
        ledger.adopt_takes(session, request_id, within=looked and time.monotonic() - looked + UNSEEN)
        planner.plan(session)
        ledger.compact(session, request_id)
        return ledger.progress(session, request_id)

    while True:
        began = time.monotonic()
        if began >= every_take:
            looked, every_take = None, began + EVERY_TAKE
        progress = transact(ledgers, look)
        looked = began
        if progress.finished:
            if_there(partial(report.send, ledgers, progress, last=True))
            return progress
        if time.monotonic() >= next_round:
            next_round = time.monotonic() + ROUND
            # Without Prefect engines go on, and what it is told and asked here waits for the next round.
            send = partial(report.send, ledgers, progress)
            all(if_there(step) for step in (send, partial(end_leases_of_the_dead, ledgers), planner.staff))
        time.sleep(POLL)


def end_leases_of_the_dead(ledgers: sessionmaker[Session]) -> None:
    """An engine whose run has ended will never write again: others need not wait for its lease to run out."""
    with ledgers() as session:
        owners = watching.lease_owners(session)
    dead = engines.dead_owners(owners)
    with ledgers.begin() as session:
        for owner in dead:
            leases.expire_owner(session, owner)


class Planner:
    """Cuts a request into shards, and sees to it that there are engines for them.

    With a fixed partition any engine may render any shard. With partition auto shards belong to the partition that the
    plan gives them, and are released from it when others keep the GPUs: nothing waits for a better engine for ever.
    """

    def __init__(self, settings: Settings, ledgers: sessionmaker[Session], request_id: str, source: Source) -> None:
        self.settings, self.ledgers, self.request_id, self.source = settings, ledgers, request_id, source
        self.began = time.monotonic()
        self.gpus: int | None = None  # that the plan needs; None: all there are
        self.short_since: float | None = None  # when no GPUs were left for the shards whose turn it is

    def plan(self, session: Session) -> None:
        """Puts clips that are in no shard yet into shards, and notes what each is expected to take."""
        if self.settings.partition != AUTO:
            ledger.unbind_shards(session, self.request_id)  # of a plan that was made under another setting
        waiting = ledger.unplanned(session, self.request_id, limit=50_000)
        if not waiting:
            return
        cost = cost_model(session, self.settings, self.source.card)
        remaining = ledger.progress(session, self.request_id).counts[ClipStatus.QUEUED]
        new = [
            ledger.NewShard(
                clip_ids=shard.clip_ids,
                partition=str(squad.partition) if bound else None,
                predicted_seconds=shard.seconds,
                predicted_bytes=cost.memory(shard.shape, squad.partition, self.settings.micro_batch),
            )
            for squad, bound in self.squads(waiting, cost)
            for shard in self.cut(squad, cost, remaining)
        ]
        ledger.create_shards(session, self.request_id, new, carrier=carrier())

    def cut(self, squad: plan.Squad, cost: plan.CostModel, remaining: int) -> list[plan.PlannedShard]:
        """The squad's shards. What failed before is alone in its own: whatever is wrong with it harms nobody else."""

        def seconds(shape: plan.Shape) -> float:
            return cost.seconds(shape, squad.partition)

        failed = [(plan.Shape.of(clip), clip.clip_id) for clip in squad.waiting if clip.suspect]
        return [plan.PlannedShard(shape, (clip_id,), seconds(shape)) for shape, clip_id in failed] + plan.shards(
            [clip for clip in squad.waiting if not clip.suspect],
            seconds,
            seconds=self.settings.shard_seconds,
            engines=squad.replicas,
            remaining=remaining,
        )

    def squads(self, waiting: Sequence[plan.Waiting], cost: plan.CostModel) -> list[tuple[plan.Squad, bool]]:
        """Who renders what, and whether others may not."""
        settings = self.settings
        if settings.partition != AUTO:
            partition = Partition.parse(settings.partition)
            return [(plan.Squad(partition=partition, replicas=settings.engines, waiting=waiting), False)]
        left = self.source.deadline and self.source.deadline - (time.monotonic() - self.began)
        found = plan.arrange(waiting, cost, *gpus_of(settings), left)
        self.gpus = max(self.gpus or 0, found.gpus)
        log = get_run_logger()
        for squad in found.squads:
            log.info("%s clips on %s x %s", len(squad.waiting), squad.replicas, squad.partition)
        if left is not None and found.seconds > left:
            log.warning(
                "the deadline cannot be met: on %s all is done after %.0f s at best, %.0f s are left",
                settings.gpus,
                found.seconds,
                max(0.0, left),
            )
        return [(squad, True) for squad in found.squads]

    def staff(self) -> None:
        """Starts engines; shards that have waited too long for theirs may be rendered by any."""
        source = self.source
        short = engines.ensure(
            self.settings,
            self.ledgers,
            self.request_id,
            model=source.model,
            model_digest=source.card.digest,
            gpus=self.gpus,
        )
        if short is None:
            self.short_since = None
            return
        self.short_since = self.short_since or time.monotonic()
        if time.monotonic() - self.short_since > SHORT:
            with self.ledgers.begin() as session:
                freed = ledger.unbind_shards(session, self.request_id, [short])
            get_run_logger().info("no GPUs are free for %s: %s shards may be rendered by any engine", short, freed)


def pause(age: float) -> float:
    """Seconds to the next report of a request that has been watched for `age` seconds."""
    return min(REPORT_MOST, max(ROUND, age / 50))


class Report:
    """What the run's page in the Prefect UI shows: one progress bar and one table of shards, kept up to date.

    Prefect keeps each change as an event with all of the table in it (some 50 kB of 200 rows), so that a request which
    takes days reports less often than one of minutes.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.key = request_id.replace("_", "-")
        self.bar: Any = None
        self.table: Any = None
        self.said: tuple[Any, ...] = ()
        self.began = time.monotonic()
        self.not_before = self.began

    def send(self, ledgers: sessionmaker[Session], progress: Progress, *, last: bool = False) -> None:
        share = 100.0 * (progress.added - progress.waiting) / (progress.added or 1)
        said, now = tuple(sorted(progress.counts.items())), time.monotonic()
        if said == self.said or (now < self.not_before and not last):
            return
        with ledgers() as session:
            rows = [as_line(row) for row in ledger.shard_table(session, self.request_id, limit=TABLE_ROWS)]
        table = rows or [{"shard": "none: every clip was found"}]
        if self.bar is None:
            bar = f"Clips of {self.request_id} that have come to an end"
            self.bar = create_progress_artifact(share, key=f"{self.key}-progress", description=bar)
        if self.table is None:
            self.table = create_table_artifact(table, key=f"{self.key}-shards", description="Shards, the newest last")
        else:
            update_progress_artifact(self.bar, share)
            with get_client(sync_client=True) as client:  # each new artifact would be one more card on the page
                client.update_artifact(self.table, ArtifactUpdate(data=json.dumps(table)))
        self.said = said
        self.not_before = now + pause(now - self.began)


def as_line(row: ledger.ShardRow) -> dict[str, str | int | float]:
    """A shard as a person wants to read it."""
    return {
        "shard": row.id,
        "status": str(row.status),
        "clips": row.size,
        "done": row.done,
        "failed": row.failed,
        "shape": f"{row.width}x{row.height}x{row.frames}",
        "engine seconds": round(row.seconds, 1),
        "claimed": f"{row.claimed_at:%H:%M:%S}" if row.claimed_at else "",
        "finished": f"{row.finished_at:%H:%M:%S}" if row.finished_at else "",
        "attempt": row.attempt,
        "engine": row.owner or "",
    }


# --- what came of it --------------------------------------------------------------------------------------------------


def publish(
    settings: Settings,
    ledgers: sessionmaker[Session],
    store: Store,
    request_id: str,
    progress: Progress,
    found: int,
) -> State[Any]:
    """Writes manifest and contact sheet, closes the request, and says how it ended."""

    def files() -> tuple[str, str | None]:
        with ledgers() as session:
            return publish_manifest(session, store, request_id), publish_sheet(session, store, request_id)

    with trace.get_tracer(__name__).start_as_current_span("publish"):
        manifest, sheet = patiently(files)
    status = transact(
        ledgers,
        lambda session: ledger.finish_request(session, request_id, manifest_key=manifest, sheet_key=sheet),
    )
    patiently(lambda: summarise(store, request_id, progress, status, found, manifest, sheet))
    counts = ", ".join(f"{count} {status}" for status, count in sorted(progress.counts.items()) if count)
    message = f"{request_id}: {counts} ({found} found, not rendered again)"
    if status == RequestStatus.COMPLETED:
        return Completed(message=message)
    if status == RequestStatus.COMPLETED_WITH_GAPS:
        return Completed(message=message, name="CompletedWithGaps")
    return Cancelled(message=message) if status == RequestStatus.CANCELLED else Failed(message=message)


def publish_manifest(session: Session, store: Store, request_id: str) -> str:
    """requests/<id>/manifest.jsonl: one line a clip, in the order of the prompt file, with all that `history` says."""
    with spooled() as file:
        for row in ledger.clips_of(session, request_id):
            file.write(json.dumps(asdict(row), default=str, separators=(",", ":")).encode() + b"\n")
        file.seek(0)
        return store.put_at(f"requests/{request_id}/manifest.jsonl", file, "application/x-ndjson").key


@contextmanager
def spooled() -> Generator[BinaryIO]:
    """A temporary file that lies in memory while it is small."""
    with tempfile.SpooledTemporaryFile(max_size=16_000_000) as file:
        yield file  # type: ignore[misc]


def publish_sheet(session: Session, store: Store, request_id: str) -> str | None:
    """requests/<id>/contact_sheet.png: some frames of each of the first clips, with their prompts."""
    from model.encode import SheetRow, contact_sheet, decode_frames

    rows: list[SheetRow] = []
    for row in islice(ledger.clips_of(session, request_id), SHEET_CLIPS):
        frames = decode_frames(store.get(row.object_key), 5) if row.object_key else ()
        note = (
            f"{row.width}x{row.height}, {row.frames} frame{'s' * (row.frames != 1)}"
            if row.object_key
            else f"{row.status}: {row.error or ''}"
        )
        rows.append(SheetRow(clip_id=row.custom_id or row.clip_id, prompt=row.prompt, frames=frames, note=note))
    if not rows:
        return None
    return store.put_at(f"requests/{request_id}/contact_sheet.png", contact_sheet(rows), "image/png").key


def summarise(
    store: Store, request_id: str, progress: Progress, status: str, found: int, manifest: str, sheet: str | None
) -> None:
    """The artifacts that remain on the run's page."""
    key = request_id.replace("_", "-")
    counts = "\n".join(f"| {name} | {count} |" for name, count in sorted(progress.counts.items()) if count)
    per_clip = f"{progress.mean_seconds:.2f} s" if progress.mean_seconds else "nothing was rendered"
    create_markdown_artifact(
        f"""# {request_id}: {status.replace("_", " ")}

| status | clips |
|---|---|
{counts}

{found} of {progress.total} clips were found, not rendered again. Engine time a rendered clip: {per_clip}.

Ask more in SQL:
```sql
select clip_id, custom_id, status, seconds, object_key, error from history where request_id = '{request_id}';
select status, count(*), avg(seconds) from history where request_id = '{request_id}' group by 1;
```
Export the clips: `rushes export {request_id} FOLDER`. One clip: `rushes show CLIP_ID`.
""",
        key=f"{key}-summary",
        description="How it went, and how to ask more",
    )
    create_markdown_artifact(
        f"""[Manifest of all clips]({store.link(manifest)}), in the store as `{manifest}`.

A signed link ends after {LINK_SECONDS // 60} minutes. Then `rushes export {request_id} FOLDER` brings all of it, and
`rushes show CLIP_ID` prints a new link.
""",
        key=f"{key}-outputs",
        description="Outputs",
    )
    if sheet:
        create_image_artifact(picture(store, sheet), key=f"{key}-contact-sheet", description="Contact sheet")


def picture(store: Store, key: str) -> str:
    """The picture itself as an address, which lives as long as the page: a signed link would not, and is a secret."""
    from PIL import Image

    data = store.get(key)
    if len(data) > IMAGE_BYTES:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        scale = math.sqrt(IMAGE_BYTES / len(data))
        small = image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))
        buffer = io.BytesIO()
        small.save(buffer, "PNG")
        data = buffer.getvalue()
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


# --- where it runs ----------------------------------------------------------------------------------------------------


def submitted_from() -> dict[str, str]:
    """The trace that the submitter began, as Prefect's flow run label carries it; empty when there is none."""
    context = FlowRunContext.get()
    labels = context.flow_run.labels if context and context.flow_run else {}
    parent = labels.get("__OTEL_TRACEPARENT")
    return {"traceparent": str(parent)} if parent else {}


logging.getLogger("alembic").setLevel(logging.WARNING)
