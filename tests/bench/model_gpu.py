"""One denoising step of Wan 2.1-1.3B's dimensions, random weights: ours and diffusers', eager and compiled.

Needs torch alone; where diffusers cannot be imported its rows are left out. Without a GPU the same code runs on the
CPU with small dimensions, and says so: what it prints there is no measurement of anything but itself.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from model.config import ClipShape, DiTConfig
from model.network import cpu
from model.network.compiled import NoCompiler, check_compiler, compile_blocks
from model.network.dit import DiT
from model.network.vae import WanVAE, to_pixels

TERA = 1e12
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
GROUPS = (  # the first whose word is in an operation's name
    ("attention", ("attention", "flash", "fmha")),
    ("matmul", ("mm", "linear", "conv", "gemm")),
    ("copies", ("copy", "cat", "memcpy", "memset", "fill")),
    ("norm and elementwise", ("",)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is measured where."""

    device: str
    dtype: torch.dtype
    config: DiTConfig
    text_tokens: int
    shapes: tuple[ClipShape, ...]
    matrix: int  # side of the matrices whose product gives the peak
    rounds: int
    steps: int  # of a whole clip, whose stages are added up
    text: dict[str, int]  # of transformers' UMT5Config
    vae: dict[str, int]  # of diffusers' AutoencoderKLWan


