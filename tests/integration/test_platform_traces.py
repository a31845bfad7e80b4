"""The traces of a request and of its clips, as the platform makes them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

import infra.tracing
from tests.fake_renderer import Fault, Trouble
from tests.platform import Platform

STAGES = {"wait", "text", "denoise", "decode", "encode", "put", "record"}


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    kept, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    monkeypatch.setattr(infra.tracing, "_tracer", lambda: provider.get_tracer("rushes"))
    yield kept
    provider.shutdown()


def hex_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.trace_id:032x}"


def test_a_clip_has_a_trace_of_its_own_that_leads_to_its_request(
    platform: Platform, spans: InMemorySpanExporter
) -> None:
    platform.script.trouble["a bad cube"] = Trouble(Fault.FAILS, times=9)
    with platform.engines():
        outcome, _ = platform.make(["a red ball", {"prompt": "a still", "frames": 1}, "a bad cube"], tenant="studio")
    clips = platform.clips(outcome.request_id)
    ended = spans.get_finished_spans()
    (start,) = [span for span in ended if span.name == "engine.start"]
    assert (start.attributes or {})["rushes.partition"]
    shards = {span.context.span_id: span for span in ended if span.name == "shard" and span.context}
    for clip in clips:
        mine = [span for span in ended if hex_of(span) == clip["trace_id"]]
        (root,) = [span for span in mine if span.parent is None]
        assert root.name == "clip" and root.attributes is not None
        assert root.attributes["rushes.clip.id"] == clip["clip_id"]
        (link,) = root.links
        assert link.context.span_id in shards and f"{link.context.trace_id:032x}" != clip["trace_id"]
        told = {
            "gen_ai.operation.name": "generate_content",
            "gen_ai.request.seed": clip["seed"],
            "gen_ai.request.model": clip["model"],
            "rushes.tenant": "studio",
            "rushes.attempt": clip["attempts"],
            "rushes.width": clip["width"],
            "rushes.partition": clip["partition"],
            "rushes.output.type": "image" if clip["frames"] == 1 else "video",
        }
        assert told.items() <= dict(root.attributes).items()
        if clip["status"] == "done":
            assert {span.name for span in mine} == {"clip"} | STAGES
            assert all(root.start_time <= span.start_time and span.end_time <= root.end_time for span in mine)
            assert root.status.status_code is StatusCode.UNSET
        else:
            assert root.status.status_code is StatusCode.ERROR and root.status.description
    assert len({clip["trace_id"] for clip in clips}) == len(clips)
