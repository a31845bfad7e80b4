"""A divided transformer computes what the whole one does, holds its share of it, and refuses what does not divide."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import Partition
from model.loading.load import load_dit
from model.parallel.mesh import ALONE, Axis, Groups, groups_of
from model.parallel.partition import WAN_PLAN, Plan, load_partitioned, parameter_bytes, place
from tests.distributed.partition_worker import INPUTS, MORE, PARTITIONS, inputs
from tests.tiny import tiny_lora, tiny_model, variant

WORKER = Path(__file__).with_name("partition_worker.py")
ROOT = Path(__file__).parents[2]


Found = dict[str, dict[str, Any]]  # what a rank found, by partition


def run_ranks(world: int, partitions: Sequence[str], *models: tuple[Path, ...]) -> list[list[Found]]:
    """What every rank found of each model; all in one start, which takes longer than a check."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=world)
    os.set_inheritable(listener.fileno(), True)
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    port, listening = listener.getsockname()[1], listener.fileno()
    arguments = [" ".join(partitions), *(path for folders in models for path in folders)]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), *map(str, (rank, world, port, listening, *arguments))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **own},
            pass_fds=[listening] if rank == 0 else [],
        )
        for rank in range(world)
    ]
    listener.close()
    try:
        outputs = [rank.communicate(timeout=600) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(errors for _, errors in outputs)
    everyone = json.loads(outputs[0][0].splitlines()[-1])
    return [list(of_model) for of_model in zip(*everyone, strict=True)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """One model as it is, in a shorter type, and one with more layers."""
    folder = tmp_path_factory.mktemp("models")
    short, deep = tiny_model(folder / "short", dtype=torch.bfloat16), tiny_model(folder / "deep", layers=3)
    return tiny_model(folder / "whole"), short, deep


@pytest.fixture(scope="module")
def variants(models: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Adapters change layers of every kind, and all linear layers are kept in 8 bits."""
    folder = tmp_path_factory.mktemp("variants")
    lora = tiny_lora(folder / "lora.safetensors", models[0], alpha=5.0)
    return tuple(variant(each, folder / each.name, f"{lora}:0.8", weights="int8") for each in models)


@pytest.fixture(scope="module")
def two(models: tuple[Path, ...], variants: tuple[Path, ...]) -> list[list[Found]]:
    """What two ranks found of the models, and of the variants."""
    return run_ranks(2, PARTITIONS[2], models, variants)


@pytest.fixture(scope="module", params=[2, 4, *(pytest.param(ranks, marks=pytest.mark.chaos) for ranks in (3, "more"))])
def everyone(request: pytest.FixtureRequest, models: tuple[Path, ...]) -> tuple[list[str], list[Found]]:
    """The partitions, and what every rank found, for each number of ranks."""
    if request.param == 2:
        return PARTITIONS[2], request.getfixturevalue("two")[0]
    world, partitions = (4, MORE) if request.param == "more" else (request.param, PARTITIONS[request.param])
    return partitions, run_ranks(world, partitions, models)[0]


@pytest.mark.xdist_group("ranks")
def test_divided_equals_whole(everyone: tuple[list[str], list[Found]]) -> None:
    partitions, ranks = everyone
    for found in ranks:
        assert list(found) == partitions
        for partition, values in found.items():
            for kind in INPUTS:
                assert values[f"error {kind}"] <= 1e-5, (partition, kind)
                assert values[f"error precomputed {kind}"] <= 1e-5, (partition, kind)
                assert values[f"size {kind}"] > 0.1, "a network that says nothing proves nothing"
            tp, zero = Partition.parse(partition).tp, Partition.parse(partition).zero
            # what tensor parallelism does not divide: row biases, modulation tables and the cross-attention norm
            assert 1 <= values["bytes"] / values["whole bytes"] * tp * zero <= 1 + 0.03 * tp
            assert values["predicted"] == values["loaded"]
            assert values["self test"] <= 1e-5
            error, bound = values["bfloat16 self test"]
            assert 0 < bound < 0.2 and error <= bound
            assert values["spoilt"].startswith("SelfTestFailed")
            cached = values["step cache"]
            assert 2 <= cached["skipped"] == cached["skipped here"] <= cached["changes"] - 2 == 12, partition
            assert cached["off"] <= 1e-5 and cached["error"] <= 1e-5, (partition, cached)
    for partition in partitions:
        assert len({found[partition]["bytes"] for found in ranks}) == 1


@pytest.mark.xdist_group("ranks")
def test_every_rank_sends_what_the_formula_says(everyone: tuple[list[str], list[Found]]) -> None:
    """To the byte. Models of two and of three layers tell what a block sends from what is sent beside blocks."""
    for found in everyone[1]:
        for partition, values in found.items():
            assert values["traffic"]
            for what, sent, expected in values["traffic"]:
                assert sent == expected, (partition, what)


@pytest.mark.xdist_group("ranks")
def test_a_divided_variant_equals_the_whole_one(models: tuple[Path, ...], two: list[list[Found]]) -> None:
    """Under every partition of two that keeps its weights in 8 bits."""
    floats = parameter_bytes(load_dit(models[0], torch.float32).blocks)
    for found in two[1]:
        assert set(found) == {"tp=2", "sp=2", "cfg=2"}
        for partition, values in found.items():
            assert max(values[f"error {kind}"] for kind in INPUTS) <= 1e-5, partition
            assert values["self test"] <= 1e-5
            error, bound = values["bfloat16 self test"]
            assert 0 < bound < 0.2 and error <= bound
            assert values["spoilt"].startswith("SelfTestFailed")
            assert values["predicted"] == values["loaded"]
            share = values["bytes"] / (floats / Partition.parse(partition).tp)
            assert 0.25 < share < 0.36  # steps, biases and tables weigh more in a tiny network than in a large one


def test_one_rank_is_the_same_path(models: tuple[Path, ...]) -> None:
    latents, times, text, _ = inputs("per frame")
    alone = load_partitioned(models[0], groups_of(Partition(), "cpu"), torch.float32, "cpu")
    whole = load_dit(models[0], torch.float32)
    assert torch.equal(alone(latents, times, text), whole(latents, times, text))
    assert parameter_bytes(alone) == parameter_bytes(whole)


def test_too_few_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cfg1xsp1xtp2 needs 2 ranks, this engine has 1"):
        groups_of(Partition(tp=2), "cpu")


@pytest.mark.parametrize(("axis", "size"), [("tp", 3), ("sp", 3), ("tp", 8)])
def test_heads_that_do_not_divide_are_refused(axis: str, size: int, models: tuple[Path, ...]) -> None:
    groups = Groups(**{axis: Axis(None, 0, size)})
    with pytest.raises(ValueError, match=rf"4 attention heads do not divide over .* = {size} ranks; .* \[1, 2, 4\]"):
        load_partitioned(models[0], groups, torch.float32, "cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({r"blocks\.\d+\.to_qkv": "column"}, r"matches no layer of this transformer with blocks\.\d+\.to_qkv"),
        ({r"blocks\.\d+\.ffn\.net\.2": None}, "does not say how to divide blocks.0.ffn.net.2"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(change: dict[str, Any], message: str, models: tuple[Path, ...]) -> None:
    plan: Plan = {pattern: kind for pattern, kind in {**WAN_PLAN, **change}.items() if kind}
    with pytest.raises(ValueError, match=re.escape(message)):
        place(load_dit(models[0], torch.float32), ALONE, plan)


def test_a_missing_weight_is_named(models: tuple[Path, ...], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = tiny_model(tmp_path / "holed")
    file = next((path / "transformer").glob("*.safetensors"))
    tensors = load_file(file)
    del tensors["blocks.1.attn1.norm_q.weight"]
    save_file(tensors, file)
    message = f"{path / 'transformer'}: its weights have no blocks.1.attn1.norm_q.weight"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_partitioned(path, ALONE, torch.float32, "cpu")
