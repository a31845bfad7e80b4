"""The engine's promises: same recipe, same bytes; whoever dies or hangs, nobody is left and the next start works.

Most tests here use an engine of the pool. Where a test ends its ranks, the next use starts them again.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from model.config import Partition
from model.engine.clip import ClipSpec, OutOfMemory, RankDied, RankHung, RenderedClip, RenderFailed, StartFailed
from model.engine.engine import Engine
from tests.distributed.conftest import Engines
from tests.tiny import CLIP, tiny_model

pytestmark = pytest.mark.xdist_group("ranks")
ROOT = Path(__file__).parents[2]
LONG = replace(CLIP, clip_id="long", steps=5000)


@pytest.fixture
def engine(engines: Engines) -> Engine:
    return engines.get(Partition(tp=2))


def pids_of(engine: Engine) -> list[int]:
    return [info.pid for info in engine.ready]


def gone(pids: list[int], within: float) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
            return True
        time.sleep(0.05)
    return False


def frames(engine: Engine, *specs: ClipSpec) -> list[bytes]:
    return [clip.frames.tobytes() for clip in engine.render(specs)]


def test_every_rank_holds_its_part_and_tested_it(engine: Engine) -> None:
    whole = sum(p.stat().st_size for p in (engine.card.path / "transformer").glob("*.safetensors"))
    assert [info.rank for info in engine.ready] == [0, 1]
    for info in engine.ready:
        assert (
            info.parameter_bytes < 0.75 * whole
        )  # the embedders, whole on every rank, are a large part of a tiny model
        assert 0 < info.self_test <= 1e-5


def test_a_model_that_does_not_fit_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "huge")
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"ffn_dim": 10**10}))
    engine = Engine(folder, Partition(tp=2))
    with pytest.raises(StartFailed, match=r"needs \d+\.\d GiB a rank .* are free on cpu: no partition would fit"):
        engine.start()
    assert not engine.running


def test_clips_come_with_frames_times_and_steps(engine: Engine) -> None:
    seen: list[tuple[str, int, int]] = []
    image = replace(CLIP, clip_id="image", frames=1, width=32, steps=2, guidance=1.0)
    before = time.time()
    clips = list(engine.render([CLIP, image], on_step=lambda *step: seen.append(step)))
    assert [clip.clip_id for clip in clips] == ["one", "image"]
    assert [clip.frames.shape for clip in clips] == [(9, 32, 48, 3), (1, 32, 32, 3)]
    assert seen == [("one", k, 4) for k in range(5)] + [("image", k, 2) for k in range(3)]
    for clip in clips:
        assert clip.frames.dtype == np.uint8 and clip.frames.std() > 1
        assert set(clip.seconds) == {"text", "denoise", "decode"} and all(value >= 0 for value in clip.seconds.values())
        assert before <= clip.started <= clip.steps[0] <= clip.steps[-1] <= clip.finished <= time.time()
        assert list(clip.steps) == sorted(clip.steps)


def test_same_recipe_same_bytes_whatever_the_neighbours(engine: Engine) -> None:
    other = replace(CLIP, clip_id="other", seed=8, prompt="a blue cube", negative_prompt="red")
    large = replace(CLIP, clip_id="large", width=64, height=64, frames=17, steps=3, solver="euler", guidance=1.0)
    first, elsewhere = frames(engine, CLIP, other)
    assert first != elsewhere, "a seed and a prompt must matter"
    assert frames(engine, large, other, CLIP, large, CLIP)[1:] == [elsewhere, first, frames(engine, large)[0], first]
    assert frames(engine, replace(CLIP, prompt="a green cube"))[0] != first
    assert frames(engine, replace(CLIP, negative_prompt="red"))[0] != first


@pytest.mark.parametrize(
    "partition",
    [Partition(), *(pytest.param(each, marks=pytest.mark.chaos) for each in (Partition(sp=2), Partition(cfg=2)))],
    ids=str,
)
def test_a_new_engine_gives_the_same_bytes_in_another_shard(
    model: Path, engines: Engines, partition: Partition
) -> None:
    """On tp=2 the tests beside this one say so. A clip with given frames goes another way through the ranks."""
    given = replace(CLIP, clip_id="given", start=np.random.default_rng(0).integers(0, 255, (1, 32, 48, 3), np.uint8))
    large = replace(CLIP, clip_id="large", width=64, height=64, frames=17, steps=3, solver="euler", guidance=1.0)
    first, begun = frames(engines.get(partition), CLIP, given)
    assert first != begun
    with Engine(model, partition, log=model / "ranks.log") as engine:
        assert frames(engine, large, given, replace(CLIP, clip_id="other", seed=8), CLIP)[1::2] == [begun, first]
        pids = pids_of(engine)
    assert gone(pids, 0.1)


def test_the_ranks_work_while_the_caller_looks(engine: Engine) -> None:
    clips = engine.render([replace(CLIP, clip_id=f"clip{k}", steps=20) for k in range(3)])
    for _ in range(2):
        next(clips)
        time.sleep(1)  # as encoding and storing would take
    looked = time.time()
    assert next(clips).started < looked


def test_frames_have_no_name_that_could_be_left_behind(engine: Engine) -> None:
    frames(engine, CLIP)
    for info in engine.ready:
        held = Path(f"/proc/{info.pid}/maps").read_text()
        held += " ".join(os.readlink(fd) for fd in Path(f"/proc/{info.pid}/fd").iterdir())
        assert "/dev/shm" not in held
        assert ("memfd:rushes-frames" in held) == (info.rank == 0)


def test_cancel_stops_at_a_step_and_leaves_the_engine_usable(engine: Engine) -> None:
    steps: list[int] = []
    wanted = frames(engine, CLIP)
    queued = replace(LONG, clip_id="queued")
    clips = list(
        engine.render(
            [LONG, CLIP, queued],
            on_step=lambda clip_id, step, _: steps.append(step) if clip_id == "long" else None,
            cancelled=lambda: {"long", "queued"} if len(steps) >= 5 else set(),
        )
    )
    assert [clip.frames.tobytes() for clip in clips] == wanted, "the cancelled are not yielded, the other is unharmed"
    assert 5 <= len(steps) < 2000
    assert list(engine.render([CLIP], cancelled=lambda: {"one"})) == []


def test_a_caller_that_leaves_stops_the_work(engine: Engine) -> None:
    clips = engine.render([CLIP, LONG, LONG])
    wanted = next(clips).frames.tobytes()
    clips.close()
    assert frames(engine, CLIP) == [wanted]


def test_a_killed_rank_ends_all_and_the_next_start_gives_the_same_bytes(engine: Engine) -> None:
    wanted, pids = frames(engine, CLIP), pids_of(engine)
    threading.Timer(1.0, os.kill, (pids[1], signal.SIGKILL)).start()
    with pytest.raises(RankDied, match=r"rank 1 of 2 died \(killed by SIGKILL\)"):
        list(engine.render([LONG]))
    assert not engine.running and gone(pids, 0.1)
    engine.start()
    assert frames(engine, CLIP) == wanted


def test_a_stopped_rank_counts_as_hung(engine: Engine) -> None:
    pids = pids_of(engine)

    def stop(_: str, step: int, __: int) -> None:
        if step == 3:
            os.kill(pids[1], signal.SIGSTOP)
            engine.step_timeout = 2.0

    with pytest.raises(RankHung, match=r"no step for 2 s; .*rank 1 is stopped"):
        list(engine.render([LONG], on_step=stop))
    assert not engine.running and gone(pids, 0.1)


def test_a_clip_that_the_model_refuses_is_named(engine: Engine) -> None:
    odd, failed = replace(CLIP, clip_id="odd", frames=8), list[RenderFailed]()
    with pytest.raises(RenderFailed, match=r"clip odd: ValueError: frames=8 must be 4n\+1") as failure:
        list(engine.render([CLIP, odd]))
    assert failure.value.clip_id == "odd"
    wanted = frames(engine, CLIP)
    made = engine.render([CLIP, odd, CLIP], on_failure=failed.append)
    assert [clip.frames.tobytes() for clip in made] == wanted * 2, "the ranks are unharmed, and so are the neighbours"
    assert [failure.clip_id for failure in failed] == ["odd"]


@pytest.fixture
def adopts() -> Iterator[None]:
    """This process adopts orphans, as the first one of a container does (prctl(2), PR_SET_CHILD_SUBREAPER).

    It is of their session, so the kernel does not send those that are stopped SIGHUP and SIGCONT, as it would if their
    new parent were of another.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(36, 1) == 0
    yield
    assert libc.prctl(36, 0) == 0


