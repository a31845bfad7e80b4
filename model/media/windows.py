"""Clips that keep frames they are given: which are known, in which windows the rest is made, how it is joined.

There is one mechanism for image-to-video, extending, connecting and looping. A clip is a time line of frames, some of
them known. The model sees it through windows; in each, the latent frames of known pixels ride along at time 0
(`times_of`) and stay as they are (`stand_still`) while the others are denoised from noise. A clip longer than the
model's window is made of several, each beginning with the last frames of the one before. Editing starts every window at
the noised source instead of noise (SDEdit; Meng et al. 2021).

The autoencoder is causal and its first latent frame stands for one frame: `step` frames become one latent frame, so a
window has step * n + 1 frames, and known frames fill latent frames from the front in runs of step * n + 1, from the end
in runs of step * n. What determines the pixels is all decided here, in plain numbers; nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

Frames: TypeAlias = "npt.NDArray[np.uint8]"  # [T, H, W, 3]

FADE = 6  # new frames beside a known one that take on what it lost in the autoencoder
STILL = 30.0  # levels of 255: a pixel that differs by more from the known frame's shows something else
CUT = 1.5  # times the clip's own steps: what is more between two frames looks like a cut


@dataclass(frozen=True, slots=True)
class Window:
    """A run of frames that the model makes at once."""

    first: int  # where it begins on the time line; below 0 where its length does not fit: those frames are dropped
    frames: int  # step * n + 1
    head: int = 0  # frames at its start that are known: 0 or step * n + 1
    tail: int = 0  # frames at its end that are known; the first tail % step of them lie in a latent frame that is not

    def known(self, step: int) -> list[bool]:
        """Which latent frames are known."""
        count = (self.frames - 1) // step + 1
        head, tail = -(-self.head // step), self.tail // step
        return [k < head or k >= count - tail for k in range(count)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """The known part of a time line of `frames` frames before anything is made.

    start, end: known frames at its beginning and at its end. A short end is held: its last frame stands on beyond the
    end of the clip, until it fills a latent frame. loop: after its last frame the clip comes back to its first one.
    window: most frames made at once (0: all of them). overlap: known frames that a window should at least begin with.
    """

    frames: int
    start: int = 0
    end: int = 0
    loop: bool = False
    window: int = 0
    overlap: int = 5


def windows(given: Given, step: int) -> list[Window]:
    """The windows that make the frames that are not known, in the order in which they can be made.

    Raises ValueError for a clip that is made in one piece and whose length the autoencoder cannot give.
    """
    if given.end and not given.start:
        return _backward(given, step)
    made: list[Window] = []
    position = given.start  # all frames before it are known
    if given.loop and position < 2 * step - 1:  # half of it freely, so that the other half can lead back
        length = min(max(2 * step + 1, _down(given.frames // 2 + 1, step)), given.window or given.frames)
        head = _down(position, step)
        made.append(Window(position - head, length, head))
        position += length - head
    elif not position:
        if (given.frames - 1) % step and not 0 < given.window < given.frames:
            raise ValueError(f"frames={given.frames} must be {step}n+1")
        position = min(given.frames, given.window or given.frames)
        made.append(Window(0, position))
    stop = given.frames - given.end
    while position < stop:
        ahead = position if given.loop else given.end
        window = _between(position, stop - position, ahead, given, step)
        made.append(window)
        position = window.first + window.frames - window.tail
    return made


def _between(position: int, gap: int, ahead: int, given: Given, step: int) -> Window:
    """The next window where `position` frames are known, then `gap` are not, then `ahead` are known (0: none)."""
    head, tail, room = _down(min(given.overlap, position), step), 0, given.window
    if ahead:
        spare = -gap % step  # what fills up the latent frame in which the gap ends
        ahead = ahead if given.loop else max(ahead, 2 * step - 1)
        tail = min(spare + step * max(1, (given.overlap - spare) // step), spare + (ahead - spare) // step * step)
        room = room and max(room, 2 * given.overlap + 2 * step - 1)
    room = room or _up(head + gap + tail, step)
    if head + gap + tail > room:
        longest = min(room, head + gap - 1) if ahead else room  # never into what is known
        return Window(position - head, _down(longest, step), head)
    head = max(head, _down(min(position, room - gap - tail), step))  # the last one: all the past that it has room for
    return Window(position - head, _up(head + gap + tail, step), head, tail)


def _backward(given: Given, step: int) -> list[Window]:
    made: list[Window] = []
    position, ahead = given.frames - given.end, max(given.end, step)  # all frames from position on are known
    while position > 0:
        tail = min(max(step, given.overlap // step * step), ahead // step * step)
        room = given.window or _up(position + tail, step)
        if position + tail <= room:  # the last one
            tail = max(tail, min(room - position, ahead) // step * step)
        frames = min(_down(room, step), _up(position + tail, step))
        made.append(Window(position + tail - frames, frames, 0, tail))
        position, ahead = position + tail - frames, ahead + frames - tail
    return made


def _down(frames: int, step: int) -> int:
    """The longest run of frames up to so many that fills latent frames from the front; 0 where there is none."""
    return (frames - 1) // step * step + 1 if frames > 0 else 0


def _up(frames: int, step: int) -> int:
    return -(-(frames - 1) // step) * step + 1


def times_from(times: Sequence[float], strength: float) -> list[float]:
    """The part of a schedule below `strength`, which is where an edit begins; 1 is all of it."""
    return [strength, *(time for time in times if time < strength)]


def seed_of(seed: int, window: int) -> int:
    """The seed of the noise of a clip's window number `window`; the first one's is the clip's own."""
    return (seed + window * 0x1E3779B97F4A7C15) % 2**63


