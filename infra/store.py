"""Keeps bytes, under their own digest, in an S3 bucket or in a folder: one contract, two kinds.

It knows nothing of clips, requests or the ledger. What the ledger relies on:

- A key under `blobs/` is the sha256 of its bytes, so it never changes and identical bytes are sent once.
- An object is there whole or not at all, whatever happens to the process that writes it.
- When `put` returns, the bytes survive a crash of this machine (folder) or are acknowledged by the server (S3).
- `put` of bytes that are already there makes them young again (`Listed.modified`), so that a sweep of old objects
  without a row cannot take bytes that somebody is about to record. Sweep only what is older than a day.
"""

import hashlib
import io
import os
import re
import ssl
import stat
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast
from urllib.parse import parse_qs, unquote, urlsplit

import certifi
import urllib3
from minio import Minio
from minio.commonconfig import REPLACE, CopySource
from minio.datatypes import Object
from minio.error import InvalidResponseError, MinioException, S3Error
from minio.helpers import check_bucket_name
from urllib3.exceptions import HTTPError

BLOBS = "blobs/sha256/"
OCTETS = "application/octet-stream"
LINK_SECONDS = 900  # that a signed link lives at most: whoever has it may read the object, and links get about
CHUNK = 1 << 20  # bytes read at a time: bounds memory, large enough to keep the disk and the hash busy
PART = 8 << 20  # S3: larger objects are sent in parts of this size; the client holds up to six of them in memory
MAX_PARTS = 10_000  # S3's own bound

Data = bytes | Path | BinaryIO


class NoSuchKey(KeyError):
    """The store answered, and it has no such object. Nothing to retry; the key is wrong or was deleted."""

    def __str__(self) -> str:  # KeyError shows the repr of its argument, which doubles the quotes
        return str(self.args[0]) if self.args else ""


class StoreUnavailable(Exception):
    """The store did not answer, or refused us. Says nothing about the object: try again, or mend what it names."""


@dataclass(frozen=True, slots=True)
class Stored:
    """An object in the store. `sha256` may be '' when asked by `stat` of a key that is no digest."""

    key: str
    sha256: str
    bytes: int
    media_type: str


@dataclass(frozen=True, slots=True)
class Listed:
    """One line of a listing; `modified` is the store's clock, in UTC."""

    key: str
    bytes: int
    modified: datetime


class Store(Protocol):
    """What both kinds do. All raise StoreUnavailable when the store does not answer, ValueError on a bad key."""

    def put(self, data: Data, media_type: str = OCTETS) -> Stored:
        """Store bytes under their digest; bytes that are there already are not sent again.

        A BinaryIO is read from where it stands to its end; nothing is ever held in memory whole.
        """
        ...

    def put_at(self, key: str, data: Data, media_type: str = OCTETS) -> Stored:
        """Store bytes under a name, over what was there. Not under `blobs/`, and never both `x` and `x/y`."""
        ...

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """The bytes [start, start + length) as a slice would give them. Raises NoSuchKey."""
        ...

    def open(self, key: str) -> BinaryIO:
        """The bytes as a stream to read forwards and close. Raises NoSuchKey."""
        ...

    def stat(self, key: str) -> Stored | None:
        """What is known without reading the bytes; None when there is no such object."""
        ...

    def exists(self, key: str) -> bool: ...

    def list(self, prefix: str = "") -> Iterator[Listed]:
        """All objects whose key begins with `prefix`, in the order of their keys."""
        ...

    def link(self, key: str, seconds: int = LINK_SECONDS) -> str:
        """A URL that a browser can open for that long (a folder's is a file:// one). Does not look for the object."""
        ...

    def delete(self, key: str) -> None:
        """Remove the object; nothing happens when there is none."""
        ...

    def delete_stale(self, key: str, before: datetime) -> bool:
        """Remove the object unless it was put (again) at or after `before`; True when it was removed."""
        ...

    def sweep_unfinished(self, seconds: float) -> int:
        """Remove what killed writers left half-written, if older than that; how many there were."""
        ...


