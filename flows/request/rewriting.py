"""Prompts in the words that a model was trained on: by the rewriter that the model brings, or by an endpoint.

Everything is rewritten before a request is opened, a thousand prompts at a time, and recorded in the ledger; the clips
are then made of what is recorded. So the same prompt always becomes the same words, a run that was killed goes on where
it was, and a rewriter that fails leaves nothing half-done. Importing this loads no torch: a model's rewriter runs in a
process of its own, which is gone with its memory when the prompts are rewritten.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

from sqlalchemy.orm import Session, sessionmaker

from db import rewrites
from db.rewrites import Answer, Words
from flows.request.advice import quoted, spoken
from flows.request.form import MAX_PROMPT, digest_of
from flows.request.read import BadLine
from flows.request.recipe import Prompt
from flows.settings import Settings
from model.language.chat import Chat, ChatFailed
from model.loading.card import REWRITER, ModelCard
from model.network.words import PromptTokens
from model.world import lexicon

CHUNK = 1000  # lines looked up, rewritten and recorded together
PARALLEL = 8  # questions that an endpoint is asked at once
TIMEOUT = 60.0  # seconds for one answer
TOKENS = 400  # of an answer
SHOWN = 10  # unknown words that are named

CINEMATIC = """\
You rewrite prompts for a text-to-video model. Answer with one paragraph of at most 120 words in English, and nothing
else: what is seen, who does what, the place, the light, the style, and how the camera moves. Keep everything the user
asks for, in their sense; add only detail that goes with it. For example:
a fox in snow -> A red fox walks slowly through fresh snow in a pine forest at dawn, its breath visible in the cold air.
Low golden light falls between the trunks and catches drifting flakes. Medium shot at eye level, the camera tracks
sideways with the fox, shallow depth of field, natural colours, photorealistic."""
STILL = "This prompt is for a picture: tell no motion and no camera move."


AS_IT_IS = Answer(None)


class RewriterFailed(RuntimeError):
    """Prompts could not be rewritten. The message says why, and how to go on without."""

    exit_code = 1


class Rewriter(Protocol):
    """Something that rewrites prompts. Each result follows from the prompt and `moving` alone, as far as it can."""

    @property
    def name(self) -> str:
        """Who it is, in the ledger: another name may give other words."""
        ...

    def rewrite(self, prompts: Sequence[str], *, moving: bool) -> list[Answer]:
        """New words for each prompt. Raises RewriterFailed."""
        ...


def rewriter_of(settings: Settings, card: ModelCard) -> AbstractContextManager[Rewriter | None]:
    """The rewriter for a model, to be closed at the end: the endpoint if one is set, else the model's own."""
    if settings.rewriter_url:
        return Endpoint(settings, card)
    return ModelsOwn(card) if card.rewriter else nullcontext()


# ---- a request's prompts ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Rewritten:
    """Counts of the rewritten prompts of a file, over its lines."""

    rewritten: int = 0
    left: int = 0  # as they were: in the model's words already, or about nothing that it knows
    left_out: Counter[str] = field(default_factory=Counter[str])  # words and phrases that are not understood
    cut: int = 0  # longer than the model reads, in the words that they have now
    dropped: str = ""  # of the first of these

    @property
    def about_cut(self) -> str:
        return f"{self.cut} of them longer than the model reads: of the first it drops {quoted(self.dropped)}"

    def __str__(self) -> str:
        text = f"{self.rewritten} of {self.rewritten + self.left} prompts were rewritten"
        text += f", {self.about_cut}" if self.cut else ""
        if not self.left_out:
            return text
        words = ", ".join(word for word, _ in self.left_out.most_common(SHOWN))
        more = f" and {len(self.left_out) - SHOWN} more" if len(self.left_out) > SHOWN else ""
        return f"{text}; not understood and left out: {words}{more}"


def rewrite_all(
    ledgers: sessionmaker[Session], rewriter: Rewriter, card: ModelCard, lines: Iterable[Prompt | BadLine]
) -> Rewritten:
    """Sees to it that every prompt's new words are recorded. Raises RewriterFailed."""
    counts = Rewritten()
    tokens = PromptTokens(card.path / "tokenizer", card.max_prompt_tokens)
    for chunk in _chunks(lines):
        asked = [_words(rewriter, line) for line in chunk if isinstance(line, Prompt)]
        wanted = {words for words in asked if not spoken(card, words.prompt)}
        with ledgers() as session:
            found = rewrites.known(session, wanted)
        for moving in (True, False):
            new = sorted((words for words in wanted - found.keys() if words.moving == moving), key=lambda w: w.prompt)
            texts = rewriter.rewrite([words.prompt for words in new], moving=moving) if new else []
            found |= zip(new, texts, strict=True)
        with ledgers.begin() as session:
            rewrites.remember(session, found.items())
        for words in asked:
            answer = found.get(words, AS_IT_IS)
            changed = answer.text is not None
            counts.rewritten += changed
            counts.left += not changed
            if words in wanted and (dropped := tokens.dropped(answer.text or words.prompt)):  # others: when checked
                counts.cut += 1
                counts.dropped = counts.dropped or dropped
            if answer.not_understood:
                counts.left_out.update(answer.not_understood.split(", "))
    return counts


