"""What watches the platform: metrics as Prometheus reads them, dashboards and alerts that ask for what there is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Engine

import db.metrics
import flows.web.metrics
import infra.metrics
from db.history import run_sql
from db.session import connect
from flows.web.app import create_app
from tests.fake_renderer import Fault, Trouble
from tests.platform import Platform, wait_for

GRAFANA = Path(__file__).parents[2] / "infra" / "grafana"
UNIT = Path(__file__).parents[1] / "unit"
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
        living = samples(web)
    assert [dict(key)["state"] for key in living["rushes_engines"]] == ["idle"]
    (busy,) = living["rushes_engines_busy"].values()
    assert 0 < busy <= 1
    after = samples(web)
    assert "rushes_engines" not in after, "it has left"
    assert after["rushes_clips"][("status", "done"),] == after["rushes_clips"][("status", "rejected"),] == 1
    (ended,) = after["rushes_attempts_total"].items()
    labels = dict(ended[0])
    assert (labels["status"], labels["error_class"], ended[1]) == ("done", "", 1)
    counted = {dict(key)["stage"]: value for key, value in after["rushes_stage_duration_seconds_count"].items()}
    assert counted == dict.fromkeys(("text", "denoise", "decode", "encode", "put"), 1)
    assert {dict(key)["le"] for key in after["rushes_stage_duration_seconds_bucket"]} >= {"0.1", "3600", "+Inf"}
    assert {dict(key)["of"] for key in after["rushes_answer_duration_seconds"]} == {"ledger", "store"}
    assert samples(web)["rushes_attempts_total"] == after["rushes_attempts_total"], "counted once"

    platform.script.trouble["a bad cube"] = Trouble(Fault.FAILS, times=9)
    with platform.engines():
        platform.make(["a bad cube"])
    told = {
        (dict(key)["status"], dict(key)["error_class"]): n for key, n in samples(web)["rushes_attempts_total"].items()
    }
    assert told == {("done", ""): 1, ("failed", "render_failed"): 3}

    run = platform.submit(["a blue cube"], tenant="studio")  # with no engine

    def waiting_clip() -> dict[str, dict[tuple[tuple[str, str], ...], float]] | None:
        found = samples(web)
        return found if sum(found.get("rushes_queue_depth", {}).values()) == 1 else None

    waiting = wait_for(waiting_clip, "a clip that waits")
    (key,) = waiting["rushes_queue_depth"]
    assert dict(key)["tenant"] == "studio"
    assert set(dict(key)) == {"tenant", "model"}
    assert 0 < waiting["rushes_queue_oldest_seconds"][key] < 600
    with platform.engines():
        run.outcome()


def test_gpus_are_measured_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [infra.metrics.GpuReading(number, "NVIDIA H200", 10 + number, 140, 0.5 * number) for number in range(2)]
    monkeypatch.setattr(infra.metrics, "read_gpus", lambda: gpus)
    reader = InMemoryMetricReader()
    provider = infra.metrics.setup_metrics("tried", reader)
    data = reader.get_metrics_data()
    assert data is not None
    told = {
        metric.name: {point.attributes["hw.id"]: point.value for point in metric.data.data_points}  # type: ignore[union-attr,index]
        for scope in data.resource_metrics[0].scope_metrics
        for metric in scope.metrics
    }
    provider.shutdown()
    assert told == {
        "hw.gpu.utilization": {"0": 0.0, "1": 0.5},
        "hw.gpu.memory.usage": {"0": 10, "1": 11},
        "hw.gpu.memory.limit": {"0": 140, "1": 140},
    }


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


def test_every_alert_fires_when_it_should_and_not_before() -> None:
    """By Prometheus' own promtool, part of Debian's package prometheus: every rule has a case in alerts.yaml."""
    cases = UNIT / "alerts.yaml"
    fired = {
        each["alertname"]
        for case in yaml.safe_load(cases.read_text())["tests"]
        for each in case["alert_rule_test"]
        if each.get("exp_alerts")
    }
    assert fired == {rule["alert"] for group in RULES for rule in group["rules"]}
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed")
    for command in (["check", "rules", str(GRAFANA / "alerts.yaml")], ["test", "rules", str(cases)]):
        done = subprocess.run([promtool, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


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
