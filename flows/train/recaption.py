"""New captions for a data set: a child of it, in which every clip has a caption of one author.

The captioner of a model writes them, or a vision-language model behind an OpenAI-compatible endpoint. The clips are
done in shards of one shape, each a Prefect task; what is done is what the ledger has a row for. Killed at any moment it
may simply run again: clips with a new caption are not looked at twice. The old captions stay with the parent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session, sessionmaker

from db import datasets
from db.datasets import ClipOfDataset, DatasetNotFound, DatasetRow, NewDataset
from db.tables import CaptionOrigin
from flows.clients.ledger import ledger as ledger_of
from flows.clients.page import PrefectPage
from flows.library.models import BrokenModel, resolve
from flows.request.form import digest_of
from flows.settings import PREFIX, Settings, WrongSetting, load_settings
from flows.train.datasets import as_cut, cuts_of, find_dataset, source_of
from infra.tracing import flush, setup_tracing
from model.config import ClipShape
from model.language.vision import FRAMES, OF_AN_IMAGE, QUESTION, VisionModel
from model.loading.card import ModelNotFound
from model.train.data import BadData, Cut, Source, digest

SHARD = 64  # clips
QUESTIONS = 8  # clips of a shard for a vision-language model: answers that a failure may lose
SHOWN = 50  # captions, old and new, on the run's page
ENLARGED = 4  # a vision-language model sees the clip so many times as wide and high as training does


class Recaption(BaseModel):
    """A request for new captions; the form of the deployment `recaption/default` is this class."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = Field(min_length=1, description="A data set's name or id, `world`, a folder, or s3://BUCKET/PREFIX")
    author: Literal["captioner", "vision"] = Field(
        default="captioner", description="The captioner of a model, or the vision-language model of RUSHES_VISION_URL"
    )
    model: str = Field(default="mini", min_length=1, description="Whose captioner: a shipped name or a folder")
    name: str | None = Field(default=None, max_length=200, description="Of the new data set; default: that of the old")
    licence: str | None = Field(default=None, description="Of the videos, if they are new here")


class Author(Protocol):
    """Writes one caption for each of the clips [B, T, H, W, 3]."""

    def captions(self, clips: NDArray[np.uint8]) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class Pen:
    """Who writes, under which name in the ledger."""

    origin: CaptionOrigin
    name: str  # digest of the captioner, or the vision-language model, where it is and a digest of what it is asked
    open: Callable[[], Author]  # loads it: only when there is something to do
    shard: int = SHARD
    enlarged: int = 1


def name_run() -> str:
    from prefect.runtime import flow_run

    asked: Any = flow_run.parameters.get("request", {})
    return str(asked.data if isinstance(asked, Recaption) else asked.get("data", "recaption"))


@flow(name="recaption", description="Writes new captions for a data set.", flow_run_name=name_run)
def recaption(request: Recaption) -> State[Any]:
    """Find the data set, caption its clips shard by shard, seal the child."""
    settings = load_settings()
    setup_tracing("rushes-recaption")
    try:
        with ledger_of(settings) as ledgers:
            old = find_dataset(settings, ledgers, request.data, licence=request.licence).row
            new = write_anew(settings, ledgers, old, pen_of(settings, request), request.name or old.name)
    except (BadData, DatasetNotFound, ModelNotFound, BrokenModel, WrongSetting, NoCaptions) as error:
        return Failed(message=str(error), name="BadInput")
    finally:
        flush()
    return Completed(message=f"{new.id} {new.name}: {new.clips} captions by {new.captions} {new.author}")


class NoCaptions(ValueError):
    """The data set cannot be recaptioned; the message says why."""


def pen_of(settings: Settings, request: Recaption) -> Pen:
    """Raises ModelNotFound, BrokenModel, NoCaptions and WrongSetting."""
    if request.author == "vision":
        url, name, key = settings.vision_url, settings.vision_model, settings.vision_key
        if not url or not name:
            raise WrongSetting(f"{PREFIX}VISION_URL and {PREFIX}VISION_MODEL must name a vision-language model")
        secret = key.get_secret_value() if key else None
        told = digest_of([QUESTION, OF_AN_IMAGE, FRAMES, ENLARGED])[:12]
        author = f"{name} at {url}, told {told}"
        return Pen(CaptionOrigin.VISION, author, lambda: VisionModel(url, name, secret), QUESTIONS, ENLARGED)
    folder = resolve(settings, request.model).path
    from model.language.captioner import NoCaptioner, Reporter, captioner_digest

    try:
        author = captioner_digest(folder)
    except NoCaptioner as error:
        raise NoCaptions(str(error)) from None
    return Pen(CaptionOrigin.CAPTIONER, author, lambda: Reporter(folder, settings.device))


