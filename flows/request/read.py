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

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

from flows.request.advice import Advice, Beyond, nothing_beyond
from flows.request.fields import (
    JSON,
    Given,
    conditions_of,
    labels_of,
    settings_of,
    shown_value,
    text_of,
    too_many_pixels,
    unknown_keys,
)
from flows.request.form import MAX_ID, MAX_PROMPT, SETTINGS, SOURCES, Defaults, Mode, PromptsFormat
from flows.request.labels import NO_LABELS, Labels
from flows.request.lines import EXAMPLE, Record, read_csv, read_jsonl, read_text, sniff, text_lines
from flows.request.modes import PLAIN, STITCHED, Fault, Find, Size, check_sources, mode_of, nowhere, settle
from flows.request.recipe import Prompt, derived_seed
from flows.request.unpack import BadFile

if TYPE_CHECKING:
    from model.loading.card import ModelCard


@dataclass(frozen=True, slots=True, kw_only=True)
class BadLine:
    """A line that cannot become a clip, with everything that is wrong with it."""

    index: int  # which prompt of the file, from 0, counting bad ones and not counting blank lines
    line: int  # where it begins in the file, from 1
    faults: tuple[Fault, ...]
    prompt: str = ""  # as far as it could be read, for the ledger's row
    custom_id: str | None = None
    labels: Labels = NO_LABELS

    @property
    def reason(self) -> str:
        return "; ".join(fault.message for fault in self.faults)

    def messages(self, source: str) -> list[str]:
        """One `file:line: message` for each fault."""
        return [f"{source}:{self.line}: {fault.message}" for fault in self.faults]


def read_prompts(
    stream: BinaryIO, *, source: str, format: PromptsFormat, defaults: Defaults, find: Find = nowhere
) -> Iterator[Prompt | BadLine]:
    """Every line of `stream` (open at its beginning), in order. `source` names the file in messages.

    `find` looks up the pictures, videos and clips that lines are made from.

    Raises BadFile when the file as a whole cannot be used; an empty one is found at its end.
    """
    lines = text_lines(stream, source)
    if format is PromptsFormat.AUTO:
        format, lines = sniff(lines)
    read = {PromptsFormat.JSONL: read_jsonl, PromptsFormat.CSV: read_csv, PromptsFormat.TEXT: read_text}[format]
    ids: dict[int, int] = {}
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
    """A whole file, checked and counted."""

    prompts: int  # good ones
    clips: int  # that they ask for
    bad: int  # lines
    faults: int  # things wrong with them
    messages: tuple[str, ...]  # the first of them, as `file:line: message`
    made_from: str | None = None  # sha256 hex over all sources that lines name; None: no line names one
    shapes: Mapping[str, int] = field(default_factory=dict[str, int])  # WxHxF that the model makes at once: clips
    warnings: tuple[str, ...] = ()  # about good ones


def check_prompts(
    stream: BinaryIO,
    *,
    source: str,
    format: PromptsFormat,
    defaults: Defaults,
    keep: int = 100,
    report: Callable[[str], None] | None = None,
    find: Find = nowhere,
    beyond: Beyond = nothing_beyond,
) -> Checked:
    """Reads the whole file and counts. `report` gets every message as it is found; `keep` of them are kept.

    `beyond` finds the words that the model will not read.

    Raises BadFile.
    """
    prompts = clips = bad = faults = 0
    messages: list[str] = []
    identity, named = hashlib.sha256(), False
    shapes: Counter[str] = Counter()
    advice = Advice(defaults, beyond)
    for line in read_prompts(stream, source=source, format=format, defaults=defaults, find=find):
        if isinstance(line, Prompt):
            prompts += 1
            clips += line.samples
            advice.add(line)
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
        warnings=advice.warnings(),
    )


def warnings_of(card: ModelCard, checked: Checked) -> list[str]:
    """Everything to be told of a request that can be made, a line each."""
    return [*filter(None, [untrained_shapes(card, checked.shapes)]), *checked.warnings]


def untrained_shapes(card: ModelCard, shapes: Mapping[str, int]) -> str:
    """A warning about clips of shapes that the model was not trained for; '' where there are none."""
    strange = {shape: count for shape, count in shapes.items() if card.trained and shape not in card.trained}
    if not strange:
        return ""
    clips = ", ".join(f"{shape} ({count} clip{'s' * (count != 1)})" for shape, count in sorted(strange.items()))
    return f"{card.name} was not trained for {clips}: expect less of them; it knows {', '.join(card.trained)}"


def check_defaults(defaults: Defaults) -> list[str]:
    """Faults of the settings of the request itself, in the same words as for a line."""
    given = {key: value for key in SETTINGS if (value := getattr(defaults, key)) is not None}
    stitched = Mode(defaults.conditions.get("mode", Mode.TEXT_TO_VIDEO)) in STITCHED
    _, faults = settings_of(given, defaults, Given(), any_length=stitched)
    if {"mode", *SOURCES} & defaults.conditions.keys():  # options alone are for lines that name a mode
        faults += check_sources(defaults.conditions)
    return [fault.message for fault in faults]


def _settle(index: int, record: Record, defaults: Defaults, ids: dict[int, int], find: Find) -> Prompt | BadLine:
    """One line's values with the defaults filled in, or all that is wrong with them.

    `ids` has the line on which each custom_id came first, under the id's 64-bit hash: some 100 bytes an id of any
    length, and of a million different ones two are called equal with a chance of 3e-8. It is added to.
    """
    given = record.given or JSON
    values = {key: value for key, value in record.values.items() if value is not None}
    faults = list(record.faults)
    prompt, custom_id, take_of, settings, named, labels = "", None, None, {}, {}, NO_LABELS
    if not faults or values:
        prompt = text_of(values, "prompt", MAX_PROMPT, faults, needed=True) or ""
        custom_id = text_of(values, "custom_id", MAX_ID, faults)
        labels = labels_of(values, faults)
        take_of = text_of(values, "take_of", MAX_ID, faults)
        named, more = conditions_of(values, defaults, given)
        faults += more
        settings, more = settings_of(values, defaults, given, any_length=mode_of(named) in STITCHED)
        faults += more
        faults += unknown_keys(values)
    if custom_id is not None:
        before = ids.setdefault(hash(custom_id), record.line)
        if before != record.line:
            faults.append(Fault("custom_id", f"custom_id={shown_value(custom_id)} is already the id of line {before}"))
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
    if not faults and (too_large := too_many_pixels(size.width, size.height, size.frames or 1)):
        faults.append(too_large)
    if faults:
        said: dict[str, Any] = {"prompt": prompt, "custom_id": custom_id, "labels": labels}
        return BadLine(index=index, line=record.line, faults=tuple(faults), **said)
    decided = {name: getattr(defaults, name) for name in SETTINGS} | settings
    decided |= {"width": size.width, "height": size.height, "frames": size.frames or defaults.frames, "fps": size.fps}
    if "seed" not in settings:
        decided["seed"] = derived_seed(defaults.seed, prompt, custom_id)
    return Prompt(
        index=index,
        line=record.line,
        prompt=prompt,
        custom_id=custom_id,
        labels=labels,
        take_of=take_of,
        conditions=conditions,
        shapes=shapes,
        experts=defaults.experts,
        **decided,
    )
