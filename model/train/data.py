"""Where training clips come from: the procedural world, or a folder of somebody's own videos and images.

A data set is a list of cuts: which stretch of which file becomes a clip of which shape, with its caption. `scan` lists
those of a folder, `world_cuts` those of the world, and a `Source` makes them pixels. In a folder a caption comes from a
file of the same name (`ball.txt` or `ball.json` beside `ball.mp4`), or from a table `metadata.jsonl` or `metadata.csv`
with the columns `file_name` and `caption` (or `text`, or `prompt`). Nothing here loads torch.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from itertools import groupby, islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.Image import Resampling

from model.config import ClipShape
from model.media.decode import at_rate, fit, opened
from model.train.files import atomic_path
from model.world.captions import describe
from model.world.render import render
from model.world.scene import Scene, sample_scene

FPS = 8
VIDEOS = frozenset((".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif"))
IMAGES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp"))
TABLES = ("metadata.jsonl", "metadata.csv")
CAPTION = ("caption", "text", "prompt")  # names of the caption in a table or a JSON file, the first that is there
LIST = "cuts.jsonl"  # in a training's work folder

Clip = NDArray[np.uint8]  # [T, H, W, 3]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Clips of one shape: how many are rendered, what share of the steps they get, and how many make a batch."""

    shape: ClipShape
    clips: int
    share: float
    batch: int

    @property
    def name(self) -> str:
        return str(self.shape)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Bucket:
        """With the shape as [width, height, frames]. Raises BadData."""
        try:
            width, height, frames = values["shape"]
            given: dict[str, Any] = {**values, "shape": ClipShape(width, height, frames)}
            return cls(**given)
        except (KeyError, TypeError, ValueError):
            wanted = '{"shape": [width, height, frames], "clips": ..., "share": ..., "batch": ...}'
            raise BadData(f"recipe: bucket {dict(values)} must be {wanted}") from None


BUCKETS = (
    Bucket(shape=ClipShape(64, 64, 17), clips=24_000, share=0.54, batch=20),
    Bucket(shape=ClipShape(96, 64, 17), clips=3_000, share=0.11, batch=12),
    Bucket(shape=ClipShape(64, 96, 17), clips=1_500, share=0.06, batch=12),
    Bucket(shape=ClipShape(64, 64, 9), clips=2_000, share=0.08, batch=32),
    Bucket(shape=ClipShape(96, 64, 9), clips=1_000, share=0.04, batch=20),
    Bucket(shape=ClipShape(64, 64, 1), clips=4_000, share=0.05, batch=48),
    Bucket(shape=ClipShape(96, 64, 1), clips=1_500, share=0.03, batch=32),
    Bucket(shape=ClipShape(64, 64, 33), clips=1_500, share=0.05, batch=10),
    Bucket(shape=ClipShape(128, 128, 17), clips=1_000, share=0.04, batch=5),
)


class BadData(ValueError):
    """The folder cannot be trained on. The message says which file, and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A stretch of a file that becomes one clip."""

    file: str  # below the folder, with forward slashes; of the world SHAPE/NUMBER
    sha256: str  # of the whole file; of the world: of the scene
    start: int  # its first frame, counted at the data set's frames per second
    shape: ClipShape
    caption: str = ""


@dataclass(slots=True)
class Scanned:
    cuts: list[Cut] = field(default_factory=list[Cut])
    unused: list[str] = field(default_factory=list[str])  # a sentence for each file that gave no clip

    @property
    def shapes(self) -> Counter[ClipShape]:
        return Counter(cut.shape for cut in self.cuts)


