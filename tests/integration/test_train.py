"""Training can be killed at any moment and goes on as if nothing had happened."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from model.config import ClipShape, DiTConfig
from model.language.captioner import Reporter
from model.loading.card import find_model, folder_digest
from model.loading.load import load_dit, load_text, load_vae
from model.media.windows import Canvas, Given, windows
from model.network.diffusion import noise
from model.network.vae import to_video
from model.train.__main__ import publish
from model.train.autoencoder import encode_latents, train_decoder, train_vae, trained_vae
from model.train.captioner import train_captioner
from model.train.clips import clips_of, render, scene_of
from model.train.config import TrainConfig
from model.train.data import Bucket
from model.train.loop import Checkpoint, join
from model.train.transformer import Stock, draw_known, draw_times, train_dit

SMALL = """
import sys
from pathlib import Path
from tests.integration.test_train import small, train_all
train_all(small(Path(sys.argv[1])))
"""


def small(work: Path) -> TrainConfig:
    return TrainConfig(
        work=work,
        threads=1,
        buckets=(
            Bucket(shape=ClipShape(32, 32, 9), clips=16, share=0.7, batch=4),
            Bucket(shape=ClipShape(48, 32, 1), clips=16, share=0.3, batch=4),
        ),
        dit=DiTConfig(layers=1, heads=2, head_dim=12, ffn_dim=32, text_dim=16),
        chunk=8,
        held_back=4,
        vae_steps=6,
        decoder_steps=4,
        dit_steps=9,
        clip=0.3,  # less than every gradient's norm
        every=2,
    )


def train_all(config: TrainConfig) -> None:
    torch.set_num_threads(1)
    config.work.mkdir(exist_ok=True)
    render(config, processes=1)
    train_vae(config)
    encode_latents(config)
    train_decoder(config)
    train_dit(config)


def start(work: Path) -> subprocess.Popen[bytes]:
    root = Path(__file__).parents[2]
    return subprocess.Popen([sys.executable, "-c", SMALL, str(work)], cwd=root, start_new_session=True)


def lines(log: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def kill_after_first_line(work: Path, log: str) -> None:
    child = start(work)
    try:
        deadline = time.monotonic() + 300
        while not lines(work / log):
            assert child.poll() is None, "training ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("training") / "whole"
    train_all(small(work))
    return work


def test_a_killed_training_ends_with_the_same_weights(trained: Path, tmp_path: Path) -> None:
    work = tmp_path / "killed"
    kill_after_first_line(work, "vae.jsonl")
    kill_after_first_line(work, "dit.jsonl")
    assert start(work).wait(300) == 0
    for stage in ("vae", "decoder", "dit"):
        whole, resumed = (load_file(folder / f"{stage}.safetensors") for folder in (trained, work))
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), stage
        assert lines(trained / f"{stage}.jsonl")[-1]["step"] == lines(work / f"{stage}.jsonl")[-1]["step"]
        curve = {row["step"]: row for row in lines(work / f"{stage}.jsonl")}
        for row in lines(trained / f"{stage}.jsonl"):
            again = curve[row["step"]]
            held_out = [key for key in row if key.startswith("held_out")]
            assert [again[key] for key in held_out] == [row[key] for key in held_out]


def test_the_decoder_goes_on_alone(trained: Path) -> None:
    before, after = (trained_vae(small(trained), finished=done).state_dict() for done in (False, True))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith("encoder.")} <= same  # what was trained on its latents holds
    assert not {name for name in before if name.startswith("decoder.") and name.endswith("weight")} <= same


def test_publish_writes_a_model_that_loads(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "mini"
    publish(small(trained), out)
    card = find_model(out)
    assert (card.multiple, card.frame_step, card.heads) == (16, 4, 2)
    assert all(file.suffix in (".json", ".safetensors") for file in out.rglob("*") if file.is_file())
    dit, vae, text = (load(out, torch.float32) for load in (load_dit, load_vae, load_text))
    latents = noise(1, vae.latent_shape(ClipShape(32, 32, 9)))[None]
    velocity = dit(latents, torch.tensor([1.0]), text.encode(["a red ball"]))
    assert velocity.shape == latents.shape
    assert velocity.isfinite().all()
    assert text.unknown_words("a red quokka bounces") == ["quokka"]


def test_enough_training_lies_near_pure_noise() -> None:
    times = draw_times(20_000, torch.Generator().manual_seed(0))
    assert times.min() >= 0 and times.max() <= 1
    assert (times > 0.95).float().mean() > 0.15  # where left and right are settled
    assert (times < 0.3).float().mean() > 0.05


def test_known_frames_never_leave_nothing_to_learn() -> None:
    known = draw_known(5000, 5, torch.Generator().manual_seed(0))
    assert not known.all(1).any()
    assert 0.05 < known[:, 0].float().mean() < 0.25
    assert 0.05 < known[:, -1].float().mean() < 0.25
    both = known[:, 0] & known[:, -1] & ~known[:, 2]
    assert 0.02 < both.float().mean() < 0.10  # clips between two others
    assert not draw_known(100, 1, torch.Generator().manual_seed(0)).any()


def test_a_known_end_comes_as_a_request_brings_it(trained: Path) -> None:
    """Behind a standing picture; what is to be made is what truly led to it."""
    config = small(trained)
    bucket, vae = config.buckets[0], trained_vae(config)
    stock = Stock(config, bucket)
    known = torch.tensor([[False, False, True], [True, False, False], [True, False, True], [False, True, False]] * 8)
    chosen, clean = stock.draw(known, random.Random(0))
    assert min(chosen) >= config.held_back
    clips = np.concatenate([np.array(chunk) for chunk in clips_of(config, bucket)])
    for row, clip in enumerate(chosen):
        assert torch.equal(clean[row, :, :2], stock.latents[clip, :, :2].float())
        if known[row, 2]:
            given = Given(frames=9, end=4)
            canvas = Canvas(given, clips[clip : clip + 1, :0], clips[clip : clip + 1, 5:], 4)
            seen = vae.encode(to_video(canvas.known(windows(given, 4)[0])))[0, :, 2]
            assert torch.allclose(clean[row, :, 2], seen, atol=0.02)
            assert not torch.allclose(clean[row, :, 2], stock.latents[clip, :, 2].float(), atol=0.02)
        else:
            assert torch.equal(clean[row], stock.latents[clip].float())


def test_clips_with_two_solids_and_spins_come_up_more_often(trained: Path) -> None:
    config = small(trained)
    bucket = config.buckets[0]
    scenes = [scene_of(config.seed, bucket, k) for k in range(bucket.clips)]
    hard = [len(scene.solids) == 2 or scene.motion == "spin" for scene in scenes]
    chosen, _ = Stock(config, bucket).draw(torch.zeros(4000, 3, dtype=torch.bool), random.Random(0))
    own = sum(hard[config.held_back :]) / (bucket.clips - config.held_back)
    assert 0 < own < 1, "this seed has both"
    share = sum(hard[k] for k in chosen) / len(chosen)
    assert share == pytest.approx(3 * own / (3 * own + 1 - own), abs=0.03)


def test_the_captioner_resumes_and_is_published(trained: Path, tmp_path: Path) -> None:
    whole, halved = (shutil.copytree(trained, tmp_path / name) for name in ("whole", "halved"))
    config = replace(small(whole), captioner_steps=6)
    train_captioner(config)
    begin(train_captioner, replace(config, work=halved), 2)
    train_captioner(replace(config, work=halved))
    assert [row["step"] for row in lines(halved / "captioner.jsonl")] == [4, 6]  # the first row came after its save
    first, second = (load_file(work / "captioner.safetensors") for work in (whole, halved))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {"held_out_colour", "held_out_all"} <= lines(whole / "captioner.jsonl")[-1].keys()

    publish(config, tmp_path / "mini")
    before = folder_digest(tmp_path / "mini")
    clips = np.concatenate([np.array(chunk) for chunk in clips_of(config, config.buckets[0])])
    reporter = Reporter(tmp_path / "mini")
    said = reporter.captions(clips)
    assert len(said) == len(clips) and said == reporter.captions(clips)
    (tmp_path / "mini" / "captioner" / "config.json").write_text("{}")
    assert folder_digest(tmp_path / "mini") == before  # no pixel depends on it


DIVIDED: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero1": {"zero": 1},
    "zero2": {"zero": 2},
    "taken_up": {"zero": 2},
    "bfloat16": {"zero": 2, "bfloat16": True},
    "killed": {"zero": 2},
}
RANK = """
import sys
from pathlib import Path
from tests.integration.test_train import train_divided
train_divided(Path(sys.argv[1]))
"""


def train_divided(folder: Path) -> None:
    """What each of two ranks does: one training after another. Beside each it writes how much of AdamW it holds."""
    torch.set_num_threads(1)
    config, save = join(small(folder)), Checkpoint.save

    def save_and_count(self: Checkpoint, step: int) -> None:
        save(self, step)
        held = sum(value.nbytes for state in self.optimizer.state.values() for value in state.values())
        self.path.with_suffix(f".{self.rank}").write_text(str(held))

    Checkpoint.save = save_and_count
    for name, settings in DIVIDED.items():
        train_dit(replace(config, work=folder / name, **settings))


@pytest.fixture(scope="module")
def divided(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every training of DIVIDED in a folder of its own. What two ranks take up, one process has begun."""
    folder = tmp_path_factory.mktemp("divided")
    for name in DIVIDED:
        shutil.copytree(trained, folder / name, ignore=shutil.ignore_patterns("dit.*"))
    begin(train_dit, small(folder / "taken_up"), 4)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    with subprocess.Popen(
        [*command, sys.executable, "-c", RANK, str(folder)], cwd=Path(__file__).parents[2]
    ) as torchrun:
        try:
            deadline = time.monotonic() + 480
            while not lines(folder / "killed" / "dit.jsonl"):
                assert torchrun.poll() is None, "the ranks ended before they could be killed"
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            for process in [torchrun, *psutil.Process(torchrun.pid).children(recursive=True)]:
                process.kill()
    return folder


