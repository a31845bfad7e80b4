"""Checks of a model folder without loading it: is it whole, is it a model that is computed here, does it fit.

Only JSON files and the headers of safetensors are read, a few megabytes of what may be a hundred gigabytes; a pickle is
never opened. What the headers say is compared with the network that `config.json` describes, built without memory:
that alone needs torch, which is imported then.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from model.config import DiTConfig, VAEConfig
from model.loading.card import ADAPTERS, SECOND, TRANSFORMER, WEIGHTS, covered_files, kept_weights, read_adapters
from model.loading.lora import ALPHA, B_BIAS, DIFF, DIFF_B, A, B, layers_of, targets_of

if TYPE_CHECKING:
    from torch import nn

INDEX, CONFIG, VAE, TEXT, TOKENIZER = "model_index.json", "config.json", "vae", "text_encoder", "tokenizer"
TEXT_WEIGHTS = "model.safetensors"  # as transformers calls them
KNOWN = {  # the classes that are computed here, by the folder they lie in
    TRANSFORMER: ("WanTransformer3DModel",),
    SECOND: ("WanTransformer3DModel",),
    VAE: ("AutoencoderKLWan", "CausalVideoVAE"),
    TEXT: ("UMT5EncoderModel",),
}
OURS = ("WanTransformer3DModel", "CausalVideoVAE")  # classes that are loaded strictly: no tensor may be left over
KEPT = (None, "int8")  # what `weights` in rushes.json may say
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
MAX_HEADER = 2_000_000  # bytes: some 15,000 tensors, where Wan 14B has 1,100; safetensors itself would take 100 MB
BITS = {  # of an element of each type that safetensors knows
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
FLOATS = ("F16", "BF16", "F32", "F64")  # types that weights can be taken from without a scale that lies elsewhere
AGAIN = "fetch the folder again"


class BadCheckpoint(ValueError):
    """The folder is incomplete, damaged, or holds a model that is not computed here. The message says what to do."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as a safetensors header describes it."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One folder of a model that holds weights."""

    folder: Path
    kind: str  # the class that computes it
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    tensors: Mapping[str, Stored]

    @property
    def parameters(self) -> int:
        return sum(tensor.parameters for tensor in self.tensors.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A model folder in which all is well."""

    path: Path
    parts: Mapping[str, Part]
    boundary: float | None  # the time below which the second expert takes over, if there is one

    @property
    def parameters(self) -> int:
        """Of the transformer, or of both experts together."""
        return sum(part.parameters for name, part in self.parts.items() if name in (TRANSFORMER, SECOND))

    @property
    def bytes(self) -> int:
        """Of all weight files."""
        return sum(file.stat().st_size for part in self.parts.values() for file in part.files)


def check_folder(path: Path) -> Checked:
    """Looks at everything that rendering will read of a folder in the diffusers layout. Raises BadCheckpoint."""
    index = _object(path / INDEX)
    named = _folders(path, index)
    boundary = _boundary(path, index)
    parts = {name: _part(path / name, named[name]) for name in KNOWN if name in named}
    _fit_together(path, parts)
    for part in parts.values():
        _compare(part)
    _check_variant(path, parts)
    for file in covered_files(path):
        if not file.stat().st_size:
            raise BadCheckpoint(f"{file} is empty: fetch it again")
    return Checked(path=path, parts=parts, boundary=boundary)


