"""Traces: one per request, from submit to its shards, across processes; and one per rendering, linked to that.

`setup_tracing` is called once at the start of every process. Afterwards any module may use OpenTelemetry as it is.
Spans leave the process only where the OTEL_ environment names a collector; without one there are trace ids all the
same (the ledger records them) and nothing else: no thread, no connection, no log line. A collector that is down or
slow costs nothing but its spans: they are sent from a thread of their own, and one warning is logged.

It knows nothing of clips and shards, and never raises because of a trace.
"""

import atexit
import logging
import math
import os
import threading
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Link, Span, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

log = logging.getLogger(__name__)

GOODBYE = 3.0  # seconds that the end of a process may wait for its last spans
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
TIMEOUTS = ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT")
MAX_EVENTS = 1024  # per span; OpenTelemetry's 128 is less than the denoising steps of a careful render


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened within a span, at a unix time in seconds."""

    name: str
    at: float
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict[str, AttributeValue])


def setup_tracing(service: str) -> None:
    """Make spans real in this process; a provider that is set already (by us, Prefect or an agent) is kept.

    `service` names the process in the traces, unless OTEL_SERVICE_NAME does. Endpoint, headers, certificates, timeout,
    sampler and all else come from the OTEL_ environment, read by OpenTelemetry itself. Only OTLP over HTTP is spoken
    (a collector's port 4318).
    """
    if isinstance(trace.get_tracer_provider(), TracerProvider):
        return
    resource = Resource.create({"service.name": service}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, span_limits=SpanLimits(max_events=MAX_EVENTS), shutdown_on_exit=False)
    if any(os.environ.get(name) for name in ENDPOINTS) and os.environ.get("OTEL_TRACES_EXPORTER", "otlp") != "none":
        exporter = _Exporter()
        provider.add_span_processor(BatchSpanProcessor(exporter))
        # Not the provider's own farewell, which waits half a minute for a collector that does not answer.
        atexit.register(exporter.say_goodbye, provider)
    trace.set_tracer_provider(provider)


def carrier() -> dict[str, str]:
    """The current span in W3C form, to be stored or sent along; empty outside of any span."""
    return _carrier(None)


@contextmanager
def continued(carrier: Mapping[str, str] | None, name: str, **attributes: Any) -> Generator[Span]:
    """A span below the one that was carried here; below the current one when nothing (readable) was carried.

    An exception that passes through is recorded on the span and goes on.
    """
    with _tracer().start_as_current_span(name, context=_context(carrier), attributes=_plain(attributes)) as span:
        yield span


def span_between(
    name: str,
    start: float,
    end: float,
    *,
    parent: Mapping[str, str] | None = None,
    events: Iterable[Event] = (),
    **attributes: Any,
) -> dict[str, str]:
    """Record a span that was timed elsewhere, from unix time `start` to `end` in seconds; its carrier is returned.

    It lies below `parent` (a carrier), or below the current span.
    """
    span = _tracer().start_span(
        name, context=_context(parent), attributes=_plain(attributes), start_time=_nanoseconds(start)
    )
    for event in events:
        span.add_event(event.name, _plain(event.attributes), _nanoseconds(event.at))
    span.end(_nanoseconds(max(start, end)))
    return _carrier(trace.set_span_in_context(span))


class OpenTrace:
    """A trace of its own that goes on: `trace_id` as 32 hex digits, `carrier` of its first span."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self.carrier = _carrier(trace.set_span_in_context(span))
        context = span.get_span_context()
        self.trace_id = trace.format_trace_id(context.trace_id) if context.is_valid else None

    def note(self, **attributes: Any) -> None:
        """More attributes of its first span."""
        self._span.set_attributes(_plain(attributes))

    def end(self, at: float, error: str | None = None) -> None:
        """Ends it at a unix time, as failed where there is an error; a second time changes nothing."""
        if self._span.is_recording():
            if error is not None:
                self._span.set_status(Status(StatusCode.ERROR, error))
            self._span.end(_nanoseconds(at))


def begin_trace(name: str, start: float, *, linked: Mapping[str, str] | None = None, **attributes: Any) -> OpenTrace:
    """Begin a trace at unix time `start` in seconds, with a link to the span of the carrier `linked`."""
    there = trace.get_current_span(_context(linked) or Context()).get_span_context()
    span = _tracer().start_span(
        name,
        context=Context(),
        links=[Link(there)] if there.is_valid else [],
        attributes=_plain(attributes),
        start_time=_nanoseconds(start),
    )
    return OpenTrace(span)


def current_trace_id() -> str | None:
    """The current trace's id as 32 hex digits; None outside of any span."""
    context = trace.get_current_span().get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else None


def flush(seconds: float = GOODBYE) -> bool:
    """Send what has ended; False when that was not done in time. A process that ends by os._exit needs it."""
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        return True
    # force_flush knows no bound (opentelemetry-python issue 4568); its thread is left behind when it takes too long.
    done: list[bool] = []
    sender = threading.Thread(target=lambda: done.append(provider.force_flush()), name="flush-traces", daemon=True)
    with suppress(RuntimeError):  # Python is ending and starts no more threads; the farewell sends what it can
        sender.start()
        sender.join(seconds)
    return done == [True]


def _tracer() -> trace.Tracer:
    return trace.get_tracer("rushes")


def _context(carrier: Mapping[str, str] | None) -> Context | None:
    """The carried context; None, which to OpenTelemetry is the current one, when nothing readable was carried."""
    if not carrier:
        return None
    context = _W3C.extract(carrier)
    return context if trace.get_current_span(context).get_span_context().is_valid else None


def _carrier(context: Context | None) -> dict[str, str]:
    carried: dict[str, str] = {}
    _W3C.inject(carried, context)
    return carried


_W3C = TraceContextTextMapPropagator()


def _plain(attributes: Mapping[str, Any]) -> dict[str, AttributeValue]:
    """Attributes as a span takes them: no None, and text for all that is no plain value (OpenTelemetry would warn)."""
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in attributes.items()
        if value is not None
    }


