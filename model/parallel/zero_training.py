"""A training's AdamW divided over its ranks by DeepSpeed's ZeRO. All of DeepSpeed's training lives here.

Stage 1 divides AdamW's moments and the copy of the weights that it updates, stage 2 the summed gradients as well. Every
rank has the whole network to compute with. A checkpoint's moments go in and out whole, so a run may go on divided in
another way, or not at all. It knows nothing of batches, rates or files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.parallel.mesh import load_deepspeed

MOMENTS = ("exp_avg", "exp_avg_sq")  # as AdamW calls them
BUCKET = 50_000_000  # gradients summed at once; DeepSpeed's own 500 million would be a buffer of 2 GB


class Zero:
    """A network with its AdamW, divided. Called, it is the network; `step` is backward, clipping and AdamW.

    The process group must stand already. The optimizer must be new; its rates may be set at any time.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.AdamW,
        stage: int,
        *,
        device: str,
        bfloat16: bool,
        clip: float,
    ) -> None:
        """`clip` bounds the norm of the whole gradient. With `bfloat16` the network computes under autocast."""
        self.optimizer = optimizer
        # DeepSpeed puts one flat part of each group in the place of its parameters.
        self.groups: list[list[nn.Parameter]] = [list(group["params"]) for group in optimizer.param_groups]
        size = sum(parameter.numel() for group in self.groups for parameter in group)
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # must be there, and is only counted
            "gradient_clipping": clip,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": min(size, BUCKET)},
            # An autocast from outside would be switched off. With modules in the list, their gradients would be summed
            # in bfloat16.
            "torch_autocast": {"enabled": bfloat16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        }
        deepspeed = load_deepspeed(device)
        self.engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=config)
        for part in self._parts():
            # AdamW would make them at its first step, too late for all groups but the first: DeepSpeed looks for them
            # when that one is done, and never again.
            zeros = {key: torch.zeros_like(part) for key in MOMENTS}
            optimizer.state[part] = {"step": torch.zeros((), device=part.device), **zeros}

    def __call__(self, *inputs: Any) -> Any:
        return self.engine(*inputs)

    def step(self, loss: Tensor) -> None:
        """Learns from the mean of all ranks' losses."""
        self.engine.backward(loss)
        self.engine.step()

    def moments(self) -> Iterator[dict[str, Tensor]]:
        """AdamW's moments of every parameter, whole, one after the other. Every rank must ask for all of them."""
        from deepspeed.utils import safe_get_full_optimizer_state

        for group, part in zip(self.groups, self._parts(), strict=True):
            for parameter in group:
                whole: dict[str, Any] = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
                yield {"step": self.optimizer.state[part]["step"], **whole}

    def load(self, moments: Sequence[Mapping[str, Tensor]]) -> None:
        """Takes this rank's part of what `moments` gave, and of the weights that the network has now."""
        first = 0
        for group, part in zip(self.groups, self._parts(), strict=True):
            self.optimizer.state[part]["step"].copy_(moments[first]["step"])
            first += len(group)
        # DeepSpeed cuts moments only after a first step, but weights always: so each takes their place for a moment.
        for key in MOMENTS:
            self._cut([of_one[key] for of_one in moments])
            for part in self._parts():
                self.optimizer.state[part][key].copy_(part.detach())
        self._cut([parameter for group in self.groups for parameter in group])

    def _parts(self) -> list[Tensor]:
        """The flat part of each group that this rank's AdamW updates."""
        return [group["params"][0] for group in self.optimizer.param_groups]

    def _cut(self, wholes: Sequence[Tensor]) -> None:
        """Fills the parts from tensors like the parameters."""
        from deepspeed.utils import safe_set_full_fp32_param

        parameters = [parameter for group in self.groups for parameter in group]
        for parameter, whole in zip(parameters, wholes, strict=True):
            safe_set_full_fp32_param(parameter, whole)
