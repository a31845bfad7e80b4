"""How often mini does what its prompt says, and how steady, rigid and like the real thing its clips are.

    python -m model.score --judge DIR/checker [--model mini] [--out eval.json]

prints tables. Every prompt and every seed is fixed, so that two models are asked the same. Each
figure stands beside the same figure of *real* clips (rendered by `model.world`, then through the autoencoder and back):
what such a clip falls short of a perfect score by is the judge's own error, not the model's.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model import world
from model.checker import SHAPE, labels_of, load_checker
from model.dit import DiT
from model.text import TextEncoder
from model.train import sample
from model.vae import VAE, to_video
from model.weights import ModelCard, find_model, load_dit, load_text, load_vae

PROMPTS = 256
BATCH = 16
TARGETS = {  # for weights trained on two CPU cores
    "psnr": 27.5,
    "colour": 0.95,
    "shape": 0.88,
    "motion": 0.90,
    "left or right": 0.95,
    "camera": 0.95,
    "second solid": 0.75,
}


@dataclass(frozen=True, slots=True)
class Asked:
    """One prompt of the evaluation, and the scene that it describes."""

    scene: world.Scene
    prompt: str
    seed: int

    @property
    def held_out(self) -> bool:
        return world.held_out(self.scene)


def questions(count: int = PROMPTS) -> list[Asked]:
    """Prompts that no training clip had; every third is of a held-out combination."""
    asked: list[Asked] = []
    for k in range(count):
        rng = random.Random(f"score/{k}")
        scene = world.sample_scene(rng, unseen=k % 3 == 2)
        asked.append(Asked(scene, world.describe(scene, rng, frames=SHAPE.frames), 1_000_000 + k))
    return asked


class Studio:
    """A model, whole and in float32, that renders prompts in batches."""

    def __init__(self, card: ModelCard) -> None:
        vae = load_vae(card.path, torch.float32)
        if not isinstance(vae, VAE):
            raise ValueError(f"{card.path}: scores are taken on mini's world, with mini's autoencoder")
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


def filmed(scenes: Sequence[world.Scene]) -> Tensor:
    """Real clips [B, 3, T, H, W] in -1..1."""
    clips = [world.render(s, width=SHAPE.width, height=SHAPE.height, frames=SHAPE.frames) for s in scenes]
    return to_video(np.stack(clips))


def in_batches(function: Callable[..., Tensor], *columns: Sequence[Any] | Tensor) -> Tensor:
    """function over slices of the columns, joined."""
    count = len(columns[0])
    return torch.cat([function(*(c[k : k + BATCH] for c in columns)) for k in range(0, count, BATCH)])


# --- does it do what its prompt says ----------------------------------------------------------------------------------


def adherence(said: dict[str, Tensor], asked: Sequence[Asked]) -> dict[str, float | None]:
    """Shares of clips in which an attribute of the prompt is to be seen; floor and sky where the prompt names them."""
    truth = labels_of([one.scene for one in asked])
    right = {name: said[name] == truth[name] for name in truth}
    named = {
        "floor": torch.tensor([_names(one.prompt, world.GROUND) for one in asked]),
        "sky": torch.tensor([_names(one.prompt, world.HEAVEN) for one in asked]),
    }
    scores = {
        name: _share(right[name], (truth[name] >= 0) & named.get(name, torch.tensor(True)))
        for name in ("colour", "shape", "motion", "camera", "count", "floor", "sky")
    }
    slides = torch.tensor([one.scene.motion in ("left", "right") for one in asked])
    two = truth["colour2"] >= 0
    scores["left or right"] = _share(right["motion"], slides)
    scores["second colour"] = _share(right["colour2"], two)
    scores["second shape"] = _share(right["shape2"], two)
    scores["second solid"] = _share(right["colour2"] & right["shape2"], two)
    every = [right[n] | (truth[n] < 0) for n in ("colour", "shape", "motion", "camera", "colour2", "shape2")]
    scores["everything"] = _share(torch.stack(every).all(0))
    return scores


def by_word(said: dict[str, Tensor], asked: Sequence[Asked], name: str) -> dict[str, str]:
    """For every class of an attribute: how many of how many clips show it."""
    truth = labels_of([one.scene for one in asked])[name]
    right = said[name] == truth
    counts = ((word, truth == k) for k, word in enumerate(world.CLASSES[name]))
    return {word: f"{int((right & of).sum())}/{int(of.sum())}" for word, of in counts if of.any()}


def _names(prompt: str, phrases: dict[str, tuple[str, ...]]) -> bool:
    return any(phrase in prompt for choices in phrases.values() for phrase in choices)


def _share(right: Tensor, of: Tensor | None = None) -> float | None:
    counted = right if of is None else right[of]
    return round(counted.float().mean().item(), 3) if len(counted) else None


# --- is it steady -----------------------------------------------------------------------------------------------------


def flicker(clips: Tensor) -> float:
    """Mean size of the second difference of pixels in time, in 8-bit steps: smooth motion has little of it."""
    return round((clips[:, :, 2:] - 2 * clips[:, :, 1:-1] + clips[:, :, :-2]).abs().mean().item() * 127.5, 2)


def frozen(clips: Tensor, frame: int) -> Tensor:
    """Every clip held still at one frame: the checker then says what that frame alone shows."""
    return clips[:, :, frame : frame + 1].expand_as(clips)


def identity(
    look: Callable[[Tensor], dict[str, Tensor]], clips: Tensor, asked: Sequence[Asked]
) -> dict[str, float | None]:
    """One solid: are its colour and shape at the last frame those of the first?"""
    alone = [k for k, one in enumerate(asked) if len(one.scene.solids) == 1]
    first, last = (look(frozen(clips[alone], k)) for k in (0, SHAPE.frames - 1))
    return {name: _share(first[name] == last[name]) for name in ("colour", "shape")}


def permanence(
    look: Callable[[Tensor], dict[str, Tensor]], clips: Tensor, scenes: Sequence[world.Scene]
) -> dict[str, float | None]:
    """A solid passes behind another: has it the same colour, shape and size after as before?

    Two solids held still are named from left to right, so the one that goes right is the first before and the second
    after. Size: the share of pixels of its colour after, over before; within a quarter counts as the same.
    """
    first, last = (look(frozen(clips, k)) for k in (0, SHAPE.frames - 1))
    rightwards = torch.tensor([scene.direction > 0 for scene in scenes])
    same: dict[str, Tensor] = {}
    for name in ("colour", "shape"):
        before = torch.where(rightwards, first[name], first[name + "2"])
        after = torch.where(rightwards, last[name + "2"], last[name])
        same[name] = before == after
    ratio = _area(clips[:, :, -1], scenes) / _area(clips[:, :, 0], scenes).clamp(min=1e-6)
    same["size"] = (ratio - 1).abs() < 0.25
    everyone = torch.ones(len(scenes), dtype=torch.bool)
    return {
        name: _share(value, everyone) for name, value in (same | {"all": torch.stack([*same.values()]).all(0)}).items()
    }


def _area(frames: Tensor, scenes: Sequence[world.Scene]) -> Tensor:
    """frames [B, 3, H, W] -> [B] share of pixels whose hue is that of the scene's first solid."""
    palette = torch.tensor([*world.COLOURS.values()])
    hues = palette / palette.norm(dim=1, keepdim=True)
    pixels = ((frames + 1) / 2).clamp(min=1e-3).flatten(2)  # [B, 3, P]
    strong = _saturation(frames.movedim(1, 0)).flatten(1) > 0.45
    nearest = torch.einsum("kc,bcp->bkp", hues, pixels / pixels.norm(dim=1, keepdim=True)).argmax(1)
    wanted = torch.tensor([[*world.COLOURS].index(scene.solids[0].colour) for scene in scenes])
    return ((nearest == wanted[:, None]) & strong).float().mean(1)


