"""Measures what the platform costs beside a bare loop over the same engine, and prints Markdown.

The same clips of mini are rendered twice: by the whole stack (Prefect, ledger, store; in a home of its own, which is
removed after), and by the ten lines that anybody would write: engine, MP4, file. One half of the loop runs before the
stack and one after, so that a machine that slows down slows both. Starting is left out on both sides: the loop counts
from its first clip's beginning to its last file, the stack from its first clip's beginning to its last clip's row.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flows.library.models import partition_for
from flows.render.engine import engine_of
from flows.settings import Settings, load_settings
from model.engine.clip import ClipSpec
from model.loading.card import ModelCard, find_model
from model.media.encode import encode_mp4
from model.score.modes import spec_of

WORDS = [f"a {colour} {shape} slides to the left" for colour in ("red", "green", "blue") for shape in ("ball", "cube")]
QUERY = """
select count(*) as clips, extract(epoch from max(finished_at) - min(started_at)) as seconds,
       sum(text_seconds) as text, sum(denoise_seconds) as denoise, sum(decode_seconds) as decode,
       sum(encode_seconds) as encode, sum(put_seconds) as put
from history where status = 'done' and not reused"""


@dataclass(frozen=True, slots=True)
class Taken:
    """What rendering so many clips took, and its stages' sums."""

    clips: int
    seconds: float
    stages: dict[str, float]

    def __add__(self, other: Taken) -> Taken:
        stages = {name: self.stages[name] + other.stages[name] for name in self.stages}
        return Taken(self.clips + other.clips, self.seconds + other.seconds, stages)


def overhead(clips: int = 200, steps: int | None = None) -> Iterator[str]:
    """Clips through the whole platform against a bare loop over the engine."""
    settings, card = load_settings(), find_model("mini")
    specs = [
        replace(spec_of(card, WORDS[k % len(WORDS)], seed=k, steps=steps, overlap=5), window=0, clip_id=f"clip {k}")
        for k in range(clips)
    ]
    half = clips // 2
    with tempfile.TemporaryDirectory(prefix="rushes-bench-") as folder:
        loop = bare(settings, card, specs[:half], Path(folder))
        platform, submitted = whole(specs, Path(folder))
        loop += bare(settings, card, specs[half:], Path(folder))
    cost = platform.seconds / platform.clips / (loop.seconds / loop.clips) - 1
    names = list(platform.stages)
    yield f"| {clips} clips | seconds | a clip | {' | '.join(f'{name}, s' for name in names)} |"
    yield "|" + "---|" * (3 + len(names))
    for what, taken in (("bare loop", loop), ("platform", platform)):
        sums = " | ".join(f"{taken.stages.get(name, 0.0):.1f}" for name in names)
        yield f"| {what} | {taken.seconds:.1f} | {taken.seconds / taken.clips:.3f} | {sums} |"
    yield ""
    yield f"The platform takes {100 * cost:+.1f} % of the loop's time; from submitting to Completed {submitted:.1f} s."


def bare(settings: Settings, card: ModelCard, specs: Sequence[ClipSpec], folder: Path) -> Taken:
    """The loop: every clip is rendered, encoded and written."""
    stages: dict[str, float] = dict.fromkeys(("text", "denoise", "decode", "encode", "put"), 0.0)
    with engine_of(settings, card, partition_for(settings, card)) as engine:
        list(engine.render([replace(specs[0], steps=1)]))  # started and warm
        began = 0.0
        for clip in engine.render(specs):
            began = began or next(at for stage, at, _ in clip.spans if stage == "denoise")
            rendered = time.time()
            data = encode_mp4(clip.frames, specs[0].fps, {"title": clip.clip_id})
            encoded = time.time()
            (folder / f"{clip.clip_id}.mp4").write_bytes(data)
            for stage, seconds in clip.seconds.items():
                stages[stage] += seconds
            stages["encode"] += encoded - rendered
            stages["put"] += time.time() - encoded
        return Taken(len(specs), time.time() - began, stages)


def whole(specs: Sequence[ClipSpec], folder: Path) -> tuple[Taken, float]:
    """The same clips through a stack of their own, and the seconds from submitting to Completed."""
    home, prompts = folder / "home", folder / "prompts.jsonl"
    lines = [{"prompt": spec.prompt, "seed": spec.seed, "steps": spec.steps} for spec in specs]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def rushes(*arguments: str) -> str:
        environment = {**load_settings(home=home).child_environment()}
        command = [sys.executable, "-m", "flows.cli.main", *arguments]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout

    try:
        rushes("up")
        began = time.monotonic()
        rushes("submit", str(prompts), "--watch", "--no-rewrite")
        submitted = time.monotonic() - began
        row: dict[str, Any] = json.loads(rushes("sql", QUERY, "--format", "json"))[0]
    finally:
        rushes("down")
    if row.pop("clips") != len(specs):
        raise RuntimeError(f"of {len(specs)} clips some are not done: nothing can be compared")
    return Taken(len(specs), float(row.pop("seconds")), {name: float(value) for name, value in row.items()}), submitted


BENCHES = {"overhead": overhead}
