"""A user's English in the words of the training captions: a small sequence model with a word list behind it.

    python -m model.language.rewriter train --steps 5000 --out model/weights/mini/rewriter
    python -m model.language.rewriter evaluate model/weights/mini/rewriter

The network reads the words of a prompt and says slot by slot what they mean (`lexicon.SLOTS`); each slot may also be
"not said", and is where the network is not sure of it. It can say nothing but what a caption can: decoding is greedy
over the values of one slot at a time. The word list (`model.world.lexicon`) and the clauses (`model.world.clauses`)
have the last word where they are sure, and what no word of the prompt speaks for is left out. The caption then follows
from the slots. Nothing is drawn at random: the same prompt always gives the same words.

Letters: B prompts, W words, G pieces of a word, S slots, V values of all slots, D width.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from model.world.lexicon import SLOTS, Said, caption, read, settle, understand, unknown_words, words_of
from model.world.phrasings import draw

WEIGHTS, CONFIG = "model.safetensors", "config.json"
EVALUATION = Path(__file__).with_name("rewrite_eval.jsonl")
ORDINARY = Path(__file__).with_name("rewrite_ordinary.jsonl")  # sentences of other grammars than that of training
BATCH = 64  # prompts read at once; what a prompt becomes does not depend on its neighbours


@dataclass(frozen=True, slots=True, kw_only=True)
class RewriterConfig:
    width: int = 96
    heads: int = 4
    encoder_layers: int = 2
    decoder_layers: int = 1
    ffn: int = 192
    pieces: int = 4096  # rows of the table that pieces of words are hashed into
    words: int = 96  # of a prompt that the network reads; the word list reads all

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads")


# Each slot has its own run of values; the first of each run is "not said".
FIRST = [sum(len(values) + 1 for values in list(SLOTS.values())[:k]) for k in range(len(SLOTS))]
RUNS = [slice(first, first + len(values) + 1) for first, values in zip(FIRST, SLOTS.values(), strict=True)]
VALUES = RUNS[-1].stop
NAMES = list(SLOTS)
SECOND, MOTION = NAMES.index("shape2"), NAMES.index("motion")
BEHIND = 1 + SLOTS["motion"].index("behind")


class SlotReader(nn.Module):
    """Encoder over a prompt's words, decoder over the slots.

    A word is the mean of its pieces, so that misspelt and inflected words are near what they are made from
    (Bojanowski et al. 2017, "Enriching Word Vectors with Subword Information").
    """

    def __init__(self, config: RewriterConfig) -> None:
        super().__init__()
        self.config = config
        shape: dict[str, Any] = {
            "d_model": config.width,
            "nhead": config.heads,
            "dim_feedforward": config.ffn,
            "dropout": 0.0,
            "activation": "gelu",
            "batch_first": True,
            "norm_first": True,
        }
        self.pieces = nn.EmbeddingBag(config.pieces + 1, config.width, mode="mean", padding_idx=0)
        self.places = nn.Embedding(config.words, config.width)
        self.values = nn.Embedding(VALUES, config.width)
        self.slots = nn.Embedding(len(SLOTS), config.width)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(**shape),
            config.encoder_layers,
            norm=nn.LayerNorm(config.width),
            enable_nested_tensor=False,
        )
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(**shape), config.decoder_layers, norm=nn.LayerNorm(config.width)
        )
        self.head = nn.Linear(config.width, VALUES)
        for table, spread in ((self.pieces, 0.5), (self.places, 0.05), (self.values, 0.1), (self.slots, 0.1)):
            nn.init.normal_(table.weight, std=spread)  # a word is the mean of some twenty pieces
        nn.init.zeros_(self.pieces.weight.data[0])

    def encode(self, pieces: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """Pieces [B, W, G] (0 is none) of words from place `first` on -> states [B, W, D]; where no word is [B, W]."""
        empty = (pieces == 0).all(-1)
        words = self.pieces(pieces.flatten(0, 1)).unflatten(0, pieces.shape[:2])
        places = torch.arange(first, first + pieces.shape[1])
        return self.encoder(words + self.places(places), src_key_padding_mask=empty), empty

    def decode(self, states: Tensor, empty: Tensor, said: Tensor) -> Tensor:
        """States [B, W, D] and the values of the first S-1 slots [B, S-1] -> logits of the first S slots [B, S, V]."""
        before = functional.pad(self.values(said), (0, 0, 1, 0))
        count = before.shape[1]
        later = torch.ones(count, count, dtype=torch.bool).triu(1)
        return self.head(
            self.decoder(before + self.slots.weight[:count], states, tgt_mask=later, memory_key_padding_mask=empty)
        )

    @torch.inference_mode()
    def read(self, pieces: Tensor) -> tuple[Tensor, Tensor]:
        """Pieces [B, W, G] -> the value of each slot [B, S], 0 where it is not said; its probability [B, S]."""
        states, empty = self.encode(pieces)
        found, sure = torch.zeros(len(pieces), 0, dtype=torch.long), torch.zeros(len(pieces), 0)
        for slot, run in enumerate(RUNS):
            said = found + torch.tensor(FIRST[:slot], dtype=torch.long)
            logits = self.decode(states, empty, said)[:, -1, run]
            if slot == MOTION:  # nothing passes behind nothing
                logits[found[:, SECOND] == 0, BEHIND] = -math.inf
            best, value = logits.softmax(-1).max(-1, keepdim=True)
            found, sure = torch.cat([found, value], dim=1), torch.cat([sure, best], dim=1)
        return found, sure


# ---- words as numbers ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1 << 16)
def pieces_of(word: str, table: int) -> tuple[int, ...]:
    """The word and its runs of three and four letters, hashed to 1..table."""
    marked = f"<{word[:24]}>"
    runs = [marked[k : k + size] for size in (3, 4) for k in range(len(marked) - size + 1)]
    return tuple(1 + zlib.crc32(run.encode()) % table for run in dict.fromkeys([marked, *runs]))


def as_pieces(prompts: Sequence[str], config: RewriterConfig) -> Tensor:
    """[B, W, G], padded with 0."""
    rows = [[pieces_of(word, config.pieces) for word in words_of(p)[: config.words]] or [()] for p in prompts]
    wide = max(len(row) for row in rows)
    deep = max(1, max(len(word) for row in rows for word in row))
    padded = [[word + (0,) * (deep - len(word)) for word in row] + [(0,) * deep] * (wide - len(row)) for row in rows]
    return torch.tensor(padded)


def as_values(said: Said) -> list[int]:
    """The index of each slot's value within its slot."""
    return [1 + SLOTS[name].index(value) if (value := getattr(said, name)) else 0 for name in NAMES]


