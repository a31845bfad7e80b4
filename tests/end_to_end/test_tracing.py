"""One trace for a request, from the command that submitted it to the store, across four processes."""

from __future__ import annotations

from collections import Counter

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.collector import Collector
from tests.end_to_end.stack import Stack, wait_for

pytestmark = [pytest.mark.xdist_group("stack"), pytest.mark.timeout(900), pytest.mark.slow]

STAGES = {"text", "denoise", "decode", "encode", "put", "record"}


def test_one_connected_trace_from_submit_to_put(stack: Stack, runs: dict[str, str], spans: Collector) -> None:
    clips = stack.clips(stack.request_of(runs["command"]))
    (trace_id,) = {clip["trace_id"] for clip in clips}

    def whole() -> dict[bytes, tuple[str, Span]]:
        """The spans of this trace, once the last has arrived; the engine sends its last ones by and by."""
        mine = {span.span_id: (service, span) for service, span in spans.spans if span.trace_id.hex() == trace_id}
        counts = Counter(span.name for _, span in mine.values())
        return mine if counts["record"] == len(clips) and counts["submit"] and counts["generate"] else {}

    trace = wait_for(whole, "the spans")

    def parent(span: Span) -> tuple[str, Span]:
        assert span.parent_span_id in trace, f"{span.name} hangs in the air"
        return trace[span.parent_span_id]

    (root,) = [(service, span) for service, span in trace.values() if not span.parent_span_id]
    assert (root[0], root[1].name) == ("rushes-submit", "submit")
    for _, span in trace.values():
        while span is not root[1]:
            _, span = parent(span)  # to the root, or it fails on the way

    services = {service for service, _ in trace.values()}
    assert services == {"rushes-submit", "rushes-generate", "rushes-engine"}
    of_clips = [span for _, span in trace.values() if span.name == "clip"]
    ids = [
        attribute.value.string_value for span in of_clips for attribute in span.attributes if attribute.key == "clip_id"
    ]
    assert sorted(ids) == [clip["clip_id"] for clip in clips]
    for clip in of_clips:
        service, shard = parent(clip)
        assert (service, shard.name) == ("rushes-engine", "shard")
        assert parent(shard)[0] == "rushes-generate"
        children = [span for _, span in trace.values() if span.parent_span_id == clip.span_id]
        assert {span.name for span in children} == STAGES and len(children) == len(STAGES)
        (denoise,) = [span for span in children if span.name == "denoise"]
        steps = 2 if clip.span_id in still(of_clips, clips) else 4
        assert [event.name for event in denoise.events] == [f"step {k + 1}" for k in range(steps)]
        times = [denoise.start_time_unix_nano, *(event.time_unix_nano for event in denoise.events)]
        assert times == sorted(times)


def still(spans: list[Span], clips: list[dict[str, object]]) -> set[bytes]:
    """Ids of the spans of clips that take two steps."""
    two = {clip["clip_id"] for clip in clips if clip["steps"] == 2}
    return {
        span.span_id for span in spans for a in span.attributes if a.key == "clip_id" and a.value.string_value in two
    }
