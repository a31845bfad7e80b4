"""Prompt files as records: JSONL, CSV or plain text, decoded a chunk at a time.

A hostile file costs bounded memory and time: lines, headers and messages are cut where they would grow without end."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Generator, Iterator
from itertools import chain
from typing import Any, BinaryIO, NamedTuple, cast

from flows.request.fields import CELLS, KNOWN, MAX_UNKNOWN, Given, shown_value, unknown_name
from flows.request.form import PromptsFormat
from flows.request.modes import Fault
from flows.request.unpack import BadFile, plain_chunks

MAX_LINE = 1_000_000  # bytes of one line
MARK = b"\xef\xbb\xbf"  # the byte order mark with which some programs begin a UTF-8 file
MAX_HEADER_FAULTS = 50  # of a CSV header that are named one by one
EXAMPLE = '{"prompt": "a red ball spins"}'


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
    """Lines without their ends, which are \\n, \\r\\n or \\r alone. Holds at most MAX_LINE and a chunk of any stream.

    A byte order mark at the beginning of a line is dropped: files that were joined have one in their middle. Raises
    BadFile for a file that is no text.
    """
    number, pending, too_long, halved = 0, b"", False, False
    for chunk in plain_chunks(stream, source):
        if halved:  # a \r at the end of the last chunk: perhaps the first half of \r\n
            chunk = b"\r" + chunk
        if halved := chunk.endswith(b"\r"):
            chunk = chunk[:-1]
        if b"\r" in chunk:
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *ended, rest = chunk.split(b"\n")
        for data in ended:
            number += 1
            data = pending + data
            yield _Line(number, None if too_long or len(data) > MAX_LINE else data.removeprefix(MARK))
            pending, too_long = b"", False
        pending = b"" if too_long else pending + rest
        if len(pending) > MAX_LINE:
            pending, too_long = b"", True
    if pending or too_long:
        yield _Line(number + 1, None if too_long else pending.removeprefix(MARK))


def sniff(lines: Iterator[_Line]) -> tuple[PromptsFormat, Iterator[_Line]]:
    """Without a telling file name the first line decides: JSON, a header row with the column prompt, or a prompt."""
    for line in lines:
        if line.data is None or line.data.strip():
            format = PromptsFormat.TEXT
            if line.data is not None and line.data.lstrip()[:1] in (b"{", b"["):
                format = PromptsFormat.JSONL
            elif line.data is not None and _is_header(line.data.decode(errors="replace")):
                format = PromptsFormat.CSV
            return format, chain([line], lines)
    return PromptsFormat.TEXT, lines


_TOO_LONG = Fault("", f"the line is longer than {MAX_LINE:,} bytes: write one prompt a line")


def _is_header(text: str) -> bool:
    return _SEPARATOR.fullmatch(text) is not None or "prompt" in _split_header(text)[1]


def read_text(lines: Iterator[_Line], source: str) -> Iterator[Record]:
    for number, data in lines:
        if data is None:
            yield Record(number, {}, (_TOO_LONG,))
        elif data.strip():
            text, fault = _decode(data)
            fault = fault or _joined(text)
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
        if text[error.pos : error.pos + 1] == "\ufeff" and (joined := _joined(text)):
            return {}, (joined,)
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
    names = _check_header(reader.header(source), source, reader.number)
    for number, cells, faults in reader.rows():
        if not faults and len(cells) != len(names):
            unit = "cell" if len(cells) == 1 else "cells"
            quotes = " (a text with a comma in it needs quotes around it)" if len(cells) > len(names) else ""
            faults = (Fault("", f"has {len(cells)} {unit}, the header has {len(names)}{quotes}"),)
        if not faults and [cell.strip() for cell in cells] == names:
            faults = (Fault("", "is the header row once more: remove it (were files joined here?)"),)
        if faults:
            yield Record(number, {}, faults)  # cells may stand under the wrong names: what they say means nothing
        else:
            values = {n: c for n, c in zip(names, cells, strict=True) if c.strip() or n == "prompt"}
            yield Record(number, values, given=CELLS)


_SEPARATOR = re.compile(r'\s*"?sep=([^"\s]|\t)"?\s*', re.IGNORECASE)  # Excel's first line, which names the delimiter


def _split_header(text: str, delimiters: str = ",;\t") -> tuple[str, list[str]]:
    """(delimiter, names): a spreadsheet may have written semicolons or tabs in place of commas."""
    for delimiter in delimiters:
        names = [name.strip(' "') for name in text.split(delimiter)]
        if "prompt" in names:
            return delimiter, names
    return delimiters[0], [name.strip(' "') for name in text.split(delimiters[0])]


def _check_header(names: list[str], source: str, line: int) -> list[str]:
    wrong: list[str] = []
    for place, name in enumerate(names, 1):
        if len(wrong) == MAX_HEADER_FAULTS:
            wrong.append(
                f"{source}:{line}: the header has {len(names) - place + 1:,} more columns, which were not looked at"
            )
            break
        if not name:
            wrong.append(f"{source}:{line}: column {place} of the header has no name")
        elif name not in KNOWN:
            wrong.append(f"{source}:{line}: {unknown_name('column', name)}")
        elif names.index(name) + 1 < place:
            wrong.append(f"{source}:{line}: column {shown_value(name)} is there twice")
    if "prompt" not in names and not any(message.endswith('did you mean "prompt"?') for message in wrong):
        wrong.append(f"{source}:{line}: the header row has no column prompt")
    if wrong:
        raise BadFile("\n".join(wrong))
    return names


class _CsvReader:
    """csv.reader over bounded lines, which knows where each row began and survives rows it cannot read."""

    def __init__(self, lines: Iterator[_Line]) -> None:
        self._lines = lines
        self.number = 0  # of the last line that was read
        self._too_long = False
        self._delimiter = ","

    def header(self, source: str) -> list[str]:
        delimiters = ",;\t"
        for number, data in self._lines:
            self.number = number
            if data is None:
                raise BadFile(f"{source}:{number}: the header row is longer than {MAX_LINE:,} bytes")
            if data.strip():
                text, fault = _decode(data)
                if fault:
                    raise BadFile(f"{source}:{number}: {fault.message}")
                if separator := _SEPARATOR.fullmatch(text):
                    delimiters = separator[1]
                    continue
                self._delimiter, names = _split_header(text, delimiters)
                return names
        return ["prompt"]  # an empty file: it has no rows either, which says so

    def rows(self) -> Iterator[tuple[int, list[str], tuple[Fault, ...]]]:
        reader = csv.reader(self._texts(), delimiter=self._delimiter, strict=True)
        while True:
            before, self._too_long = self.number, False
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                what = str(error).replace("unexpected end of data", "a quote is opened and never closed")
                yield before + 1, [], (Fault("", f"is not CSV: {_lower(what)}"),)
                if self.number > before + 1:
                    return  # an open quote has swallowed lines: where the next row begins is anybody's guess
                continue
            if self._too_long:
                yield before + 1, cells, (_TOO_LONG,)
            elif any(cell.strip() for cell in cells):
                bad = [_not_utf8(cell) or _joined(cell) for cell in cells]
                yield before + 1, cells, tuple(fault for fault in bad if fault)[:1]

    def _texts(self) -> Generator[str, None, None]:
        for number, data in self._lines:
            self.number = number
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


def _joined(text: str) -> Fault | None:
    """The fault of a text in which the byte order mark of another file stands: it may be two prompts."""
    if (at := text.find("\ufeff")) < 0:
        return None
    return Fault("", f"has a byte order mark at character {at + 1}: end the line there, or remove it")


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
