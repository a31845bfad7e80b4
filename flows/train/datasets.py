"""Data sets: found by name, or written down from the world, a folder or an S3 prefix, with their digest.

What a data set consists of is in the ledger; the files stay where they are. Those under a prefix are copied below the
home once, and again when they have changed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from sqlalchemy.orm import Session, sessionmaker

from db import datasets
from db.datasets import ClipOfDataset, DatasetRow, NewDataset
from db.tables import CaptionOrigin
from flows.settings import PREFIX, Settings, WrongSetting
from infra.files import NO_ADDRESS, atomic_path, is_address
from infra.store.contract import Store
from infra.store.open import open_store
from model.config import ClipShape
from model.train.data import (
    BUCKETS,
    FPS,
    IMAGES,
    TABLES,
    VIDEOS,
    BadData,
    Bucket,
    Cut,
    Source,
    digest,
    scan,
    world_cuts,
)

WORLD = "world"
CHUNK = 1 << 20
SIDECARS = (".txt", ".json", *(Path(name).suffix for name in TABLES))


@dataclass(frozen=True, slots=True)
class Found:
    """A data set of the ledger, and what was not used of its files when it was written down just now."""

    row: DatasetRow
    unused: Sequence[str] = ()


def find_dataset(
    settings: Settings,
    ledgers: sessionmaker[Session],
    data: str,
    *,
    name: str | None = None,
    licence: str | None = None,
    seed: int = 0,
    buckets: Sequence[Bucket] = BUCKETS,
) -> Found:
    """The data set that `data` names: an id or a name in the ledger, `world`, a folder, or s3://BUCKET/PREFIX.

    The last three are written down when they are new or have changed. Raises BadData, DatasetNotFound, WrongSetting.
    """
    if data == WORLD:
        cuts = list(world_cuts(seed, buckets))
        return Found(_write_down(ledgers, WORLD, cuts, CaptionOrigin.WORLD, name or WORLD, licence, seed))
    if "/" not in data:
        with ledgers() as session:
            return Found(datasets.dataset_by(session, data))
    if is_address(data) and not data.startswith("s3://"):
        raise BadData(f"{data}: must be a folder, s3://BUCKET/PREFIX or a data set of the ledger; {NO_ADDRESS}")
    source = data if data.startswith("s3://") else Path(os.path.abspath(Path(data).expanduser())).as_uri()
    folder = folder_of(settings, source)
    scanned = scan(folder, [bucket.shape for bucket in buckets], FPS)
    if not scanned.cuts:
        raise BadData("\n".join([f"{data}: none of its files can be used", *scanned.unused[:20]]))
    row = _write_down(ledgers, source, scanned.cuts, CaptionOrigin.FILES, name or folder.name, licence, None)
    return Found(row, scanned.unused)


def source_of(settings: Settings, row: DatasetRow) -> Source:
    """Where the clips of a data set can be read on this machine."""
    if row.source == WORLD:
        return Source(seed=row.seed or 0, fps=row.fps)
    return Source(folder=folder_of(settings, row.source), fps=row.fps)


def cuts_of(session: Session, dataset: str) -> list[Cut]:
    return [as_cut(clip) for clip in datasets.dataset_clips(session, dataset)]


def as_cut(clip: ClipOfDataset) -> Cut:
    shape = ClipShape(clip.width, clip.height, clip.frames)
    return Cut(file=clip.file, sha256=clip.sha256, start=clip.start, shape=shape, caption=clip.caption)


def as_rows(cuts: Iterable[Cut]) -> Iterable[ClipOfDataset]:
    for index, cut in enumerate(cuts):
        yield ClipOfDataset(
            index=index,
            file=cut.file,
            sha256=cut.sha256,
            start=cut.start,
            width=cut.shape.width,
            height=cut.shape.height,
            frames=cut.shape.frames,
            caption=cut.caption,
        )


def _write_down(
    ledgers: sessionmaker[Session],
    source: str,
    cuts: Sequence[Cut],
    captions: CaptionOrigin,
    name: str,
    licence: str | None,
    seed: int | None,
) -> DatasetRow:
    """Doing it again changes nothing: the key follows from where the clips are and what they are."""
    content = digest(cuts, FPS)
    new = NewDataset(
        key=f"{source} {content}",
        name=name,
        source=source,
        fps=FPS,
        captions=captions,
        licence=licence,
        seed=seed,
    )
    with ledgers.begin() as session:
        row = datasets.open_dataset(session, new)
    if row.sealed_at is None:
        with ledgers.begin() as session:
            datasets.add_dataset_clips(session, row.id, as_rows(cuts))
            datasets.seal_dataset(session, row.id, clips=len(cuts), digest=content)
    with ledgers() as session:
        return datasets.dataset_by(session, row.id)


# --- files ------------------------------------------------------------------------------------------------------------


def folder_of(settings: Settings, source: str) -> Path:
    """The folder of a file:// source, or where the objects of an s3:// one were copied to, which this does."""
    parts = urlsplit(source)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    store, prefix = prefix_of(settings, source)
    name = parts.path.strip("/").rpartition("/")[2] or parts.netloc
    folder = settings.home / "data" / hashlib.sha256(source.encode()).hexdigest()[:12] / name
    copy_prefix(store, prefix, folder)
    return folder


def prefix_of(settings: Settings, source: str) -> tuple[Store, str]:
    """The store and the prefix of s3://BUCKET/PREFIX; without an ?endpoint= of its own on the server of our store."""
    parts = urlsplit(source)
    query = parts.query or (urlsplit(settings.store).query if settings.store.startswith("s3://") else "")
    secret = settings.store_secret_key.get_secret_value() if settings.store_secret_key else None
    try:
        store = open_store(urlunsplit(("s3", parts.netloc, "", query, "")), settings.store_access_key, secret)
    except ValueError as error:
        raise WrongSetting(f"{source}: {error} ({PREFIX}STORE_ACCESS_KEY and {PREFIX}STORE_SECRET_KEY)") from None
    prefix = parts.path.strip("/")
    return store, f"{prefix}/" if prefix else ""


def copy_prefix(store: Store, prefix: str, folder: Path) -> None:
    """Makes the folder hold the media and captions under the prefix; copies what is new, larger or younger."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted: set[Path] = set()
    for listed in store.list(prefix):
        path = folder / listed.key.removeprefix(prefix)
        if path.suffix.lower() not in VIDEOS | IMAGES and not path.name.endswith(SIDECARS):
            continue
        if not path.resolve().is_relative_to(folder.resolve()):
            raise BadData(f"{listed.key}: an object's name must not lead out of its folder")
        wanted.add(path)
        there = path.stat() if path.is_file() else None
        if there and there.st_size == listed.bytes and there.st_mtime >= listed.modified.timestamp():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        with store.open(listed.key) as stream, atomic_path(path) as part, part.open("wb") as file:
            while chunk := stream.read(CHUNK):
                file.write(chunk)
    for path in [p for p in folder.rglob("*") if p.is_file() and p not in wanted]:
        path.unlink()
