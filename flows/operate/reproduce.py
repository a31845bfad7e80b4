"""Reproduction: clips of history are rendered again and compared with what is stored.

The contract: one recipe on one partition of one kind of machine (threads and micro-batch included) gives the same
bytes, at any time. On another partition sums are added up in another order, and pixels differ by rounding.

Of a clip its file is kept, so files are compared. They are written with the metadata of the clip they were first
rendered for: what is equal is equal to the byte. Where bytes differ, frames are compared as a player decodes them.

The engine runs here, in the foreground, and leases nothing: the ledger's own engines neither see it nor wait for it.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

from sqlalchemy.orm import Session, sessionmaker

from db.artifacts import NewArtifact
from db.reproductions import NewReproduction, NoOriginal, Original, add_reproduction, original
from flows.library.models import resolve
from flows.render.clip import WrongDigest, as_file, proven, spec_of
from flows.render.engine import devices_of, engine_of
from flows.render.worker import code_version, machine
from flows.settings import Settings
from flows.show import printable, terminal_bars
from infra.store.contract import NoSuchKey, Store
from model.config import Partition
from model.engine.clip import RankDied, RankHung, RenderedClip, RenderFailed
from model.engine.engine import Engine
from model.loading.card import ModelCard, ModelNotFound
from model.media.compare import Difference, compare
from model.media.decode import every_frame
from model.media.errors import BadMedia

Verdict = Literal["identical", "identical frames", "differs", "failed"]
COLUMNS = ["clip_id", "partition", "verdict", "psnr", "largest", "first_frame", "seconds", "detail"]


class BadPartition(ValueError):
    """The model cannot be divided like this. The message says how it can be."""

    exit_code = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ReproductionJob:
    """A clip to render again."""

    original: Original
    card: ModelCard
    partition: Partition
    exact: bool = False  # without its step cache

    @property
    def step_cache(self) -> float | None:
        return None if self.exact else self.original.made_for.settings.step_cache


@dataclass(frozen=True, slots=True, kw_only=True)
class ReproductionResult:
    """A clip's rendering compared with what is stored."""

    clip_id: str
    partition: str
    verdict: Verdict
    psnr: float | None = None  # dB; None where nothing differs, and where nothing could be compared
    largest: int | None = None  # difference of any value, of 255
    first_frame: int | None = None  # that differs, from 0
    seconds: float | None = None  # of the engine
    detail: str = ""
    sound: bool = True  # the store holds what the ledger says, of the very length and size that was rendered

    def __str__(self) -> str:
        if self.verdict == "differs":
            return f"{self.psnr:.2f} dB, largest difference {self.largest} of 255, first in frame {self.first_frame}"
        return self.detail if self.verdict == "failed" else self.verdict

    def passes(self, tolerance_db: float | None) -> bool:
        """True if the clip is identical, or its PSNR against what is stored at least `tolerance_db`."""
        if self.verdict == "failed" or not self.sound:
            return False
        return self.psnr is None or (tolerance_db is not None and self.psnr >= tolerance_db)


class ProgressDisplay(Protocol):
    """A display of how far a reproduction is."""

    def say(self, message: str) -> None: ...

    def step(self, clip_id: str, step: int, steps: int) -> None: ...

    def done(self, reproduced: ReproductionResult) -> None: ...


def plan(
    settings: Settings,
    ledgers: sessionmaker[Session],
    clip_ids: Sequence[str],
    partition: str | None = None,
    *,
    exact: bool = False,
) -> tuple[list[ReproductionJob], list[str]]:
    """Plan a job for each clip, on its own partition if none is given, and a sentence for each that cannot be rendered.

    exact: every step in full, also of clips that were made with a step cache.

    Raises BadPartition, and BrokenModel for a model that the store has lost.
    """
    try:
        asked = Partition.parse(partition) if partition is not None else None
    except ValueError as error:
        raise BadPartition(str(error)) from None
    jobs: list[ReproductionJob] = []
    problems: list[str] = []
    cards: dict[tuple[str, str], ModelCard] = {}
    for clip_id in dict.fromkeys(clip_ids):
        try:
            with ledgers() as session:
                found = original(session, clip_id)
            model = found.model, found.model_digest
            if model not in cards:
                cards[model] = weights_of(settings, *model)
        except NoOriginal as error:
            problems.append(str(error))
        except ModelNotFound as error:
            problems.append(f"clip {clip_id}: {error}")
        else:
            own = Partition.parse(found.partition)
            job = ReproductionJob(original=found, card=cards[model], partition=asked or own, exact=exact)
            try:
                job.partition.check_heads(job.card.heads)
            except ValueError as error:
                raise BadPartition(f"partition {job.partition} of {job.card.name}: {error}") from None
            jobs.append(job)
    return jobs, problems