def try_out(rewriter: Rewriter, card: ModelCard, prompt: str, *, moving: bool) -> Answer:
    """One prompt rewritten. Raises RewriterFailed."""
    return AS_IT_IS if spoken(card, prompt) else rewriter.rewrite([prompt], moving=moving)[0]


def with_new_words(
    ledgers: sessionmaker[Session], rewriter: Rewriter | None, lines: Iterable[Prompt | BadLine]
) -> Iterator[tuple[Prompt | BadLine, Answer]]:
    """Every line, with what `rewrite_all` recorded for it."""
    if rewriter is None:
        yield from ((line, AS_IT_IS) for line in lines)
        return
    for chunk in _chunks(lines):
        asked = {line.index: _words(rewriter, line) for line in chunk if isinstance(line, Prompt)}
        with ledgers() as session:
            found = rewrites.known(session, set(asked.values()))
        for line in chunk:
            yield line, found.get(asked[line.index], AS_IT_IS) if line.index in asked else AS_IT_IS


def _words(rewriter: Rewriter, line: Prompt) -> Words:
    return Words(rewriter=rewriter.name, prompt=line.prompt, moving=line.frames > 1)


def _chunks(lines: Iterable[Prompt | BadLine]) -> Iterator[list[Prompt | BadLine]]:
    stream = iter(lines)
    while chunk := list(islice(stream, CHUNK)):
        yield chunk


# ---- who rewrites ----------------------------------------------------------------------------------------------------


class ModelsOwn:
    """The rewriter in a model's folder, in a process that is started when it is first needed."""

    def __init__(self, card: ModelCard) -> None:
        self._folder = card.path / REWRITER
        self.name = f"rewriter {card.rewriter}"
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> ModelsOwn:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            with self._process:  # closes its pipes, which ends it, and waits for it
                pass

    def rewrite(self, prompts: Sequence[str], *, moving: bool) -> list[Answer]:
        if self._process is None:
            self._process = self._start()
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"prompts": list(prompts), "moving": moving}) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except OSError:
            answer = ""
        if not answer:
            raise RewriterFailed(
                f"{self._folder}: the rewriter ended with {self._process.wait()} (its log says why): mend the model's "
                "folder, or submit with rewrite off"
            )
        return [Answer(text, left_out or None) for text, left_out in json.loads(answer)]

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "model.language.rewriter", "serve", str(self._folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            cwd=Path(lexicon.__file__).parents[2],  # where `python -m` finds this very package
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


class Endpoint:
    """A language model behind an OpenAI-compatible endpoint."""

    def __init__(self, settings: Settings, card: ModelCard) -> None:
        assert settings.rewriter_url is not None and settings.rewriter_model is not None
        key = settings.rewriter_key.get_secret_value() if settings.rewriter_key else None
        self._chat = Chat(settings.rewriter_url, settings.rewriter_model, key, timeout=TIMEOUT)
        self._in_captions = card.rewriter is not None
        self._style = lexicon.instructions() if self._in_captions else CINEMATIC
        self.name = f"{self._chat.name}, told {digest_of([self._style, STILL])[:12]}"

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._chat.close()

    def rewrite(self, prompts: Sequence[str], *, moving: bool) -> list[Answer]:
        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="rewrite") as pool:
            return list(
                pool.map(lambda prompt: self._answer(prompt, moving), prompts)
            )  # the first failure ends the others

    def _answer(self, prompt: str, moving: bool) -> Answer:
        unknown = lexicon.unknown_words(prompt) if self._in_captions else []
        return Answer(self._ask(prompt, moving), ", ".join(unknown) or None)

    def _ask(self, prompt: str, moving: bool) -> str | None:
        system = self._style if moving else f"{self._style}\n{STILL}"
        messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        try:
            text = " ".join(self._chat.ask(messages, tokens=TOKENS).split()).strip('"')
            if not 0 < len(text) <= MAX_PROMPT:
                raise self._chat.failure(f"gave {len(text)} characters for {prompt[:80]!r}, not 1 to {MAX_PROMPT}")
        except ChatFailed as error:
            raise RewriterFailed(
                f"RUSHES_REWRITER_URL: {error} (what it has rewritten is kept), or submit with rewrite off"
            ) from None
        if text == prompt or (self._in_captions and lexicon.read(text) is None):
            return None  # words that the model was never trained on would be worse than the user's own
        return text
