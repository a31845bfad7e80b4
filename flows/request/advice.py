"""Warnings about a request that can be made, but perhaps not as it was meant: settings that change nothing."""

from __future__ import annotations

from collections import Counter

from flows.request.fields import shown_value
from flows.request.form import SOURCES, Defaults, Mode
from flows.request.modes import OPTIONS
from flows.request.recipe import Prompt, without_effect


class Advice:
    """Counts what is to be warned of over the prompts of a file, so that a million lines give a few warnings."""

    def __init__(self, defaults: Defaults) -> None:
        self._defaults = defaults
        self._modes = set[Mode]()
        self._first: dict[tuple[str, str], tuple[int, object]] = {}  # (setting, why it is idle): line, value
        self._idle: Counter[tuple[str, str]] = Counter()

    def add(self, line: Prompt) -> None:
        """Takes one good line into account."""
        self._modes.add(line.conditions.mode)
        for name, why in without_effect(line).items():
            value = getattr(line, name)
            if name in self._defaults.asked or value != getattr(self._defaults, name):  # and not the model's own
                self._first.setdefault((name, why), (line.line, value))
                self._idle[name, why] += 1

    def warnings(self) -> tuple[str, ...]:
        """One line for each kind of thing, with the first value, how many prompts have it, and why."""
        said: list[str] = []
        for (name, why), count in self._idle.items():
            line, value = self._first[name, why]
            where = f"line {line}" if count == 1 else f"{count:,} prompts, the first in line {line}"
            said.append(f"{name}={shown_value(value)} has no effect ({where}): {why}")
        return (*said, *self._of_request())

    def _of_request(self) -> list[str]:
        """Conditions of the request that no line takes up, since each says its own."""
        given = self._defaults.conditions
        if not self._modes:
            return []
        if {"mode", *SOURCES} & given.keys():
            mode = Mode(given.get("mode", Mode.TEXT_TO_VIDEO))
            if mode in self._modes:
                return []
            return [f"mode={mode} of the request has no effect: every prompt says its own mode or source"]
        idle = [name for name, modes in OPTIONS.items() if name in given and not self._modes & set(modes)]
        return [
            f"{name}={given[name]} of the request has no effect: no prompt has mode {' or '.join(OPTIONS[name])}"
            for name in idle
        ]
