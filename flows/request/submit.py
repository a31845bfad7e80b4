"""Submitting a prompt file from a terminal: check all of it here, put it into the store, ask Prefect for a run.

Nothing leaves this machine before the whole file is known to be good (or bad lines are to be skipped). The file goes to
the store under its digest, so that the run reads exactly the bytes that were checked, on any machine.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from mimetypes import guess_type
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from flows.request.advice import words_beyond
from flows.request.files import media_type_of, open_file, prompts_key
from flows.request.form import MAX_FILES, GenerationRequest, PromptsFormat, format_of, request_id, request_key
from flows.request.modes import Find, MediaSource, nowhere
from flows.request.read import Checked, check_defaults, check_prompts
from flows.request.unpack import CHUNK, BadFile
from flows.settings import Settings
from infra.files import NO_ADDRESS, is_address

if TYPE_CHECKING:
    from flows.clients.prefect import PrefectApi, Run
    from model.loading.card import ModelCard

DEPLOYMENT = "generate/default"
OCTETS = "application/octet-stream"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedFile:
    """A prompt file that was read to its end."""

    source: str  # for messages
    path: Path
    sha256: str
    checked: Checked
    files: dict[str, Path]  # pictures and videos that it names, on this machine
    request: GenerationRequest  # with prompts_uri where the file will lie in the store
    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """A request on its way."""

    request_id: str
    flow_run_id: str
    url: str  # of the run in the Prefect UI
    already: bool  # somebody else had asked for it, and it is under way


@contextmanager
def readable(file: str) -> Generator[tuple[str, Path]]:
    """(name for messages, path) of a file, or of what standard input holds (`-`), kept until the end of the block."""
    if file != "-":
        yield file, Path(file)
        return
    with tempfile.NamedTemporaryFile(prefix="rushes-stdin-") as kept:
        while chunk := sys.stdin.buffer.read(CHUNK):
            kept.write(chunk)
        kept.flush()
        yield "stdin", Path(kept.name)


def check_file(
    source: str,
    path: Path,
    options: dict[str, Any],
    card: ModelCard,
    report: Callable[[str], None],
    settings: Settings | None = None,
) -> CheckedFile:
    """Reads and checks the whole file. `options` are fields of GenerationRequest; `report` gets every error.

    `settings` say where the clips and stored objects are that lines may name; without a ledger the run checks those.

    Errors in the options themselves count like errors of the file. Raises BadFile, and pydantic's ValidationError for
    options out of bounds.
    """
    format = PromptsFormat(options.pop("prompts_format", None) or PromptsFormat.AUTO)
    if format is PromptsFormat.AUTO:
        format = format_of(source)
    request = GenerationRequest(**options, prompts_format=format, prompts_uri="store:prompts/unknown")
    defaults = request.resolve(card)
    wrong = check_defaults(defaults)
    for message in wrong:
        report(message)
    if not path.exists():
        if is_address(str(source)):
            raise BadFile(f"{source}: is no file of this machine, and {NO_ADDRESS}: fetch it first")
        raise BadFile(f"{source}: no such file")
    files: dict[str, Path] = {}
    rewriter = request.rewrite and bool(card.rewriter or (settings and settings.rewriter_url))
    beyond = words_beyond(card, rewriter=rewriter)
    with open_file(path) as file, lazy_lookup(settings, Path(source).parent, files) as find:
        stream = _Hashing(file)
        checked = check_prompts(
            cast(BinaryIO, stream),
            source=source,
            format=format,
            defaults=defaults,
            report=report,
            find=find,
            beyond=beyond,
        )
        while stream.read(CHUNK):  # where reading ended early: the digest is that of the whole file
            pass
    sha256 = stream.digest.hexdigest()
    if len(files) > MAX_FILES:
        raise BadFile(f"{source}: names {len(files):,} files, the most is {MAX_FILES:,}: put them into the store first")
    if wrong:  # no --skip-invalid skips these
        raise BadOptions(f"{len(wrong)} of the options cannot be used: nothing was submitted")
    request = request.model_copy(update={"prompts_uri": f"store:{prompts_key(sha256)}"})
    key = request_key(
        request,
        defaults,
        source_sha256=sha256,
        model_digest=card.digest,
        made_from=checked.made_from,
        rewriter=card.rewriter,
    )
    return CheckedFile(
        source=source,
        path=path,
        sha256=sha256,
        checked=checked,
        files=files,
        request=request,
        request_id=request_id(key),
    )


@contextmanager
def lazy_lookup(settings: Settings | None, folder: Path, files: dict[str, Path]) -> Generator[Find]:
    """Looks up what lines are made from, for as long as the block; loads what that needs at the first one."""
    with ExitStack() as open_things:
        found: list[Find] = []

        def find(kind: str, name: str) -> MediaSource | None:
            if not found:
                from flows.clients.ledger import database
                from flows.request.sources import for_submitter

                assert settings is not None
                ledgers = None
                if settings.database_url is not None:
                    from db.session import sessions

                    ledgers = sessions(open_things.enter_context(database(settings)))
                found.append(for_submitter(ledgers, settings.open_store, folder, files).find)
            return found[0](kind, name)

        yield find if settings else nowhere


class BadOptions(ValueError):
    """Options contradict the model's rules; each was reported."""

    exit_code = 2


