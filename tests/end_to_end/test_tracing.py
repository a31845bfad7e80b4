"""A trace of a request, from the command that submitted it to its shards, across processes; and one of each clip."""

from __future__ import annotations

from collections import Counter

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.collector import Collector
from tests.end_to_end.stack import Stack, wait_for

pytestmark = [pytest.mark.xdist_group("stack"), pytest.mark.timeout(900), pytest.mark.slow]

STAGES = {"wait", "text", "denoise", "decode", "encode", "put", "record"}


def test_one_connected_trace_from_submit_to_shards_and_one_a_clip_to_put(
    stack: Stack, runs: dict[str, str], spans: Collector
) -> None:
    request = stack.request_of(runs["command"])
    clips = stack.clips(request)
    (asked,) = stack.sql(f"select trace_id from ask.requests where request_id = '{request}'")
    of_clip = {str(clip["trace_id"]): clip for clip in clips}
    assert len(of_clip) == len(clips) and asked["trace_id"] not in of_clip

    def whole() -> dict[bytes, tuple[str, Span]]:
        """The spans of these traces, once the last has arrived; the engine sends its last ones by and by."""
        known = {asked["trace_id"], *of_clip}
        mine = {span.span_id: (service, span) for service, span in spans.spans if span.trace_id.hex() in known}
        counts = Counter(span.name for _, span in mine.values())
        return mine if counts["clip"] == len(clips) and counts["submit"] and counts["generate"] else {}

    traces = wait_for(whole, "the spans")

    def parent(span: Span) -> tuple[str, Span]:
        assert span.parent_span_id in traces, f"{span.name} hangs in the air"
        return traces[span.parent_span_id]

    trace = {k: pair for k, pair in traces.items() if pair[1].trace_id.hex() == asked["trace_id"]}
    (root,) = [(service, span) for service, span in trace.values() if not span.parent_span_id]
    assert (root[0], root[1].name) == ("rushes-submit", "submit")
    for _, span in trace.values():
        while span is not root[1]:
            _, span = parent(span)  # to the root, or it fails on the way
    assert {service for service, _ in trace.values()} == {"rushes-submit", "rushes-generate", "rushes-engine"}
    assert not any(span.name == "clip" for _, span in trace.values())

    for trace_id, clip in of_clip.items():
        mine = [span for _, span in traces.values() if span.trace_id.hex() == trace_id]
        (root_span,) = [span for span in mine if not span.parent_span_id]
        assert clip["clip_id"] in [a.value.string_value for a in root_span.attributes if a.key == "rushes.clip.id"]
        (link,) = root_span.links
        service, shard = trace[link.span_id]
        assert (service, shard.name) == ("rushes-engine", "shard") and parent(shard)[0] == "rushes-generate"
        children = [span for span in mine if span is not root_span]
        assert {span.name for span in children} == STAGES and len(children) == len(STAGES)
        (denoise,) = [span for span in children if span.name == "denoise"]
        assert [event.name for event in denoise.events] == [f"step {k + 1}" for k in range(int(str(clip["steps"])))]
        times = [denoise.start_time_unix_nano, *(event.time_unix_nano for event in denoise.events)]
        assert times == sorted(times)
