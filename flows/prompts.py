"""Reads prompt files: JSONL, CSV with a header row, or plain text with one prompt a line.

A file is a stream of bytes of any length, read in bounded memory: one line at a time, and of a line that is too long
only its number is kept. Every line becomes a `Prompt` with all settings filled in, or a `BadLine` with everything that
is wrong with it. Reading twice gives the same twice, so a request is checked in one pass and recorded in a second.

What is decided here:
* Blank lines (in CSV also rows of empty cells) are skipped wherever they stand; an empty `prompt` is an error.
* `null` in JSONL and an empty cell in CSV mean "not given". White space around prompts and ids is dropped.
* 49.0 is a whole number (data frames write it so); true, "49" in quotes and 4.5 are not.
* A seed that is given is used as it is. Any other follows from the request's seed, the prompt and the custom_id, and
  so does not change when lines are added, moved or given other sizes. The same line twice is the same clip twice.

It knows neither the ledger nor the model's weights: `Defaults` says which sizes and lengths the model can make.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import math
import os
import re
import stat
from array import array
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Protocol, cast

from flows.modes import (
    PLAIN,
    STITCHED,
    Conditions,
    Fault,
    Find,
    Size,
    check_sources,
    mode_of,
    nowhere,
    settle,
    with_request,
)
from flows.request import (
    CONDITIONS,
    MAX_FPS,
    MAX_FRAMES,
    MAX_GUIDANCE,
    MAX_ID,
    MAX_NAME,
    MAX_PIXELS,
    MAX_PROMPT,
    MAX_SAMPLES,
    MAX_SEED,
    MAX_SHIFT,
    MAX_SIDE,
    MAX_STEPS,
    SOURCES,
    Defaults,
    Direction,
    Mode,
    PromptsFormat,
    Solver,
    digest_of,
)

if TYPE_CHECKING:
    from model.weights import ModelCard

# Goes up when the same settings begin to give other pixels (sampler, noise, decoder, precision), so that old takes are
# never served for new recipes.
NUMERICS = 3

MAX_LINE = 1_000_000  # bytes of one line
CHUNK = 1 << 18
MAX_HEADER_FAULTS = 50  # of a CSV header that are named one by one
MAX_UNKNOWN = 5  # unknown keys of one line that are named one by one
EXAMPLE = '{"prompt": "a red ball spins"}'


class BadFile(ValueError):
    """The file as a whole cannot be read as prompts: missing, empty, not UTF-8, or without a usable header row."""


class BadUri(ValueError):
    """`prompts_uri` names something that a request may not read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BadLine:
    """A line that cannot become a clip, with everything that is wrong with it."""

    index: int  # which prompt of the file, from 0, counting bad ones and not counting blank lines
    line: int  # where it begins in the file, from 1
    faults: tuple[Fault, ...]
    prompt: str = ""  # as far as it could be read, for the ledger's row
    custom_id: str | None = None

    @property
    def reason(self) -> str:
        return "; ".join(fault.message for fault in self.faults)

    def messages(self, source: str) -> list[str]:
        """One `file:line: message` for each fault."""
        return [f"{source}:{self.line}: {fault.message}" for fault in self.faults]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt with every setting decided. It asks for `samples` clips."""

    index: int
    line: int
    prompt: str
    custom_id: str | None
    negative_prompt: str | None
    width: int
    height: int
    frames: int
    fps: int
    steps: int
    guidance: float  # 1 is off
    solver: str
    shift: float
    samples: int
    seed: int
    step_cache: float | None = None
    conditions: Conditions = PLAIN
    shapes: tuple[str, ...] = ()  # WIDTHxHEIGHTxFRAMES of what the model makes at once

    def seed_of(self, sample: int) -> int:
        """The seed of one sample: they count up from the prompt's seed and wrap below 2**63."""
        return (self.seed + sample) & MAX_SEED