def _saturation(picture: Tensor) -> Tensor:
    """[3, ...] in -1..1 -> [...] in 0..1."""
    pixels = ((picture + 1) / 2).clamp(min=1e-3)
    return 1 - pixels.amin(0) / pixels.amax(0)


# --- is it one rigid scene --------------------------------------------------------------------------------------------

PATCH = 4  # half the side of a floor patch, pixels
REACH = 4  # how far a patch is looked for, pixels


def reprojection(clips: Tensor, scenes: Sequence[world.Scene]) -> dict[str, float | None]:
    """Orbits over a checkered floor: how far each patch of it is from where the known camera would see it, in pixels.

    The middle frame is warped onto the others by the plane's homography, and each patch with corners in it is looked
    for around its place by normalised correlation. Nothing is fitted: the orbit's angle, height and distance are the
    world's own. Returns the median and the share of patches within one pixel.
    """
    errors: list[float] = []
    middle = SHAPE.frames // 2
    for clip, scene in zip(clips, scenes, strict=True):
        grey = clip.mean(0)  # [T, H, W]
        for frame in (middle - 3, middle + 3):
            times = [k / (SHAPE.frames - 1) for k in (middle, frame)]
            moved, seen = _warp(clip[:, middle], *(world.eye(scene, t) for t in times))
            plain = _saturation(moved) < 0.4  # a solid's own pixels are no floor
            errors += _offsets(moved.mean(0), grey[frame], seen & plain)
    if not errors:
        return {"median": None, "within one pixel": None, "patches": 0}
    array = np.array(errors)
    return {
        "median": round(float(np.median(array)), 2),
        "within one pixel": round(float((array < 1).mean()), 3),
        "patches": len(errors),
    }


