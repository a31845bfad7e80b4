"""The figures of `model.score` as tables, and clips that fail as a picture: what was asked, and what is to be seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.media.encode import SheetRow, contact_sheet
from model.media.windows import Frames
from model.score import modes as score_modes
from model.score.prompts import Miss

TARGETS = {  # for weights trained on two CPU cores; the last is what a judge must reach in every attribute
    "psnr": 27.5,
    "colour": 0.95,
    "shape": 0.88,
    "motion": 0.90,
    "left or right": 0.95,
    "camera": 0.95,
    "second solid": 0.75,
    "judge": 0.97,
}
PICTURES = 12  # clips of a sheet


# --- as tables --------------------------------------------------------------------------------------------------------


def tables(figures: Mapping[str, Any]) -> str:
    """The figures as Markdown; a target that was not reached has "missed" beside it."""
    sections = [
        _prompts(figures),
        _users(figures["users"]),
        _clips(figures),
        _captioner(figures["captioner"]),
        _judge(figures),
        _modes(figures.get("modes")),
    ]
    return "\n\n".join(text for text in map("\n".join, sections) if text)


def _prompts(figures: Mapping[str, Any]) -> Iterator[str]:
    yield "### Does it do what its prompt says?"
    yield ""
    yield (
        f"{figures['prompts']} prompts that training never saw, a seed each, 64x64 with 17 frames, "
        f"{figures['seconds a clip']} s a clip; weights `{figures['digest'][:12]}`, judge `{figures['judge'][:12]}`."
    )
    yield ""
    scores = figures["adherence"]
    parts = ("seen combinations", "held-out combinations", "real")
    yield _row("", "clips", "target", "generated", "seen combinations", "held-out combinations", "real clips")
    yield _rule(7)
    for name, value in scores["generated"].items():
        others = (scores[part][name] for part in parts)
        yield _row(name, figures["clips"][name], _target(figures, name, value), value, *others)
    for name, words in figures["by word"].items():
        yield ""
        yield f"{name}: " + ", ".join(f"{word} {count}" for word, count in words.items()) + "."


def _users(users: Mapping[str, Any]) -> Iterator[str]:
    yield "### In people's own words"
    yield ""
    yield (
        f"{users['prompts']} hand-written prompts, the same seeds as they are written and as the rewriter puts them; "
        "an attribute counts where the prompt names it."
    )
    yield ""
    ways = [way for way in ("as written", "rewritten", "of ordinary prompts") if way in users]
    titles = {"of ordinary prompts": "rewritten, of the figure on ordinary prompts"}
    yield _row("", "clips", *(titles.get(way, way) for way in ways))
    yield _rule(2 + len(ways))
    for name, count in users["clips"].items():
        yield _row(name, count, *(users[way][name] for way in ways))


def _clips(figures: Mapping[str, Any]) -> Iterator[str]:
    yield "### Is it steady, rigid and like the real thing?"
    yield ""
    yield _row("", "target", "generated", "real clips")
    yield _rule(4)
    psnr = figures["autoencoder"]
    dB = f"{psnr['psnr']} ({psnr['worst']})"
    yield _row("autoencoder, PSNR in dB (worst clip)", _target(figures, "psnr", psnr["psnr"]), None, dB)
    for title, key, part in (
        ("flicker, 8-bit steps", "flicker", None),
        ("colour the same at the first and last frame", "identity", "colour"),
        ("shape the same at the first and last frame", "identity", "shape"),
        ("same colour after passing behind another", "permanence", "colour"),
        ("same shape after passing behind another", "permanence", "shape"),
        ("same size after passing behind another", "permanence", "size"),
        ("the same in all three after passing behind another", "permanence", "all"),
        ("orbit: floor patches, median error in pixels", "reprojection", "median"),
        ("orbit: floor patches within one pixel", "reprojection", "within one pixel"),
        ("orbit: floor patches that were found", "reprojection", "patches"),
        ("Fréchet distance to real clips (of mirrored real clips)", "frechet", None),
    ):
        made, true = (figures[key][of] if part is None else figures[key][of][part] for of in ("generated", "real"))
        yield _row(title, None, made, true)


def _captioner(captioner: Mapping[str, Any] | None) -> Iterator[str]:
    if captioner is None:
        return
    yield "### Does its captioner say what is to be seen?"
    yield ""
    yield (
        f"{captioner['clips']['all']} real clips that training never saw: the share of which it says the attribute "
        "exactly, of those that have it."
    )
    yield ""
    parts = ("all", "seen combinations", "held-out combinations")
    yield _row("", "clips", "exact", *parts[1:])
    yield _rule(5)
    for name in captioner["all"]:
        shares = (captioner[part].get(name) for part in parts)
        yield _row("all of them" if name == "all" else name, captioner["clips"][name], *shares)


def _judge(figures: Mapping[str, Any]) -> Iterator[str]:
    yield "### Can the judge tell?"
    yield ""
    yield "What it names rightly of real clips of its own, after the autoencoder's round trip."
    yield ""
    yield _row("", "clips", "bar", "right", "weakest class", "right of it")
    yield _rule(6)
    for name, row in figures["proof"].items():
        weakest = f"{row['weakest class']} ({row['clips of it']} clips)" if row["weakest class"] else None
        yield _row(
            name, row["clips"], _target(figures, "judge", row["right"]), row["right"], weakest, row["right of it"]
        )


def _modes(modes: Mapping[str, Any] | None) -> Iterator[str]:
    if modes is None:
        return
    yield "### Does it keep what it is given?"
    yield ""
    yield score_modes.table(modes)


def _target(figures: Mapping[str, Any], name: str, value: float | None) -> str | float | None:
    target = figures["targets"].get(name)
    return f"{target} missed" if target and value is not None and value < target else target


def _row(*cells: str | float | None) -> str:
    return f"| {' | '.join('' if cell is None else str(cell) for cell in cells)} |"


def _rule(columns: int) -> str:
    return "|" + "---|" * columns


# --- as pictures ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shown:
    """Clips of the evaluation's prompts, and what is wrong with each."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    clips: Sequence[Frames]  # uint8 [T, H, W, 3]
    misses: Sequence[Sequence[Miss]]


