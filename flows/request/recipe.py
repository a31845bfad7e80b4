"""A prompt with its settings, and the recipe: a digest of all that determines a clip's pixels."""

from __future__ import annotations

from dataclasses import dataclass, fields

from flows.request.form import ADDED, MAX_SEED, SETTINGS, LineSettings, Solver, digest_of
from flows.request.labels import NO_LABELS, Labels
from flows.request.modes import PLAIN, Conditions

# Goes up when the same settings begin to give other pixels (sampler, noise, decoder, precision), so that old takes are
# never served for new recipes.
NUMERICS = 3
_IN_RECIPE = tuple(name for name in SETTINGS if name not in ("negative_prompt", "samples", "seed"))
_FLOATS = frozenset(each.name for each in fields(LineSettings) if str(each.type).startswith("float"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt(LineSettings):
    """A prompt with every setting decided. It asks for `samples` clips; `seed` is that of the first one."""

    index: int
    line: int
    prompt: str
    custom_id: str | None
    labels: Labels = NO_LABELS  # its own, which no recipe knows
    take_of: str | None = None  # the clip that it is another take of; it decides no pixel
    conditions: Conditions = PLAIN
    experts: int = 1  # of the model
    shapes: tuple[str, ...] = ()  # WIDTHxHEIGHTxFRAMES of what the model makes at once

    def seed_of(self, sample: int) -> int:
        """The seed of one sample: they count up from the prompt's seed and wrap below 2**63."""
        return (self.seed + sample) & MAX_SEED


def recipe(prompt: Prompt, sample: int, *, model_digest: str, rewritten: str | None = None) -> str:
    """sha256 hex of everything that determines a clip's pixels. Clips of one recipe are rendered once.

    `rewritten` takes the prompt's place if there is one. The partition is not part of it: pixels of different
    partitions differ by rounding only, and that drift is measured and stored with the clip.
    """
    idle = without_effect(prompt)
    named = (name for name in _IN_RECIPE if name not in idle)
    settings = {name: value for name in named if (value := getattr(prompt, name)) != ADDED.get(name, ...)}
    return digest_of(
        {
            "numerics": NUMERICS,
            "model": model_digest,
            "prompt": rewritten or prompt.prompt,
            "negative_prompt": (None if "negative_prompt" in idle else prompt.negative_prompt) or "",
            "seed": prompt.seed_of(sample),
            **{name: float(value) if name in _FLOATS else value for name, value in settings.items()},
            **prompt.conditions.recipe(),
        }
    )


def without_effect(clip: Prompt) -> dict[str, str]:
    """Settings that change no pixel of such a clip, each with the reason; they are no part of its recipe.

    A step cache computes the first and the last step in full. The one step of Euler's method goes all the way from
    noise, wherever the schedule would spend more of them, and is the first one of ab2.
    """
    idle: dict[str, str] = {}
    if clip.guidance == 1 and clip.negative_prompt:
        idle["negative_prompt"] = "guidance=1 is off: nothing is steered away from"
    if clip.guidance_2 is not None and (why := _guided_alike(clip)):
        idle["guidance_2"] = why
    if clip.steps <= 2 and clip.step_cache is not None:
        idle["step_cache"] = "the first and the last step are always computed"
    if clip.steps == 1 and clip.solver in (Solver.EULER, Solver.AB2):
        idle["shift"] = "there is one step, from noise to the clip"
        idle["solver"] = "euler and ab2 take the same first step"
    return idle


def _guided_alike(clip: Prompt) -> str | None:
    """Why the guidance of a second expert changes nothing, where it does not."""
    if clip.experts == 1:
        return "the model has one expert"
    if clip.guidance == 1:
        return "guidance=1 is off, for both experts"
    return "it is that of the first expert" if clip.guidance_2 == clip.guidance else None


def derived_seed(request_seed: int, prompt: str, custom_id: str | None) -> int:
    """The seed of a prompt that brings none: 48 bits, which spreadsheets and JavaScript write without rounding."""
    return int(digest_of([request_seed, prompt, custom_id])[:12], 16)
