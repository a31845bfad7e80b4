"""How often mini does what its prompt says, and how steady, rigid and like the real thing its clips are.

    python -m model.score --judge DIR/checker [--model mini] [--modes 4] [--sheet failures.png] [--out eval.json]

prints tables. Every prompt and every seed is fixed, so that two models are asked the same. Each
figure stands beside the same figure of *real* clips (rendered by `model.world.scene`, then through the autoencoder and
back): what such a clip falls short of a perfect score by is the judge's own error, not the model's.

What is asked, and what counts as right, is in `model.score.prompts`; the measures that need no prompt are in
`model.score.clips`, those of modes in `model.score.modes`, and `model.score.report` shows it all.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import ClipShape
from model.language.captioner import WEIGHTS as CAPTIONER_WEIGHTS
from model.language.captioner import load_captioner, parse, truth
from model.language.rewriter import Rewriter
from model.loading.card import CAPTIONER, REWRITER, ModelCard, find_model, folder_digest
from model.loading.load import load_dit, load_text, load_vae
from model.network.dit import DiT
from model.network.text import TextEncoder
from model.network.vae import VAE, to_pixels
from model.score.clips import Labels, flicker, frechet, identity, permanence, reprojection
from model.score.judge import SHAPE, filmed, labels_of, load_checker
from model.score.modes import measure_modes, world_clips
from model.score.prompts import (
    PROMPTS,
    Asked,
    adherence,
    as_named,
    by_word,
    counts,
    judges_scenes,
    misses,
    proof,
    questions,
    questions_with,
    ratio,
    users_prompts,
    wanted_by_users,
    wanted_of,
)
from model.score.report import TARGETS, Shown, sheet, tables
from model.train.captioner import exact
from model.train.loop import end_with_input
from model.train.transformer import sample
from model.world.scene import CLASSES, mirrored

BATCH = 16


class NotOfTheWorld(ValueError):
    """The folder is no model or no judge of mini's world, the only one whose truth is known."""


class Studio:
    """A model, whole and in float32, that renders prompts in batches."""

    def __init__(self, card: ModelCard) -> None:
        vae = load_vae(card.path, torch.float32)
        if not isinstance(vae, VAE):
            raise NotOfTheWorld(f"{card.path}: scores are taken on mini's world, with mini's autoencoder")
        self.card, self.vae = card, vae
        self.dit: DiT = load_dit(card.path, torch.float32)
        self.text: TextEncoder = load_text(card.path, torch.float32)

    def render(self, prompts: Sequence[str], seeds: Iterable[int]) -> Tensor:
        """Clips [B, 3, T, H, W] in -1..1, of the model's own settings at 64x64 with 17 frames."""
        card = self.card
        return sample(
            self.dit,
            self.text,
            self.vae,
            prompts,
            SHAPE,
            seeds,
            steps=card.steps,
            guidance=card.guidance,
            solver=card.solver,
            shift=card.shift,
        )

    @torch.no_grad()
    def round_trip(self, clips: Tensor) -> Tensor:
        return self.vae.decode(self.vae.encode(clips))


class Judge:
    """A trained checker and the autoencoder that it sees through, whichever the model brings."""

    def __init__(self, folder: Path) -> None:
        eyes = load_vae(folder, torch.float32)
        if not isinstance(eyes, VAE):
            raise NotOfTheWorld(f"{folder}: a judge of mini's world sees through mini's autoencoder")
        self.checker, self.eyes, self.digest = load_checker(folder), eyes, folder_digest(folder)

    def look(self, clips: Tensor) -> Labels:
        """For each attribute the class [B] that clips [B, 3, T, H, W] show."""
        return self.look_at_all(clips.split(BATCH))

    @torch.no_grad()
    def look_at_all(self, batches: Iterable[Tensor]) -> Labels:
        answers = [self.checker.look_at(self.eyes.encode(clips)) for clips in batches]
        return {name: torch.cat([a[name] for a in answers]) for name in CLASSES}

    @torch.no_grad()
    def features(self, clips: Tensor) -> Tensor:
        """The judge's features of whole clips, [B, D]."""
        return in_batches(lambda some: self.checker.features(self.eyes.encode(some))[:, 0, -128:], clips)


def in_batches(function: Callable[..., Tensor], *columns: Sequence[Any] | Tensor) -> Tensor:
    """function over slices of the columns, joined."""
    return torch.cat([function(*batch) for batch in batches_of(*columns)])


