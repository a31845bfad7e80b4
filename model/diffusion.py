"""Flow matching: the time convention, the training target and the samplers, in one place.

Time runs from 0 (clean) to 1 (noise), in training and in sampling alike; between them the path is a straight line
(rectified flow; Liu et al. 2022, Lipman et al. 2022) and the network predicts its velocity, noise minus clean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

SOLVERS = ("euler", "ab2")
Velocity = Callable[[Tensor, float], Tensor]  # (x, time) -> d x / d time


def blend(clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """The point at `times` (broadcast over the latents) of the line from clean to noise."""
    return clean + (noise - clean) * times


def schedule(steps: int, shift: float) -> list[float]:
    """steps + 1 times from 1 to 0; shift > 1 spends more of them near the noise (Esser et al. 2024, section 5.3.2)."""
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift={shift} must be a finite number above 0")
    even = (1 - k / steps for k in range(steps + 1))
    return [t / (t + (1 - t) / shift) for t in even]  # written so that both ends are exact


def denoise(velocity: Velocity, x: Tensor, times: Sequence[float], solver: str = "euler") -> Iterator[Tensor]:
    """Walks x from times[0] to times[-1] and yields it after every step. One call of `velocity` a step.

    euler: first order. ab2: the two-step Adams-Bashforth method for uneven steps (second order; Hairer, Nørsett and
    Wanner, "Solving Ordinary Differential Equations I", III.5), whose first step is Euler's.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} must be one of {', '.join(SOLVERS)}")
    last: Tensor | None = None
    last_step = 0.0
    for now, after in pairwise(times):
        slope, step = velocity(x, now), after - now
        if solver == "ab2" and last is not None:
            x = x + step * (slope + (slope - last) * (step / (2 * last_step)))
        else:
            x = x + step * slope
        last, last_step = slope, step
        yield x


def guide(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022): 1 is the conditional prediction itself."""
    return unconditional + guidance * (conditional - unconditional)


def noise(seed: int, shape: Sequence[int]) -> Tensor:
    """Standard normal float32 noise from a CPU generator of its own: a clip's pixels depend on its seed alone."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
