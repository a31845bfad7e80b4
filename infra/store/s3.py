"""The contract on an S3 bucket, through the `minio` client."""

from __future__ import annotations

import io
import os
import re
import ssl
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit, urlunsplit
from xml.etree.ElementTree import ParseError

import certifi
import urllib3
from minio import Minio
from minio.commonconfig import REPLACE, CopySource
from minio.credentials import Credentials, Provider
from minio.datatypes import Object
from minio.error import InvalidResponseError, MinioException, S3Error
from minio.helpers import check_bucket_name
from urllib3.exceptions import HTTPError

from infra.store.contract import (
    BLOBS,
    CHUNK,
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
from infra.store.source import PART, Source, measured

MAX_PARTS = 10_000  # S3's own bound
# Characters that XML cannot hold, in which a listing repeats its prefix.
_NO_XML = re.compile("[^\\t\\n\\r -\\ud7ff\\ue000-\\ufffd\\U00010000-\\U0010ffff]")
# The region in an endpoint's name: of AWS with its variants (dualstack, fips, VPC), and of others that have them.
_REGIONAL = re.compile(
    r"(?:.*\.)?s3(?:-fips)?[.-](?:dualstack\.)?([a-z]{2}(?:-[a-z]+)+-\d+)\.(?:vpce\.)?amazonaws\.com(?:\.cn)?"
    r"|s3\.([a-z0-9-]+)\.(?:wasabisys\.com|backblazeb2\.com|scw\.cloud|io\.cloud\.ovh\.net)"
    r"|([a-z0-9-]+)\.linodeobjects\.com|sos-([a-z0-9-]+)\.exo\.io"
)
DEFAULT_REGION = "us-east-1"


@dataclass(frozen=True, slots=True, repr=False)
class _Keys(Provider):
    """The keys that requests are signed with, as they are now: they may be changed while an engine runs."""

    access: str
    secret: str
    again: Callable[[], tuple[str, str]] | None

    def retrieve(self) -> Credentials:
        return Credentials(*(self.again() if self.again else (self.access, self.secret)))


class S3Store:
    """Objects in a bucket of any S3 server. The bucket is made by the first put if it may be; until then it is empty.

    `endpoint` is host:port. `region` is that of the endpoint's name by default, else us-east-1. `public` is the scheme
    and host:port under which browsers reach it: the host is part of a link's signature. It may have a path, which a
    proxy takes off again. May be used from many threads, copied to other processes, and kept over a fork.
    """

    def __init__(
        self,
        endpoint: str,
        access_key: str,
        secret_key: str,
        bucket: str,
        *,
        secure: bool = True,
        region: str | None = None,
        public: str | None = None,
        timeout: float = 60,
        fresh_for: float = 3600,
        again: Callable[[], tuple[str, str]] | None = None,
    ) -> None:
        check_bucket_name(bucket, strict=True)
        if "/" in endpoint:
            raise ValueError(f"store endpoint {endpoint!r} must be host:port, without scheme or path")
        if public is not None:
            parts = urlsplit(public)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(
                    f"public address of the store {public!r} must begin with http:// or https:// and a host"
                )
            if parts.query or parts.fragment or parts.username:
                raise ValueError(f"public address of the store {public!r} must be scheme, host, port and path alone")
        named = region_of(endpoint)
        if region and named and region != named:
            raise ValueError(f"store region={region} is not that of its endpoint {endpoint}, {named}: leave it out")
        region = region or named or DEFAULT_REGION
        self.endpoint, self.bucket, self.secure, self.region, self.public = endpoint, bucket, secure, region, public
        self.timeout, self.fresh_for = timeout, fresh_for
        self._keys = _Keys(access_key, secret_key, again)
        self._made: tuple[int, Minio] | None = None

    def __repr__(self) -> str:  # never the keys
        return f"S3Store({self.bucket!r} at {self.endpoint})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_made": None}

    def put(self, data: Data, media_type: str = OCTETS) -> Stored:
        with measured(data) as source:
            key = blob_key(source.sha256)
            there = self._look(key)
            if there is not None and there.size == source.size and self._freshen(key, there):
                return _stored(key, there)
            self._send(key, source, media_type)
            return Stored(key, source.sha256, source.size, media_type)

    def put_at(self, key: str, data: Data, media_type: str = OCTETS) -> Stored:
        check_name(key)
        parts = key.split("/")
        shorter = ("/".join(parts[:count]) for count in range(1, len(parts)))
        if any(self.exists(each) for each in shorter if each.strip()):
            raise ValueError(f"store key {key!r}: a shorter key of its path is an object already")
        if next(self.list(key + "/"), None) is not None:
            raise ValueError(f"store key {key!r}: there are objects below it already")
        with measured(data) as source:
            self._send(key, source, media_type)
            return Stored(key, source.sha256, source.size, media_type)

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        check_range(start, length)
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
        try:
            with self._answers(f"list {prefix!r}"):
                for found in self._client.list_objects(self.bucket, _NO_XML.split(prefix, 1)[0], recursive=True):
                    if found.last_modified is not None and (found.object_name or "").startswith(prefix):
                        yield Listed(found.object_name or "", found.size or 0, found.last_modified.astimezone(UTC))
        except NoSuchKey:
            return  # no bucket yet

    def link(self, key: str, seconds: int = LINK_SECONDS) -> str:
        if not 1 <= seconds <= LINK_SECONDS:
            raise ValueError(f"a link of {seconds} s must last between 1 s and {LINK_SECONDS} s: who has it may read")
        address = urlsplit(self.public) if self.public else None
        signer = (
            self._client
            if address is None
            else Minio(address.netloc, credentials=self._keys, secure=address.scheme == "https", region=self.region)
        )
        signed = urlsplit(signer.presigned_get_object(self.bucket, check_key(key), timedelta(seconds=seconds)))
        before = address.path.rstrip("/") if address else ""
        return urlunsplit(signed._replace(path=before + signed.path))

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
            client = Minio(
                self.endpoint, credentials=self._keys, secure=self.secure, region=self.region, http_client=pool
            )
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
        except (MinioException, HTTPError, ParseError) as error:
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

    def _send(self, key: str, source: Source, media_type: str) -> None:
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


def region_of(endpoint: str) -> str | None:
    """The region that the endpoint's name says: eu-west-1 of s3.eu-west-1.amazonaws.com; None if it says none."""
    found = _REGIONAL.fullmatch(endpoint.lower().rpartition(":")[0] or endpoint.lower())
    return next(filter(None, found.groups()), None) if found else None


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