def scan(folder: Path, shapes: Sequence[ClipShape], fps: int) -> Scanned:
    """Cuts every video and image below the folder, in the order of their names.

    A video is sampled at `fps` and cut from its beginning into clips of the longest lengths that fit; what is left
    over at its end is not used. Of the shapes, the one nearest in width to height is taken. All clips of a file have
    the file's caption. A file that cannot be used is named in `unused`; bad tables raise BadData.
    """
    if not folder.is_dir():
        raise BadData(f"{folder} is not a folder")
    files = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in VIDEOS | IMAGES and p.is_file()]
    if not files:
        raise BadData(f"{folder} has no videos or images ({' '.join(sorted(VIDEOS | IMAGES))})")
    told, scanned = _tables(folder), Scanned()
    for path in files:
        name = path.relative_to(folder).as_posix()
        try:
            width, height, frames = _measure(path, fps)
            starts = list(_stretches(width, height, frames, shapes))
            caption = _sidecar(path) or told.get(name, "")
        except (OSError, ValueError) as error:
            scanned.unused.append(f"{name}: {' '.join(str(error).split())}")
            continue
        if not starts:
            shortest = min(shape.frames for shape in shapes)
            scanned.unused.append(f"{name}: {frames} frames at {fps} a second, a clip needs {shortest}")
            continue
        sha256 = _sha256(path)
        scanned.cuts += [
            Cut(file=name, sha256=sha256, start=start, shape=shape, caption=caption) for start, shape in starts
        ]
    return scanned


def scene_of(seed: int, bucket: str, index: int) -> Scene:
    """The scene of one clip; combinations in `world.held_out` never come up."""
    return sample_scene(random.Random(f"{seed}/{bucket}/{index}"), unseen=False)


