"""The words about a request under way: its status on the run's page, and the lines of the log that tell its story.

Pure functions on values. What people brought, prompts and errors alike, is shown as text and never obeyed as Markdown.
"""

from __future__ import annotations

import math
import string
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from db.engines import FailedStart
from db.requests import Progress
from db.tables import ClipStatus, RequestStatus
from db.watching import EngineNow, FailureCause
from flows.plan import starts
from flows.show import printable
from flows.web.links import NO_LINKS, Links

WINDOW = 600.0  # seconds over which the rate is taken, at least
FEW = 10  # clips in that window, at least: of clips that take minutes it is longer
BAR = 40  # characters
MILESTONES = (1, 5, 10, 25, 50, 75, 90)  # percent at which the log says where it stands
SILENCE = 300.0  # seconds without a line of the log, at most
CELL = 160  # characters of a prompt or an error in a table
STARTING = "an engine is starting, which takes 10 to 80 s: it loads the model first"
FAILED = (ClipStatus.FAILED, ClipStatus.QUARANTINED)
_ESCAPED = {ord(mark): f"&#{ord(mark)};" for mark in string.punctuation if mark not in ",.-"}


# --- words


def count_of(count: int, noun: str) -> str:
    """1 clip, 10,000 clips."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def spoken(seconds: float) -> str:
    """40 s, 12 min, 3 h 50, 4 days: as exact as somebody who waits wants to know it."""
    minutes = round(seconds / 60)
    if seconds < 59.5:
        return f"{max(1, round(seconds))} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02}"
    return f"{round(minutes / 60 / 24)} days"


def rate_in_words(per_minute: float) -> str:
    """41 a minute, 4.1 a minute, 12 an hour."""
    if per_minute >= 9.95:
        return f"{per_minute:,.0f} a minute"
    if per_minute >= 1:
        return f"{per_minute:.1f} a minute"
    per_hour = per_minute * 60
    return f"{per_hour:.0f} an hour" if per_hour >= 9.95 else f"{per_hour:.1f} an hour"


def as_text(words: str, most: int = CELL) -> str:
    """Words of others in a line of Markdown: every mark becomes a character reference, which means nothing but itself.

    most: characters that are shown of them.
    """
    line = " ".join(printable(words.replace("\n", " ")).split())
    cut = line if len(line) <= most else line[: most - 1] + "…"
    return cut.translate(_ESCAPED)


def clock(at: datetime, now: datetime) -> str:
    """The time of day, with the day of the week where it is not today, in this machine's time zone."""
    here, today = at.astimezone(), now.astimezone()
    return f"{here:%H:%M %Z}" if here.date() == today.date() else f"{here:%A %H:%M %Z}"


# --- figures


@dataclass(slots=True)
class Pace:
    """How fast clips come to an end that engines were at, over the last minutes. All times are the ledger's."""

    seen: deque[tuple[datetime, int]] = field(default_factory=deque[tuple[datetime, int]])

    def see(self, progress: Progress) -> None:
        ended = by_engines(progress)
        if not self.seen or self.seen[-1][1] != ended:
            self.seen.append((progress.now, ended))
        oldest = progress.now - timedelta(seconds=WINDOW)
        while len(self.seen) > 1 and self.seen[1][0] <= oldest and ended - self.seen[1][1] >= FEW:
            self.seen.popleft()

    def per_minute(self, progress: Progress) -> float | None:
        """None while no engine has ended a clip."""
        ended, began = by_engines(progress), progress.first_started
        if not ended or began is None:
            return None
        since, before = self.seen[0] if self.seen else (began, 0)
        if ended == before:  # nothing since it watches: what came before is all that is known
            since, before = began, 0
        seconds = (progress.now - max(since, began)).total_seconds()
        return (ended - before) / max(seconds, 0.001) * 60 if ended > before else None

    def left(self, progress: Progress) -> float | None:
        """Seconds until the last clip, at this pace; None while there is none."""
        rate = self.per_minute(progress)
        return progress.waiting / rate * 60 if rate else None


def by_engines(progress: Progress) -> int:
    """Clips that engines brought to an end."""
    ended = sum(progress.counts[status] for status in (ClipStatus.DONE, *FAILED))
    return max(0, ended - progress.reused)