def recipe(prompt: Prompt, sample: int, *, model_digest: str, rewritten: str | None = None) -> str:
    """sha256 hex of everything that determines a clip's pixels. Clips of one recipe are rendered once.

    `rewritten` takes the prompt's place if there is one. The partition is not part of it: pixels of different
    partitions differ by rounding only, and that drift is measured and stored with the clip.
    """
    return digest_of(
        {
            "numerics": NUMERICS,
            "model": model_digest,
            "prompt": rewritten or prompt.prompt,
            "negative_prompt": prompt.negative_prompt or "",
            "width": prompt.width,
            "height": prompt.height,
            "frames": prompt.frames,
            "fps": prompt.fps,
            "steps": prompt.steps,
            "guidance": float(prompt.guidance),
            "solver": prompt.solver,
            "shift": float(prompt.shift),
            "seed": prompt.seed_of(sample),
            **({"step_cache": float(prompt.step_cache)} if prompt.step_cache else {}),
            **prompt.conditions.recipe(),
        }
    )


def derived_seed(request_seed: int, prompt: str, custom_id: str | None) -> int:
    """The seed of a prompt that brings none: 48 bits, which spreadsheets and JavaScript write without rounding."""
    return int(digest_of([request_seed, prompt, custom_id])[:12], 16)


# ---------------------------------------------------------------------------------------------------- reading


def read_prompts(
    stream: BinaryIO, *, source: str, format: PromptsFormat, defaults: Defaults, find: Find = nowhere
) -> Iterator[Prompt | BadLine]:
    """Every line of `stream` (open at its beginning), in order. `source` names the file in messages.

    `find` looks up the pictures, videos and clips that lines are made from.

    Raises BadFile when the file as a whole cannot be used; an empty one is found at its end.
    """
    lines = _lines(stream, source)
    if format is PromptsFormat.AUTO:
        format, lines = _sniff(lines)
    read = {PromptsFormat.JSONL: _read_jsonl, PromptsFormat.CSV: _read_csv, PromptsFormat.TEXT: _read_text}[format]
    ids = _FirstSeen()
    index = -1
    for index, record in enumerate(read(lines, source)):
        yield _settle(index, record, defaults, ids, find)
    if index < 0:
        raise BadFile(f"{source}: holds no prompts: {_HOW_TO_WRITE[format]}")


