"""Engines that hang are ended within a bound, and no engine that gives a sign of life ever is."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from flows.render.watchdog import HUNG, LATE, LONGEST, LOOK, Signs, Watchdog

NOON = datetime(2026, 12, 1, 12, tzinfo=UTC)
looks = st.lists(
    st.tuples(
        st.floats(0.1, LATE),  # seconds since the look before
        st.sampled_from(["beat", "own", "ranks", "none"]),  # what changed meanwhile
        st.booleans() | st.just(True),  # whether the ledger answers
    ),
    max_size=200,
)


@given(looks)
def test_only_an_engine_without_any_sign_for_the_whole_bound_is_ended(story: list[tuple[float, str, bool]]) -> None:
    dog, now, counts = Watchdog[str](), 0.0, dict.fromkeys(("beat", "own", "ranks"), 0)
    any_at = own_at = now
    for seconds, changed, answers in story:
        now += seconds
        if changed != "none":
            counts[changed] += 1
            any_at = now
            own_at = own_at if changed == "ranks" else now
        if not answers:  # who could have beaten?
            any_at = own_at = now
        signs = Signs(NOON + timedelta(seconds=counts["beat"]), float(counts["own"]), float(counts["ranks"]))
        hung = dog.look({"engine": signs} if answers else None, now)
        if hung:
            assert now - any_at > HUNG or now - own_at > LONGEST
        elif now - any_at > HUNG + 2 * LATE or now - own_at > LONGEST + 2 * LATE:
            raise AssertionError("it hangs, and is left alone")


@given(st.integers(0, 100), st.booleans())
def test_a_stopped_engine_is_ended_within_the_bound(before: int, ranks_spin: bool) -> None:
    dog = Watchdog[str]()
    for k in range(before):
        assert dog.look({"engine": Signs(NOON, float(k), 0.0)}, k * LOOK) == []
    bound = LONGEST if ranks_spin else HUNG
    ended = next(
        k * LOOK
        for k in range(10_000)
        if dog.look({"engine": Signs(NOON, float(before), float(k * ranks_spin))}, (before + k) * LOOK)
    )
    assert bound < ended <= bound + 2 * LOOK


def test_a_worker_that_was_asleep_itself_ends_nobody() -> None:
    """As a paused virtual machine is, whose engines slept as well."""
    dog, signs = Watchdog[str](), {"engine": Signs(NOON, 1.0, 1.0)}
    assert dog.look(signs, 0.0) == [] == dog.look(signs, 3600.0) == dog.look(signs, 3600.0 + LOOK)