def open_store(url: str, access_key: str | None = None, secret_key: str | None = None) -> Store:
    """The store a URL names; nothing is contacted yet.

    `file:///srv/rushes`, or `s3://bucket?endpoint=host:port` with, when wanted, `&secure=false` (plain HTTP),
    `&region=…`, and `&public=https://…` (the address under which browsers reach the endpoint, for signed links).
    """
    parts = urlsplit(url)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise ValueError(f"store URL {url!r} must name an absolute folder: file:///srv/rushes")
        return FolderStore(Path(unquote(parts.path)))
    if parts.scheme != "s3":
        raise ValueError(f"store URL scheme {parts.scheme!r} must be file or s3")
    if parts.username or parts.password:
        raise ValueError("a store URL must not carry credentials (URLs end up in logs): set the two store keys instead")
    if not parts.hostname or parts.path.strip("/"):
        raise ValueError(f"store URL {url!r} must be s3://BUCKET?endpoint=HOST:PORT, without a folder in the bucket")
    query = {name: values[-1] for name, values in parse_qs(parts.query, strict_parsing=bool(parts.query)).items()}
    if unknown := query.keys() - {"endpoint", "secure", "region", "public"}:
        raise ValueError(f"store URL: option {min(unknown)!r} must be one of endpoint, secure, region, public")
    if not access_key or not secret_key:
        raise ValueError(f"store {parts.hostname!r} in S3 needs an access key and a secret key")
    if query.get("secure", "true") not in ("true", "false"):
        raise ValueError(f"store URL: secure={query['secure']} must be true or false")
    return S3Store(
        query.get("endpoint", "s3.amazonaws.com"),
        access_key,
        secret_key,
        parts.hostname,
        secure=query.get("secure", "true") == "true",
        region=query.get("region", "us-east-1"),
        public=query.get("public"),
    )


def blob_key(sha256: str) -> str:
    """Where bytes of that digest (64 hex digits) live."""
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise ValueError(f"{sha256!r} is no sha256: 64 lower-case hex digits")
    return f"{BLOBS}{sha256[:2]}/{sha256[2:4]}/{sha256}"


def check_key(key: str) -> str:
    """The key itself, when every kind of store can hold it; ValueError otherwise."""
    if len(key) > 900 or not all(_SEGMENT.fullmatch(segment) for segment in key.split("/")):
        raise ValueError(
            f"store key {key[:120]!r} must be parts of up to 200 letters, digits or ._=+@- joined by '/', "
            "at most 900 in all; a part begins with a letter, a digit or '_'"
        )
    return key


_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=+@-]{0,199}")


# ------------------------------------------------------------------------------------------------------- a folder