class _Hashing:
    """A stream that digests what is read from it, so that what is checked is what is stored."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.digest.update(data)
        return data


def submit(settings: Settings, good: CheckedFile) -> Submitted:
    """Stores the file and creates the flow run, or joins the run that is already making this request.

    Raises NotRunning, StoreUnavailable, PrefectUnavailable, PrefectRefused.
    """
    from flows.clients.prefect import prefect_api
    from infra.tracing import carrier, continued, flush, setup_tracing

    ui_url, already = settings.ui_url, True
    setup_tracing("rushes-submit")
    try:
        with (
            continued({}, "submit", request_id=good.request_id, source=good.source),
            prefect_api(settings) as api,
        ):
            run_id = run_under_way(settings, api, good.request_id)
            if run_id is None:
                store_file(settings, good)
                request = good.request.model_copy(update={"files": store_sources(settings, good.files)})
                parameters = {"request": request.model_dump(mode="json", exclude_none=True, exclude_defaults=True)}
                run = start_run(
                    api,
                    good.request_id,
                    parameters,
                    name=good.request.name,
                    tenant=good.request.tenant,
                    traceparent=carrier().get("traceparent"),
                )
                run_id, already = run.id, not run.new
    finally:
        flush()
    return Submitted(request_id=good.request_id, flow_run_id=run_id, url=run_url(ui_url, run_id), already=already)


def start_run(
    api: PrefectApi,
    request_id: str,
    parameters: dict[str, Any],
    *,
    name: str | None,
    tenant: str,
    traceparent: str | None = None,
) -> Run:
    """A flow run that makes the request: one for all who ask for it at the same moment, or the one under way.

    Its idempotency key follows from the newest run of the request there is, so that a run which has ended, or is being
    cancelled, is never what a later submission gets.
    """
    runs = api.tagged(tag_of(request_id))
    run = next((run for run in runs if run.under_way), None)
    newest = runs[0].id if runs else "none"
    while run is None or not run.under_way:
        run = api.submit(
            DEPLOYMENT,
            parameters,
            name=name,
            tags=("rushes", tenant, tag_of(request_id)),
            traceparent=traceparent,
            once=f"{request_id}-after-{newest}",
        )
        newest = run.id
    return run


def tag_of(request_id: str) -> str:
    """The tag by which runs of a request are found; no tenant's name, which is a tag as well, has a colon."""
    return f"request:{request_id}"


def run_url(ui_url: str, run_id: str) -> str:
    return f"{ui_url}/runs/flow-run/{run_id}"


def run_under_way(settings: Settings, api: PrefectApi, request_id: str) -> str | None:
    """The flow run that is making this request now, also one that others started, as far as the ledger knows."""
    if settings.database_url is None:  # a machine that may submit need not reach the ledger
        return None
    from db.requests import request_by
    from flows.clients.ledger import reading

    with reading(settings) as session:
        row = request_by(session, request_id)
    if row is None or row.status != "open" or row.flow_run_id is None:
        return None
    run = api.run(row.flow_run_id)
    return row.flow_run_id if run is not None and run.under_way else None


def store_sources(settings: Settings, files: dict[str, Path]) -> dict[str, str]:
    """Puts pictures and videos under their digests; the key of each."""
    store = settings.open_store()
    return {name: store.put(path, guess_type(name)[0] or OCTETS).key for name, path in files.items()}


def store_file(settings: Settings, good: CheckedFile) -> None:
    """Puts the file under its digest, unless it is there."""
    store = settings.open_store()
    key = prompts_key(good.sha256)
    if store.exists(key):
        return
    packed = guess_type(good.source)[1] == "gzip"
    media_type = "application/gzip" if packed else media_type_of(good.request.prompts_format)
    stored = store.put_at(key, good.path, media_type)
    if stored.sha256 and stored.sha256 != good.sha256:
        store.delete(key)
        raise BadFile(f"{good.source}: was changed while it was being read: submit it again")
