"""What a file of prompts would take of GPUs that may not be here: nothing is submitted, and no weights are needed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.layout import GIB, GPUS, RELEASES, CannotFit, Gpu, Layout, Network, Rates, Work, best_layout, partition_of
from flows.models import card_of
from flows.prompts import Prompt, open_file, read_prompts
from flows.request import FORMAT_OF_ENDING, GenerationRequest, PromptsFormat
from flows.settings import Settings
from flows.submit import looking
from model.config import Shape
from model.weights import WAN, WAN_EXPERTS, WAN_TI2V, ModelCard, ModelNotFound, dit_config

_DEFAULTS: dict[str, dict[str, Any]] = {"wan-5b": WAN_TI2V, "wan-a14b": WAN_EXPERTS}


class BadGpus(ValueError):
    """The GPUs are not said as a number and a known kind, like 8xh200."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """The best layout of a file's clips, and by which rates."""

    layout: Layout
    network: Network
    rates: Rates
    gpu: Gpu
    clips: int
    bad: int  # lines that cannot be read as prompts

    def rows(self) -> list[dict[str, Any]]:
        """A line for every shape in every phase."""
        found: list[dict[str, Any]] = []
        for number, phase in enumerate(self.layout.phases, 1):
            for work in phase.work:
                partition = partition_of(self.network, work.size, phase.gpus, self.gpu, work.guided)
                assert partition is not None  # or there would be no such layout
                found.append(
                    {
                        "phase": number,
                        "shape": str(work.size),
                        "steps": work.steps,
                        "clips": work.clips,
                        "replicas": phase.replicas,
                        "partition": str(partition),
                        "memory_gib": round(self.network.memory(work.size, partition, work.guided) / GIB, 1),
                        "seconds_a_clip": round(self.rates.seconds(work, self.network, phase.gpus), 1),
                        "phase_hours": round(phase.seconds / 3600, 2),
                    }
                )
        return found


def parse_gpus(text: str) -> tuple[int, str]:
    """Reads 8xh200. Raises BadGpus."""
    said = re.fullmatch(r"(\d{1,5})x([a-z0-9]+)", text.strip().lower())
    if said is None or said[2] not in GPUS or not int(said[1]):
        raise BadGpus(f"--gpus {text!r} must be a number and a kind, like 8xh200; kinds: {', '.join(sorted(GPUS))}")
    return int(said[1]), said[2]


def forecast(
    settings: Settings, path: Path, gpus: str, model: str, options: dict[str, Any], report: Callable[[str], None]
) -> Forecast:
    """Reads the file and plans its clips. `options` are fields of GenerationRequest; `report` gets every line's errors.

    Raises BadGpus, CannotFit, ModelNotFound, BadFile, and pydantic's ValidationError.
    """
    count, kind = parse_gpus(gpus)
    card, network = _model(settings, model)
    format = FORMAT_OF_ENDING.get(path.suffix.lower(), PromptsFormat.AUTO)
    defaults = GenerationRequest(**options, prompts_format=format, prompts_uri="store:prompts/unknown").resolve(card)
    clips: Counter[tuple[Shape, int, bool]] = Counter()
    bad = 0
    with open_file(path) as file, looking(settings, path.parent, {}) as find:
        for line in read_prompts(file, source=path.name, format=format, defaults=defaults, find=find):
            if isinstance(line, Prompt):
                size = Shape(line.width, line.height, line.conditions.made_frames or line.frames)
                clips[size, line.steps, line.guidance != 1] += line.samples
                continue
            bad += 1
            for message in line.messages(path.name):
                report(message)
    work = [Work(size=size, steps=steps, guided=guided, clips=n) for (size, steps, guided), n in clips.items()]
    if not work:
        raise CannotFit(f"{path.name} has no prompts to plan")
    rates = Rates.of(GPUS[kind])
    layout = best_layout(work, network, rates, GPUS[kind], count)
    return Forecast(layout=layout, network=network, rates=rates, gpu=GPUS[kind], clips=clips.total(), bad=bad)


def _model(settings: Settings, name: str) -> tuple[ModelCard, Network]:
    """A model that is here, or one of Wan's releases by its size, whose weights need not be."""
    try:
        card = card_of(settings, name)
    except ModelNotFound as error:
        if name not in RELEASES:
            raise ModelNotFound(f"{error}; without weights can be planned: {', '.join(RELEASES)}") from None
        network = RELEASES[name]
        time, rows, _ = network.stride
        return (
            ModelCard(
                name=name,
                path=Path(name),
                digest="0" * 64,
                heads=network.dit.heads,
                multiple=rows * network.dit.patch[1],
                frame_step=time,
                **_DEFAULTS.get(name, WAN),
            ),
            network,
        )
    if not (card.path / "transformer").is_dir():
        raise ModelNotFound(f"model {name!r} was added, but never fetched to this machine: plan where it was")
    dit = dit_config(card.path)
    stride = (card.frame_step, card.multiple // dit.patch[1], card.multiple // dit.patch[2])
    experts = 1 if card.boundary is None else 2
    beside = sum(f.stat().st_size for part in ("vae", "text_encoder") for f in (card.path / part).glob("*.safetensors"))
    return card, Network(dit=dit, text_tokens=card.max_prompt_tokens, stride=stride, experts=experts, beside=beside)
