"""Settings of production: servers elsewhere, a password, volumes, and nothing that is true of one host alone."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import numpy as np
import pytest
from PIL import Image
from prefect.server.events.schemas.automations import EventTrigger
from prefect.server.events.schemas.events import ReceivedEvent
from typer.testing import CliRunner

from flows import settings as settings_module
from flows.cli.main import app
from flows.operate.maintenance import SILENCE, heartbeat_automation
from flows.settings import Settings, WrongSetting, load_settings
from flows.show import ADDRESS, picture_address
from infra.stack.deploy import _job_template  # pyright: ignore[reportPrivateUsage]
from infra.stack.prefect import BEAT_SECONDS
from infra.stack.worker import PYTHON, path_with_own_python

LEDGER = "postgresql+psycopg://platform:secret@db.example/rushes"


def test_servers_of_the_local_stack_are_not_elsewhere(tmp_path: Path) -> None:
    there = {"database_url": LEDGER, "prefect_api_url": "http://127.0.0.1:4200/api"}
    assert Settings(home=tmp_path).elsewhere == ()
    assert Settings(home=tmp_path, **there).elsewhere == ("RUSHES_DATABASE_URL", "RUSHES_PREFECT_API_URL")
    (tmp_path / "stack.json").write_text(json.dumps(there))
    assert load_settings(home=tmp_path).elsewhere == ()
    other = load_settings(home=tmp_path, prefect_api_url="https://prefect.example/api")
    assert other.elsewhere == ("RUSHES_PREFECT_API_URL",)


@pytest.mark.parametrize("name", ["RUSHES_DATABASE_URL", "RUSHES_PREFECT_API_URL"])
def test_up_refuses_where_settings_name_servers_elsewhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUSHES_HOME", str(tmp_path))
    monkeypatch.setenv(name, LEDGER if "DATABASE" in name else "https://prefect.example/api")
    done = CliRunner().invoke(app, ["up"])
    assert done.exit_code == 2 and name in done.stderr and "secret" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == set()


def test_advice_in_production_is_not_to_start_a_local_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUSHES_HOME", str(tmp_path))
    monkeypatch.setenv("RUSHES_DATABASE_URL", "postgresql://platform:secret@127.0.0.1:1/rushes")
    monkeypatch.setenv("RUSHES_PREFECT_API_URL", "http://127.0.0.1:1/api")
    for command in (["history"], ["deploy"], ["status"], ["cancel", "req_0123456789ab"]):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 1 and "rushes up" not in done.stderr + done.stdout, (command, done.output)


def test_a_password_of_prefect_has_both_parts(tmp_path: Path) -> None:
    with pytest.raises(WrongSetting, match="RUSHES_PREFECT_AUTH: must be user:password") as caught:
        load_settings(home=tmp_path / "home", prefect_auth="hunter2")
    assert "hunter2" not in str(caught.value)


def test_flow_runs_beat_wherever_they_start_and_no_pool_names_a_host_s_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "180")  # somebody's own
    monkeypatch.setenv("RUSHES_DATABASE_URL_FILE", "secrets/url")
    monkeypatch.chdir(tmp_path)
    told = Settings(home=tmp_path, prefect_auth="a:b", prompts_folder=Path("mine")).child_environment()
    assert told["PREFECT_API_AUTH_STRING"] == "a:b"
    assert float(told["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]) == BEAT_SECONDS <= SILENCE.total_seconds() / 3
    assert told["RUSHES_DATABASE_URL_FILE"] == str(tmp_path / "secrets/url"), "workers work in another folder"
    assert told["RUSHES_PROMPTS_FOLDER"] == str(tmp_path / "mine")
    template = json.dumps(_job_template())
    assert str(BEAT_SECONDS) in template
    for path in (sys.prefix, sys.executable, str(Path(__file__).parents[2]), str(tmp_path)):
        assert path not in template
    found = shutil.which(PYTHON, path=path_with_own_python("/usr/bin"))
    assert found is not None and Path(found).parent == Path(sys.executable).parent


def heartbeat(*related: dict[str, str]) -> ReceivedEvent:
    return ReceivedEvent(
        occurred=datetime.now(UTC),
        event="prefect.flow-run.heartbeat",
        resource={"prefect.resource.id": f"prefect.flow-run.{uuid4()}"},  # pyright: ignore[reportArgumentType]
        related=list(related),  # pyright: ignore[reportArgumentType]
        id=uuid4(),
    )


def deployed(deployment: UUID) -> dict[str, str]:
    return {"prefect.resource.id": f"prefect.deployment.{deployment}", "prefect.resource.role": "deployment"}


def test_only_runs_of_our_deployments_are_called_crashed_when_they_fall_silent() -> None:
    ours: Sequence[UUID] = [uuid4(), uuid4()]
    told = heartbeat_automation(ours).trigger.model_dump(mode="json", exclude_unset=True)
    trigger = EventTrigger.model_validate(told)
    tag = {"prefect.resource.id": "prefect.tag.rushes", "prefect.resource.role": "tag"}
    flow = {"prefect.resource.id": f"prefect.flow.{uuid4()}", "prefect.resource.role": "flow"}
    for each in ours:
        assert trigger.covers(heartbeat(flow, deployed(each), tag))
    for theirs in ((), (flow,), (flow, tag), (flow, deployed(uuid4()), tag)):
        assert not trigger.covers(heartbeat(*theirs))


def test_a_volume_that_belongs_to_somebody_else_is_taken_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = tmp_path / "volume"
    (volume / "lost+found").mkdir(parents=True)
    volume.chmod(0o2777)

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(settings_module.os, "geteuid", lambda: os.getuid() + 1)
    monkeypatch.setattr(Path, "chmod", refused)
    assert load_settings(home=volume).home == volume
    assert volume.stat().st_mode & 0o7777 == 0o2777
    monkeypatch.undo()
    volume.chmod(0o1777)  # a folder like /tmp
    monkeypatch.setattr(settings_module.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(WrongSetting, match="name a folder of its own"):
        load_settings(home=volume)


@pytest.mark.parametrize("size", [(1, 1), (40, 30), (1600, 1200), (300, 20_000)])
def test_a_picture_in_prefect_s_database_is_bounded(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    address = picture_address(file.getvalue())
    assert len(address) <= ADDRESS and address.startswith("data:image/")
