"""The page of a request's run: status, shards, refusals, the summary.

The texts are made here; `Page` is where they go: the run's page in the Prefect UI (`flows.clients.page`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, Protocol, TypeAlias

from sqlalchemy.orm import Session, sessionmaker

from db.planning import ShardRow, shard_table
from db.requests import Progress
from db.tables import ClipStatus, ShardStatus
from db.watching import FailureCause, engines_now, failed_starts_for, failure_causes
from flows.generate.estimates import Estimate, as_duration
from flows.generate.outcome import Outcome
from flows.generate.status import Pace, Story, count_of, failed_in, headline, status_text
from flows.plan import starts
from flows.show import picture_address
from flows.web.links import Links
from infra.store.contract import LINK_SECONDS, Store

ROUND = 5.0  # seconds between two rounds of asking and telling Prefect, at least
REPORT_MOST = 60.0  # seconds between two reports to the UI, at most
TABLE_ROWS = 100  # shards that the UI's table shows
STATUS = "0-status"  # a page is in the order of its keys, and this is to be the first

HEADS = {
    "RewriterFailed": "The rewriter failed",
    "QuotaExceeded": "Too much at once",
    "ForeignStore": "Another ledger's store",
}  # of refusals, by the name of the run's state; else it is bad input

Row: TypeAlias = Mapping[str, str | int | float]


class Button(StrEnum):
    """Buttons on the page of a run that begin it again."""

    RESUME = "resume"
    RETRY = "retry"


class Page(Protocol):
    """The page and the log of one run. What is shown under a key again replaces what was there."""

    web: str | None  # address of the service that shows clips

    def suspended(self) -> bool:
        """True once somebody pressed Suspend on the page since this process began."""
        ...

    def info(self, message: str) -> None:
        """A line of the log."""
        ...

    def warn(self, message: str) -> None:
        """A line of the log that a person should read."""
        ...

    def markdown(self, key: str, text: str, description: str | None = None) -> None: ...

    def table(self, key: str, rows: Sequence[Row], description: str) -> None: ...

    def image(self, key: str, address: str, description: str) -> None: ...


def key_of(request_id: str, what: str) -> str:
    """The key under which a page shows something of a request: letters, digits and dashes."""
    return f"{request_id.replace('_', '-')}-{what}"


def refuse(page: Page, messages: Sequence[str], *, count: int = 1, reason: str = "BadInput") -> Outcome:
    """All errors at once, on the page and in the outcome's message; nothing was recorded or planned."""
    text = "\n".join(messages)
    what = HEADS.get(reason, "Bad input")
    page.warn(f"{what}: nothing was submitted. {count_of(count, 'error')}:")
    for message in messages:
        page.warn(message)
    page.markdown("bad-input", f"# {what}: nothing was submitted\n```\n{text}\n```", f"{what}: nothing was submitted.")
    return Outcome.refused(text, count=count, reason=reason)


def tell_deadline(page: Page, request_id: str, deadline: float, expected: Estimate) -> None:
    """On the run's page and in its log, before anything is rendered."""
    if (warning := expected.misses(deadline)) is None:
        page.info(f"expected to be done in {as_duration(expected.seconds)}, in time")
        return
    page.warn(warning)
    text = f"# The deadline will not be met\n{warning}."
    page.markdown(key_of(request_id, "deadline"), text, "Told at submission")


def pause(age: float) -> float:
    """Seconds to the next report of a request that has been watched for `age` seconds."""
    return min(REPORT_MOST, max(ROUND, age / 50))


