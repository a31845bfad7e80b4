"""Variants of a model: its files with adapters beside them, or with weights that engines keep in fewer bits.

A variant is a model folder like any other, whose `adapters.json` and `rushes.json` say what it is. So its digest, and
with it the recipe of every clip, covers adapters, scales and bits; and how it was asked for (names of files, order of
options, in one go or a variant of a variant) makes no difference to it. Importing this does not load torch.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from infra.files import is_address
from model.loading.card import ADAPTERS, SECOND, TRANSFORMER, Adapter, file_digest, read_adapters, read_json
from model.loading.inspect import BadCheckpoint, check_adapter, check_folder, read_header
from model.loading.lora import SAID

LISTED, OWN = f"{ADAPTERS}.json", "rushes.json"
PEFT, PEFT_CONFIG = "base_model.model.", "adapter_config.json"


class BadVariant(ValueError):
    """The variant cannot be made as it is asked for. The message says what to change."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Lora:
    """An adapter to merge, as the command line names it."""

    file: Path
    scale: float = 1.0
    into: str = TRANSFORMER  # the transformer to change, where the file does not name it

    @classmethod
    def parse(cls, text: str) -> Lora:
        """Read FILE, FILE:SCALE or transformer_2=FILE:SCALE. Raises BadVariant."""
        into = SECOND if text.startswith(f"{SECOND}=") else TRANSFORMER
        name = text.removeprefix(f"{SECOND}=")
        if is_address(name):
            raise BadVariant(f"--lora {text}: must be a safetensors file of this machine: fetch it first")
        file, colon, said = name.rpartition(":")
        if not colon or Path(name).is_file():
            return cls(Path(name), into=into)
        try:
            scale = float(said)
        except ValueError:
            scale = math.nan
        if not math.isfinite(scale):
            raise BadVariant(f"--lora {text}: the scale {said!r} must be a number, as in {file}:0.8")
        return cls(Path(file), scale, into)


def write_variant(
    base: Path, files: Iterable[Path], folder: Path, loras: Sequence[Lora], weights: str | None = None
) -> None:
    """Make the folder of a variant: links to `files` of the base, copies of adapters, and the two files that say so.

    Raises BadCheckpoint for an adapter that does not fit, and BadVariant for one that is merged already.
    """
    _check(base, loras)
    new = [_adapter(lora) for lora in loras]
    adapters = sorted((*read_adapters(base), *new), key=_place)
    for one, other in pairwise(adapters):
        if _place(one) == _place(other):
            twice = next(lora.file for lora, adapter in zip(loras, new, strict=True) if _place(adapter) == _place(one))
            raise BadVariant(f"--lora {twice}: this adapter would be merged into {one.into} twice: give it one scale")
    written = {LISTED} if weights is None else {LISTED, OWN}
    for file in files:
        link = folder / file.relative_to(base)
        if link.relative_to(folder).as_posix() not in written:
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
    for lora, adapter in zip(loras, new, strict=True):
        (folder / ADAPTERS).mkdir(exist_ok=True)
        if not (folder / adapter.file).exists():
            shutil.copyfile(lora.file, folder / adapter.file)
    if adapters:
        _write(folder / LISTED, [asdict(each) for each in adapters])
    if weights is not None:
        own = read_json(base / OWN) if (base / OWN).is_file() else {}
        _write(folder / OWN, own | {"weights": weights})


def _check(base: Path, loras: Sequence[Lora]) -> None:
    parts = {name: part.tensors for name, part in check_folder(base).parts.items()}
    for lora in loras:
        if lora.into not in parts:
            raise BadVariant(f"--lora {lora.into}={lora.file}: the model has no {lora.into}, leave that out")
        check_adapter(lora.file, lora.into, parts)


def _adapter(lora: Lora) -> Adapter:
    """The adapter's entry in the variant's list. Its file is named by its digest, not as people call it."""
    name = f"{ADAPTERS}/{file_digest(lora.file)[:16]}.safetensors"
    return Adapter(file=name, scale=lora.scale, into=lora.into, config=_said_beside(lora.file))


def _said_beside(file: Path) -> dict[str, Any]:
    """Read the settings that decide the strength of an adapter by peft from the file beside it."""
    if not any(name.startswith(PEFT) for name in read_header(file)):
        return {}
    beside = file.with_name(PEFT_CONFIG)
    if not beside.is_file():
        raise BadCheckpoint(
            f"{beside} is missing, which peft writes beside {file.name} and which says how strong it is"
        )
    said = read_json(beside)
    return {name: said[name] for name in SAID if said.get(name)}


def _place(adapter: Adapter) -> tuple[str, str]:
    """Sort key of an adapter. Sums of floats depend on their order, so adapters are merged by digest."""
    return adapter.file, adapter.into


def _write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
