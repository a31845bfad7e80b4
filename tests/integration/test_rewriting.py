"""Rewriting on a real ledger, by a real server: what is recorded, replayed and left alone, and what a failure does."""

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
from db.history import clips_of
from db.rewrites import Answer, Words
from db.tables import Request, Rewrite
from flows.cli.main import app
from flows.generate.request import find_source, lines_of, record
from flows.request import rewriting
from flows.request.form import GenerationRequest
from flows.request.rewriting import Endpoint, RewriterFailed, rewrite_all, rewriter_of
from flows.request.unpack import BadFile
from flows.settings import Settings, WrongSetting, load_settings
from model.language import chat
from model.loading.card import ModelCard, find_model

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


def submitted(
    settings: Settings, ledgers: sessionmaker[Session], model: Path | str, prompts: list[Any], **options: Any
) -> tuple[str, list[str]]:
    """A request recorded as the flow records it: its id, and what the flow said."""
    request = GenerationRequest(model=str(model), prompts=prompts, **options)
    store, said = settings.open_store(), []
    source = find_source(settings, ledgers, store, request)
    with rewriter_of(settings, source.card) as rewriter:
        wanted = rewriter if request.rewrite else None
        return record(settings, ledgers, store, source, request, wanted, run_id=None, say=said.append).id, said


def words_of(ledgers: sessionmaker[Session], request_id: str) -> list[tuple[str, str | None]]:
    with ledgers() as session:
        return [(clip.prompt, clip.rewritten_prompt) for clip in clips_of(session, request_id)]


def left_out(ledgers: sessionmaker[Session], request_id: str) -> list[tuple[str | None, int | None]]:
    """Of each clip: phrases that were not understood, and the number of words that the model does not read."""
    with ledgers() as session:
        return [(clip.not_understood, clip.unread_words) for clip in clips_of(session, request_id)]


def recipes_of(ledgers: sessionmaker[Session], request_id: str) -> list[str | None]:
    with ledgers() as session:
        return [clip.recipe for clip in clips_of(session, request_id)]


# ---- by an endpoint --------------------------------------------------------------------------------------------------


def test_clips_keep_both_prompts_and_are_made_of_the_new_words(
    settings: Settings, server: Server, ledger: sessionmaker[Session], tiny: ModelCard
) -> None:
    server.answer = lambda prompt: f'  "A film of\n{prompt.upper()}." '
    prompts = ["a red ball", {"prompt": "a blue cube", "samples": 2}, {"prompt": "a red ball", "frames": 1}]
    request, said = submitted(settings, ledger, tiny.path, prompts, seed=3)
    ball, cube = "A film of A RED BALL.", "A film of A BLUE CUBE."
    assert words_of(ledger, request) == [
        ("a red ball", ball),
        ("a blue cube", cube),
        ("a blue cube", cube),
        ("a red ball", ball),
    ]
    assert said == ["3 of 3 prompts were rewritten"]
    assert len(server.asked) == 3  # a clip, a clip of two samples, and an image, which is told that it is one
    assert sum("picture" in asked["messages"][0]["content"] for asked in server.asked) == 1
    for asked in server.asked:
        assert (asked["model"], asked["temperature"], asked["seed"]) == ("writer-1", 0, 0)
    assert server.keys == {f"Bearer {KEY}"}
    # With one seed, the rewritten prompt and the same words typed by hand are one recipe.
    by_hand, _ = submitted(settings, ledger, tiny.path, [{"prompt": ball, "seed": 5}], rewrite=False)
    rewritten, _ = submitted(settings, ledger, tiny.path, [{"prompt": "a red ball", "seed": 5}])
    assert recipes_of(ledger, by_hand) == recipes_of(ledger, rewritten)


def test_off_on_request_means_untouched(
    settings: Settings, server: Server, ledger: sessionmaker[Session], tiny: ModelCard
) -> None:
    on, _ = submitted(settings, ledger, tiny.path, ["a red ball"])
    off, said = submitted(settings, ledger, tiny.path, ["a red ball"], rewrite=False)
    assert on != off  # another request, since it makes other clips
    assert words_of(ledger, off) == [("a red ball", None)]
    assert said == [] and len(server.asked) == 1
    assert recipes_of(ledger, off) != recipes_of(ledger, on)


