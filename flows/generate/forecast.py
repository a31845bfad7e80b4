"""Forecast for a file of prompts on GPUs that may not be here: nothing is submitted, no weights are needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flows.clients.ledger import reading
from flows.generate.estimates import cost_model
from flows.library.models import card_of, gpu_of, network_of
from flows.plan.layout import (
    GIB,
    GPUS,
    RELEASES,
    CannotFit,
    Gpu,
    Layout,
    Network,
    Predictor,
    Rates,
    Work,
    best_layout,
    parse_gpus,
    partition_of,
)
from flows.plan.shards import ByReplica, WorkShape
from flows.request.files import open_file
from flows.request.form import GenerationRequest, format_of
from flows.request.read import read_prompts
from flows.request.recipe import Prompt
from flows.request.submit import lazy_lookup
from flows.settings import Settings
from model.loading.card import WAN, WAN_EXPERTS, WAN_TI2V, ModelCard, ModelNotFound

_DEFAULTS: dict[str, dict[str, Any]] = {"wan-5b": WAN_TI2V, "wan-a14b": WAN_EXPERTS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """The best layout of a file's clips, and by which rates."""

    layout: Layout
    network: Network
    rates: Predictor
    measured: bool  # by what clips of this model took on such devices; else rates are assumed
    gpu: Gpu
    clips: int
    bad: int  # lines that cannot be read as prompts

    def rows(self) -> list[dict[str, Any]]:
        """A line for every shape in every phase."""
        found: list[dict[str, Any]] = []
        for number, phase in enumerate(self.layout.phases, 1):
            for work in phase.work:
                partition = partition_of(self.network, work.at_once, phase.gpus, self.gpu, work.guided)
                assert partition is not None  # or there would be no such layout
                found.append(
                    {
                        "phase": number,
                        "shape": str(work.size),
                        "steps": work.steps,
                        "clips": work.clips,
                        "replicas": phase.replicas,
                        "partition": str(partition),
                        "memory_gib": round(self.network.memory(work.at_once, partition, work.guided) / GIB, 1),
                        "seconds_a_clip": round(self.rates.seconds(work, self.network, phase.gpus), 1),
                        "phase_hours": round(phase.seconds / 3600, 2),
                    }
                )
        return found


def forecast(
    settings: Settings, path: Path, gpus: str, model: str, options: dict[str, Any], report: Callable[[str], None]
) -> Forecast:
    """Reads the file and plans its clips. `options` are fields of GenerationRequest; `report` gets every line's errors.

    Raises BadGpus, CannotFit, ModelNotFound, BadFile, and pydantic's ValidationError.
    """
    how_many, kind = parse_gpus(gpus)
    card, network = _model(settings, model)
    format = format_of(path.name)
    defaults = GenerationRequest(**options, prompts_format=format, prompts_uri="store:prompts/unknown").resolve(card)
    clips: Counter[Work] = Counter()
    bad = 0
    with open_file(path) as file, lazy_lookup(settings, path.parent, {}) as find:
        for line in read_prompts(file, source=path.name, format=format, defaults=defaults, find=find):
            if isinstance(line, Prompt):
                clips[_work(line)] += line.samples
                continue
            bad += 1
            for message in line.messages(path.name):
                report(message)
    work = [replace(each, clips=count) for each, count in clips.items()]
    if not work:
        raise CannotFit(f"{path.name} has no prompts to plan")
    rates = _rates(settings, card, GPUS[kind])
    layout = best_layout(work, network, rates, GPUS[kind], how_many)
    return Forecast(
        layout=layout,
        network=network,
        rates=rates,
        measured=isinstance(rates, ByReplica),
        gpu=GPUS[kind],
        clips=clips.total(),
        bad=bad,
    )


def _rates(settings: Settings, card: ModelCard, gpu: Gpu) -> Predictor:
    """By what clips of this model took on such devices, where the ledger has some; else by data sheets."""
    if settings.database_url is None or gpu_of(settings) != gpu:
        return Rates.of(gpu)
    with reading(settings) as session:
        cost = cost_model(session, settings, card)
    return ByReplica(cost, gpu) if cost.measured else Rates.of(gpu)


def _work(line: Prompt) -> Work:
    """The cost of a clip of this line."""
    made = line.conditions
    shape = WorkShape(
        line.width,
        line.height,
        line.frames,
        line.steps,
        line.guidance != 1,
        strength=made.strength or 1.0,
        made=made.made_frames or 0,
        window=made.window or 0,
    )
    return shape.work


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
    return card, network_of(card)
