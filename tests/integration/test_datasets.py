"""Data sets in the ledger, from folders and S3 prefixes, and their captions by other hands."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

from db import datasets
from db.datasets import DatasetNotFound, DatasetNotReady, NewDataset
from db.models import register_model
from db.tables import CaptionOrigin
from flows.settings import Settings, WrongSetting, load_settings
from flows.train import recaption
from flows.train.datasets import as_rows, cuts_of, find_dataset, source_of
from flows.train.recaption import caption_shard, seal, shards_of
from infra.store.open import open_store
from model.config import ClipShape
from model.language import chat
from model.language.chat import ChatFailed
from model.language.vision import FRAMES, VisionModel
from model.train.data import BadData, Bucket, digest, scan
from tests.factories import MODEL
from tests.integration.s3 import S3Server
from tests.videos import clip_of, write_folder, write_video

BUCKETS = [Bucket(shape=ClipShape(32, 32, 9), clips=6, share=1, batch=2)]
SHAPES = [ClipShape(32, 32, 9)]


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    return load_settings(home=tmp_path / "home", database_url=database_url, store_url=(tmp_path / "store").as_uri())


def find(settings: Settings, ledger: sessionmaker[Session], data: object, **more: Any) -> datasets.DatasetRow:
    return find_dataset(settings, ledger, str(data), buckets=BUCKETS, **more).row


def test_a_folder_is_written_down_once(settings: Settings, ledger: sessionmaker[Session], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "videos", 6)
    first = find(settings, ledger, folder, licence="CC-BY-4.0")
    assert (first.name, first.source, first.licence, first.clips) == ("videos", folder.as_uri(), "CC-BY-4.0", 6)
    assert first.shapes == {"32x32x9": 6} and first.captions is CaptionOrigin.FILES and first.parent is None
    assert first.digest == digest(scan(folder, SHAPES, 8).cuts, 8)
    assert find(settings, ledger, folder) == first
    assert find(settings, ledger, first.id) == find(settings, ledger, "videos") == first

    (folder / "03.txt").write_text("another caption")
    second = find(settings, ledger, folder)
    assert second.id != first.id and find(settings, ledger, "videos") == second
    with ledger() as session:
        before, now = (cuts_of(session, row.id)[3].caption for row in (first, second))
        assert (before, now) == ("something moves, take 3", "another caption")
        clips = list(source_of(settings, second).read(cuts_of(session, second.id)))
    assert np.abs(clips[5].astype(int) - clip_of(5)).mean() < 6


def test_a_folder_may_have_any_name_and_an_address_is_refused(
    settings: Settings, ledger: sessionmaker[Session], tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "my videos, 100% ä", 6)
    assert find(settings, ledger, folder).clips == 6
    with pytest.raises(BadData, match="must be a folder, s3://BUCKET/PREFIX or a data set of the ledger"):
        find(settings, ledger, "https://example.com/videos")


def test_the_world_is_a_data_set(settings: Settings, ledger: sessionmaker[Session]) -> None:
    row = find(settings, ledger, "world", seed=4)
    assert (row.name, row.source, row.seed, row.clips) == ("world", "world", 4, 6)
    assert find(settings, ledger, "world", seed=5).digest != row.digest
    with ledger() as session:
        cuts = cuts_of(session, row.id)
    assert next(source_of(settings, row).read(cuts)).shape == (9, 32, 32, 3)


def test_what_is_not_there_is_said(settings: Settings, ledger: sessionmaker[Session], tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFound, match="'nothing'"):
        find(settings, ledger, "nothing")
    with pytest.raises(BadData, match="not a folder"):
        find(settings, ledger, tmp_path / "nothing")
    with pytest.raises(WrongSetting, match="STORE_ACCESS_KEY"):
        find(settings, ledger, "s3://bucket/videos")
    write_video(tmp_path / "short" / "a.mp4", clip_of(1, frames=3))
    with pytest.raises(BadData, match=r"a\.mp4: 3 frames"):
        find(settings, ledger, tmp_path / "short")


@pytest.mark.xdist_group("radosgw")
def test_an_s3_prefix_is_a_data_set(
    server: S3Server, settings: Settings, ledger: sessionmaker[Session], tmp_path: Path
) -> None:
    url = f"s3://my-videos?endpoint={server.endpoint}&secure={str(server.secure).lower()}"
    store = open_store(url, server.access_key, server.secret_key)
    for path in write_folder(tmp_path / "takes", 3).iterdir():
        store.put_at(f"raw/takes/{path.name}", path)
    store.put_at("raw/takes/notes.pdf", b"not ours")
    store.put_at("raw/takes-2/x.mp4", tmp_path / "takes" / "00.mp4")
    keys = {"store_access_key": server.access_key, "store_secret_key": server.secret_key}
    settings = load_settings(home=settings.home, database_url=settings.database_url, store_url=url, **keys)

    row = find(settings, ledger, "s3://my-videos/raw/takes")
    assert (row.name, row.clips, row.digest) == ("takes", 3, digest(scan(tmp_path / "takes", SHAPES, 8).cuts, 8))
    assert source_of(settings, row).folder == source_of(settings, row).folder

    store.delete("raw/takes/01.mp4")
    write_video(tmp_path / "new.mp4", clip_of(77))
    store.put_at("raw/takes/02.mp4", tmp_path / "new.mp4")
    changed = find(settings, ledger, "s3://my-videos/raw/takes")
    assert changed.clips == 2
    with ledger() as session:
        clips = list(source_of(settings, changed).read(cuts_of(session, changed.id)))
    assert np.abs(clips[1].astype(int) - clip_of(77)).mean() < 6


def test_a_data_set_that_lacks_clips_is_not_sealed(
    settings: Settings, ledger: sessionmaker[Session], tmp_path: Path
) -> None:
    cuts = scan(write_folder(tmp_path / "videos", 3), SHAPES, 8).cuts
    new = NewDataset(key="k", name="n", source="file:///x", fps=8, captions=CaptionOrigin.FILES)
    with ledger.begin() as session:
        row = datasets.open_dataset(session, new)
        assert datasets.add_dataset_clips(session, row.id, list(as_rows(cuts))[:2]) == 2
    with pytest.raises(DatasetNotReady, match="2 of 3"), ledger.begin() as session:
        datasets.seal_dataset(session, row.id, clips=3, digest=digest(cuts, 8))
    with ledger.begin() as session:
        assert datasets.add_dataset_clips(session, row.id, as_rows(cuts)) == 1
        datasets.seal_dataset(session, row.id, clips=3, digest=digest(cuts, 8))
        assert datasets.dataset_by(session, "n").shapes == {"32x32x9": 3}


def test_an_engine_does_not_forget_how_its_model_was_trained(ledger: sessionmaker[Session]) -> None:
    with ledger.begin() as session:
        register_model(session, MODEL, "mine", "/models/mine", {"heads": 4, "scores": {"dit": 0.2}})
        register_model(session, MODEL, "mine", "/elsewhere/mine", {"heads": 4, "path": "/elsewhere/mine"})
        path, card = session.execute(text("select path, card from models")).one()
    assert path == "/elsewhere/mine" and card == {"heads": 4, "scores": {"dit": 0.2}, "path": "/elsewhere/mine"}


# --- captions by a vision-language model ------------------------------------------------------------------------------


@dataclass
class Answering:
    """A server that speaks as much of the protocol as a caption needs; `answer` decides what it says."""

    url: str
    answer: Callable[[dict[str, Any]], tuple[int, Any]]
    asked: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    keys: list[str | None] = field(default_factory=list[str | None])


@contextmanager
def answering(answer: Callable[[dict[str, Any]], tuple[int, Any]]) -> Generator[Answering]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            assert self.path == "/v1/chat/completions"
            there.asked.append(body)
            there.keys.append(self.headers["authorization"])
            status, said = there.answer(body)
            data = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        there = Answering(f"http://127.0.0.1:{running.server_port}/v1", answer)
        thread = threading.Thread(target=running.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield there
        finally:
            running.shutdown()
            thread.join()


def pictures(body: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    """The frames of a question, decoded from what really went over the wire."""
    urls = [part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url"]
    assert all(url.startswith("data:image/png;base64,") for url in urls)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))) for url in urls]


def completion(said: str) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": said}}]}


def brightness(body: dict[str, Any]) -> tuple[int, Any]:
    return 200, completion(f"a clip of brightness {np.mean(pictures(body)):.3f}\n")


def test_every_clip_gets_the_caption_of_its_own_frames(
    settings: Settings, ledger: sessionmaker[Session], tmp_path: Path
) -> None:
    old = find(settings, ledger, write_folder(tmp_path / "videos", 6))
    new = NewDataset(
        key="vision",
        name="videos",
        source=old.source,
        fps=8,
        captions=CaptionOrigin.VISION,
        author="eye",
        parent=old.id,
    )
    with ledger.begin() as session:
        child = datasets.open_dataset(session, new)
        left = datasets.not_recaptioned(session, child.id)
    assert [clip.index for clip in left] == list(range(6))
    source = source_of(settings, old)
    with answering(brightness) as there:
        eye = VisionModel(there.url, "eye", "secret")
        first, second = shards_of(left, 4)
        caption_shard(ledger, child.id, first, source, eye, 2)
        with ledger() as session:
            assert [clip.index for clip in datasets.not_recaptioned(session, child.id)] == [4, 5]
        with pytest.raises(DatasetNotReady):
            seal(ledger, child, 6)
        for shard in (first, second):  # the first once more, as after a kill
            caption_shard(ledger, child.id, shard, source, eye, 2)
        eye.close()
    seal(ledger, child, 6)
    assert set(there.keys) == {"Bearer secret"} and there.asked[0]["model"] == "eye"
    assert all([p.shape for p in pictures(body)] == [(64, 64, 3)] * FRAMES for body in there.asked)
    with ledger() as session:
        beside = datasets.captions_beside(session, child.id, 10)
    assert [(index, before) for index, before, _ in beside] == [(k, f"something moves, take {k}") for k in range(6)]
    for k, _, now in beside:
        frames = clip_of(k)[np.linspace(0, 8, FRAMES).round().astype(int)]
        assert float(now.removeprefix("a clip of brightness ")) == pytest.approx(frames.mean(), abs=4)


def test_another_question_is_another_author(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eye = load_settings(home=tmp_path, vision_url="http://host/v1/", vision_model="eye")

    def author() -> str:
        return recaption.pen_of(eye, recaption.Recaption(data="videos", author="vision")).name

    first = author()
    assert re.fullmatch(r"eye at http://host/v1, told [0-9a-f]{12}", first) and author() == first
    for what, other in (("QUESTION", "What is it?"), ("OF_AN_IMAGE", "What is it?"), ("FRAMES", 5), ("ENLARGED", 2)):
        with monkeypatch.context() as patch:
            patch.setattr(recaption, what, other)
            assert author() != first
    with pytest.raises(WrongSetting, match="must not hold a password: RUSHES_VISION_KEY"):
        load_settings(home=tmp_path, vision_url="http://me:secret@host/v1", vision_model="eye")


def test_a_busy_server_is_asked_again_and_a_refusal_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "WAIT", 0.001)
    monkeypatch.setattr(chat, "TRIES", 3)
    clip = clip_of(1)
    turns = iter([(503, "busy"), (429, "slow down"), (200, completion("a  red\nball"))])
    with answering(lambda _: next(turns)) as there:
        assert VisionModel(there.url, "eye").caption(clip) == "a red ball"
        assert len(there.asked) == 3 and set(there.keys) == {None}
        there.answer = lambda _: (503, "busy")
        with pytest.raises(ChatFailed, match="503"):
            VisionModel(there.url, "eye").caption(clip)
        assert len(there.asked) == 6
        there.answer = lambda _: (401, {"error": "no such key"})
        with pytest.raises(ChatFailed, match=r"401.*no such key"):
            VisionModel(there.url, "eye").caption(clip)
        assert len(there.asked) == 7
        there.answer = lambda _: (200, completion("   "))
        with pytest.raises(ChatFailed, match="without a caption"):
            VisionModel(there.url, "eye").caption(clip)
    with pytest.raises(ChatFailed, match="eye at"):
        VisionModel(there.url, "eye").caption(clip)


def test_an_endpoint_on_this_machine_is_asked_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setattr(chat, "TRIES", 1)
    with answering(lambda _: (200, completion("a red ball"))) as there:
        for url in (there.url, there.url.replace("127.0.0.1", "localhost")):
            assert VisionModel(url, "eye").caption(clip_of(1)) == "a red ball"
