"""Requests, clips and artifacts for tests of the ledger and of what stands on it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session

from db.artifacts import NewArtifact
from db.claim import LeasedClip, claim_shard
from db.clips import NewClip, add_clips
from db.fence import Lease
from db.leases import complete_shard, expire_leases, fail_clip, record_clip, release_shard, start_clip
from db.planning import NewShard, create_shards, unplanned
from db.requests import NewRequest, open_request, seal_request
from db.settings import SETTINGS, ClipSettings

ENGINE = {"engine": "engine-1", "partition": "cfg1xsp1xtp2", "code_version": "1.0"}


def digest(of: object) -> str:
    return hashlib.sha256(str(of).encode()).hexdigest()


MODEL = digest("model")


def new_request(key: str = "batch", **changes: Any) -> NewRequest:
    values: dict[str, Any] = {
        "key": key,
        "name": key,
        "tenant": "studio",
        "model": "mini",
        "model_digest": MODEL,
        "settings": {"steps": 4},
        "source": "inline",
        "source_sha256": digest("prompts"),
        "flow_run_id": "flow-1",
        "carrier": {"traceparent": "00-1-2-01"},
        **changes,
    }
    return NewRequest(**values)


SETTINGS_OF_A_CLIP: dict[str, Any] = {
    "width": 64,
    "height": 48,
    "frames": 5,
    "fps": 8,
    "steps": 4,
    "guidance": 3.0,
    "solver": "euler",
    "shift": 3.0,
}


def new_clip(index: int, *, sample: int = 0, recipe: object = None, **changes: Any) -> NewClip:
    """A clip of its own recipe, unless one is named."""
    settings = SETTINGS_OF_A_CLIP | {name: changes.pop(name) for name in SETTINGS if name in changes}
    values: dict[str, Any] = {
        "index": index,
        "sample": sample,
        "prompt": f"a red ball, number {index}",
        "settings": ClipSettings(**settings),
        "seed": 7 * index + sample,
        "recipe": digest((index, sample) if recipe is None else recipe),
        "line": index + 1,
        **changes,
    }
    return NewClip(**values)


def artifact_of(content: object, **changes: Any) -> NewArtifact:
    sha256 = digest(("artifact", content))
    values = {"key": f"blobs/sha256/{sha256}", "bytes": 1000, "media_type": "video/mp4"} | changes
    return NewArtifact(sha256=sha256, **values)


def opened(session: Session, clips: Sequence[NewClip], key: str = "batch", **changes: Any) -> str:
    """A sealed request of these clips; its id."""
    request = open_request(session, new_request(key, **changes)).id
    add_clips(session, request, clips)
    seal_request(session, request, len(clips))
    return request


def create_shard(
    session: Session,
    request: str,
    clip_ids: Sequence[str],
    *,
    carrier: Mapping[str, str] | None = None,
    priority: int | None = None,
    **planned: Any,
) -> int | None:
    """One shard of these clips; None where none of them can be taken. `planned`: the rest of NewShard."""
    shard = NewShard(clip_ids=clip_ids, **planned)
    return next(iter(create_shards(session, request, [shard], carrier=carrier, priority=priority)), None)


def planned(session: Session, request: str, *, size: int = 100) -> list[int]:
    """All that can be planned put into shards of `size` clips; their ids."""
    shards: list[int] = []
    while clips := unplanned(session, request, size):
        shard = create_shard(session, request, [clip.clip_id for clip in clips])
        assert shard is not None
        shards.append(shard)
    return shards


def batch(session: Session, key: str, shards: int, **changes: Any) -> str:
    """A request of so many shards of one clip each; its id."""
    clips = [new_clip(index, recipe=(key, index)) for index in range(shards)]
    request = opened(session, clips, key=key, name=key, **changes)
    planned(session, request, size=1)
    return request


def claim(session: Session, owner: str = "a", **rules: Any) -> tuple[Lease, list[LeasedClip]]:
    """The next shard, of which there must be one."""
    leased = claim_shard(session, owner, seconds=600, **{"model_digest": MODEL, **rules})
    assert leased is not None, "there should be work"
    return leased


def clear(session: Session) -> None:
    """An empty ledger again, for the next example of a law."""
    for table in (
        "edges",
        "renders",
        "attempts",
        "clips",
        "shards",
        "tallies",
        "requests",
        "artifacts",
        "usage",
        "tenants",
    ):
        session.execute(text(f"delete from {table}"))


def render(session: Session, lease: Lease, clip_id: str, content: object = None) -> bool:
    """Start and record in one go."""
    start_clip(session, lease, clip_id, **ENGINE)
    return record_clip(session, lease, clip_id, artifact=artifact_of(content or clip_id), seconds={"denoise": 2.0})


def suffer(session: Session, lease: Lease, clip: LeasedClip, fate: str) -> None:
    """The clip begins, and it fails ("f"), or its engine is lost ("l") or gives its shard back ("r"); time passes."""
    start_clip(session, lease, clip.clip_id, **ENGINE)
    if fate == "f":
        fail_clip(session, lease, clip.clip_id, "no")
        complete_shard(session, lease)
    elif fate == "l":
        run_out(session, lease.shard_id)
        assert expire_leases(session) == 1
    else:
        release_shard(session, lease)
    pass_time(session, 91)


def run_out(session: Session, shard_id: int) -> None:
    """Time passes: the lease of this shard is over."""
    session.execute(
        text("update shards set leased_until = now() - interval '1 second' where id = :id and status = 'leased'"),
        {"id": shard_id},
    )


def pass_time(session: Session, seconds: float) -> None:
    """All that has happened is so much longer ago; leases stay what they are."""
    ago = {"by": seconds}
    for table, columns in {
        "requests": ("created_at",),
        "shards": ("created_at", "claimed_at"),
        "clips": ("not_before", "queued_at"),
    }.items():
        earlier = ", ".join(f"{name} = {name} - make_interval(secs => :by)" for name in columns)
        session.execute(text(f"update {table} set {earlier}"), ago)
    moved = "select tenant, minute - make_interval(secs => :by), part, gpu_seconds from gone"
    again = f"insert into usage (tenant, minute, part, gpu_seconds) {moved}"
    session.execute(text(f"with gone as (delete from usage returning *) {again}"), ago)


def statuses(session: Session, request: str) -> list[str]:
    """Of the request's clips, in file order."""
    query = text("select status::text from clips where request_id = :id order by index, sample")
    return list(session.scalars(query, {"id": request}))
