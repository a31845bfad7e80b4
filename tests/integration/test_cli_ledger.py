"""The commands that ask: against a real ledger and a real store, with bytes that a test may break."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import time
import uuid
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker
from typer.testing import CliRunner

from db.artifacts import NewArtifact
from db.claim import claim_shard
from db.leases import complete_shard, fail_clip, record_clip, start_clip
from db.planning import reuse_renders
from db.requests import finish_request, pause_request, request_id
from db.view import COLUMNS
from flows.cli.main import app
from infra.store.folder import FolderStore
from model.media.encode import encode_png
from tests.factories import ENGINE, MODEL, new_clip, opened, planned

# One with a custom_id, two samples, an id that is no file name, two ids that would be one file, one failed, one bad.
CLIPS = [
    new_clip(0, custom_id="opening"),
    new_clip(1, custom_id="pair", sample=0),
    new_clip(1, custom_id="pair", sample=1),
    new_clip(2, custom_id="../../etc/passwd"),
    new_clip(3, custom_id="a:b"),
    new_clip(4, custom_id="A*b"),
    new_clip(5, prompt="a cube [bold]falls[/bold]"),
    new_clip(6, prompt="", rejected="prompts.jsonl:7: prompt is blank", custom_id="bad"),
]
FAILED = 5


@dataclass
class Made:
    """A request that has been rendered."""

    home: Path
    store: FolderStore
    ledger: sessionmaker[Session]
    request: str

    def clip(self, index: int, sample: int = 0) -> str:
        return f"{self.request}-{index:06d}-{sample}"

    def bytes_of(self, clip_id: str) -> bytes:
        return f"bytes of {clip_id}".encode()

    def file_of(self, clip_id: str) -> Path:
        sha256 = hashlib.sha256(self.bytes_of(clip_id)).hexdigest()
        (found,) = self.home.glob(f"store/blobs/sha256/*/*/{sha256}")
        return found


@pytest.fixture
def made(tmp_path: Path, database_url: str, ledger: sessionmaker[Session], monkeypatch: pytest.MonkeyPatch) -> Made:
    for name in os.environ:
        if name.startswith("RUSHES_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("RUSHES_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RUSHES_DATABASE_URL", database_url)
    with ledger.begin() as session:
        request = opened(session, CLIPS, key="dailies")
        planned(session, request)
    made = Made(tmp_path / "home", FolderStore(tmp_path / "home" / "store"), ledger, request)
    with ledger.begin() as session:
        lease, todo = claim_shard(session, "engine-1", seconds=60, model_digest=MODEL) or pytest.fail("no work")
        for clip in todo:
            start_clip(session, lease, clip.clip_id, **ENGINE)
            if clip.clip_id == made.clip(FAILED):
                fail_clip(session, lease, clip.clip_id, "the model cannot", permanent=True)
                continue
            stored = made.store.put(made.bytes_of(clip.clip_id), "video/mp4")
            artifact = NewArtifact(**asdict(stored))
            record_clip(session, lease, clip.clip_id, artifact=artifact, seconds={"denoise": 2.0})
        complete_shard(session, lease)
        sheet = made.store.put_at(f"requests/{request}/contact_sheet.png", b"sheet", "image/png")
        finish_request(session, request, sheet_key=sheet.key)
    return made


def rushes(*arguments: str, code: int = 0, input: str | None = None) -> str:
    """Runs a command, asserts its exit code, and returns its output, or its errors where it fails."""
    done = CliRunner().invoke(app, arguments, input=input, prog_name="rushes")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.output


def listed(*arguments: str) -> list[dict[str, Any]]:
    return json.loads(rushes(*arguments, "--format", "json"))


def test_history_lists_what_was_asked_for(made: Made) -> None:
    rows = listed("history", "--request", made.request)
    assert [row["index"] for row in rows] == [0, 1, 1, 2, 3, 4, 5, 6]
    assert {row["status"] for row in rows} == {"done", "failed", "rejected"}
    assert rows[0]["sha256"] == hashlib.sha256(made.bytes_of(made.clip(0))).hexdigest()
    assert [row["error"] for row in listed("history", "--status", "failed")] == ["the model cannot"]
    assert [row["clip_id"] for row in listed("history", "--prompt", "CUBE")] == [made.clip(5)]
    assert listed("history", "--since", "1h", "--limit", "3") == rows[:3]
    assert listed("history", "--columns", "clip_id, status", "--limit", "1") == [
        {"clip_id": made.clip(0), "status": "done"}
    ]
    assert "a cube [bold]falls[/bold]" in rushes("history")
    from_csv = list(csv.DictReader(io.StringIO(rushes("history", "-f", "csv"))))
    assert [row["clip_id"] for row in from_csv] == [row["clip_id"] for row in rows]


def test_requests_are_listed(made: Made) -> None:
    (row,) = listed("requests")
    assert (row["request"], row["name"], row["status"]) == (made.request, "dailies", "completed_with_gaps")
    assert (row["total"], row["done"], row["failed"], row["rejected"], row["left"]) == (len(CLIPS), 6, 1, 1, 0)
    assert isinstance(row["clips_per_minute"], float) and row["eta"] is None
    table = rushes("requests")
    assert all(head in table for head in ("done", "failed", "left", "rate", "eta")) and "/min" in table


def test_show_tells_everything_of_a_clip(made: Made) -> None:
    story = json.loads(rushes("show", made.clip(0), "--format", "json"))
    assert story["custom_id"] == "opening" and story["status"] == "done"
    assert story["link"] == made.file_of(made.clip(0)).as_uri()
    (attempt,) = story["tries"]
    assert attempt["denoise_seconds"] == 2.0
    assert "the model cannot" in rushes("show", made.clip(FAILED))
    error = rushes("show", "req_000000000000-000000-0", code=2)
    assert error.startswith("rushes: no clip 'req_000000000000-000000-0' in the ledger")


def test_a_clip_is_found_by_what_is_at_hand(made: Made, tmp_path: Path) -> None:
    """By its id, the submitter's id, digests and their beginnings, a file of its bytes, a changed file's tags."""
    clip = listed("history", "--columns", "all", "--request", made.request)[0]
    copy, changed = tmp_path / "copy.mp4", tmp_path / "changed.png"
    copy.write_bytes(made.bytes_of(clip["clip_id"]))
    changed.write_bytes(encode_png(np.zeros((16, 16, 3), np.uint8), {"clip_id": clip["clip_id"]}))
    names = [clip["clip_id"], "opening", clip["sha256"], clip["sha256"][:8], clip["recipe"], str(copy), str(changed)]
    for name in names:
        assert json.loads(rushes("show", name, "--format", "json"))["clip_id"] == clip["clip_id"], name
        assert rushes("open", name).strip().endswith(clip["sha256"])
    assert json.loads(rushes("show", "pair", "--format", "json"))["custom_id"] == "pair", "one of several"
    (tmp_path / "strange.mp4").write_bytes(b"nothing of ours")
    for strange in (str(tmp_path / "strange.mp4"), "0" * 64, "nobody", "' or true --", ""):
        assert "no clip" in rushes("show", strange, code=2)
    for named in (made.request, "dailies"):
        assert f"a request: `rushes history --request {made.request}`" in rushes("show", named, code=2)
    assert "failed: the model cannot: there is nothing to play" in rushes("open", made.clip(FAILED), code=1)


def test_a_clip_opens_at_the_service_where_there_is_one(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUSHES_WEB_URL", "http://127.0.0.1:8400")
    assert rushes("open", "opening").strip() == f"http://127.0.0.1:8400/clips/{made.clip(0)}.mp4"


def test_history_is_narrowed_and_explains_its_columns(made: Made) -> None:
    row = listed("history", "--limit", "1")[0]
    assert len(listed("history", "--tenant", row["tenant"], "--model", row["model"])) == len(CLIPS)
    assert len(listed("history", "--model", MODEL[:10])) == len(CLIPS)
    with made.ledger.begin() as session:
        session.execute(text("update clips set tags = '{hero,\"a shot\"}' where index = 0"))
    tagged = listed("history", "--tag", "hero", "--tag", "a shot")
    assert tagged and all(row["index"] == 0 and "hero" in row["tags"] for row in tagged)
    assert listed("history", "--tag", "hero", "--tag", "villain") == []
    assert listed("history", "--tenant", "nobody") == listed("history", "--model", "nothing") == []
    meanings = {row["column"]: row["means"] for row in listed("history", "--columns", "help")}
    assert list(meanings) == list(COLUMNS) and all(meanings.values())
    assert "did you mean clip_id" in rushes("history", "--columns", "clipid", code=2)


def test_a_trace_adds_up(made: Made) -> None:
    rows = listed("trace", "opening")
    assert [row["span"] for row in rows] == ["waiting", "denoise"] and rows[1]["seconds"] == 2.0
    assert rows[0]["start"] == 0 and rows[1]["start"] == pytest.approx(rows[0]["seconds"])
    lines = rushes("trace", "opening").splitlines()
    assert lines[0].startswith(f"{made.clip(0)} done after ") and "attempt 1 done" in lines[2 - 1]
    assert "█" in lines[-1] and "2.000 s" in lines[-1]
    assert "attempt 1 failed" in rushes("trace", made.clip(FAILED)) and "the model cannot" in rushes(
        "trace", made.clip(FAILED)
    )


def test_requests_are_compared_clip_by_clip(made: Made) -> None:
    with made.ledger.begin() as session:
        others = [*CLIPS[:6], new_clip(6, prompt="a cube [bold]falls[/bold]", seed=99), new_clip(9, prompt="alone")]
        other = opened(session, others, key="other")
    assert "nothing differs" in rushes("diff", made.request, "dailies")
    done = CliRunner().invoke(app, ["diff", made.request, other, "-f", "json"], prog_name="rushes")
    assert done.exit_code == 1
    differ = {row["line"]: row for row in json.loads(done.stdout)}
    assert "seed 35 → 99" in differ["a cube [bold]falls[/bold]"]["differs"]
    assert differ["alone"]["differs"] == "only in the second" and differ["alone"][made.request] is None
    assert differ["bad"]["differs"] == "only in the first"
    assert "status done → queued" in differ["opening"]["differs"]
    assert "2 clips differ" in rushes("diff", made.request, other, "--limit", "2", code=1)


def test_what_cannot_be_reproduced_is_told_before_anything_is_loaded(made: Made) -> None:
    with made.ledger.begin() as session:
        queued = f"{opened(session, [new_clip(20)], key='tomorrow')}-000020-0"
    done, failed, nobody = made.clip(0), made.clip(FAILED), "req_000000000000-000000-0"
    said = rushes("reproduce", queued, done, failed, nobody, made.clip(6), code=2).splitlines()
    assert said[0].startswith(f"rushes: clip {queued} is queued, not done")
    assert said[0].endswith("wait for its request to finish")
    assert said[1].startswith(
        f"rushes: clip {done}: its model mini ({MODEL[:12]}) is not known here any more: mini is "
    )
    assert said[1].endswith("`rushes models add FOLDER` with its weights makes them known")
    assert said[2].startswith(f"rushes: clip {failed} is failed, not done") and f"rushes show {failed}" in said[2]
    assert said[3].startswith(f"rushes: no clip {nobody!r} in the ledger: `rushes history` lists")
    assert said[4].startswith(f"rushes: clip {made.clip(6)} is rejected, not done")
    assert said[5:] == ["rushes: 5 of 5 clips cannot be rendered again: nothing was rendered"]
    assert rushes("reproduce", "-r", "tomorrow", code=2).startswith(f"rushes: {queued[:16]} has no clip that is done")
    assert "no request 'yesterday'" in rushes("reproduce", "-r", "yesterday", code=2)
    assert "must look like tp=2 or cfg=2" in rushes("reproduce", done, "--partition", "two", code=2)
    assert {row["reproductions"] for row in listed("history")} == {0}
    sample = rushes("reproduce", "-r", "dailies", "--sample", "2", code=2).splitlines()
    assert sample[2:] == ["rushes: 2 of 2 clips cannot be rendered again: nothing was rendered"]


def test_sql_answers_and_cannot_change_anything(made: Made) -> None:
    query = "select status, count(*) as clips from history group by 1 order by 1"
    assert listed("sql", query) == [
        {"status": "done", "clips": 6},
        {"status": "failed", "clips": 1},
        {"status": "rejected", "clips": 1},
    ]
    assert rushes("sql", "-", "-f", "csv", input=query).splitlines()[1] == "done,6"
    assert listed("sql", "select 1 as a, 2 as a") == [{"a": 1, "a_2": 2}]
    for evil in ("delete from clips", "select 1; commit; drop table clips", "drop view history"):
        assert len(rushes("sql", evil, code=2).splitlines()) == 1
    error = rushes("sql", "select statos from history", code=2)
    assert error.startswith('rushes: column "statos" does not exist')
    assert "HINT" in error and len(error.splitlines()) == 1
    assert "timeout" in rushes("sql", "select pg_sleep(10)", "--timeout", "0.2", code=2)
    assert len(listed("history")) == len(CLIPS)


def test_export_names_files_by_custom_id_and_never_leaves_its_folder(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "clips"
    said = rushes("export", "dailies", str(folder))  # by the request's name
    assert "6 clips copied and the contact sheet; 2 clips of the request are not done" in said
    files = {path.name for path in folder.iterdir()}
    assert files == {
        "opening.mp4",
        "pair.mp4",
        "pair-1.mp4",
        "etc_passwd.mp4",
        "a_b.mp4",
        "manifest.jsonl",
        "contact_sheet.png",
        f"A_b-{made.clip(4)}.mp4",  # on a file system that ignores case it would have been a_b.mp4
    }
    manifest = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert [clip["index"] for clip in manifest] == [0, 1, 1, 2, 3, 4, 5, 6]
    for clip in manifest:
        assert (clip["file"] is None) == (clip["status"] != "done")
        if clip["file"]:
            assert (folder / clip["file"]).read_bytes() == made.bytes_of(clip["clip_id"])


def test_export_again_copies_what_is_missing_or_wrong(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    rushes("export", made.request, str(folder))
    (folder / "opening.mp4").unlink()
    (folder / "pair.mp4").write_bytes(b"half of")
    kept = (folder / "pair-1.mp4").stat().st_mtime_ns
    assert "2 clips copied, 4 there already" in rushes("export", made.request, str(folder))
    assert (folder / "pair.mp4").read_bytes() == made.bytes_of(made.clip(1))
    assert (folder / "pair-1.mp4").stat().st_mtime_ns == kept


def test_export_says_which_bytes_are_gone_or_wrong(made: Made, tmp_path: Path) -> None:
    made.file_of(made.clip(0)).unlink()
    made.file_of(made.clip(2)).write_bytes(b"something else")
    said = rushes("export", made.request, str(tmp_path / "clips"), code=1)
    assert f"rushes: {made.clip(0)}: its bytes are not in the store (blobs/sha256/" in said
    assert f"rushes: {made.clip(2)}: the store's bytes have another digest than the ledger" in said
    assert not list((tmp_path / "clips").glob(".*")) and not (tmp_path / "clips" / "opening.mp4").exists()


def test_audit_finds_nothing_where_nothing_is_wrong(made: Made) -> None:
    said = rushes("audit")
    assert "7 rows and 6 blobs compared" in said and "no breaches" in said


def test_audit_leaves_what_maintenance_is_yet_to_delete(made: Made) -> None:
    """A cancel or a kill leaves bytes without a row, for a day."""
    orphan = made.store.put(b"of a killed engine", "video/mp4")
    grow_old(made, hours=24.9)
    assert "7 blobs (1 of them young and without a row yet) compared" in rushes("audit")
    grow_old(made, hours=25.1)
    assert orphan.key in rushes("audit", code=1)


def test_audit_finds_every_kind_of_breach(made: Made) -> None:
    gone, longer, other = (made.file_of(made.clip(index)) for index in (0, 2, 3))
    gone.unlink()
    longer.write_bytes(b"x" * 100)
    other.write_bytes(bytes(reversed(other.read_bytes())))
    orphan = made.store.put(b"of a killed engine", "video/mp4")
    grow_old(made, hours=26)
    made.store.put(b"of an engine at work", "video/mp4")
    made.store.put_at("prompts/abc", b"not a blob", "text/plain")
    done = CliRunner().invoke(app, ["audit", "-f", "json"], prog_name="rushes")
    assert done.exit_code == 1
    breaches = {(row["problem"], row["key"].rpartition("/")[2]) for row in json.loads(done.stdout)}
    assert breaches == {
        ("missing", gone.name),
        ("wrong size", longer.name),
        ("wrong digest", other.name),
        ("orphan", orphan.sha256),
    }
    quick = json.loads(CliRunner().invoke(app, ["audit", "--quick", "-f", "json"], prog_name="rushes").stdout)
    assert {row["problem"] for row in quick} == {"missing", "wrong size", "orphan"}


def grow_old(made: Made, hours: float) -> None:
    """All blobs were put so many hours ago."""
    then = time.time() - 3600 * hours
    for path in (made.home / "store" / "blobs").rglob("*"):
        if path.is_file():
            os.utime(path, (then, then))


def test_watch_reports_a_request_that_has_ended(made: Made) -> None:
    said = rushes("watch", made.request, code=1)
    assert f"{made.request} completed with gaps: 6 done, 1 failed, 1 rejected; 2.00 engine seconds" in said
    with made.ledger.begin() as session:
        again = opened(session, [new_clip(0)], key="again")  # of a recipe that has been rendered
        assert reuse_renders(session, again) == 1
        finish_request(session, again)
    assert "again" in rushes("requests")
    assert f"{again} completed: 1 done, 1 of them found" in rushes("watch", "again")


def test_cancel_ends_what_has_not_ended(made: Made) -> None:
    assert "is completed with gaps: nothing was left to cancel" in rushes("cancel", made.request)
    with made.ledger.begin() as session:
        request = opened(session, [new_clip(10), new_clip(11)], key="later")
    assert rushes("cancel", "later").strip() == f"{request}: 2 clips cancelled"
    assert "is cancelled: nothing was left to cancel" in rushes("cancel", "later")
    with made.ledger.begin() as session:
        held = opened(session, [new_clip(12)], key="held")
        assert pause_request(session, held)
    assert rushes("cancel", "held").strip() == f"{held}: 1 clip cancelled"
    assert {row["status"] for row in listed("history", "--request", request)} == {"cancelled"}
    assert "cancelled: 2 cancelled" in rushes("watch", request, code=1)


@pytest.mark.parametrize("command", [["watch"], ["cancel"], ["export"]])
def test_an_unknown_request_is_bad_input(made: Made, command: list[str], tmp_path: Path) -> None:
    arguments = [*command, "nobody", *([str(tmp_path / "x")] if command == ["export"] else [])]
    assert (
        rushes(*arguments, code=2).strip()
        == "rushes: no request 'nobody' in the ledger: `rushes requests` lists those there are"
    )


class Prefect(ThreadingHTTPServer):
    """Answers as Prefect does about one flow run, tagged with the request that it is to open."""

    daemon_threads = True

    def __init__(self, request: str) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.request = request
        self.asked = Event()
        self.run = {"id": str(uuid.uuid4()), "name": "tomorrow", "state_type": "SCHEDULED", "state_name": "Scheduled"}


class Answers(BaseHTTPRequestHandler):
    server: Prefect  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        self.say(self.server.run)
        self.server.asked.set()

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["flow_runs"]
        known = asked in (
            {"tags": {"all_": [f"request:{self.server.request}"]}},
            {"name": {"any_": [self.server.run["name"]]}},
        )
        self.say([self.server.run] if known else [])
        self.server.asked.set()

    def say(self, body: Any) -> None:
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def tomorrow(monkeypatch: pytest.MonkeyPatch) -> Generator[Prefect]:
    """A request that was submitted and that its flow run has yet to open."""
    with Prefect(request_id("tomorrow")) as server, ThreadPoolExecutor(1) as thread:
        thread.submit(server.serve_forever, 0.02)
        monkeypatch.setenv("RUSHES_PREFECT_API_URL", f"http://127.0.0.1:{server.server_port}/api")
        try:
            yield server
        finally:
            server.shutdown()


@pytest.mark.parametrize("named", ["request", "name", "run"])
def test_a_request_is_known_as_soon_as_it_is_submitted(
    made: Made, tomorrow: Prefect, named: str, tmp_path: Path
) -> None:
    name = {"request": tomorrow.request, "name": "tomorrow", "run": tomorrow.run["id"]}[named]

    def open_it() -> None:
        assert tomorrow.asked.wait(60)
        with made.ledger.begin() as session:
            opened(session, [new_clip(30)], key="tomorrow", name="tomorrow", flow_run_id=tomorrow.run["id"])

    with ThreadPoolExecutor(1) as thread:
        opening = thread.submit(open_it)
        done = CliRunner().invoke(app, ["export", name, str(tmp_path / "x")], prog_name="rushes")
        opening.result()
    assert done.exit_code == 0 and "0 clips copied" in done.stdout, done.output
    assert f"rushes: {name} is not opened yet: waiting for its flow run tomorrow" in done.stderr


def test_a_request_whose_run_was_refused_says_why(made: Made, tomorrow: Prefect) -> None:
    ended = {"state_type": "FAILED", "state_name": "BadInput", "state": {"message": "1 error: nothing was submitted"}}
    tomorrow.run |= ended  # type: ignore[arg-type]
    said = rushes("cancel", tomorrow.request, code=2)
    assert "its flow run tomorrow ended as BadInput: 1 error: nothing was submitted" in said
    assert "no request 'nobody' in the ledger" in rushes("cancel", "nobody", code=2)


def test_a_ledger_without_tables_says_how_to_make_them(
    empty_database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUSHES_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RUSHES_DATABASE_URL", empty_database_url)
    assert "`rushes migrate` makes them" in rushes("history", code=1)
    rushes("migrate")
    assert listed("history") == []
