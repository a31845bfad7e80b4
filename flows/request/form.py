"""The request for clips: the Prefect UI's form, the API's JSON and the options of `rushes submit` are this one class.

Fields left empty take the model's own default, which only the side that knows the model can fill in (`resolve`). The
class checks what can be told without a model, `flows.request.read` the rest. Importing this loads no torch, Prefect or
database.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from enum import StrEnum
from functools import partial
from pathlib import PurePosixPath
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_args

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.fields import FieldInfo

from flows.request.labels import MAX_METADATA, MAX_TAG, MAX_TAGS, Labels, metadata_of, tags_of

if TYPE_CHECKING:
    from model.loading.card import ModelCard

# The most that one clip may ask for. Wide bounds: they keep a slip of the finger from costing a GPU-day.
MAX_SIDE = 2048
MAX_FRAMES = 1025
MAX_PIXELS = 2**28  # width x height x frames: 1080p for 129 frames
MAX_STEPS = 200
MAX_GUIDANCE = 30.0
MAX_SHIFT = 20.0
MAX_FPS = 120
MAX_SAMPLES = 64
MAX_SEED = 2**63 - 1  # a Postgres bigint, and what torch's generator takes
MAX_PROMPT = 2000  # characters
MAX_ID = 200  # characters of a custom_id, a name or a key


class PromptsFormat(StrEnum):
    """How a prompt file is written."""

    AUTO = "auto"
    JSONL = "jsonl"
    CSV = "csv"
    TEXT = "text"


FORMAT_OF_ENDING = {
    ".jsonl": PromptsFormat.JSONL,
    ".ndjson": PromptsFormat.JSONL,
    ".json": PromptsFormat.JSONL,
    ".csv": PromptsFormat.CSV,
    ".tsv": PromptsFormat.CSV,
    ".txt": PromptsFormat.TEXT,
}


def format_of(name: str) -> PromptsFormat:
    """The format that a file's name tells, a compressed one's too; AUTO where only a look at the file can tell."""
    path = PurePosixPath(name.lower())
    ending = PurePosixPath(path.stem).suffix if path.suffix == ".gz" else path.suffix
    return FORMAT_OF_ENDING.get(ending, PromptsFormat.AUTO)


class Solver(StrEnum):
    """How the denoising equation is stepped (`model.network.diffusion` says how each works)."""

    EULER = "euler"
    AB2 = "ab2"
    UNIPC = "unipc"


class Mode(StrEnum):
    """The kind of a clip by its sources beside its words."""

    TEXT_TO_VIDEO = "text-to-video"
    IMAGE = "image"
    IMAGE_TO_VIDEO = "image-to-video"
    EXTEND = "extend"
    CONNECT = "connect"
    LOOP = "loop"
    EDIT = "edit"


class Direction(StrEnum):
    """On which side a clip is extended."""

    FORWARD = "forward"
    BACKWARD = "backward"


SOURCES = ("image", "video", "clip", "end_image", "end_video", "end_clip")
CONDITIONS = ("mode", *SOURCES, "direction", "strength", "overlap")
LEADING = (  # in a form, the first of them first
    *("prompts_text", "model", "width", "height", "frames", "samples", "seed", "name"),
    *("prompts_uri", "prompts_format", "negative_prompt", "prompt", "custom_id"),
)
IN_SIGHT = (*LEADING[:9], "negative_prompt", "tenant", "priority")  # in the form that most requests are made with
HIDDEN = ("prompts", "files", "resumes")  # what programs fill in: accepted, and shown in no form
MAX_DEADLINE = 30 * 86400  # seconds
MAX_NAME = 500  # characters of a source's name
MAX_FILES = 1000  # that one request may bring along
MAX_TEXT = 200_000  # characters of pasted prompts: Prefect keeps half a megabyte of parameters, and no more

# Each bound is written once. Multiples of 16 and 4n+1 depend on the model, so the prompt reader checks them.
Side = Annotated[int, Field(ge=16, le=MAX_SIDE)]
Frames = Annotated[int, Field(ge=1, le=MAX_FRAMES)]
Fps = Annotated[int, Field(ge=1, le=MAX_FPS)]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
Guidance = Annotated[float, Field(ge=1, le=MAX_GUIDANCE, allow_inf_nan=False)]
Shift = Annotated[float, Field(ge=0.1, le=MAX_SHIFT, allow_inf_nan=False)]
Samples = Annotated[int, Field(ge=1, le=MAX_SAMPLES)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Name = Annotated[str, Field(max_length=MAX_NAME)]
Strength = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
StepCache = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Overlap = Annotated[int, Field(ge=1, le=MAX_FRAMES)]
Tags = Annotated[list[Annotated[str, Field(min_length=1, max_length=MAX_TAG)]], Field(max_length=MAX_TAGS)]


class Limits(NamedTuple):
    """The type of a field's values, and the bounds of numbers."""

    kind: Any
    low: Any = None
    high: Any = None
    above: Any = None  # lower bound that is itself too low


