"""Checks OpenTelemetry's own variables, before it reads them itself: by warnings, tracebacks, or not at all.

Loads nothing of OpenTelemetry, which some wrong values keep from being imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

# One that is wrong, in the words that follow its name and value; None: it can be used.
Rule = Callable[[str], str | None]


def wrong_value(environment: Mapping[str, str]) -> str | None:
    """A sentence about the first OTEL_ variable that cannot be used, with its name and value; None if all can."""
    for name, value in sorted(environment.items()):
        if name.startswith("OTEL_") and value.strip():
            for pattern, rule in RULES:
                if re.fullmatch(pattern, name):
                    if wrong := rule(value.strip()):
                        shown = "" if name.endswith("_HEADERS") else f"={value}"  # which hold keys
                        return f"{name}{shown}: {wrong}"
                    break
    return _wrong_together(environment)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _whole(low: int) -> Rule:
    return lambda value: None if value.isdecimal() and int(value) >= low else f"must be a whole number, {low} or more"


def _seconds(value: str) -> str | None:
    number = _number(value)
    return None if number is not None and 0 < number < float("inf") else "must be a number of seconds above 0"


def _one_of(*names: str) -> Rule:
    return lambda value: None if value.lower() in names else f"must be {' or '.join(names)}"


def _installed(group: str, *known: str) -> Rule:
    """Names of what packages offer to OpenTelemetry, beside those that it knows by itself; several with commas."""

    def check(value: str) -> str | None:
        there = {*known, *(each.name for each in metadata.entry_points(group=group))}
        lacking = [each.strip() for each in value.split(",") if each.strip() and each.strip() not in there]
        return f"{lacking[0]!r} must be one of {', '.join(sorted(there))}" if lacking else None

    return check


def _pairs(value: str) -> str | None:
    pairs = [each for each in value.split(",") if each.strip()]
    return (
        None if all(re.match(r"\s*[^=\s]+\s*=", each) for each in pairs) else "must be name=value, with commas between"
    )


def _address(value: str) -> str | None:
    try:
        parts = urlsplit(value)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        good = False
    return None if good else "must be an http:// or https:// address, such as http://collector:4318"


def _file(value: str) -> str | None:
    return None if Path(value).is_file() else "must name a file, and there is none"


SAMPLERS = ("always_on", "always_off", "traceidratio")
_OTLP = r"OTEL_EXPORTER_OTLP_(?:TRACES_|METRICS_|LOGS_)?"
RULES: tuple[tuple[str, Rule], ...] = (
    (r"OTEL_\w+_LIMIT", _whole(0)),
    (r"OTEL_B(?:S|LR)P_\w+|OTEL_METRIC_EXPORT_\w+", _whole(1)),
    (rf"{_OTLP}ENDPOINT", _address),
    (rf"{_OTLP}TIMEOUT", _seconds),
    (rf"{_OTLP}COMPRESSION", _one_of("none", "gzip", "deflate")),
    (rf"{_OTLP}HEADERS|OTEL_RESOURCE_ATTRIBUTES", _pairs),
    (rf"{_OTLP}(?:CERTIFICATE|CLIENT_KEY|CLIENT_CERTIFICATE)|OTEL_CONFIG_FILE", _file),
    (rf"{_OTLP}INSECURE|OTEL_SDK_DISABLED|OTEL_PYTHON_\w+_ENABLED", _one_of("true", "false")),
    (r"OTEL_EXPORTER_OTLP_(?:TRACES_)?PROTOCOL", _one_of("http/protobuf")),
    (r"OTEL_TRACES_EXPORTER", _one_of("otlp", "none")),
    (
        r"OTEL_TRACES_SAMPLER",
        _installed("opentelemetry_traces_sampler", *SAMPLERS, *(f"parentbased_{each}" for each in SAMPLERS)),
    ),
    (r"OTEL_PROPAGATORS", _installed("opentelemetry_propagator", "none")),
    (r"OTEL_PYTHON_CONTEXT", _installed("opentelemetry_context")),
    (r"OTEL_PYTHON_ID_GENERATOR", _installed("opentelemetry_id_generator")),
    (r"OTEL_PYTHON_TRACER_PROVIDER", _installed("opentelemetry_tracer_provider")),
    (r"OTEL_EXPERIMENTAL_RESOURCE_DETECTORS", _installed("opentelemetry_resource_detector", "*")),
)


def _wrong_together(environment: Mapping[str, str]) -> str | None:
    sampler, share = (environment.get(f"OTEL_TRACES_SAMPLER{end}", "").strip() for end in ("", "_ARG"))
    if sampler.endswith("traceidratio") and share:
        number = _number(share)
        if number is None or not 0 <= number <= 1:
            return f"OTEL_TRACES_SAMPLER_ARG={share}: must be a number from 0 to 1, the share of traces that are kept"
    batch = environment.get("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "").strip() or "512"
    queue = environment.get("OTEL_BSP_MAX_QUEUE_SIZE", "").strip() or "2048"
    if int(batch) > int(queue):
        return f"OTEL_BSP_MAX_EXPORT_BATCH_SIZE={batch}: must be at most OTEL_BSP_MAX_QUEUE_SIZE, {queue}"
    return None
