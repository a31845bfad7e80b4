"""Prompts as vectors. Both text encoders are transformers' UMT5: Wan's own at full size, mini's at two layers.

Mini knows only the words of its world. Its tokenizer is word-level with an honest `<unk>`, and `unknown_words` names
what a prompt said in vain.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.network.words import clean

SURE = 8.0  # of a bias: a place that is so much likelier gets nearly all of the attention
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


class TextEncoder(nn.Module):
    def __init__(self, encoder: nn.Module, tokenizer: Any, length: int) -> None:
        """`length` tokens a prompt: longer ones are cut, shorter ones padded with zero vectors."""
        super().__init__()
        self.encoder, self.tokenizer, self.length = encoder, tokenizer, length

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids and mask [B, L] -> [B, L, Dt], zero where the mask is."""
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return states * mask[..., None].to(states.dtype)

    def tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, both [B, L]."""
        batch = self.tokenizer(
            [clean(p) for p in prompts],
            padding="max_length",
            max_length=self.length,
            truncation=True,
            return_tensors="pt",
        )
        return batch["input_ids"], batch["attention_mask"]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """[B, L, Dt]; an empty prompt (no guidance text) is a single end token."""
        ids, mask = self.tokens(prompts)
        device = next(self.encoder.parameters()).device
        return self(ids.to(device), mask.to(device))

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of the prompt that the tokenizer has no token for, in order."""
        encoded = self.tokenizer(clean(prompt), return_offsets_mapping=True, add_special_tokens=False)
        spans = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        text = clean(prompt)
        return [text[a:b] for token, (a, b) in spans if token == self.tokenizer.unk_token_id]


def split_words(text: str) -> list[str]:
    """The words of a text as `word_tokenizer` sees them, without punctuation."""
    return re.findall(r"[^\W_]+", clean(text).lower())


def word_tokenizer(words: Sequence[str], length: int) -> Any:
    """A lower-case, word-level tokenizer for mini over `words`; punctuation marks are words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: k for k, word in enumerate([PAD, END, UNKNOWN, ",", ".", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    inner.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, vocabulary[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, model_max_length=length
    )


def small_encoder(vocabulary: int, width: int, layers: int, heads: int) -> nn.Module:
    """An untrained UMT5 encoder of mini's size."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=width // heads,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=heads,
        dropout_rate=0.0,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=64,
        pad_token_id=0,
        eos_token_id=1,
    )
    return look_around(UMT5EncoderModel(config))


def look_around(encoder: Any) -> Any:
    """Begins the heads of every layer with places to look at: the word before, the word after, all before, all after.

    A UMT5 encoder knows the order of words by its relative attention biases alone. Near 0, as they usually begin, every
    word is given the same mean of all words, and so "red" is the same of whichever of two solids it is said. From there
    a training as short as mini's does not find its way: after 12,500 steps the two differed by a hundredth of what two
    colours differ by, and colours went to either solid like a coin. Returns its argument.
    """
    past, future = 0, encoder.config.relative_attention_num_buckets // 2  # and how far, counted from there
    with torch.no_grad():
        for block in encoder.encoder.block:
            attention = block.layer[0].SelfAttention
            bias = attention.relative_attention_bias.weight  # [buckets, heads]
            bias.zero_()
            for head in range(bias.shape[1]):
                match head % 4:
                    case 0:
                        bias[past + 1, head] = SURE
                    case 1:
                        bias[future + 1, head] = SURE
                    case 2:
                        bias[past, head] = -SURE  # not the word itself
                        bias[future:, head] = -SURE
                    case _:
                        bias[:future, head] = -SURE
    return encoder


def load_text_encoder(folder: Path, length: int, dtype: torch.dtype, device: str) -> TextEncoder:
    """From the `text_encoder` and `tokenizer` folders of a model in the diffusers layout (safetensors only)."""
    from transformers import AutoTokenizer, UMT5EncoderModel

    encoder: Any = UMT5EncoderModel.from_pretrained(
        folder / "text_encoder", dtype=dtype, use_safetensors=True, local_files_only=True
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    return TextEncoder(encoder.to(device).eval().requires_grad_(False), tokenizer, length)