def limits_of(field: FieldInfo) -> Limits:
    """Limits of an optional field, whose bounds stand in the type beside None, or of a plain one."""
    kind, known = field.annotation, list(field.metadata)
    while get_args(kind):
        kind, *more = (each for each in get_args(kind) if each is not NoneType)
        known += more
    bounds = [bound for each in known for bound in getattr(each, "metadata", (each,))]
    low, high, above = (
        next((getattr(bound, name) for bound in bounds if hasattr(bound, name)), None) for name in ("ge", "le", "gt")
    )
    return Limits(kind, low, high, above)


def _as_form(schema: dict[str, Any], _: object = None, *, in_sight: Sequence[str] | None = None) -> None:
    """Makes the schema of a class one that a form can show, with all fields or those `in_sight`.

    Optional values are plain fields there, not choices between a value and None. All other fields are accepted too: a
    form shows `properties`, and what is in neither these nor `patternProperties` is refused.
    """
    fields = schema.get("properties", {})
    names = sorted(fields, key=_place)
    shown = [name for name in names if name not in HIDDEN and (in_sight is None or name in in_sight)]
    schema["properties"] = {name: _plain(fields[name]) | {"position": at} for at, name in enumerate(shown)}
    hidden = {name: field for name, field in fields.items() if name not in shown}
    if "idempotency_key" in fields:
        hidden["key"] = {"anyOf": [_plain(dict(fields["idempotency_key"])), {"type": "null"}]}
    if hidden:
        schema["patternProperties"] = {f"^{name}$": field for name, field in hidden.items()}


def _place(name: str) -> float:
    """Sources stand behind prompts and model: where they are in sight, they are what the form is for."""
    if name in CONDITIONS:
        return LEADING.index("model") + 0.5
    return LEADING.index(name) if name in LEADING else len(LEADING)


def _plain(field: dict[str, Any]) -> dict[str, Any]:
    field = dict(field)
    kinds = [kind for kind in field.get("anyOf", []) if kind != {"type": "null"}]
    if len(kinds) == 1 and "type" in kinds[0] and "enum" not in kinds[0]:
        del field["anyOf"]
        field |= kinds[0]
    if field.get("default", ...) is None:
        del field["default"]  # Prefect accepts null for an optional field exactly when it shows no default
    return field


class Conditioned(BaseModel):
    """The sources of a clip beside its words: the same fields for one prompt and for all of a request."""

    mode: Mode | None = Field(
        default=None,
        title="Mode",
        description="text-to-video, image, image-to-video (image), extend (video or clip), connect (a source and an "
        "end), loop, or edit (a source); empty: text-to-video",
    )
    image: Name | None = Field(
        default=None,
        title="Image",
        description="PNG, JPEG or WebP: store:KEY, or a file (of a form: below the worker's prompts folder)",
    )
    video: Name | None = Field(default=None, title="Video", description="MP4, WebM, Matroska or AVI, likewise")
    clip: Name | None = Field(default=None, title="Clip", description="The id of a finished clip of any request")
    end_image: Name | None = Field(default=None, title="End image", description="What a connecting clip leads to")
    end_video: Name | None = Field(default=None, title="End video", description="What a connecting clip leads to")
    end_clip: Name | None = Field(default=None, title="End clip", description="What a connecting clip leads to")
    direction: Direction | None = Field(default=None, title="Direction", description="Of extend; empty: forward")
    strength: Strength | None = Field(
        default=None, title="Strength", description="Of edit: 1 keeps nothing of the source; empty: 0.6"
    )
    overlap: Overlap | None = Field(
        default=None, title="Overlap", description="Known frames that each new stretch begins with, 4n+1"
    )