def write_anew(settings: Settings, ledgers: sessionmaker[Session], old: DatasetRow, pen: Pen, name: str) -> DatasetRow:
    """The child of `old` with captions by this author; made, or completed, if it is not whole."""
    log = get_run_logger()
    if old.sealed_at is None:
        raise NoCaptions(f"{old.id} {old.name} is not whole: run once more what makes it")
    new = NewDataset(
        key=f"{old.id} {pen.origin} {pen.name}",
        name=name,
        source=old.source,
        fps=old.fps,
        captions=pen.origin,
        licence=old.licence,
        seed=old.seed,
        author=pen.name,
        parent=old.id,
    )
    with ledgers.begin() as session:
        child = datasets.open_dataset(session, new)
        left = datasets.not_recaptioned(session, child.id)
    if child.sealed_at is None:
        log.info("%s: %d of %s clips to caption", child.id, len(left), old.clips)
        caption_all(ledgers, child, left, source_of(settings, old), pen)
        seal(ledgers, child, old.clips or 0)
    with ledgers() as session:
        child = datasets.dataset_by(session, child.id)
        rows = [
            {"clip": index, "before": before, "now": now}
            for index, before, now in datasets.captions_beside(session, child.id, SHOWN)
        ]
    create_table_artifact(rows, key=f"{child.id.replace('_', '-')}-captions", description="Captions, before and now")
    return child


def caption_all(
    ledgers: sessionmaker[Session], child: DatasetRow, left: Sequence[ClipOfDataset], source: Source, pen: Pen
) -> None:
    if not left:
        return
    author, done = pen.open(), 0
    page, key = PrefectPage(), f"{child.id.replace('_', '-')}-progress"
    described = f"Clips of {child.id} that have a new caption"
    page.progress(key, 0.0, described)
    for shard in shards_of(left, pen.shard):
        name = f"shard: {len(shard)} clips {shard[0].width}x{shard[0].height}x{shard[0].frames} from {shard[0].index}"
        as_task(name, partial(caption_shard, ledgers, child.id, shard, source, author, pen.enlarged))
        done += len(shard)
        page.progress(key, 100.0 * done / len(left), described)


def as_task(name: str, work: Callable[[], None]) -> None:
    """Runs it as a Prefect task. A closure, since Prefect would walk through all that a task is given."""

    @task(name="shard", task_run_name=name, cache_policy=NO_CACHE, persist_result=False)
    def shard() -> None:
        work()

    shard()


def shards_of(clips: Sequence[ClipOfDataset], size: int) -> Iterator[list[ClipOfDataset]]:
    """Clips in slices of one shape, neighbours together."""
    for _, same in groupby(clips, lambda clip: (clip.width, clip.height, clip.frames)):
        some = list(same)
        yield from (some[k : k + size] for k in range(0, len(some), size))


def caption_shard(
    ledgers: sessionmaker[Session],
    dataset: str,
    shard: Sequence[ClipOfDataset],
    source: Source,
    author: Author,
    enlarged: int,
) -> None:
    """Reads the clips, has them captioned, and writes the rows."""
    cuts = [enlarge(as_cut(clip), enlarged) for clip in shard]
    captions = author.captions(np.stack(list(source.read(cuts))))
    rows = [replace(clip, caption=caption) for clip, caption in zip(shard, captions, strict=True)]
    with ledgers.begin() as session:
        datasets.add_dataset_clips(session, dataset, rows)


def enlarge(cut: Cut, times: int) -> Cut:
    shape = ClipShape(cut.shape.width * times, cut.shape.height * times, cut.shape.frames)
    return replace(cut, shape=shape)


def seal(ledgers: sessionmaker[Session], child: DatasetRow, clips: int) -> None:
    with ledgers.begin() as session:
        content = digest(cuts_of(session, child.id), child.fps)
        datasets.seal_dataset(session, child.id, clips=clips, digest=content)