def as_said(values: Sequence[int]) -> Said:
    found = {name: SLOTS[name][k - 1] if k else None for name, k in zip(NAMES, values, strict=True)}
    return Said(**found).possible()


# ---- in use ----------------------------------------------------------------------------------------------------------


class Understood(NamedTuple):
    """The slots that a prompt fills, and its phrases about motion that have no place in it."""

    said: Said
    left_out: tuple[str, ...] = ()


class Rewriter:
    """A trained rewriter, ready to use. It computes in float32 on the CPU."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError if the folder's slots are not those of this code."""
        card = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        known = {name: list(values) for name, values in SLOTS.items()}
        if card["slots"] != known:
            raise ValueError(f"{folder / CONFIG}: slots {card['slots']} must be {known}: train the rewriter anew")
        self.config = RewriterConfig(**card["network"])
        self.surely = torch.tensor([card.get("surely", {}).get(name, 0.0) for name in NAMES])
        self.network = SlotReader(self.config)
        self.network.load_state_dict({name: t.float() for name, t in load_file(folder / WEIGHTS).items()})
        self.network.eval().requires_grad_(False)

    def network_says(self, prompts: Sequence[str]) -> list[Said]:
        """The meaning of prompts as the network alone sees it, without the slots that it is not sure of."""
        found: list[Said] = []
        for first in range(0, len(prompts), BATCH):
            values, sure = self.network.read(as_pieces(prompts[first : first + BATCH], self.config))
            found += [as_said(row) for row in torch.where(sure < self.surely, 0, values).tolist()]
        return found

    def understand(self, prompts: Sequence[str]) -> list[Understood]:
        """The meaning of prompts, as word list, clauses and network agree, and what they leave out."""
        return [Understood(*understand(p, said)) for p, said in zip(prompts, self.network_says(prompts), strict=True)]

    def rewrite(self, prompts: Sequence[str], *, moving: bool = True) -> list[str | None]:
        """Each prompt as a caption of a clip (or of an image); None where it is one, or names no shape of the world."""
        return [text for text, _ in self.answers(prompts, moving=moving)]

    def answers(self, prompts: Sequence[str], *, moving: bool = True) -> list[tuple[str | None, str]]:
        """Each prompt as a caption, as by `rewrite`, and what of it was not understood, "" where all of it was."""
        new = [k for k, prompt in enumerate(prompts) if read(prompt) is None]
        answers: list[tuple[str | None, str]] = [(None, "")] * len(prompts)
        for k, found in zip(new, self.understand([prompts[k] for k in new]), strict=True):
            left_out = [*(found.left_out if moving else ()), *unknown_words(prompts[k])]
            text = caption(found.said, moving=moving) if found.said.shape else None
            answers[k] = text, ", ".join(left_out)
        return answers


