"""Options made from the fields of the request's form (`flows.request.form.GenerationRequest`).

Name, type, choices, help and bounds come from the field, so a new setting is written once: in the form. A few differ on
a terminal: --size stands for width and height, a deadline is said as 2h30m, and what is not given stays None, since the
settings of this machine or the model may decide it. Values are checked by the form itself when it is filled in.

`rushes --help` shows no options and must answer at once; so the form, and pydantic with it, is loaded when a command's
options are asked for and not before.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum
from inspect import Parameter, Signature
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer
from typer.core import TyperCommand
from typer.main import get_command

from db.settings import OF_SIZE, OF_SOURCES, SETTINGS
from flows.cli.errors import BAD_INPUT, fail

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from flows.request.form import Limits

SETTING = "Settings of prompts that bring none of their own (default: the model's)"
MADE_FROM = "What prompts are made from that do not say so themselves"
SIZE = "size"
# Where a terminal differs from the form.
TEXTS = {
    SIZE: "WIDTHxHEIGHT, like 96x64",
    "name": "What you call this batch; empty: the file's name",
    "deadline": "In what time all should be done: 45m, 2h30m, or seconds. Says if it cannot be",
    "tags": "A word to find its clips by (history, SQL), as often as you like; prompts may have tags of their own",
    "metadata": "KEY=VALUE that is kept with every clip, as often as you like; or a whole JSON object",
}
REPEATED = {"tags": "--tag", "metadata": "--metadata"}  # given once for each
# The file, what it names, --size, and what maintenance fills in.
NOT_OPTIONS = {"prompts", "prompts_text", "prompts_uri", "files", "width", "height", "resumes"}


class FormCommand(TyperCommand):
    """A command that takes fields of the form as options, after its arguments and before its own options.

    `ctx.obj` then holds those that were given, by field name (`given_fields`).
    """

    FIELDS: ClassVar[tuple[str, ...] | None] = None  # of the form, or `size`; None: all

    def get_params(self, ctx: Any) -> list[Any]:
        known = {param.name for param in self.params}
        if not self._names <= known:
            arguments = [param for param in self.params if param.param_type_name == "argument"]
            rest = [param for param in self.params if param not in arguments]
            self.params = [*arguments, *_params(self._names), *rest]
        return super().get_params(ctx)

    def invoke(self, ctx: Any) -> Any:
        given = {name: ctx.params.pop(name) for name in self._names}
        ctx.obj = {name: value for name, value in given.items() if value is not None and value not in ([], ())}
        return super().invoke(ctx)

    @property
    def _names(self) -> set[str]:
        return set(self.FIELDS or _form_names())


class AgainCommand(FormCommand):
    """Takes what another take of a clip may change."""

    FIELDS = (
        *("model", SIZE, *(name for name in SETTINGS if name not in OF_SIZE + OF_SOURCES)),
        *("negative_prompt", "seed", "samples", "name", "priority"),
    )


class PlanCommand(FormCommand):
    """Takes what decides how long a clip takes."""

    FIELDS = (SIZE, "frames", "steps", "guidance", "samples")


def given_fields(ctx: typer.Context) -> dict[str, Any]:
    """Fields of the form that were given as options of a FormCommand; ends the command where one cannot be read."""
    given: dict[str, Any] = dict(ctx.obj)
    if (size := given.pop(SIZE, None)) is not None:
        given |= _sides(size)
    if (deadline := given.get("deadline")) is not None:
        given["deadline"] = seconds_of(deadline)
    if (metadata := given.get("metadata")) is not None:
        given["metadata"] = metadata_from(metadata)
    return given


def _form_names() -> list[str]:
    """Options in the order that help shows them: of the request, of its prompts, of what they are made from."""
    from flows.request.form import GenerationRequest

    names = [SIZE, *(name for name in GenerationRequest.model_fields if name not in NOT_OPTIONS)]
    return sorted(names, key=lambda name: (None, SETTING, MADE_FROM).index(_panel(name)))


def _panel(name: str) -> str | None:
    from flows.request.form import Conditioned, PromptLine

    if name in Conditioned.model_fields:
        return MADE_FROM
    of_prompts = name == SIZE or name in PromptLine.model_fields
    return SETTING if of_prompts and name not in REPEATED else None


def _params(names: set[str]) -> list[Any]:
    """Parameters of these names, as Typer makes them of a function with such a signature."""
    from flows.request.form import GenerationRequest

    fields = GenerationRequest.model_fields
    options = [_option(name, fields.get(name)) for name in _form_names() if name in names]

    def signed(**_: Any) -> None: ...

    signed.__signature__ = Signature(options)  # type: ignore[attr-defined]
    signed.__annotations__ = {option.name: option.annotation for option in options}
    made = typer.Typer(add_completion=False)
    made.command()(signed)
    return list(get_command(made).params)


def _option(name: str, field: FieldInfo | None) -> Parameter:
    from flows.request.form import Limits, limits_of

    if name in REPEATED:
        info = typer.Option(REPEATED[name], help=_help(name, field, Limits(str)), rich_help_panel=_panel(name))
        return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[list[str] | None, info])
    limits = limits_of(field) if field else Limits(str)
    kind = str if name == "deadline" else limits.kind
    flag = f"--{name.replace('_', '-')}"
    shorter = [f"--{other}" for other in getattr(field and field.validation_alias, "choices", ()) if other != name]
    default = None  # the settings or the model may know better than the form
    if field and isinstance(field.default, bool | Enum):
        default = field.default
    if default is True:
        flag = f"{flag}/--no-{flag[2:]}"
    info = typer.Option(flag, *shorter, help=_help(name, field, limits), rich_help_panel=_panel(name))
    annotation = Annotated[kind if default is not None else kind | None, info]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _help(name: str, field: FieldInfo | None, limits: Limits) -> str:
    """Title and description of the field, with its bounds."""
    if field is None or name in TEXTS:
        return f"{TEXTS[name]}."
    title, text = field.title or name.capitalize(), field.description or ""
    if title.lower() != name.replace("_", " ") or not text:  # it says more than the option's name
        text = f"{title}: {text[:1].lower() if text[1:2].islower() else text[:1]}{text[1:]}" if text else title
    bounds = _shown(limits)
    return f"{text} ({bounds})." if bounds and bounds not in text else f"{text}."


def _shown(limits: Limits) -> str:
    """Bounds in words; '' where there are none. An upper one beyond 10^9 is not worth a word."""
    least = f"above {limits.above:g}" if limits.above is not None else ""
    least = f"{limits.low:g}" if limits.low is not None else least
    if limits.high is None or limits.high >= 10**9:
        return f"{least} or more" if limits.low is not None else least
    return f"{least} to {limits.high:g}" if limits.low is not None else f"{least}, at most {limits.high:g}"


def _sides(size: str) -> dict[str, int]:
    """Width and height that --size stands for."""
    from flows.request.fields import parse_size

    sides = parse_size(size)
    if sides is None:
        fail(f"--size {size!r} must be WIDTHxHEIGHT, like 96x64", BAD_INPUT)
    return dict(zip(("width", "height"), sides, strict=True))


def metadata_from(given: Sequence[str]) -> dict[str, Any]:
    """The object that --metadata stand for: KEY=VALUE, whose values are texts, and JSON objects."""
    from flows.request.labels import metadata_of

    metadata: dict[str, Any] = {}
    for each in given:
        key, equals, value = each.partition("=")
        if each.lstrip().startswith("{"):
            try:
                metadata |= metadata_of(each)
            except ValueError as error:
                fail(f"--metadata: {error}", BAD_INPUT)
        elif equals and key.strip():
            metadata[key.strip()] = value
        else:
            fail(f"--metadata {each!r} must be KEY=VALUE, like take=3, or a JSON object", BAD_INPUT)
    return metadata


def seconds_of(text: str) -> float:
    """Seconds of 2h30m, 45m, 90s, or of a plain number."""
    text = text.strip()
    parts = re.fullmatch(r"(?:([0-9]{1,6})d)?(?:([0-9]{1,6})h)?(?:([0-9]{1,6})m)?(?:([0-9]{1,6})s)?", text)
    if text and parts:
        return sum(int(part or 0) * size for part, size in zip(parts.groups(), (86400, 3600, 60, 1), strict=True))
    try:
        return float(text)
    except ValueError:
        fail(f"--deadline {text!r} must be a time like 45m or 2h30m, or a number of seconds", BAD_INPUT)
