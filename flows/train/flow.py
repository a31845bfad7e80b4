"""Training as a flow: data ▶ autoencoder ▶ latents ▶ transformer ▶ captioner ▶ look ▶ publish ▶ evaluate ▶ record.

Every stage is a Prefect task that runs `python -m model.train STAGE` in a process of its own, so this one never loads
torch. A model of the world is then measured (`model.score`); of other videos the truth is not known. The work folder
follows from what was asked for: a run that was killed at any moment goes on from its last checkpoints when the same
training is asked for again. The last act is a row in `models`, with digest, recipe, data set and scores.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_image_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session, sessionmaker

from db import datasets
from db.datasets import DatasetNotFound, DatasetRow
from db.models import record_scores, register_model
from db.tables import CaptionOrigin
from flows.clients.ledger import ledger as ledger_of
from flows.clients.page import PrefectPage
from flows.settings import Settings, WrongSetting, load_settings
from flows.show import picture_address
from flows.train.datasets import cuts_of, find_dataset, source_of
from flows.train.evaluation import EVALUATION, JUDGE, figures_of, measuring
from infra.tracing import flush, setup_tracing
from model.loading.card import find_model
from model.train.data import BUCKETS, LIST, BadData, Bucket, save_list

REPORT = 5.0  # seconds between two reports to the UI, at least
ROWS = 200  # of a loss curve that the page shows
TAIL = 30  # lines of a failed stage's output that its error quotes
SCORES = "score.json"  # in the work folder
OF_WORLD = ("render", "vae", "latents", "decoder", "dit", "captioner", "look")
OF_DATA = ("read", "vae", "latents", "decoder", "dit", "look")


class Training(BaseModel):
    """A request for a training; the form of the deployment `train/default` is this class."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = Field(
        default="world", min_length=1, description="world, a folder, s3://BUCKET/PREFIX, or a data set's name or id"
    )
    name: str = Field(default="mini", pattern=r"^[a-z0-9][a-z0-9._-]{0,60}$", description="Of the model")
    licence: str | None = Field(default=None, description="Of the videos, if they are new here")
    seed: int = Field(default=0, ge=0, le=2**31 - 1)
    recipe: dict[str, Any] = Field(
        default_factory=dict[str, Any], description="Settings of model.train.TrainConfig that differ, like dit_steps"
    )
    threads: int = Field(default=2, ge=1, le=256, description="CPU threads of a process")
    ranks: int = Field(default=1, ge=1, le=64, description="Processes that divide every batch of the transformer's")
    prompts: int = Field(
        default=256,
        ge=0,
        le=4096,
        description="On how many a model of the world is measured, where a judge is shipped; 0: not at all",
    )


class StageFailed(RuntimeError):
    """A stage ended badly; the message has the end of its output. Mended, the same training goes on from there."""


class AtWork(RuntimeError):
    """Another run trains in the same work folder. Wait for it, or cancel it."""


def name_run() -> str:
    from prefect.runtime import flow_run

    asked: Any = flow_run.parameters.get("request", {})
    request = asked if isinstance(asked, Training) else Training(**asked)
    return f"{request.name} on {request.data}"


@flow(name="train", description="Trains a model on the world or on videos of your own.", flow_run_name=name_run)
def train(request: Training) -> State[Any]:
    """Find the data set, run the stages one after another, publish the model."""
    settings = load_settings()
    setup_tracing("rushes-train")
    try:
        with ledger_of(settings) as ledgers:
            dataset = find_data(settings, ledgers, request)
            key = training_key(settings, request, dataset)
            work = settings.home / "training" / key
            with alone(work):
                prepare(settings, ledgers, request, dataset, work)
                out = settings.home / "models" / f"{request.name}-{key}"
                for stage in OF_WORLD if of_world(dataset) else OF_DATA:
                    as_task(stage, partial(run_stage, stage, command_of(stage, request, work), work, key))
                as_task("publish", partial(run_stage, "publish", publishing(request, work, out), work, key))
                if of_world(dataset) and request.prompts and JUDGE.is_dir():
                    as_task("evaluate", partial(evaluate, request, work, out, key))
                as_task("record", partial(record, ledgers, request, dataset, work, out, key))
    except (BadData, DatasetNotFound, WrongSetting) as error:
        return Failed(message=str(error), name="BadInput")
    finally:
        flush()
    return Completed(message=f"{request.name} is in {out}")


