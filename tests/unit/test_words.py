"""Words beyond those that a text encoder reads: found without torch, as the encoder cuts them, and told."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.request.advice import words_beyond
from flows.request.form import PromptsFormat
from flows.request.read import check_prompts
from model.loading.card import find_model
from model.network.words import PromptTokens, clean
from tests.unit.test_modes import lines
from tests.unit.test_prompts import DEFAULTS

MINI = find_model("mini")
LONG = ", ".join(["a red ball slides to the left"] * 6)  # 47 tokens and the end's


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MINI.path / "tokenizer", local_files_only=True)


words = st.sampled_from(
    ["a", "red", "ball", "floor,", "left.", "xyz", "&amp;", "don't", "3/4", "ＡＢ", "日本", "–", "\u2028"]
)


@given(words=st.lists(words | st.text(max_size=6), min_size=1, max_size=60))
def test_what_is_dropped_is_what_the_encoder_does_not_read(tokenizer: Any, words: list[str]) -> None:
    prompt = " ".join(words).strip()
    dropped = PromptTokens(MINI.path / "tokenizer", MINI.max_prompt_tokens).dropped(prompt)
    read = tokenizer(clean(prompt), max_length=MINI.max_prompt_tokens, truncation=True)["input_ids"]
    whole = tokenizer(clean(prompt))["input_ids"]
    assert bool(dropped) == (len(whole) > len(read))
    assert clean(prompt).endswith(dropped)
    assert tokenizer(clean(prompt).removesuffix(dropped))["input_ids"] == read if dropped else whole == read


def told(*prompts: dict[str, Any], rewriter: bool = False) -> tuple[str, ...]:
    beyond = words_beyond(MINI, rewriter=rewriter)
    stream = lines(*prompts)
    checked = check_prompts(stream, source="p", format=PromptsFormat.JSONL, defaults=DEFAULTS, beyond=beyond)
    assert checked.bad == 0
    return checked.warnings


def test_prompts_that_are_cut_are_told_with_what_is_dropped() -> None:
    assert told({"prompt": "a red ball"}, {"prompt": LONG[:60]}) == ()
    assert told({}, {"prompt": LONG}, {"prompt": LONG + " now"}) == (
        "prompt is longer than the model reads (2 prompts, the first in line 2): it drops "
        '", a red ball slides to the left"',
    )
    assert told({"negative_prompt": LONG}) == (
        'negative_prompt is longer than the model reads (line 1): it drops ", a red ball slides to the left"',
    )
    assert told({"prompt": LONG}, rewriter=True) == ()  # it will have other words
    assert all("guidance=1 is off" in said for said in told({"negative_prompt": LONG, "guidance": 1}))


def test_without_a_tokenizer_nothing_is_counted(tmp_path: Path) -> None:
    assert PromptTokens(tmp_path, 8).dropped(LONG) == ""
    assert words_beyond(replace(MINI, path=tmp_path), rewriter=False)(LONG, True) == ""


def test_counting_tokens_loads_no_torch() -> None:
    program = (
        "import json, sys; from flows.request.advice import words_beyond; from model.loading.card import find_model;"
        f"print(words_beyond(find_model('mini'), rewriter=False)({LONG!r}, True), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-3:] == ["the", "left", "False"]