def failed_in(progress: Progress) -> int:
    return sum(progress.counts[status] for status in FAILED)


def percent_of(progress: Progress) -> float:
    """Of its clips, those that have come to an end."""
    return 100.0 * (progress.added - progress.waiting) / (progress.added or 1)


# --- sentences


def headline(progress: Progress, pace: Pace) -> str:
    """312 of 10,000 clips, 41 a minute, about 3 h 50 left, 2 failed."""
    done, failed = progress.counts[ClipStatus.DONE], failed_in(progress)
    parts = [f"{done:,} of {count_of(progress.added, 'clip')}"]
    rate, left = pace.per_minute(progress), pace.left(progress)
    if progress.status is RequestStatus.PAUSED:
        parts += [f"paused with {progress.waiting:,} left"]
    elif progress.waiting:
        parts += ["no clip yet"] * (by_engines(progress) == 0)
        parts += [rate_in_words(rate), f"about {spoken(left)} left"] if rate and left else []
    parts += [f"{failed:,} failed"] * (failed > 0)
    cancelled = progress.counts[ClipStatus.CANCELLED]
    parts += [f"{cancelled:,} cancelled"] * (cancelled > 0)
    return ", ".join(parts)


def bar(percent: float) -> str:
    """Full where all has ended, empty where nothing has; in between never quite either."""
    full = math.floor(BAR * percent / 100)
    if 0 < percent < 100:
        full = min(BAR - 1, max(1, full))
    return "█" * full + "░" * (BAR - full)


def expected(progress: Progress, pace: Pace) -> str:
    """When it will be done, in words."""
    if not progress.waiting:
        return "All clips have come to an end."
    if progress.status is RequestStatus.PAUSED:
        return (
            "It is paused for as long as you like. What engines had under way is kept. "
            f"**Resume**, above or by `rushes resume {progress.request_id}`, goes on from there."
        )
    left = pace.left(progress)
    if left is None:
        return "No clip yet: the first ones will say how long it takes."
    at = clock(progress.now + timedelta(seconds=left), progress.now)
    return f"About {spoken(left)} left: done at {at}, if it goes on as in the last minutes."


# --- the page


def status_text(
    progress: Progress,
    pace: Pace,
    engines: Sequence[EngineNow],
    causes: Sequence[FailureCause],
    failed: Sequence[FailedStart] = (),
    links: Links = NO_LINKS,
) -> str:
    """The whole status of a request, in Markdown. failed: starts of its engines."""
    parts = [
        f"# {headline(progress, pace)}",
        f"`{bar(percent_of(progress))}` {percent_of(progress):.0f} %",
        expected(progress, pace),
        counts_table(progress),
        f"## Engines\n{engines_table(engines, progress, failed)}",
    ]
    if causes:
        parts.append(f"## What failed\n{causes_table(causes, links)}\n\n{remedy(progress, causes)}")
    parts.append(more(progress.request_id))
    return "\n\n".join(parts) + "\n"


def counts_table(progress: Progress) -> str:
    """Done, failed, left and what else there is: these add up to all."""
    counts = progress.counts
    columns = [
        ("done", counts[ClipStatus.DONE]),
        ("… of them reused", progress.reused),
        ("failed", failed_in(progress)),
        ("cancelled", counts[ClipStatus.CANCELLED]),
        ("bad lines", counts[ClipStatus.REJECTED]),
        ("left", progress.waiting),
        ("… of them rendering", counts[ClipStatus.RUNNING]),
        ("all", progress.added),
    ]
    shown = [(name, count) for name, count in columns if count or name not in ("cancelled", "bad lines")]
    return table([name for name, _ in shown], [[f"{count:,}" for _, count in shown]], align="--:")


