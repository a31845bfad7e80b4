"""`rushes eval`: a model and a judge without a thought, and what is recorded of them in a real ledger."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

from db.models import record_scores, register_model
from model.loading.card import REWRITER, SHIPPED, find_model, folder_digest
from tests.tiny import tiny_captioner, tiny_judge, tiny_model

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.xdist_group("ranks"), pytest.mark.timeout(900), pytest.mark.slow]


@dataclass
class Scene:
    folder: Path
    model: Path
    judge: Path
    database_url: str
    ledger: sessionmaker[Session]

    def rushes(self, *arguments: str, code: int = 0) -> str:
        """Runs the command in a folder of its own; what it prints, or its last line of error where it fails."""
        env = {name: value for name, value in os.environ.items() if not name.startswith("RUSHES_")}
        env |= {"RUSHES_HOME": str(self.folder / "home"), "RUSHES_DATABASE_URL": self.database_url}
        env |= {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "flows.cli.main", "eval", "--threads", "1", *arguments]
        done = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stderr.strip().splitlines()[-1]

    def card(self) -> dict[str, Any]:
        with self.ledger() as session:
            (card,) = session.scalars(text("select card from models"))
        return card


@pytest.fixture
def scene(tmp_path: Path, database_url: str, ledger: sessionmaker[Session]) -> Scene:
    model = tiny_model(tmp_path / "tiny")
    tiny_captioner(model)
    shutil.copytree(SHIPPED / "mini" / REWRITER, model / REWRITER)
    return Scene(tmp_path, model, tiny_judge(tmp_path / "judge"), database_url, ledger)


def test_what_is_measured_is_printed_and_recorded(scene: Scene) -> None:
    card = find_model(scene.model)
    with scene.ledger.begin() as session:
        register_model(session, card.digest, "mine", "/before", {"training": {"seed": 3}})
        record_scores(session, card.digest, {"dit": {"held_out_loss": 0.2}})

    said = scene.rushes("tiny", "--judge", "judge", "--prompts", "3", "--modes", "1", "--sheet", "out/failures.png")
    assert "| colour | 3 | 0.95" in said and "### In people's own words" in said and "### Can the judge tell?" in said
    assert "| extend backward |" in said
    assert (scene.folder / "out" / "failures.png").read_bytes().startswith(b"\x89PNG")
    known = scene.card()
    assert known["training"] == {"seed": 3} and known["scores"]["dit"] == {"held_out_loss": 0.2}
    assert known["path"] == str(scene.model)
    figures = known["scores"]["evaluation"]
    assert (figures["digest"], figures["judge"], figures["prompts"]) == (card.digest, folder_digest(scene.judge), 3)
    assert set(figures["users"]) == {"prompts", "clips", "as written", "rewritten", "of ordinary prompts"}
    assert figures["proof"]["colour"]["clips"] >= 6 and figures["captioner"]["clips"]["all"] == 3
    (file,) = (scene.folder / "home" / "evaluations").iterdir()
    assert str(file) in said and json.loads(file.read_text()) == figures

    scene.rushes("tiny", "--judge", "judge", "--prompts", "1", "--modes", "0")
    again = scene.card()
    assert again["scores"]["evaluation"]["prompts"] == 1 and "modes" not in again["scores"]["evaluation"]
    again["scores"]["evaluation"] = figures
    assert again == known  # nothing else was touched


def test_nothing_is_measured_where_something_is_missing(scene: Scene) -> None:
    assert "judge nowhere has no checker.safetensors" in scene.rushes("tiny", "--judge", "nowhere", code=2)
    assert "model 'maxi' is neither shipped" in scene.rushes("maxi", "--judge", "judge", code=2)
    nowhere = replace(scene, database_url="postgresql://nobody@127.0.0.1:1/ledger")
    assert "the ledger does not answer" in nowhere.rushes("tiny", "--judge", "judge", code=1)
    (scene.judge / "checker.safetensors").write_bytes(b"no tensors")
    failed = scene.rushes("tiny", "--judge", "judge", "--prompts", "1", "--modes", "0", code=1)
    assert failed == "rushes: measuring ended with exit code 1: nothing was recorded"
    assert "scores" not in scene.card()