def _folders(path: Path, index: Mapping[str, Any]) -> dict[str, str]:
    """The folders that model_index.json names, each with its class; what it sets to null it does not name."""
    entries = {name: value for name, value in index.items() if isinstance(value, list) and not name.startswith("_")}
    named = {name: str(value[-1]) for name, value in entries.items() if any(value)}
    for name in named:
        if PurePosixPath(name).name != name or not (path / name).is_dir():
            raise BadCheckpoint(f"{path / INDEX} names the folder {name}, which is not there: {AGAIN}")
    for name in (TRANSFORMER, VAE, TEXT, TOKENIZER):
        if name not in named:
            raise BadCheckpoint(f"{path / INDEX} names no {name}: name a folder of a whole text-to-video pipeline")
    if not any((path / TOKENIZER / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise BadCheckpoint(f"{path / TOKENIZER} has neither tokenizer.json nor spiece.model: {AGAIN}")
    if SECOND not in named and (path / SECOND).is_dir():
        raise BadCheckpoint(f"{path / SECOND} is there, but {INDEX} does not name it: name it there, or remove it")
    return named


def _boundary(path: Path, index: Mapping[str, Any]) -> float | None:
    """Where the second expert takes over: an index has both that time and that expert, or neither."""
    boundary, second = index.get("boundary_ratio"), (path / SECOND).is_dir()
    if second and boundary is None:
        raise BadCheckpoint(
            f"{path / INDEX} names {SECOND} and no boundary_ratio: set it to the time at which {SECOND} takes over "
            "(0.875 in Wan 2.2 T2V-A14B)"
        )
    if boundary is None:
        return None
    if not second:
        raise BadCheckpoint(f"{path / INDEX} has boundary_ratio={boundary} and no {SECOND}: {AGAIN}, or set it to null")
    if not isinstance(boundary, int | float) or not 0 < boundary < 1:
        raise BadCheckpoint(f"{path / INDEX}: boundary_ratio={boundary!r} must be a number between 0 and 1")
    return float(boundary)


def _part(folder: Path, named: str) -> Part:
    """A folder's weights by their headers, as what `config.json` calls them, or else `named`, as the index does."""
    config, known = _object(folder / CONFIG), KNOWN[folder.name]
    kind = config.get("_class_name") or (config.get("architectures") or [named])[0]
    if kind not in known:
        raise BadCheckpoint(
            f"{folder / CONFIG} calls for {kind}, which is not computed here: "
            f"{folder.name} must be {' or '.join(known)}"
        )
    files, tensors = weights_in(folder, TEXT_WEIGHTS if folder.name == TEXT else WEIGHTS)
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise BadCheckpoint(
                f"{folder}: {name} is stored as {tensor.dtype}, not as one of {', '.join(FLOATS)}: "
                "take weights that are not quantised"
            )
    return Part(folder=folder, kind=kind, config=config, files=files, tensors=tensors)


def _fit_together(path: Path, parts: Mapping[str, Part]) -> None:
    """Parts of different models lie in one folder more easily than one thinks, and image-to-video looks like text."""
    transformers = [_dit_config(parts[name]) for name in (TRANSFORMER, SECOND) if name in parts]
    dit, vae, text = transformers[0], parts[VAE].config, parts[TEXT].config
    if transformers[-1] != dit:
        raise BadCheckpoint(f"{path}: {TRANSFORMER} and {SECOND} differ in their {CONFIG}: both must be of one shape")
    latents = vae.get("z_dim", 16) if parts[VAE].kind == "AutoencoderKLWan" else vae.get("latent_channels", 16)
    if not dit.in_channels == dit.out_channels == latents:
        raise BadCheckpoint(
            f"{path}: the transformer takes {dit.in_channels} channels and gives {dit.out_channels}, the autoencoder "
            f"has {latents}: all three must be the same, as in a text-to-video model"
        )
    if text.get("d_model") != dit.text_dim:
        raise BadCheckpoint(
            f"{path}: the text encoder gives {text.get('d_model')} channels, the transformer takes {dit.text_dim}: "
            "take both from one release"
        )


def weights_in(folder: Path, stem: str) -> tuple[tuple[Path, ...], dict[str, Stored]]:
    """The safetensors files of a folder, and all their tensors."""
    index, single = folder / f"{stem}.index.json", folder / stem
    if not index.is_file():
        if not single.is_file():
            raise BadCheckpoint(_no_weights(folder, stem))
        return (single,), read_header(single)
    places = _object(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise BadCheckpoint(f"{index} has no weight_map from tensors to files: {AGAIN}")
    headers: dict[str, dict[str, Stored]] = {}
    for name in sorted(set(places.values())):
        if PurePosixPath(name).name != name or not name.endswith(".safetensors"):
            raise BadCheckpoint(f"{index} names {name!r}, which is no safetensors file of that folder: {AGAIN}")
        if not (folder / name).is_file():
            raise BadCheckpoint(f"{folder / name} is missing, {index.name} names it: fetch that file")
        headers[name] = read_header(folder / name)
    lacking = next((tensor for tensor, file in places.items() if tensor not in headers[file]), None)
    if lacking is not None:
        raise BadCheckpoint(f"{folder / places[lacking]} has no {lacking}, which {index.name} says it has: {AGAIN}")
    return tuple(folder / name for name in headers), {k: v for header in headers.values() for k, v in header.items()}


def _no_weights(folder: Path, stem: str) -> str:
    there = sorted(file.name for file in folder.iterdir())
    pickles = [name for name in there if name.endswith(PICKLES)]
    others = [name for name in there if name.endswith(".safetensors")]
    if others:
        return f"{folder} has {others[0]}, but neither {stem} nor {stem}.index.json: {AGAIN}"
    if pickles:
        return (
            f"{folder} has its weights as a pickle only ({pickles[0]}), which is never opened here, since it may run "
            f"any program: convert it to safetensors (save_pretrained(..., safe_serialization=True)) as {stem}"
        )
    return f"{folder} has no weights: neither {stem} nor {stem}.index.json is there: {AGAIN}"


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, by its header alone. Raises BadCheckpoint for a file that is not whole."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8:
            raise BadCheckpoint(f"{file} has {size} bytes, the length of its header alone takes 8: fetch it again")
        if length > MAX_HEADER:
            raise BadCheckpoint(
                f"{file} begins with {length}, which is no length of a header (at most {MAX_HEADER}): fetch it again"
            )
        if size < 8 + length:
            raise BadCheckpoint(f"{file} has {size} bytes, its header alone ends at {8 + length}: fetch it again")
        try:
            header = json.loads(stream.read(length), object_pairs_hook=_once)
            spans = {name: _tensor(said) for name, said in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadCheckpoint(f"{file} has a header that cannot be read ({error}): fetch it again") from None
    end = 0
    for name, (_, begin, after) in sorted(spans.items(), key=lambda each: each[1][1:]):
        if begin != end:
            raise BadCheckpoint(f"{file}: {name} begins at byte {begin}, where {end} is due: fetch it again")
        end = after
    if size != 8 + length + end:
        raise BadCheckpoint(f"{file} has {size} bytes, its header says {8 + length + end}: fetch it again")
    return {name: tensor for name, (tensor, _, _) in spans.items()}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object in which no name is given twice: readers that take another of the two would see another file."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{twice} is there twice")
    return found


def _tensor(said: Mapping[str, Any]) -> tuple[Stored, int, int]:
    """A tensor, and from where to where its bytes go. Raises KeyError, TypeError or ValueError for what is none."""
    stored, (begin, end) = Stored(said["dtype"], tuple(said["shape"])), said["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*stored.shape, begin, end)):  # true is an int
        raise ValueError(f"shape {stored.shape} and offsets {begin}, {end} must be whole numbers")
    if stored.parameters * BITS[stored.dtype] != 8 * (end - begin):
        raise ValueError(f"{stored.shape} of {stored.dtype} do not take {end - begin} bytes")
    return stored, begin, end


def _compare(part: Part) -> None:
    """The tensors are those that `config.json` asks for. What a class of others has no place for it ignores; ours do
    not."""
    wanted, there = _shapes(part), {name: tensor.shape for name, tensor in part.tensors.items()}
    cure = f"{AGAIN}, with the {CONFIG} that belongs to it"
    if missing := [name for name in wanted if name not in there]:
        raise BadCheckpoint(f"{part.folder}: the weights lack {_first(missing)}, which {CONFIG} asks for: {cure}")
    if part.kind in OURS and (spare := [name for name in there if name not in wanted]):
        raise BadCheckpoint(f"{part.folder}: the weights hold {_first(spare)}, which {CONFIG} has no place for: {cure}")
    for name, shape in wanted.items():
        if there[name] != shape:
            raise BadCheckpoint(f"{part.folder}: {name} is {there[name]}, {CONFIG} asks for {shape}: {cure}")


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _shapes(part: Part) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the class reads. Raises BadCheckpoint for a config that says no shapes."""
    if part.kind == "WanTransformer3DModel":
        return dit_shapes(_dit_config(part))
    try:
        if part.kind == "UMT5EncoderModel":
            return _umt5_shapes(part)
        if part.kind == "CausalVideoVAE":
            from model.network.vae import VAE

            return _on_meta(lambda: VAE(VAEConfig.from_json(dict(part.config))))
        from diffusers import AutoencoderKLWan

        return _on_meta(lambda: AutoencoderKLWan.from_config(dict(part.config)))
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise _unreadable(part, error) from None


def _dit_config(part: Part) -> DiTConfig:
    try:
        config = DiTConfig.from_diffusers(dict(part.config))
        sizes = (config.layers, config.heads, config.ffn_dim, config.text_dim, config.in_channels, *config.patch)
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError("sizes must be whole numbers above 0")
        return config
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise _unreadable(part, error) from None


def _unreadable(part: Part, error: Exception) -> BadCheckpoint:
    why = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be used: {error}"
    return BadCheckpoint(f"{part.folder / CONFIG} {why}: take the one that belongs to the weights")


@lru_cache(maxsize=8)
def dit_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    from model.network.dit import DiT

    return _on_meta(lambda: DiT(config))


def _on_meta(build: Any) -> dict[str, tuple[int, ...]]:
    import torch

    with torch.device("meta"):
        network: nn.Module = build()
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _umt5_shapes(part: Part) -> dict[str, tuple[int, ...]]:
    """transformers fills what it does not find with noise and says so in a log, so this must know what it looks for."""
    config = part.config
    width, inner, hidden = config["d_model"], config["num_heads"] * config["d_kv"], config["d_ff"]
    embedding = next((name for name in EMBEDDINGS if name in part.tensors), EMBEDDINGS[0])
    shapes: dict[str, tuple[int, ...]] = {embedding: (config["vocab_size"], width)}
    for k in range(config["num_layers"]):
        attention, feed = f"encoder.block.{k}.layer.0", f"encoder.block.{k}.layer.1"
        shapes |= {f"{attention}.SelfAttention.{name}.weight": (inner, width) for name in "qkv"}
        shapes[f"{attention}.SelfAttention.o.weight"] = (width, inner)
        buckets = config.get("relative_attention_num_buckets", 32)
        shapes[f"{attention}.SelfAttention.relative_attention_bias.weight"] = (buckets, config["num_heads"])
        gates = ("wi_0", "wi_1") if config.get("feed_forward_proj", "gated-gelu").startswith("gated") else ("wi",)
        shapes |= {f"{feed}.DenseReluDense.{name}.weight": (hidden, width) for name in gates}
        shapes[f"{feed}.DenseReluDense.wo.weight"] = (width, hidden)
        shapes |= {f"{layer}.layer_norm.weight": (width,) for layer in (attention, feed)}
    return shapes | {"encoder.final_layer_norm.weight": (width,)}


EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")  # one table under two names: either will do


def _check_variant(path: Path, parts: Mapping[str, Part]) -> None:
    """Checks a variant of another model: its adapters fit its layers, its weights are in a known form."""
    if (kept := kept_weights(path)) not in KEPT:
        raise BadCheckpoint(f"{path / 'rushes.json'}: weights={kept!r} must be int8, or not be there")
    try:
        adapters = read_adapters(path)
        faulty = [each for each in adapters if not isinstance(each.scale, int | float) or not math.isfinite(each.scale)]
    except (ValueError, TypeError) as error:
        raise BadCheckpoint(f"{path / ADAPTERS}.json cannot be read ({error}): add the adapters again") from None
    if faulty:
        raise BadCheckpoint(f"{path / ADAPTERS}.json: the scale {faulty[0].scale!r} must be a number")
    for adapter in adapters:
        if adapter.into not in parts:
            raise BadCheckpoint(f"{path / ADAPTERS}.json: there is no {adapter.into} for {adapter.file} to change")
        check_adapter(path / adapter.file, adapter.into, {name: part.tensors for name, part in parts.items()})


def check_adapter(file: Path, into: str, parts: Mapping[str, Mapping[str, Stored]]) -> None:
    """Every layer that an adapter changes is there, and both its factors fit it. Raises BadCheckpoint.

    Layers of no named transformer are those of `into`; `parts` are the tensors of the model, by folder.
    """
    if file.suffix in PICKLES:
        raise BadCheckpoint(
            f"{file} is a pickle, which is never opened here, since it may run any program: convert it to safetensors "
            "(diffusers' save_lora_weights, or peft's save_pretrained, with safe_serialization=True)"
        )
    if not file.is_file():
        raise BadCheckpoint(f"{file} is missing: name the safetensors file of an adapter")
    tensors = read_header(file)
    try:
        layers = layers_of(tensors, into)
    except ValueError as error:
        raise BadCheckpoint(f"{file}: {error}") from None
    if not layers:
        raise BadCheckpoint(f"{file} holds no tensors: there is nothing to add")
    for (part, layer), names in layers.items():
        _check_change(f"{file}: {part}.{layer}", layer, {k: tensors[n] for k, n in names.items()}, parts.get(part, {}))
        for name in names.values():
            if tensors[name].dtype not in FLOATS and not name.endswith(ALPHA):
                raise BadCheckpoint(f"{file}: {name} is {tensors[name].dtype}, not one of {', '.join(FLOATS)}")


def _check_change(place: str, layer: str, change: Mapping[str, Stored], tensors: Mapping[str, Stored]) -> None:
    """Check that the tensors of a file for one layer fit those of the model. Raises BadCheckpoint."""
    weight, bias = targets_of(layer)
    if change.keys() & {A, B, ALPHA, B_BIAS}:
        whole = tensors.get(weight)
        if whole is None or len(whole.shape) < 2 or weight == layer:
            raise BadCheckpoint(f"{place} is no linear layer of this model: take an adapter that was trained for it")
        if lacking := [name for name in (A, B) if name not in change]:
            raise BadCheckpoint(f"{place} has no {lacking[0]}, so that nothing can be added: fetch the file again")
        a, b, inner = change[A].shape, change[B].shape, whole.shape[1:]
        ones = (1,) * (len(inner) - 1)
        if len(a) < 2 or len(b) < 2 or not a[0] or a != (a[0], *inner) or b != (whole.shape[0], a[0], *ones):
            raise BadCheckpoint(
                f"{place} is {whole.shape}, which {A} {a} and {B} {b} do not fit: they must be "
                f"(r, {', '.join(map(str, inner))}) and ({whole.shape[0]}, {', '.join(['r', *map(str, ones)])}). "
                "Take an adapter that was trained for this model"
            )
        if ALPHA in change and change[ALPHA].parameters != 1:
            raise BadCheckpoint(f"{place}: {ALPHA} is {change[ALPHA].shape}, it must be one number")
    for kind, target in ((DIFF, weight), (DIFF_B, bias), (B_BIAS, bias)):
        there = tensors.get(target)
        if kind in change and (there is None or there.shape != change[kind].shape):
            said = "not in this model" if there is None else f"{there.shape} in this model"
            raise BadCheckpoint(
                f"{place}: {kind} {change[kind].shape} changes {target}, which is {said}: "
                "take an adapter that was trained for it"
            )


def _object(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises BadCheckpoint."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise BadCheckpoint(f"{file} is missing: name a folder in the diffusers layout, or {AGAIN}") from None
    except ValueError as error:
        raise BadCheckpoint(f"{file} is not JSON ({error}): {AGAIN}") from None
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{file} must hold a JSON object: {AGAIN}")
    return value