def engines_table(engines: Sequence[EngineNow], progress: Progress, failed: Sequence[FailedStart] = ()) -> str:
    if progress.waiting and failed:
        said = f"**E{as_text(starts.tell(failed, progress.now)[1:], 600)}.**"
        return f"{said}\n\n{engines_table(engines, progress)}" if engines else said
    if not engines:
        if progress.status is RequestStatus.PAUSED:
            return "None is needed."
        return "None is at work." if not progress.waiting else f"None is at work yet: {STARTING}."
    rows = [
        [
            f"[{as_text(engine.host)}](../../runs/flow-run/{engine.flow_run_id})"
            if engine.flow_run_id
            else as_text(engine.host),
            as_text(engine.device),
            as_text(engine.partition),
            *doing(engine, progress.request_id),
        ]
        for engine in engines
    ]
    return table(["engine", "device", "partition", "state", "now"], rows)


def doing(engine: EngineNow, request_id: str) -> tuple[str, str]:
    """The state of an engine, and the details."""
    if engine.shard_id is None:
        return "idle", "waits for a shard"
    if engine.request_id != request_id:
        return "elsewhere", f"renders for {as_text(engine.request_id or '')}"
    size = f"{count_of(engine.size or 0, 'clip')} of {engine.width}x{engine.height}x{engine.frames}"
    clip = f", at `{engine.clip_id}`" if engine.clip_id else ""
    return "renders", f"shard {engine.shard_id}: {size}{clip}"


def causes_table(causes: Sequence[FailureCause], links: Links = NO_LINKS) -> str:
    rows = [
        [
            f"{cause.clips:,}",
            as_text(cause.kind),
            as_text(cause.error),
            linked(cause.example, links.facts(cause.example)),
        ]
        for cause in causes
    ]
    return table(["clips", "kind", "error", "for example"], rows)


def remedy(progress: Progress, causes: Sequence[FailureCause]) -> str:
    """The commands that help."""
    look = f"Look at one: `rushes show {causes[0].example}`."
    again = f"Render what failed again: `rushes retry {progress.request_id}`."
    return f"{again} {look}" if failed_in(progress) else look


def more(request_id: str) -> str:
    """The SQL that asks for more, in a block of its own."""
    return f"""## More
Watch it in a terminal: `rushes watch {request_id}`. In SQL (`rushes psql`):
```sql
select status, count(*), avg(seconds) from history where request_id = '{request_id}' group by 1;
select clip_id, error_class, error, prompt from history where request_id = '{request_id}' and error is not null;
```"""


def linked(id: str, address: str | None) -> str:
    """The id of something in Markdown: it leads to the address, where there is one."""
    return f"[{id}]({address})" if address else f"`{id}`"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, align: str = "---") -> str:
    """A table in Markdown; cells are Markdown already."""
    lines = [heads, [align] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- the log


@dataclass(slots=True)
class Story:
    """The log of a run so far: it knows what was told, and when to say more. Times are the ledger's."""

    began: datetime | None = None
    told_at: datetime | None = None
    percent: float = 0.0  # at the last look
    engines: bool | None = None  # there were some at the last look
    first: bool = False  # the first clip was told

    def tell(self, progress: Progress, pace: Pace, *, engines: int) -> list[str]:
        """The lines that this look is worth, mostly none. engines: that live and have this model."""
        now, lines, percent = progress.now, list[str](), percent_of(progress)
        if self.began is None:
            self.began = self.told_at = now
            self.first = by_engines(progress) > 0  # an earlier run has told
            self.percent = percent
        assert self.told_at is not None
        goes_on = progress.waiting and progress.status is not RequestStatus.PAUSED
        if goes_on and (engines > 0) is not self.engines:
            if not engines:
                lines.append(STARTING if self.engines is None else "no engine is at work any more; another is started")
            elif self.engines is None:
                lines.append(f"{count_of(engines, 'engine')} with this model {'is' if engines == 1 else 'are'} running")
            else:
                lines.append(f"{count_of(engines, 'engine')} ready, {spoken((now - self.began).total_seconds())} after")
            self.engines = engines > 0
        if not self.first and by_engines(progress):
            self.first = True
            lines.append(f"first clip after {spoken((now - self.began).total_seconds())}")
        passed = any(self.percent < mark <= percent < 100 for mark in MILESTONES)
        late = (now - self.told_at).total_seconds() >= SILENCE
        if goes_on and (passed or (late and not lines)):
            lines.append(headline(progress, pace))
        self.percent = percent
        if lines:
            self.told_at = now
        return lines
