"""Sources of a line besides its words: the modes, which sources and options each takes, and what follows.

All of it is decided when the prompts are checked: how long the clip will be, in which windows it is made, and what is
wrong with it, in one sentence each. Where a source lies and what it holds, `flows.request.sources` finds out. It loads
neither torch nor a database: submitting a million prompts must not pay for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from flows.request.form import MAX_FRAMES, SOURCES, Defaults, Direction, Mode
from model.config import frames_at

STITCHED = (Mode.EXTEND, Mode.CONNECT, Mode.LOOP)  # what is made is joined to the frames of a source


class BadSource(ValueError):
    """A source cannot be used. The message says why and what to do, in words that follow `clip=…`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaSource:
    """A picture, a video or a clip of history that a clip is made from."""

    sha256: str
    key: str  # in the store; '' while it lies on the submitter's machine only
    bytes: int
    media_type: str
    width: int
    height: int
    frames: int
    fps: float  # 0: a picture
    clip_id: str | None = None

    def frames_at(self, fps: int) -> int:
        """How many frames it has at a clip's rate."""
        return frames_at(self.frames, self.fps, fps)


# (image, video or clip; its name) -> what it names; None where it cannot be looked at from here. Raises BadSource.
Find = Callable[[str, str], MediaSource | None]


def nowhere(kind: str, name: str) -> MediaSource | None:
    """Looks nothing up: the run of the request will."""
    return None


class Fault(NamedTuple):
    """One thing that is wrong with a line: which key, and a sentence with value, bound and what to do."""

    field: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """A line's mode with all that belongs to it. Sources that could not be looked at are only named in `identity`."""

    mode: Mode = Mode.TEXT_TO_VIDEO
    source: MediaSource | None = None
    end_source: MediaSource | None = None
    direction: Direction | None = None
    strength: float | None = None
    overlap: int | None = None
    window: int | None = None  # where the clip is joined to a source or made in several windows
    made_frames: int | None = None  # frames that go through the model, where these are not its own ones, once
    identity: tuple[str, ...] = ()  # of its sources: the same on every machine

    def recipe(self) -> dict[str, Any]:
        """The part that determines pixels; empty for a clip that is made at once from words alone."""
        if self.window is None and self.source is None and self.mode in (Mode.TEXT_TO_VIDEO, Mode.IMAGE):
            return {}
        decided = {
            "mode": self.mode.value,
            "source": self.source and self.source.sha256,
            "end_source": self.end_source and self.end_source.sha256,
            "direction": self.direction and self.direction.value,
            "strength": self.strength,
            "overlap": self.overlap,
            "window": self.window,
        }
        return {"conditions": {name: value for name, value in decided.items() if value is not None}}


PLAIN, STILL = Conditions(), Conditions(mode=Mode.IMAGE)


class Takes(NamedTuple):
    """The sources that a mode takes."""

    sources: tuple[str, ...] = ()  # of these, one
    needed: bool = True
    end: bool = False  # and one that it leads to


TAKES = {
    Mode.TEXT_TO_VIDEO: Takes(),
    Mode.IMAGE: Takes(),
    Mode.IMAGE_TO_VIDEO: Takes(("image", "video", "clip")),
    Mode.EXTEND: Takes(("video", "clip")),
    Mode.CONNECT: Takes(("image", "video", "clip"), end=True),
    Mode.LOOP: Takes(("image", "video", "clip"), needed=False),
    Mode.EDIT: Takes(("image", "video", "clip")),
}
OPTIONS = {"direction": (Mode.EXTEND,), "strength": (Mode.EDIT,), "overlap": STITCHED}
STRENGTH = 0.6  # of an edit that does not say