class ClipOptions(Conditioned):
    """A clip's settings: for one prompt, or for all of a request that bring none of their own.

    A setting is written here and in `LineSettings`; the options of the command line, the checks of prompt files, keys
    and recipes take it from there by name.
    """

    width: Side | None = Field(
        default=None, title="Width", description="Pixels, a multiple of 16; empty: the model's own"
    )
    height: Side | None = Field(
        default=None, title="Height", description="Pixels, a multiple of 16; empty: the model's own"
    )
    frames: Frames | None = Field(default=None, title="Frames", description="4n+1, so 9, 13, 17 …; 1 makes an image")
    fps: Fps | None = Field(default=None, title="Frames per second")
    steps: Steps | None = Field(default=None, title="Denoising steps", description="More are slower and finer")
    guidance: Guidance | None = Field(
        default=None, title="Guidance", description="How closely to follow the prompt; 1 is off and takes half the time"
    )
    guidance_2: Guidance | None = Field(
        default=None,
        title="Guidance of the second expert",
        description="Of a model with two experts, for the one that ends the clip; empty: as guidance",
    )
    solver: Solver | None = Field(default=None, title="Solver", description="How the equation is stepped")
    shift: Shift | None = Field(
        default=None, title="Time shift", description="Higher spends more steps on layout and motion"
    )
    step_cache: StepCache | None = Field(
        default=None,
        title="Step cache",
        description="Skip most of a step at which the first block changes by less than this share: faster, "
        "and not quite the same picture; empty: every step is computed",
    )
    samples: Samples | None = Field(
        default=None, title="Samples", description="Clips of each prompt, each from another seed"
    )


class PromptLine(ClipOptions):
    """One prompt with settings of its own. What is left empty follows the request, then the model."""

    model_config = ConfigDict(extra="forbid", json_schema_extra=_as_form, title="Prompt with its own settings")

    prompt: str = Field(title="Prompt", description=f"At most {MAX_PROMPT:,} characters")
    custom_id: str | None = Field(
        default=None, title="Your own id", description="Unique in the request; names the exported clip"
    )
    negative_prompt: str | None = Field(default=None, title="Negative prompt")
    take_of: str | None = Field(
        default=None,
        title="Take of",
        description="The clip of history that this is another take of: kept as its parent",
    )
    seed: Seed | None = Field(default=None, description="Used as it is; sample k of this prompt uses seed + k")
    tags: Tags | None = Field(default=None, title="Tags", description="Beside those of the request")
    metadata: dict[str, Any] | None = Field(
        default=None, title="Metadata", description="A JSON object of your own, beside that of the request"
    )