def weights_of(settings: Settings, name: str, digest: str) -> ModelCard:
    """Resolve the very weights that a clip was made with: under the name that was asked for, else by their digest.

    Raises ModelNotFound, and BrokenModel.
    """
    known = f"its model {name} ({digest[:12]}) is not known here any more"
    mend = "`rushes models add FOLDER` with its weights makes them known"
    try:
        card = resolve(settings, name)
        if card.digest == digest:
            return card
        known += f": {name} is {card.digest[:12]} now"
    except ModelNotFound:
        pass
    try:
        return resolve(settings, digest)
    except ModelNotFound:
        raise ModelNotFound(f"{known}; {mend}") from None


def reproduce(
    settings: Settings, ledgers: sessionmaker[Session], jobs: Sequence[ReproductionJob], progress: ProgressDisplay
) -> list[ReproductionResult]:
    """Render clip after clip, an engine start for all of one model and partition, and records every comparison.

    A clip that fails does not stop the others. Raises StartFailed, StoreUnavailable.
    """
    store, device = settings.open_store(), machine(settings)
    results: list[ReproductionResult] = []
    for (card, partition), group in grouped(jobs):
        progress.say(f"loading {card.name} on {partition}")
        with devices_of(settings, partition) as gpus, engine_of(settings, card, partition, gpus) as engine:
            for job in group:
                reproduced, row = reproduce_clip(job, engine, store, device, progress)
                if row is not None:
                    with ledgers.begin() as session:
                        add_reproduction(session, row)
                results.append(reproduced)
                progress.done(reproduced)
    return results


def grouped(jobs: Iterable[ReproductionJob]) -> list[tuple[tuple[ModelCard, Partition], list[ReproductionJob]]]:
    """Group the jobs that one engine can do."""
    groups: dict[tuple[ModelCard, Partition], list[ReproductionJob]] = {}
    for job in jobs:
        groups.setdefault((job.card, job.partition), []).append(job)
    return list(groups.items())


def reproduce_clip(
    job: ReproductionJob, engine: Engine, store: Store, device: str, progress: ProgressDisplay
) -> tuple[ReproductionResult, NewReproduction | None]:
    """Render one clip and compare it; without a row where nothing could be compared."""

    def failed(reason: str) -> tuple[ReproductionResult, None]:
        clip_id, partition = job.original.clip_id, str(job.partition)
        return ReproductionResult(clip_id=clip_id, partition=partition, verdict="failed", detail=reason), None

    key = job.original.artifact.key
    try:
        stored = store.get(key)
    except NoSuchKey:
        return failed(f"its bytes are not in the store ({key}): `rushes audit --repair` has it rendered again")
    try:
        rendered = render(job, engine, store, progress)
    except (BadMedia, NoSuchKey, WrongDigest) as error:
        return failed(f"its source {error}")
    except (RankDied, RankHung, RenderFailed) as error:  # the ranks are started again for the next clip
        return failed(str(error))
    new, _ = as_file(job.original.made_for, rendered.frames, job.card.name)
    try:
        difference = compare(every_frame(stored), every_frame(new)) if stored != new else None
    except BadMedia as error:
        return failed(f"its bytes in the store ({key}) cannot be compared: the file {error}")
    seconds = sum(rendered.seconds.values())
    row = NewReproduction(
        clip_id=job.original.clip_id,
        partition=str(job.partition),
        device=device,
        code_version=code_version(),
        step_cache=job.step_cache,
        sha256=hashlib.sha256(new).hexdigest(),
        identical=difference is None or difference.nothing,
        psnr=difference and difference.psnr,
        largest=difference.largest if difference else 0,
        seconds=seconds,
    )
    return verdict_on(job.original, stored, difference, row), row