def with_request(line: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """The conditions of a line, from the request where the line is silent.

    A line that names its mode or a source leaves those of the request aside, and takes the options that suit its own.
    """
    if not {"mode", *SOURCES} & line.keys():
        return request | line
    mode = mode_of(line)
    return {name: request[name] for name, modes in OPTIONS.items() if name in request and mode in modes} | line


def mode_of(values: dict[str, Any]) -> Mode:
    return Mode(values.get("mode") or Mode.TEXT_TO_VIDEO)


def check_sources(values: dict[str, Any]) -> list[Fault]:
    """Faults of the keys of one line beside each other, without a look at any source."""
    faults: list[Fault] = []
    mode = mode_of(values)
    takes = TAKES[mode]
    given = [name for name in SOURCES if values.get(name) is not None]
    for prefix, allowed in (("", takes.sources), ("end_", takes.sources if takes.end else ())):
        mine = [name for name in given if name.startswith("end_") == bool(prefix)]
        names = [prefix + name for name in allowed]
        for name in mine:
            if name not in names:
                wrong = f"{name}={_show(values[name])} is not for mode={mode}{_instead(name, names)}"
                faults.append(Fault(name, wrong))
        if len(set(mine) & set(names)) > 1:
            faults.append(Fault(mine[1], f"{mine[0]} and {mine[1]} are both given: give one of them"))
        if names and takes.needed and not mine:
            faults.append(Fault("mode", f"mode={mode} needs {_either(names)}"))
    for option in ("direction", "strength"):
        if values.get(option) is not None and mode not in OPTIONS[option]:
            wrong = f"{option}={values[option]} is for mode={OPTIONS[option][0]}, not for mode={mode}"
            faults.append(Fault(option, wrong))
    return faults


def _instead(name: str, names: list[str]) -> str:
    if names:
        return f", which takes {_either(names)}"
    modes = [mode.value for mode, takes in TAKES.items() if name.removeprefix("end_") in takes.sources]
    modes = [mode for mode in modes if not name.startswith("end_") or TAKES[Mode(mode)].end]
    return f": say mode {_either(modes)}"


def _either(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _show(value: Any) -> str:
    text = str(value)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 80 else text[:79] + "…"


@dataclass(slots=True)
class Size:
    """A clip's size while it is being settled."""

    width: int
    height: int
    frames: int | None  # None: not asked for
    fps: int
    asked: bool  # for this width or height


Settled = tuple[Conditions, tuple[str, ...], list[Fault]]


def settle(values: dict[str, Any], size: Size, defaults: Defaults, find: Find) -> Settled:
    """(conditions, shapes that the model makes, what is wrong) of a line whose keys agree (`check_sources`).

    Fills in `size`.
    """
    mode = mode_of(values)
    if mode is Mode.TEXT_TO_VIDEO and not (defaults.window and (size.frames or defaults.frames) > defaults.window):
        size.frames = size.frames or defaults.frames
        idle = [_idle(values["overlap"])] if "overlap" in values else []
        return PLAIN if size.frames > 1 else STILL, (f"{size.width}x{size.height}x{size.frames}",), idle
    faults: list[Fault] = []
    found: dict[str, MediaSource | None] = {}
    identity: list[str] = []
    for name in SOURCES:
        if (value := values.get(name)) is None:
            continue
        kind = name.removeprefix("end_")
        try:
            found[name[: -len(kind)]] = source = find(kind, value)
            if source and kind != "clip" and (kind == "image") != (source.fps == 0):
                raise BadSource(_misnamed(source))
        except BadSource as error:
            faults.append(Fault(name, f"{name}={_show(value)} {error}"))
            continue
        identity.append(f"{name}={value if kind == 'clip' or source is None else source.sha256}")
    if mode is Mode.IMAGE and size.frames not in (None, 1):
        faults.append(Fault("frames", f"frames={size.frames} must be 1 with mode=image"))
    if faults:
        return PLAIN, (), faults
    size.frames = 1 if mode is Mode.IMAGE else size.frames
    blind = any(source is None for source in found.values())  # the run will look
    start, end = found.get(""), found.get("end_")
    if start is not None and start.clip_id and not size.asked and not _misfit(start, defaults):
        size.width, size.height = start.width, start.height
    conditions = Conditions(
        mode=mode,
        source=start,
        end_source=end,
        direction=Direction(values.get("direction") or Direction.FORWARD) if mode is Mode.EXTEND else None,
        strength=(values.get("strength") or STRENGTH) if mode is Mode.EDIT else None,
        identity=tuple(identity),
    )
    if blind:
        size.frames = size.frames or defaults.frames
        return conditions, (), []
    return _plan(conditions, values.get("overlap"), size, defaults)


def _misnamed(source: MediaSource) -> str:
    """The words on a picture that is named as a video, or the other way round."""
    if source.fps == 0:
        return "is a picture: name it as image"
    if source.media_type.startswith("image/"):
        return f"is an animation of {source.frames} frames: name it as video, or save the frame you want"
    return "is a video: name it as video"


def _misfit(source: MediaSource, defaults: Defaults) -> bool:
    return bool(source.width % defaults.multiple or source.height % defaults.multiple)


def _idle(overlap: int) -> Fault:
    return Fault("overlap", f"overlap={overlap} does nothing here: the clip is made at once")


def _plan(conditions: Conditions, asked: int | None, size: Size, defaults: Defaults) -> Settled:
    """The clip's length, and the windows it is made in. `asked` is the overlap that the line wants."""
    from model.media.windows import Given, windows

    faults: list[Fault] = []

    def wrong(name: str, message: str) -> None:
        faults.append(Fault(name, message))

    mode, step = conditions.mode, defaults.frame_step
    span = defaults.window or defaults.frames
    before = conditions.source.frames_at(size.fps) if conditions.source else 0
    after = conditions.end_source.frames_at(size.fps) if conditions.end_source else 0
    most = max(1, span - step)
    if asked is not None and ((asked - 1) % step or not 1 <= asked <= most):
        wrong("overlap", f"overlap={asked} must be {step}n+1, at most {most}: the model makes {span} frames at once")
    overlap = asked or min(step * max(1, span // 16) + 1, most)
    if mode is Mode.IMAGE_TO_VIDEO:
        before = 1
    frames = size.frames or _length(mode, before, after, span, overlap, defaults)
    least, why = _least(mode, before, after, step)
    if frames < least:
        wrong("frames", f"frames={frames} must be at least {least}: {why}")
    if mode is Mode.EDIT and frames > before:
        wrong("frames", f"frames={frames} must be at most {before}, which is what is edited")
    if frames > MAX_FRAMES:
        wrong("frames", f"frames={frames} must be at most {MAX_FRAMES}: give frames or a shorter source")
    backward = conditions.direction is Direction.BACKWARD
    if backward and before < step:
        wrong("direction", f"direction=backward needs a source of {step} frames or more, this one has {before}")
    size.frames = frames
    if faults:
        return PLAIN, (), faults
    given = Given(
        frames=frames,
        start=0 if mode is Mode.EDIT or backward else before,
        end=before if backward else after,
        loop=mode is Mode.LOOP,
        window=defaults.window,
        overlap=overlap,
    )
    plan = windows(given, step)
    several = len(plan) > 1
    if asked is not None and not several and mode not in STITCHED:
        return PLAIN, (), [_idle(asked)]
    if several or mode in STITCHED:
        made = sum(window.frames for window in plan)
        conditions = replace(conditions, overlap=overlap, window=defaults.window or None, made_frames=made)
    shapes = sorted({f"{size.width}x{size.height}x{window.frames}" for window in plan})
    return conditions, tuple(shapes), []


def _length(mode: Mode, before: int, after: int, span: int, overlap: int, defaults: Defaults) -> int:
    """Frames of a clip that asks for no length: with one more window where something is added to a source."""
    step = defaults.frame_step
    bridge = max(step, span - min(overlap, before) - step * max(1, overlap // step))
    if mode is Mode.EDIT:
        return (before - 1) // step * step + 1
    if mode is Mode.EXTEND:
        return before + max(step, span - overlap)
    if mode is Mode.CONNECT:
        return before + bridge + after
    if mode is Mode.LOOP and before > 1:
        return before + bridge
    return defaults.frames


def _least(mode: Mode, before: int, after: int, step: int) -> tuple[int, str]:
    if mode is Mode.IMAGE_TO_VIDEO:
        return step + 1, "the first one is the picture"
    if mode is Mode.EXTEND:
        return before + 1, f"the source has {before} of them"
    if mode is Mode.CONNECT:
        return before + after + 1, f"the two sources have {before} and {after} of them"
    if mode is Mode.LOOP:
        return max(3 * step + 1, before + 1), "a shorter clip cannot come back to its beginning"
    return 1, ""
