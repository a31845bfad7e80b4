"""A clip between two denoising steps, as bytes: what another engine needs to go on from there to the same bits.

That is the latents, what the solver remembers of its last steps, which window of the clip they are of, and the pixels
of the windows before. No random generator is among it: noise comes from the seed alone, once at the start of a window.
Of a step cache it is the latents of the last step that was computed in full, which is computed once more
(`model.network.stepcache`), and how many were skipped.

The bytes are a safetensors file. What is read is believed only where all of it fits: the digest of what must be alike
(`alike`), names, shapes, step, finite numbers, and the digest of the contents. Whatever does not is `Unusable`, and the
clip begins anew.
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
    from model.network.diffusion import Here
    from model.network.stepcache import Computed

FORMAT = 2
MAX_HEADER = 1 << 14  # bytes: four tensors and a few words take some hundred


class Unusable(ValueError):
    """These bytes are not from where this clip could go on. The message says why."""


@dataclass(frozen=True, slots=True)
class Unfinished:
    """How far a clip has come."""

    window: int  # the one under way
    here: Here  # in it, on the CPU
    pixels: Frames | None  # of the time line with all windows before it painted, [T, H, W, 3]; None in the first one
    skipped: int | None = None  # steps that its step cache answered, over all windows; None: it has none
    computed: Computed | None = None  # of the window under way the last step that it did not


@dataclass(frozen=True, slots=True)
class Due:
    """What can be true of a clip that is not finished."""

    windows: int
    steps: int  # of each window
    solver: str
    latents: Callable[[int], tuple[int, ...]]  # their shape in a window
    pixels: tuple[int, ...]  # the shape of the time line
    cached: bool = False  # it has a step cache


def alike(spec: ClipSpec, model_digest: str, numerics: Sequence[str]) -> str:
    """The digest of all that must be the same for a clip to go on to the same bits: clip, model, code and `numerics`.

    numerics: partition, device, type and all else that the last bits of a step depend on.
    """
    digest = hashlib.sha256()
    apart = ("clip_id", "unfinished", *BROUGHT)
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


def to_bytes(unfinished: Unfinished, of: str) -> bytes:
    """A safetensors file; `of` is what `alike` says."""
    import torch
    from safetensors.torch import save

    here = unfinished.here
    tensors = {"x": here.x}
    if here.past:
        tensors["past"] = torch.stack(here.past)
    if unfinished.pixels is not None:
        tensors["pixels"] = torch.from_numpy(unfinished.pixels)
    said = {"of": of, "window": str(unfinished.window), "step": str(here.step)}
    if unfinished.skipped is not None:
        said["skipped"] = str(unfinished.skipped)
    if unfinished.computed is not None:
        tensors["computed"], said["computed"] = unfinished.computed.x, str(unfinished.computed.step)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    contents = _contents(said, {name: tensor.numpy() for name, tensor in tensors.items()})
    return save(tensors, {**said, "contents": contents})


def from_bytes(data: bytes, of: str, due: Due) -> Unfinished:
    """What `to_bytes` wrote. Raises Unusable for all else, before more memory is taken than the bytes themselves need.

    of: what `alike` says here and now.
    """
    try:
        return _read(data, of, due)
    except Unusable:
        raise
    except Exception as problem:  # nobody can tell what somebody may have written there
        raise Unusable(f"it cannot be read ({type(problem).__name__}: {problem})") from None


def _read(data: bytes, of: str, due: Due) -> Unfinished:
    import torch

    from model.network.diffusion import Here, remembered
    from model.network.stepcache import Computed

    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(MAX_HEADER, len(data) - 8):
        raise Unusable(f"its header says that it has {length} bytes, of {len(data)} in all")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    said: dict[str, str] = header.pop("__metadata__")
    if said["of"] != of:
        raise Unusable("it was made of something else, or on another kind of engine")
    window, step = int(said["window"]), int(said["step"])
    if not (0 <= window < due.windows and (window == 0) <= step < due.steps):
        raise Unusable(f"it is at step {step} of window {window}, of {due.windows} windows of {due.steps} steps")
    shape, memories = due.latents(window), remembered(due.solver, step)
    wanted = {"x": ("F32", shape)}
    if memories:
        wanted["past"] = ("F32", (memories, *shape))
    if window:
        wanted["pixels"] = ("U8", due.pixels)
    names = ["of", "window", "step"]
    if due.cached:
        names.append("skipped")
        skipped = int(said["skipped"])
        if not 0 <= skipped <= window * due.steps + step:
            raise Unusable(f"it skipped {skipped} steps, at step {step} of window {window}")
    if due.cached and step:
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
    return Unfinished(
        window,
        Here(torch.from_numpy(arrays["x"]), step, past),
        arrays.get("pixels"),
        int(said["skipped"]) if due.cached else None,
        Computed(int(said["computed"]), torch.from_numpy(arrays["computed"])) if "computed" in arrays else None,
    )


def _contents(said: dict[str, str], arrays: dict[str, npt.NDArray[Any]]) -> str:
    """A digest of everything: a bit that has tipped over would otherwise become a clip like any other."""
    digest = hashlib.sha256(json.dumps([said, sorted(arrays)], sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(arrays[name].data)
    return digest.hexdigest()