_HOW_TO_WRITE = {
    PromptsFormat.JSONL: f"write one JSON object a line, like {EXAMPLE}",
    PromptsFormat.CSV: "write a header row with the column prompt, and a row for every prompt",
    PromptsFormat.TEXT: "write one prompt a line",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What a whole file amounts to."""

    prompts: int  # good ones
    clips: int  # that they ask for
    bad: int  # lines
    faults: int  # things wrong with them
    messages: tuple[str, ...]  # the first of them, as `file:line: message`
    made_from: str | None = None  # sha256 hex over all sources that lines name; None: no line names one
    shapes: Mapping[str, int] = field(default_factory=dict[str, int])  # WxHxF that the model makes at once: clips


def check_prompts(
    stream: BinaryIO,
    *,
    source: str,
    format: PromptsFormat,
    defaults: Defaults,
    keep: int = 100,
    report: Callable[[str], None] | None = None,
    find: Find = nowhere,
) -> Checked:
    """Reads the whole file and counts. `report` gets every message as it is found; `keep` of them are kept.

    Raises BadFile.
    """
    prompts = clips = bad = faults = 0
    messages: list[str] = []
    identity, named = hashlib.sha256(), False
    shapes: Counter[str] = Counter()
    for line in read_prompts(stream, source=source, format=format, defaults=defaults, find=find):
        if isinstance(line, Prompt):
            prompts += 1
            clips += line.samples
            for shape in line.shapes:
                shapes[shape] += line.samples
            for each in line.conditions.identity:
                identity.update(f"{each}\n".encode())
                named = True
            continue
        bad += 1
        faults += len(line.faults)
        for message in line.messages(source):
            if report:
                report(message)
            if len(messages) < keep:
                messages.append(message)
    return Checked(
        prompts=prompts,
        clips=clips,
        bad=bad,
        faults=faults,
        messages=tuple(messages),
        made_from=identity.hexdigest() if named else None,
        shapes=shapes,
    )


def strange_shapes(card: ModelCard, shapes: Mapping[str, int]) -> str:
    """A warning about clips of shapes that the model was not trained for; '' where there are none."""
    strange = {shape: count for shape, count in shapes.items() if card.trained and shape not in card.trained}
    if not strange:
        return ""
    clips = ", ".join(f"{shape} ({count} clip{'s' * (count != 1)})" for shape, count in sorted(strange.items()))
    return f"{card.name} was not trained for {clips}: expect less of them; it knows {', '.join(card.trained)}"


def check_defaults(defaults: Defaults) -> list[str]:
    """What is wrong with the settings of the request itself, in the same words as for a line."""
    given = {key: getattr(defaults, key) for key in _SETTINGS}
    stitched = Mode(defaults.conditions.get("mode", Mode.TEXT_TO_VIDEO)) in STITCHED
    _, faults = _settings(given, defaults, _Given(), any_length=stitched)
    if {"mode", *SOURCES} & defaults.conditions.keys():  # options alone are for lines that name a mode
        faults += check_sources(defaults.conditions)
    return [fault.message for fault in faults]


def digest_stream(stream: BinaryIO) -> tuple[str, int]:
    """(sha256 hex, bytes) of what is left in the stream."""
    digest, size = hashlib.sha256(), 0
    while chunk := stream.read(CHUNK):
        digest.update(chunk)
        size += len(chunk)
    return digest.hexdigest(), size


# ---------------------------------------------------------------------------------------------------- lines


class _Line(NamedTuple):
    number: int
    data: bytes | None  # None: longer than MAX_LINE


class _Record(NamedTuple):
    """A line's keys and values, or why there are none."""

    line: int
    values: dict[str, Any]
    faults: tuple[Fault, ...] = ()
    given: _Given | None = None  # how values are written in this format


def _lines(stream: BinaryIO, source: str) -> Iterator[_Line]:
    """Lines without their ends. Holds at most MAX_LINE and a chunk, whatever the stream brings."""
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


def _sniff(lines: Iterator[_Line]) -> tuple[PromptsFormat, Iterator[_Line]]:
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


def _read_text(lines: Iterator[_Line], source: str) -> Iterator[_Record]:
    for number, data in lines:
        if data is None:
            yield _Record(number, {}, (_TOO_LONG,))
        elif data.strip():
            text, fault = _decode(data)
            yield _Record(number, {}, (fault,)) if fault else _Record(number, {"prompt": text})


def _read_jsonl(lines: Iterator[_Line], source: str) -> Iterator[_Record]:
    first = True
    for number, data in lines:
        if data is None:
            yield _Record(number, {}, (_TOO_LONG,))
        elif not data.strip():
            continue
        elif first and data.lstrip()[:1] == b"[":
            hint = "jq -c '.[]' turns the one into the other"
            raise BadFile(f"{source}: is a JSON array: write one object a line, like {EXAMPLE} ({hint})")
        else:
            text, fault = _decode(data)
            yield _Record(number, {}, (fault,)) if fault else _Record(number, *_parse_object(text))
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
        return {}, (Fault("", f"{_show(value)} must be an object, like {EXAMPLE}"),)
    repeated = value.repeated[:MAX_UNKNOWN] if isinstance(value, _Twice) else ()
    faults = tuple(Fault(key, f"key {_show(key)} is given twice") for key in repeated)
    return cast(dict[str, Any], value), faults


def _read_csv(lines: Iterator[_Line], source: str) -> Iterator[_Record]:
    reader = _CsvReader(lines)
    names = _check_header(reader.header(source), source)
    for number, cells, faults in reader.rows():
        if not faults and len(cells) != len(names):
            unit = "cell" if len(cells) == 1 else "cells"
            quotes = " (a text with a comma in it needs quotes around it)" if len(cells) > len(names) else ""
            faults = (Fault("", f"has {len(cells)} {unit}, the header has {len(names)}{quotes}"),)
        if faults:
            yield _Record(number, {}, faults)  # cells may stand under the wrong names: what they say means nothing
        else:
            values = {n: c for n, c in zip(names, cells, strict=True) if c.strip() or n == "prompt"}
            yield _Record(number, values, given=_CELLS)


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
        elif name not in _KNOWN:
            wrong.append(f"{source}:1: {_unknown('column', name)}")
        elif names.index(name) + 1 < place:
            wrong.append(f"{source}:1: column {_show(name)} is there twice")
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


# ---------------------------------------------------------------------------------------------------- checking


class _Given:
    """How JSON writes values."""

    def whole(self, value: Any) -> int | None:
        if isinstance(value, bool):
            return None
        if isinstance(value, int):
            return value
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            return int(value)
        return None

    def number(self, value: Any) -> float | None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        try:
            return float(value) if math.isfinite(value) else None
        except OverflowError:
            return None

    def show(self, value: Any) -> str:
        return _show(value)


class _Cells(_Given):
    """How CSV writes values: all of them are text."""

    def whole(self, value: Any) -> int | None:
        return int(value.split(".")[0]) if re.fullmatch(r"\s*[+-]?[0-9]{1,30}(\.0*)?\s*", value) else None

    def number(self, value: Any) -> float | None:
        if not re.fullmatch(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*", value):
            return None
        return number if math.isfinite(number := float(value)) else None

    def show(self, value: Any) -> str:
        return _cut(value.strip()) if value.strip().isprintable() else _show(value)


_JSON, _CELLS = _Given(), _Cells()


class _Bound(NamedTuple):
    low: float
    high: float

    def __str__(self) -> str:
        low, high = (f"{n:g}" if isinstance(n, float) else str(n) for n in self)
        return f"between {low} and {high}"


_WHOLE = {
    "width": _Bound(16, MAX_SIDE),
    "height": _Bound(16, MAX_SIDE),
    "frames": _Bound(1, MAX_FRAMES),
    "fps": _Bound(1, MAX_FPS),
    "steps": _Bound(1, MAX_STEPS),
    "samples": _Bound(1, MAX_SAMPLES),
    "seed": _Bound(0, MAX_SEED),
}
_NUMBERS = {"guidance": _Bound(1, MAX_GUIDANCE), "shift": _Bound(0.1, MAX_SHIFT)}
_SETTINGS = (*_WHOLE, *_NUMBERS, "step_cache", "solver", "negative_prompt")
_KNOWN = frozenset((*_SETTINGS, *CONDITIONS, "prompt", "custom_id", "size"))
_SOLVERS = tuple(solver.value for solver in Solver)


def _settle(index: int, record: _Record, defaults: Defaults, ids: _FirstSeen, find: Find) -> Prompt | BadLine:
    """One line's values with the defaults filled in, or all that is wrong with them."""
    given = record.given or _JSON
    values = {key: value for key, value in record.values.items() if value is not None}
    faults = list(record.faults)
    prompt, custom_id, settings, named = "", None, {}, {}
    if not faults or values:
        prompt = _text(values, "prompt", MAX_PROMPT, faults, needed=True) or ""
        custom_id = _text(values, "custom_id", MAX_ID, faults)
        named, more = _conditions(values, defaults, given)
        faults += more
        settings, more = _settings(values, defaults, given, any_length=mode_of(named) in STITCHED)
        faults += more
        faults += _unknown_keys(values)
    if custom_id is not None:
        before = ids.first(custom_id, record.line)
        if before is not None:
            faults.append(Fault("custom_id", f"custom_id={_show(custom_id)} is already the id of line {before}"))
    size = Size(
        width=settings.get("width", defaults.width),
        height=settings.get("height", defaults.height),
        frames=settings.get("frames", defaults.asked_frames),
        fps=settings.get("fps", defaults.fps),
        asked=defaults.asked_size or "width" in settings or "height" in settings,
    )
    conditions, shapes = PLAIN, ()
    if not faults:
        conditions, shapes, faults = settle(named, size, defaults, find)
    if not faults and (too_large := _too_large(size.width, size.height, size.frames or 1)):
        faults.append(too_large)
    if faults:
        return BadLine(index=index, line=record.line, faults=tuple(faults), prompt=prompt, custom_id=custom_id)
    seed = settings.get("seed")
    return Prompt(
        index=index,
        line=record.line,
        prompt=prompt,
        custom_id=custom_id,
        negative_prompt=settings.get("negative_prompt", defaults.negative_prompt),
        width=size.width,
        height=size.height,
        frames=size.frames or defaults.frames,
        fps=size.fps,
        steps=settings.get("steps", defaults.steps),
        guidance=settings.get("guidance", defaults.guidance),
        solver=settings.get("solver", defaults.solver),
        shift=settings.get("shift", defaults.shift),
        samples=settings.get("samples", defaults.samples),
        seed=derived_seed(defaults.seed, prompt, custom_id) if seed is None else seed,
        step_cache=settings.get("step_cache", defaults.step_cache),
        conditions=conditions,
        shapes=shapes,
    )


def _conditions(values: dict[str, Any], defaults: Defaults, given: _Given) -> tuple[dict[str, Any], list[Fault]]:
    """Mode, sources and their options, each checked; the request's where the line names neither mode nor source."""
    good: dict[str, Any] = {}
    faults: list[Fault] = []
    for key, kind in (("mode", Mode), ("direction", Direction)):
        if key in values:
            said = values[key].strip() if isinstance(values[key], str) else None
            if said in tuple(kind):
                good[key] = kind(said)
            else:
                faults.append(Fault(key, f"{key}={given.show(values[key])} must be {' or '.join(kind)}"))
    for key in SOURCES:
        if key in values and (name := _text(values, key, MAX_NAME, faults)):
            good[key] = name
    if (strength := _share("strength", values, given, faults)) is not None:
        good["strength"] = strength
    if "overlap" in values:
        overlap = given.whole(values["overlap"])
        if overlap is None:
            faults.append(Fault("overlap", f"overlap={given.show(values['overlap'])} must be a whole number"))
        else:
            good["overlap"] = overlap
    good = with_request(good, defaults.conditions)
    return good, faults or check_sources(good)


def _share(key: str, values: dict[str, Any], given: _Given, faults: list[Fault]) -> float | None:
    """The number under `key`, above 0 and at most 1; None if it is not given or wrong."""
    if (value := values.get(key)) is None:
        return None
    share = given.number(value)
    if share is not None and 0 < share <= 1:
        return share
    faults.append(Fault(key, f"{key}={given.show(value)} must be a number above 0, at most 1"))
    return None


def _too_large(width: int, height: int, frames: int) -> Fault | None:
    if (pixels := width * height * frames) <= MAX_PIXELS:
        return None
    what = f"{width}x{height}x{frames}"
    return Fault("frames", f"{what} has {pixels:,} pixels, the most is {MAX_PIXELS:,}: make it smaller or shorter")


def _settings(
    values: dict[str, Any], defaults: Defaults, given: _Given, *, any_length: bool = False
) -> tuple[dict[str, Any], list[Fault]]:
    """The settings among `values`, checked. Keys that are missing or wrong are missing in the result.

    `any_length`: the clip is joined from pieces, so its length need not be one that the autoencoder gives.
    """
    good: dict[str, Any] = {}
    faults: list[Fault] = []
    written: dict[str, str] = {}  # how a value reached us, where that is not key=value
    if "size" in values:
        values = _split_size(values, written, faults)
    for key, value in values.items():
        if bound := _WHOLE.get(key):
            whole = value if type(value) is int else given.whole(value)
            wrong = _wrong_whole(key, whole, bound, defaults, any_length)
            if wrong:
                faults.append(Fault(key, f"{written.get(key) or f'{key}={given.show(value)}'} must be {wrong}"))
            else:
                good[key] = whole
        elif bound := _NUMBERS.get(key):
            number = given.number(value)
            if number is None or not bound.low <= number <= bound.high:
                faults.append(Fault(key, f"{key}={given.show(value)} must be a number {bound}"))
            else:
                good[key] = number
    if (step_cache := _share("step_cache", values, given, faults)) is not None:
        good["step_cache"] = step_cache
    if "solver" in values:
        solver = values["solver"].strip() if isinstance(values["solver"], str) else None
        if solver in _SOLVERS:
            good["solver"] = solver
        else:
            faults.append(Fault("solver", f"solver={given.show(values['solver'])} must be {_either(_SOLVERS)}"))
    if "negative_prompt" in values:
        good["negative_prompt"] = _text(values, "negative_prompt", MAX_PROMPT, faults)
    if not faults and ("width" in good or "height" in good or "frames" in good):
        get = good.get
        sides = get("width", defaults.width), get("height", defaults.height), get("frames", defaults.frames)
        if too_large := _too_large(*sides):
            faults.append(too_large)
    return good, faults


def _wrong_whole(key: str, whole: int | None, bound: _Bound, defaults: Defaults, any_length: bool) -> str | None:
    """What the number under `key` must be, if it is not."""
    if whole is None:
        return f"a whole number {bound}"
    if not bound.low <= whole <= bound.high:
        return str(bound)
    if key in ("width", "height") and whole % defaults.multiple:
        return f"a multiple of {defaults.multiple} ({_neighbours(whole, defaults.multiple, 0, bound)})"
    if key == "frames" and (whole - 1) % defaults.frame_step and not any_length:
        return f"{defaults.frame_step}n+1 ({_neighbours(whole, defaults.frame_step, 1, bound)})"
    return None


def _split_size(values: dict[str, Any], written: dict[str, str], faults: list[Fault]) -> dict[str, Any]:
    """`size` is another way to write width and height; messages then name it."""
    values = dict(values)
    size = values.pop("size")
    sides = parse_size(size) if isinstance(size, str) else None
    if sides is None:
        faults.append(Fault("size", f"size={_show(size)} must be WIDTHxHEIGHT, like 96x64"))
    elif "width" in values or "height" in values:
        faults.append(
            Fault("size", f"size={_cut(str(size).strip())} and width or height are both given: give one of them")
        )
    else:
        for key, side in zip(("width", "height"), sides, strict=True):
            values[key] = side
            written[key] = f"size={_cut(str(size).strip())}: {key} {side}"
    return values


def parse_size(text: str) -> tuple[int, int] | None:
    """(width, height) of a text like 96x64, or None."""
    match = re.fullmatch(r"\s*([0-9]{1,9})\s*[xX×]\s*([0-9]{1,9})\s*", text)
    return (int(match[1]), int(match[2])) if match else None


def _either(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _text(values: dict[str, Any], key: str, most: int, faults: list[Fault], *, needed: bool = False) -> str | None:
    """The text under `key` without the space around it; None if it is not given, blank or wrong."""
    value = values.get(key)
    if value is None:
        if needed:
            faults.append(Fault(key, f"{key} is missing"))
        return None
    if not isinstance(value, str):
        faults.append(Fault(key, f"{key}={_show(value)} must be a text"))
        return None
    text = value.strip()
    if not text:
        if key != "negative_prompt":
            faults.append(Fault(key, f"{key} is blank"))
        return None
    if len(text) > most:
        faults.append(Fault(key, f"{key} has {len(text):,} characters, the most is {most:,}"))
        return None
    # Most texts are printable as they stand; only the others are looked at one character at a time.
    if not text.isprintable() and (bad := _FORBIDDEN.search(text)):
        character = bad.group()
        where = f"{key} has {_name_of(character)} at character {bad.start() + 1}"
        faults.append(Fault(key, f"{where}, which cannot be stored: remove it"))
        return None
    return text


# Postgres refuses NUL, UTF-8 refuses lone surrogates, and terminals obey the other control characters.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def _name_of(character: str) -> str:
    if character == "\0":
        return "a NUL character (U+0000)"
    kind = "half a surrogate pair" if "\ud800" <= character <= "\udfff" else "the control character"
    return f"{kind} (U+{ord(character):04X})"


def _unknown_keys(values: dict[str, Any]) -> list[Fault]:
    unknown = [key for key in values if key not in _KNOWN]
    faults = [Fault(key, _unknown("key", key)) for key in unknown[:MAX_UNKNOWN]]
    if len(unknown) > MAX_UNKNOWN:
        faults.append(Fault("", f"{len(unknown) - MAX_UNKNOWN:,} more keys are unknown"))
    return faults


def _unknown(kind: str, name: str) -> str:
    near = difflib.get_close_matches(name[:MAX_ID].lower(), _KNOWN, n=1, cutoff=0.6)
    hint = f'did you mean "{near[0]}"?' if near else f"known are {', '.join(sorted(_KNOWN))}"
    return f"unknown {kind} {_show(name)}: {hint}"


def _neighbours(value: int, step: int, offset: int, bound: _Bound) -> str:
    """The legal values on both sides: `49 or 53`."""
    below = (value - offset) // step * step + offset
    return " or ".join(str(near) for near in (below, below + step) if bound.low <= near <= bound.high)


def _show(value: Any) -> str:
    """A JSON value as the user wrote it, short enough for one line."""
    return _cut(json.dumps(value, ensure_ascii=not (isinstance(value, str) and value.isprintable())))


def _cut(text: str) -> str:
    return text if len(text) <= 40 else text[:39] + "…"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


class _FirstSeen:
    """On which line each custom_id came first, for millions of them: 25 MB a million.

    An open-addressing table of 64-bit hashes (Python's keyed hash of a text), instead of a dict of texts at six times
    the memory. Two different ids of one hash would be called duplicates; among a million ids the chance is 3e-8.
    """

    def __init__(self) -> None:
        self._used = 0
        self._resize(1 << 10)

    def first(self, key: str, line: int) -> int | None:
        """The line that brought `key` before, or None, and then `line` is remembered."""
        place, found = self._find(hash(key) & 0xFFFF_FFFF_FFFF_FFFF or 1)
        if found:
            return self._lines[place]
        self._hashes[place] = hash(key) & 0xFFFF_FFFF_FFFF_FFFF or 1
        self._lines[place] = line
        self._used += 1
        if self._used * 3 > len(self._hashes) * 2:
            self._grow()
        return None

    def _find(self, digest: int) -> tuple[int, bool]:
        mask, hashes = len(self._hashes) - 1, self._hashes
        place = digest & mask
        while there := hashes[place]:
            if there == digest:
                return place, True
            place = (place + 1) & mask
        return place, False

    def _grow(self) -> None:
        hashes, lines = self._hashes, self._lines
        self._resize(2 * len(hashes))
        for digest, line in zip(hashes, lines, strict=True):
            if digest:
                place, _ = self._find(digest)
                self._hashes[place], self._lines[place] = digest, line

    def _resize(self, size: int) -> None:
        self._hashes = array("Q", [0]) * size
        self._lines = array("I", [0]) * size


# ---------------------------------------------------------------------------------------------------- where files are


class _Opens(Protocol):
    """The part of a store that reading prompts needs."""

    def open(self, key: str) -> BinaryIO: ...


@dataclass(frozen=True, slots=True)
class InStore:
    """An object of the store."""

    key: str


@dataclass(frozen=True, slots=True)
class InFolder:
    """A file below the prompts folder, symlinks resolved."""

    path: Path


def locate(uri: str, folder: Path, name: str = "prompts_uri") -> InStore | InFolder:
    """What the key `name` names: `store:<key>`, or a file below `folder` (`file:<path>` or just the path).

    Nothing else can be named: no other file of this machine, whatever links or dots lead to it, and no address of the
    network. Raises BadUri, and BadFile if the file does not exist.
    """
    shown = f"{name}={_show(uri)}"
    scheme, colon, rest = uri.partition(":")
    if colon and scheme == "store":
        if not rest or rest.startswith("/") or ".." in rest.split("/") or not rest.isprintable():
            raise BadUri(f"{shown} must name an object: store: and its key, without a leading / or ..")
        return InStore(rest)
    if colon and scheme == "file":
        path = rest.removeprefix("//") if rest.startswith("///") else rest
    elif colon and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        raise BadUri(f"{shown} must be store:<key>, or a file below the prompts folder {folder}")
    else:
        path = uri
    if not path or "\0" in path or ".." in Path(path).parts:
        raise BadUri(f"{shown} must name a file below the prompts folder {folder}, without ..")
    root = Path(os.path.realpath(folder))
    target = Path(os.path.realpath(root / path))
    if not target.is_relative_to(root):
        raise BadUri(f"{shown} leads out of the prompts folder {folder}: put the file there, or into the store")
    if not target.exists():
        raise BadFile(f"{path}: no such file below the prompts folder {folder}")
    return InFolder(target)


def open_uri(uri: str, *, folder: Path, store: _Opens) -> BinaryIO:
    """Opens what `prompts_uri` names. Raises BadUri and BadFile; a missing object raises what the store raises."""
    where = locate(uri, folder)
    return store.open(where.key) if isinstance(where, InStore) else open_file(where.path)


def prompts_key(sha256: str) -> str:
    """Where a prompt file lies in the store. Not under blobs/: no clip points at it, so a sweep would take it away."""
    return f"prompts/{sha256}"


def open_file(path: Path) -> BinaryIO:
    """Opens a regular file for reading. Raises BadFile in one line for anything else."""
    try:
        # Not blocking, so that a named pipe is refused and not waited for.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise BadFile(f"{path}: no such file") from None
    except OSError as error:
        raise BadFile(f"{path}: cannot be read ({(error.strerror or str(error)).lower()})") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise BadFile(f"{path}: is not a file")
    return open(handle, "rb", buffering=0)
