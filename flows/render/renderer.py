"""`Renderer`: an engine as shards and workers know it, without its processes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Protocol

from model.engine.clip import ClipSpec, RenderedClip, RenderFailed, SavedState


class Renderer(Protocol):
    """One loaded model that renders clips. `model.engine.engine.Engine` is one; its docstrings are the contract."""

    def start(self) -> None:
        """Starts the ranks and waits until they have loaded the model; nothing to do where they run.

        Raises StartFailed, RankDied or RankHung.
        """
        ...

    def close(self) -> None:
        """Ends the ranks in order."""
        ...

    def kill(self) -> None:
        """Ends the ranks now, from any thread: one that renders gets RankDied."""
        ...

    def fingerprint(self, spec: ClipSpec) -> str:
        """The digest of all that must be the same where this clip goes on from a checkpoint, to the same bits."""
        ...

    def render(
        self,
        specs: Sequence[ClipSpec],
        *,
        on_step: Callable[[str, int, int], None] = ...,
        cancelled: Callable[[], set[str]] = ...,
        on_failure: Callable[[RenderFailed], None] | None = None,
        on_checkpoint: Callable[[SavedState], None] | None = None,
        checkpoint_every: tuple[int, float] = (0, 0.0),
        leave: Callable[[], bool] = ...,
    ) -> Generator[RenderedClip]:
        """Yields clip by clip as they are done. Raises RenderFailed; RankDied or RankHung, and the ranks are gone then.

        on_step: is told (clip, step, steps) when a clip begins, and after each denoising step. cancelled: clips that
        are to stop at their next step. on_failure: is told of a clip that cannot be made, while the others go on.
        on_checkpoint: is given resume states after so many steps and seconds (`checkpoint_every`; 0: never), and when
        `leave()` says that clips under way are to be kept and no other begun.
        """
        ...
