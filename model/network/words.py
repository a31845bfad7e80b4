"""The words of a prompt that a text encoder sees: cleaned as it cleans them, and cut where it cuts. Loads no torch."""

from __future__ import annotations

import html
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import ftfy


def clean(prompt: str) -> str:
    """Cleans a prompt before it is tokenised as Wan's pipeline does: text mended, entities resolved, spaces single."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


class PromptTokens:
    """Counts the tokens of prompts by the files of a model's tokenizer, which are read when they are first needed."""

    def __init__(self, folder: Path, most: int) -> None:
        """`folder` holds tokenizer.json; without it nothing is counted. `most`: tokens of a prompt that are read."""
        self.file, self.most = folder / "tokenizer.json", most

    def dropped(self, prompt: str) -> str:
        """The end of a prompt that is beyond the tokens that are read, cleaned; '' where all of it is read."""
        if prompt.isascii() and len(prompt) + 2 <= self.most:  # a token has a character, beside the end's and a space
            return ""
        if self._tokenizer is None:
            return ""
        if self._word_level and prompt.isascii() and len(_WORDS.findall(prompt)) < self.most:
            return ""
        text = clean(prompt)
        places: list[tuple[int, int]] = self._tokenizer.encode(text, add_special_tokens=False).offsets
        kept = self.most - self._tokenizer.num_special_tokens_to_add(is_pair=False)
        return text[places[kept][0] :].strip() if len(places) > kept else ""

    @cached_property
    def _tokenizer(self) -> Any:
        if not self.file.is_file():
            return None
        from tokenizers import Tokenizer

        tokenizer: Any = Tokenizer.from_file(str(self.file))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @cached_property
    def _word_level(self) -> bool:
        """Whether a word of ASCII is one token, and a mark too; so the dear way is left to prompts that are long."""
        return type(self._tokenizer.model).__name__ == "WordLevel"


_WORDS = re.compile(r"[^\W_]+|_|[^\w\s]")
