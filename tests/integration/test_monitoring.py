"""What watches the platform: metrics as Prometheus reads them, dashboards and alerts that ask for what there is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Engine

import db.metrics
import flows.web.metrics
import infra.metrics
from db.history import run_sql
from db.session import connect
from flows.web.app import create_app
from tests.platform import Platform, wait_for

GRAFANA = Path(__file__).parents[2] / "infra" / "grafana"
DASHBOARDS = sorted(GRAFANA.glob("*.json"))
RULES = yaml.safe_load((GRAFANA / "alerts.yaml").read_text())["groups"]


@pytest.fixture
def web(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> Generator[TestClient]:
    monkeypatch.setattr(flows.web.metrics, "FRESH", 0.0)
    monkeypatch.setattr(db.metrics, "LAG", 0.0)
    with TestClient(create_app(platform.settings), base_url="http://127.0.0.1") as client:
        yield client


def samples(web: TestClient) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Name: labels: value."""
    answer = web.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def test_metrics_tell_how_the_platform_stands(platform: Platform, web: TestClient) -> None:
    before = samples(web)
    assert before["rushes_clips"][("status", "done"),] == 0
    assert "rushes_attempts_total" not in before
    with platform.engines():
        platform.make([{"prompt": "a red ball"}, {"prompt": "a cone", "frames": 50}], skip_invalid=True)
    after = samples(web)
    assert after["rushes_clips"][("status", "done"),] == after["rushes_clips"][("status", "rejected"),] == 1
    (ended,) = after["rushes_attempts_total"].items()
    labels = dict(ended[0])
    assert (labels["status"], labels["error_class"], ended[1]) == ("done", "", 1)
    counted = {dict(key)["stage"]: value for key, value in after["rushes_stage_duration_seconds_count"].items()}
    assert counted == dict.fromkeys(("text", "denoise", "decode", "encode", "put"), 1)
    assert {dict(key)["le"] for key in after["rushes_stage_duration_seconds_bucket"]} >= {"0.1", "3600", "+Inf"}
    assert {dict(key)["of"] for key in after["rushes_answer_duration_seconds"]} == {"ledger", "store"}
    assert samples(web)["rushes_attempts_total"] == after["rushes_attempts_total"], "counted once"

    run = platform.submit(["a blue cube"], tenant="studio")  # with no engine
    waiting = samples_until(web, "rushes_queue_oldest_seconds")
    (key,) = waiting["rushes_queue_depth"]
    assert dict(key)["tenant"] == "studio" and waiting["rushes_queue_depth"][key] == 1
    assert set(dict(key)) == {"tenant", "model"}
    with platform.engines():
        run.outcome()


def samples_until(web: TestClient, name: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    return wait_for(lambda: found if name in (found := samples(web)) else None, name)


def queries(kind: str) -> Iterator[tuple[str, str]]:
    """Panel or rule, and what it asks: `rawSql` or `expr`."""
    for path in DASHBOARDS:
        dashboard = json.loads(path.read_text())
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                if kind in target:
                    yield f"{path.stem}: {panel['title']}", target[kind]
        for variable in dashboard["templating"]["list"]:
            if kind == "rawSql":
                yield f"{path.stem}: ${variable['name']}", variable["query"]
    if kind == "expr":
        for group in RULES:
            yield from ((f"alert {rule['alert']}", rule["expr"]) for rule in group["rules"])


@pytest.mark.parametrize("query", [pytest.param(sql, id=name) for name, sql in queries("rawSql")])
def test_every_query_of_the_dashboards_runs_for_the_reader(asked: Engine, query: str) -> None:
    filled = re.sub(r"\$__timeFilter\((\w+)\)", r"\1 between now() - interval '6 hours' and now()", query)
    filled = filled.replace("${request:sqlstring}", "'req_000000000000'")
    assert "$" not in filled
    assert run_sql(asked, filled).columns


@pytest.mark.parametrize("query", [pytest.param(expr, id=name) for name, expr in queries("expr")])
def test_every_metric_that_is_asked_for_is_exported(exported: set[str], query: str) -> None:
    bare = re.sub(r'\{[^}]*\}|"[^"]*"|\[[^\]]*\]|\b(by|on|without) ?\([^)]*\)', "", query)
    names = set(re.findall(r"\b(?:rushes|hw)_\w+|\bup\b", bare))
    assert names and names <= exported | {"up"}


def test_alerts_say_what_to_do() -> None:
    for group in RULES:
        for rule in group["rules"]:
            assert {"alert", "expr", "for", "labels", "annotations"} <= rule.keys()
            assert rule["annotations"]["summary"] and rule["annotations"]["runbook"], rule["alert"]


@pytest.fixture(scope="module")
def asked(clone: Callable[[str], AbstractContextManager[str]], migrated_template: str) -> Iterator[Engine]:
    with clone(migrated_template) as url:
        engine = connect(url)
        yield engine
        engine.dispose()


@pytest.fixture(scope="module")
def exported() -> set[str]:
    """Names of all metrics of a service beside a GPU, with what Prometheus makes of counters and histograms."""

    def never() -> AbstractContextManager[Any]:
        raise AssertionError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(infra.metrics, "read_gpus", lambda: [infra.metrics.GpuReading(0, "NVIDIA H200", 1, 2, 0.5)])
        return _names(flows.web.metrics.Metrics(never, None))  # type: ignore[arg-type]


def _names(metrics: flows.web.metrics.Metrics) -> set[str]:
    metrics.refresh = lambda: None  # type: ignore[method-assign]
    one = [db.metrics.Count({"status": "done"}, 1)]
    metrics.now, metrics.took = db.metrics.Standing(one, one, one, one, one), one
    metrics.attempts.add(1)
    metrics.stages.record(1)
    return {
        sample.name for family in text_string_to_metric_families(metrics.text().decode()) for sample in family.samples
    }
