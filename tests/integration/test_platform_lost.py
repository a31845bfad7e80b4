"""Bytes that the store has lost or spoilt: who asks again gets them again, and nothing else is harmed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.generate.outcome import Ending, Outcome
from flows.generate.publish import publish_manifest, publish_sheet
from flows.operate import repair as operate_repair
from flows.operate.audit import AuditReport, Breach, audit
from flows.operate.export import export
from flows.operate.repair import Repairs, queue_missing, repair
from tests.platform import Platform

BALL, CUBE, CONE = "a red ball", "a blue cube", "a green cone"


def lose(file: Path) -> None:
    file.unlink()


def cut(file: Path) -> None:
    rewrite(file, file.read_bytes()[:-1])


def spoil(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    rewrite(file, bytes(data))


def rewrite(file: Path, data: bytes) -> None:
    file.chmod(0o600)
    file.write_bytes(data)


LOSSES = (lose, cut, spoil)


def file_of(platform: Platform, key: str) -> Path:
    return platform.settings.home / "store" / key


def of_clip(platform: Platform, request: str | None, index: int = 0) -> Path:
    return file_of(platform, platform.clips(request)[index]["object_key"])


def found(platform: Platform) -> list[Breach]:
    with platform.sessions() as session:
        return list(audit(session, platform.store, AuditReport()))


def mend(platform: Platform) -> Repairs:
    return repair(platform.sessions, platform.store, found(platform), (publish_manifest, publish_sheet))


def goes_on(platform: Platform, request: str | None) -> Outcome:
    return platform.submit([BALL], resumes=request).outcome()


@pytest.mark.parametrize("loss", (lose, cut))
def test_a_cached_render_without_bytes_is_none(platform: Platform, loss: Callable[[Path], None]) -> None:
    """Who asks for the same is given a new rendering, which the first request has too when it is mended."""
    with platform.engines():
        first, _ = platform.make([BALL, CUBE])
        loss(of_clip(platform, first.request_id))
        second, page = platform.make([BALL, CUBE, CONE])
    assert (second.ending, second.cache_hits) == (Ending.COMPLETED, 1)
    assert any("not in the store any more" in line for line in page.warnings)
    assert platform.script.attempts[BALL] == 2 and platform.script.attempts[CUBE] == 1
    clips = platform.clips(second.request_id)
    assert [clip["reused"] for clip in clips] == [False, True, False]
    assert [breach.problem for breach in found(platform)] == ["missing"], "the first request's clip is still without"
    assert mend(platform).queued == {first.request_id: 1}
    assert goes_on(platform, first.request_id).ending is Ending.COMPLETED
    again = platform.clips(first.request_id)
    assert (again[0]["reused"], again[0]["rendered_by"]) == (True, clips[0]["clip_id"])
    assert again[0]["sha256"] == clips[0]["sha256"]
    assert platform.script.attempts[BALL] == 2
    assert platform.breaches() == []


@pytest.mark.parametrize("loss", LOSSES)
def test_what_the_audit_finds_lost_is_rendered_again(platform: Platform, loss: Callable[[Path], None]) -> None:
    """In every request that had it, once; a second repair finds nothing, and no other clip is touched."""
    with platform.engines():
        first, _ = platform.make([BALL, CUBE])
        second, _ = platform.make([BALL, CONE])
        before = platform.clips(first.request_id) + platform.clips(second.request_id)
        loss(of_clip(platform, first.request_id))
        (breach,) = found(platform)
        assert breach.repairable and "2 clips have it, such as " in breach.detail
        assert mend(platform).queued == dict.fromkeys(sorted([str(first.request_id), str(second.request_id)]), 1)
        assert mend(platform) == Repairs()
        assert platform.sql("select 1 from requests where status = 'open'") == [{"?column?": 1}] * 2
        for each in (first, second):
            assert goes_on(platform, each.request_id).ending is Ending.COMPLETED
    clips = platform.clips(first.request_id) + platform.clips(second.request_id)
    assert [clip["sha256"] for clip in clips] == [clip["sha256"] for clip in before]
    assert [clip["clip_id"] for clip in clips] == [clip["clip_id"] for clip in before]
    assert platform.script.attempts == {BALL: 2, CUBE: 1, CONE: 1}
    ended = sorted(each["ended"] for each in platform.attempts(first.request_id))
    assert ended == ["done", "done", "gone"]
    assert platform.breaches() == []


def test_one_request_s_missing_clips_are_queued_again(platform: Platform, tmp_path: Path) -> None:
    """Another request that had the same bytes stays as it is, and has them again."""
    with platform.engines():
        first, _ = platform.make([BALL, CUBE])
        second, _ = platform.make([BALL])
        lose(of_clip(platform, first.request_id))
        with platform.sessions() as session:
            (broken,) = export(session, platform.store, str(first.request_id), tmp_path).broken
        assert f"`rushes retry {first.request_id} --missing`" in broken
        assert queue_missing(platform.sessions, platform.store, str(first.request_id)) == 1
        assert queue_missing(platform.sessions, platform.store, str(first.request_id)) == 0
        assert platform.statuses(second.request_id) == ["done"]
        assert goes_on(platform, first.request_id).ending is Ending.COMPLETED
    assert platform.script.attempts[BALL] == 2
    assert platform.breaches() == []


@pytest.mark.parametrize("loss", LOSSES)
def test_a_neighbour_s_lost_bytes_fail_no_request(platform: Platform, loss: Callable[[Path], None]) -> None:
    """One whose clip loses its bytes before the contact sheet is made ends as if it had them."""
    platform.script.held[CUBE] = 2
    run = platform.submit([BALL, CUBE], idempotency_key="sheet")
    with platform.engines(micro_batch=1):
        request = platform.request_of(run)
        while "done" not in platform.statuses(request):
            assert not run.future.done()
        loss(of_clip(platform, request))
        platform.script.held.clear()
        assert run.outcome().ending is Ending.COMPLETED
    assert file_of(platform, f"requests/{request}/contact_sheet.png").is_file()


@pytest.mark.parametrize("name", ["manifest.jsonl", "contact_sheet.png"])
def test_a_lost_manifest_or_sheet_is_made_again(platform: Platform, name: str) -> None:
    with platform.engines():
        made, _ = platform.make([BALL])
    file = file_of(platform, f"requests/{made.request_id}/{name}")
    data = file.read_bytes()
    lose(file)
    assert [breach.key for breach in found(platform)] == [f"requests/{made.request_id}/{name}"]
    assert mend(platform).published == 1
    assert file.read_bytes() == data
    assert platform.breaches() == []


def test_a_lost_checkpoint_costs_its_clip_a_new_beginning_and_no_more(platform: Platform) -> None:
    with platform.engines():
        made, _ = platform.make([BALL])
    key = f"checkpoints/{made.request_id}-000000-0/1-2.safetensors"
    with platform.sessions.begin() as session:
        queued = "update clips set status = 'queued', artifact = null, finished_at = null, shard_id = null"
        session.connection().exec_driver_sql(
            f"{queued}, resume_key = '{key}', resume_step = 2, resume_fingerprint = 'x'"
        )
    assert key in [breach.key for breach in found(platform)]
    assert mend(platform).anew == 1
    assert platform.sql("select resume_key from clips") == [{"resume_key": None}]


def test_a_lost_source_is_told_and_harms_only_what_waits_for_it(platform: Platform) -> None:
    """Nothing here can make a picture again that somebody brought; bringing it again ends the loss."""
    picture = platform.settings.prompts / "picture.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(small_png())
    line = {"prompt": BALL, "mode": "image-to-video", "image": "picture.png"}
    with platform.engines():
        made, page = platform.make([line])
        assert made.ending is Ending.COMPLETED, page.lines
        (row,) = platform.sql("select a.key from clips c join artifacts a on a.sha256 = c.source")
        lose(file_of(platform, row["key"]))
        done = mend(platform)
        assert done.queued == {}
        (said,) = done.beyond
        assert said.startswith(f"{row['key']} was a source: 1 clips")
        assert platform.breaches() == [], "it is known to be lost, and nothing needs it"
        again, _ = platform.make([line], fresh=True)
        assert again.ending is Ending.COMPLETED
    assert platform.sql("select 1 from artifacts where lost_at is not null") == []
    assert platform.breaches() == []


def small_png() -> bytes:
    import numpy as np

    from model.media.encode import encode_png

    return encode_png(np.full((32, 48, 3), 90, np.uint8), {})


def test_bytes_that_come_back_while_it_is_repaired_stay(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine stores them between the look and the mend."""
    with platform.engines():
        made, _ = platform.make([BALL])
    file = of_clip(platform, made.request_id)
    data = file.read_bytes()
    lose(file)
    breaches, discard = found(platform), operate_repair.discard

    def late(*asked: Any) -> None:
        platform.store.put(data, "video/mp4")
        discard(*asked)

    monkeypatch.setattr(operate_repair, "discard", late)
    repair(platform.sessions, platform.store, breaches, ())
    assert file.read_bytes() == data