GPU = Setting(
    device="cuda",
    dtype=torch.bfloat16,
    config=DiTConfig(layers=30, heads=12, head_dim=128, ffn_dim=8960, text_dim=4096),
    text_tokens=512,
    shapes=(ClipShape(832, 480, 81), ClipShape(1280, 720, 81)),
    matrix=8192,
    rounds=5,
    steps=50,
    text={"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
    vae={},
)
CPU = Setting(
    device="cpu",
    dtype=torch.float32,
    config=DiTConfig(layers=2, heads=2, head_dim=32, ffn_dim=128, text_dim=32),
    text_tokens=16,
    shapes=(ClipShape(64, 64, 9),),
    matrix=256,
    rounds=2,
    steps=4,
    text={"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2},
    vae={"base_dim": 8},
)


def gpu(compiled: bool = True) -> Iterator[str]:
    """A denoising step of Wan 1.3B's dimensions: ours and diffusers', eager and compiled; where its time goes."""
    setting = GPU if torch.cuda.is_available() else CPU
    name = torch.cuda.get_device_name() if setting.device == "cuda" else "CPU (no GPU here: small dimensions)"
    peak = matmul_peak(setting)
    yield f"{name}, torch {torch.__version__}, {setting.dtype}: matrix products reach {peak / TERA:.3g} TFLOP/s."
    if not importlib.util.find_spec("diffusers"):
        yield "diffusers cannot be imported: its rows are missing."
    try:
        check_compiler(setting.device)
    except NoCompiler as error:
        compiled = False
        yield f"Compiled rows are missing: {error}."
    yield ""
    yield "| clip | network | s a step | TFLOP a step | of the matrix peak | difference from ours |"
    yield "|---|---|---|---|---|---|"
    step: dict[ClipShape, float] = {}
    for shape in setting.shapes:
        yield from _steps(shape, setting, peak, compiled, step)
    yield ""
    yield f"| clip of {setting.steps} steps | stage | s | share |"
    yield "|---|---|---|---|"
    for shape in setting.shapes:
        yield from _stages(shape, setting, step[shape])
    yield ""
    yield "| group | operation | calls | ms | share |"
    yield "|---|---|---|---|---|"
    yield from _trace(setting)


def counted(network: Callable[[], Any]) -> int:
    """Floating point operations as torch counts them while it runs: matrix products, convolutions and attention."""
    with FlopCounterMode(display=False, custom_mapping=UNKNOWN) as counter:
        network()
    return counter.get_total_flops()


def _attended(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any) -> int:
    """Two matrix products a head, of shapes [B, H, N, K] and [B, H, M, K]."""
    batch, heads, tokens, channels = q
    return 2 * batch * heads * tokens * k[2] * (channels + v[3])


def _multiplied(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """One matrix product, of shapes [..., in] and [out, in]."""
    return 2 * math.prod(x) * weight[0]


UNKNOWN = {CPU_ATTENTION: _attended, cpu.PRODUCT: _multiplied}  # to torch's counter


def matmul_peak(setting: Setting) -> float:
    """Operations a second of a large matrix product: what this machine reaches, not what its maker states."""
    a, b = torch.randn(2, setting.matrix, setting.matrix, device=setting.device, dtype=setting.dtype)
    (seconds,) = by_turns([lambda: a @ b], setting)
    return 2 * setting.matrix**3 / seconds


def by_turns(calls: Sequence[Callable[[], Any]], setting: Setting) -> list[float]:
    """Median seconds of each, after two runs to warm up; by turns, so that a busy moment hits all of them."""
    taken: list[list[float]] = [[] for _ in calls]
    for number in range(2 + setting.rounds):
        for call, seconds in zip(calls, taken, strict=True):
            _wait(setting)
            started = time.perf_counter()
            call()
            _wait(setting)
            if number >= 2:
                seconds.append(time.perf_counter() - started)
    return [median(seconds) for seconds in taken]


def network_of(setting: Setting) -> DiT:
    """Random, its head too: untrained it would say 0."""
    torch.manual_seed(0)
    with torch.device(setting.device):
        dit = DiT(setting.config)
        dit.init_weights()
        for parameter in dit.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    return dit.to(setting.dtype).eval().requires_grad_(False)


def inputs_of(shape: ClipShape, setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    """Both halves of guidance: latents [2, C, T, H, W], times [2], text [2, L, Dt]."""
    random, config = torch.Generator().manual_seed(0), setting.config
    size = config.in_channels, (shape.frames - 1) // 4 + 1, shape.height // 8, shape.width // 8
    latents = torch.randn(2, *size, generator=random)
    text = torch.randn(2, setting.text_tokens, config.text_dim, generator=random)
    place: dict[str, Any] = {"device": setting.device, "dtype": setting.dtype}
    return latents.to(**place), torch.full((2,), 0.7, device=setting.device), text.to(**place)


@torch.inference_mode()
def _steps(
    shape: ClipShape, setting: Setting, peak: float, compiled: bool, quickest: dict[ClipShape, float]
) -> Iterator[str]:
    """A row of each network. The seconds of the quickest of ours go into `quickest`."""
    x, times, text = inputs_of(shape, setting)
    calls: dict[str, Callable[[], Tensor]] = {}
    ours = network_of(setting)
    calls["ours"] = lambda: ours(x, times, text)
    if compiled:
        quick, replayed = network_of(setting), network_of(setting)
        compile_blocks(quick)
        compile_blocks(replayed, "reduce-overhead")
        calls["ours, compiled"] = lambda: quick(x, times, text)
        calls["ours, reduce-overhead"] = lambda: replayed(x, times, text)
    if importlib.util.find_spec("diffusers"):
        theirs = _theirs(ours, setting)
        calls["diffusers"] = lambda: theirs(x, 1000 * times, text, return_dict=False)[0]
        if compiled:
            fast = _theirs(ours, setting)
            for block in fast.blocks:
                block.compile()
            calls["diffusers, compiled"] = lambda: fast(x, 1000 * times, text, return_dict=False)[0]
    flops, wanted = counted(calls["ours"]), calls["ours"]().float()
    errors = [(call().float() - wanted).abs().max().item() for call in calls.values()]
    taken = by_turns(list(calls.values()), setting)
    quickest[shape] = min(seconds for name, seconds in zip(calls, taken, strict=True) if name.startswith("ours"))
    for name, seconds, error in zip(calls, taken, errors, strict=True):
        share = flops / seconds / peak
        yield f"| {shape} | {name} | {seconds:.4f} | {flops / TERA:.4g} | {share:.0%} | {error:.0e} |"


@torch.inference_mode()
def _stages(shape: ClipShape, setting: Setting, step: float) -> Iterator[str]:
    """Where a whole clip's seconds go: its prompt, its steps at `step` seconds each, its pixels. One clip by itself."""
    seconds = {"text": _text_seconds(setting), f"denoise, {setting.steps} steps": setting.steps * step}
    if importlib.util.find_spec("diffusers"):
        seconds["decode"] = _decode_seconds(shape, setting)
    total = sum(seconds.values())
    for stage, spent in seconds.items():
        yield f"| {shape} | {stage} | {spent:.4f} | {spent / total:.0%} |"


def _text_seconds(setting: Setting) -> float:
    """The encoder of Wan's size for one prompt and the empty one."""
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.device(setting.device):
        given: dict[str, Any] = dict(setting.text)
        encoder: Any = UMT5EncoderModel(UMT5Config(**given))
        ids = torch.ones(2, setting.text_tokens, dtype=torch.long)
    encoder.to(setting.dtype).eval()
    (seconds,) = by_turns([lambda: encoder(ids, torch.ones_like(ids)).last_hidden_state], setting)
    return seconds


def _decode_seconds(shape: ClipShape, setting: Setting) -> float:
    """Wan's autoencoder, from latents to pixels in the memory of this process."""
    from diffusers import AutoencoderKLWan

    with torch.device(setting.device):
        given: dict[str, Any] = dict(setting.vae)
        inner: Any = AutoencoderKLWan(**given)
        vae = WanVAE(inner.to(setting.dtype).eval())
        latents = torch.randn(1, *vae.latent_shape(shape))
    (seconds,) = by_turns([lambda: to_pixels(vae.decode(latents))], setting)
    return seconds


def _theirs(ours: DiT, setting: Setting) -> Any:
    """diffusers' network with our weights."""
    from diffusers import WanTransformer3DModel

    config = {k: v for k, v in setting.config.to_diffusers().items() if not k.startswith("_")}
    with torch.device(setting.device):
        theirs: Any = WanTransformer3DModel(**config)
    theirs.load_state_dict(ours.state_dict())
    return theirs.to(setting.dtype).eval().requires_grad_(False)


@torch.inference_mode()
def _trace(setting: Setting, steps: int = 2, shown: int = 12) -> Iterator[str]:
    """Two steps of ours, eager: the longest operations, and the sum of each group."""
    dit, given = network_of(setting), inputs_of(setting.shapes[0], setting)
    dit(*given)
    on_gpu = setting.device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as traced:
        for _ in range(steps):
            dit(*given)
        _wait(setting)
    rows: list[tuple[float, int, str]] = []
    for each in traced.key_averages():
        micro = each.self_device_time_total if on_gpu else each.self_cpu_time_total
        rows.append((micro / 1000, each.count, each.key))
    rows.sort(reverse=True)
    total = sum(ms for ms, _, _ in rows)
    for group, _ in GROUPS:
        mine = [(ms, count) for ms, count, name in rows if group_of(name) == group]
        ms, count = sum(ms for ms, _ in mine), sum(count for _, count in mine)
        yield f"| {group} | all | {count} | {ms:.2f} | {ms / total:.0%} |"
    for ms, count, name in rows[:shown]:
        yield f"| {group_of(name)} | {name[:60].replace('|', '/')} | {count} | {ms:.2f} | {ms / total:.0%} |"


def group_of(operation: str) -> str:
    """What an operation is, by its name."""
    return next(group for group, words in GROUPS if any(word in operation.lower() for word in words))


def _wait(setting: Setting) -> None:
    if setting.device == "cuda":
        torch.cuda.synchronize()
