"""An engine: one model on some ranks of this machine, as the rest of the platform sees it.

The engine's process knows processes and bytes, no tensors: torch lives in the ranks. Every rank gets the same messages
in the same order over a socket pair of its own (`model.engine.wire`); rank 0 answers. `model.engine.ranks` keeps the
processes, `model.engine.rendering` the clips under way; here is decided when both begin, end and begin anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from model.config import Partition
from model.engine.clip import (
    ClipSpec,
    EngineError,
    OutOfMemory,
    RankInfo,
    RenderedClip,
    RenderFailed,
    SavedState,
    StartFailed,
)
from model.engine.messages import Compile, Device, RankSettings
from model.engine.ranks import Ranks
from model.engine.rendering import Callbacks, Made, Rendering
from model.engine.resume import fingerprint
from model.loading.card import find_model
from model.parallel.memory import NotEnoughMemory, check_memory, free_bytes

AHEAD = 1  # clips that ranks are given beyond those that they denoise
# Memory that a rank frees is kept for the next step (mallopt(3)): glibc would give large tensors back to the kernel and
# take them from it page by page, at every layer. mini's steps of eight rows took an eighth longer so.
KEPT_MEMORY = {f"MALLOC_{name}_THRESHOLD_": str(1 << 30) for name in ("MMAP", "TRIM")}


class Engine:
    """One model on `partition.world` ranks of this machine. Not for use from two threads at a time.

    step_timeout: seconds without a sign of life (a step, a decoded clip) after which the ranks count as hung: for each
        row of a batch, of which a forward may compute `micro_batch`.
    start_timeout: seconds in which ranks that load may read nothing, after which they count as hung.
    micro_batch: clips of one shape that are denoised together; they join and leave between any two steps. A clip's
        bytes do not depend on its neighbours (`model.engine.batch`), but may on this number. Halved when memory runs
        out.
    dtype: of the transformer; by default float32 on a CPU and bfloat16 on CUDA.
    compile: torch compiles the transformer's blocks (`model.network.compiled`): quicker steps, a slower start, other
        last bits; "reduce-overhead" replays them as CUDA graphs. The first step of a shape may then take minutes, so
        `step_timeout` is at least ten of them.
    cache: folder in which compiled code is kept for the next start; by default torch's own.
    gpus: the numbers of the GPUs that the ranks may use, one each; by default the first ones.
    log: where the ranks' standard output and error go: a file, or a function that is called with the number of a rank
        and a line, in a thread of each; by default this process's standard error.
    """

    def __init__(
        self,
        path: str | Path,
        partition: Partition,
        *,
        device: Device = "cpu",
        threads_per_rank: int = 1,
        micro_batch: int = 1,
        step_timeout: float = 180.0,
        start_timeout: float = 600.0,
        dtype: Literal["float32", "bfloat16"] | None = None,
        compile: Compile = False,
        cache: Path | None = None,
        gpus: Sequence[int] | None = None,
        log: Path | Callable[[int, str], None] | None = None,
    ) -> None:
        """Raises ModelNotFound for a path that holds no model, ValueError for a partition that does not divide it."""
        if micro_batch < 1:
            raise ValueError(f"micro_batch={micro_batch} must be at least 1")
        self.card = find_model(path)
        partition.check_heads(self.card.heads)
        self.partition, self.threads_per_rank = partition, threads_per_rank
        self.device: Device = device
        self.compile: Compile = compile
        self.micro_batch, self.step_timeout, self.start_timeout = micro_batch, step_timeout, start_timeout
        self.dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
        self.cache, self.gpus, self.log = cache, gpus, log
        if compile:
            self.step_timeout = max(step_timeout, 600.0)
        self.ready: tuple[RankInfo, ...] = ()
        self._ranks: Ranks | None = None
        self._rendering: Rendering | None = None

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    @property
    def running(self) -> bool:
        return self._ranks is not None

    def fingerprint(self, spec: ClipSpec) -> str:
        """Digest of all that must be equal for this clip to go on from a resume state to the same bits."""
        numerics = [
            *(
                str(self.partition),
                self.device,
                "bfloat16, times in float32" if self.dtype == "bfloat16" else self.dtype,
            ),
            *(f"{self.threads_per_rank} threads", f"{self.micro_batch} at a time", f"compile {self.compile}"),
            *(info.device for info in self.ready),
        ]
        return fingerprint(spec, self.card.digest, numerics)

    def start(self) -> None:
        """Starts the ranks and waits until every one has loaded and tested its part. Nothing to do if they run.

        Raises StartFailed, RankDied or RankHung; no rank is left then.
        """
        if self._ranks is not None:
            return
        if self.device == "cpu":  # a rank looks at its own GPU itself
            size = 4 if self.dtype == "float32" else 2
            try:
                check_memory(self.card.path, self.partition, free_bytes("cpu"), size, "cpu")
            except NotEnoughMemory as error:
                raise StartFailed(str(error)) from None
        ranks = self._ranks = Ranks(
            self.partition.world, self._settings(), self._environment(), self.log, self.micro_batch + AHEAD
        )
        try:
            ranks.start(self.start_timeout)
        except BaseException:
            self._end()
            raise
        self.ready = ranks.ready
        self._rendering = Rendering(ranks, self.fingerprint)

    def close(self) -> None:
        """Asks the ranks to leave, and ends those that have not within two seconds."""
        if self._ranks is not None:
            self._ranks.close()
        self._end()

    def kill(self) -> None:
        """Ends the ranks now, in the middle of their work. From any thread: one that renders gets RankDied."""
        if (ranks := self._ranks) is not None:
            ranks.kill()

    def render(
        self,
        specs: Sequence[ClipSpec],
        *,
        on_step: Callable[[str, int, int], None] = lambda clip_id, step, steps: None,
        cancelled: Callable[[], set[str]] = set,
        on_failure: Callable[[RenderFailed], None] | None = None,
        on_checkpoint: Callable[[SavedState], None] | None = None,
        checkpoint_every: tuple[int, float] = (0, 0.0),
        leave: Callable[[], bool] = lambda: False,
    ) -> Generator[RenderedClip]:
        """Yields clip by clip as they are done; the ranks work on while the caller looks at one.

        `on_step(clip_id, step, steps)` is called with step 0 when a clip's turn has come, and after each denoising
        step; a clip made in several windows takes more of them than it asks for, an edit fewer. `cancelled()` is asked
        many times a second for the ids that nobody wants any more: a running one stops at its next step, and none of
        them is yielded. `on_failure` is told of a clip that the model cannot make; the others go on. Without it, that
        is raised.
        `on_checkpoint` is given how far a running clip has come after so many steps and after so many seconds
        (`checkpoint_every`; 0: never). A clip that goes on from there is told to `on_step` with that step first. When
        `leave()` says so, clips under way are given to `on_checkpoint` at their next step and dropped, and no other
        one begins.
        Out of memory, the engine starts again with half as many clips at a time, down to one.
        Raises RenderFailed. Raises RankDied or RankHung; the ranks are gone then.
        """
        callbacks = Callbacks(
            on_step=on_step,
            cancelled=cancelled,
            on_checkpoint=on_checkpoint,
            checkpoint_every=checkpoint_every,
            leave=leave,
        )
        left = dict(enumerate(specs))
        while True:
            try:
                for place, made in self._clips(left, callbacks):
                    del left[place]
                    if isinstance(made, RenderedClip):
                        yield made
                    elif on_failure is not None:
                        on_failure(made)
                    else:
                        raise made
                return
            except OutOfMemory:
                if self.micro_batch == 1:
                    raise
                self.micro_batch //= 2
                self.start()

    def _clips(self, specs: Mapping[int, ClipSpec], callbacks: Callbacks) -> Generator[Made]:
        """Clips as they are done; ends the ranks where one of them fails."""
        if self._rendering is None:
            raise EngineError("the engine has not been started")
        try:
            yield from self._rendering.clips(specs, callbacks, lambda: self.step_timeout * self.micro_batch)
        except EngineError:
            self._end()
            raise

    def _settings(self) -> RankSettings:
        return RankSettings(
            path=str(self.card.path),
            partition=str(self.partition),
            device=self.device,
            dtype=self.dtype,
            threads=self.threads_per_rank,
            micro_batch=self.micro_batch,
            compile=self.compile,
            frame_step=self.card.frame_step,
            boundary=self.card.boundary,
        )

    def _environment(self) -> dict[str, str]:
        """The variables of a rank beside this process's own."""
        own = {
            "OMP_NUM_THREADS": str(self.threads_per_rank),
            "DS_ACCELERATOR": self.device,  # else DeepSpeed looks for one, and warns
            "GLOO_SOCKET_IFNAME": "lo",  # else gloo listens wherever the host's name points
            "HF_HUB_OFFLINE": "1",  # a rank reads its model folder and nothing else
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **(KEPT_MEMORY if self.device == "cpu" else {}),
            **({"TORCHINDUCTOR_CACHE_DIR": str(self.cache)} if self.cache else {}),
        }
        if self.gpus is not None and self.device == "cuda":
            shown = os.environ.get("CUDA_VISIBLE_DEVICES")  # the numbers count those that this process sees
            names = shown.split(",") if shown else [str(number) for number in range(max(self.gpus) + 1)]
            own["CUDA_VISIBLE_DEVICES"] = ",".join(names[number] for number in self.gpus)
        return own

    def _end(self) -> None:
        """Ends every rank now."""
        if self._ranks is not None:
            self._ranks.end()
        self._ranks, self._rendering, self.ready = None, None, ()