@pytest.mark.usefixtures("adopts")
def test_no_rank_outlives_a_killed_parent(model: Path) -> None:
    code = (
        "from pathlib import Path; from model.config import Partition\n"
        "from model.engine.clip import ClipSpec; from model.engine.engine import Engine\n"
        f"engine = Engine(Path({str(model)!r}), Partition(cfg=2), log=Path({str(model / 'ranks.log')!r}))\n"
        "engine.start()\n"
        "print(*[info.pid for info in engine.ready], flush=True)\n"
        f"list(engine.render([{LONG!r}]))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        time.sleep(0.5)
        os.kill(pids[1], signal.SIGSTOP)  # this one cannot even notice; the other sits in a collective with it
        while psutil.Process(pids[1]).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        assert psutil.pid_exists(pids[0])
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    try:
        assert gone(pids, 120.0)
    finally:
        for pid in pids:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def test_the_thread_that_starts_an_engine_may_end(engines: Engines) -> None:
    engine = engines.get(Partition())
    (wanted,) = frames(engine, CLIP)
    engine.close()
    thread = threading.Thread(target=engine.start)
    thread.start()
    thread.join()
    assert frames(engine, CLIP) == [wanted]


def test_clips_join_and_leave_a_batch_and_are_the_same_as_alone(engines: Engines) -> None:
    """Of other lengths, prompts, solvers: five clips in three slots, one of them without finite pixels."""
    specs = [
        replace(CLIP, clip_id=f"clip{k}", seed=k, prompt=prompt, steps=steps, solver=solver, guidance=2.0 + k)
        for k, (prompt, steps, solver) in enumerate(
            [("a ball", 3, "ab2"), ("a cube", 6, "unipc"), ("a red ball", 2, "euler"), ("a ball", 5, "ab2")]
        )
    ]
    wild = replace(CLIP, clip_id="wild", guidance=1e38)
    engine = engines.get(Partition(), micro_batch=3)
    failed: list[RenderFailed] = []
    together = list(engine.render([specs[0], wild, *specs[1:]], on_failure=failed.append))
    alone = [clip for spec in specs for clip in engine.render([spec])]
    begun: list[str] = []
    kept = engine.render(
        specs[:2],
        on_step=lambda clip_id, step, _: begun.append(clip_id) if step else None,
        cancelled=lambda: {"clip0"} if begun else set(),
    )
    assert [clip.clip_id for clip in kept] == ["clip1"], "clip0 was cancelled under way"
    assert [str(failure) for failure in failed] == [
        "clip wild: the model computed latents that are not finite (guidance=1e+38)"
    ]
    frames_of = {clip.clip_id: clip.frames for clip in together}
    assert list(frames_of) != sorted(frames_of), "the shortest is done first"
    for clip in alone:
        assert np.array_equal(clip.frames, frames_of[clip.clip_id]), clip.clip_id
    assert difference(alone[0], alone[1]) > 1


def test_out_of_memory_halves_the_micro_batch_and_goes_on(model: Path) -> None:
    specs = [replace(CLIP, clip_id=f"clip{k}", seed=k, width=256, height=256) for k in range(3)]
    with Engine(model, Partition(), micro_batch=2, log=model / "ranks.log") as engine:
        (pid,) = pids_of(engine)
        rank = psutil.Process(pid)
        rank.rlimit(psutil.RLIMIT_AS, (rank.memory_info().vms + (8 << 20),) * 2)
        made = list(engine.render(specs))
        assert engine.micro_batch == 1 and pids_of(engine) != [pid]
        assert sorted(clip.clip_id for clip in made) == ["clip0", "clip1", "clip2"]
        rank = psutil.Process(*pids_of(engine))
        rank.rlimit(psutil.RLIMIT_AS, (rank.memory_info().vms,) * 2)
        with pytest.raises(OutOfMemory, match=r"a rank ran out of memory \(1 at a time\)"):
            list(engine.render([replace(specs[0], width=512, height=512)]))
        assert not engine.running


def difference(one: RenderedClip, other: RenderedClip) -> int:
    return int(np.abs(one.frames.astype(int) - other.frames.astype(int)).max())


def test_a_model_that_cannot_be_loaded_says_why(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"4 attention heads do not divide over sp 3 x tp 1 = 3 ranks"):
        Engine(model, Partition(sp=3))
    broken = tiny_model(tmp_path / "broken")
    file = next((broken / "transformer").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    said: list[tuple[int, str]] = []
    engine = Engine(broken, Partition(), log=lambda rank, line: said.append((rank, line.rstrip("\n"))))
    with pytest.raises(StartFailed, match="SafetensorError"):
        engine.start()
    assert not engine.running
    assert {rank for rank, _ in said} == {0}
    lines = [line for _, line in said]
    assert "Traceback (most recent call last):" in lines and any("SafetensorError" in line for line in lines)