def world_cuts(seed: int, buckets: Iterable[Bucket]) -> Iterator[Cut]:
    """The clips of the world, each with one of its true captions (training draws another at every step)."""
    for bucket in buckets:
        for index in range(bucket.clips):
            scene = scene_of(seed, bucket.name, index)
            yield Cut(
                file=f"{bucket.name}/{index}",
                sha256=hashlib.sha256(scene.to_json().encode()).hexdigest(),
                start=0,
                shape=bucket.shape,
                caption=describe(
                    scene, random.Random(f"{seed}/{bucket.name}/{index}/caption"), frames=bucket.shape.frames
                ),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The source of a list of cuts: a folder, or the world of this seed."""

    folder: Path | None = None
    seed: int = 0
    fps: int = FPS

    def read(self, cuts: Sequence[Cut]) -> Iterator[Clip]:
        """The pixels of each cut, in order, neighbours of one file decoded once. Raises BadData for changed files."""
        for name, group in groupby(cuts, lambda cut: cut.file):
            some = list(group)
            if self.folder is None:
                yield from (self._rendered(cut) for cut in some)
                continue
            if _sha256(self.folder / name) != some[0].sha256:
                raise BadData(f"{name} has changed since its data set was written down: write it down anew")
            yield from _cut(self.folder / name, some, self.fps)

    def _rendered(self, cut: Cut) -> Clip:
        shape, (bucket, _, index) = cut.shape, cut.file.partition("/")
        scene = scene_of(self.seed, bucket, int(index))
        return render(scene, width=shape.width, height=shape.height, frames=shape.frames)


def digest(cuts: Iterable[Cut], fps: int) -> str:
    """sha256 of all that a data set consists of: bytes, stretches, shapes and captions; not its place or file names."""
    whole = hashlib.sha256(f"{fps}\n".encode())
    for cut in cuts:
        whole.update(json.dumps([cut.sha256, cut.start, str(cut.shape), cut.caption]).encode() + b"\n")
    return whole.hexdigest()


def save_list(path: Path, source: Source, cuts: Iterable[Cut]) -> None:
    """Writes the list of a data set's cuts, with what they are cut from in its first line."""
    with atomic_path(path) as part, part.open("w", encoding="utf-8") as file:
        head = {"folder": str(source.folder) if source.folder else None, "seed": source.seed, "fps": source.fps}
        file.write(json.dumps(head) + "\n")
        for cut in cuts:
            file.write(json.dumps(asdict(cut), ensure_ascii=False) + "\n")


def load_list(path: Path) -> tuple[Source, list[Cut]]:
    """The list that `save_list` wrote."""
    with path.open(encoding="utf-8") as file:
        head = json.loads(next(file))
        rows = [json.loads(line) for line in file]
    folder = Path(head["folder"]) if head["folder"] else None
    cuts = [replace(Cut(**row), shape=ClipShape(**row["shape"])) for row in rows]
    return Source(folder=folder, seed=head["seed"], fps=head["fps"]), cuts


# --- what is in a file ------------------------------------------------------------------------------------------------


def _measure(path: Path, fps: int) -> tuple[int, int, int]:
    """(width, height, frames at `fps`); 1 frame for an image. Decodes the first frame, so what passes can be read."""
    with opened(path) as file:
        _, first = next(file.shown())
        return (*first.size, max(1, math.floor(file.seconds * fps + Fraction(1, 1000))))


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _stretches(width: int, height: int, frames: int, shapes: Sequence[ClipShape]) -> Iterator[tuple[int, ClipShape]]:
    """(start, shape) of the clips that a file of this size gives."""
    fitting = [shape for shape in shapes if shape.frames <= frames]
    moving = [shape for shape in fitting if shape.frames > 1]
    fitting = moving or fitting  # what is left of a video after its clips is no picture of its own
    if not fitting:
        return

    def lean(shape: ClipShape) -> float:
        return abs(math.log(shape.width / shape.height) - math.log(width / height))

    best = min(map(lean, fitting))
    lengths = sorted((shape for shape in fitting if lean(shape) == best), key=lambda shape: -shape.frames)
    start = 0
    while shape := next((shape for shape in lengths if start + shape.frames <= frames), None):
        yield start, shape
        start += shape.frames


def _cut(path: Path, cuts: Sequence[Cut], fps: int) -> Iterator[Clip]:
    frames, at = _frames(path, fps), 0
    for cut in cuts:  # in the order of their starts, without overlap
        some = islice(frames, cut.start - at, cut.start - at + cut.shape.frames)
        yield np.stack([fit(image, cut.shape.width, cut.shape.height, Resampling.LANCZOS) for image in some])
        at = cut.start + cut.shape.frames


def _frames(path: Path, fps: int) -> Iterator[Image.Image]:
    """The picture that is shown at each 1/fps of a second; the last one for ever, since its own end is not known."""
    picture = None
    with opened(path) as file:
        for picture in at_rate(file, fps, sys.maxsize):
            yield picture
    assert picture is not None
    while True:
        yield picture


# --- captions ---------------------------------------------------------------------------------------------------------


def _sidecar(path: Path) -> str:
    text, data = path.with_suffix(".txt"), path.with_suffix(".json")
    if text.is_file():
        return " ".join(text.read_text(encoding="utf-8").split())
    if data.is_file():
        values: Any = json.loads(data.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or _caption(values) is None:
            raise ValueError(f"{data.name} must be an object with one of: {', '.join(CAPTION)}")
        return _caption(values) or ""
    return ""


def _caption(values: Mapping[str, Any]) -> str | None:
    found = next((values[name] for name in CAPTION if values.get(name) is not None), None)
    return None if found is None else " ".join(str(found).split())


def _tables(folder: Path) -> dict[str, str]:
    """Captions by file from every table below the folder. Raises BadData with all that is wrong with them."""
    captions: dict[str, str] = {}
    wrong: list[str] = []
    for path in (p for name in TABLES for p in sorted(folder.rglob(name))):
        where = path.relative_to(folder)
        for line, values in _rows(path, wrong):
            name, caption = values.get("file_name"), _caption(values)
            if not isinstance(name, str) or caption is None:
                wrong.append(f"{where}:{line}: needs file_name and one of: {', '.join(CAPTION)}")
            elif not (path.parent / name).is_file():
                wrong.append(f"{where}:{line}: there is no file {name!r} beside it")
            else:
                captions[PurePosixPath(where.parent.as_posix(), name).as_posix()] = caption
    if wrong:
        raise BadData("\n".join(wrong))
    return captions


def _rows(path: Path, wrong: list[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            reader = csv.DictReader(file)
            for row in reader:
                yield reader.line_num, row
            return
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except ValueError as error:
                wrong.append(f"{path.name}:{number}: is not JSON ({error})")
                continue
            yield number, values if isinstance(values, dict) else {}
