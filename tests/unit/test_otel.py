"""OpenTelemetry's variables: a wrong value stops a program at its start, in one line with name and value."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.settings import WrongSetting, load_settings
from infra.otel import wrong_value

WRONG = {
    "OTEL_BSP_MAX_QUEUE_SIZE": ["abc", "0", "-1", "1.5", "511"],  # less than a batch
    "OTEL_BSP_SCHEDULE_DELAY": ["5s"],
    "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": ["100000"],
    "OTEL_TRACES_SAMPLER": ["sometimes"],
    "OTEL_RESOURCE_ATTRIBUTES": ["team", "a=b,c"],
    "OTEL_EXPORTER_OTLP_TIMEOUT": ["10s", "0", "nan", "inf"],
    "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": ["-1"],
    "OTEL_EXPORTER_OTLP_COMPRESSION": ["zip"],
    "OTEL_EXPORTER_OTLP_CERTIFICATE": ["/nowhere/ca.pem"],
    "OTEL_EXPORTER_OTLP_TRACES_CLIENT_KEY": ["/nowhere/key.pem"],
    "OTEL_EXPORTER_OTLP_PROTOCOL": ["grpc", "http/json"],
    "OTEL_EXPORTER_OTLP_ENDPOINT": ["collector:4318", "http://", "http://h:port", "grpc://h:4317"],
    "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": ["collector"],
    "OTEL_PROPAGATORS": ["tracecontext,nothing"],
    "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": ["many", "-1"],
    "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT": ["-1"],
    "OTEL_SDK_DISABLED": ["maybe"],
    "OTEL_TRACES_EXPORTER": ["jaeger"],
    "OTEL_PYTHON_CONTEXT": ["nothing"],
    "OTEL_PYTHON_TRACER_PROVIDER": ["nothing"],
    "OTEL_PYTHON_ID_GENERATOR": ["nothing"],
    "OTEL_EXPERIMENTAL_RESOURCE_DETECTORS": ["nothing"],
}
GOOD = {
    "OTEL_EXPORTER_OTLP_ENDPOINT": "https://collector.example.org:4318/otlp",
    "OTEL_EXPORTER_OTLP_HEADERS": "api-key=abc, x = y%20z",
    "OTEL_EXPORTER_OTLP_TIMEOUT": "2.5",
    "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
    "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "grpc",  # nothing of ours
    "OTEL_METRICS_EXPORTER": "none",
    "OTEL_SERVICE_NAME": "anything at all",
    "OTEL_RESOURCE_ATTRIBUTES": "team=studio,env=",
    "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
    "OTEL_TRACES_SAMPLER_ARG": "0.25",
    "OTEL_PROPAGATORS": "tracecontext,baggage",
    "OTEL_SDK_DISABLED": "TRUE",
    "OTEL_BSP_MAX_QUEUE_SIZE": "",
    "OTEL_OF_A_LATER_VERSION": "?",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_one_line_with_name_and_value(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in WRONG[name]:
        monkeypatch.setenv(name, value)
        with pytest.raises(WrongSetting) as caught:
            load_settings(home=tmp_path / "home")
        said = str(caught.value)
        assert "\n" not in said and "must" in said
        assert said.startswith(f"{name}={value}: ") or (value == "511" and "OTEL_BSP_MAX_QUEUE_SIZE, 511" in said)


def test_two_that_do_not_go_together() -> None:
    ratio = {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "25%"}
    assert (wrong_value(ratio) or "").startswith("OTEL_TRACES_SAMPLER_ARG=25%: must be a number from 0 to 1")
    assert wrong_value({**ratio, "OTEL_TRACES_SAMPLER": "always_on"}) is None


def test_keys_in_headers_are_not_shown() -> None:
    said = wrong_value({"OTEL_EXPORTER_OTLP_HEADERS": "secret-5a1c"})
    assert said == "OTEL_EXPORTER_OTLP_HEADERS: must be name=value, with commas between"


def test_good_values_and_others_are_left_alone() -> None:
    assert wrong_value(GOOD) is None


def test_a_command_says_it_and_ends_with_2(tmp_path: Path) -> None:
    environment = {**os.environ, "RUSHES_HOME": str(tmp_path / "home"), "OTEL_SPAN_LINK_COUNT_LIMIT": "many"}
    command = [sys.executable, "-m", "flows.cli.main", "requests"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "rushes: OTEL_SPAN_LINK_COUNT_LIMIT=many: must be a whole number, 0 or more\n"
