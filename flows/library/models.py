"""Models that are not shipped: added to the store once, then fetched by the engines that need them.

A model is added under a name. Its files lie in the store under their digests, the list of them in the ledger, and both
together give the model's own digest again; so what an engine fetches is what was added, or nothing. Importing this
loads neither Prefect nor torch, and shipped models and folders are found without the ledger, as ever.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock
from sqlalchemy.exc import OperationalError

from db.artifacts import NewArtifact, add_artifacts
from db.models import FILES, ModelRow, NameTaken, add_model, added_model, added_models, check_name, remove_model
from flows.clients.ledger import ledger, reading
from flows.clients.ownership import check_owner
from flows.library.cache import in_use, make_room
from flows.library.variants import Lora, write_variant
from flows.plan.layout import GPUS, RELEASES, CannotFit, Gpu, Network, Work, parse_gpus, shared_partition
from flows.settings import AUTO, Settings
from infra.files import atomic_path
from infra.store.contract import CHUNK, NoSuchKey, Store, Stored, blob_key
from model.config import ClipShape, Partition
from model.loading.card import (
    ADAPTERS,
    CAPTIONER,
    REWRITER,
    SHIPPED,
    TRANSFORMER,
    ModelCard,
    ModelNotFound,
    covered_files,
    digest_of,
    dit_config,
    file_digest,
    find_model,
)
from model.loading.inspect import BadCheckpoint, check_folder
from model.parallel.memory import text_bytes, vae_bytes

CACHE = Path("cache", "models")  # in the home folder: fetched models, each under its digest
BESIDE = (REWRITER, CAPTIONER)  # what goes with a model and is no part of its digest
PREFIX = 8  # hex digits of a digest that are enough to name a model
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class BadName(ValueError):
    """A model cannot be added under this name. The message says what it must look like."""

    exit_code = 2


class BrokenModel(RuntimeError):
    """A fetched model differs from the one that was added. Adding its folder again puts right what the store lacks."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A file of a model."""

    name: str  # below the model's folder, with slashes
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedModel:
    """A model in store and ledger."""

    name: str
    card: ModelCard
    parameters: int  # of its transformers
    files: tuple[ModelFile, ...]
    sent: int  # files that were not in the store as the ledger says; all of them for a new model
    already: bool  # it was added before

    def facts(self) -> dict[str, Any]:
        """Facts for `rushes models`: the model's size, and the settings of a request that gives none."""
        card = self.card
        values = {name: getattr(card, name) for name in ("fps", "steps", "guidance", "solver", "shift")}
        return {
            "name": self.name,
            "digest": card.digest,
            "parameters": self.parameters,
            "files": len(self.files),
            "bytes": sum(file.bytes for file in self.files),
            "heads": card.heads,
            "weights": card.weights,
            "adapters": sum(file.name.startswith(f"{ADAPTERS}/") for file in self.files) or None,
            "trained": ", ".join(card.trained) or None,
            "size": f"{card.width}x{card.height}",
            "frames": card.frames,
            **values,
        }


def add(
    settings: Settings,
    base: str | Path,
    name: str | None = None,
    *,
    loras: Sequence[Lora] = (),
    weights: str | None = None,
) -> AddedModel:
    """Check a model folder, put its files into the store and record it under a name: its own if none is given.

    With adapters or `weights` it is a variant of the base that is added, and the base may be any model that is known.
    Added again it keeps the name it has, and only what the store has lost is sent.
    Raises BadCheckpoint, BadVariant, BadName and NameTaken, ModelNotFound and BrokenModel for a base, and NotRunning.
    """
    if not loras and weights is None:
        return _add(settings, Path(base), name)
    card = resolve(settings, str(base))
    with tempfile.TemporaryDirectory(prefix="variant-", dir=settings.home) as folder:
        write_variant(card.path, (*covered_files(card.path), *_beside(card.path)), Path(folder), loras, weights)
        return _add(settings, Path(folder), name or card.name, passing=True)


