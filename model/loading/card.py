"""Models on disk: the diffusers directory layout, read and written.

A model is a folder with `model_index.json`, `transformer/`, `vae/`, `text_encoder/`, `tokenizer/`, `scheduler/`, and,
for ours, `rushes.json` with the defaults of a request. Only safetensors are ever loaded. torch is imported by the
functions that load, not by this file: planning needs a model's card and digest, not its tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from model.config import ClipShape, DiTConfig

SHIPPED = Path(__file__).parents[1] / "weights"
WEIGHTS = "diffusion_pytorch_model.safetensors"
TRANSFORMER, SECOND = "transformer", "transformer_2"  # the folders of a transformer, and of a second expert's
REWRITER = "rewriter"  # the folder of a model's rewriter
CAPTIONER = "captioner"  # the folder of a model's captioner
ADAPTERS = "adapters"  # the folder of a variant's adapters; adapters.json lists them


class ModelNotFound(ValueError):
    """The name is no shipped model and no folder in the diffusers layout. Give one of the names it lists, or a path."""

    exit_code = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """A model as planning needs to know it: its identity, what sizes it takes, and the defaults of a request."""

    name: str
    path: Path
    digest: str  # sha256 over the names and bytes of all its files, the rewriter's left out
    rewriter: str | None = None  # digest of its rewriter, if it brings one
    heads: int
    multiple: int  # width and height are multiples of this
    frame_step: int  # frames are frame_step * n + 1
    max_prompt_tokens: int
    width: int
    height: int
    frames: int
    fps: int
    steps: int
    guidance: float
    solver: str
    shift: float
    boundary: float | None = None  # the time below which a second expert takes over (Wan 2.2 A14B)
    trained: tuple[str, ...] = ()  # shapes such as 64x64x17 that it has seen; () where the folder does not say
    weights: str | None = None  # "int8" where the blocks are kept in 8 bits; None: in the engine's type

    @property
    def window(self) -> int:
        """The most frames to make at once: its own length, which it knows best; 0 where that is not said."""
        return self.frames if self.trained else 0

    def to_json(self) -> dict[str, Any]:
        """The card as the ledger keeps it."""
        return {**asdict(self), "path": str(self.path)}

    def tokens(self, shape: ClipShape) -> int:
        """Length of the transformer's sequence for one clip."""
        frames = (shape.frames - 1) // self.frame_step + 1
        return frames * (shape.width // self.multiple) * (shape.height // self.multiple)


# What Wan's releases were made for, where a folder brings no rushes.json of its own.
WAN: dict[str, Any] = {
    "max_prompt_tokens": 512,
    "width": 832,
    "height": 480,
    "frames": 81,
    "fps": 16,
    "steps": 50,
    "guidance": 5.0,
    "solver": "ab2",
    "shift": 3.0,
}
WAN_TI2V = WAN | {"width": 1280, "height": 704, "frames": 121, "fps": 24, "shift": 5.0}  # 2.2, 5B
WAN_EXPERTS = WAN | {"steps": 40, "guidance": 4.0}  # 2.2, A14B
SOLVERS = {"UniPCMultistepScheduler": "unipc", "FlowMatchEulerDiscreteScheduler": "euler"}  # by a scheduler's class


def find_model(name: str | Path) -> ModelCard:
    """The card of a shipped model ("mini") or of a folder in the diffusers layout. Raises ModelNotFound."""
    shipped = SHIPPED / name
    path = shipped if len(Path(name).parts) == 1 and shipped.is_dir() else Path(name)
    if not (path / "transformer" / "config.json").is_file():
        names = ", ".join(sorted(index.parent.name for index in SHIPPED.glob("*/model_index.json"))) or "none"
        raise ModelNotFound(
            f"model {str(name)!r} is neither shipped ({names}) nor a folder with transformer/config.json"
        )
    return card(path.resolve())


@lru_cache(maxsize=16)
def card(path: Path) -> ModelCard:
    config = dit_config(path)
    vae = read_json(path / "vae" / "config.json")
    space = vae.get("scale_factor_spatial") or 8
    time = vae.get("scale_factor_temporal") or 4
    index, own = _read_if_there(path / "model_index.json"), path / "rushes.json"
    known = read_json(own) if own.is_file() else {}
    return ModelCard(
        name=known.pop("name", path.name),
        path=path,
        digest=folder_digest(path),
        rewriter=folder_digest(path / REWRITER) if (path / REWRITER).is_dir() else None,
        heads=config.heads,
        multiple=space * config.patch[1],
        frame_step=time,
        boundary=index.get("boundary_ratio"),
        trained=tuple(known.pop("trained", ())),
        **(_release(path, index) | known),
    )


def _release(path: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of a request for one of Wan's releases, told apart by what only they have; its scheduler's own."""
    scheduler = _read_if_there(path / "scheduler" / "scheduler_config.json")
    shift = scheduler.get("flow_shift") or scheduler.get("shift")
    said = {"solver": SOLVERS.get(scheduler.get("_class_name", "")), "shift": shift}
    wan = WAN_TI2V if index.get("expand_timesteps") else WAN_EXPERTS if index.get("boundary_ratio") else WAN
    return wan | {name: value for name, value in said.items() if value is not None}


def folder_digest(path: Path) -> str:
    """The digest of a model folder: that over the files that it renders from (`covered_files`)."""
    return digest_of((file.relative_to(path).as_posix(), file_digest(file)) for file in covered_files(path))


def covered_files(path: Path) -> list[Path]:
    """Every file that a model renders from, in name order.

    Those are `rushes.json`, `model_index.json` and the JSON, safetensors and tokenizer files of the folders it names,
    and of a variant `adapters.json` with its folder. What else lies there (a model card, a rewriter, a captioner, an
    evaluation) changes no pixel, and so no recipe.
    """
    index = path / "model_index.json"
    named = [part for part in read_json(index) if not part.startswith("_")] if index.is_file() else ["."]
    adapters = path / f"{ADAPTERS}.json"
    named += [ADAPTERS] if adapters.is_file() else []
    files = {file for part in named for file in (path / part).rglob("*")} | {index, path / "rushes.json", adapters}
    return sorted(f for f in files if f.suffix in (".json", ".safetensors", ".txt", ".model") and f.is_file())


def digest_of(files: Iterable[tuple[str, str]]) -> str:
    """sha256 over (relative name, sha256 of content) of files, in name order."""
    whole = hashlib.sha256()
    for name, sha256 in sorted(files, key=lambda file: PurePosixPath(file[0])):
        whole.update(f"{name}\0{sha256}\n".encode())
    return whole.hexdigest()


def file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A low-rank adapter of a variant (`model.loading.lora`)."""

    file: str  # below the model's folder
    scale: float
    into: str = TRANSFORMER  # the transformer that it changes, where its tensors' names do not say which
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])  # what peft's adapter_config.json says of alpha


def read_adapters(path: Path) -> tuple[Adapter, ...]:
    """The adapters of a model folder, in the order in which they are merged; () of one that is no variant."""
    file = path / f"{ADAPTERS}.json"
    return tuple(Adapter(**said) for said in json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else ()


def kept_weights(path: Path) -> str | None:
    """How an engine keeps the weights of the transformers' blocks: "int8", or None for its own type."""
    return _read_if_there(path / "rushes.json").get("weights")


def dit_config(path: Path, part: str = TRANSFORMER) -> DiTConfig:
    return DiTConfig.from_diffusers(read_json(path / part / "config.json"))


def transformer_files(path: Path, part: str = TRANSFORMER) -> dict[str, Path]:
    """The safetensors file that holds each tensor of the transformer."""
    folder = path / part
    index = folder / f"{WEIGHTS}.index.json"
    if index.is_file():
        return {name: folder / file for name, file in read_json(index)["weight_map"].items()}
    from safetensors import safe_open

    with safe_open(str(folder / WEIGHTS), framework="numpy") as file:
        return dict.fromkeys(file.keys(), folder / WEIGHTS)
