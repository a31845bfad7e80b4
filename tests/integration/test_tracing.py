"""Traces as a collector receives them: real processes, a real OTLP receiver, and collectors that fail."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from tests.collector import Collector

ROOT = Path(__file__).parents[2]


@pytest.fixture
def collector(request: pytest.FixtureRequest) -> Generator[Collector]:
    with Collector(getattr(request, "param", 200)) as running:
        yield running
        running.shutdown()


def run(script: str, *arguments: str, **otel: str) -> "subprocess.CompletedProcess[str]":
    """A program of its own, as a process has one tracer provider for good; its log goes to standard error."""
    head = "import json, logging, os, sys, time\nfrom infra.tracing import *\nlogging.basicConfig(level='INFO')\n"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")} | otel
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", head + script, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


SUBMIT = """
import subprocess
setup_tracing("rushes-control")
with continued(None, "submit", request_id="req_1"):
    with continued({}, "plan"):
        work = json.dumps(carrier())
    print(current_trace_id())
    # The engine is another program, started with what the shard's row carries; it forks beside its sender thread.
    quiet = ["-W", "error", "-W", "ignore::DeprecationWarning"]
    subprocess.run([sys.executable, *quiet, "-c", sys.argv[1], work], check=True)
assert current_trace_id() is None and carrier() == {}
"""
RENDER = """
import json, os, sys
from infra.tracing import *
setup_tracing("rushes-engine")
with continued(json.loads(sys.argv[1]), "shard", shard_id=7, partition=None):
    steps = [Event("denoise.step", 1000.5 + i, {"step": i}) for i in range(200)]
    denoise = span_between("denoise", 1000.25, 1200.75, events=steps, clip_id="req_1-000000-0")
    span_between("inner", 1001, 1000, parent=denoise)   # a clock that was set back
    with continued(None, "put", key=b"as text"):
        pass
    # A rank that is forked and leaves in a hurry.
    child = os.fork()
    if child == 0:
        with continued(None, "forked"):
            pass
        os._exit(0 if flush() else 1)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_one_tree_across_processes(collector: Collector) -> None:
    done = run(SUBMIT, RENDER, OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint, OTEL_BSP_SCHEDULE_DELAY="100")
    assert (done.returncode, done.stderr) == (0, "")
    spans = {span.span_id: span for _, span in collector.spans}
    assert {span.trace_id.hex() for span in spans.values()} == {done.stdout.strip()}
    parents = {span.name: spans[span.parent_span_id].name if span.parent_span_id else None for span in spans.values()}
    assert parents == {
        "submit": None, "plan": "submit", "shard": "plan",
        "denoise": "shard", "inner": "denoise", "put": "shard", "forked": "shard",
    }  # fmt: skip
    assert {service for service, span in collector.spans if span.name in ("submit", "plan")} == {"rushes-control"}
    assert {service for service, span in collector.spans if span.name not in ("submit", "plan")} == {"rushes-engine"}

    denoise = collector.named("denoise")[1]
    assert (denoise.start_time_unix_nano, denoise.end_time_unix_nano) == (1_000_250_000_000, 1_200_750_000_000)
    assert [event.time_unix_nano for event in denoise.events] == [1_000_500_000_000 + i * 10**9 for i in range(200)]
    assert [event.attributes[0].value.int_value for event in denoise.events] == list(range(200))
    inner = collector.named("inner")[1]
    assert inner.start_time_unix_nano == inner.end_time_unix_nano
    assert {each.key for each in collector.named("shard")[1].attributes} == {"shard_id"}, "None is left out"


def test_an_exception_passes_and_is_on_the_span(collector: Collector) -> None:
    script = """
setup_tracing("engine")
try:
    with continued(None, "render"):
        raise ValueError("out of memory")
except ValueError:
    print("passed")
"""
    done = run(script, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=collector.endpoint + "/v1/traces")
    assert (done.stdout, done.stderr) == ("passed\n", "")
    span = collector.named("render")[1]
    assert span.status.code == Status.STATUS_CODE_ERROR
    assert "out of memory" in span.status.message
    assert [event.name for event in span.events] == ["exception"]