def _add(settings: Settings, path: Path, name: str | None, *, passing: bool = False) -> AddedModel:
    """Add a folder. One that is `passing` is not recorded as the model's place: the engines' cache is."""
    checked, card = check_folder(path), find_model(path.resolve())
    if passing:
        card = replace(card, name=str(name), path=settings.home / CACHE / card.digest)
    with ledger(settings) as ledgers:
        with ledgers() as session:
            before = added_model(session, card.digest)
            called = before.name if before else _free_name(name or card.name, card.digest)
            check_name(session, called, card.digest)
        store = settings.open_store()
        check_owner(ledgers, store)
        stored = _mend(store, path, before) if before else _put(store, path)
        files = _files(before) if before else tuple(ModelFile(n, s.sha256, s.bytes) for n, s in stored.items())
        if _digest(files) != card.digest:
            raise BadCheckpoint(f"{path} changed while it was being added: nothing was recorded; add it again")
        known = {FILES: [asdict(file) for file in files], "parameters": checked.parameters}
        with ledgers.begin() as session:
            add_model(session, card.digest, called, str(card.path), card.to_json() | known)
            add_artifacts(session, (NewArtifact(**asdict(each)) for each in stored.values()))
    return AddedModel(
        name=called,
        card=card,
        parameters=checked.parameters,
        files=files,
        sent=len(stored),
        already=before is not None,
    )


def remove(settings: Settings, name: str) -> tuple[ModelRow, int]:
    """Take a model that was added out of the store. Returns its row, and how many objects nothing else needs.

    Clips that it rendered stay, and so does what is in the caches of engines. Raises ModelNotFound and ModelNeeded.
    """
    with ledger(settings) as ledgers, ledgers.begin() as session:
        row = _only(name, added_models(session, name), f"no model was added under {name!r}")
        return row, remove_model(session, row.digest)


def resolve(settings: Settings, name: str) -> ModelCard:
    """The card of a model whose files are on this machine: of a shipped one, of a folder, or of one that was added, by
    its name or digest, which is fetched from the store if it is not here yet.

    Raises ModelNotFound, and BrokenModel where the store does not have what was added.
    """
    found = _find(settings, name)
    return found if isinstance(found, ModelCard) else _fetched(settings, found)


def card_of(settings: Settings, name: str) -> ModelCard:
    """The card of a model for planning, which reads no weights: a model that was added is not fetched for it.

    One that brings a rewriter is, since its prompts are rewritten where they are planned; these models are small.
    """
    found = _find(settings, name)
    if isinstance(found, ModelCard):
        return found
    if any(file.name.startswith(f"{REWRITER}/") for file in _files(found)):
        return _fetched(settings, found)
    said = {f.name: found.card[f.name] for f in fields(ModelCard) if f.name in found.card}
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in said.items()}
    values |= {"name": found.name, "path": _cached(settings, found)}
    return ModelCard(**values)


