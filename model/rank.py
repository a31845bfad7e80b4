"""One rank of an engine: `python -m model.rank SETTINGS`, started by `model.engine` only.

All ranks get the same jobs in the same order and run the denoising loop in lockstep. Beside the transformer's own there
are three collectives: rank 0 sends the encoded prompts once a job, the latents that a window begins with, and one small
"go on or stop" a step. Rank 0 alone encodes; all decode, each some rows of the picture (`model.rows`). Whatever goes
wrong is reported and ends the process; the parent then ends the others.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from model.conditioning import Canvas, Frames, Window, hold, seed_of, times_from, windows
from model.config import Partition, Shape
from model.engine import ClipSpec, Message, Wire, clips_in
from model.weights import SECOND, TRANSFORMER

if TYPE_CHECKING:
    from torch import Tensor

    from model.dit import DiT
    from model.layers import Heard
    from model.text import TextEncoder
    from model.vae import VAE, WanVAE

PROMPTS_KEPT = 256
HEARD_BYTES = 64 << 20  # of keys and values that are worth keeping from step to step


class Inbox:
    """The parent's messages, read by a thread of its own that ends the process the moment the parent is gone.

    That holds inside a long step too: the thread needs no turn from the one that computes.
    """

    def __init__(self, wire: Wire, parent: int) -> None:
        self.wire, self.parent = wire, parent
        self.jobs: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.dropped: dict[int, set[str]] = {}  # by job: clips that nobody wants any more
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def _read(self) -> None:
        try:
            while True:
                # A forked relative of the parent may hold the other end open after its death, so ask who our parent is.
                while not self.wire.connection.poll(0.5):
                    if os.getppid() != self.parent:
                        os._exit(1)
                message = self.wire.receive()
                if message["type"] == "cancel":
                    self.dropped.setdefault(message["job"], set()).update(message["clips"])
                else:
                    self.jobs.put(message)
        except (EOFError, OSError):
            os._exit(1)


def main() -> None:
    settings = json.loads(sys.argv[1])
    wire = Wire(Connection(settings["wire"]))
    inbox = Inbox(wire, settings["parent"])
    current: list[str] = []  # clips under way
    try:
        started = time.perf_counter()
        rank = Rank(settings, wire, inbox, started)
        while (message := inbox.jobs.get())["type"] == "render":
            current = [clip["clip_id"] for clip in message["clips"]]
            rank.render(message["job"], clips_in(message))
            current = []
    except BaseException as problem:
        import traceback

        traceback.print_exc()
        reason = f"{type(problem).__name__}: {problem}"
        clips = [problem.clip_id] if isinstance(problem, Unrenderable) else current
        with suppress(OSError):
            wire.send({"type": "error", "reason": reason, "clips": clips, "time": time.time()})
        sys.stderr.flush()
        os._exit(1)  # no destructors: in a broken process group they abort
    os._exit(0)


class Rank:
    def __init__(self, settings: dict[str, Any], wire: Wire, inbox: Inbox, started: float) -> None:
        """Imports, joins the group, loads this rank's part, tests it and tells the parent."""
        import torch

        from model import partition
        from model.checkpoint import check_memory, free_bytes
        from model.rows import DividedDecoder
        from model.weights import load_text, load_vae

        torch.set_num_threads(settings["threads"])
        torch.set_grad_enabled(False)
        self.rank: int = settings["rank"]
        self.device: str = settings["device"]
        self.wire, self.inbox, self.slots = wire, inbox, settings["slots"]
        self.frame_step: int = settings["frame_step"]
        self.boundary: float | None = settings["boundary"]
        path, dtype = Path(settings["path"]), getattr(torch, settings["dtype"])
        divided = Partition.parse(settings["partition"])
        self.world = divided.world
        if self.device == "cuda":
            torch.cuda.set_device(self.rank)
            check_memory(path, divided, free_bytes(self.device), dtype.itemsize, self.device)
        laps = {"import": time.perf_counter() - started}

        def lap(name: str) -> None:
            laps[name] = time.perf_counter() - started - sum(laps.values())

        partition.connect(self.rank, self.world, settings["port"], self.device, settings["listener"])
        self.groups = partition.groups_of(divided, self.device)
        lap("connect")
        parts = [TRANSFORMER] if self.boundary is None else [TRANSFORMER, SECOND]
        self.experts = [partition.load_partitioned(path, self.groups, dtype, self.device, part=p) for p in parts]
        if settings["compile"]:
            from model.compiled import check_compiler, compile_blocks

            check_compiler(self.device)
            for dit in self.experts:
                compile_blocks(dit)
        self.text: TextEncoder | None = load_text(path, dtype, self.device) if self.rank == 0 else None
        self.vae: VAE | WanVAE = load_vae(path, torch.float32, self.device)
        self.decoder = DividedDecoder(self.vae, self.rank, self.world)
        self.encoded: OrderedDict[str, Tensor] = OrderedDict()
        lap("load")
        tested = [
            partition.self_test(dit, path, self.groups, dtype, self.device, part, settings["compile"]).error
            for dit, part in zip(self.experts, parts, strict=True)
        ]
        lap("self_test")
        info = {
            "rank": self.rank,
            "pid": os.getpid(),
            "parameter_bytes": sum(map(partition.parameter_bytes, self.experts)),
            "self_test": max(tested),
            "seconds": {name: round(value, 3) for name, value in laps.items()},
        }
        wire.send({"type": "ready", "info": info})

    def render(self, job: int, specs: list[ClipSpec]) -> None:
        """Makes clips that are alike as one batch, window by window; rank 0 decodes them and tells the parent.

        B is the number of clips. A clip that is cancelled under way stays in the batch until all of it is: leaving
        would change the shapes, and with them the last bits of its neighbours.
        """
        from model.diffusion import denoise, schedule, whole_times

        first, started = specs[0], time.time()
        clock = Clock()
        stopped = self._agree(job, specs)
        plan = windows(first.given, self.frame_step)
        times = times_from(schedule(first.steps, first.shift, first.solver), first.strength or 1.0)
        text, negative = self._prepare(specs)  # [B, L, Dt] twice
        texts = [self._heard(dit, text, negative, first.guidance) for dit in self.experts]
        canvas = Canvas(first.given, *given_frames(specs), self.frame_step) if self.rank == 0 else None
        clock.lap("text")
        steps = 0
        for number, window in enumerate(plan):
            x = self._begin(specs, number, window, canvas)  # [B, C, T, H, W]
            clock.lap("decode")
            velocity = self._velocity(first.guidance, texts, window.known(self.frame_step))
            walk = denoise(whole_times(velocity, first.solver), x, times, first.solver)
            while len(stopped) < len(specs) and (after := next(walk, None)) is not None:
                x, steps = after, steps + 1
                if self.rank == 0:
                    said = {"type": "step", "job": job, "step": steps, "steps": len(plan) * (len(times) - 1)}
                    self.wire.send({**said, "time": time.time()})
                stopped = self._agree(job, specs)
            clock.lap("denoise")
            if len(stopped) == len(specs):
                break
            frames = self._decode(specs, window, x, stopped)
            if canvas is not None:
                canvas.paint(window, frames)
            clock.lap("decode")
        for old in [number for number in list(self.inbox.dropped) if number <= job]:
            self.inbox.dropped.pop(old, None)
        if canvas is not None:
            kept = [k for k, spec in enumerate(specs) if spec.clip_id not in stopped]
            self._write(job, list(canvas.frames[kept]))
            clock.lap("decode")
            seconds = {name: value / len(specs) for name, value in clock.laps.items()}
            done = {"type": "done", "job": job, "cancelled": sorted(stopped), "seconds": seconds, "started": started}
            self.wire.send({**done, "time": time.time()})

    def _heard(self, dit: DiT, text: Tensor, negative: Tensor, guidance: float) -> Tensor | list[Heard]:
        """What a transformer is given of the prompts at every step.

        Its blocks' keys and values, unless these are large: beside a long clip making them anew costs next to nothing.
        """
        from model.partition import own_text

        mine = text if guidance == 1 else own_text(text, negative, self.groups.cfg)
        size = 2 * mine.shape[0] * mine.shape[1] * dit.config.width // self.groups.tp.size * dit.config.layers
        return dit.hear(mine) if size * dit.proj_out.weight.element_size() <= HEARD_BYTES else mine

    def _velocity(
        self, guidance: float, texts: Sequence[Tensor | list[Heard]], known: Sequence[bool]
    ) -> Callable[[Tensor, float], Tensor]:
        """The guided velocity of latents [B, C, T, H, W] at a time, `known` latent frames held.

        Where there are two experts, the first one works above the boundary and the second one below.
        """
        experts = [
            hold(self._predictor(dit, guidance, text), known) for dit, text in zip(self.experts, texts, strict=True)
        ]
        boundary = self.boundary or 0.0
        return lambda x, now: experts[now < boundary](x, now)

    def _predictor(self, dit: DiT, guidance: float, text: Tensor | list[Heard]) -> Callable[[Tensor, Tensor], Tensor]:
        """The guided velocity of latents [B, C, T, H, W] at times [B] or [B, T]."""
        from model.diffusion import guide
        from model.partition import both_halves

        def predict(x: Tensor, times: Tensor) -> Tensor:
            if guidance == 1:  # the conditional prediction itself: there is nothing to compare it with
                return dit(x, times, text)
            return guide(*both_halves(dit, x, times, text, self.groups.cfg), guidance)

        return predict

    def _begin(self, specs: list[ClipSpec], number: int, window: Window, canvas: Canvas | None) -> Tensor:
        """Latents [B, C, T, H, W] from rank 0 to all: noise (blended into what is edited), and what is known."""
        import torch
        import torch.distributed as dist

        from model.diffusion import blend, noise

        x, size = torch.zeros(0), torch.zeros(5, dtype=torch.int64)
        if canvas is not None:
            latent = self.vae.latent_shape(Shape(specs[0].width, specs[0].height, window.frames))
            x = torch.stack([noise(seed_of(spec.seed, number), latent) for spec in specs])
            if specs[0].strength is not None:
                draft = self._encode_frames(drafts(specs, window))
                x = blend(draft, x, torch.tensor(specs[0].strength))
            if any(known := window.known(self.frame_step)):
                clean, places = self._encode_frames(canvas.known(window)), torch.tensor(known).nonzero().flatten()
                x[:, :, places] = clean[:, :, places]
            size = torch.tensor(x.shape)
        if self.world > 1:
            dist.broadcast(size, 0)
            if canvas is None:
                x = torch.empty(*size.tolist())
            dist.broadcast(x, 0)
        return x.to(self.device)

    def _encode_frames(self, pixels: Frames) -> Tensor:
        """[B, T, H, W, 3] -> latents on the CPU, clip by clip to bound memory."""
        import torch

        from model.vae import to_video

        latents: list[Tensor] = []
        for clip in pixels:
            latents.append(self.vae.encode(to_video(clip[None], self.device))[0].float().cpu())
        return torch.stack(latents)

    def _agree(self, job: int, specs: list[ClipSpec]) -> set[str]:
        """The clips that rank 0 has been told to stop: all ranks must see the same, at the same step."""
        import torch
        import torch.distributed as dist

        dropped = self.inbox.dropped.get(job, set()) if self.rank == 0 else set[str]()
        flags = torch.tensor([spec.clip_id in dropped for spec in specs], dtype=torch.uint8)
        if self.world > 1:
            dist.broadcast(flags, 0)
        return {spec.clip_id for spec, flag in zip(specs, flags.tolist(), strict=True) if flag}

    def _prepare(self, specs: list[ClipSpec]) -> tuple[Tensor, Tensor]:
        """Encoded prompts and negative prompts [B, L, Dt], from rank 0 to all."""
        import torch
        import torch.distributed as dist

        size, both = torch.zeros(3, dtype=torch.int64), torch.zeros(0)
        if self.rank == 0:
            words = [spec.prompt for spec in specs] + [spec.negative_prompt for spec in specs]
            both = torch.stack([self._encode(prompt) for prompt in words])  # [2B, L, Dt]
            size = torch.tensor(both.shape)
        if self.world > 1:
            dist.broadcast(size, 0)
            if self.rank != 0:
                both = torch.empty(*size.tolist())
            dist.broadcast(both, 0)
        text, negative = both.to(self.device).chunk(2)
        return text, negative

    def _encode(self, prompt: str) -> Tensor:
        """[L, Dt] on the CPU; the last prompts are remembered, the empty negative one among them."""
        assert self.text is not None
        if prompt not in self.encoded:
            self.encoded[prompt] = self.text.encode([prompt])[0].float().cpu()
            if len(self.encoded) > PROMPTS_KEPT:
                self.encoded.popitem(last=False)
        self.encoded.move_to_end(prompt)
        return self.encoded[prompt]

    def _decode(self, specs: list[ClipSpec], window: Window, latents: Tensor, stopped: set[str]) -> Frames:
        """[B, C, T, H, W] -> frames [B, T, H, W, 3], clip by clip; black where a clip was cancelled.

        Rank 0 alone gets the frames. Every rank has the same latents, and stops where they are not finite.
        """
        frames: Frames = np.zeros((len(specs), window.frames, specs[0].height, specs[0].width, 3), np.uint8)
        for k, (spec, latent) in enumerate(zip(specs, latents, strict=True)):
            if spec.clip_id in stopped:
                continue
            if not bool(latent.isfinite().all()):
                reason = f"the model computed latents that are not finite (guidance={spec.guidance})"
                raise Unrenderable(spec.clip_id, reason)
            pixels = self.decoder.decode(latent[None])
            if pixels is None:
                continue
            if pixels.shape != frames.shape[1:]:
                raise Unrenderable(spec.clip_id, f"the decoder gave {pixels.shape} for {window.frames} frames")
            frames[k] = pixels
        return frames

    def _write(self, job: int, clips: Sequence[Frames]) -> None:
        """Lays the frames of the clips one after the other into the job's memory file."""
        slot, offset = self.slots[job % len(self.slots)], 0
        os.ftruncate(slot, 0)
        for frames in clips:
            view = np.ascontiguousarray(frames).reshape(-1).data
            while view:
                count = os.pwrite(slot, view, offset)
                view, offset = view[count:], offset + count


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = dict.fromkeys(("text", "denoise", "decode"), 0.0)
        self.last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """What has passed since the last call went into this stage."""
        now = time.perf_counter()
        self.laps[stage] += now - self.last
        self.last = now


def given_frames(specs: list[ClipSpec]) -> tuple[Frames, Frames]:
    """What clips that are alike begin and end with, [B, n, H, W, 3] each."""
    nothing: Frames = np.zeros((0, specs[0].height, specs[0].width, 3), np.uint8)
    kept = [nothing if spec.start is None or spec.strength is not None else spec.start for spec in specs]
    return np.stack(kept), np.stack([nothing if spec.end is None else spec.end for spec in specs])


def drafts(specs: list[ClipSpec], window: Window) -> Frames:
    """The part of what is edited that a window covers, [B, T, H, W, 3]; a short one is held."""
    parts: list[Frames] = []
    for spec in specs:
        assert spec.start is not None
        places = np.arange(window.first, window.first + window.frames).clip(0, len(spec.start) - 1)
        parts.append(spec.start[places])
    return np.stack(parts)


class Unrenderable(Exception):
    """One clip of a batch has no pixels. The parent reports it as RenderFailed."""

    def __init__(self, clip_id: str, reason: str) -> None:
        super().__init__(reason)
        self.clip_id = clip_id


if __name__ == "__main__":
    main()
