"""Flow matching: the time convention, the training target and the samplers, in one place.

Time runs from 0 (clean) to 1 (noise), in training and in sampling alike; between them the path is a straight line
(rectified flow; Liu et al. 2022, Lipman et al. 2022) and the network predicts its velocity, noise minus clean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SOLVERS = ("euler", "ab2", "unipc")
THOUSAND = 1000  # times that Wan was trained at
NEARLY = 1 - 1e-6  # the last time before 1 of which a logarithm can be taken
Velocity = Callable[[Tensor, float], Tensor]  # (x, time) -> d x / d time
Solver = Generator[tuple[Tensor, float], Tensor, Tensor]  # yields (x, time), is sent its velocity, returns latents


@dataclass(slots=True)
class SolverState:
    """A solver between two steps: all that it takes to go on from there, in another process too."""

    x: Tensor  # where the solver wants to know the velocity
    step: int = 0  # steps that were taken
    past: tuple[Tensor, ...] = ()  # of these steps, `history_length` tensors, each like x


def history_length(solver: str, step: int) -> int:
    """The number of tensors that a solver keeps of its past after so many steps."""
    return 0 if not step else {"euler": 0, "ab2": 1, "unipc": 1 + min(step, 2)}[solver]


def blend(clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """The point at `times` (broadcast over the latents) of the line from clean to noise."""
    return clean + (noise - clean) * times


def schedule(steps: int, shift: float, solver: str = "euler") -> list[float]:
    """steps + 1 times from 1 to 0; shift > 1 spends more of them near the noise (Esser et al. 2024, section 5.3.2).

    For unipc they are those of Wan's own sampler and of diffusers' UniPCMultistepScheduler, whose steps divide the way
    to the first of the thousand times and leave the rest of it to the last one.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift={shift} must be a finite number above 0")
    if solver == "unipc":
        even = [1 + k * ((1 / THOUSAND - 1) / steps) for k in range(steps)]
        return [*(shift * t / (1 + (shift - 1) * t) for t in even), 0.0]
    even = [1 - k / steps for k in range(steps + 1)]
    return [t / (t + (1 - t) / shift) for t in even]  # written so that both ends are exact


def model_time(time: float, solver: str) -> float:
    """The time that the network is given: for unipc the whole thousandth below, as in Wan's own sampler."""
    return int(THOUSAND * min(time, NEARLY)) / THOUSAND if solver == "unipc" else time


def at_model_times(velocity: Velocity, solver: str) -> Velocity:
    """`velocity` with its times replaced by those that the network is given (`model_time`)."""
    return lambda x, now: velocity(x, model_time(now, solver))


def in_model_times(steps: Solver, solver: str) -> Solver:
    """The same solver, yielding the times that the network is given (`model_time`)."""
    x, now = next(steps)
    while True:
        velocity = yield x, model_time(now, solver)
        try:
            x, now = steps.send(velocity)
        except StopIteration as arrived:
            return arrived.value


def denoise(velocity: Velocity, x: Tensor, times: Sequence[float], solver: str = "euler") -> Iterator[Tensor]:
    """Integrates x from times[0] to times[-1] and yields it after every step. One call of `velocity` a step."""
    steps = solve(x, times, solver)
    x, now = next(steps)
    while True:
        try:
            x, now = steps.send(velocity(x, now))
        except StopIteration as arrived:
            yield arrived.value
            return
        yield x