def _nanoseconds(unix: float) -> int:
    return int(unix * 1e9)


class _Exporter(SpanExporter):
    """OTLP over HTTP, made anew in each process, that speaks once when the collector does not answer."""

    def __init__(self) -> None:
        self._made: tuple[int, SpanExporter] | None = None
        self._warned = self._down = False
        self._last_moment = math.inf
        self._said = _Hush()  # each failed batch would be a line or five in the log
        logging.getLogger("opentelemetry.exporter.otlp.proto.http.trace_exporter").addFilter(self._said)
        logging.getLogger("opentelemetry.sdk._shared_internal").addFilter(_Hush())  # and each span that was dropped

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        if time.monotonic() > self._last_moment:
            return SpanExportResult.FAILURE
        self._said.first = None
        try:
            result = self._exporter().export(spans)
        except Exception as error:
            result, self._said.first = SpanExportResult.FAILURE, str(error)
        self._down = result is not SpanExportResult.SUCCESS
        if self._down and not self._warned:
            self._warned = True
            where = next(os.environ[name] for name in ENDPOINTS if os.environ.get(name))
            log.warning("traces cannot be sent to %s; work goes on without them (%s)", where, self._said.first)
        return result

    def shutdown(self) -> None:
        if self._made is not None:
            self._made[1].shutdown()

    def say_goodbye(self, provider: TracerProvider) -> None:
        """Send the last spans: to a collector that answered so far, for a few seconds."""
        self._last_moment = time.monotonic() + (0 if self._down else GOODBYE)
        provider.shutdown()

    def _exporter(self) -> SpanExporter:
        if self._made is None or self._made[0] != os.getpid():  # a connection must not be shared over a fork
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            timeout = None if any(os.environ.get(name) for name in TIMEOUTS) else GOODBYE
            self._made = (os.getpid(), OTLPSpanExporter(timeout=timeout))
        return self._made[1]


class _Hush(logging.Filter):
    """Keeps a logger silent, and what it would have said first."""

    first: str | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        self.first = self.first or record.getMessage()
        return False