class GenerationRequest(ClipOptions):
    """A batch of prompts, and the settings of those that bring none of their own."""

    model_config = ConfigDict(extra="forbid", json_schema_extra=_as_form, title="Generation request")

    name: str | None = Field(default=None, max_length=MAX_ID, title="Name", description="What you call this batch")
    prompts: list[str | PromptLine] = Field(
        default_factory=list[str | PromptLine],
        title="Prompts",
        description='Each a text, or an object with settings of its own, like {"prompt": "a blue cone", "frames": 1}',
    )
    prompts_text: str | None = Field(
        default=None,
        max_length=MAX_TEXT,
        title="Prompts",
        description="Paste them here, one a line, or JSON lines with settings of their own, like "
        '`{"prompt": "a blue cone", "frames": 1}`',
    )
    prompts_uri: str | None = Field(
        default=None,
        title="Prompt file",
        description="In place of pasted prompts: the path of a file below the worker's prompts folder, or store:KEY "
        "for an object of the store",
    )
    prompts_format: PromptsFormat = Field(
        default=PromptsFormat.AUTO,
        title="Format of the file",
        description="JSONL has an object a line, CSV a header row, text a prompt a line; auto goes by the file's "
        "ending, else by its first line",
    )
    model: str = Field(default="mini", min_length=1, max_length=MAX_ID, title="Model", description="Its name or folder")
    negative_prompt: str | None = Field(
        default=None, max_length=MAX_PROMPT, title="Negative prompt", description="What should not be seen"
    )
    seed: Seed = Field(default=0, title="Seed", description="Another number makes other clips of the same prompts")
    rewrite: bool = Field(
        default=True,
        title="Rewrite prompts",
        description="Into words that the model was trained on, if it brings a rewriter; both prompts are kept",
    )
    priority: int = Field(
        default=5, ge=0, le=9, title="Priority", description="0 to 9; of one tenant's requests the higher goes first"
    )
    tenant: str = Field(
        default="default", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", title="Tenant", description="On whose account"
    )
    deadline: float | None = Field(
        default=None,
        gt=0,
        le=MAX_DEADLINE,
        allow_inf_nan=False,
        title="Deadline",
        description="Seconds in which all should be done: no more GPUs than that takes, where engines follow a plan",
    )
    tags: Tags = Field(
        default_factory=list[str], title="Tags", description="Words of yours to find its clips by in SQL; no commas"
    )
    metadata: dict[str, Any] = Field(
        default_factory=dict[str, Any],
        title="Metadata",
        description=f"A JSON object of your own, kept with every clip: at most {MAX_METADATA:,} bytes",
    )
    idempotency_key: str | None = Field(
        default=None,
        validation_alias=AliasChoices("idempotency_key", "key"),  # `key` is what it was called first
        min_length=1,
        max_length=MAX_ID,
        title="Idempotency key",
        description="Two requests of one key are one request; empty: made from the prompts and the settings",
    )
    fresh: bool = Field(
        default=False,
        title="Render again",
        description="Clips that are there already will not do: all of it is rendered anew, as a request of its own",
    )
    skip_invalid: bool = Field(
        default=False, title="Skip bad lines", description="Record them as rejected, make the others"
    )
    strict: bool = Field(
        default=False,
        title="Strict",
        description="Refuse what is else made with a warning: settings without effect, words that the model drops",
    )

    files: dict[str, str] = Field(
        default_factory=dict[str, str],
        max_length=MAX_FILES,
        description="Where the files that prompts name lie in the store; `rushes submit` fills it in, no form shows it",
    )
    resumes: str | None = Field(
        default=None,
        max_length=MAX_ID,
        description="The request that maintenance takes up since its run has ended; no form shows it",
    )

    @field_validator(
        "name", "prompts_text", "prompts_uri", "idempotency_key", "negative_prompt", *SOURCES, mode="before"
    )
    @classmethod
    def _an_empty_field_is_no_value(cls, value: Any) -> Any:
        return None if isinstance(value, str) and not value.strip() else value

    @field_validator("tags")
    @classmethod
    def _tags_can_be_stored(cls, value: list[str]) -> list[str]:
        return tags_of(value)

    @field_validator("metadata")
    @classmethod
    def _metadata_can_be_stored(cls, value: dict[str, Any]) -> dict[str, Any]:
        return metadata_of(value)

    @model_validator(mode="after")
    def _prompts_come_from_one_place(self) -> GenerationRequest:
        given = [name for name in ("prompts_text", "prompts", "prompts_uri") if getattr(self, name)]
        if not given:
            raise ValueError("no prompts are given: paste some (prompts_text), or name a file (prompts_uri)")
        if len(given) > 1:
            raise ValueError(f"prompts come from one place: {' and '.join(given)} are given")
        return self

    def resolve(self, card: ModelCard) -> Defaults:
        """The settings of a prompt that brings none of its own."""
        of_model: dict[str, Any] = {name: getattr(card, name) for name in SETTINGS if hasattr(card, name)}
        given = self.model_dump(mode="json", include=set(SETTINGS), exclude_none=True)
        settings: dict[str, Any] = {"negative_prompt": None, "samples": 1, **of_model, **given}
        return Defaults(
            **settings,
            multiple=card.multiple,
            frame_step=card.frame_step,
            window=card.window,
            experts=1 if card.boundary is None else 2,
            asked_size=self.width is not None or self.height is not None,
            asked_frames=self.frames,
            asked=tuple(given),
            conditions={name: value for name in CONDITIONS if (value := getattr(self, name)) is not None},
        )

    @property
    def labels(self) -> Labels:
        """Tags and metadata that all of its clips have."""
        return Labels(tuple(self.tags), self.metadata)

    @property
    def format(self) -> PromptsFormat:
        """The format the prompts are read in; AUTO when only a look at the file can tell."""
        if self.prompts or _mixed(self):
            return PromptsFormat.JSONL
        if self.prompts_format is not PromptsFormat.AUTO:
            return self.prompts_format
        return format_of(self.prompts_uri or "")

    def inline_bytes(self) -> bytes:
        """The prompts that the request itself holds, as a file: there is one reader and one digest for every way in."""
        if self.prompts_text:
            return "\n".join(_mixed(self) or [self.prompts_text]).encode()
        lines = [PromptLine(prompt=p) if isinstance(p, str) else p for p in self.prompts]
        return "".join(json.dumps(line.model_dump(mode="json", exclude_none=True)) + "\n" for line in lines).encode()


