"""First-block caching: it decides and computes as diffusers does, and skips nothing that it may not skip."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import FirstBlockCacheConfig, WanTransformer3DModel
from torch import Tensor

from model.config import DiTConfig
from model.network.diffusion import SOLVERS, at_model_times, denoise, schedule
from model.network.dit import DiT
from model.network.stepcache import StepCache
from model.parallel.guidance import both_halves, own_text
from model.parallel.mesh import Axis
from tests.tiny import hold

Predict = Callable[[Tensor, Tensor], Tensor]
CONFIG = DiTConfig(layers=3, heads=2, head_dim=12, ffn_dim=48, text_dim=8, freq_dim=16)
STEPS = 12
NOISE = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(2))
TEXT, NEGATIVE = torch.randn(2, 1, 5, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def dit() -> DiT:
    return network(0)


def network(seed: int) -> DiT:
    torch.manual_seed(seed)
    dit = DiT(CONFIG).eval().requires_grad_(False)
    for parameter in dit.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    return dit


def conditional(dit: DiT) -> Predict:
    return lambda x, times: dit(x, times, TEXT)


def integrate(velocity: Callable[[Tensor, float], Tensor], solver: str = "euler", steps: int = STEPS) -> Tensor:
    (*_, last) = denoise(at_model_times(velocity, solver), NOISE, schedule(steps, 3.0, solver), solver)
    return last


def at_one_time(predict: Predict) -> Callable[[Tensor, float], Tensor]:
    return hold(predict, [False])


class Counted:
    """How often each block of a transformer runs."""

    def __init__(self, dit: DiT) -> None:
        self.runs = [0] * len(dit.blocks)
        self.hooks = [block.register_forward_hook(lambda *_, k=k: self.add(k)) for k, block in enumerate(dit.blocks)]

    def add(self, k: int) -> None:
        self.runs[k] += 1

    def __enter__(self) -> list[int]:
        return self.runs

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


def test_skips_when_diffusers_does_and_computes_what_it_computes(dit: DiT) -> None:
    theirs = WanTransformer3DModel(**{k: v for k, v in CONFIG.to_diffusers().items() if not k.startswith("_")}).eval()
    theirs.load_state_dict(dit.state_dict())
    theirs.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    runs = [0, 0]
    theirs.blocks[1].attn1.register_forward_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    cache = StepCache(0.1, STEPS + 1)  # one more than there are: diffusers does not know the last one
    ours = cache.over(dit, conditional(dit))
    x, skips = NOISE, list[int]()
    with torch.no_grad(), theirs.cache_context("cond"):
        for time in schedule(STEPS, 3.0)[:-1]:
            times = torch.tensor([time])
            wanted = theirs(x, times * 1000, TEXT, return_dict=False)[0]
            got = ours(x, times)
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
            x, runs[1] = x - got / STEPS, runs[1] + 1
            skips.append(cache.skipped)
            assert runs[0] == runs[1] - cache.skipped
    assert 2 < cache.skipped < STEPS - 2, "a threshold that never or always skips proves nothing"


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_cache_that_never_skips_changes_no_bit_and_leaves_no_trace(dit: DiT, solver: str) -> None:
    exact = integrate(at_one_time(conditional(dit)), solver)
    cache = StepCache(1e-12, STEPS)
    with Counted(dit) as runs:
        assert torch.equal(integrate(at_one_time(cache.over(dit, conditional(dit))), solver), exact)
    assert cache.skipped == 0 and runs == [STEPS] * 3
    assert torch.equal(integrate(at_one_time(conditional(dit)), solver), exact), "the next clip has no cache"


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, STEPS])
def test_the_first_and_the_last_step_are_computed_whatever_the_threshold(dit: DiT, solver: str, steps: int) -> None:
    cache = StepCache(math.inf, steps)
    with Counted(dit) as runs:
        got = integrate(at_one_time(cache.over(dit, conditional(dit))), solver, steps)
    assert cache.skipped == max(0, steps - 2) and runs == [steps, min(2, steps), min(2, steps)]
    assert got.isfinite().all()
    if steps > 2:
        assert not torch.equal(got, integrate(at_one_time(conditional(dit)), solver, steps))


def test_another_expert_begins_anew(dit: DiT) -> None:
    """What one network added means nothing to the other: it would be added to its tokens with no word of warning."""
    other, cache = network(1), StepCache(math.inf, STEPS)
    experts = [at_one_time(cache.over(each, conditional(each))) for each in (dit, other)]
    with Counted(dit) as first, Counted(other) as second:
        integrate(lambda x, now: experts[now < 0.8](x, now))
    assert first[0] + second[0] == STEPS and min(first[0], second[0]) > 2
    assert (first[1], second[1], cache.skipped) == (1, 2, STEPS - 3)


@pytest.mark.parametrize("times_each", ["frame", "token"])
def test_only_tokens_that_are_being_made_count(dit: DiT, times_each: str) -> None:
    """The change by its definition, from what the first block was given and gave; both halves of guidance in one."""
    ratios, added = list[float](), list[Tensor]()

    def total(sums: Tensor) -> Tensor:
        ratios.append(float(sums[0] / sums[1]))
        return sums

    cache = StepCache(0.05, STEPS, total)
    words = own_text(TEXT, NEGATIVE, Axis())

    def predict(x: Tensor, times: Tensor) -> Tensor:
        times = times.repeat_interleave(6, 1) if times_each == "token" else times
        return sum(both_halves(dit, x, times, words, Axis()), torch.zeros(())) / 2

    hook = dit.blocks[0].register_forward_hook(lambda block, given, made: added.append(made - given[0]))
    integrate(hold(cache.over(dit, predict), [True, False, False]))
    hook.remove()
    expected, last = list[float](), added[0]
    for now in added[1:-1]:
        made = slice(6, None)  # tokens of the second and third frame
        expected.append(float((now - last)[:, made].abs().sum() / last[:, made].abs().sum()))
        last = last if expected[-1] < 0.05 else now
    assert len(added[0]) == 2 and ratios == pytest.approx(expected, rel=1e-5)
    assert 0 < cache.skipped == sum(ratio < 0.05 for ratio in expected) < len(expected)


@pytest.mark.parametrize("broken", [math.nan, 0.0])
def test_what_cannot_be_compared_is_computed(dit: DiT, broken: float) -> None:
    cache = StepCache(1.0, 3, lambda sums: sums * broken)
    integrate(at_one_time(cache.over(dit, conditional(dit))), steps=3)
    assert cache.skipped == 0
