"""Finding what clips are made from: pictures and videos in the store or in a folder, and clips of history.

All that is found is read whole, once, before anything is planned: a source that cannot be read is bad input, not a
failed rendering. The run of a request puts its sources into the store under their digest, so that an engine on any
machine gets the very bytes that were checked.
"""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import Callable, Mapping
from pathlib import Path

from sqlalchemy.orm import Session, sessionmaker

from db.artifacts import NewArtifact
from db.clips import clip_by
from db.tables import ACTIVE
from flows.request.files import BadUri, InStore, locate
from flows.request.modes import BadSource, MediaSource
from flows.request.unpack import BadFile
from infra.files import NO_ADDRESS, is_address
from infra.store.contract import BLOBS, NoSuchKey, Store
from model.media.decode import MAX_BYTES, Media, pixels_in, probe
from model.media.errors import BadMedia

Sessions = sessionmaker[Session]
MAX_PIXELS = 2**34  # that the files of one request may decode to: some minutes of one core


class Sources:
    """The sources that a request's lines name, each looked up once."""

    def __init__(
        self, ledgers: Sessions | None, read: Callable[[str, str], tuple[bytes, str]], has: Callable[[str], bool]
    ) -> None:
        """`read(key, name)` gives the bytes of an image or a video and their key in the store, '' if not there yet.

        `has(key)`: the store has an object under this key.
        """
        self.ledgers, self.read, self.has = ledgers, read, has
        self.found: dict[tuple[bool, str], MediaSource | BadSource | None] = {}
        self.probed: dict[str, Media] = {}  # by sha256
        self.pixels = 0  # that decoding all files gives, each once

    def find(self, kind: str, name: str) -> MediaSource | None:
        """The source that a line's `image`, `video` or `clip` names; None for a clip without a ledger to look in.

        Raises BadSource.
        """
        place = kind == "clip", name
        if place not in self.found:
            try:
                self.found[place] = self._clip(name) if kind == "clip" else self._file(kind, name)
            except BadSource as error:
                self.found[place] = error
        found = self.found[place]
        if isinstance(found, BadSource):
            raise found
        return found

    def artifacts(self) -> list[NewArtifact]:
        """The files among what was found, as the ledger wants to know of them."""
        kept = {
            source.sha256: source for source in self.found.values() if isinstance(source, MediaSource) and source.key
        }
        return [
            NewArtifact(sha256=each.sha256, key=each.key, bytes=each.bytes, media_type=each.media_type)
            for each in kept.values()
        ]

    def _clip(self, name: str) -> MediaSource | None:
        if self.ledgers is None:
            return None
        with self.ledgers() as session:
            clip = clip_by(session, name)
        if clip is None:
            raise BadSource("is no clip of the ledger: `rushes history` lists those there are")
        if clip.artifact is None:
            rest = "its request must finish first" if clip.status in ACTIVE else "it has no frames"
            raise BadSource(f"is {clip.status}, not done: {rest} (clips of one request cannot be made from each other)")
        if not self.has(clip.artifact.key):
            raise BadSource("is done, but the store has lost its bytes: `rushes audit --repair` has it rendered again")
        made = clip.settings
        return MediaSource(
            sha256=clip.artifact.sha256,
            key=clip.artifact.key,
            bytes=clip.artifact.bytes,
            media_type=clip.artifact.media_type,
            width=made.width,
            height=made.height,
            frames=made.frames,
            fps=0.0 if made.frames == 1 else float(made.fps),
            clip_id=clip.clip_id,
        )

    def _file(self, kind: str, name: str) -> MediaSource:
        data, key = self.read(kind, name)
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 not in self.probed:
            self.probed[sha256] = self._probe(data)
        media = self.probed[sha256]
        return MediaSource(
            sha256=sha256,
            key=key,
            bytes=len(data),
            media_type=media.media_type,
            width=media.width,
            height=media.height,
            frames=media.frames,
            fps=media.fps,
        )

    def _probe(self, data: bytes) -> Media:
        """Decodes a file, unless its headers say that the request's files are too much work together."""
        try:
            pixels = self.pixels + pixels_in(data)
            if pixels > MAX_PIXELS:
                raise BadSource(
                    f"brings the request's sources to {pixels:,} pixels of all their frames, the most is "
                    f"{MAX_PIXELS:,}: use shorter or smaller ones, or several requests"
                )
            self.pixels = pixels
            return probe(data)
        except BadMedia as error:
            raise BadSource(str(error)) from None


def for_run(ledgers: Sessions, store: Store, folder: Path, files: Mapping[str, str]) -> Sources:
    """The sources of a request that is being run: what is not in the store under its digest is put there."""

    def read(kind: str, name: str) -> tuple[bytes, str]:
        try:
            where = locate(f"store:{files[name]}" if name in files else name, folder, kind)
        except (BadUri, BadFile) as error:
            raise BadSource(f"cannot be used: {error}") from None
        data = from_store(store, where.key) if isinstance(where, InStore) else from_file(where.path)
        if isinstance(where, InStore) and where.key.startswith(BLOBS):
            if hashlib.sha256(data).hexdigest() != where.key.rpartition("/")[2]:
                raise BadSource(
                    "has other bytes in the store than its digest says: `rushes audit` looks at all of them"
                )
            return data, where.key
        return data, store.put(data, mimetypes.guess_type(name)[0] or "application/octet-stream").key

    return Sources(ledgers, read, store.exists)


def for_submitter(
    ledgers: Sessions | None, store: Callable[[], Store], folder: Path, files: dict[str, Path]
) -> Sources:
    """The sources of a file that is being submitted: names are paths beside it. Fills `files` with those."""

    def read(kind: str, name: str) -> tuple[bytes, str]:
        if name.startswith("store:"):
            key = name.removeprefix("store:")
            return from_store(store(), key), key
        if is_address(name):
            raise BadSource(f"cannot be used: name a file beside the prompts, or store:KEY; {NO_ADDRESS}")
        files[name] = folder / name
        return from_file(files[name]), ""

    return Sources(ledgers, read, lambda key: store().exists(key))


def from_store(store: Store, key: str) -> bytes:
    """Raises BadSource, and StoreUnavailable."""
    try:
        there = store.stat(key)
        if there is None:
            raise BadSource("is not in the store")
        if there.bytes > MAX_BYTES:
            raise BadSource(f"has {there.bytes:,} bytes, the most is {MAX_BYTES:,}")
        return store.get(key)
    except (NoSuchKey, ValueError) as error:
        raise error if isinstance(error, BadSource) else BadSource(f"cannot be used: {error}") from None


def from_file(path: Path) -> bytes:
    """Raises BadSource."""
    try:
        if not path.is_file():
            raise BadSource(f"is no file: {path} does not exist" if not path.exists() else "is not a file")
        if path.stat().st_size > MAX_BYTES:
            raise BadSource(f"has {path.stat().st_size:,} bytes, the most is {MAX_BYTES:,}")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, BadSource):
            raise
        raise BadSource(f"cannot be read ({error})") from None
