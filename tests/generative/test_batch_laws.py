"""What must hold of clips that are denoised together, whoever joins and leaves when."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.config import DiTConfig
from model.engine.batch import Batch
from model.network.diffusion import SOLVERS, noise, schedule, solve
from model.network.dit import DiT

SHAPE = (16, 3, 2, 2)  # so few tokens that sums are ordered by how many clips there are
NOTHING = (False, False, False)


@cache
def network(seed: int) -> DiT:
    torch.manual_seed(seed)
    dit = DiT(DiTConfig(layers=1, heads=4, head_dim=64, ffn_dim=1024, text_dim=16, freq_dim=32))
    dit.init_weights()
    for parameter in dit.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return dit.eval().requires_grad_(False)


@dataclass(frozen=True)
class Clip:
    seed: int
    steps: int
    solver: str = "euler"
    guidance: float = 3.0
    known: tuple[bool, ...] = NOTHING

    def join(self, batch: Batch, number: int) -> None:
        text, negative = noise(self.seed + 1000, (5, 16)), noise(2000, (5, 16))
        way = solve(noise(self.seed, SHAPE), schedule(self.steps, 3.0, self.solver), self.solver)
        batch.join(number, way, text, negative, self.guidance, self.known)


def alone(clip: Clip, size: int, experts: tuple[DiT, ...], boundary: float | None) -> Tensor:
    batch = Batch(experts, size=size, boundary=boundary)
    clip.join(batch, 0)
    while not (arrived := batch.step()):
        pass
    return arrived[0]


clips = st.builds(Clip, st.integers(0, 9), st.integers(1, 6), st.sampled_from(SOLVERS), st.floats(1.5, 5))


@settings(deadline=None, max_examples=25)
@given(
    waiting=st.lists(clips, min_size=1, max_size=6),
    delays=st.lists(st.integers(0, 3), min_size=6, max_size=6),
    size=st.integers(1, 4),
    leaves=st.sets(st.integers(0, 5)),
    boundary=st.sampled_from([None, 0.6]),
)
def test_a_clip_becomes_the_same_to_the_bit_whoever_sits_beside_it(
    waiting: list[Clip], delays: list[int], size: int, leaves: set[int], boundary: float | None
) -> None:
    experts = (network(0),) if boundary is None else (network(0), network(1))
    batch, made, queue = Batch(experts, size=size, boundary=boundary), dict[int, Tensor](), list(enumerate(waiting))
    pause = 0
    while queue or len(batch):
        while queue and not pause and len(batch) < size:
            number, clip = queue.pop(0)
            clip.join(batch, number)
            pause = delays[number]
        pause = max(0, pause - 1)
        made |= batch.step()
        for number in leaves & set(batch):  # cancelled after its first step beside others
            batch.leave(number)
    assert set(made) | leaves >= set(range(len(waiting)))
    for number, latents in made.items():
        assert torch.equal(latents, alone(waiting[number], size, experts, boundary)), waiting[number]


@settings(deadline=None, max_examples=15)
@given(known=st.lists(st.lists(st.booleans(), min_size=3, max_size=3).filter(any), min_size=2, max_size=3))
def test_what_is_known_of_a_clip_stays_untouched(known: list[list[bool]]) -> None:
    batch = Batch((network(0),), size=3)
    for number, held in enumerate(known):
        Clip(number, 4, known=tuple(held)).join(batch, number)
    made: dict[int, Tensor] = {}
    while len(batch):
        made |= batch.step()
    for number, held in enumerate(known):
        start = noise(number, SHAPE)
        assert torch.equal(made[number][:, torch.tensor(held)], start[:, torch.tensor(held)])
        assert all(held) or not torch.equal(made[number], start)


def test_a_clip_that_is_not_finite_harms_nobody() -> None:
    batch = Batch((network(0),), size=3)
    for number, clip in enumerate((Clip(1, 5), Clip(2, 5, guidance=1e38), Clip(3, 5))):
        clip.join(batch, number)
    made: dict[int, Tensor] = {}
    while len(batch):
        made |= batch.step()
    assert not made[1].isfinite().all()
    for number, clip in ((0, Clip(1, 5)), (2, Clip(3, 5))):
        assert torch.equal(made[number], alone(clip, 3, (network(0),), None))


def test_only_clips_with_one_key_share_a_batch() -> None:
    batch = Batch((network(0),), size=2)
    Clip(1, 3).join(batch, 1)
    for other in (Clip(2, 3, guidance=1.0), Clip(2, 3, known=(True, False, False))):
        with pytest.raises(ValueError, match="clip 2 cannot join 1 of 2 clips"):
            other.join(batch, 2)
    Clip(2, 3).join(batch, 2)
    with pytest.raises(ValueError, match="clip 3 cannot join 2 of 2 clips"):
        Clip(3, 3).join(batch, 3)


def test_a_step_that_measures_gives_a_sign_of_life_after_each_forward() -> None:
    """The longest silence is one forward of a full batch, however many forwards the first step of a shape takes."""
    said: list[str] = []

    def forward(module: object, given: tuple[Tensor, ...], made: object) -> None:
        said.append("forward")

    dit = network(0)
    batch = Batch((dit,), size=6, at_work=lambda: said.append("sign"))
    for number in range(2):
        Clip(number, 4).join(batch, number)
    watched = dit.register_forward_hook(forward)
    try:
        batch.step()
        first = [*said]
        said.clear()
        batch.step()
    finally:
        watched.remove()
    assert first.count("sign") >= 2, "a full batch and at least one smaller one were measured"
    silences = [part.count("forward") for part in " ".join(first).split("sign")]
    assert max(silences) == silences[-1] == said.count("forward"), "no silence is longer than that of any other step"
    assert "sign" not in said, "it is measured once"