def render(job: ReproductionJob, engine: Engine, store: Store, progress: ProgressDisplay) -> RenderedClip:
    """Render a clip as it was made.

    Raises RankDied, RankHung and RenderFailed; BadMedia, NoSuchKey and WrongDigest for its sources.
    """

    def fetch(source: NewArtifact) -> bytes:
        return proven(store.get(source.key), source)

    spec = replace(spec_of(job.original.made_for, fetch), step_cache=job.step_cache)
    engine.start()  # unless it runs: the clip before may have ended it
    (rendered,) = engine.render([spec], on_step=lambda _, step, steps: progress.step(job.original.clip_id, step, steps))
    return rendered


def verdict_on(
    original: Original, stored: bytes, difference: Difference | None, row: NewReproduction
) -> ReproductionResult:
    """The verdict, with all that may explain a difference."""
    details: list[str] = []
    if difference is not None and not difference.nothing:
        was, now = difference.shapes
        if was != now:
            details.append(f"{was} is stored, {now} was rendered")
        if original.made_for.settings.step_cache != row.step_cache:
            details.append(
                f"the stored one was rendered with a step cache of {original.made_for.settings.step_cache:g}"
            )
        for kind, before, after in (
            ("on", original.partition, row.partition),
            ("on", original.device, row.device),
            ("by", original.code_version, row.code_version),
        ):
            if before not in (None, after):
                details.append(f"the stored one was rendered {kind} {before}")
    sound = hashlib.sha256(stored).hexdigest() == original.artifact.sha256
    if not sound:
        mine = "are" if row.sha256 == original.artifact.sha256 else "neither are"
        details.append(
            f"the store's bytes are not those that the ledger knows; those rendered now {mine} (rushes audit)"
        )
    verdict: Verdict = "differs"
    if row.identical:
        verdict = "identical" if difference is None else "identical frames"
    return ReproductionResult(
        clip_id=original.clip_id,
        partition=row.partition,
        verdict=verdict,
        psnr=row.psnr,
        largest=row.largest,
        first_frame=difference and difference.first,
        seconds=row.seconds,
        detail="; ".join(details),
        sound=sound and (difference is None or difference.shapes[0] == difference.shapes[1]),
    )


def summary(results: Sequence[ReproductionResult]) -> str:
    """A line that sums up all results."""
    count = {verdict: sum(each.verdict == verdict for each in results) for verdict in get_args(Verdict)}
    parts = [f"{count['identical'] + count['identical frames']} of {len(results)} identical"]
    if count["identical frames"]:
        parts[0] += f" ({count['identical frames']} in frames, not in bytes)"
    if differing := [each for each in results if each.psnr is not None and each.largest is not None]:
        lowest, largest = min(each.psnr or 0.0 for each in differing), max(each.largest or 0 for each in differing)
        parts.append(f"{len(differing)} differ: lowest PSNR {lowest:.2f} dB, largest difference {largest} of 255")
    if count["failed"]:
        parts.append(f"{count['failed']} failed")
    return "; ".join(parts)


@contextmanager
def display(clips: int) -> Generator[ProgressDisplay]:
    """Show progress on standard error: a bar on a terminal, else a line for every clip."""
    with terminal_bars() as bars:
        yield _Lines() if bars is None else _Bar(bars, clips)


class _Bar:
    def __init__(self, bars: Any, clips: int) -> None:
        self._bars = bars
        self._task = bars.add_task("", total=clips)

    def say(self, message: str) -> None:
        self._bars.update(self._task, description=printable(message))

    def step(self, clip_id: str, step: int, steps: int) -> None:
        self.say(f"{clip_id}: step {step} of {steps}")

    def done(self, reproduced: ReproductionResult) -> None:
        self._bars.advance(self._task)


class _Lines:
    def say(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    def step(self, clip_id: str, step: int, steps: int) -> None:
        """A line a step would be too many."""

    def done(self, reproduced: ReproductionResult) -> None:
        self.say(f"{reproduced.clip_id}: {reproduced}")