def _warp(picture: Tensor, of: world.Eye, to: world.Eye) -> tuple[Tensor, Tensor]:
    """The floor in `picture` [3, H, W], seen from another place; and where that is known [H, W]."""
    height, width = picture.shape[1:]
    ys, xs = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    short = min(height, width)
    across, upward = (2 * xs - width) / short * world.HALF_VIEW, (height - 2 * ys) / short * world.HALF_VIEW
    axes = torch.tensor([to.right, to.up, to.forward])
    rays = across[..., None] * axes[0] + upward[..., None] * axes[1] + axes[2]  # [H, W, 3]
    here = torch.tensor(to.position)
    distance = -here[1] / rays[..., 1]
    spot = here + distance[..., None] * rays - torch.tensor(of.position)
    depth = spot @ torch.tensor(of.forward)
    u, v = (spot @ torch.tensor(axis) / depth / world.HALF_VIEW for axis in (of.right, of.up))
    place = torch.stack((u * short / width, -v * short / height), -1)
    seen = (distance > 0) & (distance < 12) & (depth > 0) & (place.abs() < 0.97).all(-1)
    return F.grid_sample(picture[None], place[None], align_corners=False)[0], seen


def _offsets(moved: Tensor, found: Tensor, seen: Tensor) -> list[float]:
    """For every patch with edges in two directions: how far its best match is from its place."""
    gy, gx = torch.gradient(moved)
    height, width = moved.shape
    edge = PATCH + REACH
    errors: list[float] = []
    for y in range(edge, height - edge, PATCH):
        for x in range(edge, width - edge, PATCH):
            box = slice(y - PATCH, y + PATCH + 1), slice(x - PATCH, x + PATCH + 1)
            if not seen[box].all():
                continue
            a, b, c = (gx[box] ** 2).sum(), (gx[box] * gy[box]).sum(), (gy[box] ** 2).sum()
            weakest = (a + c) / 2 - (((a - c) / 2) ** 2 + b**2).sqrt()  # Shi and Tomasi (1994): the lesser eigenvalue
            if weakest < 0.3:
                continue
            template = moved[box]
            around = found[y - edge : y + edge + 1, x - edge : x + edge + 1]
            windows = around.unfold(0, 2 * PATCH + 1, 1).unfold(1, 2 * PATCH + 1, 1)  # [2R+1, 2R+1, p, p]
            t, w = template - template.mean(), windows - windows.mean((-2, -1), keepdim=True)
            match = (w * t).sum((-2, -1)) / (w.norm(dim=(-2, -1)) * t.norm() + 1e-6)
            if match.max() < 0.6:  # hidden by a solid or its shadow
                continue
            dy, dx = divmod(int(match.argmax()), 2 * REACH + 1)
            errors.append(math.hypot(_between(match[:, dx], dy) - REACH, _between(match[dy], dx) - REACH))
    return errors


