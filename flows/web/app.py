"""The read-only HTTP service: clips by id, the facts beside them, manifests. It keeps nothing and changes nothing.

What it knows it asks the ledger for, as `rushes_reader`, who sees the views alone. The bytes are the store's: of a
folder they are sent from the file, in ranges where a player asks for them; for those of S3 there is a redirect to a
signed link.

    /clips/ID.mp4 or .png      the clip; its ETag is its digest
    /clips/ID.json             its row of history
    /clips/ID                  leads to the file, or to the row where there is no file yet
    /requests/ID               its manifest: a line a clip; also /requests/ID/manifest.jsonl and /contact_sheet.png
    /healthz                   200 when ledger and store answer, else 503
    /metrics                   Prometheus text: see docs/monitoring.md
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote, urlsplit

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from starlette.middleware.trustedhost import TrustedHostMiddleware

from db.history import as_reader, clips_of, find_by_id
from db.session import connect, is_away
from db.view import HistoryRow
from flows.settings import Settings, load_settings
from flows.show import plain
from flows.web.links import EXTENSION, Links
from flows.web.metrics import TEXT, Metrics
from infra.logs import note, setup_logs
from infra.store.contract import Store, StoreUnavailable

REQUEST = r"req_[0-9a-f]{12}"
CLIP = re.compile(rf"(({REQUEST})-[0-9]{{6,10}}-[0-9]{{1,5}})(?:\.(mp4|png|json))?")
LOOPBACK = ("127.0.0.1", "localhost")
RANGE = re.compile(r"bytes=\s*(?:[0-9]+-[0-9]*|-[0-9]+)(?:\s*,\s*(?:[0-9]+-[0-9]*|-[0-9]+))*\s*")
LOST = "the store has no such object: `rushes audit --repair` has it made again"
LINES = "application/x-ndjson"
# Prompts and errors are other people's words: never markup, never a script.
GUARD = {
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'none'; media-src 'self'; img-src 'self'; style-src 'unsafe-inline'",
    "referrer-policy": "no-referrer",
}


def create_app(
    settings: Settings | None = None, *, store: Store | None = None, hosts: Sequence[str] = LOOPBACK
) -> FastAPI:
    """The service as an ASGI application, for the settings of this process, and their store, if none are given.

    hosts: names under which it may be reached, so that no page elsewhere can make a browser believe that it is the
    service by having its own name point here; ["*"] behind a proxy that sees to it.
    """
    if settings is None:  # the process is ours
        settings = load_settings()
        setup_logs(settings.log, "rushes-web")
    service = Service(settings, store)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        yield
        service.metrics.close()
        service.engine.dispose()

    app = FastAPI(title="Rushes", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))

    @app.middleware("http")
    async def guarded(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        if match := CLIP.search(request.url.path):
            note(request_id=match[2], clip_id=match[1])
        elif match := re.search(rf"/requests/({REQUEST})\b", request.url.path):
            note(request_id=match[1])
        response = await call(request)
        response.headers.update(GUARD)
        return response

    for path, answer in {
        "/healthz": service.health,
        "/metrics": service.measured,
        "/clips/{name}": service.clip,
        "/requests/{request_id}": service.manifest,
        "/requests/{request_id}/manifest.jsonl": service.manifest,
        "/requests/{request_id}/contact_sheet.png": service.sheet,
    }.items():
        app.add_api_route(path, answer, methods=["GET", "HEAD"], response_model=None)
    for away in (StoreUnavailable, DBAPIError):
        app.add_exception_handler(away, _unavailable)
    return app


def _unavailable(_: Request, error: Exception) -> Response:
    """503 where ledger or store do not answer; all else is a defect, and raised again."""
    if not (isinstance(error, StoreUnavailable) or is_away(error)):
        raise error
    said = {"detail": "the ledger or the store does not answer: try again"}
    return JSONResponse(said, status_code=503, headers={"retry-after": "5", **GUARD})


class Service:
    """The answers. Functions of a request: FastAPI runs each in a thread of its own."""

    def __init__(self, settings: Settings, store: Store | None = None) -> None:
        self.engine = connect(settings.reader, application="rushes-web")
        self.store: Store = store or settings.open_store()
        self.metrics = Metrics(self.asking, self.store)

    @contextmanager
    def asking(self) -> Generator[Session]:
        with Session(self.engine) as session, session.begin():
            as_reader(session.connection())
            yield session

    def health(self) -> Response:
        with self.asking() as session:
            session.execute(text("select from history limit 1"))
        self.store.exists("healthz")
        return JSONResponse({"status": "ok"})

    def measured(self) -> Response:
        return Response(self.metrics.text(), media_type=TEXT)

    def clip(self, request: Request, name: str) -> Response:
        if (named := CLIP.fullmatch(name)) is None:
            _nothing()
        clip_id, _, ending = named.groups()
        with self.asking() as session:
            row = find_by_id(session, clip_id)
        if row is None:
            _nothing()
        its_own = EXTENSION.get(row.media_type or "")
        if ending is None:
            return RedirectResponse(f"/clips/{clip_id}.{its_own or 'json'}", 307)
        if ending == "json":
            return JSONResponse(self.facts(row))
        if row.object_key is None:
            _nothing(f"the clip is {row.status}: there is nothing to play")
        if ending != its_own:
            _nothing(f"the clip is {row.media_type}: /clips/{clip_id}.{its_own}")
        assert row.media_type is not None
        return self.sent(request, row.object_key, row.media_type, digest=row.sha256)

    def facts(self, row: HistoryRow) -> dict[str, Any]:
        """Everything that history says of a clip, and where it plays."""
        playing = Links("").clip(row.clip_id, row.media_type) if row.object_key else None
        return {**{name: plain(value) for name, value in row.columns().items()}, "link": playing}

    def manifest(self, request: Request, request_id: str) -> Response:
        over = self.status_of(request_id) != "open"
        key = f"requests/{request_id}/manifest.jsonl"
        if over and self.store.exists(key):
            return self.sent(request, key, LINES)
        headers = {"cache-control": "no-store"}
        if request.method == "HEAD":
            return Response(media_type=LINES, headers=headers)
        return StreamingResponse(self.lines(request_id), media_type=LINES, headers=headers)

    def lines(self, request_id: str) -> Iterator[str]:
        """The manifest as it is now, in the words of the one that is published at the end."""
        with self.asking() as session:
            for row in clips_of(session, request_id):
                yield json.dumps(row.columns(), default=str, separators=(",", ":")) + "\n"

    def sheet(self, request: Request, request_id: str) -> Response:
        self.status_of(request_id)
        return self.sent(request, f"requests/{request_id}/contact_sheet.png", "image/png")

    def status_of(self, request_id: str) -> str:
        if re.fullmatch(REQUEST, request_id) is None:
            _nothing()
        with self.asking() as session:
            asked = text("select status from ask.requests where request_id = :id")
            status = session.scalar(asked, {"id": request_id})
        return str(status) if status is not None else _nothing()

    def sent(self, request: Request, key: str, media_type: str, *, digest: str | None = None) -> Response:
        """An object of the store. Its digest, where it is known, is its ETag."""
        headers = {"cache-control": "private, no-cache"} | ({"etag": f'"{digest}"'} if digest else {})
        if digest and _has(request.headers.get("if-none-match"), digest):
            return Response(status_code=304, headers=headers)
        address = self.store.link(key)
        if not address.startswith("file:"):
            return self.led_to(request, key, address, media_type, headers)
        path = Path(unquote(urlsplit(address).path))
        if not path.is_file():
            _nothing(LOST)
        if RANGE.fullmatch(request.headers.get("range", "bytes=0-")) is None:  # no range that HTTP knows: all of it
            kept = [(name, value) for name, value in request.scope["headers"] if name != b"range"]
            request.scope["headers"] = kept
        return FileResponse(path, headers=headers, media_type=media_type)

    def led_to(self, request: Request, key: str, address: str, media_type: str, headers: dict[str, str]) -> Response:
        """A signed link, which is for reading alone: the headers by themselves are told here."""
        if request.method == "GET":
            return RedirectResponse(address, 307, headers={"cache-control": "no-store"})
        if (stored := self.store.stat(key)) is None:
            _nothing(LOST)
        told = {"content-length": str(stored.bytes), "accept-ranges": "bytes"}
        return Response(media_type=media_type, headers=headers | told)


def _has(if_none_match: str | None, digest: str) -> bool:
    """If-None-Match names the digest, weakly or not, or anything there is."""
    known = [each.strip().removeprefix("W/") for each in (if_none_match or "").split(",")]
    return f'"{digest}"' in known or "*" in known


def _nothing(detail: str = "there is nothing here") -> NoReturn:
    raise HTTPException(404, detail)
