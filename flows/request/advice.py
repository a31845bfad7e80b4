"""Warnings about a request that can be made, but perhaps not as it was meant.

They are about settings that change nothing, and about words beyond those that the model's text encoder reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from flows.request.fields import shown_value
from flows.request.form import SOURCES, Defaults, Mode
from flows.request.modes import OPTIONS
from flows.request.recipe import Prompt, without_effect

if TYPE_CHECKING:
    from model.loading.card import ModelCard

# (text, whether it is a prompt, which may be rewritten) -> its words that the model does not read
Beyond = Callable[[str, bool], str]


def nothing_beyond(text: str, rewritable: bool) -> str:
    """Counts nothing: the tokenizer is not at hand."""
    return ""


def words_beyond(card: ModelCard, *, rewriter: bool) -> Beyond:
    """Counts by the model's own tokenizer, as far as its files are on this machine.

    rewriter: prompts that are not in the model's words get other ones, which are counted when they are known.
    """
    from model.network.words import PromptTokens

    tokens = PromptTokens(card.path / "tokenizer", card.max_prompt_tokens)

    def beyond(text: str, rewritable: bool) -> str:
        dropped = tokens.dropped(text)
        return "" if dropped and rewritable and rewriter and not spoken(card, text) else dropped

    return beyond


def spoken(card: ModelCard, text: str) -> bool:
    """Is the prompt in the model's words, so that it is not rewritten?"""
    from model.world import lexicon  # loads numpy: for the prompts that are too long only

    return card.rewriter is not None and lexicon.read(text) is not None


class Advice:
    """Counts what is to be warned of over the prompts of a file, so that a million lines give a few warnings."""

    def __init__(self, defaults: Defaults, beyond: Beyond = nothing_beyond) -> None:
        self._defaults, self._beyond = defaults, beyond
        self._cut: Counter[str] = Counter()
        self._first_cut: dict[str, tuple[int, str]] = {}  # of prompt and negative_prompt: line, dropped words
        self._modes = set[Mode]()
        self._first: dict[tuple[str, str], tuple[int, object]] = {}  # (setting, why it is idle): line, value
        self._idle: Counter[tuple[str, str]] = Counter()

    def add(self, line: Prompt) -> None:
        """Takes one good line into account."""
        self._modes.add(line.conditions.mode)
        idle = without_effect(line)
        for name in ("prompt", "negative_prompt"):
            text = None if name in idle else getattr(line, name)
            if text and (dropped := self._beyond(text, name == "prompt")):
                self._first_cut.setdefault(name, (line.line, dropped))
                self._cut[name] += 1
        for name, why in idle.items():
            value = getattr(line, name)
            if name in self._defaults.asked or value != getattr(self._defaults, name):  # and not the model's own
                self._first.setdefault((name, why), (line.line, value))
                self._idle[name, why] += 1

    def warnings(self) -> tuple[str, ...]:
        """One line for each kind of thing, with the first value, how many prompts have it, and why."""
        said: list[str] = []
        for (name, why), count in self._idle.items():
            line, value = self._first[name, why]
            said.append(f"{name}={shown_value(value)} has no effect ({_where(count, line)}): {why}")
        for name, count in self._cut.items():
            line, dropped = self._first_cut[name]
            said.append(f"{name} is longer than the model reads ({_where(count, line)}): it drops {quoted(dropped)}")
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


def _where(count: int, first: int) -> str:
    return f"line {first}" if count == 1 else f"{count:,} prompts, the first in line {first}"


def quoted(words: str) -> str:
    """Words in quotes on one line, the first hundred characters of them."""
    text = " ".join(words.split())
    text = text if text.isprintable() else ascii(text)[1:-1]
    return f'"{text}"' if len(text) <= 100 else f'"{text[:99]}…"'
