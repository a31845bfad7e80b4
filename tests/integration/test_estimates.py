"""What a submitter is told of a deadline: by what clips took here, and by what goes before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session, sessionmaker

from db.engines import register_engine
from db.leases import record_clip, start_clip
from db.planning import unplanned
from flows.generate.estimates import Estimate, as_duration, estimate
from flows.generate.forecast import Forecast, forecast
from flows.library.models import card_of
from flows.plan.shards import START_SECONDS
from flows.request.form import GenerationRequest
from flows.settings import Settings
from model.loading.card import ModelCard
from tests.factories import ENGINE, artifact_of, claim, create_shard, new_clip, opened

SHAPE: dict[str, Any] = {"width": 64, "height": 64, "frames": 17, "steps": 25, "guidance": 4.0}
TOOK = 2.0  # seconds of an engine, for each clip that is done


@pytest.fixture
def mini(tmp_path: Path) -> ModelCard:
    return card_of(Settings(home=tmp_path), "mini")


def told(session: Session, card: ModelCard, clips: int, priority: int = 5, **settings: object) -> Estimate:
    request = GenerationRequest(prompts=["a red ball"], steps=SHAPE["steps"], guidance=SHAPE["guidance"])
    chosen = Settings.model_validate({"home": card.path, "partition": "tp=2", **settings})
    return estimate(session, chosen, card, request.resolve(card), {"64x64x17": clips}, priority)


def history(session: Session, card: ModelCard) -> None:
    """Three clips that an engine has rendered, which has left since."""
    request = opened(session, [new_clip(k, **SHAPE) for k in range(3)], key="done", model_digest=card.digest)
    engine = {"host": "a", "pid": 1, "partition": "tp=2", "code_version": "1.0", "model_digest": card.digest}
    register_engine(session, "a", device="cpu x86_64", **engine)
    create_shard(session, request, [clip.clip_id for clip in unplanned(session, request, 10)])
    lease, clips = claim(session, "a", model_digest=card.digest)
    for clip in clips:
        start_clip(session, lease, clip.clip_id, **ENGINE)
        record_clip(session, lease, clip.clip_id, artifact=artifact_of(clip.clip_id), seconds={"denoise": TOOK})


def test_by_what_such_clips_took_here(ledger: sessionmaker[Session], mini: ModelCard) -> None:
    with ledger.begin() as session:
        assert not told(session, mini, 100).measured
        history(session, mini)
        found = told(session, mini, 100)
        assert found.measured and found.ahead == 0
        assert found.seconds == pytest.approx(100 * TOOK), "no engine needs to be started: one is alive"
        assert found.gpu_seconds == pytest.approx(2 * 100 * TOOK), "an engine has two ranks"
        assert told(session, mini, 100, engines=4).seconds == pytest.approx(100 * TOOK / 4)


def test_what_goes_before_is_counted(ledger: sessionmaker[Session], mini: ModelCard) -> None:
    with ledger.begin() as session:
        clips = [new_clip(k, recipe=("urgent", k), **SHAPE) for k in range(4)]
        urgent = opened(session, clips, key="urgent", model_digest=mini.digest, priority=7)
        create_shard(session, urgent, [clip.clip_id for clip in unplanned(session, urgent, 10)], predicted_seconds=50.0)
        assert told(session, mini, 1, priority=7).ahead == told(session, mini, 1, priority=0).ahead == 50.0
        assert told(session, mini, 1, priority=8).ahead == 0, "what is less urgent waits"
        assert told(session, mini, 1, priority=7, engines=2).ahead == 25.0


def test_a_planned_partition_is_asked_of_the_planner(ledger: sessionmaker[Session], mini: ModelCard) -> None:
    with ledger.begin() as session:
        one = told(session, mini, 400, partition="auto", gpus="1xcpu")
        two = told(session, mini, 400, partition="auto", gpus="2xcpu")
    assert START_SECONDS < two.seconds < one.seconds


def test_it_says_by_how_much_a_deadline_is_missed() -> None:
    expected = Estimate(gpu_seconds=1.0, ahead=60.0, seconds=5400.0, measured=True)
    assert expected.misses(5400.0) is None
    said = expected.misses(600.0)
    assert said is not None
    for part in ("10m00s", "1h30m", "1m00s", "took here"):
        assert part in said
    assert [as_duration(seconds) for seconds in (0.4, 59.6, 3599, 3600)] == ["0s", "1m00s", "59m59s", "1h00m"]


def test_a_plan_goes_by_what_clips_took_here(
    ledger: sessionmaker[Session], mini: ModelCard, database_url: str, tmp_path: Path
) -> None:
    """Where the devices are of the kind that history knows; of others it can only be assumed."""
    with ledger.begin() as session:
        history(session, mini)
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a red ball", "samples": 50}\n')
    here = Settings.model_validate({"home": tmp_path, "database_url": database_url})

    def planned(settings: Settings, gpus: str) -> Forecast:
        return forecast(settings, file, gpus, "mini", {"steps": 25, "guidance": 4.0}, pytest.fail)

    known, unknown = planned(here, "2xcpu"), planned(here, "2xh100")
    assert known.measured and not unknown.measured
    assert not planned(Settings(home=tmp_path), "2xcpu").measured, "no ledger, no history"
    assert 25 * TOOK < known.layout.seconds <= 50 * TOOK, "another layout is chosen where it is better, never worse"
