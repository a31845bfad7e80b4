"""Some clips of a request as a table whose pictures move: what failed first, then a spread over the request."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from sqlalchemy.orm import Session

from db import history
from db.requests import Progress
from db.tables import ClipStatus
from db.view import HistoryRow
from flows.generate.status import as_text, count_of, linked, percent_of, table
from flows.web.links import NO_LINKS, Links
from infra.store.contract import NoSuchKey, Store
from model.media.decode import read_frames
from model.media.errors import BadMedia
from model.media.windows import Frames

CLIPS = 24  # in the table, at most
BAD = 12  # of them those that ended badly, at most
ADDRESS = 12_000  # characters of a picture's address, at most; the table is in Prefect's database, and in its events
SECONDS, FPS = 3.0, 8.0  # of a clip, from its beginning
SHAPES = (
    (128, 24, 60),
    (128, 24, 35),
    (96, 24, 35),
    (96, 12, 30),
    (64, 12, 25),
    (64, 6, 15),
    (64, 1, 5),
)  # side, frames, quality
MARKS = (0.0, 10.0, 50.0)  # percent of the request after which the table is made anew
APART = 60.0  # seconds between two of them, at least
ENDED_BADLY = (ClipStatus.FAILED, ClipStatus.QUARANTINED, ClipStatus.REJECTED)


@dataclass(slots=True)
class Occasions:
    """When to make the table while clips are rendered: a few times, however long that takes."""

    made: int = 0  # of MARKS
    not_before: float | None = None

    def due(self, progress: Progress, now: float) -> bool:
        """now: seconds of any clock that only goes forward."""
        if self.not_before is None:
            self.not_before = now + APART
        passed = sum(percent_of(progress) > mark for mark in MARKS)
        if passed <= self.made or now < self.not_before or not progress.waiting:
            return False
        self.made, self.not_before = passed, now + APART
        return True


def pick(session: Session, progress: Progress) -> list[HistoryRow]:
    """At most CLIPS of the request: some that ended badly, then those that are done, evenly spread over the file."""
    bad = history.first_clips(session, progress.request_id, ENDED_BADLY, limit=BAD)
    done = progress.counts[ClipStatus.DONE]
    room = CLIPS - len(bad)
    return bad + history.spread_clips(session, progress.request_id, every=-(-done // room) or 1, limit=room)


def clips_text(
    rows: Sequence[HistoryRow],
    progress: Progress,
    thumbnail: Callable[[HistoryRow], str | None],
    links: Links = NO_LINKS,
) -> str:
    """The table. thumbnail: the address of a clip's picture, None where there is none."""
    lines = [as_row(row, thumbnail(row), links) for row in rows]
    shown = f"{len(rows):,} of {count_of(progress.added, 'clip')}"
    if progress.waiting:
        shown += f", of which {progress.waiting:,} are still to come"
    heads = ["", "prompt", "seed", "clip", "status", "error"]
    manifest = links.manifest(progress.request_id)
    everything = f"[the manifest]({manifest}), or " if manifest else ""
    everything += f"`rushes export {progress.request_id} FOLDER`"
    return f"# {shown}\n\n{table(heads, lines)}\n\nAll of them: {everything}.\n"


def as_row(row: HistoryRow, picture: str | None, links: Links) -> list[str]:
    """A clip's line of the table: its id leads to where it plays, or to all that is known of it."""
    address = links.clip(row.clip_id, row.media_type) if row.object_key else links.facts(row.clip_id)
    status = f"{row.status} (reused)" if row.reused else str(row.status)
    seed = "" if row.seed is None else str(row.seed)
    error = row.error.splitlines()[0] if row.error else ""
    return [
        f"![{row.clip_id}]({picture})" if picture else "",  # Prefect shows no picture inside a link
        as_text(row.prompt),
        seed,
        linked(row.clip_id, address),
        status,
        as_text(error),
    ]


def thumbnail_of(store: Store, row: HistoryRow) -> str | None:
    """The address of a stored clip's moving picture, the picture itself in it; None where it has no readable bytes."""
    if row.object_key is None or row.settings is None:
        return None
    made = row.settings
    scale = min(1.0, max(side for side, _, _ in SHAPES) / max(made.width, made.height))
    width, height = max(1, round(made.width * scale)), max(1, round(made.height * scale))
    try:
        data = store.get(row.object_key)
        return moving(read_frames(data, width=width, height=height, fps=FPS, most=int(SECONDS * FPS)))
    except (BadMedia, NoSuchKey):
        return None


def moving(frames: Frames) -> str:
    """Frames [T, H, W, 3] as the address of an animated WebP that moves at FPS, of at most ADDRESS characters.

    The largest and finest of SHAPES that fits; the last of them always does.
    """
    address = ""
    for side, most, quality in SHAPES:
        step = -(-len(frames) // most)
        pictures = [Image.fromarray(np.ascontiguousarray(frame)) for frame in frames[::step]]
        for picture in pictures:
            picture.thumbnail((side, side))
        file = io.BytesIO()
        first, *rest = pictures
        first.save(
            file, "WEBP", save_all=True, append_images=rest, duration=round(1000 * step / FPS), loop=0, quality=quality
        )
        address = f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
        if len(address) <= ADDRESS:
            break
    return address
