"""Production as infra/compose.yaml ships it: it comes up, renders on every host, and goes on whatever stops."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator

import pytest

from tests.end_to_end.stack import wait_for
from tests.production import Production, production

pytestmark = [pytest.mark.chaos, pytest.mark.xdist_group("production"), pytest.mark.timeout(1800)]

LONG = 210.0  # seconds: longer than Prefect's own runs are silent, and twice what its automation waits
STALL = 75.0  # seconds: longer than a lease
SMALL = ("--size", "64x48", "--frames", "9", "--steps", "16", "--no-rewrite")


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Production]:
    """All services of compose.yaml, each on a host of its own, and a second host with an engine."""
    with production(tmp_path_factory.mktemp("production"), ENGINES="2") as services:
        once = services.host("deployer", "deploy")
        owner = services.environment("migrate")["RUSHES_DATABASE_URL"]
        once.rushes(*services.command("migrate"), RUSHES_DATABASE_URL=owner)
        once.rushes(*services.command("deploy"))
        shutil.rmtree(once.folder)  # a container that has done its work is gone, with its checkout and its Python
        for name, service in (("control", "control"), ("gpu1", "cpu"), ("gpu2", "cpu")):
            one = ("--limit", "1") if service == "cpu" else ()
            services.host(name, service).start(*services.command(service), *one)
        services.host("client", "control")
        yield services


def submitted(services: Production, count: int, *options: str, name: str) -> tuple[str, str]:
    """The request and the flow run of so many new clips."""
    client = services.named("client")
    prompts = client.folder / f"{name}.txt"
    prompts.write_text("".join(f"a red ball moves to the left {name} {k}\n" for k in range(count)))
    said = client.rushes("submit", str(prompts), *SMALL, *options)
    (request,) = set(re.findall(r"req_[0-9a-f]{12}", said))
    (run,) = set(re.findall(r"/runs/flow-run/([0-9a-f-]{36})", said))
    return request, run


def test_it_comes_up_and_renders_on_both_hosts(shipped: Production) -> None:
    engines, hosts = set[str](), set[str]()
    for k in range(20):  # where one engine is ready much before the other, that one makes the first request alone
        request, run = submitted(shipped, 8 if k else 24, name=f"short{k}")
        shipped.ended(run)
        clips = shipped.sql("select * from history where request_id = %s", request)
        assert {clip["status"] for clip in clips} == {"done"} and len(clips) == (8 if k else 24)
        engines |= {clip["engine"] for clip in clips}
        hosts |= {clip["host"] for clip in clips}
        if len(engines) == 2:
            break
    assert hosts == {"gpu1", "gpu2"} if shipped.named("client").within else len(hosts) == 1
    assert "no breaches" in shipped.named("client").rushes("audit")


def test_doctor_and_status_ask_what_the_settings_name_and_up_refuses(shipped: Production) -> None:
    client = shipped.named("client")
    found = {row["part"]: row for row in json.loads(client.rushes("doctor", "--format", "json"))}
    assert {row["check"] for row in found.values()} == {"ok"}
    assert found["workers"]["detail"] == "1 control worker online, 2 gpu workers online"
    parts = {row["part"]: row["state"] for row in json.loads(client.rushes("status", "--format", "json"))}
    assert parts == dict.fromkeys(("ledger", "prefect", "control", "gpu", "store"), "running")
    wrong = client.rushes("doctor", code=1, RUSHES_PREFECT_AUTH="rushes:wrong", COLUMNS="500")
    assert "RUSHES_PREFECT_AUTH" in wrong and "rushes up" not in wrong
    assert "RUSHES_PREFECT_AUTH" in client.rushes("deploy", code=1, RUSHES_PREFECT_AUTH="")
    assert "RUSHES_DATABASE_URL" in client.rushes("up", code=2)


def test_an_automation_watches_our_runs_alone(shipped: Production) -> None:
    shipped.maintain()
    (automation,) = shipped.ask("POST", "/automations/filter", {})
    deployments = {f"prefect.deployment.{each['id']}" for each in shipped.ask("POST", "/deployments/filter", {})}
    assert set(automation["trigger"]["match_related"]["prefect.resource.id"]) == deployments


@pytest.mark.chaos
def test_it_goes_on_for_long_and_whatever_is_restarted(shipped: Production) -> None:
    """Engines that render for longer than watchdogs wait live on; a control host loses its power, an engine stalls."""
    shipped.maintain()
    began, made = time.monotonic(), list[str]()
    while time.monotonic() - began < LONG:
        request, run = submitted(shipped, 30, name=f"long{len(made)}")
        shipped.ended(run)
        made.append(request)
    engines = shipped.sql("select flow_run_id, closed_at from engines")
    states = {shipped.ask("GET", f"/flow_runs/{each['flow_run_id']}")["state_name"] for each in engines}
    assert states <= {"Running", "Completed"}, (states, shipped.logs())

    request, run = submitted(shipped, 60, name="powerless")
    wait_for(lambda: shipped.sql("select 1 from clips where request_id = %s and status = 'done'", request), "a clip")
    control = shipped.named("control")
    control.crash()
    control.start(*shipped.services["control"]["command"])
    made.append(request)

    stalled = shipped.named("gpu2").running()
    for process in stalled:
        process.suspend()
    time.sleep(STALL)
    for process in stalled:
        process.resume()

    def ended() -> bool:
        return shipped.sql("select status::text from requests where id = %s", request)[0]["status"] != "open"

    wait_for(ended, "the request to be taken up and made", seconds=300)
    for each in made:
        clips = shipped.sql("select status::text from clips where request_id = %s", each)
        assert {clip["status"] for clip in clips} == {"done"}
    assert "no breaches" in shipped.named("client").rushes("audit")
