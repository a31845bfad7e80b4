"""What a training's work folder is named after."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from db.datasets import DatasetRow
from db.tables import CaptionOrigin
from flows.settings import Settings
from flows.train.flow import Training, training_key

DATASET = DatasetRow(
    id="ds1",
    name="world",
    source="world",
    licence=None,
    seed=0,
    fps=8,
    captions=CaptionOrigin.WORLD,
    author=None,
    parent=None,
    digest="d",
    clips=1,
    shapes={},
    created_at=datetime.now(UTC),
    sealed_at=None,
)


def test_how_it_is_divided_does_not_decide_where_a_training_goes_on(tmp_path: Path) -> None:
    def key(**fields: object) -> str:
        return training_key(Settings(home=tmp_path), Training.model_validate(fields), DATASET)

    assert key(recipe={"zero": 2}, ranks=2, threads=1) == key()
    assert key(recipe={"zero": 2, "dit_steps": 9}) == key(recipe={"dit_steps": 9}) != key()