class FolderStore:
    """Objects as files below `root`, readable by their owner alone.

    A file is written under `.incoming/`, synced, and renamed to its key: a reader, or the next start after a power
    cut, meets it whole or not at all. Media types lie beside the tree, in `.media/`, as small files of their own.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).absolute()
        self._incoming = self.root / ".incoming"
        with _folder_answers(self.root):
            _make_folder(self._incoming)

    def __repr__(self) -> str:
        return f"FolderStore({str(self.root)!r})"

    def put(self, data: Data, media_type: str = OCTETS) -> Stored:
        with _measured(data) as source:
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
        _check_name(key)
        with _measured(data) as source:
            self._write(key, source, media_type)
            return Stored(key, source.sha256, source.size, media_type)

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        _check_range(start, length)
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
        folder = _check_prefix(prefix).rpartition("/")[0]
        yield from self._walk(folder + "/" if folder else "", prefix)

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
        return self.root / check_key(key)

    def _media(self, key: str) -> Path:
        return self.root / ".media" / key

    def _write(self, key: str, source: "_Source", media_type: str) -> None:
        with _folder_answers(self.root):
            if media_type != OCTETS:
                # First the type, then the bytes: who can read the bytes can read their type. Not synced: after a power
                # cut an object without its type is plain octets, which is a smaller harm than another disk flush.
                self._land(key, self._media(key), [media_type.encode()], sync=False)
            else:
                with suppress(FileNotFoundError, NotADirectoryError):
                    os.unlink(self._media(key))
            self._land(key, self._path(key), source.chunks(), sync=True)

    def _land(self, key: str, path: Path, chunks: "Iterator[bytes] | list[bytes]", *, sync: bool) -> None:
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

    def _walk(self, folder: str, prefix: str) -> Iterator[Listed]:
        with _folder_answers(self.root):
            try:
                entries = list(os.scandir(self.root / folder))
            except (FileNotFoundError, NotADirectoryError):
                return
        # A folder sorts as its name with '/', as its keys do among the others in S3.
        named = sorted((entry.name + "/" if entry.is_dir(follow_symlinks=False) else entry.name) for entry in entries)
        for name in named:
            key = folder + name
            if name.startswith(".") or not (key.startswith(prefix) or prefix.startswith(key)):
                continue
            if name.endswith("/"):
                yield from self._walk(key, prefix)
            elif key.startswith(prefix):
                with _folder_answers(self.root), suppress(FileNotFoundError):  # deleted meanwhile
                    facts = os.stat(self.root / key, follow_symlinks=False)
                    if stat.S_ISREG(facts.st_mode):
                        yield Listed(key, facts.st_size, datetime.fromtimestamp(facts.st_mtime, UTC))

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


# ------------------------------------------------------------------------------------------------------------ S3


class S3Store:
    """Objects in a bucket of any S3 server. The bucket is made by the first put if it may be; until then it is empty.

    `endpoint` is host:port. `public` is the scheme and host:port under which browsers reach it: the host is part of a
    link's signature. May be used from many threads, copied to other processes, and kept over a fork.
    """

    def __init__(
        self,
        endpoint: str,
        access_key: str,
        secret_key: str,
        bucket: str,
        *,
        secure: bool = True,
        region: str = "us-east-1",
        public: str | None = None,
        timeout: float = 60,
        fresh_for: float = 3600,
    ) -> None:
        check_bucket_name(bucket, strict=True)
        if "/" in endpoint:
            raise ValueError(f"store endpoint {endpoint!r} must be host:port, without scheme or path")
        if public is not None and urlsplit(public).scheme not in ("http", "https"):
            raise ValueError(f"public address of the store {public!r} must begin with http:// or https://")
        self.endpoint, self.bucket, self.secure, self.region, self.public = endpoint, bucket, secure, region, public
        self.timeout, self.fresh_for = timeout, fresh_for
        self._keys = (access_key, secret_key)
        self._made: tuple[int, Minio] | None = None

    def __repr__(self) -> str:  # never the keys
        return f"S3Store({self.bucket!r} at {self.endpoint})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_made": None}

    def put(self, data: Data, media_type: str = OCTETS) -> Stored:
        with _measured(data) as source:
            key = blob_key(source.sha256)
            there = self._look(key)
            if there is not None and there.size == source.size and self._freshen(key, there):
                return _stored(key, there)
            self._send(key, source, media_type)
            return Stored(key, source.sha256, source.size, media_type)

    def put_at(self, key: str, data: Data, media_type: str = OCTETS) -> Stored:
        _check_name(key)
        parts = key.split("/")
        if any(self.exists("/".join(parts[:count])) for count in range(1, len(parts))):
            raise ValueError(f"store key {key!r}: a shorter key of its path is an object already")
        if next(self.list(key + "/"), None) is not None:
            raise ValueError(f"store key {key!r}: there are objects below it already")
        with _measured(data) as source:
            self._send(key, source, media_type)
            return Stored(key, source.sha256, source.size, media_type)

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        _check_range(start, length)
        if length == 0:  # to S3 a range of no bytes is no range at all
            if not self.exists(key):
                raise NoSuchKey(f"{key}: not in the bucket {self.bucket} at {self.endpoint}")
            return b""
        with _Download(self, check_key(key), start, length) as download:
            return download.readall()

    def open(self, key: str) -> BinaryIO:
        return cast(BinaryIO, io.BufferedReader(_Download(self, check_key(key), 0, None), CHUNK))

    def stat(self, key: str) -> Stored | None:
        there = self._look(check_key(key))
        return None if there is None else _stored(key, there)

    def exists(self, key: str) -> bool:
        return self.stat(key) is not None

    def list(self, prefix: str = "") -> Iterator[Listed]:
        _check_prefix(prefix)
        try:
            with self._answers(f"list {prefix!r}"):
                for found in self._client.list_objects(self.bucket, prefix, recursive=True):
                    if found.last_modified is not None and found.object_name:
                        yield Listed(found.object_name, found.size or 0, found.last_modified.astimezone(UTC))
        except NoSuchKey:
            return  # no bucket yet

    def link(self, key: str, seconds: int = LINK_SECONDS) -> str:
        if not 1 <= seconds <= LINK_SECONDS:
            raise ValueError(f"a link of {seconds} s must last between 1 s and {LINK_SECONDS} s: who has it may read")
        address = urlsplit(self.public) if self.public else None
        signer = (
            self._client
            if address is None
            else Minio(address.netloc, *self._keys, secure=address.scheme == "https", region=self.region)
        )
        return signer.presigned_get_object(self.bucket, check_key(key), timedelta(seconds=seconds))

    def delete(self, key: str) -> None:
        with suppress(NoSuchKey), self._answers(f"delete {key}"):
            self._client.remove_object(self.bucket, check_key(key))

    def delete_stale(self, key: str, before: datetime) -> bool:
        there = self._look(check_key(key))
        if there is None or there.last_modified is None or there.last_modified >= before:
            return False
        self.delete(key)
        return True

    def sweep_unfinished(self, seconds: float) -> int:
        swept, limit = 0, datetime.now(UTC) - timedelta(seconds=seconds)
        client = self._client
        with suppress(NoSuchKey), self._answers("list unfinished uploads"):
            marks: dict[str, Any] = {}
            while True:  # the client offers no public way to these two calls of S3
                page = client._list_multipart_uploads(self.bucket, **marks)  # pyright: ignore[reportPrivateUsage]
                for upload in page.uploads:
                    if upload.initiated_time and upload.initiated_time < limit and upload.upload_id:
                        client._abort_multipart_upload(  # pyright: ignore[reportPrivateUsage]
                            self.bucket, upload.object_name, upload.upload_id
                        )
                        swept += 1
                if not page.is_truncated:
                    break
                marks = {"key_marker": page.next_key_marker, "upload_id_marker": page.next_upload_id_marker}
        return swept

    @property
    def _client(self) -> Minio:
        """The client of this very process: its connections must not be shared over a fork."""
        if self._made is None or self._made[0] != os.getpid():
            trust = ssl.create_default_context()
            trust.load_verify_locations(certifi.where())  # beside the system's: a slim image has none of its own
            # Statuses that pass, and broken connections, are tried again with growing pauses: about 6 s in all.
            retries = urllib3.Retry(total=5, backoff_factor=0.2, status_forcelist=[500, 502, 503, 504])
            pool = urllib3.PoolManager(
                timeout=urllib3.Timeout(connect=min(5, self.timeout), read=self.timeout),
                maxsize=16,
                ssl_context=trust,
                retries=retries,
            )
            client = Minio(self.endpoint, *self._keys, secure=self.secure, region=self.region, http_client=pool)
            self._made = (os.getpid(), client)
        return self._made[1]

    @contextmanager
    def _answers(self, what: str) -> Generator[None]:
        """Turn the client's errors into ours: NoSuchKey when the server says so, StoreUnavailable for all others."""
        try:
            yield
        except S3Error as error:
            if error.code in ("NoSuchKey", "NoSuchBucket", "NoSuchUpload"):
                raise NoSuchKey(f"cannot {what}: {error.code} in bucket {self.bucket} at {self.endpoint}") from error
            hint = _HINTS.get(error.code or "", "")
            raise StoreUnavailable(f"{self!r} refused to {what}: {error.code}: {error.message}{hint}") from error
        except InvalidResponseError as error:  # a server or a proxy that does not speak XML
            if "Response code: 404" in str(error):
                raise NoSuchKey(f"cannot {what}: not in the bucket {self.bucket} at {self.endpoint}") from error
            raise StoreUnavailable(f"{self!r} could not {what}: {error}") from error
        except (MinioException, HTTPError) as error:
            raise StoreUnavailable(f"{self!r} could not {what}: {error}") from error

    def _look(self, key: str) -> Object | None:
        try:
            with self._answers(f"look at {key}"):
                return self._client.stat_object(self.bucket, key)
        except NoSuchKey:
            return None

    def _freshen(self, key: str, there: Object) -> bool:
        """Make an object young again by copying it onto itself inside the server; False when it has just gone."""
        facts = there.metadata or {}
        asked = parsedate_to_datetime(facts["Date"]) if "Date" in facts else datetime.now(UTC)
        if there.last_modified is not None and (asked - there.last_modified).total_seconds() < self.fresh_for:
            return True
        metadata: dict[str, Any] = {"sha256": _stored(key, there).sha256, "Content-Type": there.content_type or OCTETS}
        try:
            with self._answers(f"freshen {key}"):
                self._client.copy_object(
                    self.bucket, key, CopySource(self.bucket, key), metadata=metadata, metadata_directive=REPLACE
                )
        except NoSuchKey:
            return False
        return True

    def _send(self, key: str, source: "_Source", media_type: str) -> None:
        # The reader refuses to give its last byte when the digest is another: then no part, or an aborted upload,
        # is all that the server saw, and no object appears.
        part = max(PART, -(-source.size // MAX_PARTS))
        for try_again in (True, False):
            try:
                with self._answers(f"put {key}"):
                    self._client.put_object(
                        self.bucket,
                        key,
                        cast(BinaryIO, source),
                        source.size,
                        content_type=media_type,
                        metadata={"sha256": source.sha256},
                        part_size=part,
                    )
                break
            except NoSuchKey:
                if not try_again:
                    raise StoreUnavailable(f"{self!r}: the bucket was deleted while {key} was put") from None
                self._make_bucket()
                source.rewind()
        if source.size > part:
            # S3 may answer "200" to the end of an upload in parts and tell of a failure in the text only.
            there = self._look(key)
            if there is None or there.size != source.size:
                raise StoreUnavailable(f"{self!r}: {key} is not there whole after it was put; try again")

    def _make_bucket(self) -> None:
        try:
            with self._answers(f"make the bucket {self.bucket}"):
                self._client.make_bucket(self.bucket, self.region)
        except StoreUnavailable as error:
            cause = error.__cause__
            if not (isinstance(cause, S3Error) and cause.code in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists")):
                raise


_HINTS = {
    "AccessDenied": "; let the access key list, read and write the bucket",
    "InvalidAccessKeyId": "; check the store's access key",
    "SignatureDoesNotMatch": "; check the store's secret key and region",
    "RequestTimeTooSkewed": "; set this machine's clock",
}


def _stored(key: str, there: Object) -> Stored:
    facts = there.metadata or {}
    named = key.rpartition("/")[2] if key.startswith(BLOBS) else ""
    return Stored(key, named or facts.get("x-amz-meta-sha256", ""), there.size or 0, there.content_type or OCTETS)


class _Download(io.RawIOBase):
    """The bytes [start, start + length) of an object; goes on where it was when a connection breaks."""

    def __init__(self, store: S3Store, key: str, start: int, length: int | None) -> None:
        super().__init__()
        self._store, self._key, self._at = store, key, start
        self._end = None if length is None else start + length
        self._etag: str | None = None
        self._body: urllib3.BaseHTTPResponse | None = None
        self._ask()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._more(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        pieces: list[bytes] = []
        while piece := self._more(CHUNK):
            pieces.append(piece)
        return b"".join(pieces)

    def close(self) -> None:
        if self._body is not None:
            self._body.close()
            self._body.release_conn()
            self._body = None
        super().close()

    def _more(self, size: int) -> bytes:
        failures = 0
        while True:
            try:
                data = b"" if self._body is None else self._body.read(size)
                self._at += len(data)
                return data
            except HTTPError as error:
                failures += 1
                if failures > 3:
                    raise StoreUnavailable(f"{self._store!r}: {self._key} broke off at byte {self._at}") from error
                time.sleep(0.2 * 2**failures)
                self._ask()

    def _ask(self) -> None:
        if self._body is not None:
            self._body.close()
            self._body = None
        if self._end is not None and self._at >= self._end:
            return
        headers: dict[str, Any] = {"If-Match": self._etag} if self._etag else {}  # never halves of two versions
        try:
            with self._store._answers(f"get {self._key}"):  # pyright: ignore[reportPrivateUsage]
                client = self._store._client  # pyright: ignore[reportPrivateUsage]
                length = 0 if self._end is None else self._end - self._at
                body = client.get_object(
                    self._store.bucket, self._key, offset=self._at, length=length, request_headers=headers
                )
        except StoreUnavailable as error:
            if isinstance(error.__cause__, S3Error) and error.__cause__.code == "InvalidRange":
                return  # it begins at or after the end: nothing to read
            raise
        if self._at and body.status == 200 and "Content-Range" not in body.headers:
            body.close()
            raise StoreUnavailable(f"{self._store!r} ignores ranges: it cannot be read from byte {self._at}")
        self._etag = body.headers.get("ETag", self._etag)
        self._body = body


# --------------------------------------------------------------------------------------------- what both kinds share


class _Source:
    """A rewound stream whose digest and size are known, and that must still be so when it is read again."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._start = stream, stream.tell()
        digest, self.size = hashlib.sha256(), 0
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            self.size += len(chunk)
        self.sha256 = digest.hexdigest()
        self.rewind()

    def rewind(self) -> None:
        self._stream.seek(self._start)
        self._again, self._left = hashlib.sha256(), self.size

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(self._left if size < 0 else min(size, self._left))
        self._again.update(data)
        self._left -= len(data)
        if (not data and self._left and size) or (not self._left and self._again.hexdigest() != self.sha256):
            raise ValueError(f"the source of {self.sha256[:12]}… ({self.size} bytes) changed while it was being stored")
        return data

    def chunks(self) -> Iterator[bytes]:
        while chunk := self.read(CHUNK):
            yield chunk


@contextmanager
def _measured(data: Data) -> Generator[_Source]:
    with ExitStack() as stack:
        if isinstance(data, Path):
            stream: BinaryIO = stack.enter_context(data.open("rb"))
        elif isinstance(data, bytes | bytearray | memoryview):
            stream = io.BytesIO(data)
        elif data.seekable():
            stream = data
        else:  # a pipe is read once, and its digest is known at its end only: keep it meanwhile, on disk when large
            stream = cast(BinaryIO, stack.enter_context(tempfile.SpooledTemporaryFile(max_size=PART)))
            while chunk := data.read(CHUNK):
                stream.write(chunk)
            stream.seek(0)
        yield _Source(stream)


def _check_name(key: str) -> None:
    if check_key(key).split("/")[0] == "blobs":
        raise ValueError(f"store key {key!r}: what lies under blobs/ is named by its digest; use put")


def _check_range(start: int, length: int | None) -> None:
    if start < 0 or (length is not None and length < 0):
        raise ValueError(f"range start={start} length={length} must not be negative")


def _check_prefix(prefix: str) -> str:
    folder, slash, _ = prefix.rpartition("/")
    if slash:
        check_key(folder)
    return prefix
