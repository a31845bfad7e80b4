"""An engine that is told to stop while its ranks are at a step that does not end."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

from flows.render import shard
from flows.render.engine import run_engine
from flows.settings import load_settings
from model.loading.card import find_model
from tests.factories import new_clip, opened, planned


def ranks() -> set[psutil.Process]:
    return {each for each in psutil.Process().children(recursive=True) if "model.engine.rank" in each.cmdline()}


@pytest.mark.xdist_group("ranks")
def test_an_engine_whose_ranks_hang_is_ended_all_the_same(
    ledger: sessionmaker[Session],
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    told_by_usr1: None,
) -> None:
    """It waits for them as long as it may, ends them, and gives its shard back; the clip is not charged with it."""
    monkeypatch.setattr(shard, "KEEPING", 1.0)
    others = ranks()  # of the engines that other tests of this process share
    with ledger.begin() as session:
        clip = new_clip(0, width=64, height=64, frames=9, steps=5000)
        planned(session, opened(session, [clip], model_digest=find_model("mini").digest))
    told = list[float]()

    def tell() -> None:
        with ledger() as session:
            while session.scalar(text("select count(*) from attempts where status = 'running'")) == 0:
                session.rollback()
                time.sleep(0.05)
        for rank in ranks() - others:
            rank.suspend()
        told.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGUSR1)

    teller = threading.Thread(target=tell)
    teller.start()
    settings = load_settings(home=tmp_path / "home", database_url=database_url, linger=60)
    with pytest.raises(SystemExit):
        run_engine(settings)
    teller.join()
    assert time.monotonic() - told[0] >= 1.0
    assert ranks() - others == set()
    with ledger() as session:
        row = "select status::text, owner, leased_until from shards"
        assert session.execute(text(row)).one() == ("queued", None, None)
        clips = "select status::text, failures, lost_attempts from clips"
        assert session.execute(text(clips)).one() == ("queued", 0, 0)
        assert session.scalar(text("select status::text from attempts")) == "released"
        assert session.scalar(text("select closed_at is not null from engines"))