# ---- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    seed: int = 0
    steps: int = 3000
    batch: int = 96
    rate: float = 1.5e-3
    warmup: int = 200


def train(training: Training, config: RewriterConfig, out: Path, begin: Path | None = None) -> None:
    """Trains on made-up prompts (`model.world.phrasings`) and writes the folder.

    begin: the folder of a rewriter to go on from; else from nothing.
    """
    torch.manual_seed(training.seed)
    network, rng = SlotReader(config), random.Random(training.seed)
    if begin:
        network.load_state_dict({name: t.float() for name, t in load_file(begin / WEIGHTS).items()})
    optimizer = torch.optim.AdamW(network.parameters(), lr=training.rate, weight_decay=0.02, fused=True)
    batches = _batches(rng, training.batch)
    began, loss = time.monotonic(), 0.0
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = training.rate * _schedule(step, training)
        now = _loss(network, next(batches), rng)
        optimizer.zero_grad()
        now.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        loss += (now.item() - loss) * (0.02 if step else 1)
        if (step + 1) % 200 == 0:
            print(f"step {step + 1}: loss {loss:.4f}, {time.monotonic() - began:.0f} s", flush=True)
    save(network, out, {**asdict(training), "loss": round(loss, 4), "seconds": round(time.monotonic() - began)})


SURE = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)  # the bounds that are tried
WRONG = 5  # a wrong value counts as much as so many missing ones


def calibrate(folder: Path, *, prompts: int = 1500, seed: int = 1) -> dict[str, float]:
    """For each slot the probability from which the network is believed, and writes them into the folder's card.

    Measured on prompts of families that training holds out, as word list and clauses settle them.
    """
    rewriter, rng = Rewriter(folder), random.Random(seed)
    drawn = [(prompt, said) for prompt, said in (draw(rng, held_out=True) for _ in range(prompts)) if said.shape]
    truth = [said for _, said in drawn]
    costs: dict[str, list[int]] = {name: [] for name in NAMES}
    for sure in SURE:
        rewriter.surely.fill_(sure)
        understood = [found.said for found in rewriter.understand([prompt for prompt, _ in drawn])]
        for name in NAMES:
            wanted, got = ([getattr(said, name) for said in some] for some in (truth, understood))
            misses = [value for value, want in zip(got, wanted, strict=True) if value != want]
            costs[name].append(sum(1 if value is None else WRONG for value in misses))
    best = {name: SURE[cost.index(min(cost))] for name, cost in costs.items()}
    card = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps({**card, "surely": best}, indent=2) + "\n", encoding="utf-8")
    return best


def _batches(rng: random.Random, size: int, pool: int = 16) -> Iterator[list[tuple[str, Said]]]:
    """Made-up prompts, those of about one length together: padding costs as much as words."""
    while True:
        drawn = sorted((draw(rng) for _ in range(pool * size)), key=lambda pair: len(words_of(pair[0])))
        batches = [drawn[first : first + size] for first in range(0, len(drawn), size)]
        rng.shuffle(batches)
        yield from batches


def _schedule(step: int, training: Training) -> float:
    """Up in a line, down along a cosine."""
    if step < training.warmup:
        return (step + 1) / training.warmup
    done = (step - training.warmup) / (training.steps - training.warmup)
    return 0.02 + 0.49 * (1 + math.cos(math.pi * done))


