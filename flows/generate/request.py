"""Opening a request: find and check its prompts, rewrite them, record every clip."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from operator import attrgetter
from typing import BinaryIO

from sqlalchemy.orm import Session, sessionmaker

from db import lost, requests
from db.artifacts import add_artifacts
from db.clips import NewClip, add_clips
from db.models import register_model
from db.planning import reuse_renders
from db.requests import NewRequest, OpenedRequest, Progress, RequestRow, open_request, request_by, seal_request
from db.rewrites import Answer
from db.settings import SETTINGS, ClipSettings
from db.tables import ClipDirection, ClipMode, EdgeKind
from flows.clients.ledger import Ledger
from flows.clients.lost import discard, missing
from flows.clients.retry import with_retry
from flows.generate.estimates import Estimate, estimate
from flows.library.models import card_of, gpus_of, network_of
from flows.plan.layout import CannotFit, Rates, Work, best_layout
from flows.request.advice import words_beyond
from flows.request.files import digest_stream, media_type_of, open_uri, prompts_key
from flows.request.form import SETTINGS as PROMPT_SETTINGS
from flows.request.form import Defaults, GenerationRequest, Mode, request_id, request_key
from flows.request.labels import NO_LABELS, Labels
from flows.request.modes import Conditions
from flows.request.read import BadLine, Checked, check_prompts, read_prompts
from flows.request.recipe import Prompt, recipe
from flows.request.rewriting import Rewriter, rewrite_all, with_new_words
from flows.request.sources import Sources, for_run
from flows.request.unpack import BadFile
from flows.settings import AUTO, Settings
from infra.store.contract import Store
from infra.tracing import carrier, current_trace_id
from model.config import ClipShape
from model.loading.card import TRANSFORMER, ModelCard, ModelNotFound
from model.network.words import PromptTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFile:
    """A prompt file that was found, digested and checked."""

    name: str  # for messages: prompts.jsonl
    uri: str  # where it can be read again
    sha256: str
    model: str  # as the request names it
    card: ModelCard
    defaults: Defaults
    checked: Checked
    sources: Sources  # what lines are made from, found and stored
    fresh: bool = False  # what was rendered before will not do
    labels: Labels = NO_LABELS  # of the request


def find_source(
    settings: Settings, ledgers: sessionmaker[Session], store: Store, request: GenerationRequest
) -> RequestFile:
    """Finds the prompts, puts inline ones into the store (so that every request can be read again), checks all of them.

    Raises BadUri, BadFile, NoSuchKey, ModelNotFound and BrokenModel.
    """
    card = card_of(settings, request.model)
    defaults = request.resolve(card)
    if request.prompts_uri is None:
        data = request.inline_bytes()
        key = prompts_key(hashlib.sha256(data).hexdigest())
        if not store.exists(key):
            store.put_at(key, data, media_type_of(request.format))
        uri, name = f"store:{key}", "prompts"
    else:
        uri, name = request.prompts_uri, request.prompts_uri.rpartition("/")[2]
        name = request.name or "prompts" if uri.startswith("store:") else name
    with open_source(settings, store, uri) as stream:
        sha256, _ = digest_stream(stream)
    sources = for_run(ledgers, store, settings.prompts, request.files)
    with open_source(settings, store, uri) as stream:
        checked = check_prompts(
            stream,
            source=name,
            format=request.format,
            defaults=defaults,
            find=sources.find,
            beyond=words_beyond(card, rewriter=request.rewrite and bool(card.rewriter or settings.rewriter_url)),
        )
    return RequestFile(
        name=name,
        uri=uri,
        sha256=sha256,
        model=request.model,
        card=card,
        defaults=defaults,
        checked=checked,
        sources=sources,
        fresh=request.fresh,
        labels=request.labels,
    )


def too_large(settings: Settings, source: RequestFile) -> list[str]:
    """Why clips cannot be rendered on the GPUs that the plan may use, a line for every such shape."""
    if settings.partition != AUTO or not (source.card.path / TRANSFORMER).is_dir():
        return []  # a fixed partition is the operator's word; of a model that is elsewhere the engine will say
    gpu, count = gpus_of(settings)
    network, wrong = network_of(source.card, settings.bytes_each), list[str]()
    for shape in source.checked.shapes:
        size = ClipShape(*map(int, shape.split("x")))
        try:
            best_layout([Work(size=size, steps=1, guided=True)], network, Rates.of(gpu), gpu, count)
        except CannotFit as error:
            wrong.append(str(error))
    return wrong


@contextmanager
def open_source(settings: Settings, store: Store, uri: str) -> Generator[BinaryIO]:
    with open_uri(uri, store=store, folder=settings.prompts) as stream:
        yield stream


def record(
    settings: Settings,
    ledgers: sessionmaker[Session],
    store: Store,
    source: RequestFile,
    request: GenerationRequest,
    rewriter: Rewriter | None,
    *,
    run_id: str | None,
    say: Callable[[str], None],
    begun: RequestRow | None = None,
) -> OpenedRequest:
    """Opens the request in the ledger and writes all its clips. Doing it again changes nothing.

    run_id: the flow run that works on it. begun: the request, where a run that has ended was at opening it. Raises
    RewriterFailed, and BadFile for prompts that `strict` refuses, before anything of it is in the ledger, and
    RequestChanged.
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
    if begun is not None:
        key = key_of_begun(begun, source)
    with ledgers() as session:
        before = request_by(session, request_id(key))
    if rewriter and (before is None or before.total is None):
        with open_source(settings, store, source.uri) as stream:
            rewritten = rewrite_all(ledgers, rewriter, card, lines_of(stream, source, request))
        say(str(rewritten))
        if rewritten.cut and request.strict:
            raise BadFile(f"{source.name}: {rewritten.about_cut}")
    seconds = 0.0 if before else forecast(settings, ledgers, source, request).gpu_seconds
    deadline = None if request.deadline is None else datetime.now(UTC) + timedelta(seconds=request.deadline)
    with ledgers.begin() as session:
        register_model(session, card.digest, card.name, str(card.path), card.to_json())
        opened = open_request(
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
                flow_run_id=run_id,
                carrier=carrier(),
                trace_id=current_trace_id(),
                tags=request.labels.tags,
                metadata=request.labels.metadata,
            ),
        )
        sealed = requests.progress(session, opened.id).total is not None
    if not sealed:
        with ledgers.begin() as session, open_source(settings, store, source.uri) as stream:
            add_artifacts(session, source.sources.artifacts())
            read = with_new_words(ledgers, rewriter, lines_of(stream, source, request))
            tokens = PromptTokens(card.path / "tokenizer", card.max_prompt_tokens)
            clips = (clip for line, answer in read for clip in clips_of(line, source, answer, tokens))
            add_clips(session, opened.id, clips)
        with ledgers.begin() as session:
            seal_request(session, opened.id, checked.clips + checked.bad)
    return opened


