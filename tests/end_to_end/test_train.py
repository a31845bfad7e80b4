"""From a folder of videos to a model in the ledger and to better captions; killed on the way *(chaos)*."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.stack import Stack, command, wait_for
from tests.tiny import tiny_captioner, tiny_model
from tests.videos import write_folder

pytestmark = [pytest.mark.xdist_group("stack two"), pytest.mark.timeout(900), pytest.mark.slow]

RECIPE = {
    "buckets": [{"shape": [32, 32, 9], "clips": 12, "share": 1, "batch": 4}],
    "dit": {"layers": 1, "heads": 2, "head_dim": 12, "ffn_dim": 32, "text_dim": 16},
    "chunk": 8,
    "vae_steps": 6,
    "decoder_steps": 4,
    "dit_steps": 40,
    "every": 20,
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "videos")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_named(stack: Stack, name: str) -> str:
    """The newest flow run of this name."""
    filters = {"flow_runs": {"name": {"any_": [name]}}, "sort": "START_TIME_DESC"}
    return str(wait_for(lambda: stack.api("POST", "/flow_runs/filter", filters), "the run to be known")[0]["id"])


def stages(stack: Stack) -> list[Any]:
    return [process for process in stack.processes() if "model.train" in command(process)]


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.chaos)], ids=["whole", "killed"])
def test_a_folder_of_videos_becomes_a_model(stack: Stack, videos: Path, tmp_path: Path, killed: bool) -> None:
    name = "killed" if killed else "whole"
    recipe = RECIPE | ({"dit_steps": 200} if killed else {})  # so that there is a middle
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    asked = ("train", "--data", str(videos), "--name", name, "--threads", "1", "--licence", "CC0-1.0")
    asked += ("--recipe", str(tmp_path / "recipe.json"))
    before = set((stack.home / "training").glob("*"))

    def work() -> Path | None:
        new = set((stack.home / "training").glob("*")) - before
        return new.pop() if new else None

    def log() -> list[dict[str, Any]]:
        return lines(folder / "dit.jsonl") if (folder := work()) else []

    if killed:
        run = stack.rushes(*asked).strip().rpartition("/")[2]

        def under_way() -> bool:
            state = stack.run(run)
            assert state["state_type"] not in ("COMPLETED", "FAILED"), state["state"]["message"]
            return bool(log())

        wait_for(under_way, "the transformer's first checkpoint")
        stack.kill(stack.processes_of(run))
        wait_for(lambda: not stages(stack), "the stage to end with its flow")
        assert log()[-1]["step"] < recipe["dit_steps"], "it was killed too late to tell"

    said = stack.rushes(*asked, "--watch")
    assert f"Completed: {name}" in said
    run = run_named(stack, f"{name} on {videos}")
    steps = [row["step"] for row in log()]
    assert steps == sorted(set(steps)) and steps[-1] == recipe["dit_steps"]  # nothing was done twice
    folder = work()
    assert folder is not None and len(lines(folder / "vae.jsonl")) == 1

    (model,) = stack.sql("select * from models where name = %s", name)
    (dataset,) = stack.sql("select * from datasets where id = %s", model["dataset_id"])
    assert (dataset["source"], dataset["licence"], dataset["clips"]) == (videos.as_uri(), "CC0-1.0", 12)
    assert dataset["shapes"] == {"32x32x9": 12} and dataset["captions"] == "files"
    assert model["card"]["training"]["recipe"]["dit_steps"] == recipe["dit_steps"]
    assert model["card"]["scores"]["dit"]["held_out_loss"] == log()[-1]["held_out_loss"]
    assert Path(model["path"], "transformer", "config.json").is_file()

    shown = {key.split("-", 1)[-1]: value for key, value in stack.artifacts(run).items()}
    curve = json.loads(shown["dit-curve"]["data"])
    assert curve[-1]["step"] == recipe["dit_steps"] and curve[-1]["steps_per_second"] > 0
    assert shown["samples"]["data"].startswith("data:image/")
    assert shown["dit-progress"]["data"] == 100.0
    assert model["digest"] in shown["model"]["data"]


@pytest.mark.chaos
def test_recaptioning_keeps_what_was_there(stack: Stack, videos: Path, tmp_path: Path) -> None:
    asked = ("recaption", str(videos), "--watch", "--model", str(tiny_model(tmp_path / "tiny")))
    assert "no captioner/model.safetensors" in stack.rushes(*asked, code=2)
    tiny_captioner(tmp_path / "tiny")
    assert "Completed: set_" in stack.rushes(*asked)
    (new,) = stack.sql("select * from datasets where captions = 'captioner'")
    (old,) = stack.sql("select * from datasets where id = %s", new["parent"])
    assert old["captions"] == "files" and new["clips"] == old["clips"] == 12
    assert new["digest"] != old["digest"] and len(new["author"]) == 64
    both = "select o.caption as before, n.caption as now from dataset_clips o join dataset_clips n using (index)"
    rows = stack.sql(f"{both} where o.dataset_id = %s and n.dataset_id = %s order by index", old["id"], new["id"])
    assert [row["before"] for row in rows] == [f"something moves, take {k}" for k in range(12)]
    assert all("take" not in row["now"] for row in rows) and any(row["now"] for row in rows)

    assert new["id"] in stack.rushes(*asked)  # there is nothing left to do
    assert len(stack.sql("select * from datasets where captions = 'captioner'")) == 1
    listed = json.loads(stack.rushes("datasets", "--format", "json"))
    assert {old["id"], new["id"]} <= {row["id"] for row in listed}
    shown = json.loads(stack.rushes("datasets", new["id"], "--format", "json"))
    assert shown[3]["before"] == "something moves, take 3" and shown[3]["caption"] == rows[3]["now"]
