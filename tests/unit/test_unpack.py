"""Prompt files as other programs write them: line ends, marks, gzip, and what is no text at all."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import random
import tarfile
import zipfile
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from flows.request.form import GenerationRequest, PromptsFormat, format_of
from flows.request.lines import text_lines
from flows.request.read import BadLine, read_prompts
from flows.request.recipe import Prompt
from flows.request.submit import check_file
from flows.request.unpack import FREE, MAX_RATIO, BadFile
from model.loading.card import find_model
from tests.unit.test_prompts import DEFAULTS, errors, read

LINES = b'{"prompt": "a"}\n{"prompt": "b"}\n'


def prompts(data: bytes, format: str = "text") -> list[tuple[int, str]]:
    lines = read(data, format)
    assert all(isinstance(line, Prompt) for line in lines), lines
    return [(line.line, line.prompt) for line in lines]


def name_of(value: object) -> str:
    """A parameter's name: the bytes of packed files hold the time, and names must be the same in every process."""
    return value if isinstance(value, str) else "file"


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["unix", "windows", "old mac"])
def test_every_kind_of_line_end_ends_a_line(end: bytes) -> None:
    assert prompts(end.join([b"a", b"b", b"c"])) == prompts(end.join([b"a", b"b", b"c", b""]))
    assert prompts(end.join([b"a", b"b", b"c"])) == [(1, "a"), (2, "b"), (3, "c")]
    assert prompts(end.join([b"prompt,seed", b'"a, b",1', b"c,2", b""]), "csv") == [(2, "a, b"), (3, "c")]
    assert prompts(LINES.replace(b"\n", end), "jsonl") == [(1, "a"), (2, "b")]


def test_line_ends_may_be_mixed_and_fall_between_two_chunks() -> None:
    assert prompts(b"a\rb\r\nc\n\rd") == [(1, "a"), (2, "b"), (3, "c"), (5, "d")]

    class Bytewise(io.RawIOBase):
        def __init__(self, data: bytes) -> None:
            self.pieces = [data[:1000], *(data[k : k + 1] for k in range(1000, len(data)))]

        def read(self, size: int = -1) -> bytes:
            return self.pieces.pop(0) if self.pieces else b""

    data = b"x" * 1000 + b"\r\nb\rc\r\r\nd\r"
    (_, *rest) = read_stream(cast(BinaryIO, Bytewise(data)))
    assert [(line.line, line.prompt) for line in rest] == [(2, "b"), (3, "c"), (5, "d")]


def read_stream(stream: BinaryIO) -> list[Prompt | BadLine]:
    return list(read_prompts(stream, source="p", format=PromptsFormat.TEXT, defaults=DEFAULTS))


def test_unicodes_own_line_and_paragraph_separators_are_text() -> None:
    said = "a\u2028b\u2029c"
    assert prompts(said.encode()) == [(1, said)]
    assert prompts(json.dumps({"prompt": said}, ensure_ascii=False).encode(), "jsonl") == [(1, said)]


def test_a_byte_order_mark_of_a_joined_file_is_no_part_of_a_prompt() -> None:
    mark = b"\xef\xbb\xbf"
    assert prompts(mark + b"a\n" + mark + b"b\n") == [(1, "a"), (2, "b")]
    assert prompts(mark + LINES + mark + LINES, "jsonl") == [(1, "a"), (2, "b"), (3, "a"), (4, "b")]
    assert prompts(mark + b"prompt\na\n" + mark + b"b\n", "csv") == [(2, "a"), (3, "b")]
    assert prompts(rb'{"prompt": "a\ufeffb", "custom_id": "\ufeffx"}', "jsonl") == [(1, "ab")]  # copied with it


def test_files_joined_without_a_line_end_are_told() -> None:
    mark, said = b"\xef\xbb\xbf", "end the line there, or remove it"
    assert errors(b"a red ball" + mark + b"a cube\n", "text") == [f"p:1: has a byte order mark at character 11: {said}"]
    assert errors(b'{"prompt": "a"}' + mark + LINES) == [f"p:1: has a byte order mark at character 16: {said}"]
    assert errors(b"prompt,seed\na,1" + mark + b"\n", "csv") == [f"p:2: has a byte order mark at character 2: {said}"]


def test_the_header_of_a_second_csv_is_no_prompt() -> None:
    assert errors(b"prompt,seed\na,1\nprompt,seed\nb,2\n", "csv") == [
        "p:3: is the header row once more: remove it (were files joined here?)"
    ]


@pytest.mark.parametrize("separator", [b"sep=;", b'"sep=;"', b"SEP=;"])
@pytest.mark.parametrize("format", ["csv", "auto"])
def test_excels_first_line_names_the_delimiter(separator: bytes, format: str) -> None:
    assert prompts(separator + b"\r\nprompt;seed\r\na, b;1\r\n", format) == [(3, "a, b")]
    assert prompts(separator.replace(b";", b"|") + b"\nseed|prompt\n1|a;b\n", format) == [(3, "a;b")]
    assert prompts(separator.replace(b";", b"\t") + b"\nseed\tprompt\n1\ta\n", format) == [(3, "a")]
    with pytest.raises(BadFile, match=r'^p\.csv:2: unknown column "promt"'):
        read(separator + b"\npromt;seed\n", "csv")