def begin(train: Callable[[TrainConfig], None], config: TrainConfig, steps: int) -> None:
    """A training up to its checkpoint after so many steps."""
    save = Checkpoint.save

    def save_and_stop(self: Checkpoint, step: int) -> None:
        save(self, step)
        if step == steps:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Checkpoint, "save", save_and_stop)
        train(config)


def same_training(one: Path, other: Path, *, weights: float, losses: float) -> None:
    """The same curve to the same weights and moments, as far as these tolerances say."""
    first, second = (load_file(work / "dit.safetensors") for work in (one, other))
    assert first.keys() == second.keys()
    for name in first:
        assert torch.allclose(first[name], second[name], atol=weights), name
    curve = {row["step"]: row for row in lines(one / "dit.jsonl")}
    for row in lines(other / "dit.jsonl"):
        for key in ("loss", "held_out_loss"):
            assert row[key] == pytest.approx(curve[row["step"]][key], abs=losses), (row["step"], key)


def means_of_gradients(work: Path) -> torch.Tensor:
    """AdamW's first moments of all parameters in a row."""
    tensors = load_file(work / "dit.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors) if name.endswith(".exp_avg")])


ROUNDED = 1.1e-4  # what two losses may differ by that were the same before they were rounded


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("name", ["ddp", "zero1", "zero2", "taken_up"])
def test_two_ranks_learn_what_one_learns(trained: Path, divided: Path, name: str) -> None:
    same_training(trained, divided / name, weights=1e-6, losses=ROUNDED)
    assert lines(divided / name / "dit.jsonl")[-1]["step"] == 9


@pytest.mark.xdist_group("ranks")
def test_one_process_goes_on_where_two_ranks_were_killed(trained: Path, divided: Path) -> None:
    work = divided / "killed"
    assert lines(work / "dit.jsonl")[-1]["step"] < 9, "they were killed too late to tell"
    train_dit(small(work))
    same_training(trained, work, weights=1e-6, losses=ROUNDED)
    assert lines(work / "dit.jsonl")[-1]["step"] == 9


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("name", ["zero1", "zero2"])
def test_a_rank_holds_its_part_of_the_moments_alone(trained: Path, divided: Path, name: str) -> None:
    whole = load_file(trained / "dit.safetensors")
    moments = sum(value.nbytes for key, value in whole.items() if "exp_avg" in key)
    undivided, *parts = (int((divided / path).read_text()) for path in ("ddp/dit.1", f"{name}/dit.0", f"{name}/dit.1"))
    assert undivided >= moments
    assert sum(parts) == pytest.approx(moments, rel=0.01)
    assert max(parts) == pytest.approx(moments / 2, rel=0.01)


@pytest.mark.xdist_group("ranks")
def test_two_ranks_learn_in_bfloat16_too(trained: Path, divided: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path, ignore=shutil.ignore_patterns("dit.*"), dirs_exist_ok=True)
    train_dit(replace(small(tmp_path), bfloat16=True))
    same_training(tmp_path, divided / "bfloat16", weights=1e-3, losses=1e-3)
    whole, one, two = (means_of_gradients(work) for work in (trained, tmp_path, divided / "bfloat16"))
    assert (one - two).norm() < min((one - whole).norm(), (two - whole).norm())
    assert (two - whole).norm() == pytest.approx((one - whole).norm(), rel=0.3)  # float32 would be within 1e-4 of whole


def test_stage_three_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zero=3 must be one of 0, 1, 2: every rank keeps whole weights"):
        replace(small(tmp_path), zero=3)
