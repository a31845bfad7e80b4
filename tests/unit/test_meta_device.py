"""A whole rank's work on torch's `meta` device: no tensor is left on the CPU where the network's are elsewhere.

This machine need not have a GPU to see that. `meta` tensors have no data, so what the rank asks of a device's values
(are they finite, how much did a step change, the frames) is answered by `OneDevice`, which also refuses every operation
that CUDA would refuse: on tensors of two devices, numbers and copies apart.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.engine import buffers, runner
from model.engine.clip import ClipSpec, RankInfo
from model.engine.loader import Networks
from model.engine.messages import (
    ClipBegan,
    ClipDone,
    ClipDropped,
    ClipFailed,
    ClipSaved,
    Exit,
    FromRank,
    RankSettings,
    RenderClip,
    StepsTaken,
    SuspendClip,
)
from model.engine.runner import Runner
from model.loading.card import SECOND, TRANSFORMER, card
from model.loading.load import load_text, load_vae
from model.network.diffusion import SOLVERS
from model.parallel.mesh import ALONE
from model.parallel.partition import load_partitioned
from model.parallel.self_test import self_test
from model.parallel.vae_rows import DividedDecoder
from tests.tiny import CLIP, tiny_lora, tiny_model, tiny_wan, variant

META = cast(Any, "meta")  # RankSettings knows cpu and cuda alone
aten = torch.ops.aten
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of two devices, and answers what is asked of values there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if any(tensor.is_meta for tensor in tensors):
            target = torch.device(kwargs.get("device") or "meta")
            if func is aten._to_copy.default and target.type == "cpu":
                return values(args[0], kwargs.get("dtype") or args[0].dtype)
            if func is aten._local_scalar_dense.default:
                return values(args[0], args[0].dtype).flatten()[-1].item()
            if func is aten.equal.default:
                return True
            if func is aten.copy_.default:
                return args[0]
            given = [args[0], *tree_leaves(args[2:])] if func in INDEXED else tensors  # CUDA takes a CPU's indices
            left = [each for each in given if isinstance(each, Tensor) and not each.is_meta and each.ndim]
            assert not left, f"{func} on tensors of two devices: {[tuple(each.shape) for each in left]} are on the CPU"
        return func(*args, **kwargs)


def values(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Some values on the CPU: truths, and numbers that rise from 0 to 1, so that a step cache sees no change."""
    if not dtype.is_floating_point:
        return torch.ones(tensor.shape, dtype=dtype)
    return (
        torch.linspace(0, 1, tensor.numel()).to(dtype).view(tensor.shape)
        if tensor.ndim
        else torch.ones((), dtype=dtype)
    )


class Engine:
    """The other end of the rank's wire: sends clips, keeps what comes back, and says exit when all have ended."""

    def __init__(self, specs: Iterable[ClipSpec]) -> None:
        self.messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.received: list[FromRank] = []
        self.open: set[int] = set()
        self.suspend: set[int] = set()
        for spec in specs:
            self.render(spec)

    def render(self, spec: ClipSpec, *, suspend: bool = False) -> None:
        number = len(self.open)
        self.open.add(number)
        self.suspend |= {number} if suspend else set()
        self.messages.put(RenderClip(job=number, clip=spec, buffer=0, fingerprint="f", checkpoint_every=(0, 0.0)))

    def send(self, message: FromRank) -> None:
        self.received.append(message)
        if isinstance(message, StepsTaken):
            for job, step, _ in message.steps:
                if job in self.suspend and step == 3:
                    self.messages.put(SuspendClip(job=job))
        if isinstance(message, ClipDone | ClipFailed | ClipDropped):
            self.open.discard(message.job)
            if not self.open:
                self.messages.put(Exit())

    def of(self, kind: type[Any]) -> list[Any]:
        return [message for message in self.received if isinstance(message, kind)]


def served(
    path: Path, specs: Iterable[ClipSpec], monkeypatch: pytest.MonkeyPatch, *, at_once: int = 2, suspend: bool = False
) -> Engine:
    """What a rank on a device of its own says of these clips."""
    facts = card(path.resolve())
    file = buffers.create(1)
    settings = RankSettings(
        path=str(path),
        partition="cfg1xsp1xtp1",
        device=META,
        dtype="bfloat16",
        threads=1,
        micro_batch=at_once,
        compile=False,
        frame_step=facts.frame_step,
        boundary=facts.boundary,
        buffers=tuple(file),
    )

    def load(settings: RankSettings, started: float) -> Networks:
        parts = [TRANSFORMER] if settings.boundary is None else [TRANSFORMER, SECOND]
        experts = [load_partitioned(path, ALONE, torch.bfloat16, "meta", part=part) for part in parts]
        for dit, part in zip(experts, parts, strict=True):
            self_test(dit, path, ALONE, torch.bfloat16, "meta", part, compiled=True)
        vae = load_vae(path, torch.float32, "meta")
        text = load_text(path, torch.bfloat16, "meta")
        info = RankInfo(rank=0, pid=1, parameter_bytes=1, self_test=0.0, device="meta", seconds={})
        return Networks(experts, ALONE, text, vae, DividedDecoder(vae, 0, 1), info)

    monkeypatch.setattr(runner, "load", load)
    engine = Engine([])
    for spec in specs:
        engine.render(spec, suspend=suspend)
    grad = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    try:
        with OneDevice():
            wire, inbox = cast(Any, engine), cast(Any, SimpleNamespace(messages=engine.messages))
            Runner(settings, wire, inbox, lambda problem, clips: None, time.perf_counter()).serve()
    finally:
        torch.set_grad_enabled(grad)
        buffers.close(file)
    assert [message.reason for message in engine.of(ClipFailed)] == []
    return engine