# --- before -----------------------------------------------------------------------------------------------------------


def find_data(settings: Settings, ledgers: sessionmaker[Session], request: Training) -> DatasetRow:
    found = find_dataset(
        settings, ledgers, request.data, licence=request.licence, seed=request.seed, buckets=buckets_of(request.recipe)
    )
    if found.row.sealed_at is None:
        raise BadData(f"{found.row.id} {found.row.name} is not whole: run once more what makes it")
    if found.unused:
        text = "\n".join(f"- {sentence}" for sentence in found.unused)
        create_markdown_artifact(f"# Files that were not used\n{text}", key="unused-files")
    return found.row


def buckets_of(recipe: Mapping[str, Any]) -> Sequence[Bucket]:
    """Those that the recipe gives, in the way that `model.train.config.train_config` reads it."""
    if "buckets" not in recipe:
        return BUCKETS
    return [Bucket.from_json(bucket) for bucket in recipe["buckets"]]


def of_world(dataset: DatasetRow) -> bool:
    """Captions of the world are drawn anew at every step; those of any other data set are what its rows say."""
    return dataset.captions is CaptionOrigin.WORLD


def training_key(settings: Settings, request: Training, dataset: DatasetRow) -> str:
    """A digest of what determines the weights: not threads, ranks and ZeRO, which change the last bits alone."""
    recipe = {name: value for name, value in request.recipe.items() if name != "zero"}
    said = [dataset.digest, request.seed, recipe, settings.device]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


@contextmanager
def alone(work: Path) -> Generator[None]:
    """Raises AtWork when another process holds the folder. The lock goes with the process, however it ends."""
    work.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(FileLock(work / "lock", timeout=0))
        except Timeout:
            raise AtWork(f"another run trains in {work}") from None
        yield


def prepare(
    settings: Settings, ledgers: sessionmaker[Session], request: Training, dataset: DatasetRow, work: Path
) -> None:
    """Writes down the recipe and, of a data set that is not the world's own, the list of its clips."""
    recipe = {**request.recipe, "seed": request.seed, "device": settings.device, "threads": request.threads}
    (work / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    if of_world(dataset):
        return
    with ledgers() as session:
        cuts = cuts_of(session, dataset.id)
    if not any(cut.caption for cut in cuts):
        get_run_logger().warning("no clip has a caption, so prompts will mean nothing: `rushes recaption` writes them")
    save_list(work / LIST, source_of(settings, dataset), cuts)


# --- the stages -------------------------------------------------------------------------------------------------------


def as_task(name: str, work: Callable[[], None]) -> None:
    """Runs it as a Prefect task. A closure, since Prefect would walk through all that a task is given."""

    @task(name=name, task_run_name=name, cache_policy=NO_CACHE, persist_result=False)
    def stage() -> None:
        work()

    stage()


def command_of(stage: str, request: Training, work: Path) -> list[str]:
    python = [sys.executable, "-u"]
    if stage == "dit" and request.ranks > 1:
        python += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(request.ranks)]
    return [
        *python,
        "-m",
        "model.train",
        stage,
        "--work",
        str(work),
        "--recipe",
        str(work / "recipe.json"),
        "--attached",
    ]


def run_stage(stage: str, command: Sequence[str], work: Path, key: str) -> None:
    """Runs it to its end and shows how it goes. Raises StageFailed. When this process ends, so does the stage."""
    log, tail, curve = get_run_logger(), deque[str](maxlen=TAIL), Curve(stage, work, key)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as child:
        assert child.stdout is not None
        try:
            for line in child.stdout:
                tail.append(line.rstrip())
                log.info("%s", line.rstrip())
                curve.send()
            code = child.wait()
        finally:
            child.kill()
    if code:
        raise StageFailed("\n".join([f"stage {stage} ended with exit code {code}:", *tail]))
    curve.send(last=True)
    picture = work / "look.png"
    if stage == "look" and picture.exists():
        create_image_artifact(
            picture_address(picture.read_bytes()),
            key=f"{key}-samples",
            description="What the model makes of held-back captions",
        )