def _loss(network: SlotReader, batch: Sequence[tuple[str, Said]], rng: random.Random) -> Tensor:
    """Cross-entropy of every slot over its own values."""
    pieces = as_pieces([prompt for prompt, _ in batch], network.config)
    values = torch.tensor([as_values(said) for _, said in batch])  # [B, S]
    # Prompts begin anywhere, so that every place is trained and none means anything by itself.
    first = rng.randrange(network.config.words - pieces.shape[1] + 1)
    logits = network.decode(*network.encode(pieces, first), (values + torch.tensor(FIRST))[:, :-1])
    losses = [functional.cross_entropy(logits[:, k, run], values[:, k]) for k, run in enumerate(RUNS)]
    return torch.stack(losses).sum()


def save(network: SlotReader, folder: Path, training: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, folder / WEIGHTS)
    card = {
        "network": asdict(network.config),
        "slots": {name: list(values) for name, values in SLOTS.items()},
        "training": training,
    }
    (folder / CONFIG).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


# ---- how good it is --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt that somebody wrote by hand, and what it says."""

    prompt: str
    said: Said


def examples(path: Path = EVALUATION) -> list[Example]:
    """The hand-written prompts, none of which the network was trained on."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Example(line.pop("prompt"), Said(**line)) for line in lines]


def score(examples: Sequence[Example], understood: Sequence[Said]) -> dict[str, float]:
    """The share of slots that are right, of each and of all; `said` counts only slots that the prompt speaks of.

    `invented` is the number of slots that were filled although the prompt says nothing of them.
    """
    right: dict[str, list[bool]] = {name: [] for name in SLOTS}
    said: list[bool] = []
    invented = 0
    for example, found in zip(examples, understood, strict=True):
        wanted, found = example.said.from_the_left(), found.from_the_left()
        for name in SLOTS:
            want, got = getattr(wanted, name), getattr(found, name)
            right[name].append(want == got)
            if want is not None:
                said.append(want == got)
            invented += want is None and got is not None
    every = [hit for hits in right.values() for hit in hits]
    whole = [all(hits) for hits in zip(*right.values(), strict=True)]
    kinds = {**right, "all": every, "said": said, "whole": whole}
    return {**{name: sum(hits) / len(hits) for name, hits in kinds.items()}, "invented": invented}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m model.language.rewriter", description=__doc__ and __doc__.splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help="train from nothing and write a folder")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--steps", type=int, default=3000)
    command.add_argument("--rate", type=float, default=Training().rate, help="the learning rate after the warm-up")
    command.add_argument("--begin", type=Path, help="a folder to go on from")
    command = commands.add_parser("evaluate", help="score a folder on the hand-written prompts")
    command.add_argument("folder", type=Path)
    command = commands.add_parser("serve", help="rewrite what standard input asks for, a JSON object a line")
    command.add_argument("folder", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.command == "train":
        training = Training(seed=given.seed, steps=given.steps, rate=given.rate)
        train(training, RewriterConfig(), given.out, given.begin)
        print("believed from", calibrate(given.out))
    elif given.command == "evaluate":
        evaluate(given.folder)
    else:
        serve(Rewriter(given.folder))


def serve(rewriter: Rewriter) -> None:
    """Answers {"prompts": […], "moving": true} with [caption or null, what is left out] for each, to input's end."""
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(rewriter.answers(asked["prompts"], moving=asked["moving"])), flush=True)


def evaluate(folder: Path) -> None:
    """Prints the shares of slots that are right: of the network alone, of the word list alone, and of both together."""
    tests, rewriter = examples() + examples(ORDINARY), Rewriter(folder)
    prompts = [test.prompt for test in tests]
    ways = {
        "network": rewriter.network_says(prompts),
        "word list": [settle(prompt, Said()) for prompt in prompts],
        "both": [found.said for found in rewriter.understand(prompts)],
    }
    for way, understood in ways.items():
        figures = score(tests, understood)
        print(f"{way:10}", "  ".join(f"{name} {figure:.3f}" for name, figure in figures.items()))


if __name__ == "__main__":
    main()
