"""A clip between two denoising steps, as bytes: what another engine needs to go on from there to the same bits.

That is the latents, the solver's memory of its last steps, which window of the clip they are of, and the pixels of the
windows before. No random generator is among it: noise comes from the seed alone, once at the start of a window.
Of a step cache it is the latents of the last step that was computed in full, which is computed once more
(`model.network.stepcache`), and how many were skipped.

The bytes are a safetensors file. They are believed only where all of it fits: the fingerprint of clip, model, code and
numerics, names, shapes, step, finite numbers, and the digest of the contents. All else is `Unusable`, and the clip
begins anew.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from model.engine.clip import BROUGHT
from model.media.windows import Frames

if TYPE_CHECKING:
    from model.engine.clip import ClipSpec
    from model.network.diffusion import SolverState
    from model.network.stepcache import Computed

FORMAT = 2
MAX_HEADER = 1 << 14  # bytes: four tensors and a few words take some hundred


class Unusable(ValueError):
    """These bytes are not from where this clip could go on. The message says why."""


@dataclass(frozen=True, slots=True)
class ResumeState:
    """How far a clip has come: the state of its solver, in one of its windows."""

    window: int  # the one under way
    solver: SolverState  # in it, on the CPU
    pixels: Frames | None  # of the time line with all windows before it painted, [T, H, W, 3]; None in the first one
    skipped: int | None = None  # steps that its step cache answered, over all windows; None: it has none
    computed: Computed | None = None  # of the window under way the last step that it did not


@dataclass(frozen=True, slots=True)
class Expected:
    """The bounds that a resume state of a clip must keep."""

    windows: int
    steps: int  # of each window
    solver: str
    latents: Callable[[int], tuple[int, ...]]  # their shape in a window
    pixels: tuple[int, ...]  # the shape of the time line
    cached: bool = False  # it has a step cache


def fingerprint(spec: ClipSpec, model_digest: str, numerics: Sequence[str]) -> str:
    """The digest of all that must be the same for a clip to go on to the same bits: clip, model, code and `numerics`.

    numerics: partition, device, type and all else that the last bits of a step depend on.
    """
    digest = hashlib.sha256()
    apart = ("clip_id", "resume_state", *BROUGHT)
    said = {each.name: getattr(spec, each.name) for each in fields(spec) if each.name not in apart}
    shapes = [None if (frames := getattr(spec, name)) is None else frames.shape for name in BROUGHT]
    digest.update(json.dumps([_code(), model_digest, [*numerics], said, shapes], sort_keys=True).encode())
    for name in BROUGHT:
        if (frames := getattr(spec, name)) is not None:
            digest.update(np.ascontiguousarray(frames).data)
    return digest.hexdigest()


@cache
def _code() -> list[str]:
    return [f"format {FORMAT}", *(f"{name} {version(name)}" for name in ("rushes", "torch"))]


def to_bytes(state: ResumeState, fingerprint: str) -> bytes:
    """Encodes a state as a safetensors file."""
    import torch
    from safetensors.torch import save

    solver = state.solver
    tensors = {"x": solver.x}
    if solver.past:
        tensors["past"] = torch.stack(solver.past)
    if state.pixels is not None:
        tensors["pixels"] = torch.from_numpy(state.pixels)
    said = {"of": fingerprint, "window": str(state.window), "step": str(solver.step)}
    if state.skipped is not None:
        said["skipped"] = str(state.skipped)
    if state.computed is not None:
        tensors["computed"], said["computed"] = state.computed.x, str(state.computed.step)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    contents = _contents(said, {name: tensor.numpy() for name, tensor in tensors.items()})
    return save(tensors, {**said, "contents": contents})


def from_bytes(data: bytes, fingerprint: str, expected: Expected) -> ResumeState:
    """Decodes the bytes that `to_bytes` wrote.

    fingerprint: of the clip on this engine. Raises Unusable for all other bytes, before more memory is taken than the
    bytes themselves need.
    """
    try:
        return _read(data, fingerprint, expected)
    except Unusable:
        raise
    except Exception as problem:  # the bytes come from outside and may be anything
        raise Unusable(f"it cannot be read ({type(problem).__name__}: {problem})") from None


def _read(data: bytes, fingerprint: str, expected: Expected) -> ResumeState:
    import torch

    from model.network.diffusion import SolverState, history_length
    from model.network.stepcache import Computed

    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(MAX_HEADER, len(data) - 8):
        raise Unusable(f"its header says that it has {length} bytes, of {len(data)} in all")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    said: dict[str, str] = header.pop("__metadata__")
    if said["of"] != fingerprint:
        raise Unusable("it was made of something else, or on another kind of engine")
    window, step = int(said["window"]), int(said["step"])
    if not (0 <= window < expected.windows and (window == 0) <= step < expected.steps):
        raise Unusable(
            f"it is at step {step} of window {window}, of {expected.windows} windows of {expected.steps} steps"
        )
    shape, memories = expected.latents(window), history_length(expected.solver, step)
    wanted = {"x": ("F32", shape)}
    if memories:
        wanted["past"] = ("F32", (memories, *shape))
    if window:
        wanted["pixels"] = ("U8", expected.pixels)
    names = ["of", "window", "step"]
    if expected.cached:
        names.append("skipped")
        skipped = int(said["skipped"])
        if not 0 <= skipped <= window * expected.steps + step:
            raise Unusable(f"it skipped {skipped} steps, at step {step} of window {window}")
    if expected.cached and step:
        names.append("computed")
        wanted["computed"] = ("F32", shape)
        if not 0 <= int(said["computed"]) < step:
            raise Unusable(f"the last step that it computed is {said['computed']}, at step {step}")
    found = {name: (each["dtype"], tuple(each["shape"])) for name, each in header.items()}
    if found != wanted:
        raise Unusable(f"it holds {found}, and should hold {wanted}")
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, (kind, size) in wanted.items():
        begin, end = header[name]["data_offsets"]
        dtype = np.dtype(np.float32 if kind == "F32" else np.uint8)
        if not 0 <= begin <= end <= len(data) - 8 - length or end - begin != math.prod(size) * dtype.itemsize:
            raise Unusable(f"{name} lies from {begin} to {end} of {len(data) - 8 - length} bytes")
        arrays[name] = np.frombuffer(data, dtype, math.prod(size), 8 + length + begin).reshape(size).copy()
    if said["contents"] != _contents({name: said[name] for name in names}, arrays):
        raise Unusable("its contents do not have the digest that it says")
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise Unusable("it holds numbers that are not finite")
    past = tuple(torch.from_numpy(each) for each in arrays["past"]) if memories else ()
    return ResumeState(
        window,
        SolverState(torch.from_numpy(arrays["x"]), step, past),
        arrays.get("pixels"),
        int(said["skipped"]) if expected.cached else None,
        Computed(int(said["computed"]), torch.from_numpy(arrays["computed"])) if "computed" in arrays else None,
    )


def _contents(said: dict[str, str], arrays: dict[str, npt.NDArray[Any]]) -> str:
    """A digest of everything: a bit that has tipped over would otherwise become a clip like any other."""
    digest = hashlib.sha256(json.dumps([said, sorted(arrays)], sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(arrays[name].data)
    return digest.hexdigest()