class Report:
    """The page of a run while its clips are made: the status and a table of shards, kept up to date.

    Prefect keeps each change as an event with all of the text in it (some 35 kB), so that a request which takes days
    reports less often than one of minutes.
    """

    def __init__(self, page: Page, request_id: str) -> None:
        self.page, self.request_id = page, request_id
        self.pace, self.story = Pace(), Story()
        self.said: tuple[Any, ...] = ()
        self.failed_start: str | None = None  # the last one that was told
        self.causes: Sequence[FailureCause] = ()
        self.causes_of = 0  # clips that had ended badly when the causes were looked up
        self.began = time.monotonic()
        self.not_before = self.began

    def send(self, ledgers: sessionmaker[Session], progress: Progress, *, last: bool = False) -> None:
        """Says in the log what is worth a line, and changes the page where something has changed and it is time."""
        self.pace.see(progress)
        with ledgers() as session:
            engines = engines_now(session, self.request_id)
            failed = failed_starts_for(session, self.request_id) if progress.waiting else []
        if failed and failed[-1].id != self.failed_start:
            self.failed_start = failed[-1].id
            self.page.warn(starts.tell(failed, progress.now))
        for line in self.story.tell(progress, self.pace, engines=len({engine.id for engine in engines})):
            self.page.info(line)
        said = (progress.status, *sorted(progress.counts.items()), *engines, *(start.id for start in failed))
        now = time.monotonic()
        if said == self.said or (now < self.not_before and not last):
            return
        ended_badly = failed_in(progress) + progress.counts[ClipStatus.REJECTED]
        with ledgers() as session:
            if ended_badly != self.causes_of:
                self.causes, self.causes_of = failure_causes(session, self.request_id), ended_badly
            rows = [as_line(row) for row in shard_table(session, self.request_id, limit=TABLE_ROWS)]
        text = status_text(progress, self.pace, engines, self.causes, failed, Links(self.page.web))
        self.page.markdown(key_of(self.request_id, STATUS), text, f"{headline(progress, self.pace)}.")
        shards = rows or [{"shard": "none: every clip was found"}]
        self.page.table(key_of(self.request_id, "shards"), shards, "Shards, the newest last")
        self.said = said
        self.not_before = now + pause(now - self.began)


def show_clips(page: Page, ledgers: sessionmaker[Session], store: Store, progress: Progress) -> None:
    """Some of the clips with moving pictures, under one key however often."""
    from flows.generate.gallery import clips_text, pick, thumbnail_of

    with ledgers() as session:
        rows = pick(session, progress)
    text = clips_text(rows, progress, lambda row: thumbnail_of(store, row), Links(page.web))
    page.markdown(key_of(progress.request_id, "clips"), text, "Some of the clips: what failed first, then a spread.")


def as_line(row: ShardRow) -> Row:
    """A shard as a person reads it: done as soon as its last clip is, though its engine has yet to give it back."""
    over = row.status is ShardStatus.LEASED and row.done + row.failed == row.size
    return {
        "shard": row.id,
        "status": str(ShardStatus.DONE if over else row.status),
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
    page: Page, store: Store, outcome: Outcome, progress: Progress, *, manifest: str, sheet: str | None
) -> None:
    """Shows what remains on the run's page. manifest, sheet: keys in the store."""
    request_id, ending = outcome.request_id or "", str(outcome.ending).replace("_", " ")
    counts = "\n".join(f"| {name} | {count} |" for name, count in sorted(progress.counts.items()) if count)
    per_clip = f"{progress.mean_seconds:.2f} s" if progress.mean_seconds else "nothing was rendered"
    page.markdown(
        key_of(request_id, "summary"),
        f"""# {request_id}: {ending}

| status | clips |
|---|---|
{counts}

{outcome.cache_hits} of {progress.total} clips were found, not rendered again. Engine time a rendered clip: {per_clip}.

Ask more in SQL:
```sql
select clip_id, custom_id, status, seconds, object_key, error from history where request_id = '{request_id}';
select status, count(*), avg(seconds) from history where request_id = '{request_id}' group by 1;
```
Export the clips: `rushes export {request_id} FOLDER`. One clip: `rushes show CLIP_ID`.
""",
        "How it went, and how to ask more",
    )
    page.markdown(
        key_of(request_id, "outputs"),
        outputs_text(request_id, manifest, Links(page.web).manifest(request_id), store.link(manifest)),
        "Outputs",
    )
    if sheet:
        page.image(key_of(request_id, "contact-sheet"), picture_address(store.get(sheet)), "Contact sheet")


def outputs_text(request_id: str, manifest: str, address: str | None, link: str) -> str:
    """Where the manifest is. address: at the service that shows clips; link: the store's, which a file's is no link."""
    ends = ""
    if address is None and not link.startswith("file:"):
        address, ends = link, f" A signed link ends after {LINK_SECONDS // 60} minutes."
    named = f"[Manifest of all clips]({address})" if address else "Manifest of all clips"
    return f"""{named}, in the store as `{manifest}`.{ends}

`rushes export {request_id} FOLDER` brings all of it, and `rushes show CLIP_ID` tells all of one clip.
"""