def sheet(shown: Shown, *, passing: bool = False, most: int = PICTURES) -> bytes:
    """A PNG of clips that fail, those that fail in different ways first; or of the first that do what was asked."""
    good = [k for k, wrong in enumerate(shown.misses) if not wrong]
    chosen = good[:most] if passing else varied(shown.misses, most)
    rows = [
        SheetRow(
            clip_id=f"seed {shown.seeds[k]}",
            prompt=shown.prompts[k],
            frames=list(shown.clips[k][::4]),
            note=_note(shown.misses[k]),
        )
        for k in sorted(chosen)
    ]
    count = len(good) if passing else len(shown.misses) - len(good)
    does = "show all that was asked" if passing else "show something else than was asked"
    return contact_sheet(rows, f"{count} of {len(shown.misses)} clips {does}; here are {len(rows)}")


def _note(misses: Sequence[Miss]) -> str:
    if not misses:
        return ""
    return f"asked for {', '.join(m.asked for m in misses)}; seen {', '.join(m.seen for m in misses)}"


def varied(misses: Sequence[Sequence[Miss]], most: int) -> list[int]:
    """Places of up to `most` clips with misses: by turns of every attribute the next that misses it."""
    of: dict[str, list[int]] = {}
    for k, wrong in enumerate(misses):
        for miss in wrong:
            of.setdefault(miss.attribute, []).append(k)
    chosen: list[int] = []
    while len(chosen) < most and any(of.values()):
        for name in of:
            of[name] = [k for k in of[name] if k not in chosen]
            if of[name] and len(chosen) < most:
                chosen.append(of[name].pop(0))
    return chosen
