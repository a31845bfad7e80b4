"""Clips that are denoised together: one forward a step, in which every clip is at a step of its own.

Clips join and leave between any two steps (continuous batching; Yu et al. 2022, "Orca", did so for language models).
What a clip becomes must not depend on who sits beside it. It does not depend on its seat, as no row of a batch sees
another; but the sums of a matrix product may be ordered differently when there are more or fewer rows. So for each
number of clips it is measured once whether it gives the bits that a full batch gives, and where it does not, rows of
nothing are added until it does.

Letters: M seats, B clips, R halves of guidance that this rank computes (1 or 2), C channels, T/H/W latent frames, rows
and columns, L text tokens, Dt their channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from model.media.windows import stand_still, times_of
from model.network.diffusion import Walk, guide
from model.network.dit import DiT
from model.network.layers import Heard
from model.network.stepcache import StepCache
from model.parallel.guidance import both_halves, own_text
from model.parallel.mesh import ALONE, Groups

HEARD_BYTES = 64 << 20  # of keys and values that are worth keeping from step to step

Words: TypeAlias = "Tensor | list[Heard]"  # [R, B, L, Dt], or keys and values of every block [R, B, L, heads, K]


@dataclass(frozen=True, slots=True)
class Kind:
    """What clips of one batch have in common."""

    shape: tuple[int, ...]  # of their latents, C T H W
    guided: bool
    held: bool  # some latent frames are known: a time for each
    alone: int | None = None  # the number of a clip beside which none may sit: it has a step cache

    @classmethod
    def of(cls, x: Tensor, guidance: float, known: Sequence[bool], alone: int | None) -> Kind:
        """That of a clip with latents x [C, T, H, W], of whose frames these are known."""
        return cls(tuple(x.shape), guidance != 1, any(known), alone)


@dataclass(slots=True)
class Seat:
    """One clip under way."""

    number: int  # what the caller knows it by
    walk: Walk
    x: Tensor  # [C, T, H, W], where the solver wants to know the velocity
    now: float  # at this time
    guidance: float
    known: tuple[bool, ...]  # latent frames that ride along at time 0 and stand still
    cache: StepCache | None = None

    @property
    def kind(self) -> Kind:
        alone = None if self.cache is None else self.number
        return Kind.of(self.x, self.guidance, self.known, alone)

    @property
    def times(self) -> list[float]:
        """What its tokens are told: one time, or one for each latent frame where some are known."""
        return times_of(self.now, self.known)

    def move(self, velocity: Tensor) -> Tensor | None:
        """Takes the step; returns the latents if that was the last one."""
        try:
            self.x, self.now = self.walk.send(stand_still(velocity, self.known))
        except StopIteration as arrived:
            return arrived.value
        return None


class Batch:
    """At most `seats` clips of one kind on their way from noise to latents.

    All ranks of an engine must let the same clips join and leave between the same steps.
    """

    def __init__(
        self, experts: Sequence[DiT], *, seats: int = 1, boundary: float | None = None, groups: Groups = ALONE
    ) -> None:
        """experts: one network, or two of which the first works above the time `boundary` and the second below."""
        self.experts, self.boundary, self.groups, self.seats = experts, boundary or 0.0, groups, seats
        self.device = experts[0].proj_out.weight.device
        self.taken: list[Seat] = []
        self.words: list[Words] = []  # of every expert, [R, M, ...]
        self.enough: dict[tuple[Kind, int, int], int] = {}  # rows that give the bits of M rows

    def __len__(self) -> int:
        return len(self.taken)

    def __iter__(self) -> Iterator[int]:
        """The numbers of the clips under way."""
        return iter([seat.number for seat in self.taken])

    def takes(self, kind: Kind) -> bool:
        """Whether a clip of this kind may join now."""
        return len(self) < self.seats and (not self.taken or self.taken[0].kind == kind)

    def join(
        self,
        number: int,
        walk: Walk,
        text: Tensor,
        negative: Tensor,
        guidance: float,
        known: Sequence[bool],
        cache: StepCache | None = None,
        again: float | None = None,
    ) -> None:
        """A clip begins its walk; text and negative are [L, Dt]. Raises ValueError where `takes` would say no.

        again: the time of the full step that its cache is to compute again, since it goes on from an earlier walk.
        """
        x, now = next(walk)
        seat = Seat(number, walk, x, now, guidance, tuple(known), cache)
        if not self.takes(seat.kind):
            raise ValueError(f"clip {number} cannot join {len(self)} of {self.seats} clips: it is {seat.kind}")
        mine = own_text(text[None], negative[None], self.groups.cfg) if seat.kind.guided else text[None]
        for k, dit in enumerate(self.experts):
            self._write(k, self._heard(dit, mine))
        self.taken.append(seat)
        if again is not None:
            assert cache is not None and cache.last is not None
            step, there = cache.step, (seat.x, seat.now)
            cache.step, seat.x, seat.now = cache.last.step, cache.last.x, again
            self._velocities(int(again < self.boundary), [len(self) - 1])
            cache.step, (seat.x, seat.now) = step, there

    def leave(self, number: int) -> None:
        """The last clip moves into the free seat, so that those under way are the first ones."""
        place = list(self).index(number)
        last = len(self.taken) - 1
        for words in self.words:
            for tensor in _tensors(words):
                tensor[:, place] = tensor[:, last]
        self.taken[place] = self.taken[last]
        self.taken.pop()

    def step(self) -> dict[int, Tensor]:
        """Every clip takes one step. Returns the latents [C, T, H, W] of those that arrived; they have left."""
        arrived: dict[int, Tensor] = {}
        experts = [int(seat.now < self.boundary) for seat in self.taken]
        for expert in range(len(self.experts)):
            places = [place for place, its in enumerate(experts) if its == expert]
            for place, velocity in zip(places, self._velocities(expert, places), strict=True):
                seat = self.taken[place]
                if (latents := seat.move(velocity)) is not None:
                    arrived[seat.number] = latents
        for number in arrived:
            self.leave(number)
        return arrived

    def _velocities(self, expert: int, places: Sequence[int]) -> list[Tensor]:
        """Guided velocities [C, T, H, W] of the clips in these seats."""
        if not places:
            return []
        chosen = [self.taken[place] for place in places]
        rows = self._rows(expert, chosen[0], len(places))
        filled = [*places, *[places[0]] * (rows - len(places))]  # whatever is there: nobody looks at the result
        x = torch.stack([self.taken[place].x for place in filled])
        times = torch.tensor([self.taken[place].times for place in filled], device=self.device)
        words, first = _rows_of(self.words[expert], filled), chosen[0]

        def predict(x: Tensor, times: Tensor) -> tuple[Tensor, ...]:
            return self._ask(expert, x, times, words, first.kind.guided)

        conditional, *others = (first.cache.over(self.experts[expert], predict) if first.cache else predict)(x, times)
        if not others:
            return list(conditional[: len(places)])
        return [guide(yes, no, seat.guidance) for yes, no, seat in zip(conditional, others[0], chosen, strict=False)]

    def _ask(self, expert: int, x: Tensor, times: Tensor, words: Words, guided: bool) -> tuple[Tensor, ...]:
        """The conditional velocity of x [B, C, T, H, W] at times [B, S], and where it is guided the unconditional."""
        dit, flat = self.experts[expert], [tensor.flatten(0, 1) for tensor in _tensors(words)]
        given = flat[0] if isinstance(words, Tensor) else list(zip(flat[::2], flat[1::2], strict=True))
        if guided:
            return both_halves(dit, x, times, given, self.groups.cfg)
        return (dit(x, times, given),)

    def _rows(self, expert: int, seat: Seat, count: int) -> int:
        """How many rows give so many clips the bits that a full batch would give them: measured once."""
        key = seat.kind, expert, count
        if count == self.seats or seat.cache is not None:  # which is alone, whatever the others do
            return count
        if key not in self.enough:
            random = torch.Generator().manual_seed(0)
            x = torch.randn(self.seats, *seat.x.shape, generator=random).to(self.device)
            times = torch.rand(self.seats, len(seat.times), generator=random).to(self.device)

            def ask(rows: int) -> Tensor:
                words = _rows_of(self.words[expert], [0] * rows)
                halves = self._ask(expert, x[:rows], times[:rows], words, seat.kind.guided)
                return torch.stack([half[:count] for half in halves])

            full = ask(self.seats)
            same = (rows for rows in range(count, self.seats) if torch.equal(ask(rows), full))
            self.enough[key] = next(same, self.seats)
        return self.enough[key]

    def _heard(self, dit: DiT, text: Tensor) -> Words:
        """What a network is given of a clip's prompts [R, L, Dt] at every step.

        Its blocks' keys and values, unless these are large: beside a long clip making them anew costs next to nothing.
        """
        text = text.to(self.device)
        size = 2 * self.seats * text.shape[0] * text.shape[1] * dit.config.width // self.groups.tp.size
        small = size * dit.config.layers * dit.proj_out.weight.element_size() <= HEARD_BYTES
        return dit.hear(text) if small else text

    def _write(self, expert: int, words: Words) -> None:
        """Lays a clip's words, [R, ...] each, into the next seat."""
        if not self.taken and expert == 0:
            self.words = []
        if len(self.words) == expert:
            empty = [t.new_zeros(len(t), self.seats, *t.shape[1:]) for t in _tensors(words)]
            paired = list(zip(empty[::2], empty[1::2], strict=True)) if isinstance(words, list) else empty[0]
            self.words.append(paired)
        for tensor, row in zip(_tensors(self.words[expert]), _tensors(words), strict=True):
            tensor[:, len(self.taken)] = row


def _tensors(words: Words) -> list[Tensor]:
    return [words] if isinstance(words, Tensor) else [tensor for pair in words for tensor in pair]


def _rows_of(words: Words, places: Sequence[int]) -> Words:
    """The words of some seats; of the first ones without copying."""

    def rows(tensor: Tensor) -> Tensor:
        first = list(places) == list(range(len(places)))
        return tensor[:, : len(places)] if first else tensor[:, list(places)]

    return rows(words) if isinstance(words, Tensor) else [(rows(k), rows(v)) for k, v in words]
