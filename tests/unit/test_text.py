"""Prompts as tokens: what mini knows, what it says of words it does not know, and Wan's way of cleaning."""

import pytest
import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean

from model.network.text import TextEncoder, clean, small_encoder, word_tokenizer
from model.train.transformer import places_apart
from model.world.captions import vocabulary

LENGTH = 12


@pytest.fixture(scope="module")
def text() -> TextEncoder:
    torch.manual_seed(0)
    tokenizer = word_tokenizer(vocabulary(), LENGTH)
    return TextEncoder(small_encoder(len(tokenizer), 16, 1, 2).eval(), tokenizer, LENGTH)


@pytest.mark.parametrize(
    "prompt",
    ["a red ball", "  a\n red\t ball ", "a &amp;amp; b", "the ball&#39;s", "schÃ¶n", "l’avion…", "“quoted”", ""],
)
def test_prompts_are_cleaned_as_wan_cleans_them(prompt: str) -> None:
    assert clean(prompt) == prompt_clean(prompt)


def test_words_that_are_not_known_are_named(text: TextEncoder) -> None:
    assert text.unknown_words("A red Quokka, slides to the zebra.") == ["Quokka", "zebra"]
    assert text.unknown_words("a red ball slides to the left.") == []


@torch.no_grad()
def test_padding_is_zero_and_changes_nothing(text: TextEncoder) -> None:
    states = text.encode(["a red ball", ""])
    assert states.shape == (2, LENGTH, 16)
    lengths = [4, 1]  # words and the mark of the end; an empty prompt is that mark alone
    for state, length in zip(states, lengths, strict=True):
        assert state[length:].abs().max() == 0
        assert (state[:length].abs().sum(-1) > 0).all()
    torch.testing.assert_close(text.encode(["a red ball"])[0], states[0], atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_word_knows_from_the_start_what_stands_beside_it() -> None:
    tokenizer = word_tokenizer(vocabulary(), LENGTH)
    small = TextEncoder(small_encoder(len(tokenizer), 192, 2, 4).eval(), tokenizer, LENGTH)
    assert places_apart(small) > 0.1
    one, other = small.encode(["a red ball beside a blue cube", "a blue ball beside a red cube"])
    size = one[1].norm()
    assert (one[1] - other[5]).norm() > 0.1 * size, "red, of the ball and of the cube"
    assert (one[2] - other[2]).norm() > 0.1 * size, "the ball, red and blue"


def test_long_prompts_are_cut_and_still_end(text: TextEncoder) -> None:
    ids, mask = text.tokens(["red " * 50])
    assert mask.sum() == LENGTH
    assert ids[0, -1] == text.tokenizer.eos_token_id