def test_words_that_the_model_does_not_read_are_told_and_refused_when_strict(
    settings: Settings, server: Server, ledger: sessionmaker[Session], tiny: ModelCard
) -> None:
    server.answer = lambda prompt: " ".join(["red"] * 11) + " ball cube"
    with pytest.raises(BadFile, match=r'1 of them longer than the model reads: of the first it drops "ball cube"$'):
        submitted(settings, ledger, tiny.path, ["a red ball"], strict=True)
    with ledger() as session:
        assert session.scalars(select(Request)).all() == []
    request, said = submitted(settings, ledger, tiny.path, ["a red ball"])
    assert left_out(ledger, request) == [(None, 2)]
    assert said == [
        '1 of 1 prompts were rewritten, 1 of them longer than the model reads: of the first it drops "ball cube"'
    ]


def test_the_same_prompt_becomes_the_same_words_whatever_the_endpoint_says_next(
    settings: Settings, server: Server, ledger: sessionmaker[Session], tiny: ModelCard
) -> None:
    first, _ = submitted(settings, ledger, tiny.path, ["a red ball"], key="one")
    server.answer = lambda prompt: "something else"
    second, _ = submitted(settings, ledger, tiny.path, ["a red ball", "a cube"], key="two")
    assert words_of(ledger, second) == [*words_of(ledger, first), ("a cube", "something else")]
    assert len(server.asked) == 2


def test_two_requests_at_once_agree_on_the_first_answer(ledger: sessionmaker[Session]) -> None:
    words = Words(rewriter="r", prompt="a red ball", moving=True)
    with ledger.begin() as session:
        rewrites.remember(session, [(words, Answer("one"))])
    with ledger.begin() as session:
        rewrites.remember(
            session, [(words, Answer("two")), (Words(rewriter="r", prompt="b", moving=True), Answer(None, "b"))]
        )
    with ledger() as session:
        others = [Words(rewriter="r", prompt="b", moving=True), Words(rewriter="s", prompt="a red ball", moving=True)]
        assert rewrites.known(session, [words, *others]) == {words: Answer("one"), others[0]: Answer(None, "b")}


@pytest.mark.parametrize(
    ("status", "answer", "reason"),
    [
        (500, "x", "answered 500"),
        (401, "x", "answered 401"),
        (200, b"<html>", "gave no completion but '<html>'"),
        (200, b'{"choices": []}', "gave no completion"),
        (200, b'{"choices": [{"message": {"content": null}}]}', "gave no completion"),
        (200, "   ", "gave 0 characters"),
        (200, "word " * 500, "gave 2499 characters"),
    ],
)
def test_an_endpoint_that_fails_says_so_and_leaves_nothing(
    settings: Settings,
    server: Server,
    ledger: sessionmaker[Session],
    tiny: ModelCard,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    answer: Any,
    reason: str,
) -> None:
    monkeypatch.setattr(chat, "WAIT", 0.001)
    server.status, server.answer = lambda count: status, lambda prompt: answer
    with pytest.raises(RewriterFailed) as caught:
        submitted(settings, ledger, tiny.path, ["a red ball", "a blue ball"])
    message = str(caught.value)
    assert reason in message and server.url in message and "rewrite off" in message and KEY not in message
    with ledger() as session:
        assert session.scalar(select(func.count()).select_from(Request)) == 0
        assert session.scalar(select(func.count()).select_from(Rewrite)) == 0


def test_an_endpoint_that_is_busy_is_asked_again(
    settings: Settings, server: Server, ledger: sessionmaker[Session], tiny: ModelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "WAIT", 0.001)
    server.status = lambda count: 503 if count < 3 else 200
    request, _ = submitted(settings, ledger, tiny.path, ["a red ball"])
    assert words_of(ledger, request) == [("a red ball", "A photo of a red ball")]


def test_an_endpoint_that_never_answers_is_given_up(
    settings: Settings, server: Server, tiny: ModelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "WAIT", 0.001)
    monkeypatch.setattr(rewriting, "TIMEOUT", 0.05)
    monkeypatch.setattr(chat, "TRIES", 2)
    server.answer = lambda prompt: time.sleep(1) or ""
    with Endpoint(settings, tiny) as endpoint, pytest.raises(RewriterFailed, match=r"did not answer \(ReadTimeout"):
        endpoint.rewrite(["a red ball"], moving=True)