def clips(path: Path) -> tuple[list[ClipSpec], list[ClipSpec]]:
    """Clips of every way through a rank, two of them alike, so that they share a batch; and of what else there is."""
    facts = card(path.resolve())
    plain = replace(CLIP, width=facts.multiple, height=facts.multiple, frames=facts.frame_step + 1, steps=3)
    frame = np.zeros((1, plain.height, plain.width, 3), np.uint8)
    video = np.zeros((plain.frames, plain.height, plain.width, 3), np.uint8)
    longer = 2 * plain.frames - 1
    few = [
        plain,
        plain,
        replace(plain, solver="unipc", guidance=1.0, start=frame),
        replace(plain, solver="euler", start=video, frames=longer, window=plain.frames, overlap=1),
        replace(plain, start=video, strength=0.5),
        replace(plain, step_cache=0.5, steps=5),
    ]
    more = [
        replace(plain, frames=1),
        replace(plain, end=video, frames=longer),
        replace(plain, start=frame, end=frame),
        replace(plain, loop=True, frames=2 * facts.frame_step + 1),
        replace(plain, frames=longer, window=plain.frames, overlap=1),
        replace(plain, step_cache=0.5, guidance=1.0, start=frame, solver="unipc"),
        *(replace(plain, solver=solver, guidance=guidance) for solver in SOLVERS for guidance in (1.0, 3.0)),
    ]
    return few, more


@pytest.fixture(scope="module", params=["mini", "2.1", "2.2-ti2v", "2.2-a14b"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("meta") / request.param
    return tiny_model(folder) if request.param == "mini" else tiny_wan(folder, request.param)


def render_all(model: Path, asked: list[ClipSpec], monkeypatch: pytest.MonkeyPatch) -> Engine:
    engine = served(model, [replace(spec, clip_id=str(k)) for k, spec in enumerate(asked)], monkeypatch)
    assert len(engine.of(ClipDone)) == len(asked)
    return engine


def test_a_rank_leaves_nothing_on_the_cpu(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = render_all(model, clips(model)[0], monkeypatch)
    assert any(len(step.steps) == 2 for step in engine.of(StepsTaken)), "none shared a step"
    assert any(done.skipped_steps for done in engine.of(ClipDone)), "no step was answered by a step cache"


@pytest.mark.chaos
def test_no_mode_leaves_anything_on_the_cpu(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    render_all(model, clips(model)[1], monkeypatch)


def test_a_clip_that_goes_on_elsewhere_leaves_nothing_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_model(tmp_path / "tiny")
    asked = [replace(spec, steps=6) for spec in clips(path)[0] if spec.step_cache or spec.solver == "unipc"]
    saved = {each.job: each.data for each in served(path, asked, monkeypatch, suspend=True).of(ClipSaved)}
    assert saved.keys() == set(range(len(asked)))
    engine = render_all(path, [replace(asked[job], resume_state=data) for job, data in saved.items()], monkeypatch)
    assert {message.step for message in engine.of(ClipBegan)} == {3}


@pytest.mark.parametrize("weights", [None, "int8"])
def test_a_variant_leaves_nothing_on_the_cpu(
    weights: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_model(tmp_path / "tiny")
    adapter = tiny_lora(tmp_path / "lora.safetensors", base)
    path = variant(base, tmp_path / "variant", f"{adapter}:0.5", weights=weights)
    render_all(path, clips(path)[0][:2], monkeypatch)


def test_what_is_left_on_the_cpu_is_refused() -> None:
    """The test's own tool: what CUDA refuses it refuses, and what CUDA takes it takes."""
    there, here = torch.empty(2, 3, device="meta"), torch.ones(2, 3)
    with OneDevice():
        for work in (lambda: there + here, lambda: torch.cat((here, there)), lambda: there.mul_(here)):
            with pytest.raises(AssertionError, match="two devices"):
                work()
        assert (there + torch.tensor(2.0)).is_meta and there[torch.tensor([1])].is_meta
        assert here.to("meta").is_meta and not there.cpu().is_meta
