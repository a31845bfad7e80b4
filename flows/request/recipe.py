"""A prompt with its settings, and the recipe: a digest of all that determines a clip's pixels."""

from __future__ import annotations

from dataclasses import dataclass

from flows.request.form import MAX_SEED, digest_of
from flows.request.modes import PLAIN, Conditions

# Goes up when the same settings begin to give other pixels (sampler, noise, decoder, precision), so that old takes are
# never served for new recipes.
NUMERICS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt with every setting decided. It asks for `samples` clips."""

    index: int
    line: int
    prompt: str
    custom_id: str | None
    negative_prompt: str | None
    width: int
    height: int
    frames: int
    fps: int
    steps: int
    guidance: float  # 1 is off
    solver: str
    shift: float
    samples: int
    seed: int
    step_cache: float | None = None
    conditions: Conditions = PLAIN
    shapes: tuple[str, ...] = ()  # WIDTHxHEIGHTxFRAMES of what the model makes at once

    def seed_of(self, sample: int) -> int:
        """The seed of one sample: they count up from the prompt's seed and wrap below 2**63."""
        return (self.seed + sample) & MAX_SEED


def recipe(prompt: Prompt, sample: int, *, model_digest: str, rewritten: str | None = None) -> str:
    """sha256 hex of everything that determines a clip's pixels. Clips of one recipe are rendered once.

    `rewritten` takes the prompt's place if there is one. The partition is not part of it: pixels of different
    partitions differ by rounding only, and that drift is measured and stored with the clip.
    """
    return digest_of(
        {
            "numerics": NUMERICS,
            "model": model_digest,
            "prompt": rewritten or prompt.prompt,
            "negative_prompt": prompt.negative_prompt or "",
            "width": prompt.width,
            "height": prompt.height,
            "frames": prompt.frames,
            "fps": prompt.fps,
            "steps": prompt.steps,
            "guidance": float(prompt.guidance),
            "solver": prompt.solver,
            "shift": float(prompt.shift),
            "seed": prompt.seed_of(sample),
            **({"step_cache": float(prompt.step_cache)} if prompt.step_cache else {}),
            **prompt.conditions.recipe(),
        }
    )


def derived_seed(request_seed: int, prompt: str, custom_id: str | None) -> int:
    """The seed of a prompt that brings none: 48 bits, which spreadsheets and JavaScript write without rounding."""
    return int(digest_of([request_seed, prompt, custom_id])[:12], 16)
