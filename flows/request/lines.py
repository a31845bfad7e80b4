"""Prompt files as records: JSONL, CSV or plain text, decoded a chunk at a time.

A hostile file costs bounded memory and time: lines, headers and messages are cut where they would grow without end."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Generator, Iterator
from itertools import chain
from typing import Any, BinaryIO, NamedTuple, cast

from flows.request.fields import CELLS, KNOWN, MAX_UNKNOWN, Given, shown_value, unknown_name
from flows.request.form import PromptsFormat
from flows.request.modes import Fault

MAX_LINE = 1_000_000  # bytes of one line
CHUNK = 1 << 18
MAX_HEADER_FAULTS = 50  # of a CSV header that are named one by one
EXAMPLE = '{"prompt": "a red ball spins"}'


class BadFile(ValueError):
    """The file as a whole cannot be read as prompts: missing, empty, not UTF-8, or without a usable header row."""

    exit_code = 2


class _Line(NamedTuple):
    number: int
    data: bytes | None  # None: longer than MAX_LINE


class Record(NamedTuple):
    """A line's keys and values, or why there are none."""

    line: int
    values: dict[str, Any]
    faults: tuple[Fault, ...] = ()
    given: Given | None = None  # how values are written in this format


def text_lines(stream: BinaryIO, source: str) -> Iterator[_Line]:
    """Lines without their ends. Holds at most MAX_LINE and a chunk of any stream."""
    number, pending, too_long, first = 0, b"", False, True
    while chunk := stream.read(CHUNK):
        if first:
            first = False
            if chunk.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise BadFile(f"{source}: is written in UTF-16: save it as UTF-8")
            chunk = chunk.removeprefix(b"\xef\xbb\xbf")
        *ended, rest = chunk.split(b"\n")
        for data in ended:
            number += 1
            data = pending + data
            yield _Line(number, None if too_long or len(data) > MAX_LINE else data.removesuffix(b"\r"))
            pending, too_long = b"", False
        pending = b"" if too_long else pending + rest
        if len(pending) > MAX_LINE:
            pending, too_long = b"", True
    if pending or too_long:
        yield _Line(number + 1, None if too_long else pending.removesuffix(b"\r"))


def sniff(lines: Iterator[_Line]) -> tuple[PromptsFormat, Iterator[_Line]]:
    """Without a telling file name the first line decides: JSON, a header row with the column prompt, or a prompt."""
    for line in lines:
        if line.data is None or line.data.strip():
            format = PromptsFormat.TEXT
            if line.data is not None and line.data.lstrip()[:1] in (b"{", b"["):
                format = PromptsFormat.JSONL
            elif line.data is not None and "prompt" in _split_header(line.data.decode(errors="replace"))[1]:
                format = PromptsFormat.CSV
            return format, chain([line], lines)
    return PromptsFormat.TEXT, lines


_TOO_LONG = Fault("", f"the line is longer than {MAX_LINE:,} bytes: write one prompt a line")


def read_text(lines: Iterator[_Line], source: str) -> Iterator[Record]:
    for number, data in lines:
        if data is None:
            yield Record(number, {}, (_TOO_LONG,))
        elif data.strip():
            text, fault = _decode(data)
            yield Record(number, {}, (fault,)) if fault else Record(number, {"prompt": text})


def read_jsonl(lines: Iterator[_Line], source: str) -> Iterator[Record]:
    first = True
    for number, data in lines:
        if data is None:
            yield Record(number, {}, (_TOO_LONG,))
        elif not data.strip():
            continue
        elif first and data.lstrip()[:1] == b"[":
            hint = "jq -c '.[]' turns the one into the other"
            raise BadFile(f"{source}: is a JSON array: write one object a line, like {EXAMPLE} ({hint})")
        else:
            text, fault = _decode(data)
            yield Record(number, {}, (fault,)) if fault else Record(number, *_parse_object(text))
        first = False