def _between(line: Tensor, peak: int) -> float:
    """The peak to a fraction of a sample, by the parabola through it and its neighbours."""
    if not 0 < peak < len(line) - 1:
        return peak
    left, here, right = (line[peak + k].item() for k in (-1, 0, 1))
    return peak + 0.5 * (left - right) / min(left - 2 * here + right, -1e-6)


# --- is it like the real thing ----------------------------------------------------------------------------------------


def frechet(left: Tensor, right: Tensor) -> float | None:
    """Fréchet distance (Heusel et al. 2017) between two sets of features [B, D], as Gaussians; None of single ones."""
    if min(len(left), len(right)) < 2:
        return None
    a, b = left.double(), right.double()
    ca, cb = torch.cov(a.T), torch.cov(b.T)
    root = torch.linalg.eigvals(ca @ cb).real.clamp(min=0).sqrt().sum()
    return round(((a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * root).item(), 2)


# --- all of it --------------------------------------------------------------------------------------------------------


def evaluate(folder: str | Path = "mini", *, judge: Path, count: int = PROMPTS) -> dict[str, Any]:
    """Every figure of a model folder; `count` prompts, of which a third are of held-out combinations.

    The judge sees through the autoencoder that it was trained with, whichever the model brings.
    """
    card = find_model(folder)
    studio, checker = Studio(card), load_checker(judge)
    eyes = load_vae(judge, torch.float32)
    assert isinstance(eyes, VAE)
    asked = questions(count)

    def look(clips: Tensor) -> dict[str, Tensor]:
        answers = [checker.look_at(eyes.encode(some)) for some in clips.split(BATCH)]
        return {name: torch.cat([a[name] for a in answers]) for name in world.CLASSES}

    def features(clips: Tensor) -> Tensor:
        with torch.no_grad():
            return in_batches(lambda some: checker.features(eyes.encode(some))[:, 0, -128:], clips)

    scenes = [one.scene for one in asked]
    real = filmed(scenes)
    restored = in_batches(studio.round_trip, real)
    psnr = 10 * (4 / (restored - real).square().mean((1, 2, 3, 4))).log10()
    started = time.monotonic()
    made = in_batches(studio.render, [one.prompt for one in asked], [one.seed for one in asked])
    seconds = (time.monotonic() - started) / count

    few, fewer = max(1, 3 * count // 16), max(1, count // 8)
    behind = _scenes_with(lambda s: s.motion == "behind", few)
    orbits = _scenes_with(lambda s: s.camera.startswith("orbit") and s.floor == "checkered", fewer)
    made_behind, made_orbits = (
        in_batches(studio.render, [o.prompt for o in some], [o.seed for o in some]) for some in (behind, orbits)
    )
    real_behind, real_orbits = (
        in_batches(lambda s: studio.round_trip(filmed(s)), [o.scene for o in some]) for some in (behind, orbits)
    )
    said, truth = look(made), look(restored)
    hidden = torch.tensor([one.held_out for one in asked])

    def part(answers: dict[str, Tensor], of: Tensor) -> dict[str, float | None]:
        chosen = of.nonzero().flatten()
        return adherence({n: t[chosen] for n, t in answers.items()}, [asked[int(k)] for k in chosen])

    mirror = in_batches(studio.round_trip, filmed([world.mirrored(s) for s in scenes]))
    return {
        "model": card.name,
        "digest": card.digest,
        "prompts": count,
        "seconds a clip": round(seconds, 2),
        "autoencoder": {"psnr": round(psnr.mean().item(), 2), "worst": round(psnr.min().item(), 2)},
        "adherence": {
            "generated": adherence(said, asked),
            "seen combinations": part(said, ~hidden),
            "held-out combinations": part(said, hidden),
            "real": adherence(truth, asked),
        },
        "by word": {name: by_word(said, asked, name) for name in ("motion", "camera", "colour", "shape")},
        "flicker": {"generated": flicker(made), "real": flicker(restored)},
        "identity": {"generated": identity(look, made, asked), "real": identity(look, restored, asked)},
        "permanence": {
            "generated": permanence(look, made_behind, [o.scene for o in behind]),
            "real": permanence(look, real_behind, [o.scene for o in behind]),
        },
        "reprojection": {
            "generated": reprojection(made_orbits, [o.scene for o in orbits]),
            "real": reprojection(real_orbits, [o.scene for o in orbits]),
        },
        "frechet": {
            "generated": frechet(features(made), features(restored)),
            "real": frechet(features(mirror), features(restored)),
        },
    }


def _scenes_with(wanted: Callable[[world.Scene], bool], count: int) -> list[Asked]:
    rng = random.Random("score/some")
    found: list[Asked] = []
    while len(found) < count:
        scene = world.sample_scene(rng)
        if wanted(scene):
            found.append(Asked(scene, world.describe(scene, rng, frames=SHAPE.frames), 2_000_000 + len(found)))
    return found


# --- as tables --------------------------------------------------------------------------------------------------------


def tables(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    scores = figures["adherence"]
    seen, hidden, real = (scores[k] for k in ("seen combinations", "held-out combinations", "real"))
    lines = [
        f"{figures['prompts']} prompts that training never saw, a seed each, 64x64 with 17 frames; weights "
        f"`{figures['digest'][:12]}`.",
        "",
        "| | target | generated | seen combinations | held-out combinations | real clips |",
        "|---|---|---|---|---|---|",
    ]
    for name, value in scores["generated"].items():
        row = (TARGETS.get(name), value, seen[name], hidden[name], real[name])
        lines.append(f"| {name} | {' | '.join('' if v is None else f'{v:.2f}' for v in row)} |")
    psnr = figures["autoencoder"]
    lines += ["", "| | target | generated | real clips |", "|---|---|---|---|"]
    lines.append(f"| autoencoder, PSNR in dB (worst clip) | {TARGETS['psnr']} | | {psnr['psnr']} ({psnr['worst']}) |")
    for title, key, part in (
        ("flicker, 8-bit steps", "flicker", None),
        ("colour the same at the first and last frame", "identity", "colour"),
        ("shape the same at the first and last frame", "identity", "shape"),
        ("same colour after passing behind another", "permanence", "colour"),
        ("same shape after passing behind another", "permanence", "shape"),
        ("same size after passing behind another", "permanence", "size"),
        ("orbit: floor patches, median error in pixels", "reprojection", "median"),
        ("orbit: floor patches within one pixel", "reprojection", "within one pixel"),
        ("Fréchet distance to real clips (of mirrored real clips)", "frechet", None),
    ):
        made, true = (figures[key][of] if part is None else figures[key][of][part] for of in ("generated", "real"))
        lines.append(f"| {title} | | {made} | {true} |")
    for name, words in figures["by word"].items():
        lines += ["", f"{name}: " + ", ".join(f"{word} {count}" for word, count in words.items()) + "."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model.score", description="Measures what mini can do.")
    parser.add_argument("--model", default="mini", help="a shipped model or a folder")
    parser.add_argument("--judge", type=Path, required=True, help="a folder that model.checker wrote")
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    figures = evaluate(given.model, count=given.prompts, judge=given.judge)
    print(tables(figures))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