class RequestChanged(RuntimeError):
    """The prompts, settings or model of a request whose clips are not all in are no longer those it was opened with."""


def key_of_begun(begun: RequestRow, source: RequestFile) -> str:
    """The key of a request that is gone on with, if it is still the same one. Raises RequestChanged."""
    was = (begun.source_sha256, begun.model_digest, begun.settings)
    now = (source.sha256, source.card.digest, json.loads(json.dumps(asdict(source.defaults))))
    names = ("prompts", "model", "settings")
    if changed := [name for name, one, other in zip(names, was, now, strict=True) if one != other]:
        raise RequestChanged(
            f"{begun.id} was not opened to its end, and its {' and '.join(changed)} changed since: submit it again"
        )
    return begun.key


def opened_with(settings: Settings, row: RequestRow, path: str | None) -> tuple[str, ModelCard]:
    """The model that a request was opened with, and the name under which engines find it.

    path: of its folder then. Its own name may mean another model by now, which renders nothing of it. Raises
    ModelNotFound.
    """
    for name in (row.model, row.model_digest, path):
        if name is None:
            continue
        try:
            card = card_of(settings, name)
        except ModelNotFound:
            continue
        if card.digest == row.model_digest:
            return name, card
    raise ModelNotFound(
        f"{row.id} was opened with the model {row.model!r} of digest {row.model_digest[:12]}, which is no longer to be "
        "had: add its folder again (`rushes models add FOLDER`), or cancel the request"
    )