class _Twice(dict[str, Any]):
    """A JSON object that gave a key more than once; `repeated` lists those keys."""

    repeated: tuple[str, ...] = ()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) == len(pairs):
        return values
    twice = _Twice(values)
    twice.repeated = tuple(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
    return twice


_DECODER = json.JSONDecoder(object_pairs_hook=_object)  # made once: making it costs as much as reading a line


def _parse_object(text: str) -> tuple[dict[str, Any], tuple[Fault, ...]]:
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        return {}, (Fault("", f"is not JSON: {_lower(error.msg)} at column {error.colno}"),)
    except RecursionError:
        return {}, (Fault("", "is not JSON that can be read: it is nested too deeply"),)
    except ValueError:
        return {}, (Fault("", "is not JSON that can be read: a number has too many digits"),)
    if not isinstance(value, dict):
        return {}, (Fault("", f"{shown_value(value)} must be an object, like {EXAMPLE}"),)
    repeated = value.repeated[:MAX_UNKNOWN] if isinstance(value, _Twice) else ()
    faults = tuple(Fault(key, f"key {shown_value(key)} is given twice") for key in repeated)
    return cast(dict[str, Any], value), faults


def read_csv(lines: Iterator[_Line], source: str) -> Iterator[Record]:
    reader = _CsvReader(lines)
    names = _check_header(reader.header(source), source)
    for number, cells, faults in reader.rows():
        if not faults and len(cells) != len(names):
            unit = "cell" if len(cells) == 1 else "cells"
            quotes = " (a text with a comma in it needs quotes around it)" if len(cells) > len(names) else ""
            faults = (Fault("", f"has {len(cells)} {unit}, the header has {len(names)}{quotes}"),)
        if faults:
            yield Record(number, {}, faults)  # cells may stand under the wrong names: what they say means nothing
        else:
            values = {n: c for n, c in zip(names, cells, strict=True) if c.strip() or n == "prompt"}
            yield Record(number, values, given=CELLS)


def _split_header(text: str) -> tuple[str, list[str]]:
    """(delimiter, names): a spreadsheet may have written semicolons or tabs in place of commas."""
    for delimiter in ",;\t":
        names = [name.strip(' "') for name in text.split(delimiter)]
        if "prompt" in names:
            return delimiter, names
    return ",", [name.strip(' "') for name in text.split(",")]


def _check_header(names: list[str], source: str) -> list[str]:
    wrong: list[str] = []
    for place, name in enumerate(names, 1):
        if len(wrong) == MAX_HEADER_FAULTS:
            wrong.append(
                f"{source}:1: the header has {len(names) - place + 1:,} more columns, which were not looked at"
            )
            break
        if not name:
            wrong.append(f"{source}:1: column {place} of the header has no name")
        elif name not in KNOWN:
            wrong.append(f"{source}:1: {unknown_name('column', name)}")
        elif names.index(name) + 1 < place:
            wrong.append(f"{source}:1: column {shown_value(name)} is there twice")
    if "prompt" not in names and not any(message.endswith('did you mean "prompt"?') for message in wrong):
        wrong.append(f"{source}:1: the header row has no column prompt")
    if wrong:
        raise BadFile("\n".join(wrong))
    return names


class _CsvReader:
    """csv.reader over bounded lines, which knows where each row began and survives rows it cannot read."""

    def __init__(self, lines: Iterator[_Line]) -> None:
        self._lines = lines
        self._number = 0  # the last line given to csv
        self._too_long = False
        self._delimiter = ","

    def header(self, source: str) -> list[str]:
        for number, data in self._lines:
            self._number = number
            if data is None:
                raise BadFile(f"{source}:{number}: the header row is longer than {MAX_LINE:,} bytes")
            if data.strip():
                text, fault = _decode(data)
                if fault:
                    raise BadFile(f"{source}:{number}: {fault.message}")
                self._delimiter, names = _split_header(text)
                return names
        return ["prompt"]  # an empty file: it has no rows either, which says so

    def rows(self) -> Iterator[tuple[int, list[str], tuple[Fault, ...]]]:
        reader = csv.reader(self._texts(), delimiter=self._delimiter, strict=True)
        while True:
            before, self._too_long = self._number, False
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                what = str(error).replace("unexpected end of data", "a quote is opened and never closed")
                yield before + 1, [], (Fault("", f"is not CSV: {_lower(what)}"),)
                if self._number > before + 1:
                    return  # an open quote has swallowed lines: where the next row begins is anybody's guess
                continue
            if self._too_long:
                yield before + 1, cells, (_TOO_LONG,)
            elif any(cell.strip() for cell in cells):
                bad = [_not_utf8(cell) for cell in cells]
                yield before + 1, cells, tuple(fault for fault in bad if fault)[:1]

    def _texts(self) -> Generator[str, None, None]:
        for number, data in self._lines:
            self._number = number
            if data is None:
                self._too_long = True
                yield "\n"
            else:
                yield data.decode(errors="surrogateescape") + "\n"


def _decode(data: bytes) -> tuple[str, Fault | None]:
    try:
        return data.decode(), None
    except UnicodeDecodeError as error:
        where = f"byte 0x{data[error.start]:02x} at column {error.start + 1}"
        return "", Fault("", f"{where} is not UTF-8: save the file as UTF-8")


def _not_utf8(cell: str) -> Fault | None:
    """csv wants text, so bad bytes travel through it as lone surrogates."""
    if cell.isascii():
        return None
    for character in cell:
        if "\udc80" <= character <= "\udcff":
            return Fault("", f"byte 0x{ord(character) - 0xDC00:02x} is not UTF-8: save the file as UTF-8")
    return None


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
