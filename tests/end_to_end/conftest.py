"""One stack for all tests of this folder: Postgres, Prefect, workers, engines of two ranks, a tiny random model.

Tests of what dies, trains or is looked at in a browser are a group of their own, `stack two`: in another test process
they have another stack, and both processes are busy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.collector import Collector
from tests.end_to_end.stack import PREFECT, Stack


@pytest.fixture(scope="session")
def spans() -> Iterator[Collector]:
    """The OpenTelemetry collector that the stack sends its traces to."""
    with Collector() as running:
        yield running
        running.shutdown()


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, spans: Collector) -> Iterator[Stack]:
    from tests.tiny import tiny_model

    folder: Path = tmp_path_factory.mktemp("stack")
    stack = Stack(
        home=folder / "home",
        model=tiny_model(folder / "tiny"),
        settings={
            "RUSHES_PARTITION": "tp=2",
            "RUSHES_MICRO_BATCH": "1",  # clips end one by one, so that there is a middle of a batch
            "RUSHES_LINGER": "600",  # one engine stays warm from test to test
            "RUSHES_LEASE_SECONDS": "15",
            "RUSHES_CHECKPOINT_STEPS": "10",  # what a long clip has is kept within a second or two
            "OTEL_EXPORTER_OTLP_ENDPOINT": spans.endpoint,
            "OTEL_BSP_SCHEDULE_DELAY": "200",
        },
    )
    with stack.up():
        yield stack


def prompts(seed: int) -> list[str | dict[str, object]]:
    """Four clips: one line asks for two samples, one brings its size and a negative prompt, one is a picture."""
    return [
        {"prompt": "a red ball moves left", "custom_id": "two", "samples": 2, "seed": seed},
        {"prompt": "a blue cube", "negative_prompt": "green", "width": 64, "height": 48, "frames": 5, "seed": seed},
        {"prompt": "a green ball", "custom_id": "still", "frames": 1, "seed": seed, "steps": 2},
    ]


@pytest.fixture(scope="session")
def runs(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A batch submitted in each of the three ways: their flow runs, all ended. One engine serves them."""
    form = {"name": "from the form", "model": str(stack.model), "prompts": prompts(stack.seed())}
    form_run = stack.submit(request=form)

    asked = json.dumps({"name": "from prefect", "model": str(stack.model), "prompts": prompts(stack.seed())})
    api = stack.info()["prefect_api_url"]
    said = stack.rushes(
        *("deployment", "run", "generate/default", "-p", f"request={asked}"), program=PREFECT, PREFECT_API_URL=api
    )
    (prefect_run,) = set(re.findall(r"[0-9a-f]{8}-[0-9a-f-]{27}", said)) & {
        row["id"] for row in stack.api("POST", "/flow_runs/filter", {"sort": "START_TIME_DESC"})
    }

    file: Path = tmp_path_factory.mktemp("prompts") / "mine.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in prompts(stack.seed())))
    said = stack.rushes("submit", str(file), "--watch")
    (command_run,) = re.findall(r"/runs/flow-run/([0-9a-f-]{36})", said)
    (request,) = set(re.findall(r"req_[0-9a-f]{12}", said))
    assert f"{request} completed: 4 done" in said
    stack.ended(command_run)
    assert stack.request_of(command_run) == request

    return {"form": form_run, "prefect": str(prefect_run), "command": command_run}
