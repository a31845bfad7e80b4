"""Files that somebody made to do harm: refused at once, in little memory, with an error that says what is wrong."""

from __future__ import annotations

import gc
import gzip
import io
import json
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flows.request.files import open_file
from flows.request.form import GenerationRequest, PromptsFormat
from flows.request.read import BadLine, read_prompts
from flows.request.unpack import BadFile
from model.loading.inspect import BadCheckpoint, read_header
from model.media.decode import read_frames
from model.media.errors import BadMedia
from tests.generative.test_prompts_laws import DEFAULTS

MEGABYTE = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def nothing_old_is_collected() -> Iterator[None]:
    """Else every collection looks through what other tests have left in this process, torch among it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def modest(act: Callable[[], None], megabytes: float = 64) -> None:
    """It takes less than a second of this process, and so much memory at most. Does it twice: to trace takes time."""
    gc.collect()
    began = time.process_time()
    act()
    spent = time.process_time() - began
    tracemalloc.start()
    try:
        act()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert spent < 1, f"{spent:.1f} s"
    assert peak < megabytes * MEGABYTE, f"{peak / MEGABYTE:.0f} MiB"


def header(text: str | bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    said = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(said) if length is None else length) + said + data


def tensor(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> str:
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}})


CHECKPOINTS = {
    "a header of 2^63 bytes": header("{}", length=1 << 63),
    "a header of 2^64 - 1 bytes": header("{}", length=(1 << 64) - 1),
    "a header longer than the file": header(tensor(), bytes(4), length=99_999_999),
    "no length at all": b"\x10\0",
    "one name for two tensors": header(
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
        '"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        bytes(8),
    ),
    "true for a size": header('{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', bytes(4)),
    "a header of 50 MB": header(b" " * 50_000_000),
    "as many tensors as may be": header(
        "{" + ",".join(f'"{k:040}": {tensor()[6:-1]}' for k in range(18_000)) + "}", bytes(4)
    ),
    "all names twice": header(
        "{" + ",".join(f'"{k % 9_000:040}": {tensor()[6:-1]}' for k in range(18_000)) + "}", bytes(4)
    ),
    "a name twice": header('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": 1}', bytes(4)),
    "tensors that overlap": header(
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
        '"b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}',
        bytes(12),
    ),
    "offsets beyond the file": header(tensor(shape=[1 << 40], offsets=[0, 1 << 42]), bytes(4)),
    "offsets below zero": header(tensor(offsets=[-4, 0]), bytes(4)),
    "offsets backwards": header(tensor(offsets=[4, 0]), bytes(4)),
    "a shape that overflows": header(tensor(shape=[1 << 62, 1 << 62, 1 << 62]), bytes(4)),
    "a shape below zero": header(tensor(shape=[-1, -1]), bytes(4)),
    "a number of 5,000 digits": header('{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 4]}}' % ("9" * 5000)),
    "numbers that are none": header('{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, Infinity]}}'),
    "a hundred thousand brackets": header("[" * 100_000),
    "nested in itself": header('{"a":' * 50_000 + "1" + "}" * 50_000),
    "an unknown type": header(tensor(dtype="PICKLE"), bytes(4)),
    "a list": header("[1, 2]"),
    "no UTF-8": header(b'{"\xff": 1}'),
    "a pickle": b"\x80\x04\x95" + bytes(100),
    "a zip": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("what", CHECKPOINTS)
def test_a_hostile_checkpoint_is_refused(what: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(CHECKPOINTS[what])

    def read() -> None:
        with pytest.raises(BadCheckpoint, match=r"model\.safetensors"):
            read_header(file)

    modest(read)


def bomb(pack: Callable[[io.BytesIO], None]) -> bytes:
    out = io.BytesIO()
    pack(out)
    return out.getvalue()


def zipped(out: io.BytesIO) -> None:
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("prompts.jsonl", b" " * (64 * MEGABYTE))


def gzipped(out: io.BytesIO) -> None:
    with gzip.open(out, "wb") as file:
        file.write(b" " * (64 * MEGABYTE))


PROMPTS = {
    "a zip bomb": bomb(zipped),
    "a gzip bomb": bomb(gzipped),
    "a pickle": b"\x80\x04\x95\x00\x00\x00",
    "brackets": b"[" * 900_000,
    "braces": b'{"prompt":' * 90_000,
    "a number of a million digits": b'{"prompt": "a", "seed": ' + b"9" * 900_000 + b"}",
    "a number out of all bounds": b'{"prompt": "a", "guidance": 1e999999999}',
    "a list for a prompt": b'{"prompt": [' + b'"a",' * 200_000 + b'"a"]}',
    "a hundred thousand keys": b'{"prompt": "a", ' + b",".join(b'"k%d": 1' % k for k in range(70_000)) + b"}",
    "a hundred thousand columns": b",".join(b"c%d" % k for k in range(100_000)) + b"\n",
    "nothing but quotes": b'prompt\n"' + b'"' * 900_000,
    "NUL": b'{"prompt": "a\\u0000b"}',
    "half a character": b'{"prompt": "\\ud800"}',
}


@pytest.mark.parametrize("what", PROMPTS)
@pytest.mark.parametrize("format", [PromptsFormat.JSONL, PromptsFormat.CSV, PromptsFormat.AUTO])
def test_a_hostile_prompt_file_is_refused(what: str, format: PromptsFormat, tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    file.write_bytes(PROMPTS[what])

    def read() -> None:
        try:
            with open_file(file) as stream:
                lines = list(read_prompts(stream, source="p", format=format, defaults=DEFAULTS))
        except BadFile as error:
            assert len(str(error)) < 20_000
            return
        assert lines and all(isinstance(line, BadLine) for line in lines), "it was taken for prompts"
        assert all(len(message) < 2000 for line in lines if isinstance(line, BadLine) for message in line.messages("p"))

    modest(read)


@pytest.mark.parametrize(
    "fields",
    [
        {"steps": 10**400},
        {"width": 10**18, "height": 10**18},
        {"frames": 2**63},
        {"guidance": 1e308},
        {"seed": -1},
        {"samples": 10**9},
        {"deadline": 1e300},
        {"priority": 10**20},
        {"name": "n" * 10_000_000},
        {"tenant": "t" * 1_000_000},
        {"key": "k" * 1_000_000},
        {"files": {f"f{k}": "store:x" for k in range(200_000)}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_absurd_numbers_in_a_request_are_refused(fields: dict[str, object]) -> None:
    def ask() -> None:
        with pytest.raises(ValueError, match=r"validation error"):
            GenerationRequest.model_validate({"prompts": ["a red ball"], **fields})

    modest(ask, 256)


MEDIA = {
    "a PNG of a billion pixels": b"\x89PNG\r\n\x1a\n"
    + struct.pack(">I4sIIBBBBB", 13, b"IHDR", 60_000, 60_000, 8, 2, 0, 0, 0)
    + bytes(100),
    "a GIF of 65535 squared": b"GIF89a\xff\xff\xff\xff\x00\x00\x00" + bytes(50),
    "an MP4 that is a header": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(100),
    "nothing": b"",
    "text": b"not a picture",
    "a playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
    "a list of files": b"ffconcat version 1.0\nfile '/etc/passwd'\n",
    "a picture made of words": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
}


@pytest.mark.parametrize("what", MEDIA)
def test_hostile_media_is_refused(what: str) -> None:
    def read() -> None:
        with pytest.raises(BadMedia):
            read_frames(MEDIA[what], width=64, height=64, fps=8, most=17)

    modest(read)