def network_of(card: ModelCard, bytes_each: int = 2) -> Network:
    """A model's network as planning needs it, from the headers of its files; its weights take `bytes_each`.

    Raises ModelNotFound for a model whose folder is not on this machine.
    """
    if not (card.path / TRANSFORMER).is_dir():
        raise ModelNotFound(f"model {card.name!r} was added, but never fetched to this machine: plan where it was")
    dit = dit_config(card.path)
    return Network(
        dit=dit,
        text_tokens=card.max_prompt_tokens,
        stride=(card.frame_step, card.multiple // dit.patch[1], card.multiple // dit.patch[2]),
        experts=1 if card.boundary is None else 2,
        beside=vae_bytes(card.path) + text_bytes(card.path, bytes_each),
        bytes_each=bytes_each,
    )


def network_like(card: ModelCard, bytes_each: int = 2) -> Network:
    """A stand-in for the network of a model whose folder is on another machine: of Wan's proportions, with its heads.

    What was measured of the model corrects its speed; its memory is not known.
    """
    try:
        return network_of(card, bytes_each)
    except ModelNotFound:
        dit = replace(RELEASES["wan-14b"].dit, heads=card.heads)
        return Network(dit=dit, stride=(card.frame_step, card.multiple // 2, card.multiple // 2), guessed=True)


def partition_for(settings: Settings, card: ModelCard) -> Partition:
    """The partition of an engine that is given none: the setting's, or, if that is auto, over as many of the GPUs as
    a clip of the model's own size can use.

    Raises CannotFit, and ModelNotFound for a model whose folder is not on this machine.
    """
    if settings.partition != AUTO:
        return Partition.parse(settings.partition)
    gpu, count = gpus_of(settings)
    network = network_of(card, settings.bytes_each)
    own = Work(size=ClipShape(card.width, card.height, card.frames), steps=card.steps, guided=card.guidance != 1)
    ways = (shared_partition(network, [own], n, gpu) for n in range(count, 0, -1))
    found = next((way for way in ways if way is not None), None)
    if found is None:
        raise CannotFit(f"{own.size} of {card.name} fits on no replica of {settings.gpus}: use more or larger GPUs")
    return found


def gpus_of(settings: Settings) -> tuple[Gpu, int]:
    """The kind and number of the GPUs that engines with partition auto share."""
    assert settings.gpus is not None  # the settings were checked
    count, kind = parse_gpus(settings.gpus)
    return GPUS[kind], count


def gpu_of(settings: Settings) -> Gpu:
    """The device of one rank, as far as the settings say."""
    return gpus_of(settings)[0] if settings.gpus else GPUS["cpu" if settings.device == "cpu" else "h100"]


def as_row(row: ModelRow) -> dict[str, Any]:
    """A line of the list of models; one that was not added has neither parameters nor bytes."""
    files, trained = row.card.get(FILES), row.card.get("trained", ())
    return {
        "name": row.name,
        "digest": row.digest,
        "parameters": row.card.get("parameters"),
        "bytes": sum(file["bytes"] for file in files) if files else None,
        "trained": ", ".join(trained) or None,
        "dataset": row.dataset_id,
        "created_at": row.created_at,
    }


def _find(settings: Settings, name: str) -> ModelCard | ModelRow:
    """Find a model; the ledger, where there is one, is only asked if it is neither shipped nor a folder."""
    try:
        return find_model(name)
    except ModelNotFound as error:
        if settings.database_url is None or not NAME.fullmatch(name):
            raise
        not_here = str(error)
    try:
        with reading(settings) as session:
            rows = added_models(session, name)
    except OperationalError:
        raise ModelNotFound(f"{not_here}; whether one was added under this name the ledger does not answer") from None
    return _only(name, rows, f"{not_here}, nor was one added under this name or digest")


def _only(name: str, rows: Sequence[ModelRow], otherwise: str) -> ModelRow:
    """Choose the row that is called so, or whose digest begins so. Raises ModelNotFound."""
    exact = [row for row in rows if row.name == name]
    rows = exact or [row for row in rows if len(name) >= PREFIX]
    if not rows:
        raise ModelNotFound(f"{otherwise}: `rushes models` lists them")
    if len(rows) > 1:
        digests = ", ".join(row.digest[: len(name) + 4] for row in rows)
        raise ModelNotFound(f"model {name!r} is the beginning of several digests ({digests}): give more of it")
    return rows[0]


# --- into the store ---------------------------------------------------------------------------------------------------


def _free_name(name: str, digest: str) -> str:
    """Check that a model may be added under the name, and return it. Raises BadName and NameTaken."""
    if not NAME.fullmatch(name):
        raise BadName(
            f"the name {name[:120]!r} must begin with a letter or digit and hold letters, digits and ._- only, at most "
            "100: give the model another with --name"
        )
    if (SHIPPED / name).is_dir() and find_model(name).digest != digest:
        raise NameTaken(f"the name {name!r} is that of a shipped model: give this one another with --name")
    return name


def _put(store: Store, path: Path) -> dict[str, Stored]:
    """Store all files of a model, rewriter and captioner; those that are there already are not sent again."""
    return {file.relative_to(path).as_posix(): store.put(file) for file in (*covered_files(path), *_beside(path))}


def _beside(path: Path) -> list[Path]:
    """The files of rewriter and captioner, of which the model's digest says nothing."""
    files = (file for name in BESIDE for file in (path / name).rglob("*"))
    return sorted(f for f in files if f.suffix in (".json", ".safetensors", ".txt") and f.is_file())


def _mend(store: Store, path: Path, row: ModelRow) -> dict[str, Stored]:
    """Send again what the store has lost of a model. Raises BadCheckpoint for another rewriter or captioner."""
    files = _files(row)
    beside = {file.relative_to(path).as_posix(): file_digest(file) for file in _beside(path)}
    if beside != {file.name: file.sha256 for file in files if _is_beside(file)}:
        raise BadCheckpoint(
            f"{path} brings another rewriter or captioner than when it was added as {row.name}, and these go with the "
            "model: a new name in its rushes.json makes it another model, which can be added"
        )
    facts = {file: store.stat(blob_key(file.sha256)) for file in files}
    lost = [file for file, there in facts.items() if there is None or there.bytes != file.bytes]
    return {file.name: store.put(path / file.name) for file in lost}


# --- out of the store -------------------------------------------------------------------------------------------------


def _cached(settings: Settings, row: ModelRow) -> Path:
    return settings.home / CACHE / row.digest


def _fetched(settings: Settings, row: ModelRow) -> ModelCard:
    """Fetch the files that are not here yet. The folder appears under its name when all of it is here and proven.

    A second process waits for the first. Files that a killed process has fetched are not fetched again.
    """
    folder = _cached(settings, row)
    while not in_use(folder):
        with FileLock(folder.with_name(f"{row.digest}.lock")):
            if not folder.is_dir():
                part, store = folder.with_name(f"{row.digest}.part"), settings.open_store()
                if settings.model_cache is not None:
                    make_room(folder, sum(file.bytes for file in _files(row)), settings.model_cache)
                for file in _files(row):
                    _fetch(store, row, file, part / file.name)
                part.rename(folder)
    card = find_model(folder)
    if card.digest != row.digest:
        raise BrokenModel(f"{folder} has changed since model {row.name} was fetched: delete it, and try again")
    return replace(card, name=row.name)


def _fetch(store: Store, row: ModelRow, file: ModelFile, target: Path) -> None:
    """Fetch one file and prove it by its digest; an error leaves nothing of it. Raises BrokenModel."""
    if target.is_file() and target.stat().st_size == file.bytes:  # it got its name after it was proven
        return
    key, digest = blob_key(file.sha256), hashlib.sha256()
    half, mend = target.with_name(f"{target.name}.half"), "`rushes models add` with its folder puts it there again"
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with store.open(key) as source, atomic_path(target, part=half) as part, part.open("wb") as sink:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                sink.write(chunk)
            if digest.hexdigest() != file.sha256:
                raise BrokenModel(
                    f"{file.name} of model {row.name}: the store's {key} has the sha256 {digest.hexdigest()}: "
                    f"delete that object; {mend}"
                )
    except NoSuchKey:
        raise BrokenModel(f"{file.name} of model {row.name} is not in the store ({key}): {mend}") from None


def _files(row: ModelRow) -> tuple[ModelFile, ...]:
    """The files of a model that was added.

    Raises BrokenModel for a list that does not give the model's digest, or leads out of a folder.
    """
    files = tuple(ModelFile(**said) for said in row.card[FILES])
    inside = all(
        not PurePosixPath(file.name).is_absolute() and ".." not in PurePosixPath(file.name).parts for file in files
    )
    if not inside or _digest(files) != row.digest:
        raise BrokenModel(
            f"the ledger's list of files of model {row.name} is not that of {row.digest}: somebody has changed the "
            "row; put back what it was"
        )
    return files


def _digest(files: Iterable[ModelFile]) -> str:
    """The digest of a model with these files."""
    return digest_of((file.name, file.sha256) for file in files if not _is_beside(file))


def _is_beside(file: ModelFile) -> bool:
    return file.name.split("/")[0] in BESIDE
