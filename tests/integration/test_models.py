"""Models that were added: what is in store and ledger then, and what an engine elsewhere gets of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker
from typer.testing import CliRunner

from db.artifacts import known_keys
from db.models import register_model
from db.requests import cancel_request, open_request
from flows.cli.main import app
from flows.library.models import BrokenModel, card_of, resolve
from flows.operate.audit import AuditReport, audit
from flows.operate.checks import weights
from flows.settings import Settings, load_settings
from infra.store.contract import blob_key
from infra.store.folder import FolderStore
from model.config import Partition
from model.engine.engine import Engine
from model.loading.card import CAPTIONER, REWRITER, SHIPPED, WEIGHTS, ModelNotFound, find_model
from model.loading.load import load_dit
from tests.factories import new_request
from tests.tiny import CLIP, tiny_lora, tiny_model

ROOT = Path(__file__).parents[2]
LOCKS = (".lock", ".use")


@dataclass
class Scene:
    model: Path
    settings: Settings
    store: FolderStore
    ledger: sessionmaker[Session]
    elsewhere: Settings  # of another machine: the same ledger and store, an empty home

    def blobs(self) -> dict[str, int]:
        """Of the store: key and the moment of its last change."""
        return {each.key: (self.store.root / each.key).stat().st_mtime_ns for each in self.store.list("blobs/")}

    def digest(self) -> str:
        return find_model(self.model).digest


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def scene(
    tiny: Path, tmp_path: Path, database_url: str, ledger: sessionmaker[Session], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Scene]:
    for name in os.environ:
        if name.startswith("RUSHES_"):
            monkeypatch.delenv(name)
    store = FolderStore(tmp_path / "store")
    monkeypatch.setenv("RUSHES_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RUSHES_DATABASE_URL", database_url)
    monkeypatch.setenv("RUSHES_STORE_URL", store.root.as_uri())
    monkeypatch.chdir(tmp_path)  # where no folder is called as a model
    model = Path(shutil.copytree(tiny, tmp_path / "folders" / "tiny"))
    yield Scene(model, load_settings(), store, ledger, load_settings(home=tmp_path / "elsewhere"))


def rushes(*arguments: object, code: int = 0) -> str:
    """Runs a command, asserts its exit code, and returns all that it prints."""
    done = CliRunner().invoke(app, [str(each) for each in arguments], prog_name="rushes")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 and "json" in arguments else done.output


def told(*arguments: object) -> Any:
    return json.loads(rushes(*arguments, "--format", "json"))


def test_a_model_is_added_listed_and_fetched(scene: Scene) -> None:
    added = told("models", "add", scene.model, "--name", "first-try")
    assert (added["name"], added["digest"]) == ("first-try", scene.digest())
    assert (added["size"], added["frames"], added["steps"], added["solver"]) == ("48x32", 9, 4, "ab2")

    (row,) = told("models")
    assert (row["name"], row["digest"], row["dataset"]) == ("first-try", scene.digest(), None)
    assert row["parameters"] == added["parameters"] > 0
    assert row["bytes"] == added["bytes"] == sum(scene.store.stat(key).bytes for key in scene.blobs())  # type: ignore[union-attr]
    assert scene.digest()[:12] in rushes("models") and scene.digest() not in rushes("models")

    shutil.rmtree(scene.model)
    card = resolve(scene.elsewhere, "first-try")
    assert card.path == scene.elsewhere.home / "cache" / "models" / card.digest
    assert (card.name, card.digest, card.width) == ("first-try", added["digest"], 48)
    assert [path.name for path in card.path.parent.iterdir() if path.suffix not in LOCKS] == [card.digest]
    assert resolve(scene.elsewhere, card.digest[:8]) == resolve(scene.elsewhere, card.digest) == card
    assert load_settings(home=scene.elsewhere.home, model="first-try").model == "first-try"


def test_what_was_added_is_neither_swept_nor_a_breach(scene: Scene) -> None:
    rushes("models", "add", scene.model)
    with scene.ledger() as session:
        assert known_keys(session, list(scene.blobs())) == set(scene.blobs())
        assert list(audit(session, scene.store, AuditReport())) == []


def test_added_again_it_is_there_and_nothing_is_sent(scene: Scene) -> None:
    rushes("models", "add", scene.model)
    before = scene.blobs()
    assert "tiny is there already: nothing was sent" in rushes("models", "add", scene.model)
    assert "tiny is there already" in rushes("models", "add", scene.model, "--name", "other")  # it keeps its name
    assert scene.blobs() == before and len(told("models")) == 1
    lost = min(before)
    scene.store.delete(lost)
    assert "1 lost file sent again" in rushes("models", "add", scene.model)
    assert scene.blobs().keys() == before.keys()


def test_rendering_from_the_folder_does_not_rename_it(scene: Scene) -> None:
    rushes("models", "add", scene.model, "--name", "mine")
    card = find_model(scene.model)
    with scene.ledger.begin() as session:
        register_model(session, card.digest, card.name, str(card.path), card.to_json())
    assert resolve(scene.elsewhere, "mine").digest == card.digest


def test_a_name_belongs_to_one_model(scene: Scene) -> None:
    rushes("models", "add", scene.model)
    other = Path(shutil.copytree(scene.model, scene.model.with_name("other")))
    (other / "rushes.json").write_text((other / "rushes.json").read_text().replace('"steps": 4', '"steps": 5'))
    refusal = rushes("models", "add", other, code=2)
    assert f"the name 'tiny' is taken by the model {scene.digest()[:12]}: give this one another with --name" in refusal
    assert "'mini' is that of a shipped model" in rushes("models", "add", other, "--name", "mini", code=2)
    assert "must begin with a letter or digit" in rushes("models", "add", other, "--name", "a/b", code=2)
    assert len(told("models")) == 1
    rushes("models", "add", other, "--name", "five")
    assert (resolve(scene.elsewhere, "five").steps, resolve(scene.elsewhere, "tiny").steps) == (5, 4)


def test_a_broken_folder_is_not_added(scene: Scene) -> None:
    (scene.model / "vae" / "config.json").unlink()
    assert "vae/config.json is missing" in rushes("models", "add", scene.model, code=2)
    assert "nowhere/model_index.json is missing" in rushes("models", "add", "nowhere", code=2)
    assert told("models") == [] and scene.blobs() == {}


def test_wrong_bytes_are_refused_and_not_kept(scene: Scene) -> None:
    rushes("models", "add", scene.model)
    sha256 = hashlib.sha256((scene.model / "vae" / "config.json").read_bytes()).hexdigest()
    blob = scene.store.root / blob_key(sha256)
    right = blob.read_bytes()
    blob.write_bytes(right.replace(b"8", b"9", 1))
    with pytest.raises(
        BrokenModel, match=rf"vae/config\.json of model tiny: the store's {blob_key(sha256)} has the sha256"
    ):
        resolve(scene.elsewhere, "tiny")
    cache = scene.elsewhere.home / "cache"
    assert list(cache.rglob("vae/config.json*")) == [] and not (cache / "models" / scene.digest()).exists()

    blob.unlink()
    with pytest.raises(
        BrokenModel, match=r"vae/config\.json of model tiny is not in the store .*: `rushes models add`"
    ):
        resolve(scene.elsewhere, "tiny")
    rushes("models", "add", scene.model)
    card = resolve(scene.elsewhere, "tiny")  # with what was fetched before
    assert (card.path / "vae" / "config.json").read_bytes() == right


def test_a_cache_that_was_changed_is_refused(scene: Scene) -> None:
    rushes("models", "add", scene.model)
    folder = scene.elsewhere.home / "cache" / "models" / scene.digest()
    shutil.copytree(scene.model, folder)
    (folder / "rushes.json").write_text((folder / "rushes.json").read_text().replace('"steps": 4', '"steps": 5'))
    with pytest.raises(BrokenModel, match=rf"{folder} has changed since model tiny was fetched: delete it"):
        resolve(scene.elsewhere, "tiny")


@pytest.mark.parametrize("name", ["/etc/rushes", "rewriter/../../rushes"])
def test_a_list_that_leads_out_of_the_folder_is_refused(name: str, scene: Scene) -> None:
    rushes("models", "add", scene.model)
    more = json.dumps([{"name": name, "sha256": hashlib.sha256(b"x").hexdigest(), "bytes": 1}])
    with scene.ledger.begin() as session:
        change = text("update models set card = jsonb_set(card, '{files}', card->'files' || cast(:more as jsonb))")
        session.execute(change, {"more": more})
    for models in (card_of, resolve):
        with pytest.raises(BrokenModel, match="somebody has changed the row"):
            models(scene.elsewhere, "tiny")
    assert not [path for path in scene.elsewhere.home.rglob("*") if path.is_file() and path.suffix not in LOCKS]


def test_the_beginning_of_two_digests_is_not_enough(scene: Scene) -> None:
    first, second = "a" * 64, "a" * 10 + "b" * 54
    with scene.ledger.begin() as session:
        for digest in (first, second):
            register_model(session, digest, digest[-1], "", {"files": []})
    with pytest.raises(
        ModelNotFound, match=r"beginning of several digests \((aaaaaaaaaabb, a{12}|a{12}, aaaaaaaaaabb)\)"
    ):
        resolve(scene.settings, "a" * 8)


def test_a_variant_renders_what_its_weights_say(scene: Scene, tmp_path: Path) -> None:
    """Added from a base by name, fetched elsewhere, rendered; beside a folder whose weights somebody else merged."""
    rushes("models", "add", scene.model)
    base = scene.blobs()
    lora = tiny_lora(tmp_path / "lora.safetensors", scene.model)
    shutil.rmtree(scene.model)

    added = told("models", "add", "tiny", "--lora", f"{lora}:0.8", "--name", "restyled")
    assert added["adapters"] == 1 and added["digest"] != resolve(scene.settings, "tiny").digest
    assert len(scene.blobs()) == len(base) + 2  # the adapter, and the file that lists it
    eighths = told("models", "add", "restyled", "--weights", "int8", "--name", "small")
    assert (eighths["weights"], eighths["adapters"], len(scene.blobs())) == ("int8", 1, len(base) + 3)
    again = rushes("models", "add", "tiny", "--lora", f"{lora}:0.8", "--weights", "int8")
    assert "small is there already: nothing was sent" in again
    taken = rushes("models", "add", "tiny", "--lora", f"{lora}:0.5", code=2)
    assert "the name 'tiny' is taken by the model" in taken and "another with --name" in taken
    assert not list(scene.settings.home.glob("variant-*"))
    shutil.rmtree(scene.settings.home / "cache")

    restyled, small = (resolve(scene.elsewhere, name) for name in ("restyled", "small"))
    assert (small.name, small.weights, small.digest) == ("small", "int8", eighths["digest"])
    by_hand = Path(shutil.copytree(resolve(scene.elsewhere, "tiny").path, tmp_path / "merged"))
    save_file(load_dit(restyled.path, torch.float32).state_dict(), by_hand / "transformer" / WEIGHTS)
    frames = {folder: rendered(folder) for folder in (by_hand, restyled.path, small.path)}
    assert np.array_equal(frames[by_hand][0], frames[restyled.path][0])
    assert np.abs(frames[small.path][0].astype(int) - frames[restyled.path][0]).mean() < 2
    assert frames[small.path][1] < 0.6 * frames[restyled.path][1]  # the embedders of a tiny model stay as they are


def test_a_removed_model_leaves_its_row_and_what_others_need(scene: Scene, tmp_path: Path) -> None:
    rushes("models", "add", scene.model)
    lora = tiny_lora(tmp_path / "lora.safetensors", scene.model)
    variant = told("models", "add", "tiny", "--lora", f"{lora}:0.8", "--name", "restyled")
    with scene.ledger.begin() as session:
        opened = open_request(session, new_request(model_digest=variant["digest"])).id
    refusal = rushes("models", "remove", "restyled", code=2)
    assert f"model restyled is needed by 1 open request ({opened}): wait until they are finished" in refusal
    with scene.ledger.begin() as session:
        cancel_request(session, opened)

    assert "restyled" in rushes("models", "remove", "restyled")
    with scene.ledger() as session:
        orphans = set(scene.blobs()) - known_keys(session, list(scene.blobs()))
    assert len(orphans) == 2  # the adapter and the list of it
    assert resolve(scene.elsewhere, "tiny").digest == scene.digest()
    with pytest.raises(ModelNotFound, match="nor was one added under this name"):
        resolve(scene.elsewhere, "restyled")
    assert "no model was added under 'restyled'" in rushes("models", "remove", "restyled", code=2)
    assert {row["name"]: row["bytes"] is None for row in told("models")} == {"tiny": False, "restyled": True}

    again = told("models", "add", "tiny", "--lora", f"{lora}:0.8", "--name", "restyled")
    assert again["digest"] == variant["digest"] and resolve(scene.elsewhere, "restyled").digest == variant["digest"]
    with scene.ledger() as session:
        assert known_keys(session, list(scene.blobs())) == set(scene.blobs())


def rendered(folder: Path) -> tuple[Any, int]:
    """Frames of a clip, and the bytes of parameters that the rank held."""
    with Engine(folder, Partition()) as engine:
        (clip,) = engine.render([CLIP])
        return clip.frames, engine.ready[0].parameter_bytes


def test_two_engines_fetch_at_once(scene: Scene) -> None:
    rushes("models", "add", scene.model)
    go = scene.elsewhere.home / "go"
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from flows.library.models import resolve\n"
        "from flows.settings import load_settings\n"
        f"print('ready', flush=True)\n"
        f"while not Path({str(go)!r}).exists(): time.sleep(0.001)\n"
        "print(resolve(load_settings(), 'tiny').digest)\n"
    )
    env = {**os.environ, "RUSHES_HOME": str(scene.elsewhere.home), "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    try:
        for each in both:
            assert each.stdout is not None and each.stdout.readline() == "ready\n"
        go.touch()
        assert [each.communicate(timeout=120)[0].strip() for each in both] == [scene.digest()] * 2
        assert [each.returncode for each in both] == [0, 0]
    finally:
        for each in both:
            each.kill()
            each.communicate()
    assert resolve(scene.elsewhere, "tiny").digest == scene.digest()


@contextmanager
def user_of(name: str, settings: Settings) -> Generator[None]:
    """Another process that resolves a model, and lives as long as this block. Raises where it cannot."""
    program = "import sys\nfrom flows.library.models import resolve\nfrom flows.settings import load_settings\n"
    program += f"print(resolve(load_settings(), {name!r}).digest, flush=True)\nsys.stdin.read()\n"
    own = {"RUSHES_HOME": str(settings.home), "RUSHES_MODEL_CACHE": str(settings.model_cache), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, **own}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None and len(process.stdout.readline().strip()) == 64
        yield
    finally:
        process.communicate(timeout=300)


def test_models_make_room_for_another_unless_they_are_in_use(scene: Scene) -> None:
    digests: dict[str, str] = {}
    for name in ("steps-4", "steps-5", "steps-6"):
        folder = Path(shutil.copytree(scene.model, scene.model.with_name(name)))
        own = (folder / "rushes.json").read_text()
        (folder / "rushes.json").write_text(own.replace('"steps": 4', f'"steps": {name[-1]}'))
        digests[told("models", "add", folder, "--name", name)["digest"]] = name
    size = sum(file["bytes"] for file in told("models")[:1])
    two = load_settings(home=scene.elsewhere.home, model_cache=2 * size + size // 2)

    def kept() -> set[str]:
        return {digests[path.name] for path in (two.home / "cache" / "models").iterdir() if path.is_dir()}

    with user_of("steps-4", two):
        with user_of("steps-5", two):
            pass
        assert kept() == {"steps-4", "steps-5"}
        with user_of("steps-6", two):  # steps-4 was used the longest ago, but still is
            assert kept() == {"steps-4", "steps-6"}
            with user_of("steps-5", two):  # all are in use: a bound is no reason not to render
                assert kept() == {"steps-4", "steps-5", "steps-6"}
    with user_of("steps-6", two):
        pass
    shutil.rmtree(two.home / "cache" / "models" / next(d for d, name in digests.items() if name == "steps-5"))
    with user_of("steps-5", two):
        assert kept() == {"steps-5", "steps-6"}


def test_a_fetch_that_was_killed_is_gone_on_with(scene: Scene) -> None:
    rushes("models", "add", scene.model)
    part = scene.elsewhere.home / "cache" / "models" / f"{scene.digest()}.part"
    kept, half = part / "model_index.json", part / "transformer" / "diffusion_pytorch_model.safetensors.half"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half of it")
    shutil.copy(scene.model / "model_index.json", kept)
    inode = kept.stat().st_ino
    card = resolve(scene.elsewhere, "tiny")
    assert (card.path / "model_index.json").stat().st_ino == inode and not list(card.path.rglob("*.half"))


def test_planning_fetches_no_weights(scene: Scene) -> None:
    rushes("models", "add", scene.model, "--name", "plain")
    card = card_of(scene.elsewhere, "plain")
    assert not card.path.exists()
    fetched = resolve(scene.elsewhere, "plain")
    assert fetched == card
    here = load_settings(model="plain", partition="tp=2")
    assert weights(here).startswith(f"plain {card.digest[:12]} on 2 ranks")


def test_rewriter_and_captioner_go_with_a_model(scene: Scene) -> None:
    shutil.copytree(SHIPPED / "mini" / REWRITER, scene.model / REWRITER)
    shutil.copytree(SHIPPED / "mini" / CAPTIONER, scene.model / CAPTIONER)
    own = find_model(scene.model)
    rushes("models", "add", scene.model)
    card = card_of(scene.elsewhere, "tiny")  # prompts are rewritten where they are planned
    assert (card.digest, card.rewriter) == (own.digest, find_model("mini").rewriter)
    assert (card.path / CAPTIONER / "model.safetensors").is_file()
    (scene.model / REWRITER / "config.json").write_text("{}")
    assert "brings another rewriter or captioner" in rushes("models", "add", scene.model, code=2)


def test_what_is_here_needs_no_ledger(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUSHES_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/ledger")
    nowhere, began = load_settings(), time.monotonic()
    assert resolve(nowhere, "mini") == find_model("mini") == card_of(nowhere, "mini")
    assert resolve(nowhere, str(scene.model)) == find_model(scene.model)
    with pytest.raises(ModelNotFound, match=r"'folders/maxi' is neither shipped \(.*\) nor a folder"):
        resolve(nowhere, "folders/maxi")
    with pytest.raises(
        ModelNotFound, match=r"'maxi' is neither .*; whether one was added .* the ledger does not answer"
    ):
        resolve(nowhere, "maxi")
    assert time.monotonic() - began < 60
    monkeypatch.delenv("RUSHES_DATABASE_URL")
    with pytest.raises(
        ModelNotFound, match=r"'maxi' is neither shipped \(.*\) nor a folder with transformer/config.json$"
    ):
        resolve(load_settings(), "maxi")
    assert "neither shipped" in rushes("submit", "none.txt", "--model", "maxi", code=2)


def test_what_nobody_added_is_not_found(scene: Scene) -> None:
    card = find_model(scene.model)
    with scene.ledger.begin() as session:  # rendered from its folder, never added
        register_model(session, card.digest, card.name, str(card.path), card.to_json())
    (row,) = told("models")
    assert (row["name"], row["bytes"]) == ("tiny", None)
    for name in ("tiny", card.digest, card.digest[:7]):
        with pytest.raises(ModelNotFound, match="nor was one added under this name or digest: `rushes models` lists"):
            resolve(scene.elsewhere, name)
    rushes("models", "add", scene.model)
    assert [row["bytes"] is None for row in told("models")] == [False]
    with pytest.raises(ModelNotFound, match="nor was one added"):
        resolve(scene.elsewhere, card.digest[:7])  # too short to name it