class Curve:
    """The loss curve and the throughput of a stage as one table and one progress bar, kept up to date."""

    def __init__(self, stage: str, work: Path, key: str) -> None:
        self.stage, self.path, self.key = stage, work / f"{stage}.jsonl", f"{key}-{stage}"
        self.page = PrefectPage()
        self.shown = 0
        self.next = 0.0

    def send(self, *, last: bool = False) -> None:
        if not last and time.monotonic() < self.next:
            return
        self.next = time.monotonic() + REPORT
        rows = curve_of(self.path)
        if len(rows) == self.shown:
            return
        self.shown = len(rows)
        share = 100.0 * rows[-1]["step"] / rows[-1]["of"]
        self.page.progress(f"{self.key}-progress", share, f"Steps of {self.stage}")
        self.page.table(f"{self.key}-curve", rows[-ROWS:], f"Loss and throughput of {self.stage}")


def curve_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a stage's log; of steps that were done again after a kill, the last."""
    if not path.exists():
        return []
    rows = {row["step"]: row for row in map(json.loads, path.read_text().splitlines())}
    return [rows[step] for step in sorted(rows)]


# --- after ------------------------------------------------------------------------------------------------------------


def publishing(request: Training, work: Path, out: Path) -> list[str]:
    return [*command_of("publish", request, work), "--out", str(out)]


def evaluate(request: Training, work: Path, out: Path, key: str) -> None:
    """Measures the published folder, unless that was done."""
    if figures_of(work / SCORES, find_model(out).digest) is None:
        command = measuring(out, JUDGE, work / SCORES, prompts=request.prompts, threads=request.threads)
        run_stage("evaluate", command, work, key)


def record(
    ledgers: sessionmaker[Session], request: Training, dataset: DatasetRow, work: Path, out: Path, key: str
) -> None:
    """The model's row: its digest, what it was trained on and how, and its scores."""
    card = find_model(out)
    recipe = json.loads((work / "recipe.json").read_text())
    trained = {"recipe": recipe, "dataset": dataset.id, "data_digest": dataset.digest, "key": key}
    scores = scores_of(work, card.digest)
    with ledgers.begin() as session:
        facts = {**card.to_json(), "training": trained}
        register_model(session, card.digest, request.name, str(card.path), facts)
        record_scores(session, card.digest, scores)
        datasets.trained_on(session, card.digest, dataset.id)
    create_markdown_artifact(summary(request, card.digest, out, dataset, scores), key=f"{key}-model")


def scores_of(work: Path, digest: str) -> dict[str, Any]:
    """The stages' figures on clips that were held back, and the evaluation of the model of this digest."""
    last = {stage: curve_of(work / f"{stage}.jsonl")[-1:] for stage in ("vae", "decoder", "dit", "captioner")}
    scores: dict[str, Any] = {
        stage: {name: value for name, value in rows[0].items() if name.startswith("held_out")}
        for stage, rows in last.items()
        if rows
    }
    measured = figures_of(work / SCORES, digest)
    return scores | ({EVALUATION: measured} if measured else {})


def summary(request: Training, digest: str, out: Path, dataset: DatasetRow, scores: Mapping[str, Any]) -> str:
    held_back = [(stage, values) for stage, values in scores.items() if stage != EVALUATION]
    held_back += [(f"adherence, {of}", v) for of, v in scores.get(EVALUATION, {}).get("adherence", {}).items()]
    lines = [f"| {stage} | {name} | {value} |" for stage, values in held_back for name, value in values.items()]
    return "\n".join(
        [
            f"# {request.name}",
            f"`{digest}`, trained on {dataset.clips} clips of {dataset.name} ({dataset.id}).",
            f"Render with it: `rushes submit prompts.jsonl --model {out}`",
            "",
            "| stage | on clips that were held back | score |",
            "|---|---|---|",
            *lines,
        ]
    )
