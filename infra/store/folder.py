"""The contract on a folder: whole files by rename, durable by fsync."""

from __future__ import annotations

import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from infra.store.contract import (
    BLOBS,
    LINK_SECONDS,
    OCTETS,
    Data,
    Listed,
    NoSuchKey,
    Stored,
    StoreUnavailable,
    blob_key,
    check_key,
    check_name,
    check_range,
)
from infra.store.source import Source, measured


class FolderStore:
    """Objects as files below `root`, readable by their owner alone.

    A file is written under `.incoming/`, synced, and renamed to its key: a reader, or the next start after a power
    cut, meets it whole or not at all. Media types lie beside the tree, in `.media/`, as small files of their own.
    Keys are paths, but for what a file system cannot hold, which `_written` escapes.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).absolute()
        self._incoming = self.root / ".incoming"
        with _folder_answers(self.root):
            _make_folder(self._incoming)

    def __repr__(self) -> str:
        return f"FolderStore({str(self.root)!r})"

    def put(self, data: Data, media_type: str = OCTETS) -> Stored:
        with measured(data) as source:
            key = blob_key(source.sha256)
            path = self._path(key)
            with _folder_answers(self.root), suppress(FileNotFoundError):
                os.utime(path)  # before the look: whatever we see below is too young to be swept
            there = self.stat(key)
            if there is not None and there.bytes == source.size:
                with _folder_answers(self.root):
                    _sync_folder(path.parent)  # another writer may have renamed it a moment ago
                return there
            self._write(key, source, media_type)
            return Stored(key, source.sha256, source.size, media_type)

    def put_at(self, key: str, data: Data, media_type: str = OCTETS) -> Stored:
        check_name(key)
        with measured(data) as source:
            self._write(key, source, media_type)
            return Stored(key, source.sha256, source.size, media_type)

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        check_range(start, length)
        with self.open(key) as file:
            file.seek(start)
            return file.read() if length is None else file.read(length)

    def open(self, key: str) -> BinaryIO:
        path = self._path(key)
        with _folder_answers(self.root):
            try:
                return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW))
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise NoSuchKey(f"{key}: not in the store {self.root}") from None

    def stat(self, key: str) -> Stored | None:
        path = self._path(key)
        with _folder_answers(self.root):
            try:
                facts = os.stat(path, follow_symlinks=False)
            except (FileNotFoundError, NotADirectoryError):
                return None
            if not stat.S_ISREG(facts.st_mode):
                return None
            try:
                media_type = self._media(key).read_text()
            except (FileNotFoundError, NotADirectoryError):
                media_type = OCTETS
        digest = key.rpartition("/")[2] if key.startswith(BLOBS) else ""
        return Stored(key, digest, facts.st_size, media_type)

    def exists(self, key: str) -> bool:
        return self.stat(key) is not None

    def list(self, prefix: str = "") -> Iterator[Listed]:
        yield from self._walk(self.root, "", prefix)

    def link(self, key: str, seconds: int = LINK_SECONDS) -> str:
        del seconds  # a file:// link does not end
        return self._path(key).as_uri()

    def delete(self, key: str) -> None:
        self._delete(key, lambda modified: True)

    def delete_stale(self, key: str, before: datetime) -> bool:
        return self._delete(key, lambda modified: modified < before)

    def sweep_unfinished(self, seconds: float) -> int:
        swept, limit = 0, time.time() - seconds
        with _folder_answers(self.root):
            for entry in os.scandir(self._incoming):
                with suppress(FileNotFoundError):
                    if entry.stat(follow_symlinks=False).st_mtime < limit:
                        os.unlink(entry.path)
                        swept += 1
        return swept

    def _path(self, key: str) -> Path:
        return self.root / _written(check_key(key))

    def _media(self, key: str) -> Path:
        return self.root / ".media" / _written(key)

    def _write(self, key: str, source: Source, media_type: str) -> None:
        with _folder_answers(self.root):
            if media_type != OCTETS:
                # First the type, then the bytes: who can read the bytes can read their type. Not synced: after a power
                # cut an object without its type is plain octets, which is a smaller harm than another disk flush.
                self._land(key, self._media(key), [media_type.encode()], sync=False)
            else:
                with suppress(FileNotFoundError, NotADirectoryError):
                    os.unlink(self._media(key))
            self._land(key, self._path(key), source.chunks(), sync=True)

    def _land(self, key: str, path: Path, chunks: Iterator[bytes] | list[bytes], *, sync: bool) -> None:
        fd, name = tempfile.mkstemp(dir=self._incoming)  # 0600
        try:
            with os.fdopen(fd, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            _rename(key, name, path)
            if sync:
                _sync_folder(path.parent)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(name)
            raise

    def _walk(self, folder: Path, above: str, prefix: str) -> Iterator[Listed]:
        """The objects in a folder, whose keys all begin with `above`."""
        with _folder_answers(self.root):
            try:
                entries = list(os.scandir(folder))
            except (FileNotFoundError, NotADirectoryError):
                return
        known: list[tuple[str, bool, str]] = []  # what keys begin with or are, whether it is a folder, its name
        for entry in entries:
            begin = _read(entry.name, entry.is_dir(follow_symlinks=False))
            if begin is not None:
                known.append((above + begin, entry.is_dir(follow_symlinks=False), entry.name))
        found = (
            each for begin, inside, name in sorted(known) for each in self._look(folder / name, begin, inside, prefix)
        )
        # Keys that go on in a folder without a slash may lie between those of their neighbours.
        yield from sorted(found, key=lambda each: each.key) if any(_goes_on(name) for _, _, name in known) else found

    def _look(self, path: Path, begin: str, inside: bool, prefix: str) -> Iterator[Listed]:
        if inside and (begin.startswith(prefix) or prefix.startswith(begin)):
            yield from self._walk(path, begin, prefix)
        elif not inside and begin.startswith(prefix):
            with _folder_answers(self.root), suppress(FileNotFoundError):  # deleted meanwhile
                facts = os.stat(path, follow_symlinks=False)
                if stat.S_ISREG(facts.st_mode):
                    yield Listed(begin, facts.st_size, datetime.fromtimestamp(facts.st_mtime, UTC))

    def _delete(self, key: str, old_enough: Callable[[datetime], bool]) -> bool:
        path = self._path(key)
        with _folder_answers(self.root):
            try:
                facts = os.stat(path, follow_symlinks=False)
                if not stat.S_ISREG(facts.st_mode) or not old_enough(datetime.fromtimestamp(facts.st_mtime, UTC)):
                    return False
                os.unlink(path)
            except (FileNotFoundError, NotADirectoryError):
                return False
            _prune(path.parent, self.root)
            with suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(self._media(key))
                _prune(self._media(key).parent, self.root)
        return True


LONGEST = 255  # bytes of a file's name
_EMPTY, _ON = "%2F", "%3E"  # a part of no characters; behind a name: the part goes on in this folder


def _written(key: str) -> str:
    """The path of a key: itself, where a file system can hold it. Two keys never have one path.

    Escaped as %XX are a dot at the beginning of a part (`.media` is ours), a % that would look like an escape, and
    parts of no characters; parts that are too long for a name go on in a folder.
    """
    return "/".join(_name_of(part) for part in key.split("/"))


def _name_of(part: str) -> str:
    part = re.sub(r"%(?=[0-9A-Fa-f]{2})", "%25", part)
    names: list[str] = []
    while True:
        part = f"%2E{part[1:]}" if part.startswith(".") else part
        if len(raw := part.encode()) <= LONGEST:
            return "/".join([*names, part or _EMPTY])
        begin = raw[: LONGEST - len(_ON)].decode(errors="ignore")  # to the end of a character
        begin = re.sub(r"%[0-9A-Fa-f]?\Z", "", begin)  # nor through an escape
        names.append(begin + _ON)
        part = part[len(begin) :]


def _goes_on(name: str) -> bool:
    return name.endswith(_ON)


def _read(name: str, folder: bool) -> str | None:
    """How keys begin that lie in a folder of this name, or end whose file it is; None where no key has such a path."""
    on = folder and _goes_on(name)
    said = name.removesuffix(_ON) if on else name
    part = "" if said == _EMPTY else re.sub(r"%(25|2E)", lambda found: chr(int(found[1], 16)), said)
    try:
        if _name_of(part) != said:  # somebody else's file, or one of ours beside the tree
            return None
    except UnicodeEncodeError:  # bytes that are no UTF-8
        return None
    return part if on else f"{part}/" if folder else part


@contextmanager
def _folder_answers(root: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise StoreUnavailable(f"store folder {root}: {error}; free space or mend its permissions") from error


def _rename(key: str, name: str, path: Path) -> None:
    """Move a finished file to its place; the folders on the way may be pruned by a deleter meanwhile."""
    for _ in range(100):
        try:
            _make_folder(path.parent)
            os.replace(name, path)
            return
        except FileNotFoundError:
            continue
        except (FileExistsError, NotADirectoryError):
            raise ValueError(f"store key {key!r}: a shorter key of its path is an object already") from None
        except IsADirectoryError:
            if not _prune(path, path.parent):  # a deleter leaves empty folders for a moment
                raise ValueError(f"store key {key!r}: there are objects below it already") from None
    raise StoreUnavailable(f"store folder {path.parent} keeps disappearing while {key} is written")


def _make_folder(folder: Path) -> None:
    """Make a folder and its parents, owner-only and synced into theirs, so that no crash loses the way to a file."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        if not stat.S_ISDIR(os.stat(folder).st_mode):  # FileNotFoundError when a deleter was faster: try again
            raise NotADirectoryError(20, "Not a directory", str(folder)) from None
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _prune(folder: Path, root: Path) -> bool:
    """Remove `folder` and its parents below `root` as far as they are empty; True when `folder` itself went."""
    gone = False
    while folder != root:
        try:
            os.rmdir(folder)
        except OSError:
            return gone
        gone, folder = True, folder.parent
    return gone
