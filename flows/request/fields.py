"""The fields of a prompt line: their types, bounds and error messages."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Sequence
from typing import Any

from flows.request.form import (
    CONDITIONS,
    MAX_ID,
    MAX_NAME,
    MAX_PIXELS,
    MAX_PROMPT,
    SETTINGS,
    SOURCES,
    Defaults,
    Direction,
    Limits,
    Mode,
    PromptLine,
    Solver,
    limits_of,
)
from flows.request.labels import Labels, metadata_of, tags_of, unstorable
from flows.request.modes import Fault, check_sources, with_request

MAX_UNKNOWN = 5  # unknown keys of one line that are named one by one


class Given:
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
        return shown_value(value)


class _Cells(Given):
    """How CSV writes values: all of them are text."""

    def whole(self, value: Any) -> int | None:
        if isinstance(value, int):  # of a size
            return value
        return int(value.split(".")[0]) if re.fullmatch(r"\s*[+-]?[0-9]{1,30}(\.0*)?\s*", value) else None

    def number(self, value: Any) -> float | None:
        if not re.fullmatch(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*", value):
            return None
        return number if math.isfinite(number := float(value)) else None

    def show(self, value: Any) -> str:
        return _cut(value.strip()) if value.strip().isprintable() else shown_value(value)


JSON, CELLS = Given(), _Cells()


# Types and bounds of the settings that are numbers, as the form has them.
_LIMITS = {
    name: limits
    for name, field in PromptLine.model_fields.items()
    if name in SETTINGS and (limits := limits_of(field)).kind in (int, float)
}
_STRENGTH = limits_of(PromptLine.model_fields["strength"])
KNOWN = frozenset((*SETTINGS, *CONDITIONS, "prompt", "custom_id", "take_of", "size", "tags", "metadata"))
_SOLVERS = tuple(solver.value for solver in Solver)


def conditions_of(values: dict[str, Any], defaults: Defaults, given: Given) -> tuple[dict[str, Any], list[Fault]]:
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
        if key in values and (name := text_of(values, key, MAX_NAME, faults)):
            good[key] = name
    if "strength" in values:
        strength = given.number(values["strength"])
        if wrong := _out_of(strength, _STRENGTH):
            faults.append(Fault("strength", f"strength={given.show(values['strength'])} must be {wrong}"))
        else:
            good["strength"] = strength
    if "overlap" in values:
        overlap = given.whole(values["overlap"])
        if overlap is None:
            faults.append(Fault("overlap", f"overlap={given.show(values['overlap'])} must be a whole number"))
        else:
            good["overlap"] = overlap
    good = with_request(good, defaults.conditions)
    return good, faults or check_sources(good)


def too_many_pixels(width: int, height: int, frames: int) -> Fault | None:
    if (pixels := width * height * frames) <= MAX_PIXELS:
        return None
    what = f"{width}x{height}x{frames}"
    return Fault("frames", f"{what} has {pixels:,} pixels, the most is {MAX_PIXELS:,}: make it smaller or shorter")


def settings_of(
    values: dict[str, Any], defaults: Defaults, given: Given, *, any_length: bool = False
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
        if (limits := _LIMITS.get(key)) is None:
            continue
        number = given.number(value) if limits.kind is float else given.whole(value)
        if wrong := _out_of(number, limits) or _between_steps(key, number, limits, defaults, any_length):
            faults.append(Fault(key, f"{written.get(key) or f'{key}={given.show(value)}'} must be {wrong}"))
        else:
            good[key] = number
    if "solver" in values:
        solver = values["solver"].strip() if isinstance(values["solver"], str) else None
        if solver in _SOLVERS:
            good["solver"] = solver
        else:
            faults.append(Fault("solver", f"solver={given.show(values['solver'])} must be {_either(_SOLVERS)}"))
    if "negative_prompt" in values:
        good["negative_prompt"] = text_of(values, "negative_prompt", MAX_PROMPT, faults)
    if not faults and ("width" in good or "height" in good or "frames" in good):
        get = good.get
        sides = get("width", defaults.width), get("height", defaults.height), get("frames", defaults.frames)
        if too_large := too_many_pixels(*sides):
            faults.append(too_large)
    return good, faults


def _out_of(number: float | None, limits: Limits) -> str | None:
    """The words on what a number must be, if it is out of bounds or (None) no such number at all."""
    kind, low, high, above = limits
    if number is not None and number <= high and (number >= low if above is None else number > above):
        return None
    if above is not None:
        return f"a number above {above:g}, at most {high:g}"
    if kind is float:
        return f"a number between {low:g} and {high:g}"
    return f"{'a whole number ' * (number is None)}between {low} and {high}"


def _between_steps(key: str, whole: Any, limits: Limits, defaults: Defaults, any_length: bool) -> str | None:
    """The words on sizes and lengths that the model can make, if it cannot make this one."""
    if key in ("width", "height") and whole % defaults.multiple:
        return f"a multiple of {defaults.multiple} ({_neighbours(whole, defaults.multiple, 0, limits)})"
    if key == "frames" and (whole - 1) % defaults.frame_step and not any_length:
        return f"{defaults.frame_step}n+1 ({_neighbours(whole, defaults.frame_step, 1, limits)})"
    return None


def _split_size(values: dict[str, Any], written: dict[str, str], faults: list[Fault]) -> dict[str, Any]:
    """`size` is another way to write width and height; messages then name it."""
    values = dict(values)
    size = values.pop("size")
    sides = parse_size(size) if isinstance(size, str) else None
    if sides is None:
        faults.append(Fault("size", f"size={shown_value(size)} must be WIDTHxHEIGHT, like 96x64"))
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


def text_of(values: dict[str, Any], key: str, most: int, faults: list[Fault], *, needed: bool = False) -> str | None:
    """The text under `key` without the space around it; None if it is not given, blank or wrong."""
    value = values.get(key)
    if value is None:
        if needed:
            faults.append(Fault(key, f"{key} is missing"))
        return None
    if not isinstance(value, str):
        faults.append(Fault(key, f"{key}={shown_value(value)} must be a text"))
        return None
    text = value.replace("\ufeff", "").strip()  # a byte order mark from where it was copied, which nobody sees
    if not text:
        if key != "negative_prompt":
            faults.append(Fault(key, f"{key} is blank"))
        return None
    if len(text) > most:
        faults.append(Fault(key, f"{key} has {len(text):,} characters, the most is {most:,}"))
        return None
    if wrong := unstorable(text):
        faults.append(Fault(key, f"{key} has {wrong}"))
        return None
    return text


def labels_of(values: dict[str, Any], faults: list[Fault]) -> Labels:
    """The line's own tags and metadata."""
    good: dict[str, Any] = {}
    for key, read in (("tags", tags_of), ("metadata", metadata_of)):
        if key in values:
            try:
                good[key] = read(values[key])
            except ValueError as error:
                faults.append(Fault(key, str(error)))
    return Labels(**good)