def batches_of(*columns: Sequence[Any] | Tensor) -> Iterable[tuple[Any, ...]]:
    return (tuple(c[k : k + BATCH] for c in columns) for k in range(0, len(columns[0]), BATCH))


# --- the figures ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of an evaluation: every figure, as JSON can hold it, and the clips of the prompts."""

    figures: dict[str, Any]
    shown: Shown


def evaluate(
    folder: str | Path = "mini",
    *,
    judge: Path,
    count: int = PROMPTS,
    modes: int = 0,
    threads: int = 1,
    say: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Every figure of a model folder; `count` prompts, of which a third are of held-out combinations.

    The other sets of clips grow with `count`. modes: the clips of each mode, through an engine of `threads` threads;
    0 leaves modes out. `say` hears what is being done. Raises ModelNotFound and NotOfTheWorld.
    """
    card = find_model(folder)
    studio, jury = Studio(card), Judge(judge)
    asked = questions(count)
    scenes = [one.scene for one in asked]
    say(f"{count} real clips, and through the autoencoder")
    real = in_batches(filmed, scenes)
    restored = in_batches(studio.round_trip, real)
    psnr = 10 * (4 / (restored - real).square().mean((1, 2, 3, 4))).log10()
    captioned = captions(studio, real, asked)
    del real

    say(f"{count} clips of prompts")
    started = time.monotonic()
    made = in_batches(studio.render, [one.prompt for one in asked], [one.seed for one in asked])
    seconds = (time.monotonic() - started) / count

    few, fewer = max(1, 3 * count // 16), max(1, count // 8)
    say(f"{few} clips of passing behind and {fewer} of orbits")
    behind = questions_with(lambda s: s.motion == "behind", few)
    orbits = questions_with(lambda s: s.camera.startswith("orbit") and s.floor == "checkered", fewer)
    made_behind, made_orbits = (
        in_batches(studio.render, [o.prompt for o in some], [o.seed for o in some]) for some in (behind, orbits)
    )
    real_behind, real_orbits = (
        in_batches(lambda s: studio.round_trip(filmed(s)), [o.scene for o in some]) for some in (behind, orbits)
    )
    mirror = in_batches(lambda s: studio.round_trip(filmed(s)), [mirrored(s) for s in scenes])

    said, wanted = jury.look(made), wanted_of(asked)
    of_real = jury.features(restored)
    obedience = {
        "generated": adherence(said, wanted),
        **{part: adherence(_of(said, of), _of(wanted, of)) for part, of in _parts(asked).items()},
        "real": adherence(jury.look(restored), wanted),
    }
    figures: dict[str, Any] = {
        "model": card.name,
        "digest": card.digest,
        "judge": jury.digest,
        "targets": TARGETS,
        "prompts": count,
        "seconds a clip": round(seconds, 2),
        "autoencoder": {"psnr": round(psnr.mean().item(), 2), "worst": round(psnr.min().item(), 2)},
        "clips": counts(wanted),
        "adherence": obedience,
        "by word": {name: by_word(said, wanted, name) for name in ("motion", "camera", "colour", "shape")},
        "flicker": {"generated": flicker(made), "real": flicker(restored)},
        "identity": {"generated": identity(jury.look, made, scenes), "real": identity(jury.look, restored, scenes)},
        "permanence": {
            "generated": permanence(jury.look, made_behind, [o.scene for o in behind]),
            "real": permanence(jury.look, real_behind, [o.scene for o in behind]),
        },
        "reprojection": {
            "generated": reprojection(made_orbits, [o.scene for o in orbits]),
            "real": reprojection(real_orbits, [o.scene for o in orbits]),
        },
        "frechet": {
            "generated": frechet(jury.features(made), of_real),
            "real": frechet(jury.features(mirror), of_real),
        },
        "captioner": captioned,
    }
    figures["users"] = users(studio, jury, max(1, count // 4), obedience["generated"], say)
    figures["proof"] = of_judge(studio, jury, count, say)
    if modes:
        say(f"{modes} clips of every mode")
        prompts, clips = world_clips(modes, ClipShape(card.width, card.height, card.frames))
        figures["modes"] = measure_modes(card.path, prompts, sources=clips, threads=threads)
    clips = [*to_pixels(made)]
    return Evaluation(figures, Shown([o.prompt for o in asked], [o.seed for o in asked], clips, misses(said, wanted)))


def users(
    studio: Studio, jury: Judge, most: int, ordinary: dict[str, float | None], say: Callable[[str], None]
) -> dict[str, Any]:
    """Prompts in people's own words, as written and as the model's rewriter puts them, with the same seeds."""
    asked = users_prompts(most)
    wanted = wanted_by_users(asked)
    free = torch.tensor([one.in_any_order for one in asked])
    prompts, seeds = [one.prompt for one in asked], [one.seed for one in asked]
    words: dict[str, list[str]] = {"as written": prompts}
    folder = studio.card.path / REWRITER
    if folder.is_dir():
        rewritten = Rewriter(folder).rewrite(prompts)
        words["rewritten"] = [new or old for new, old in zip(rewritten, prompts, strict=True)]
    figures: dict[str, Any] = {"prompts": len(asked), "clips": counts(wanted)}
    for name, texts in words.items():
        say(f"{len(texts)} clips of users' prompts {name}")
        shown = jury.look(in_batches(studio.render, texts, seeds))
        figures[name] = adherence(as_named(shown, wanted, free), wanted)
    if "rewritten" in words:
        figures["of ordinary prompts"] = ratio(figures["rewritten"], ordinary)
    return figures


def captions(studio: Studio, clips: Tensor, asked: Sequence[Asked]) -> dict[str, Any] | None:
    """How often the model's captioner says an attribute of real clips exactly; None where it has no captioner."""
    folder = studio.card.path / CAPTIONER
    if not (folder / CAPTIONER_WEIGHTS).is_file():
        return None
    captioner = load_captioner(folder)
    with torch.no_grad():
        texts = [text for some in clips.split(BATCH) for text in captioner.write(studio.vae.encode(some))]
    pairs = [(parse(text), truth(one.scene)) for text, one in zip(texts, asked, strict=True)]
    shares: dict[str, Any] = {"clips": {n: sum(n in true for _, true in pairs) for n in CLASSES}}
    shares["clips"]["all"] = len(pairs)
    for part, of in {"all": torch.ones(len(asked), dtype=torch.bool), **_parts(asked)}.items():
        some = [pair for pair, chosen in zip(pairs, of.tolist(), strict=True) if chosen]
        shares[part] = {name: round(value, 3) for name, value in exact(some).items()} if some else {}
    return shares


def of_judge(studio: Studio, jury: Judge, count: int, say: Callable[[str], None]) -> dict[str, Any]:
    """The judge's verdicts on real clips of its own, after the round trip that generated clips have been through."""
    scenes = judges_scenes(2 * count, 3 * count // 5)
    say(f"{len(scenes)} real clips for the judge's own proof")
    said = jury.look_at_all(studio.round_trip(filmed(some)) for (some,) in batches_of(scenes))
    return proof(said, labels_of(scenes))


def _parts(asked: Sequence[Asked]) -> dict[str, Tensor]:
    hidden = torch.tensor([one.held_out for one in asked])
    return {"seen combinations": ~hidden, "held-out combinations": hidden}


def _of(labels: Labels, chosen: Tensor) -> Labels:
    return {name: values[chosen] for name, values in labels.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model.score", description="Measures what mini can do.")
    parser.add_argument("--model", default="mini", help="a shipped model or a folder")
    parser.add_argument("--judge", type=Path, required=True, help="a folder that model.score.judge wrote")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="the other sets of clips grow with it")
    parser.add_argument("--modes", type=int, default=0, help="clips of each mode, through an engine (minutes)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    parser.add_argument("--sheet", type=Path, help="where to write a picture of clips that fail")
    parser.add_argument("--passes", type=Path, help="where to write a picture of clips that do what was asked")
    parser.add_argument("--attached", action="store_true", help="end when standard input does: with the parent")
    given = parser.parse_args()
    if given.prompts < 1 or given.modes < 0:
        parser.error(f"--prompts {given.prompts} must be at least 1, --modes {given.modes} at least 0")
    if given.attached:
        end_with_input()
    torch.set_num_threads(given.threads)
    try:
        done = evaluate(
            given.model,
            judge=given.judge,
            count=given.prompts,
            modes=given.modes,
            threads=given.threads,
            say=lambda what: print(f"measuring: {what}", file=sys.stderr, flush=True),
        )
    except NotOfTheWorld as error:
        parser.error(str(error))
    print(tables(done.figures), flush=True)
    for path, passing in ((given.sheet, False), (given.passes, True)):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(sheet(done.shown, passing=passing))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(done.figures, indent=2) + "\n", encoding="utf-8")