def times_of(now: float, known: Sequence[bool]) -> list[float]:
    """Times of a clip's tokens: one for all, or where latent frames are known one for each, theirs being 0."""
    return [0.0 if each else now for each in known] if any(known) else [now]


def stand_still(velocity: Tensor, known: Sequence[bool]) -> Tensor:
    """A velocity [..., T, H, W] that leaves the known latent frames where they are."""
    if not any(known):
        return velocity
    return velocity.masked_fill(velocity.new_tensor(known).bool()[:, None, None], 0.0)


class Canvas:
    """The pixels of some clips of one time line while their windows are made, [B, T, H, W, 3] uint8.

    start, end: known frames of every clip, [B, n, H, W, 3]; n is 0 where there are none.
    """

    def __init__(self, given: Given, start: Frames, end: Frames, step: int) -> None:
        self.given = given
        length = given.frames + (max(0, 2 * step - 1 - given.end) if given.end else 0)
        self.pixels: Frames = np.zeros((len(start), length, *start.shape[2:]), np.uint8)
        self.pixels[:, : given.start] = start
        if given.end:
            last = given.frames - given.end
            self.pixels[:, last : given.frames] = end
            self.pixels[:, given.frames :] = end[:, -1:]

    @property
    def frames(self) -> Frames:
        """The clips, when all windows have been painted."""
        return self.pixels[:, : self.given.frames]

    def known(self, window: Window) -> Frames:
        """The input of the encoder for a window's known frames.

        Between them its end is held backwards: latent frames of the end depend on what comes before, and of what could
        be put there a standing picture costs the least (0.3 dB against the true past; nothing at all: 1 dB).
        """
        if not window.tail:
            return self.pixels[:, window.first : window.first + window.head]
        border = window.frames - window.tail
        places = [k if k < window.head else max(k, border) for k in range(window.frames)]
        return self.pixels[:, [self._place(window.first + k) for k in places]]

    def paint(self, window: Window, video: Frames) -> None:
        """Puts the new frames of a decoded window [B, T, H, W, 3] in their place. What was known stays as it is.

        The decoder never gives back quite what it was given. What a known frame lost in it is added to the new frames
        beside it, less with every frame, so that nothing steps where they meet; but only where the picture stands
        still, since a moving edge would leave a ghost. Where the model did not arrive at what it was given, and its
        last step would be a cut, the new frames dissolve into the known one, as far as it takes to hide that.
        """
        first, last = window.head, window.frames - window.tail  # of the new frames
        made = video.astype(np.float32)
        borders = [first - 1] * (window.head > 0) + [last] * (window.tail > 0)
        away = np.array([[abs(k - border) for k in range(first, last)] for border in borders])
        shares = np.cos(np.minimum(away / (FADE + 1), 1.0) * np.pi) / 2 + 0.5
        shares /= np.maximum(shares.sum(0), 1.0)  # the same [borders, new frames]
        new = made[:, first:last].copy()
        given = [self.pixels[:, self._place(window.first + border)].astype(np.float32) for border in borders]
        for border, known, share in zip(borders, given, shares, strict=True):
            moved = np.abs(made[:, first:last] - made[:, [border]]).mean(-1, keepdims=True)
            lost = (known - made[:, border])[:, None]
            new += share[:, None, None, None] * np.exp(-np.square(moved / STILL)) * lost
        for border, known, share in zip(borders, given, shares, strict=True):
            missed = _missed(new if border < first else new[:, ::-1], known)
            new += missed[:, None, None, None, None] * share[:, None, None, None] * (known[:, None] - new)
        for k in range(first, last):
            place = self._place(window.first + k)
            if 0 <= place < self.pixels.shape[1]:  # else it did not fit the time line
                self.pixels[:, place] = np.rint(new[:, k - first]).clip(0, 255)

    def _place(self, frame: int) -> int:
        return frame - self.given.frames if self.given.loop and frame >= self.given.frames else frame


def _missed(new: npt.NDArray[np.float32], known: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """[B] how far new frames [B, T, H, W, 3] must dissolve into the known one [B, H, W, 3] before them, 0..1.

    Not at all where the step between them is like the clip's own, wholly where it is a cut.
    """
    steps = np.abs(np.diff(new[:, : FADE + 1], axis=1)).mean((2, 3, 4))
    usual = np.maximum(steps.mean(1) if steps.shape[1] else 0.0, 1.0)
    ratio = np.maximum(np.abs(new[:, 0] - known).mean((1, 2, 3)) / usual, 1.0)
    return (1 - 1 / ratio) * np.minimum(1.0, (ratio - 1) / (CUT - 1))
