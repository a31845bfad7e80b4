"""Clips that are denoised together: one forward a step, in which every clip is at a step of its own.

Clips join and leave between any two steps (continuous batching; Yu et al. 2022, "Orca", did so for language models).
What a clip becomes must not depend on who sits beside it. It does not depend on its slot, as no row of a batch sees
another; but the sums of a matrix product may be ordered differently when there are more or fewer rows. So for each
number of clips it is measured once whether it gives the bits that a full batch gives, and where it does not, rows of
nothing are added until it does.

Letters: M slots, B clips, R halves of guidance that this rank computes (1 or 2), C channels, T/H/W latent frames, rows
and columns, L text tokens, Dt their channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from model.media.windows import stand_still, times_of
from model.network.diffusion import Solver, guide
from model.network.dit import DiT
from model.network.layers import TextKV
from model.network.stepcache import StepCache
from model.parallel.guidance import both_halves, own_text
from model.parallel.mesh import ALONE, Groups

TEXT_KV_BYTES = 64 << 20  # of keys and values that are worth keeping from step to step

TextInput: TypeAlias = "Tensor | list[TextKV]"  # [R, B, L, Dt], or k/v of every block, [R, B, L, heads, K] each


@dataclass(frozen=True, slots=True)
class BatchKey:
    """The properties that all clips of a batch share."""

    shape: tuple[int, ...]  # of their latents, C T H W
    guided: bool
    held: bool  # some latent frames are known: a time for each
    alone: int | None = None  # the number of a clip that is batched with no other: it has a step cache

    @classmethod
    def of(cls, x: Tensor, guidance: float, known: Sequence[bool], alone: int | None) -> BatchKey:
        """The key of a clip with latents x [C, T, H, W], of whose frames these are known."""
        return cls(tuple(x.shape), guidance != 1, any(known), alone)


@dataclass(slots=True)
class Slot:
    """One clip under way."""

    number: int  # what the caller knows it by
    solver: Solver
    x: Tensor  # [C, T, H, W], where the solver wants to know the velocity
    now: float  # at this time
    guidance: tuple[float, float]  # of the first expert, and of the second
    known: tuple[bool, ...]  # latent frames that ride along at time 0 and stand still
    cache: StepCache | None = None

    @property
    def key(self) -> BatchKey:
        alone = None if self.cache is None else self.number
        return BatchKey.of(self.x, self.guidance[0], self.known, alone)

    @property
    def times(self) -> list[float]:
        """The times of its tokens: one, or one for each latent frame where some are known."""
        return times_of(self.now, self.known)

    def move(self, velocity: Tensor) -> Tensor | None:
        """Takes the step; returns the latents if that was the last one."""
        try:
            self.x, self.now = self.solver.send(stand_still(velocity, self.known))
        except StopIteration as arrived:
            return arrived.value
        return None


class Batch:
    """At most `size` clips with one key on their way from noise to latents.

    All ranks of an engine must let the same clips join and leave between the same steps.
    """

    def __init__(
        self,
        experts: Sequence[DiT],
        *,
        size: int = 1,
        boundary: float | None = None,
        groups: Groups = ALONE,
        at_work: Callable[[], None] = lambda: None,
    ) -> None:
        """experts: one network, or two of which the first works above the time `boundary` and the second below.
        at_work: is called after each forward but a step's last one: a step with measurements takes many times longer.
        """
        self.at_work = at_work
        self.experts, self.boundary, self.groups, self.size = experts, boundary or 0.0, groups, size
        self.device = experts[0].proj_out.weight.device
        self.slots: list[Slot] = []
        self.texts: list[TextInput] = []  # of every expert, [R, M, ...]
        self.enough: dict[tuple[BatchKey, int, int], int] = {}  # rows that give the bits of M rows

    def __len__(self) -> int:
        return len(self.slots)

    def __iter__(self) -> Iterator[int]:
        """The numbers of the clips under way."""
        return iter([slot.number for slot in self.slots])

    def takes(self, key: BatchKey) -> bool:
        """Whether a clip with this key may join now."""
        return len(self) < self.size and (not self.slots or self.slots[0].key == key)

    def join(
        self,
        number: int,
        solver: Solver,
        text: Tensor,
        negative: Tensor,
        guidance: float,
        known: Sequence[bool],
        cache: StepCache | None = None,
        recompute: float | None = None,
        guidance_2: float | None = None,
    ) -> None:
        """Adds a clip; text and negative are [L, Dt]. Raises ValueError where `takes` would say no.

        recompute: the time of the full step that its cache must compute again, where it goes on from a resume state.
        """
        x, now = next(solver)
        both = guidance, guidance if guidance_2 is None else guidance_2
        slot = Slot(number, solver, x, now, both, tuple(known), cache)
        if not self.takes(slot.key):
            raise ValueError(f"clip {number} cannot join {len(self)} of {self.size} clips: it is {slot.key}")
        mine = own_text(text[None], negative[None], self.groups.cfg) if slot.key.guided else text[None]
        for k, dit in enumerate(self.experts):
            self._write(k, self._text_input(dit, mine))
        self.slots.append(slot)
        if recompute is not None:
            assert cache is not None and cache.last is not None
            step, there = cache.step, (slot.x, slot.now)
            cache.step, slot.x, slot.now = cache.last.step, cache.last.x, recompute
            self._velocities(int(recompute < self.boundary), [len(self) - 1])
            cache.step, (slot.x, slot.now) = step, there

    def leave(self, number: int) -> None:
        """The last clip moves into the free slot, so that those under way are the first ones."""
        place = list(self).index(number)
        last = len(self.slots) - 1
        for text in self.texts:
            for tensor in _tensors(text):
                tensor[:, place] = tensor[:, last]
        self.slots[place] = self.slots[last]
        self.slots.pop()

    def step(self) -> dict[int, Tensor]:
        """Every clip takes one step. Returns the latents [C, T, H, W] of those that arrived; they have left."""
        arrived: dict[int, Tensor] = {}
        experts = [int(slot.now < self.boundary) for slot in self.slots]
        for expert in range(len(self.experts)):
            places = [place for place, its in enumerate(experts) if its == expert]
            for place, velocity in zip(places, self._velocities(expert, places), strict=True):
                slot = self.slots[place]
                if (latents := slot.move(velocity)) is not None:
                    arrived[slot.number] = latents
        for number in arrived:
            self.leave(number)
        return arrived

    def _velocities(self, expert: int, places: Sequence[int]) -> list[Tensor]:
        """Guided velocities [C, T, H, W] of the clips in these slots."""
        if not places:
            return []
        chosen = [self.slots[place] for place in places]
        rows = self._rows(expert, chosen[0], len(places))
        filled = [*places, *[places[0]] * (rows - len(places))]  # any row will do: its result is not used
        x = torch.stack([self.slots[place].x for place in filled])
        times = torch.tensor([self.slots[place].times for place in filled], device=self.device)
        text, first = _rows_of(self.texts[expert], filled), chosen[0]

        def predict(x: Tensor, times: Tensor) -> tuple[Tensor, ...]:
            return self._ask(expert, x, times, text, first.key.guided)

        conditional, *others = (first.cache.over(self.experts[expert], predict) if first.cache else predict)(x, times)
        if not others:
            return list(conditional[: len(places)])
        return [
            guide(yes, no, slot.guidance[expert]) for yes, no, slot in zip(conditional, others[0], chosen, strict=False)
        ]

    def _ask(self, expert: int, x: Tensor, times: Tensor, text: TextInput, guided: bool) -> tuple[Tensor, ...]:
        """The conditional velocity of x [B, C, T, H, W] at times [B, S], and where it is guided the unconditional."""
        dit, flat = self.experts[expert], [tensor.flatten(0, 1) for tensor in _tensors(text)]
        given = flat[0] if isinstance(text, Tensor) else list(zip(flat[::2], flat[1::2], strict=True))
        if guided:
            return both_halves(dit, x, times, given, self.groups.cfg)
        return (dit(x, times, given),)

    def _rows(self, expert: int, slot: Slot, count: int) -> int:
        """How many rows give so many clips the bits that a full batch would give them: measured once."""
        case = slot.key, expert, count
        if count == self.size or slot.cache is not None:  # which is batched with no other
            return count
        if case not in self.enough:
            random = torch.Generator().manual_seed(0)
            x = torch.randn(self.size, *slot.x.shape, generator=random).to(self.device)
            times = torch.rand(self.size, len(slot.times), generator=random).to(self.device)

            def ask(rows: int) -> Tensor:
                text = _rows_of(self.texts[expert], [0] * rows)
                halves = self._ask(expert, x[:rows], times[:rows], text, slot.key.guided)
                asked = torch.stack([half[:count] for half in halves])
                if asked.is_cuda:
                    torch.cuda.current_stream().synchronize()  # it is computed, and not only queued
                self.at_work()
                return asked

            full = ask(self.size)
            same = (rows for rows in range(count, self.size) if torch.equal(ask(rows), full))
            self.enough[case] = next(same, self.size)
        return self.enough[case]

    def _text_input(self, dit: DiT, text: Tensor) -> TextInput:
        """A network's text input at every step, for a clip's prompts [R, L, Dt].

        Its blocks' keys and values, unless these are large: beside a long clip making them anew costs next to nothing.
        """
        text = text.to(self.device)
        size = 2 * self.size * text.shape[0] * text.shape[1] * dit.config.width // self.groups.tp.size
        small = size * dit.config.layers * dit.proj_out.weight.element_size() <= TEXT_KV_BYTES
        return dit.precompute_kv(text) if small else text

    def _write(self, expert: int, text: TextInput) -> None:
        """Copies a clip's text input, [R, ...] each, into the next slot."""
        if not self.slots and expert == 0:
            self.texts = []
        if len(self.texts) == expert:
            empty = [t.new_zeros(len(t), self.size, *t.shape[1:]) for t in _tensors(text)]
            paired = list(zip(empty[::2], empty[1::2], strict=True)) if isinstance(text, list) else empty[0]
            self.texts.append(paired)
        for tensor, row in zip(_tensors(self.texts[expert]), _tensors(text), strict=True):
            tensor[:, len(self.slots)] = row


def _tensors(text: TextInput) -> list[Tensor]:
    return [text] if isinstance(text, Tensor) else [tensor for pair in text for tensor in pair]


def _rows_of(text: TextInput, places: Sequence[int]) -> TextInput:
    """The text input of some slots; of the first ones without copying."""

    def rows(tensor: Tensor) -> Tensor:
        first = list(places) == list(range(len(places)))
        return tensor[:, : len(places)] if first else tensor[:, list(places)]

    return rows(text) if isinstance(text, Tensor) else [(rows(k), rows(v)) for k, v in text]
