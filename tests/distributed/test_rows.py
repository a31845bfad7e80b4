"""A decoder divided by rows gives the picture that one rank decodes, without a seam."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from model.loading.load import load_vae
from model.network.vae import to_pixels
from model.parallel.vae_rows import DividedDecoder
from tests.tiny import tiny_model, tiny_wan

MODELS = ("mini", "2.1", "2.2-ti2v")
ROWS = {2: (2, 5, 8), 3: (3, 7), 4: (4, 6)}  # that divide, and that do not


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models whose decoders are loud enough everywhere for a wrong row to be seen."""
    root = tmp_path_factory.mktemp("models")
    made = {"mini": tiny_model(root / "mini")}
    return made | {release: tiny_wan(root / release, release) for release in MODELS[1:]}


class Watched(DividedDecoder):
    """It remembers this rank's rows before they are rounded."""

    def video(self, latents: torch.Tensor) -> torch.Tensor:
        self.seen = super().video(latents)
        return self.seen


def decode(rank: int, world: int, folders: dict[str, Path], out: Path) -> None:
    """One rank: every model, every number of rows."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    dist.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=world)
    for name, folder in folders.items():
        whole, vae = load_vae(folder, torch.float32), load_vae(folder, torch.float32)
        divided = Watched(vae, rank, world)
        channels = 48 if name == "2.2-ti2v" else 16
        for rows in (1, *ROWS[world]):  # one row cannot be divided
            latents = torch.randn(1, channels, 2, rows, 3, generator=torch.Generator().manual_seed(rows))
            frames = divided.decode(latents)
            wanted = whole.decode(latents)
            scale = wanted.shape[-2] // rows
            first, last = (scale * (rows * k // world) for k in (rank, rank + 1))
            if rows >= world:
                mine = wanted[..., first:last, :]
                np.testing.assert_allclose(divided.seen.numpy(), mine.numpy(), atol=1e-4, err_msg=f"{name} {rows} rows")
                assert mine.std() > 0.01, "a picture of nothing proves nothing"
            assert (frames is None) == (rank > 0)
            if frames is not None:
                assert np.abs(frames.astype(int) - to_pixels(wanted)[0]).max() <= 1, f"{name} {rows} rows"
    dist.destroy_process_group()


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("world", [3, *(pytest.param(world, marks=pytest.mark.chaos) for world in (2, 4))])
def test_divided_by_rows_equals_whole(world: int, folders: dict[str, Path], tmp_path: Path) -> None:
    mp.spawn(decode, (world, folders, tmp_path), nprocs=world)


def test_a_single_rank_decodes_as_before(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        vae = load_vae(folder, torch.float32)
        latents = torch.randn(1, 48 if "ti2v" in folder.name else 16, 2, 2, 3)
        wanted = to_pixels(vae.decode(latents))[0]
        frames = DividedDecoder(vae, 0, 1).decode(latents)
        assert frames is not None and np.array_equal(frames, wanted)
