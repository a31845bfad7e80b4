"""The service that shows clips, on a real ledger and real stores: ranges, names, links, and what it may not do."""

from __future__ import annotations

import json
import uuid
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text

from flows.web.app import Service, create_app
from flows.web.links import Links
from infra.store.s3 import S3Store
from tests.integration.s3 import S3Server
from tests.platform import Platform

HOSTILE = "<script>alert(1)</script> {{7*7}} '; drop table clips --"


@pytest.fixture
def web(platform: Platform) -> Generator[TestClient]:
    with TestClient(create_app(platform.settings), base_url="http://127.0.0.1", follow_redirects=False) as client:
        yield client


def made(platform: Platform) -> list[dict[str, str]]:
    with platform.engines():
        outcome, _ = platform.make([HOSTILE, {"prompt": "a still", "frames": 1}])
    return platform.clips(outcome.request_id)


def test_a_clip_plays_by_its_id(platform: Platform, web: TestClient) -> None:
    clip, still = made(platform)
    data, address, tag = platform.store.get(clip["object_key"]), f"/clips/{clip['clip_id']}.mp4", f'"{clip["sha256"]}"'
    whole = web.get(address)
    assert (whole.status_code, whole.content, whole.headers["content-type"]) == (200, data, "video/mp4")
    assert whole.headers["etag"] == tag and whole.headers["accept-ranges"] == "bytes"
    head = web.head(address)
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(data)))
    assert head.headers["etag"] == tag
    for asked, start, end in (("0-9", 0, 10), ("10-", 10, len(data)), ("-5", len(data) - 5, len(data))):
        part = web.get(address, headers={"range": f"bytes={asked}"})
        assert (part.status_code, part.content) == (206, data[start:end]), asked
        assert part.headers["content-range"] == f"bytes {start}-{end - 1}/{len(data)}"
    assert web.get(address, headers={"range": f"bytes={len(data)}-"}).status_code == 416
    for unknown in ("bytes=x", "items=0-9", "bytes=", "0-9"):
        assert web.get(address, headers={"range": unknown}).content == data
    same = web.get(address, headers={"range": "bytes=0-9", "if-range": tag})
    other = web.get(address, headers={"range": "bytes=0-9", "if-range": '"of another"'})
    assert (same.status_code, other.status_code, other.content) == (206, 200, data)
    assert web.get(address, headers={"if-none-match": f'"x", W/{tag}'}).status_code == 304
    picture = web.get(f"/clips/{still['clip_id']}.png")
    assert (picture.headers["content-type"], picture.content) == (
        "image/png",
        platform.store.get(still["object_key"]),
    )
    for clip_id, ending in ((clip["clip_id"], "mp4"), (still["clip_id"], "png")):
        led = web.get(f"/clips/{clip_id}")
        assert (led.status_code, led.headers["location"]) == (307, f"/clips/{clip_id}.{ending}")
    assert web.get(f"/clips/{clip['clip_id']}.png").status_code == 404
    with ThreadPoolExecutor(16) as threads:
        assert {answer.content for answer in threads.map(lambda _: web.get(address), range(64))} == {data}


def test_what_people_wrote_is_text(platform: Platform, web: TestClient) -> None:
    clip, _ = made(platform)
    facts = web.get(f"/clips/{clip['clip_id']}.json")
    assert facts.headers["content-type"] == "application/json" and facts.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in facts.headers["content-security-policy"]
    said = facts.json()
    assert (said["prompt"], said["seed"], said["recipe"]) == (HOSTILE, clip["seed"], clip["recipe"])
    assert web.get(said["link"]).status_code == 200


def test_a_manifest_is_that_of_the_store_and_before_that_the_ledgers(platform: Platform, web: TestClient) -> None:
    run = platform.submit(["a red ball", "a blue ball"])
    request = platform.request_of(run)
    live = web.get(f"/requests/{request}")
    assert [json.loads(line)["status"] for line in live.text.splitlines()] == ["queued", "queued"]
    waiting = web.get(f"/clips/{request}-000000-0.mp4")
    assert waiting.status_code == 404 and "queued" in waiting.json()["detail"]
    assert web.get(f"/clips/{request}-000000-0").headers["location"].endswith(".json")
    with platform.engines():
        run.outcome()
    for address in (f"/requests/{request}", f"/requests/{request}/manifest.jsonl"):
        assert web.get(address).content == platform.store.get(f"requests/{request}/manifest.jsonl")
        assert web.head(address).content == b""
    sheet = web.get(f"/requests/{request}/contact_sheet.png")
    assert sheet.content == platform.store.get(f"requests/{request}/contact_sheet.png")