def test_a_run_that_was_killed_goes_on_with_the_words_it_had(
    settings: Settings, server: Server, ledger: sessionmaker[Session], tiny: ModelCard
) -> None:
    request = GenerationRequest(model=str(tiny.path), prompts=["a red ball", "a blue ball"])
    source = find_source(settings, ledger, settings.open_store(), request)
    lines = list(lines_of(io.BytesIO(request.inline_bytes()), source, request))
    with Endpoint(settings, tiny) as endpoint:
        rewrite_all(ledger, endpoint, tiny, lines)  # killed here: the request is not open yet
    server.answer = lambda prompt: "something else"
    opened, _ = submitted(settings, ledger, tiny.path, ["a red ball", "a blue ball"])
    assert [text for _, text in words_of(ledger, opened)] == ["A photo of a red ball", "A photo of a blue ball"]
    server.status = lambda count: 500
    assert submitted(settings, ledger, tiny.path, ["a red ball", "a blue ball"]) == (opened, [])  # asks nobody


def test_settings_of_the_endpoint_are_checked(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert KEY not in repr(settings)
    monkeypatch.setenv("RUSHES_REWRITER_URL", "http://me:secret@host/v1")
    with pytest.raises(WrongSetting, match="must not hold a password"):
        load_settings(home=settings.home)
    monkeypatch.setenv("RUSHES_REWRITER_URL", "http://host/v1")
    monkeypatch.delenv("RUSHES_REWRITER_MODEL")
    with pytest.raises(WrongSetting, match="RUSHES_REWRITER_MODEL must name the model"):
        load_settings(home=settings.home)


# ---- by mini's own rewriter ------------------------------------------------------------------------------------------


def test_mini_rewrites_leaves_captions_alone_and_names_what_it_does_not_know(
    settings: Settings, ledger: sessionmaker[Session]
) -> None:
    own = settings.model_copy(update={"rewriter_url": None})
    caption = "a red ball slides to the left on a checkered floor under a clear sky, static shot."
    prompts = [
        {"prompt": "a crimson ball rolls off to the left, cinematic", "seed": 1},
        {"prompt": "scarlet orb drifting leftward", "seed": 1},
        {"prompt": caption, "seed": 1},
        "a dog in Paris",
    ]
    request, (said,) = submitted(own, ledger, "mini", prompts)
    slides = "a red sphere slides to the left"
    assert [text for _, text in words_of(ledger, request)] == [slides, slides, None, None]
    assert said == "2 of 4 prompts were rewritten; not understood and left out: dog, paris"
    assert left_out(ledger, request) == [(None, None), (None, None), (None, None), ("dog, paris", None)]
    first, second, untouched, _ = recipes_of(ledger, request)
    assert first == second != untouched
    off, _ = submitted(own, ledger, "mini", prompts, rewrite=False)
    assert recipes_of(ledger, off)[2] == untouched


def test_an_endpoint_may_not_speak_otherwise_than_mini_understands(
    settings: Settings, server: Server, ledger: sessionmaker[Session]
) -> None:
    server.answer = lambda prompt: {"one": "a red sphere spins"}.get(prompt, "A gorgeous dog in Paris!")
    request, _ = submitted(settings, ledger, "mini", ["one", "two"])
    assert words_of(ledger, request) == [("one", "a red sphere spins"), ("two", None)]
    assert "checkered" in server.asked[0]["messages"][0]["content"]


def test_a_broken_rewriter_says_so(settings: Settings, tmp_path: Path, tiny: ModelCard) -> None:
    from dataclasses import replace

    (tmp_path / "rewriter").mkdir()
    own = settings.model_copy(update={"rewriter_url": None})
    with rewriter_of(own, replace(tiny, path=tmp_path, rewriter="0" * 64)) as rewriter:
        assert rewriter is not None
        with pytest.raises(RewriterFailed, match="the rewriter ended with 1"):
            rewriter.rewrite(["a red ball"], moving=True)


@pytest.mark.usefixtures("settings")
def test_the_command_shows_both_prompts(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def rewrite(*arguments: str) -> dict[str, Any]:
        done = CliRunner().invoke(app, ["rewrite", *arguments, "--format", "json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    server.answer = lambda prompt: "a red sphere spins"
    shown = rewrite("a crimson quokka twirls")
    assert shown == {
        "prompt": "a crimson quokka twirls",
        "rewritten_prompt": "a red sphere spins",
        "not_understood": "quokka",
    }