def _mixed(request: GenerationRequest) -> list[str] | None:
    """Pasted lines as JSON lines, each in its place, where some are JSON objects and others are prompts; else None."""
    if not request.prompts_text or request.prompts_format is not PromptsFormat.AUTO:
        return None
    lines = re.split(r"\r\n|\r|\n", request.prompts_text)
    objects = {line for line in lines if _is_object(line)}
    if not objects or all(line in objects or not line.strip() for line in lines):
        return None
    return [line if line in objects or not line.strip() else json.dumps({"prompt": line}) for line in lines]


def _is_object(line: str) -> bool:
    try:
        return line.lstrip().startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


class ShortRequest(GenerationRequest):
    """A batch of prompts. What most requests never need is in the form of `generate/from-media`."""

    # The same request as its base, field for field: only its form shows less.
    model_config = ConfigDict(json_schema_extra=partial(_as_form, in_sight=IN_SIGHT), title="Request")


@dataclass(frozen=True, slots=True, kw_only=True)
class LineSettings:
    """The settings of a prompt, each decided.

    One that is added later has a default, and is absent from recipes and keys where it has that, so that clips which
    were rendered before keep theirs.
    """

    width: int
    height: int
    frames: int
    fps: int
    steps: int
    guidance: float  # 1 is off
    solver: str
    shift: float
    negative_prompt: str | None
    samples: int
    seed: int
    step_cache: float | None = None
    guidance_2: float | None = None  # of a second expert, where guidance is on; None: as guidance


SETTINGS = tuple(each.name for each in fields(LineSettings))
ADDED = {each.name: each.default for each in fields(LineSettings) if each.default is not MISSING}


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults(LineSettings):
    """A request's settings with the model's defaults filled in, and the model's rules for sizes and lengths."""

    multiple: int  # width and height must be multiples of it
    frame_step: int  # frames must be frame_step * n + 1
    window: int = 0  # the most frames that the model makes at once; 0: not known
    experts: int = 1  # of the model, that take turns
    asked_size: bool = False  # the request itself says width or height
    asked_frames: int | None = None  # the length that the request itself asks for
    asked: tuple[str, ...] = ()  # the settings that the request itself gives
    conditions: dict[str, Any] = field(default_factory=dict[str, Any])  # of prompts that name neither mode nor source


def request_key(
    request: GenerationRequest,
    defaults: Defaults,
    *,
    source_sha256: str,
    model_digest: str,
    made_from: str | None = None,
    rewriter: str | None = None,
) -> str:
    """The idempotency key: the given one (each tenant has its own), or a digest of all that decides the clips.

    So the same file with the same settings is the same request, however it is named and however urgent it is. With
    other labels it is another one, whose clips are all reused: nobody's tags are lost.
    `source_sha256` is the hex digest of the prompt file, or of `inline_bytes`; `made_from` that of the pictures, videos
    and clips that it names (`Checked.made_from`); `rewriter` that of the model's rewriter. An endpoint that rewrites is
    no part of it: submitted again, a request keeps the words it has.
    """
    if request.idempotency_key:
        return f"{request.tenant}:{request.idempotency_key}"
    settings = asdict(defaults)
    for name in ("window", "experts", "asked_size", "asked_frames", "asked"):  # the model's, or said by another setting
        del settings[name]
    for name, absent in {**ADDED, "conditions": {}}.items():
        if settings[name] == absent:
            del settings[name]
    whole: dict[str, Any] = {
        "source": source_sha256,
        "format": request.format.value,
        "settings": settings,
        "tenant": request.tenant,
        "model": model_digest,
    }
    said: dict[str, Any] = {"made_from": made_from, "rewriter": rewriter if request.rewrite else "off"}
    said |= {"tags": sorted(request.tags), "metadata": request.metadata}
    return digest_of(whole | {name: value for name, value in said.items() if value})


def request_id(key: str) -> str:
    """`req_` and 12 hex digits of the key's sha256."""
    return "req_" + hashlib.sha256(key.encode()).hexdigest()[:12]


def clip_id(request: str, index: int, sample: int) -> str:
    """The id of sample `sample` of the prompt number `index` (both from 0) of the request with id `request`."""
    return f"{request}-{index:06d}-{sample}"


def digest_of(value: dict[str, Any] | Sequence[Any]) -> str:
    """sha256 hex over canonical JSON: sorted keys, no spaces, ASCII, so equal values have equal digests everywhere."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
