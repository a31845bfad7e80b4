"""One rank of an engine: `python -m model.rank SETTINGS`, started by `model.engine` only.

All ranks get the same jobs in the same order and run the denoising loop in lockstep. Beside the transformer's own there
are two collectives: rank 0 sends the encoded prompts once a job, and one small "go on or stop" a step. Rank 0 alone has
the text encoder and the decoder. Whatever goes wrong is reported and ends the process; the parent then ends the others.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.config import Partition, Shape
from model.engine import ClipSpec, Frames, Message, Wire

if TYPE_CHECKING:
    from torch import Tensor

    from model.text import TextEncoder
    from model.vae import VAE, WanVAE

PROMPTS_KEPT = 256


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
            rank.render(message["job"], [ClipSpec(**clip) for clip in message["clips"]])
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
        from model.weights import load_text, load_vae

        torch.set_num_threads(settings["threads"])
        torch.set_grad_enabled(False)
        self.rank: int = settings["rank"]
        self.device: str = settings["device"]
        self.wire, self.inbox, self.slots = wire, inbox, settings["slots"]
        path, dtype = Path(settings["path"]), getattr(torch, settings["dtype"])
        divided = Partition.parse(settings["partition"])
        self.world = divided.world
        if self.device == "cuda":
            torch.cuda.set_device(self.rank)
        laps = {"import": time.perf_counter() - started}

        def lap(name: str) -> None:
            laps[name] = time.perf_counter() - started - sum(laps.values())

        partition.connect(self.rank, self.world, settings["port"], self.device, settings["listener"])
        self.groups = partition.groups_of(divided, self.device)
        lap("connect")
        self.dit = partition.load_partitioned(path, self.groups, dtype, self.device)
        self.text: TextEncoder | None = None
        self.vae: VAE | WanVAE | None = None
        if self.rank == 0:
            self.text, self.vae = load_text(path, dtype, self.device), load_vae(path, torch.float32, self.device)
        self.encoded: OrderedDict[str, Tensor] = OrderedDict()
        lap("load")
        tested = partition.self_test(self.dit, path, self.groups, dtype, self.device)
        lap("self_test")
        info = {
            "rank": self.rank,
            "pid": os.getpid(),
            "parameter_bytes": partition.parameter_bytes(self.dit),
            "self_test": tested.error,
            "seconds": {name: round(value, 3) for name, value in laps.items()},
        }
        wire.send({"type": "ready", "info": info})

    def render(self, job: int, specs: list[ClipSpec]) -> None:
        """Denoises clips that are alike as one batch; rank 0 decodes them and tells the parent.

        B is the number of clips. A clip that is cancelled under way stays in the batch until all of it is: leaving
        would change the shapes, and with them the last bits of its neighbours.
        """
        import torch

        from model.diffusion import denoise, guide, noise, schedule
        from model.partition import both_halves

        started, clock = time.time(), time.perf_counter()
        stopped = self._agree(job, specs)
        steps, first = 0, specs[0]
        text, negative, size = self._prepare(specs)  # [B, L, Dt] twice, (C, T, H, W)
        x = torch.stack([noise(spec.seed, size) for spec in specs]).to(self.device)  # [B, C, T, H, W]
        text_seconds, clock = time.perf_counter() - clock, time.perf_counter()

        def velocity(x: Tensor, now: float) -> Tensor:
            times = torch.full((len(specs),), now, device=self.device)
            if first.guidance == 1:  # the conditional prediction itself: there is nothing to compare it with
                return self.dit(x, times, text)
            return guide(*both_halves(self.dit, x, times, text, negative, self.groups.cfg), first.guidance)

        walk = denoise(velocity, x, schedule(first.steps, first.shift), first.solver)
        while len(stopped) < len(specs) and (after := next(walk, None)) is not None:
            x, steps = after, steps + 1
            if self.rank == 0:
                self.wire.send({"type": "step", "job": job, "step": steps, "time": time.time()})
            stopped = self._agree(job, specs)
        for old in [number for number in list(self.inbox.dropped) if number <= job]:
            self.inbox.dropped.pop(old, None)
        if self.rank == 0:
            denoise_seconds, clock = time.perf_counter() - clock, time.perf_counter()
            self._write(job, [(spec, x[k]) for k, spec in enumerate(specs) if spec.clip_id not in stopped])
            whole = {"text": text_seconds, "denoise": denoise_seconds, "decode": time.perf_counter() - clock}
            seconds = {name: value / len(specs) for name, value in whole.items()}
            done = {"type": "done", "job": job, "cancelled": sorted(stopped), "seconds": seconds, "started": started}
            self.wire.send({**done, "time": time.time()})

    def _agree(self, job: int, specs: list[ClipSpec]) -> set[str]:
        """The clips that rank 0 has been told to stop: all ranks must see the same, at the same step."""
        import torch
        import torch.distributed as dist

        dropped = self.inbox.dropped.get(job, set()) if self.rank == 0 else set[str]()
        flags = torch.tensor([spec.clip_id in dropped for spec in specs], dtype=torch.uint8)
        if self.world > 1:
            dist.broadcast(flags, 0)
        return {spec.clip_id for spec, flag in zip(specs, flags.tolist(), strict=True) if flag}

    def _prepare(self, specs: list[ClipSpec]) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """Encoded prompts and negative prompts [B, L, Dt] and the size of a latent (C, T, H, W), from rank 0 to all."""
        import torch
        import torch.distributed as dist

        head = torch.zeros(6, dtype=torch.int64)
        both = torch.zeros(0)
        if self.rank == 0:
            assert self.vae is not None
            latent = self.vae.latent_shape(Shape(specs[0].width, specs[0].height, specs[0].frames))
            words = [spec.prompt for spec in specs] + [spec.negative_prompt for spec in specs]
            both = torch.stack([self._encode(prompt) for prompt in words])  # [2B, L, Dt]
            head = torch.tensor([*latent, *both.shape[1:]])
        if self.world > 1:
            dist.broadcast(head, 0)
            if self.rank != 0:
                both = torch.empty(2 * len(specs), *head[4:].tolist())
            dist.broadcast(both, 0)
        text, negative = both.to(self.device).chunk(2)
        return text, negative, tuple(head[:4].tolist())

    def _encode(self, prompt: str) -> Tensor:
        """[L, Dt] on the CPU; the last prompts are remembered, the empty negative one among them."""
        assert self.text is not None
        if prompt not in self.encoded:
            self.encoded[prompt] = self.text.encode([prompt])[0].float().cpu()
            if len(self.encoded) > PROMPTS_KEPT:
                self.encoded.popitem(last=False)
        self.encoded.move_to_end(prompt)
        return self.encoded[prompt]

    def _write(self, job: int, latents: list[tuple[ClipSpec, Tensor]]) -> None:
        """Decodes clip by clip, and lays the frames one after the other into the job's memory file."""
        assert self.vae is not None
        slot, offset = self.slots[job % len(self.slots)], 0
        os.ftruncate(slot, 0)
        for spec, latent in latents:
            if not bool(latent.isfinite().all()):
                reason = f"the model computed latents that are not finite (guidance={spec.guidance})"
                raise Unrenderable(spec.clip_id, reason)
            video = self.vae.decode(latent[None])[0]  # [3, T, H, W] in -1..1
            pixels = ((video.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).contiguous().cpu()
            frames: Frames = pixels.numpy()
            if frames.shape != (spec.frames, spec.height, spec.width, 3):
                raise Unrenderable(spec.clip_id, f"the decoder gave {frames.shape} for {spec.frames} frames")
            view = frames.reshape(-1).data
            while view:
                count = os.pwrite(slot, view, offset)
                view, offset = view[count:], offset + count


class Unrenderable(Exception):
    """One clip of a batch has no pixels. The parent reports it as RenderFailed."""

    def __init__(self, clip_id: str, reason: str) -> None:
        super().__init__(reason)
        self.clip_id = clip_id


if __name__ == "__main__":
    main()
