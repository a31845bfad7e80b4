"""Data sets in the ledger: written down once, sealed, and never changed. New captions make a child.

Plain functions: they take a session, return values, and leave the transaction to the caller. Every insert may be made
again, so a run that was killed simply does it again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from itertools import islice
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session, aliased

from db.session import change
from db.tables import CaptionOrigin, Dataset, DatasetClip, Model

CHUNK = 1000  # clips in one insert


class DatasetNotFound(LookupError):
    """No data set has this id or name; `rushes datasets` lists those there are."""

    exit_code = 2


class DatasetNotReady(RuntimeError):
    """The data set lacks clips, so it cannot be sealed or used; the message says how many, and what to do first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewDataset:
    key: str  # two data sets with one key are one
    name: str
    source: str
    fps: int
    captions: CaptionOrigin
    licence: str | None = None
    seed: int | None = None
    author: str | None = None
    parent: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetRow:
    id: str
    name: str
    source: str
    licence: str | None
    seed: int | None
    fps: int
    captions: CaptionOrigin
    author: str | None
    parent: str | None
    digest: str | None
    clips: int | None
    shapes: Mapping[str, int]
    created_at: datetime
    sealed_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipOfDataset:
    index: int
    file: str
    sha256: str
    start: int
    width: int
    height: int
    frames: int
    caption: str


def dataset_id(key: str) -> str:
    return f"set_{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def open_dataset(session: Session, new: NewDataset) -> DatasetRow:
    """Note a data set; one whose key is known stays as it is."""
    values = {"id": dataset_id(new.key), **asdict(new)}
    change(session, upsert(Dataset).values(values).on_conflict_do_nothing())
    return dataset_by(session, dataset_id(new.key))


def add_dataset_clips(session: Session, dataset: str, clips: Iterable[ClipOfDataset]) -> int:
    """Insert those clips that are not there yet; returns how many they were."""
    added, rest = 0, iter(clips)
    while some := list(islice(rest, CHUNK)):
        rows = [{"dataset_id": dataset, **asdict(clip)} for clip in some]
        added += change(session, upsert(DatasetClip).values(rows).on_conflict_do_nothing())
    return added


def seal_dataset(session: Session, dataset: str, *, clips: int, digest: str) -> None:
    """Declare the data set whole. Raises DatasetNotReady when it does not have so many clips."""
    there = session.scalar(select(func.count()).where(DatasetClip.dataset_id == dataset)) or 0
    if there != clips:
        raise DatasetNotReady(f"{dataset} has {there} of {clips} clips: run what makes it once more")
    shape = func.concat(DatasetClip.width, "x", DatasetClip.height, "x", DatasetClip.frames)
    shapes = session.execute(select(shape, func.count()).where(DatasetClip.dataset_id == dataset).group_by(shape))
    sealed = {"digest": digest, "clips": clips, "shapes": dict(shapes.tuples().all()), "sealed_at": func.now()}
    change(session, update(Dataset).where(Dataset.id == dataset, Dataset.sealed_at.is_(None)).values(sealed))


def dataset_by(session: Session, id_or_name: str) -> DatasetRow:
    """The data set of this id, or the newest of this name. Raises DatasetNotFound."""
    wanted = select(Dataset).where((Dataset.id == id_or_name) | (Dataset.name == id_or_name))
    found = session.scalars(wanted.order_by(Dataset.created_at.desc()).limit(1)).one_or_none()
    if found is None:
        hint = f"`rushes datasets` lists those there are; a folder is written with a slash, ./{id_or_name}"
        raise DatasetNotFound(f"no data set {id_or_name!r} in the ledger: {hint}")
    return _row(found)


def latest_datasets(session: Session, limit: int = 50) -> list[DatasetRow]:
    return [_row(each) for each in session.scalars(select(Dataset).order_by(Dataset.created_at.desc()).limit(limit))]


def dataset_clips(session: Session, dataset: str, *, limit: int | None = None) -> Iterator[ClipOfDataset]:
    """The clips in order, without their captions' history."""
    wanted = select(DatasetClip).where(DatasetClip.dataset_id == dataset).order_by(DatasetClip.index).limit(limit)
    for clip in session.scalars(wanted.execution_options(yield_per=CHUNK)):
        yield _clip(clip)


def not_recaptioned(session: Session, dataset: str) -> list[ClipOfDataset]:
    """The clips of the parent, with their old captions, for which the data set has none yet; by shape, in order."""
    new = aliased(DatasetClip)
    parent = select(Dataset.parent).where(Dataset.id == dataset).scalar_subquery()
    done = select(new.index).where(new.dataset_id == dataset, new.index == DatasetClip.index).exists()
    order = (DatasetClip.width, DatasetClip.height, DatasetClip.frames, DatasetClip.index)
    wanted = select(DatasetClip).where(DatasetClip.dataset_id == parent, ~done).order_by(*order)
    return [_clip(clip) for clip in session.scalars(wanted)]


def captions_beside(session: Session, dataset: str, limit: int) -> list[tuple[int, str, str]]:
    """(index, old caption, new caption) of the first clips of a recaptioned data set."""
    old, new = aliased(DatasetClip), aliased(DatasetClip)
    pairs = (
        select(new.index, old.caption, new.caption)
        .join(Dataset, Dataset.id == new.dataset_id)
        .join(old, (old.dataset_id == Dataset.parent) & (old.index == new.index))
        .where(new.dataset_id == dataset)
        .order_by(new.index)
        .limit(limit)
    )
    return [(index, before, after) for index, before, after in session.execute(pairs)]


def trained_on(session: Session, model_digest: str, dataset: str) -> None:
    """Note which data set a model came of."""
    change(session, update(Model).where(Model.digest == model_digest).values(dataset_id=dataset))


def _row(found: Dataset) -> DatasetRow:
    return DatasetRow(**_values(found, DatasetRow))


def _clip(found: DatasetClip) -> ClipOfDataset:
    return ClipOfDataset(**_values(found, ClipOfDataset))


def _values(found: Any, kind: Any) -> dict[str, Any]:
    return {f.name: getattr(found, f.name) for f in fields(kind)}
