"""Rewriting on a real ledger, by a real server: what is recorded, replayed, and left alone, and what a failure leaves."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session, sessionmaker
from typer.testing import CliRunner

from db import rewrites
from db.ledger import add_clips, clips_of, open_request, seal_request
from db.rewrites import Words
from db.tables import Clip, Request, Rewrite
from flows import generate, rewriting
from flows.cli import app
from flows.prompts import recipe
from flows.request import GenerationRequest, PromptsFormat
from flows.rewriting import Endpoint, RewriterFailed, rewrite_all, rewriter_of, with_new_words
from flows.settings import Settings, WrongSetting, load_settings
from model.weights import ModelCard, find_model

KEY = "sk-not-to-be-seen"


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible endpoint that answers as it is told."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer: Callable[[str], Any] = lambda prompt: f"A photo of {prompt}"
        self.status: Callable[[int], int] = lambda count: 200
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(body)
            self.server.keys.add(self.headers["Authorization"])
            status = self.server.status(len(self.server.asked))
        said = self.server.answer(body["messages"][-1]["content"])
        data = said if isinstance(said, bytes) else completion(said)
        self.send_response(status if self.path == "/v1/chat/completions" else 404)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def completion(text: str) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    """A model that brings no rewriter."""
    from tests.tiny import tiny_model

    return find_model(tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def settings(tmp_path: Path, server: Server, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name in os.environ:
        if name.startswith("RUSHES_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("RUSHES_REWRITER_URL", server.url)
    monkeypatch.setenv("RUSHES_REWRITER_MODEL", "writer-1")
    monkeypatch.setenv("RUSHES_REWRITER_KEY", KEY)
    return load_settings(home=tmp_path / "home", database_url=database_url)
