"""The store's contract, on a folder and on a real S3 server."""

import hashlib
import io
import os
import pickle
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import tracemalloc
import uuid
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast
from urllib.parse import quote, urlsplit
from urllib.request import urlopen

import pytest
import urllib3
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from infra.store.contract import Listed, NoSuchKey, Store, Stored, StoreUnavailable, blob_key
from infra.store.folder import FolderStore
from infra.store.open import open_store
from infra.store.s3 import S3Store
from infra.store.source import PART
from tests.integration.s3 import S3Server

ROOT = Path(__file__).parents[2]
BOTH = ["folder", pytest.param("s3", marks=pytest.mark.xdist_group("radosgw"))]
S3 = pytest.mark.xdist_group("radosgw")
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def s3(server: S3Server) -> Generator[S3Store]:
    """A store in a bucket of its own, which no put has made yet."""
    keys = server.access_key, server.secret_key
    store = S3Store(server.endpoint, *keys, f"test-{uuid.uuid4().hex[:12]}", secure=server.secure)
    yield store
    for found in store.list():
        store.delete(found.key)
    store.sweep_unfinished(-60)
    with suppress(Exception):  # there is no bucket when nothing was put
        store._client.remove_bucket(store.bucket)


@pytest.fixture
def folder(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


@pytest.fixture(params=BOTH)
def store(request: pytest.FixtureRequest) -> Store:
    return request.getfixturevalue(request.param)


UNHOLDABLE = ["", " ", "\n", "a/../b", "..", "./a", "a/.", "a\0b", "\ud800", "a" * 1025, "ä" * 513]
# Parts that a file system, an address, a signature or a listing could take for something else.
PARTS = [
    "a",
    "A",
    "a b",
    " ",
    "näh",
    "a\u0308",
    "日本",
    "🎬",
    "a,b",
    "%",
    "%41",
    "%2F",
    "a%3E",
    "+",
    "a+b",
    "?x=1#y",
    "&<>\"'",
]
PARTS += [
    "",
    ".",
    "..",
    ".hidden",
    ".media",
    ".incoming",
    "-rf",
    "con",
    "a:b",
    "a\\b",
    "a\nb",
    "\x01",
    "\x7f",
    "~",
    "a" * 255,
    "a" * 256,
]
PARTS += [
    "a" * 600,
    f"{'a' * 252}.b",
    f"{'a' * 252}.{'b' * 9}",
    f"{'a' * 251}%41",
    f"{'a' * 252}%{'b' * 9}",
    "ä" * 200,
    f"{'a' * 252}%3E",
]
KEYS = st.lists(st.sampled_from(PARTS) | st.text(max_size=20), min_size=1, max_size=4).map("/".join)


def holdable(key: str) -> bool:
    fits = all(not 0xD800 <= ord(each) < 0xE000 for each in key) and 1 <= len(key.encode()) <= 1024
    return (
        fits
        and "\0" not in key
        and key.strip() != ""
        and {".", ".."}.isdisjoint(key.split("/"))
        and key.split("/")[0] != "blobs"
    )


class Counted(io.BytesIO):
    """A file that counts what was read of it."""

    read_bytes = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.read_bytes += len(data)
        return data


class TestContract:
    @quick
    @given(data=st.binary(max_size=3000), start=st.integers(0, 4000), length=st.none() | st.integers(0, 4000))
    def test_get_gives_back_any_slice_of_what_was_put(
        self, store: Store, data: bytes, start: int, length: int | None
    ) -> None:
        stored = store.put(data, "video/mp4")
        digest = hashlib.sha256(data).hexdigest()
        assert stored == Stored(f"blobs/sha256/{digest[:2]}/{digest[2:4]}/{digest}", digest, len(data), "video/mp4")
        assert store.get(stored.key, start, length) == data[start:][:length]
        assert store.stat(stored.key) == stored
        with store.open(stored.key) as stream:
            assert stream.read(7) + stream.read() == data

    def test_every_kind_of_source_stores_the_same_bytes(self, store: Store, tmp_path: Path) -> None:
        data = os.urandom(300_000)
        (tmp_path / "clip").write_bytes(b"skipped" + data)
        (tmp_path / "whole").write_bytes(data)
        reading, writing = os.pipe()
        with ThreadPoolExecutor() as pool, os.fdopen(reading, "rb") as pipe, (tmp_path / "clip").open("rb") as file:
            pool.submit(_write_and_close, writing, data)
            file.seek(7)
            keys = [store.put(source).key for source in (data, pipe, file, tmp_path / "whole", io.BytesIO(data))]
        assert set(keys) == {blob_key(hashlib.sha256(data).hexdigest())}
        assert store.get(keys[0]) == data

    def test_bytes_that_are_there_are_not_sent_again(self, store: Store) -> None:
        store.put(b"")  # the first put to a bucket makes it, and sends again
        first, second = Counted(b"frames" * 1000), Counted(b"frames" * 1000)
        assert store.put(first, "video/mp4") == store.put(second, "text/plain")  # the first word on the type stands
        assert first.read_bytes == 12_000, "once for the digest, once to send it"
        assert second.read_bytes == 6000, "once for the digest"

    def test_a_large_object_passes_through_little_memory(self, store: Store, tmp_path: Path) -> None:
        size, path = 9 * PART + 12_345, tmp_path / "large"
        with path.open("wb") as file:
            file.truncate(size)
            file.seek(PART - 3)
            file.write(b"across two parts")
        tracemalloc.start()
        try:
            stored = store.put(path, "video/mp4")
            with store.open(stored.key) as stream:
                digest = hashlib.sha256()
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert digest.hexdigest() == stored.sha256
        assert store.get(stored.key, PART - 3, 16) == b"across two parts"
        assert peak < (8 << 20 if isinstance(store, FolderStore) else 7 * PART)

    def test_what_is_not_there(self, store: Store) -> None:
        for key in (blob_key("0" * 64), "requests/req_1/manifest.jsonl"):
            assert store.stat(key) is None
            assert not store.exists(key)
            assert not store.delete_stale(key, datetime.now(UTC))
            store.delete(key)
            for length in (None, 0, 5):
                with pytest.raises(NoSuchKey, match=key):
                    store.get(key, 0, length)
            with pytest.raises(NoSuchKey, match=key):
                store.open(key)
            assert list(store.list()) == []

    @pytest.mark.parametrize("key", UNHOLDABLE)
    def test_keys_that_no_store_can_hold_are_refused(self, store: Store, key: str) -> None:
        for use in (store.get, store.open, store.stat, store.exists, store.link, store.delete):
            with pytest.raises(ValueError, match="store key"):
                use(key)
        with pytest.raises(ValueError, match="store key"):
            store.put_at(key, b"x")
        assert list(store.list()) == []

    @settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(keys=st.lists(KEYS.filter(holdable), min_size=1, max_size=5, unique=True))
    def test_any_key_of_s3_is_held_listed_and_opened_by_its_link(self, store: Store, keys: list[str]) -> None:
        for left in store.list():  # by an example that failed
            store.delete(left.key)
        held: dict[str, bytes] = {}
        for key in keys:
            if not any(key.startswith(f"{other}/") or other.startswith(f"{key}/") for other in held):
                held[key] = key.encode()
                store.put_at(key, held[key], "text/plain")
        assert _sizes(store.list()) == sorted((key, len(data)) for key, data in held.items())
        for key, data in held.items():
            with urlopen(store.link(key), timeout=30) as answer:
                assert answer.read() == store.get(key) == data
            for prefix in {key, key[:1], key[: len(key) // 2], key.rpartition("/")[0], f"{key}/"}:
                wanted = sorted((each, len(data)) for each, data in held.items() if each.startswith(prefix))
                assert _sizes(store.list(prefix)) == wanted, prefix
            stored = store.stat(key)
            assert stored is not None and (stored.bytes, stored.media_type) == (len(data), "text/plain")
        for key in held:
            store.delete(key)
        assert list(store.list()) == []

    def test_what_lies_under_blobs_is_named_by_its_digest(self, store: Store) -> None:
        for key in (blob_key("0" * 64), "blobs/mine", "blobs"):
            with pytest.raises(ValueError, match="digest"):
                store.put_at(key, b"x")

    def test_a_range_is_not_negative(self, store: Store) -> None:
        key = store.put(b"x").key
        for start, length in ((-1, None), (0, -1)):
            with pytest.raises(ValueError, match="negative"):
                store.get(key, start, length)

    def test_a_source_that_changes_meanwhile_stores_nothing(self, store: Store) -> None:
        class Changing(io.BytesIO):
            def seek(self, offset: int, whence: int = 0, /) -> int:
                if self.tell():  # the digest is known, now the bytes are to be sent
                    super().seek(0)
                    self.write(b"other")
                return super().seek(offset, whence)

        for size in (100, PART + 100):
            with pytest.raises(ValueError, match="changed"):
                store.put(Changing(b"x" * size))
        assert list(store.list()) == []
        assert store.sweep_unfinished(-60) == 0, "nor does it leave anything half-written"

    def test_what_is_put_again_is_too_young_to_be_swept(self, store: Store) -> None:
        key = store.put(b"once", "video/mp4").key
        if isinstance(store, FolderStore):
            os.utime(store.root / key, (0, 0))
        else:
            cast(S3Store, store).fresh_for = 0
            time.sleep(1.1)
        (old,) = store.list()
        stored = store.put(b"once", "video/mp4")
        (young,) = store.list()
        assert young.modified > old.modified
        assert store.stat(key) == stored
        assert stored.media_type == "video/mp4"
        assert not store.delete_stale(key, old.modified + timedelta(milliseconds=1))
        assert store.get(key) == b"once"
        assert store.delete_stale(key, young.modified + timedelta(seconds=1))
        assert not store.exists(key)

    def test_many_threads_share_one_store(self, store: Store) -> None:
        def trip(number: int) -> bool:
            data = b"%d" % (number % 10) * 5000
            return store.get(store.put(data).key) == data

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(trip, range(60)))
        assert len(list(store.list("blobs/"))) == 10

    def test_a_store_works_on_in_other_processes(self, store: Store, tmp_path: Path) -> None:
        """Pickled to another program, and there over a fork; in a program of its own, as threads and fork don't mix."""
        (tmp_path / "pickle").write_bytes(pickle.dumps(store))
        script = """
import os, pickle, sys
store = pickle.load(open(sys.argv[1], "rb"))
key = store.put(b"parent").key
child = os.fork()
if child == 0:
    os._exit(0 if store.get(key) == b"parent" and store.put(b"child") else 1)
assert os.waitpid(child, 0)[1] == 0 and store.get(key) == b"parent"
"""
        subprocess.run([sys.executable, "-c", script, tmp_path / "pickle"], cwd=ROOT, check=True, timeout=300)
        assert store.get(blob_key(hashlib.sha256(b"child").hexdigest())) == b"child"

    def test_a_reader_never_meets_half_an_object(self, store: Store, tmp_path: Path) -> None:
        """Two killed writers take turns at one key while it is read: every read is one of the two, whole."""
        key, old, new = "requests/req_1/sheet.png", b"a" * 700_000, b"b" * 900_000
        store.put_at(key, old)
        for pause in (0.05, 0.3, 0.5):
            with _writer(store, tmp_path, "turns") as writer:
                deadline, seen = time.monotonic() + pause, set[bytes]()
                while time.monotonic() < deadline:
                    seen.add(store.get(key))
                writer.send_signal(signal.SIGKILL)
            seen.add(store.get(key))
            assert seen <= {old, new}

    def test_a_killed_writer_leaves_what_was_there(self, store: Store, tmp_path: Path) -> None:
        key = "requests/req_1/sheet.png"
        store.put_at(key, b"before", "image/png")
        with _writer(store, tmp_path, "stall") as writer:
            writer.send_signal(signal.SIGKILL)
        assert store.get(key) == b"before"
        assert [found.key for found in store.list()] == [key]
        assert store.sweep_unfinished(3600) == 0, "another writer may be at it"
        assert store.sweep_unfinished(-60) == 1
        store.put_at(key, b"after")
        assert store.get(key) == b"after"


def _write_and_close(fd: int, data: bytes) -> None:
    with os.fdopen(fd, "wb") as file:
        file.write(data)


class _writer:
    """A process that writes to the store; entered when it is in the midst of it."""

    SCRIPT = """
import io, pickle, sys, time
store, key = pickle.load(open(sys.argv[1], "rb")), "requests/req_1/sheet.png"

class Stalling(io.BytesIO):
    passed = 0
    def read(self, size=-1):
        data = super().read(size)
        self.passed += len(data)
        if self.passed > 85_000_000:   # 50 MB for the digest, and now part of what is sent
            print("writing", flush=True)
            time.sleep(60)
        return data

if sys.argv[2] == "stall":
    store.put_at(key, Stalling(bytes(50_000_000)))
print("writing", flush=True)
while True:
    store.put_at(key, b"b" * 900_000)
    store.put_at(key, b"a" * 700_000)
"""

    def __init__(self, store: Store, tmp_path: Path, how: str) -> None:
        pickled = tmp_path / "store.pickle"
        pickled.write_bytes(pickle.dumps(store))
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.SCRIPT, pickled, how], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "subprocess.Popen[str]":
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "writing\n"
        return self.process

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


NAMES = st.sampled_from(["a", "a/b", "a/b/c", "a-b", "a.b", "ab", "a/bc", "b", "requests/r1/m.jsonl", "requests/r1"])
PREFIXES = st.sampled_from(["", "a", "a/", "a/b", "a/b/", "ab", "requests/", "requests/r", "blobs/", "blobs/sha256/6"])


def _machine(store: Store) -> type[RuleBasedStateMachine]:
    """Any order of calls leaves the store as a dictionary would be."""

    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            for found in store.list():
                store.delete(found.key)
            self.held: dict[str, tuple[bytes, str]] = {}

        @rule(data=st.binary(max_size=2), media_type=st.sampled_from(["video/mp4", "application/octet-stream"]))
        def put(self, data: bytes, media_type: str) -> None:
            stored = store.put(data, media_type)
            kept = self.held.setdefault(stored.key, (data, media_type))
            assert stored.media_type == kept[1]

        @rule(key=NAMES, data=st.binary(max_size=9), media_type=st.sampled_from(["image/png", "text/plain"]))
        def put_at(self, key: str, data: bytes, media_type: str) -> None:
            if any(key.startswith(other + "/") or other.startswith(key + "/") for other in self.held):
                with pytest.raises(ValueError, match="already"):
                    store.put_at(key, data, media_type)
            else:
                stored = store.put_at(key, data, media_type)
                assert stored == Stored(key, hashlib.sha256(data).hexdigest(), len(data), media_type)
                self.held[key] = data, media_type

        @rule(key=NAMES)
        def delete(self, key: str) -> None:
            store.delete(key)
            self.held.pop(key, None)

        @rule(pick=st.integers(0, 9))
        def delete_blob(self, pick: int) -> None:
            blobs = [key for key in self.held if key.startswith("blobs/")]
            assume(blobs)
            key = blobs[pick % len(blobs)]
            assert store.delete_stale(key, datetime.now(UTC) + timedelta(minutes=1))
            del self.held[key]

        @rule(key=NAMES)
        def look(self, key: str) -> None:
            found = store.stat(key)
            assert store.exists(key) == (found is not None) == (key in self.held)
            if found is None:
                with pytest.raises(NoSuchKey):
                    store.get(key)
            else:
                data, media_type = self.held[key]
                assert (found.bytes, found.media_type) == (len(data), media_type)
                assert found.sha256 in ("", hashlib.sha256(data).hexdigest())
                assert store.get(key) == data

        @rule(prefix=PREFIXES)
        def list_below(self, prefix: str) -> None:
            assert _sizes(store.list(prefix)) == self.expected(prefix)

        @invariant()
        def lists_all(self) -> None:
            assert _sizes(store.list()) == self.expected("")

        def expected(self, prefix: str) -> list[tuple[str, int]]:
            return sorted((key, len(data)) for key, (data, _) in self.held.items() if key.startswith(prefix))

    return Machine


REGIONS = {
    "s3.amazonaws.com": "us-east-1",
    "s3-external-1.amazonaws.com": "us-east-1",
    "s3.eu-west-1.amazonaws.com": "eu-west-1",
    "s3.eu-west-1.amazonaws.com:443": "eu-west-1",
    "S3-eu-central-1.amazonaws.com": "eu-central-1",
    "s3.dualstack.ap-southeast-2.amazonaws.com": "ap-southeast-2",
    "s3-fips.us-gov-west-1.amazonaws.com": "us-gov-west-1",
    "s3.cn-north-1.amazonaws.com.cn": "cn-north-1",
    "bucket.vpce-0a1b.s3.sa-east-1.vpce.amazonaws.com": "sa-east-1",
    "s3.us-west-004.backblazeb2.com": "us-west-004",
    "s3.fr-par.scw.cloud": "fr-par",
    "s3.my-company.com:9000": "us-east-1",
    "127.0.0.1:9000": "us-east-1",
}


@pytest.mark.parametrize("endpoint", REGIONS)
def test_the_region_is_that_of_the_endpoints_name(endpoint: str) -> None:
    region = REGIONS[endpoint]
    store = cast(S3Store, open_store(f"s3://rushes?endpoint={endpoint}", "access", "secret"))
    link = urlsplit(store.link("x"))
    assert store.region == region and f"%2F{region}%2Fs3%2F" in link.query
    assert region == "us-east-1" or region in link.netloc, "it is this region that is talked to"


def test_another_region_than_that_of_the_endpoint_is_refused() -> None:
    url = "s3://rushes?endpoint=s3.eu-west-1.amazonaws.com&region=us-east-1"
    with pytest.raises(ValueError, match=r"region=us-east-1 is not that of its .*, eu-west-1: leave"):
        open_store(url, "access", "secret")


def _sizes(listed: Iterator[Listed]) -> list[tuple[str, int]]:
    return [(found.key, found.bytes) for found in listed]


@pytest.mark.parametrize(("kind", "examples"), [("folder", 25), pytest.param("s3", 8, marks=S3)])
def test_any_order_of_calls_acts_like_a_dictionary(request: pytest.FixtureRequest, kind: str, examples: int) -> None:
    effort = settings(max_examples=examples, stateful_step_count=25, deadline=None)
    run_state_machine_as_test(_machine(request.getfixturevalue(kind)), settings=effort)


class TestFolder:
    def test_what_others_lay_into_the_folder_is_found_or_left_alone(self, folder: FolderStore) -> None:
        for name in ("my video, ä.mp4", "100%.mp4", ".DS_Store", "a%2fb", "x%3E", os.fsdecode(b"latin-\xe4")):
            (folder.root / name).write_bytes(b"x")
        (folder.root / "my clips").mkdir()
        (folder.root / "my clips" / "1.mp4").write_bytes(b"x")
        named = ["100%.mp4", "my clips/1.mp4", "my video, ä.mp4"]
        assert [found.key for found in folder.list()] == named
        assert all(folder.get(key) == b"x" for key in named)
        assert folder.sweep_unfinished(-60) == 0

    def test_only_the_owner_may_look(self, tmp_path: Path) -> None:
        before = os.umask(0)
        try:
            store = FolderStore(tmp_path / "deep" / "store")
            store.put(b"x", "video/mp4")
            store.put_at("requests/r/m.jsonl", b"y")
        finally:
            os.umask(before)
        paths = [tmp_path / "deep", *(tmp_path / "deep").rglob("*")]
        assert len(paths) > 8
        for path in paths:
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path

    def test_a_link_opens_the_file(self, folder: FolderStore) -> None:
        with urlopen(folder.link(folder.put(b"pixels").key)) as answer:
            assert answer.read() == b"pixels"

    def test_a_link_in_the_folder_is_not_followed(self, folder: FolderStore, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("secret")
        (folder.root / "way-out").symlink_to(tmp_path / "secret")
        with pytest.raises(StoreUnavailable):
            folder.get("way-out")
        assert folder.stat("way-out") is None
        assert list(folder.list()) == []

    def test_a_folder_that_cannot_be_is_unavailable(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(StoreUnavailable, match="file"):
            FolderStore(tmp_path / "file" / "store")

    def test_a_truncated_object_is_mended_by_the_next_put(self, folder: FolderStore) -> None:
        key = folder.put(b"whole").key
        (folder.root / key).write_bytes(b"who")
        folder.put(b"whole")
        assert folder.get(key) == b"whole"

    def test_putting_and_pruning_at_once_loses_nothing(self, folder: FolderStore) -> None:
        """Deleting empties folders that another thread is about to put into."""

        def churn(name: str) -> None:
            for _ in range(150):
                folder.put_at(f"requests/r/{name}", name.encode())
                assert folder.get(f"requests/r/{name}") == name.encode()
                folder.delete(f"requests/r/{name}")

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(churn, "abcd"))
        assert list(folder.list()) == []


@S3
class TestS3:
    def test_a_signed_link_downloads_with_plain_http(self, s3: S3Store) -> None:
        url = s3.link(s3.put(b"0123456789", "video/mp4").key, seconds=60)
        whole = _fetch(url)
        assert (whole.status, whole.data, whole.headers["Content-Type"]) == (200, b"0123456789", "video/mp4")
        part = _fetch(url, Range="bytes=2-4")  # how a browser seeks in a video
        assert (part.status, part.data) == (206, b"234")

    def test_a_link_opens_one_object_for_its_time_only(self, s3: S3Store) -> None:
        key, other = s3.put(b"mine").key, s3.put(b"other").key
        url = s3.link(key, seconds=60)
        for tampered in (
            url.replace(key, other),
            url.replace("X-Amz-Expires=60", "X-Amz-Expires=600"),
            url[:-1] + ("0" if url[-1] != "0" else "1"),
            url.partition("?")[0],
        ):
            assert tampered != url
            assert _fetch(tampered).status == 403
        short = s3.link(key, seconds=1)
        time.sleep(2.5)
        assert _fetch(short).status == 403
        for seconds in (0, 901):
            with pytest.raises(ValueError, match="between 1 s and 900 s"):
                s3.link(key, seconds)

    def test_a_link_is_signed_for_the_public_address(self, s3: S3Store, server: S3Server) -> None:
        host, _, port = server.endpoint.partition(":")
        if host != "127.0.0.1":
            pytest.skip("needs a server on loopback, which has a second name")
        s3.public = f"http://localhost:{port}"
        url = s3.link(s3.put(b"seen from outside").key)
        assert url.startswith(f"http://localhost:{port}/")
        assert _fetch(url).data == b"seen from outside"

    def test_a_wrong_secret_is_refused_and_says_what_to_check(self, s3: S3Store, server: S3Server) -> None:
        s3.put(b"x")
        thief = S3Store(server.endpoint, server.access_key, "wrong", s3.bucket, secure=server.secure)
        with pytest.raises(StoreUnavailable, match="secret key"):
            thief.get(blob_key(hashlib.sha256(b"x").hexdigest()))
        with pytest.raises(StoreUnavailable):
            thief.put(b"x")
        assert "wrong" not in repr(thief)

    def test_a_download_goes_on_after_the_connection_broke(self, s3: S3Store, server: S3Server) -> None:
        data = os.urandom(3_000_000)
        key = s3.put(data).key
        with _Cutting(server.endpoint, after=1_000_000, times=2) as proxy:
            keys = server.access_key, server.secret_key
            through = S3Store(proxy.endpoint, *keys, s3.bucket, secure=False)
            assert through.get(key) == data
            assert proxy.cuts == 2
        with _Cutting(server.endpoint, after=1_000_000, times=1) as proxy:
            through = S3Store(proxy.endpoint, *keys, s3.bucket, secure=False)
            assert through.get(key, 500_000, 2_000_000) == data[500_000:2_500_000]
            assert proxy.cuts == 1

    def test_metadata_names_the_digest(self, s3: S3Store) -> None:
        s3.put_at("requests/r/sheet.png", b"pixels", "image/png")
        found = s3.stat("requests/r/sheet.png")
        assert found == Stored("requests/r/sheet.png", hashlib.sha256(b"pixels").hexdigest(), 6, "image/png")


def _fetch(url: str, **headers: str) -> urllib3.BaseHTTPResponse:
    """What somebody without any key gets there."""
    with urllib3.PoolManager(retries=False, timeout=10) as pool:
        return pool.request("GET", url, headers=headers)


class _Cutting:
    """A proxy before the server that cuts the first `times` answers after so many bytes."""

    def __init__(self, endpoint: str, after: int, times: int) -> None:
        host, _, port = endpoint.partition(":")
        self.target, self.after, self.times, self.cuts = (host, int(port)), after, times, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self.listener.getsockname()[1]}"

    def __enter__(self) -> "_Cutting":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=[self.listener.accept()[0]], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self.target) as server:
            threading.Thread(target=self._pump, args=[client, server], daemon=True).start()
            passed = 0
            with suppress(OSError):
                while data := server.recv(65536):
                    passed += len(data)
                    if passed > self.after and self.cuts < self.times:
                        self.cuts += 1
                        client.shutdown(socket.SHUT_RDWR)
                        return
                    client.sendall(data)

    def _pump(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                server.sendall(data)


def test_a_server_that_is_not_there_is_unavailable_and_nothing_is_missing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    store = S3Store(f"127.0.0.1:{port}", "key", "secret", "bucket", secure=False)

    def ask(call: str) -> BaseException | None:
        try:
            {"get": store.get, "stat": store.stat, "delete": store.delete, "put": lambda _: store.put(b"x")}[call]("a")
        except (NoSuchKey, StoreUnavailable) as error:
            return error
        return None

    started = time.monotonic()
    with ThreadPoolExecutor() as pool:  # each tries for some seconds
        for error in pool.map(ask, ["get", "stat", "delete", "put"]):
            assert isinstance(error, StoreUnavailable)
            assert str(port) in str(error)
    assert time.monotonic() - started < 120, "they are given up"


class TestUrl:
    def test_a_folder(self, tmp_path: Path) -> None:
        store = open_store(f"file://{quote(str(tmp_path / 'with space'))}")
        assert cast(FolderStore, store).root == tmp_path / "with space"

    def test_a_bucket(self) -> None:
        url = "s3://rushes?endpoint=127.0.0.1:9000&secure=false&region=eu-1&public=https://clips.example.org"
        store = cast(S3Store, open_store(url, "access", "very-secret"))
        told = store.bucket, store.endpoint, store.secure, store.region, store.public
        assert told == ("rushes", "127.0.0.1:9000", False, "eu-1", "https://clips.example.org")
        assert "very-secret" not in repr(store)
        link = urlsplit(store.link("requests/r/sheet.png"))
        assert (link.scheme, link.netloc) == ("https", "clips.example.org")
        behind = cast(S3Store, open_store(f"{url}/media/s3/", "access", "very-secret"))
        assert urlsplit(behind.link("a b.png")).path == "/media/s3/rushes/a%20b.png", "the proxy's own path is kept"
        for wrong in ("ftp://x", "https://", "https://x/?y=1", "https://me@x"):
            with pytest.raises(ValueError, match="public address of the store"):
                open_store(f"s3://rushes?endpoint=127.0.0.1:9000&public={quote(wrong, '')}", "access", "very-secret")

    @pytest.mark.parametrize(
        ("url", "complaint"),
        [
            ("file:relative", "absolute folder"),
            ("file://host/folder", "absolute folder"),
            ("ftp://host/folder", "must be file or s3"),
            ("/srv/rushes", "must be file or s3"),
            ("s3://key:secret@bucket?endpoint=h:1", "must not carry credentials"),
            ("s3://bucket/folder?endpoint=h:1", "without a folder"),
            ("s3://bucket?endpoint=h:1&color=red", "'color'"),
            ("s3://bucket?endpoint=h:1&secure=maybe", "maybe"),
            ("s3://bucket?endpoint=http://h:1", "host:port"),
            ("s3://B?endpoint=h:1", "(?i)bucket"),
        ],
    )
    def test_what_is_wrong_with_it_is_said(self, url: str, complaint: str) -> None:
        with pytest.raises(ValueError, match=complaint):
            open_store(url, "access", "secret")

    def test_a_bucket_needs_keys(self) -> None:
        with pytest.raises(ValueError, match="access key and a secret key"):
            open_store("s3://bucket?endpoint=h:1", "access")
