"""Labels that people give to requests and lines, to find clips by: tags, and metadata of their own.

They change no pixel: no recipe knows them, and clips with other labels share a rendering. What is bounded here is what
a row of the ledger has to carry. It knows neither the form nor prompt files, which both ask it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

MAX_TAGS = 32  # of a request, and as many more of a line
MAX_TAG = 64  # characters
MAX_METADATA = 4096  # bytes, as JSON
MAX_DEPTH = 5  # objects and lists within each other
# Postgres refuses NUL, UTF-8 refuses lone surrogates, and terminals obey the other control characters.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Labels:
    """Tags, each once, and a JSON object."""

    tags: Sequence[str] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __or__(self, other: Labels) -> Labels:
        """Both, as a clip has those of its request and of its line; `other` decides where a key is in both."""
        return Labels((*dict.fromkeys((*self.tags, *other.tags)),), {**self.metadata, **other.metadata})


NO_LABELS = Labels()


def tags_of(value: Any) -> list[str]:
    """The tags of a list of texts, or of one text with commas or semicolons between them. Raises ValueError."""
    if isinstance(value, str):
        given: list[Any] = [part for part in re.split("[,;\n]", value) if part.strip()]
    elif isinstance(value, list | tuple):
        given = list(cast(Sequence[Any], value))
    else:
        raise ValueError(f"tags={_shown(value)} must be a list of texts")
    tags: dict[str, None] = {}
    for each in given:
        if not isinstance(each, str):
            raise ValueError(f"tags: {_shown(each)} must be a text")
        tag = each.replace("\ufeff", "").strip()
        if not tag:
            raise ValueError("tags: one of them is blank")
        if len(tag) > MAX_TAG:
            raise ValueError(f"tags: {_shown(tag)} has {len(tag):,} characters, the most is {MAX_TAG}")
        if separator := re.search("[,;\n\r\t]", tag):
            raise ValueError(f"tags: {_shown(tag)} has {_shown(separator.group())} in it: make it two tags")
        if wrong := unstorable(tag):
            raise ValueError(f"tags: {_shown(tag)} has {wrong}")
        tags[tag] = None
    if len(tags) > MAX_TAGS:
        raise ValueError(f"tags: there are {len(tags):,}, the most is {MAX_TAGS}")
    return list(tags)


def metadata_of(value: Any) -> dict[str, Any]:
    """The object, or what a text holds as JSON. Raises ValueError for what is none, too large or cannot be stored."""
    if isinstance(value, str):
        try:
            value = json.loads(value, object_pairs_hook=_once)
        except (ValueError, RecursionError):
            raise ValueError(f"metadata={_shown(value)} must be a JSON object, each key once") from None
    if not isinstance(value, dict):
        raise ValueError(f"metadata={_shown(value)} must be a JSON object")
    metadata = cast(dict[str, Any], value)
    for each in _within(metadata, MAX_DEPTH):
        if isinstance(each, str) and (wrong := unstorable(each)):
            raise ValueError(f"metadata: {_shown(each)} has {wrong}")
        if isinstance(each, float) and not math.isfinite(each):
            raise ValueError(f"metadata: {each} is no number that JSON has")
        if repeated := getattr(each, "repeated", None):
            raise ValueError(f"metadata: key {_shown(repeated[0])} is given twice")
    size = len(json.dumps(metadata, ensure_ascii=False, separators=(",", ":")).encode())
    if size > MAX_METADATA:
        raise ValueError(f"metadata has {size:,} bytes as JSON, the most is {MAX_METADATA:,}")
    return metadata


def unstorable(text: str) -> str | None:
    """The words on the first character that no ledger or terminal should get, if there is one."""
    if text.isprintable() or not (bad := _FORBIDDEN.search(text)):
        return None
    return f"{_name_of(bad.group())} at character {bad.start() + 1}, which cannot be stored: remove it"


def _name_of(character: str) -> str:
    if character == "\0":
        return "a NUL character (U+0000)"
    kind = "half a surrogate pair" if "\ud800" <= character <= "\udfff" else "the control character"
    return f"{kind} (U+{ord(character):04X})"


def _within(value: Any, depth: int) -> Iterator[Any]:
    """The value and all that it holds, keys too."""
    yield value
    if not isinstance(value, dict | list):
        return
    if depth == 0:
        raise ValueError(f"metadata is nested more than {MAX_DEPTH} deep")
    if isinstance(value, dict):
        keyed = cast(dict[Any, Any], value)
        yield from keyed
        held: Sequence[Any] = list(keyed.values())
    else:
        held = cast(list[Any], value)
    for each in held:
        yield from _within(each, depth - 1)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key is given twice")
    return values


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=not (isinstance(value, str) and value.isprintable()))
    except RecursionError:
        text = "that"
    return text if len(text) <= 40 else text[:39] + "…"
