"""What must hold of the flow and its solvers for any input."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st

from model.network.diffusion import SOLVERS, at_model_times, blend, denoise, guide, noise, schedule

shifts = st.floats(0.1, 20)


@given(steps=st.integers(1, 200), shift=shifts, solver=st.sampled_from(SOLVERS))
def test_a_schedule_falls_from_noise_to_clean(steps: int, shift: float, solver: str) -> None:
    times = schedule(steps, shift, solver)
    assert len(times) == steps + 1
    assert (times[0], times[-1]) == (pytest.approx(1.0), 0.0)
    assert all(now > after for now, after in pairwise(times))


@pytest.mark.parametrize(("steps", "shift"), [(0, 1.0), (5, 0.0), (5, math.nan), (5, math.inf)])
def test_an_impossible_schedule_is_refused(steps: int, shift: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        schedule(steps, shift)


@given(steps=st.integers(1, 40), shift=shifts, solver=st.sampled_from(SOLVERS), seed=st.integers(0, 2**63 - 1))
def test_the_exact_velocity_reaches_the_clean_clip_in_any_number_of_steps(
    steps: int, shift: float, solver: str, seed: int
) -> None:
    clean = torch.linspace(-2, 2, 24, dtype=torch.float64).view(2, 3, 4)
    start = noise(seed, clean.shape).double()
    times = schedule(steps, shift, solver)
    near = 1e-4 if solver == "unipc" else 1e-9  # it begins a millionth before the noise
    path = list(denoise(lambda x, now: (x - clean) / now, start, times, solver))
    torch.testing.assert_close(path[-1], clean, atol=near, rtol=0)
    for x, now in zip(path, times[1:], strict=True):  # and stays on the straight line all the way
        torch.testing.assert_close(x, blend(clean, start, torch.tensor(now, dtype=torch.float64)), atol=near, rtol=0)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ab2", 2)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_halving_the_steps_divides_the_error_by_the_solver_s_order(solver: str, order: int, shift: float) -> None:
    """On a curved path with a known end: normal data of spread s, whose exact velocity is linear in x."""
    spread = 0.5

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        return x * (t - (1 - t) * spread**2) / (t**2 + (1 - t) ** 2 * spread**2)

    def error(steps: int) -> float:
        *_, end = denoise(velocity, torch.ones(1, dtype=torch.float64), schedule(steps, shift), solver)
        return abs(end.item() - spread)

    measured = math.log2(error(800) / error(1600))
    assert measured == pytest.approx(order, abs=0.15)


@given(guidance=st.floats(0, 30))
def test_guidance_moves_along_the_difference(guidance: float) -> None:
    with_text, without = torch.tensor([3.0]), torch.tensor([1.0])
    assert guide(with_text, without, 1.0) == with_text
    assert guide(with_text, without, guidance).item() == pytest.approx(1 + 2 * guidance)


@given(seed=st.integers(0, 2**63 - 1))
def test_a_seed_is_its_noise_whatever_happened_before(seed: int) -> None:
    first = noise(seed, (4, 3))
    torch.randn(5)
    assert torch.equal(first, noise(seed, (4, 3)))


@given(steps=st.integers(1, 60), shift=st.floats(0.5, 12))
def test_unipc_walks_as_diffusers_does(steps: int, shift: float) -> None:
    theirs = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    theirs.set_timesteps(steps)
    theirs.set_begin_index(0)
    asked: dict[str, list[int]] = {"theirs": [], "ours": []}

    def bent(whose: str, x: torch.Tensor, now: float) -> torch.Tensor:
        asked[whose].append(round(now * 1000))
        return torch.sin(2 * x + now) + x * now

    start = y = torch.linspace(-2, 2, 20, dtype=torch.float64).view(1, 4, 5)
    for time in theirs.timesteps:
        y = theirs.step(bent("theirs", y, float(time) / 1000), time, y, return_dict=False)[0]
    velocity = at_model_times(lambda x, now: bent("ours", x, now), "unipc")
    *_, x = denoise(velocity, start, schedule(steps, shift, "unipc"), "unipc")
    assert asked["ours"] == asked["theirs"]
    torch.testing.assert_close(x, y, atol=2e-4, rtol=0)  # theirs takes its logarithms in single precision


def test_an_unknown_solver_is_refused() -> None:
    with pytest.raises(ValueError, match="solver='heun' must be one of euler, ab2, unipc"):
        next(denoise(lambda x, now: x, torch.ones(1), [1.0, 0.0], "heun"))
