"""When another engine may be started, after some could not start: decisions only, on plain values.

What keeps one engine from starting mostly keeps the next: a missing GPU, a broken model, a wrong password on a host. So
each failed try doubles the pause before the next one, up to MOST seconds, and until one gets ready only one is tried at
a time. Nothing is given up: the first engine that gets ready, also one started by hand, ends all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

FIRST = 5.0  # seconds of the first pause
MOST = 300.0  # seconds of the longest


class Failed(Protocol):
    """A start that failed; times in seconds before now."""

    @property
    def began(self) -> float: ...
    @property
    def ended(self) -> float: ...
    @property
    def host(self) -> str: ...
    @property
    def error(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Pause:
    """The pause after tries that failed."""

    tries: int  # in a row
    left: float  # seconds; 0: one more engine may be tried

    @property
    def room(self) -> int:
        """Engines that may be starting now."""
        return int(self.left <= 0)


def tries(failed: Sequence[Failed]) -> int:
    """How many tries these starts were: engines that began before the last one's end was known belong to its try."""
    count, over = 0, float("inf")
    for start in sorted(failed, key=lambda start: (-start.ended, -start.began)):
        if start.began <= over:
            count, over = count + 1, start.ended
    return count


def pause(failed: Sequence[Failed]) -> Pause | None:
    """The pause that starts which failed in a row call for. None: nothing failed."""
    if not failed:
        return None
    count = tries(failed)
    length = min(MOST, FIRST * 2.0 ** min(count - 1, 30))
    return Pause(count, max(0.0, length - min(start.ended for start in failed)))


def tell(failed: Sequence[Failed], now: datetime) -> str:
    """How many tries failed in a row, why the last one did, and when the next is made. failed: not empty."""
    last, paused = min(failed, key=lambda start: start.ended), pause(failed)
    assert paused is not None

    def clock(seconds: float) -> str:
        return f"{(now + timedelta(seconds=seconds)).astimezone():%H:%M:%S %Z}"

    count = "a try" if paused.tries == 1 else f"{paused.tries} tries in a row"
    said = f"engines cannot start: {count} failed, the last on {last.host} at {clock(-last.ended)}: {last.error}"
    return f"{said.rstrip('.')}. The next one is made {f'at {clock(paused.left)}' if paused.left else 'now'}"