def forecast(
    settings: Settings, ledgers: sessionmaker[Session], source: RequestFile, request: GenerationRequest
) -> Estimate:
    with ledgers() as session:
        return estimate(session, settings, source.card, source.defaults, source.checked.shapes, request.priority)


def lines_of(stream: BinaryIO, source: RequestFile, request: GenerationRequest) -> Iterator[Prompt | BadLine]:
    find = source.sources.find
    return read_prompts(stream, source=source.name, format=request.format, defaults=source.defaults, find=find)


def clips_of(line: Prompt | BadLine, source: RequestFile, answer: Answer, tokens: PromptTokens) -> Iterator[NewClip]:
    """The rows of one line of the file: a clip for each sample, or one rejected row."""
    labels = source.labels | line.labels
    if isinstance(line, BadLine):
        yield NewClip(
            index=line.index,
            sample=0,
            line=line.line,
            custom_id=line.custom_id,
            prompt=line.prompt,
            tags=labels.tags,
            metadata=labels.metadata,
            rejected=line.reason,
        )
        return
    made: Conditions = line.conditions
    unread = len(tokens.dropped(answer.text or line.prompt).split())
    settings = ClipSettings(**dict(zip(SETTINGS, _settings_of(line), strict=True)))
    for sample in range(line.samples):
        yield NewClip(
            index=line.index,
            sample=sample,
            line=line.line,
            custom_id=line.custom_id,
            prompt=line.prompt,
            rewritten_prompt=answer.text,
            not_understood=answer.not_understood,
            unread_words=unread or None,
            negative_prompt=line.negative_prompt,
            settings=settings,
            fresh=source.fresh,
            seed=line.seed_of(sample),
            recipe=recipe(line, sample, model_digest=source.card.digest, rewritten=answer.text),
            mode=ClipMode(made.mode),
            source=made.source and made.source.sha256,
            end_source=made.end_source and made.end_source.sha256,
            direction=None if made.direction is None else ClipDirection(made.direction),
            made_frames=made.made_frames,
            tags=labels.tags,
            metadata=labels.metadata,
            parents=parents_of(made, line.take_of),
        )


# Their values in a Prompt, in this order: its own, and those that follow from what it is made from.
_settings_of = attrgetter(*(name if name in PROMPT_SETTINGS else f"conditions.{name}" for name in SETTINGS))
KIND = {
    Mode.IMAGE_TO_VIDEO: EdgeKind.IMAGE,
    Mode.EXTEND: EdgeKind.EXTEND,
    Mode.CONNECT: EdgeKind.CONNECT,
    Mode.LOOP: EdgeKind.LOOP,
    Mode.EDIT: EdgeKind.EDIT,
}


def parents_of(made: Conditions, take_of: str | None) -> tuple[tuple[str, EdgeKind], ...]:
    """The clips of history that a clip is made from or is another take of, and how."""
    named = dict.fromkeys(each.clip_id for each in (made.source, made.end_source) if each and each.clip_id)
    takes = ((take_of, EdgeKind.TAKE),) if take_of else ()
    return (*((parent, KIND[made.mode]) for parent in named), *takes)


def reuse_cached(ledgers: sessionmaker[Session], store: Store, request_id: str, say: Callable[[str], None]) -> Progress:
    """Where the request stands before this run renders anything: what it made earlier is done, and what others made.

    A cached render whose bytes the store has no longer is none.
    """
    seen = datetime.now(UTC)
    cached = Ledger(ledgers).read(lambda session: lost.cached_for(session, request_id))
    if gone := with_retry(lambda: missing(store, cached)):
        with_retry(lambda: discard(store, gone, seen))
        Ledger(ledgers).write(lambda session: lost.forget(session, [each.sha256 for each in gone]))
        say(f"{len(gone)} cached renders are not in the store any more: what they were is rendered again")

    def reuse(session: Session) -> Progress:
        reuse_renders(session, request_id)
        return requests.progress(session, request_id)

    return Ledger(ledgers).write(reuse)