@pytest.mark.parametrize("format", ["jsonl", "auto"])
def test_gzip_is_read_by_its_first_bytes_whatever_its_name(format: str) -> None:
    packed = gzip.compress(LINES)
    assert prompts(packed, format) == prompts(LINES, "jsonl")
    assert prompts(packed + gzip.compress(LINES) + bytes(512), format) == prompts(LINES + LINES, "jsonl")
    assert prompts(gzip.compress(b"\xef\xbb\xbf" + LINES), format) == prompts(LINES, "jsonl")


def test_a_large_file_comes_out_of_gzip_as_it_went_in() -> None:
    draw = random.Random(0)
    data = "".join(f"ball {draw.random()}\n" for _ in range(40_000)).encode()
    assert prompts(gzip.compress(data)) == prompts(data)


@pytest.mark.parametrize("name", ["p.jsonl.gz", "P.CSV.GZ", "p.txt", "p.gz", "p"])
def test_the_name_below_gz_tells_the_format(name: str) -> None:
    auto = PromptsFormat.AUTO
    told = {"p.jsonl.gz": PromptsFormat.JSONL, "P.CSV.GZ": PromptsFormat.CSV, "p.txt": PromptsFormat.TEXT}
    assert format_of(name) is GenerationRequest(prompts_uri=name).format is told.get(name, auto)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(LINES)[:-3], "ends in the middle of its gzip data: it was cut short"),
        (gzip.compress(LINES)[:-8] + bytes(8), "is damaged: its gzip data cannot be unpacked"),
        (gzip.compress(LINES) + b"more", "is damaged: its gzip data cannot be unpacked"),
        (gzip.compress(gzip.compress(LINES)), "is compressed with gzip twice: unpack it"),
    ],
    ids=["cut", "checksum", "trailing", "twice"],
)
def test_gzip_that_cannot_be_trusted_is_refused_as_a_whole(data: bytes, message: str) -> None:
    with pytest.raises(BadFile, match=f"^p.jsonl: {message}$"):
        read(data)


def test_gzip_that_unpacks_to_far_more_than_it_is_stops_there() -> None:
    whole = 8 * FREE
    packed = gzip.compress((b" " * 1023 + b"\n") * (FREE >> 10)) * 8
    assert whole > MAX_RATIO * len(packed)

    class Counted(io.BytesIO):
        taken = 0

        def read(self, size: int | None = -1) -> bytes:
            self.taken += len(data := super().read(size))
            return data

    stream = Counted(packed)
    with pytest.raises(BadFile, match=r"unpacks to more than 1,073,741,824 bytes, or 200 times its size: unpack it"):
        for _ in text_lines(stream, "p"):
            pass
    assert stream.taken <= len(packed)


def archive(*names: str, first: bytes = b"") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        if first:
            file.writestr("mimetype", first)
        for name in names:
            file.writestr(name, "<x/>")
    return out.getvalue()


def tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        file.addfile(tarfile.TarInfo("prompts.jsonl"))
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (archive("[Content_Types].xml", "xl/workbook.xml"), "is an Excel workbook (.xlsx): save the sheet as CSV"),
        (archive("[Content_Types].xml", "word/document.xml"), "is a Word document (.docx): save it as plain text"),
        (
            archive("content.xml", first=b"application/vnd.oasis.opendocument.spreadsheet"),
            "is an OpenDocument spreadsheet (.ods): save the sheet as CSV",
        ),
        (archive("prompts.jsonl"), "is a ZIP archive: unpack it"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "is an old Office file (.xls, .doc): save the sheet"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "is a PDF: save it as plain text"),
        (b"{\\rtf1\\ansi a red ball}", "is rich text (RTF): save it as plain text"),
        (b"<!DOCTYPE html>\n<html><body>", "is a web page or XML: save it as plain text"),
        (b"\x28\xb5\x2f\xfd" + bytes(20), "is compressed with zstd, which is not read here: unpack it, or compress"),
        (lzma.compress(LINES), "is compressed with xz, which is not read here"),
        (bz2.compress(LINES), "is compressed with bzip2, which is not read here"),
        (tar(), "is a tar archive: unpack it"),
        (gzip.compress(tar()), "is a tar archive: unpack it"),
        (b"PAR1" + bytes(40), "is a Parquet file: write it as JSON lines or CSV"),
        (b"\x89PNG\r\n\x1a\n" + bytes(20), "is a picture (PNG)"),
        (LINES.decode().encode("utf-16"), "is written in UTF-16: save it as UTF-8"),
        (LINES.decode().encode("utf-16-le"), "is written in UTF-16: save it as UTF-8"),
        (LINES.decode().encode("utf-16-be"), "is written in UTF-16: save it as UTF-8"),
        (LINES.decode().encode("utf-32"), "is written in UTF-32: save it as UTF-8"),
    ],
    ids=name_of,
)
@pytest.mark.parametrize("format", PromptsFormat)
def test_a_file_that_is_no_text_is_named_in_one_sentence(data: bytes, message: str, format: str) -> None:
    with pytest.raises(BadFile) as caught:
        read(data, format)
    assert str(caught.value).startswith(f"p.{format}: {message}")
    assert "\n" not in str(caught.value)


def test_a_compressed_file_is_submitted_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl.gz"
    file.write_bytes(gzip.compress(LINES))
    good = check_file("p.jsonl.gz", file, {}, find_model("mini"), lambda said: pytest.fail(said))
    assert (good.checked.prompts, good.request.prompts_format) == (2, PromptsFormat.JSONL)
    assert good.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
