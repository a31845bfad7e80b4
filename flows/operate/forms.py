"""The forms of `generate` in the Prefect UI: the models there are to choose from, each one's defaults and bounds.

The forms are made from the classes of `flows.request.form` when the deployments are registered; what only the ledger
and this machine's settings know is added here, again whenever models are added.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

from sqlalchemy.exc import OperationalError

from db.models import FILES, latest_models
from flows.clients.ledger import reading
from flows.clients.prefect import prefect_api
from flows.library.models import BrokenModel, card_of
from flows.request.form import MAX_FRAMES, MAX_ID
from flows.request.modes import STITCHED
from flows.settings import Settings
from model.loading.card import SHIPPED, ModelCard, ModelNotFound

FORMS = ("generate/default", "generate/from-media")
LENGTHS = "LengthsInStepsOf"  # begins the names of rules that models share
MOST_MODELS = 50  # of the newest in the ledger: the form is a list to choose from, `rushes models` has all


def refresh_forms(settings: Settings) -> int:
    """Has the forms show the models that there are now; how many of the forms that changed.

    Makes the prompts folder, which they name, where it is missing. Raises PrefectUnavailable and PrefectRefused.
    """
    with suppress(OSError):  # a folder that somebody else is to make
        settings.prompts.mkdir(mode=0o700, parents=True, exist_ok=True)
    cards, changed = models_of(settings), 0
    with prefect_api(settings) as api:
        for name in FORMS:
            if (found := api.form(name)) is None:
                continue
            deployment, schema = found
            better = with_models(schema, cards, default=settings.model, prompts=settings.prompts)
            if better != schema:
                api.change_form(deployment, better)
                changed += 1
    return changed


def models_of(settings: Settings) -> dict[str, ModelCard]:
    """The models that a request may name, by the name that it gives: this machine's own, shipped ones, the ledger's.

    One of the ledger that was trained or used here and never added is named by its folder.
    """
    names = [settings.model, *sorted(index.parent.name for index in SHIPPED.glob("*/model_index.json"))]
    if settings.database_url is not None:
        with suppress(OperationalError), reading(settings) as session:
            for row in latest_models(session, MOST_MODELS):
                if FILES in row.card:
                    names.append(row.name)
                elif row.path and Path(row.path).is_dir() and not Path(row.path).is_relative_to(SHIPPED):
                    names.append(row.path)
    cards: dict[str, ModelCard] = {}
    for name in names:
        with suppress(ModelNotFound, BrokenModel, OSError, ValueError):
            card = card_of(settings, name)
            if name == settings.model or card.digest not in {other.digest for other in cards.values()}:
                cards[name] = card
    return cards


def with_models(
    schema: Mapping[str, Any], cards: Mapping[str, ModelCard], *, default: str, prompts: Path
) -> dict[str, Any]:
    """The schema of a form of `generate` that knows these models; every other name or folder stays possible.

    default: the model that it chooses. prompts: the folder below which `prompts_uri` names files.
    """
    better = deepcopy(dict(schema))
    form = better["definitions"][better["properties"]["request"]["$ref"].rpartition("/")[2]]
    fields = form["properties"]
    model = {key: value for key, value in fields["model"].items() if key in ("title", "position")}
    another = {"type": "string", "title": "Another", "minLength": 1, "maxLength": MAX_ID}
    known = {"type": "string", "title": "Known", "enum": list(cards)}
    fields["model"] = {
        **model,
        "description": described(cards),
        "default": default,
        "anyOf": [known, another] if cards else [another],
    }
    fields["prompts_uri"]["description"] = (
        f"In place of pasted prompts: the path of a file below `{prompts}` on the worker's machine, or `store:KEY` for "
        "an object of the store"
    )
    for step in {card.frame_step for card in cards.values()}:
        better["definitions"][f"{LENGTHS}{step}"] = _lengths(step)
    form["dependentSchemas"] = {
        "width": {"allOf": [_rule(name, "width", {"multipleOf": card.multiple}) for name, card in cards.items()]},
        "height": {"allOf": [_rule(name, "height", {"multipleOf": card.multiple}) for name, card in cards.items()]},
        "frames": {
            "allOf": [
                _rule(name, "frames", {"$ref": f"#/definitions/{LENGTHS}{card.frame_step}"}, any_length=True)
                for name, card in cards.items()
            ]
        },
    }
    return better


def described(cards: Mapping[str, ModelCard]) -> str:
    """The models' own settings and bounds in Markdown, which the form shows below the field.

    A list with a line between its items: the form joins lines, and a table would come out as one.
    """
    lines = [
        f"- `{name.replace('`', ' ')}`: {card.width}x{card.height}, {card.frames} frames at {card.fps} a second, "
        f"{card.steps} steps, guidance {card.guidance:g}; sides are {card.multiple}n, lengths {card.frame_step}n+1"
        for name, card in cards.items()
    ]
    return "\n\n".join(["What you leave empty is the model's own.", *lines]) if lines else "Its name or folder"


def _lengths(step: int) -> dict[str, Any]:
    """A rule for numbers of frames, in blocks, so that a message names the few that are near."""
    block = 4 * step
    return {
        "allOf": [
            {
                "if": {"type": "integer", "minimum": low, "maximum": low + block - 1},
                "then": {"enum": [*range(low, min(low + block, MAX_FRAMES) + 1, step)]},
            }
            for low in range(1, MAX_FRAMES + 1, block)
        ]
    }


def _rule(model: str, field: str, bound: dict[str, Any], *, any_length: bool = False) -> dict[str, Any]:
    """A bound of a field for requests with this model; with `any_length` not for clips joined from pieces."""
    conditions: dict[str, Any] = {"properties": {"model": {"const": model}}, "required": ["model"]}
    if any_length:
        stitched = {"properties": {"mode": {"enum": [mode.value for mode in STITCHED]}}, "required": ["mode"]}
        conditions["not"] = stitched
    return {"if": conditions, "then": {"properties": {field: bound}}}