def test_a_provider_that_is_set_is_kept_and_twice_is_once(collector: Collector) -> None:
    script = """
from opentelemetry import trace
setup_tracing("first")
kept = trace.get_tracer_provider()
setup_tracing("second")
assert trace.get_tracer_provider() is kept
with continued(None, "once"):
    pass
assert flush()
"""
    done = run(script, OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint)
    assert (done.returncode, done.stderr) == (0, "")
    assert collector.named("once")[0] == "first"

    script = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
seen, theirs = InMemorySpanExporter(), TracerProvider()
theirs.add_span_processor(SimpleSpanProcessor(seen))
trace.set_tracer_provider(theirs)
setup_tracing("ours")
with continued(None, "span"):
    pass
assert trace.get_tracer_provider() is theirs and len(seen.get_finished_spans()) == 1
"""
    done = run(script, OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(collector.spans) == 1


def test_the_name_of_the_service_may_come_from_the_environment(collector: Collector) -> None:
    script = "setup_tracing('ours')\nwith continued(None, 'span'): pass"
    run(script, OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint, OTEL_SERVICE_NAME="theirs")
    assert collector.named("span")[0] == "theirs"


@pytest.mark.parametrize("carried", ["{}", "null", '{"traceparent": "nonsense"}', '{"other": "x"}'])
def test_what_cannot_be_read_begins_a_new_trace(carried: str) -> None:
    script = """
setup_tracing("engine")
with continued(json.loads(sys.argv[1]), "shard") as span:
    assert span.parent is None and current_trace_id()
    with continued(json.loads(sys.argv[1]), "clip") as inner:
        assert inner.parent.span_id == span.get_span_context().span_id
"""
    done = run(script, carried)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_a_collector_there_are_ids_and_nothing_else() -> None:
    script = """
import threading
setup_tracing("engine")
begun = time.process_time()
for _ in range(2000):
    with continued(None, "shard"):
        name = current_trace_id()
cost = (time.process_time() - begun) / 2000
assert flush()
print(json.dumps([name, len(threading.enumerate()), cost, "requests" in sys.modules]))
"""
    done = run(script)
    assert (done.returncode, done.stderr) == (0, "")
    name, threads, cost, loaded = json.loads(done.stdout)
    assert len(name) == 32
    assert int(name, 16)
    assert threads == 1
    assert cost < 0.002, "seconds a span: nothing beside a clip, even on a busy machine"
    assert not loaded


WORK = """
setup_tracing("engine")
begun = time.process_time()
for _ in range(4000):     # more than the queue holds
    with continued(None, "clip"):
        pass
print(json.dumps(time.process_time() - begun))
if len(sys.argv) > 1:
    time.sleep(float(sys.argv[1]))
    for _ in range(600):
        with continued(None, "clip"):
            pass
    begun = time.monotonic()
    assert not flush(0.5)
    assert time.monotonic() - begun < 30  # half a second on an idle machine, minutes where it waits for an answer
"""


def _assert_unharmed(done: "subprocess.CompletedProcess[str]", seconds: float) -> None:
    assert done.returncode == 0
    lines = done.stderr.splitlines()
    assert len(lines) <= 1, done.stderr
    for line in lines:
        assert line.startswith("WARNING:infra.tracing:traces cannot be sent to http://127.0.0.1:")
    assert json.loads(done.stdout) < 5, "the work itself is not held up"
    assert seconds < 60, "nor is its end, which would be minutes if it waited for every batch"


def test_a_collector_that_is_down_costs_one_warning() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    begun = time.monotonic()
    done = run(WORK, "5", OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{port}", OTEL_BSP_SCHEDULE_DELAY="100")
    _assert_unharmed(done, time.monotonic() - begun)
    assert done.stderr, "one warning there must be"


def test_a_collector_that_never_answers_holds_nobody_up() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=50) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        begun = time.monotonic()
        done = run(WORK, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint)
        _assert_unharmed(done, time.monotonic() - begun)


@pytest.mark.parametrize("collector", [400, 503], indirect=True)
def test_a_collector_that_refuses_costs_one_warning(collector: Collector) -> None:
    begun = time.monotonic()
    done = run(WORK, OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint)
    _assert_unharmed(done, time.monotonic() - begun)
    assert collector.requests
    assert done.stderr, "one warning there must be"
