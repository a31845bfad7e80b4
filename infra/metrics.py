"""Metrics: where they go, and what this machine's GPUs say. It knows nothing of clips and engines.

They leave the process only where the OTEL_ environment names a collector, every minute, over OTLP/HTTP; a collector
that is down costs one warning. Names are OpenTelemetry's where it has them (`hw.gpu.*`), else `rushes.*`.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import pynvml
from opentelemetry.metrics import CallbackOptions, Meter, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import OTELResourceDetector, Resource

ENDPOINTS = ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
TIMEOUT = 3.0  # seconds for a collector to answer, at the end of a process too


@dataclass(frozen=True, slots=True)
class GpuReading:
    """A GPU at this moment."""

    number: int  # on its host
    name: str
    used: int  # bytes of memory, by whoever uses it
    memory: int  # bytes that it has
    utilization: float  # share of the last second or so in which it did something; 0 to 1


def setup_metrics(service: str, *readers: MetricReader) -> MeterProvider:
    """A provider of meters that sends to the collector, if there is one, and to `readers`. Shut it down at the end.

    It measures this machine's GPUs, where there are any.
    """
    resource = Resource.create({"service.name": service}).merge(OTELResourceDetector().detect())
    senders: list[MetricReader] = []
    if any(os.environ.get(name) for name in ENDPOINTS) and os.environ.get("OTEL_METRICS_EXPORTER", "otlp") != "none":
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

        for name in ("opentelemetry.exporter.otlp.proto.http.metric_exporter", "opentelemetry.sdk.metrics"):
            logging.getLogger(name).addFilter(_Once())
        senders.append(PeriodicExportingMetricReader(OTLPMetricExporter(timeout=TIMEOUT)))
    provider = MeterProvider([*senders, *readers], resource=resource, shutdown_on_exit=bool(senders))
    if (senders or readers) and read_gpus():
        _measure_gpus(provider.get_meter("rushes"))
    return provider


def read_gpus() -> list[GpuReading]:
    """The GPUs of this machine as NVML sees them; none where there is no NVML, or no GPU."""
    found: list[GpuReading] = []
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        try:
            for number in range(pynvml.nvmlDeviceGetCount()):
                device = pynvml.nvmlDeviceGetHandleByIndex(number)
                memory, busy = pynvml.nvmlDeviceGetMemoryInfo(device), 0.0
                with suppress(pynvml.NVMLError):  # a slice of a GPU does not say
                    busy = float(pynvml.nvmlDeviceGetUtilizationRates(device).gpu) / 100
                name = str(pynvml.nvmlDeviceGetName(device))
                found.append(GpuReading(number, name, int(memory.used), int(memory.total), busy))
        finally:
            pynvml.nvmlShutdown()
    return found


def _measure_gpus(meter: Meter) -> None:
    host = socket.gethostname()

    def each(value: Callable[[GpuReading], float]) -> Sequence[Callable[[CallbackOptions], Iterable[Observation]]]:
        def observe(_: CallbackOptions) -> Iterable[Observation]:
            for gpu in read_gpus():
                yield Observation(value(gpu), {"host.name": host, "hw.id": str(gpu.number), "hw.name": gpu.name})

        return [observe]

    # Without a unit: else collectors call it hw_gpu_utilization_ratio, and the text of our own service does not.
    meter.create_observable_gauge("hw.gpu.utilization", each(lambda gpu: gpu.utilization), "", "share of time at work")
    meter.create_observable_up_down_counter("hw.gpu.memory.usage", each(lambda gpu: gpu.used), "By", "memory in use")
    meter.create_observable_up_down_counter("hw.gpu.memory.limit", each(lambda gpu: gpu.memory), "By", "memory it has")


class _Once(logging.Filter):
    """Lets the first record through: a collector that is down would else be a line a minute."""

    said = False

    def filter(self, record: logging.LogRecord) -> bool:
        first, self.said = not self.said, True
        return first