NOWHERE = [
    "/",
    "/clips/",
    "/clips/req_0123456789ab-000000-0.mp4",
    "/clips/..%2f..%2f..%2fetc%2fpasswd",
    "/clips/%2e%2e/%2e%2e/etc/passwd",
    "/clips/req_0123456789ab-000000-0'--.mp4",
    "/clips/req_0123456789ab-000000-0%00.mp4",
    "/clips/%F0%9F%8E%A5.mp4",
    "/clips/" + "a" * 5000,
    "/clips/req_0123456789ab-" + "9" * 100 + "-0.mp4",
    "/requests/req_0123456789ab",
    "/requests/req_0123456789ab/contact_sheet.png",
    "/requests/'%20or%201=1%20--",
    "/requests/..%2fblobs",
    "/docs",
    "/openapi.json",
]


def test_hostile_names_lead_nowhere(web: TestClient) -> None:
    for address in NOWHERE:
        assert (web.get(address).status_code, address) == (404, address)
    assert web.post("/clips/req_0123456789ab-000000-0.mp4").status_code == 405
    assert web.delete("/requests/req_0123456789ab").status_code == 405
    assert web.get("/healthz", headers={"host": "evil.example"}).status_code == 400, "no name of others leads here"


def test_it_may_read_the_views_alone(platform: Platform, web: TestClient) -> None:
    assert web.get("/healthz").json() == {"status": "ok"}
    service = Service(platform.settings)
    for forbidden in ("select from clips", "create temporary table t ()", "delete from clips"):
        with pytest.raises(Exception, match=r"permission denied|read-only"), service.asking() as session:
            session.execute(text(forbidden))
    service.engine.dispose()


def test_bytes_that_are_gone_are_not_found_and_a_ledger_that_is_gone_is_said(
    platform: Platform, web: TestClient
) -> None:
    clip, _ = made(platform)
    platform.store.delete(clip["object_key"])
    assert web.get(f"/clips/{clip['clip_id']}.mp4").status_code == 404
    away = platform.settings.model_copy(update={"reader_url": "postgresql+psycopg://nobody@127.0.0.1:1/none"})
    with TestClient(create_app(away), base_url="http://127.0.0.1") as client:
        for address in ("/healthz", f"/clips/{clip['clip_id']}.mp4", f"/requests/{clip['request_id']}"):
            assert client.get(address).status_code == 503


@pytest.mark.xdist_group("radosgw")
def test_clips_in_s3_are_signed_links(platform: Platform, server: S3Server) -> None:
    clip, _ = made(platform)
    keys = server.access_key, server.secret_key
    store = S3Store(server.endpoint, *keys, f"web-{uuid.uuid4().hex[:12]}", secure=server.secure)
    data = platform.store.get(clip["object_key"])
    assert store.put(data, "video/mp4").key == clip["object_key"]
    app = create_app(platform.settings, store=store)
    with TestClient(app, base_url="http://127.0.0.1", follow_redirects=False) as client:
        led = client.get(f"/clips/{clip['clip_id']}.mp4")
        assert led.status_code == 307 and led.headers["cache-control"] == "no-store"
        part = httpx.get(led.headers["location"], headers={"range": "bytes=2-5"}, trust_env=False)
        assert (part.status_code, part.content, part.headers["content-type"]) == (206, data[2:6], "video/mp4")
        head = client.head(f"/clips/{clip['clip_id']}.mp4")
        assert (head.status_code, head.headers["content-length"]) == (200, str(len(data)))
        assert head.headers["etag"] == f'"{clip["sha256"]}"'


def test_links_are_below_the_service_or_not_there() -> None:
    links, none = Links("http://127.0.0.1:8400"), Links(None)
    assert links.clip("c", "video/mp4") == "http://127.0.0.1:8400/clips/c.mp4"
    assert links.clip("c", "image/png") == "http://127.0.0.1:8400/clips/c.png"
    assert links.clip("c") == "http://127.0.0.1:8400/clips/c"
    assert links.manifest("r") == "http://127.0.0.1:8400/requests/r/manifest.jsonl"
    assert none.clip("c") is none.facts("c") is none.manifest("r") is none.sheet("r") is None
