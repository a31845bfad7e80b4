"""The promises of `Renderer`, kept by an engine of real ranks and by the fake that the platform's tests render with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest

from flows.render.renderer import Renderer
from model.config import Partition
from model.engine.clip import ClipSpec, EngineError, RankDied, RenderFailed, SavedState
from model.engine.engine import Engine
from model.loading.card import find_model
from tests.distributed.conftest import Engines
from tests.fake_renderer import FakeRenderer, Fault, Script, Trouble
from tests.tiny import CLIP

pytestmark = pytest.mark.xdist_group("ranks")

LONG = replace(CLIP, clip_id="long", prompt="a red ball moves", steps=400)
SHORT = replace(CLIP, clip_id="short", prompt="a blue cube", steps=6)
STILL = replace(CLIP, clip_id="still", prompt="a green ball", frames=1, steps=3)


@dataclass
class Subject:
    renderer: Renderer
    unstarted: Callable[[], Renderer]
    bad: ClipSpec  # one that it cannot make


@pytest.fixture(scope="module", params=["fake", "engine"])
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    if request.param == "engine":
        engines: Engines = request.getfixturevalue("engines")
        engine = engines.get(Partition(), micro_batch=3)
        yield Subject(engine, lambda: Engine(engines.model, Partition()), replace(CLIP, clip_id="bad", frames=8))
    else:
        script = Script(trouble={"bad": Trouble(Fault.FAILS)})
        digest = find_model("mini").digest
        fake = FakeRenderer(script, digest, Partition(), micro_batch=3)
        fake.start()
        bad = replace(CLIP, clip_id="bad", prompt="bad")
        yield Subject(fake, lambda: FakeRenderer(script, digest, Partition()), bad)


@pytest.fixture
def renderer(subject: Subject) -> Renderer:
    subject.renderer.start()
    return subject.renderer


@pytest.fixture
def wanted(renderer: Renderer) -> dict[str, bytes]:
    """The bytes of undisturbed clips."""
    return made(renderer, SHORT, STILL, replace(LONG, steps=40))


def made(renderer: Renderer, *specs: ClipSpec) -> dict[str, bytes]:
    return {clip.clip_id: clip.frames.tobytes() for clip in renderer.render(specs)}


def test_every_clip_comes_once_with_its_frames_and_every_step_is_told(renderer: Renderer) -> None:
    told: dict[str, list[tuple[int, int]]] = {}
    clips = list(
        renderer.render([SHORT, STILL], on_step=lambda clip, step, of: told.setdefault(clip, []).append((step, of)))
    )
    assert sorted(clip.clip_id for clip in clips) == ["short", "still"]
    assert told == {each.clip_id: [(step, each.steps) for step in range(each.steps + 1)] for each in (SHORT, STILL)}
    for clip in clips:
        spec = SHORT if clip.clip_id == "short" else STILL
        assert clip.frames.shape == (spec.frames, spec.height, spec.width, 3) and clip.frames.dtype == "uint8"
        assert len(clip.steps) == spec.steps and clip.started <= clip.steps[0] <= clip.finished
        assert set(clip.seconds) == {"text", "denoise", "decode"} and clip.peak_bytes > 0


def test_what_nobody_wants_stops_and_is_not_yielded(renderer: Renderer, wanted: dict[str, bytes]) -> None:
    steps: list[int] = []
    clips = renderer.render(
        [LONG, SHORT, replace(LONG, clip_id="never")],
        on_step=lambda clip, step, _: steps.append(step) if clip == "long" else None,
        cancelled=lambda: {"long", "never"} if len(steps) > 3 else {"never"},
    )
    assert {clip.clip_id: clip.frames.tobytes() for clip in clips} == {"short": wanted["short"]}
    assert 3 < len(steps) < LONG.steps
    assert made(renderer, SHORT) == {"short": wanted["short"]}, "it is usable as before"


def test_a_clip_that_cannot_be_made_harms_no_other(
    subject: Subject, renderer: Renderer, wanted: dict[str, bytes]
) -> None:
    failed: list[RenderFailed] = []
    clips = renderer.render([SHORT, subject.bad, STILL], on_failure=failed.append)
    assert {clip.clip_id: clip.frames.tobytes() for clip in clips} == {
        each: wanted[each] for each in ("short", "still")
    }
    assert [failure.clip_id for failure in failed] == ["bad"]
    with pytest.raises(RenderFailed, match="clip bad"):
        list(renderer.render([subject.bad]))
    assert made(renderer, SHORT) == {"short": wanted["short"]}


@pytest.mark.parametrize("every", [2, 3])
def test_a_clip_goes_on_from_what_was_kept_to_the_same_bytes(
    renderer: Renderer, wanted: dict[str, bytes], every: int
) -> None:
    kept: list[SavedState] = []
    list(renderer.render([SHORT], on_checkpoint=kept.append, checkpoint_every=(every, 0.0)))
    assert [state.step for state in kept] == list(range(every, SHORT.steps, every))
    assert {(state.clip_id, state.fingerprint) for state in kept} == {("short", renderer.fingerprint(SHORT))}
    for state in kept:
        told: list[int] = []
        resumed = replace(SHORT, resume_state=state.data)
        (clip,) = renderer.render([resumed], on_step=lambda _, step, __, told=told: told.append(step))
        assert told[0] == state.step and clip.frames.tobytes() == wanted["short"]


def test_what_leaves_is_kept_and_goes_on_to_the_same_bytes(renderer: Renderer, wanted: dict[str, bytes]) -> None:
    spec = replace(LONG, steps=40)
    kept: list[SavedState] = []
    begun: dict[str, int] = {}
    clips = renderer.render(
        [spec, *(replace(spec, clip_id=f"later {k}") for k in range(3))],
        on_step=lambda clip, step, _: begun.__setitem__(clip, step),
        on_checkpoint=kept.append,
        leave=lambda: begun.get("long", 0) >= 3,
    )
    assert list(clips) == []
    assert {state.clip_id for state in kept} == set(begun), "all that were under way, and nothing that was not"
    assert "later 2" not in begun, "it takes three at a time, and no other has ended"
    (mine,) = [state for state in kept if state.clip_id == "long"]
    assert 3 <= mine.step < spec.steps
    assert made(renderer, replace(spec, resume_state=mine.data)) == {"long": wanted["long"]}


@pytest.mark.parametrize("state", [b"", b"nothing of the kind", None], ids=["empty", "no state", "of another clip"])
def test_a_state_of_no_use_means_to_begin_anew(
    renderer: Renderer, wanted: dict[str, bytes], state: bytes | None
) -> None:
    if state is None:
        kept: list[SavedState] = []
        list(renderer.render([replace(SHORT, seed=99)], on_checkpoint=kept.append, checkpoint_every=(2, 0.0)))
        state = kept[0].data
    told: list[int] = []
    resumed = replace(SHORT, resume_state=state)
    (clip,) = renderer.render([resumed], on_step=lambda _, step, __: told.append(step))
    assert told[0] == 0 and clip.frames.tobytes() == wanted["short"]


def test_it_is_killed_from_another_thread_and_starts_again(renderer: Renderer, wanted: dict[str, bytes]) -> None:
    killer: list[threading.Thread] = []

    def kill(_: str, step: int, __: int) -> None:
        if step == 3:
            killer.append(threading.Thread(target=renderer.kill))
            killer[0].start()
            killer[0].join()

    with pytest.raises(RankDied):
        list(renderer.render([replace(LONG, steps=4000)], on_step=kill))
    renderer.start()
    assert made(renderer, SHORT) == {"short": wanted["short"]}


def test_what_was_not_started_renders_nothing(subject: Subject) -> None:
    with pytest.raises(EngineError, match="has not been started"):
        list(subject.unstarted().render([SHORT]))