def unknown_keys(values: dict[str, Any]) -> list[Fault]:
    unknown = [key for key in values if key not in KNOWN]
    faults = [Fault(key, unknown_name("key", key)) for key in unknown[:MAX_UNKNOWN]]
    if len(unknown) > MAX_UNKNOWN:
        faults.append(Fault("", f"{len(unknown) - MAX_UNKNOWN:,} more keys are unknown"))
    return faults


def unknown_name(kind: str, name: str) -> str:
    near = difflib.get_close_matches(name[:MAX_ID].lower(), KNOWN, n=1, cutoff=0.6)
    hint = f'did you mean "{near[0]}"?' if near else f"known are {', '.join(sorted(KNOWN))}"
    return f"unknown {kind} {shown_value(name)}: {hint}"


def _neighbours(value: int, step: int, offset: int, limits: Limits) -> str:
    """The legal values on both sides: `49 or 53`."""
    below = (value - offset) // step * step + offset
    return " or ".join(str(near) for near in (below, below + step) if limits.low <= near <= limits.high)


def shown_value(value: Any) -> str:
    """A JSON value as the user wrote it, short enough for one line."""
    return _cut(json.dumps(value, ensure_ascii=not (isinstance(value, str) and value.isprintable())))


def _cut(text: str) -> str:
    return text if len(text) <= 40 else text[:39] + "…"