def solve(begin: Tensor | SolverState, times: Sequence[float], solver: str = "euler") -> Solver:
    """Integrates from times[0] to times[-1] as a coroutine, so that one forward may serve several clips.

    begin: the latents at times[0], or the state of an earlier run with these times and this solver. A state is kept up
    to date: between two steps it says how far this run has come. Raises ValueError for an unknown solver.

    euler: first order. ab2: the two-step Adams-Bashforth method for uneven steps (second order; Hairer, Nørsett and
    Wanner, "Solving Ordinary Differential Equations I", III.5), whose first step is Euler's. unipc: UniPC-2 in its
    B2(h) form, on predictions of the clean clip (Zhao et al. 2023), the sampler of Wan's releases.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} must be one of {', '.join(SOLVERS)}")
    state = begin if isinstance(begin, SolverState) else SolverState(begin)
    return (yield from _unipc(state, times) if solver == "unipc" else _adams_bashforth(state, times, solver == "ab2"))


def _adams_bashforth(state: SolverState, times: Sequence[float], second: bool) -> Solver:
    x = state.x
    while state.step < len(times) - 1:
        k = state.step
        slope, step = (yield x, times[k]), times[k + 1] - times[k]
        if state.past:
            (last,), last_step = state.past, times[k] - times[k - 1]
            x = x + step * (slope + (slope - last) * (step / (2 * last_step)))
        else:
            x = x + step * slope
        state.x, state.step, state.past = x, k + 1, (slope,) if second else ()
    return x


def _unipc(state: SolverState, times: Sequence[float]) -> Solver:
    """Every step predicts from what was seen at the last two times; what is seen on arrival corrects it afterwards.

    The network is not asked again about the corrected point: a step costs one call.
    """
    sigmas = [min(time, NEARLY) for time in times]
    x = state.x
    while state.step < len(times) - 1:
        k = state.step
        clean = x - sigmas[k] * (yield x, times[k])
        seen: Sequence[Tensor] = ()  # the clean clip as it was predicted where the last step began, and before
        if k:
            start, *seen = state.past
            x = _corrected(start, seen, clean, sigmas[max(0, k - 2) : k + 1])
        seen, start = [*seen[-1:], clean], x
        two = 0 < k < len(times) - 2  # the last step leads to where the signal is infinitely stronger than the noise
        x = _predicted(x, seen[-2:] if two else [clean], sigmas[k - two : k + 2])
        state.x, state.step, state.past = x, k + 1, (start, *seen)
    return x


def _predicted(x: Tensor, seen: Sequence[Tensor], sigmas: Sequence[float]) -> Tensor:
    """UniP: from sigmas[-2] to sigmas[-1]; `seen` are predictions at all times but the last, one or two."""
    step = _LogStep(*sigmas[-2:])
    y = step.straight(x, seen[-1])
    if len(seen) == 2:
        y = y - step.gain * 0.5 * (seen[0] - seen[1]) / step.back(sigmas[0])
    return y


def _corrected(x: Tensor, seen: Sequence[Tensor], clean: Tensor, sigmas: Sequence[float]) -> Tensor:
    """UniC: the same step again, now that `clean` was predicted at its end."""
    step = _LogStep(*sigmas[-2:])
    y, arrived = step.straight(x, seen[-1]), clean - seen[-1]
    if len(seen) == 1:
        return y - step.gain * 0.5 * arrived
    back = step.back(sigmas[0])
    first, second = step.moments()
    old = (first - second) / (1 - back)
    return y - step.gain * (old / back * (seen[0] - seen[1]) + (first - old) * arrived)


class _LogStep:
    """A step in half the logarithm of the signal-to-noise ratio, h long, in which the noise shrinks exponentially."""

    def __init__(self, start: float, end: float) -> None:
        self.start, self.end = start, end
        self.h = _log_snr(end) - _log_snr(start)
        self.phi = math.expm1(-self.h)
        self.gain = end / start - 1  # (1 - end) * phi

    def straight(self, x: Tensor, clean: Tensor) -> Tensor:
        """Where the step leads if the clean clip is what it seems. What is clean already stays so, to the bit."""
        return clean + self.end / self.start * (x - clean)

    def back(self, time: float) -> float:
        """How far back a time lies, in steps (so it is below 0)."""
        return (_log_snr(time) - _log_snr(self.start)) / self.h

    def moments(self) -> tuple[float, float]:
        """The integrals that the corrector's two weights must match (equation 11 of the paper, B(h) = expm1(-h))."""
        first = self.phi / -self.h - 1
        second = first / -self.h - 0.5
        return first / self.phi, 2 * second / self.phi


def _log_snr(time: float) -> float:
    return math.log((1 - time) / time) if time > 0 else math.inf


def guide(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022): 1 is the conditional prediction itself."""
    return unconditional + guidance * (conditional - unconditional)


def noise(seed: int, shape: Sequence[int]) -> Tensor:
    """Standard normal float32 noise from a CPU generator of its own: a clip's pixels depend on its seed alone."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
