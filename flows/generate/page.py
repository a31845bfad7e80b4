"""What the Prefect page of a request shows: progress, shards, refusals, the summary."""

from __future__ import annotations

import base64
import io
import json
import math
import time
from collections.abc import Sequence
from typing import Any

from prefect import get_run_logger
from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.client.schemas.objects import State
from prefect.states import Failed
from sqlalchemy.orm import Session, sessionmaker

from db.planning import ShardRow, shard_table
from db.requests import Progress
from flows.generate.estimates import Estimate, as_duration
from infra.store.contract import LINK_SECONDS, Store

ROUND = 5.0  # seconds between two rounds of asking and telling Prefect, at least
REPORT_MOST = 60.0  # seconds between two reports to the UI, at most
TABLE_ROWS = 200  # shards that the UI's table shows
IMAGE_BYTES = 2_000_000  # of a picture that is kept inside an artifact


def refuse(messages: Sequence[str], *, count: int = 1, name: str = "BadInput") -> State[Any]:
    """All errors at once, in the UI and in the state's message; nothing was recorded or planned."""
    text = "\n".join(messages)
    what = {"RewriterFailed": "The rewriter failed", "QuotaExceeded": "Too much at once"}.get(name, "Bad input")
    create_markdown_artifact(f"# {what}: nothing was submitted\n```\n{text}\n```", key="bad-input")
    errors = f"{count} error{'s' * (count != 1)}: nothing was submitted"
    return Failed(message=f"{errors}\n{text}"[:4000], name=name)


def tell_deadline(request_id: str, deadline: float, expected: Estimate) -> None:
    """On the run's page and in its log, before anything is rendered."""
    if (warning := expected.misses(deadline)) is None:
        get_run_logger().info("expected to be done in %s, in time", as_duration(expected.seconds))
        return
    get_run_logger().warning("%s", warning)
    key = f"{request_id.replace('_', '-')}-deadline"
    create_markdown_artifact(f"# The deadline will not be met\n{warning}.", key=key, description="Told at submission")


def pause(age: float) -> float:
    """Seconds to the next report of a request that has been watched for `age` seconds."""
    return min(REPORT_MOST, max(ROUND, age / 50))


class Report:
    """What the run's page in the Prefect UI shows: one progress bar and one table of shards, kept up to date.

    Prefect keeps each change as an event with all of the table in it (some 50 kB of 200 rows), so that a request which
    takes days reports less often than one of minutes.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.key = request_id.replace("_", "-")
        self.bar: Any = None
        self.table: Any = None
        self.said: tuple[Any, ...] = ()
        self.began = time.monotonic()
        self.not_before = self.began

    def send(self, ledgers: sessionmaker[Session], progress: Progress, *, last: bool = False) -> None:
        share = 100.0 * (progress.added - progress.waiting) / (progress.added or 1)
        said, now = tuple(sorted(progress.counts.items())), time.monotonic()
        if said == self.said or (now < self.not_before and not last):
            return
        with ledgers() as session:
            rows = [as_line(row) for row in shard_table(session, self.request_id, limit=TABLE_ROWS)]
        table = rows or [{"shard": "none: every clip was found"}]
        if self.bar is None:
            bar = f"Clips of {self.request_id} that have come to an end"
            self.bar = create_progress_artifact(share, key=f"{self.key}-progress", description=bar)
        if self.table is None:
            self.table = create_table_artifact(table, key=f"{self.key}-shards", description="Shards, the newest last")
        else:
            update_progress_artifact(self.bar, share)
            with get_client(sync_client=True) as client:  # each new artifact would be one more card on the page
                client.update_artifact(self.table, ArtifactUpdate(data=json.dumps(table)))
        self.said = said
        self.not_before = now + pause(now - self.began)


def as_line(row: ShardRow) -> dict[str, str | int | float]:
    """A shard as a person wants to read it."""
    return {
        "shard": row.id,
        "status": str(row.status),
        "clips": row.size,
        "done": row.done,
        "failed": row.failed,
        "shape": f"{row.width}x{row.height}x{row.frames}",
        "engine seconds": round(row.seconds, 1),
        "claimed": f"{row.claimed_at:%H:%M:%S}" if row.claimed_at else "",
        "finished": f"{row.finished_at:%H:%M:%S}" if row.finished_at else "",
        "attempt": row.attempt,
        "engine": row.owner or "",
    }


def summarise(
    store: Store, request_id: str, progress: Progress, status: str, found: int, manifest: str, sheet: str | None
) -> None:
    """The artifacts that remain on the run's page."""
    key = request_id.replace("_", "-")
    counts = "\n".join(f"| {name} | {count} |" for name, count in sorted(progress.counts.items()) if count)
    per_clip = f"{progress.mean_seconds:.2f} s" if progress.mean_seconds else "nothing was rendered"
    create_markdown_artifact(
        f"""# {request_id}: {status.replace("_", " ")}

| status | clips |
|---|---|
{counts}

{found} of {progress.total} clips were found, not rendered again. Engine time a rendered clip: {per_clip}.

Ask more in SQL:
```sql
select clip_id, custom_id, status, seconds, object_key, error from history where request_id = '{request_id}';
select status, count(*), avg(seconds) from history where request_id = '{request_id}' group by 1;
```
Export the clips: `rushes export {request_id} FOLDER`. One clip: `rushes show CLIP_ID`.
""",
        key=f"{key}-summary",
        description="How it went, and how to ask more",
    )
    create_markdown_artifact(
        f"""[Manifest of all clips]({store.link(manifest)}), in the store as `{manifest}`.

A signed link ends after {LINK_SECONDS // 60} minutes. Then `rushes export {request_id} FOLDER` brings all of it, and
`rushes show CLIP_ID` prints a new link.
""",
        key=f"{key}-outputs",
        description="Outputs",
    )
    if sheet:
        create_image_artifact(picture(store, sheet), key=f"{key}-contact-sheet", description="Contact sheet")


def picture(store: Store, key: str) -> str:
    """The picture itself as an address, which lives as long as the page: a signed link would not, and is a secret."""
    from PIL import Image

    data = store.get(key)
    if len(data) > IMAGE_BYTES:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        scale = math.sqrt(IMAGE_BYTES / len(data))
        small = image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))
        buffer = io.BytesIO()
        small.save(buffer, "PNG")
        data = buffer.getvalue()
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
