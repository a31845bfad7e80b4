"""What a request's page and log say of it: sums, grammar, times, and words of others as nothing but words."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from html import unescape

from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from db.requests import Progress
from db.tables import ClipStatus, RequestStatus
from db.watching import EngineNow, FailureCause
from flows.generate.status import (
    BAR,
    MILESTONES,
    SILENCE,
    STARTING,
    Pace,
    Story,
    as_text,
    bar,
    count_of,
    counts_table,
    headline,
    percent_of,
    rate_in_words,
    spoken,
    status_text,
)

NOON = datetime(2026, 12, 1, 12, tzinfo=UTC)
REQUEST = "req_1454f0f6e252"


def at(seconds: float, *, reused: int = 0, began: float = 30.0, **counts: int) -> Progress:
    """A request so many seconds after noon, whose first clip was begun at `began`."""
    of_each = {status: counts.get(str(status), 0) for status in ClipStatus}
    return Progress(
        request_id=REQUEST,
        status=RequestStatus.OPEN,
        total=sum(of_each.values()),
        counts=of_each,
        reused=reused,
        seconds_done=0.0,
        mean_seconds=None,
        first_started=NOON + timedelta(seconds=began) if seconds >= began else None,
        engines=1,
        now=NOON + timedelta(seconds=seconds),
    )


def watched(*looks: Progress) -> Pace:
    pace = Pace()
    for look in looks:
        pace.see(look)
    return pace


def engine(**changes: object) -> EngineNow:
    values: dict[str, object] = {
        "id": "a", "host": "gpu-7", "device": "cuda H200", "partition": "cfg1xsp1xtp2", "flow_run_id": "12-34",
        "request_id": REQUEST, "shard_id": 24, "width": 64, "height": 48, "frames": 17, "size": 40,
        "clip_id": f"{REQUEST}-000312-0",
    }  # fmt: skip
    return EngineNow(**values | changes)  # type: ignore[arg-type]


def test_the_sentence() -> None:
    waiting = at(10, queued=10_000)
    assert headline(waiting, watched(waiting)) == "0 of 10,000 clips, no clip yet"
    later = at(30 + 453, done=312, failed=2, queued=9646, running=40)
    assert headline(later, watched(waiting, later)) == "312 of 10,000 clips, 42 a minute, about 3 h 53 left, 2 failed"
    assert headline(at(90, queued=1), Pace()) == "0 of 1 clip, no clip yet"
    assert headline(at(90, done=1), Pace()) == "1 of 1 clip"
    assert headline(at(90, done=1, cancelled=5), Pace()) == "1 of 6 clips, 5 cancelled"
    assert headline(at(90, done=4, reused=4, queued=1), Pace()) == "4 of 5 clips, no clip yet", "reuse is no pace"


def test_words() -> None:
    assert [count_of(number, "clip") for number in (0, 1, 2, 10_000)] == [
        "0 clips",
        "1 clip",
        "2 clips",
        "10,000 clips",
    ]
    said = [spoken(seconds) for seconds in (0, 40, 59.7, 90, 3599, 3600, 13_800, 200_000)]
    assert said == ["1 s", "40 s", "1 min", "2 min", "1 h 00", "1 h 00", "3 h 50", "2 days"]
    assert [rate_in_words(rate) for rate in (1234, 41, 4.08, 0.5, 0.01)] == [
        "1,234 a minute", "41 a minute", "4.1 a minute", "30 an hour", "0.6 an hour",
    ]  # fmt: skip


def seconds_in(words: str) -> float:
    """The least and the most that somebody may understand are within half of the last unit."""
    days = re.fullmatch(r"(\d+) days", words)
    hours = re.fullmatch(r"(\d+) h (\d\d)", words)
    units = {"s": 1, "min": 60}
    if days:
        return int(days[1]) * 86400
    return int(hours[1]) * 3600 + int(hours[2]) * 60 if hours else int(words.split()[0]) * units[words.split()[1]]


@given(st.floats(1, 1e7))
def test_a_time_in_words_is_right_within_a_quarter_of_it(seconds: float) -> None:
    assert 0.65 * seconds - 1 <= seconds_in(spoken(seconds)) <= 1.5 * seconds + 1


numbers = st.integers(0, 2_000_000)


@given(numbers, numbers, numbers, numbers, numbers, numbers, numbers)
def test_the_counts_add_up(done: int, failed: int, bad: int, gone: int, poison: int, queued: int, running: int) -> None:
    shown = at(600, done=done, failed=failed, quarantined=poison, rejected=bad, cancelled=gone, queued=queued,
               running=running, reused=done // 2)  # fmt: skip
    heads, _, row = counts_table(shown).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (heads, row)]
    values = {name: int(value.replace(",", "")) for name, value in zip(*cells, strict=True)}
    whole = values.pop("all")
    assert sum(value for name, value in values.items() if not name.startswith("…")) == whole == shown.added
    assert 0 <= percent_of(shown) <= 100


@given(st.floats(0, 100))
def test_a_bar_is_full_or_empty_only_where_all_or_nothing_has_ended(percent: float) -> None:
    drawn = bar(percent)
    assert len(drawn) == BAR
    assert ("█" not in drawn) == (percent == 0) and ("░" not in drawn) == (percent == 100)


@given(st.integers(1, 50), st.integers(1, 400), st.integers(1, 100_000))
def test_an_even_pace_is_found_and_ends_when_it_says(every: int, done: int, left: int) -> None:
    """A clip in `every` seconds, looked at after each, since the engine was ready."""
    looks = [
        at(0, queued=done + left),
        *(at(30 + n * every, done=n, queued=done + left - n) for n in range(1, done + 1)),
    ]
    pace = watched(*looks)
    seconds = pace.left(looks[-1])
    assert seconds is not None and abs(seconds - left * every) <= 0.001 * left * every + 1
    assert len(pace.seen) <= 602


def test_the_pace_forgets_what_was_long_ago() -> None:
    slow = [at(30 + n * 60, done=n, queued=5000 - n) for n in range(61)]
    fast = [at(3630 + n, done=60 + n, queued=4940 - n) for n in range(1, 1201)]
    rate = watched(*slow, *fast).per_minute(fast[-1])
    assert rate is not None and 59 <= rate <= 61


def test_a_run_that_goes_on_where_another_was_has_a_pace_at_once() -> None:
    now = at(630, done=300, queued=300)
    assert watched(now).per_minute(now) == 30


def test_the_status_says_all_of_it() -> None:
    looks = at(0, queued=10_000), at(483, done=312, failed=2, queued=9646, running=40)
    causes = [
        FailureCause(kind="not_finite", error="the pixels are | not <b>finite</b>", clips=2, example=f"{REQUEST}-7-0")
    ]
    idle = engine(id="b", host="gpu-8", shard_id=None, request_id=None, flow_run_id=None)
    text = status_text(looks[-1], watched(*looks), [engine(), idle], causes)
    assert text.startswith("# 312 of 10,000 clips, 42 a minute, about 3 h 53 left, 2 failed\n")
    assert re.search(r"About 3 h 53 left: done at (\w+ )?\d\d:\d\d \S+, if it goes on", text)
    assert "| [gpu-8]" not in text and "| gpu-8 |" in text and "| idle | waits for a shard |" in text
    assert "[gpu-7](../../runs/flow-run/12-34)" in text
    assert f"shard 24: 40 clips of 64x48x17, at `{REQUEST}-000312-0`" in text
    assert f"| `{REQUEST}-7-0` |" in text and f"`rushes retry {REQUEST}`" in text
    html = MarkdownIt("commonmark").enable("table").render(text)
    assert html.count("<table>") == 3 and "<b>" not in html and "| not &lt;b&gt;finite&lt;/b&gt;" in html


def test_the_status_before_any_engine() -> None:
    text = status_text(at(1, queued=3), Pace(), [], [])
    assert STARTING in text and "no clip yet" in text and "What failed" not in text


@given(st.text(max_size=200))
def test_words_of_others_are_words(words: str) -> None:
    """Rendered as Markdown with HTML allowed, they are one cell of a table with nothing in it but text."""
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(f"| a |\n|---|\n| x{as_text(words)} |")
    cells = re.findall(r"<td>(.*?)</td>", html, re.DOTALL)
    assert len(cells) == 1 and "<" not in cells[0]
    assert len(unescape(cells[0])) <= 161


def told(looks: list[Progress], engines: list[int]) -> list[str]:
    pace, story, lines = Pace(), Story(), list[str]()
    for progress, alive in zip(looks, engines, strict=True):
        pace.see(progress)
        lines += story.tell(progress, pace, engines=alive)
    return lines


def test_the_log_tells_the_story() -> None:
    """A hundred clips, one in six seconds, with an engine that is ready after half a minute."""
    looks = [at(0, queued=100), at(30, queued=100, began=1000), at(30, queued=99, running=1)]
    looks += [at(30 + 6 * n, done=n, queued=100 - n) for n in range(1, 101)]
    lines = told(looks, [0, 1, *[1] * 101])
    assert lines[:3] == [STARTING, "1 engine ready, 30 s after", "first clip after 36 s"]
    assert lines[3] == "1 of 100 clips, 10 a minute, about 10 min left"
    assert [int(line.split()[0]) for line in lines[3:]] == list(MILESTONES)


def test_a_slow_request_is_heard_of_every_five_minutes() -> None:
    looks = [at(5.0 * n, queued=1_000_000, began=1e9) for n in range(721)]
    lines = told(looks, [1] * 721)
    assert lines[0] == "1 engine with this model is running"
    assert len(lines) == 1 + 3600 // SILENCE and set(lines[1:]) == {"0 of 1,000,000 clips, no clip yet"}


def test_engines_that_are_gone_are_missed_once() -> None:
    looks = [at(5.0 * n, queued=5, began=1e9) for n in range(4)]
    assert told(looks, [2, 0, 0, 1])[1:] == [
        "no engine is at work any more; another is started",
        "1 engine ready, 15 s after",
    ]
