"""compose.yaml as far as it can be checked without a Docker engine: its form, its promises, and what it mounts."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import psycopg
import pytest
import yaml
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError

from db.history import SqlFailed, run_sql
from db.roles import READER_SETTINGS
from db.session import connect, sessions, upgrade
from flows.settings import PREFIX, Settings
from infra.stack import postgres
from infra.store.open import open_store
from infra.store.s3 import S3Store
from tests.factories import batch, claim, render

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
ONE_SHOT = {"store-setup", "migrate", "deploy"}
UNASKABLE = {"collector", "control", "gpu", "cpu"}  # without a healthcheck; compose.yaml says why
SECRETS = {"POSTGRES_PASSWORD", "LEDGER_PASSWORD", "PREFECT_DB_PASSWORD", "STORE_ROOT_PASSWORD", "STORE_SECRET_KEY"}
SECRETS |= {"PREFECT_AUTH", "PLATFORM_PASSWORD", "READER_PASSWORD"}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((INFRA / "compose.yaml").read_text())


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, Any]:
    return compose["services"]


@pytest.fixture(scope="module")
def env_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An .env made by the very line that .env.example tells to run."""
    path = tmp_path_factory.mktemp("compose") / "env"
    (line,) = re.findall(r"\(umask 077;.* > infra/\.env\)", (INFRA / ".env.example").read_text())
    subprocess.run(line.replace("> infra/.env)", f"> {shlex.quote(str(path))})"), shell=True, check=True, cwd=ROOT)
    return path


def values_of(env_file: Path) -> dict[str, str]:
    lines = (line for line in env_file.read_text().splitlines() if line and not line.startswith("#"))
    return dict(line.split("=", 1) for line in lines)


def engines() -> list[list[str]]:
    """Every `docker-compose` and `docker compose` here."""
    found = [["docker-compose"]] if shutil.which("docker-compose") else []
    plugin = ["docker", "compose"]
    if shutil.which("docker") and subprocess.run([*plugin, "version"], capture_output=True).returncode == 0:
        found.append(plugin)
    return found


def configured(engine: list[str], *arguments: str, env_file: Path) -> "subprocess.CompletedProcess[str]":
    command = [*engine, "-f", str(INFRA / "compose.yaml"), "--env-file", str(env_file), *arguments, "config"]
    bare = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=bare)


def test_the_reader_has_the_settings_that_the_local_one_has() -> None:
    there = re.findall(r"ALTER ROLE reader SET (.*);", (INFRA / "postgres-init.sh").read_text())
    assert there == list(READER_SETTINGS)


def test_it_follows_the_compose_specification(compose: dict[str, Any]) -> None:
    schema = json.loads((files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json").read_text())
    jsonschema.validators.validator_for(schema)(schema).validate(compose)
    with pytest.raises(jsonschema.ValidationError):  # so that the check can fail at all
        jsonschema.validators.validator_for(schema)(schema).validate({"services": {"a": {"imagee": "b"}}})


def test_compose_itself_takes_it(services: dict[str, Any], env_file: Path) -> None:
    if not engines():
        pytest.skip("missing server: docker-compose (neither docker-compose nor docker compose is installed)")
    for engine in engines():
        done = configured(engine, "--profile", "gpu", "--profile", "cpu", env_file=env_file)
        assert done.returncode == 0, done.stderr
        assert "${" not in done.stdout
        told = yaml.safe_load(done.stdout)["services"]
        assert told.keys() == services.keys()
        (devices,) = told["gpu"]["deploy"]["resources"]["reservations"]["devices"]
        assert devices["capabilities"] == ["gpu"]
        store = open_store(
            told["control"]["environment"]["RUSHES_STORE_URL"],
            told["control"]["environment"]["RUSHES_STORE_ACCESS_KEY"],
            told["control"]["environment"]["RUSHES_STORE_SECRET_KEY"],
        )
        assert isinstance(store, S3Store)
        assert (store.bucket, store.endpoint, store.secure) == ("rushes", "store:9000", False)
        assert store.public == "http://127.0.0.1:9000"


def test_nothing_starts_without_secrets(env_file: Path, tmp_path: Path) -> None:
    if not engines():
        pytest.skip("missing server: docker-compose (neither docker-compose nor docker compose is installed)")
    complete = values_of(env_file)
    for secret in sorted(SECRETS):
        lacking = tmp_path / "env"
        lacking.write_text("".join(f"{name}={value}\n" for name, value in complete.items() if name != secret))
        for engine in engines():
            done = configured(engine, env_file=lacking)
            assert done.returncode != 0, f"{secret} has a default"
            assert "infra/.env.example" in done.stderr


def test_every_secret_is_made_and_none_is_like_another(env_file: Path) -> None:
    values = values_of(env_file)
    made = [values[name].removeprefix("rushes:") for name in sorted(SECRETS)]
    assert all(re.fullmatch(r"[0-9a-f]{48}", value) for value in made)
    assert len(set(made)) == len(SECRETS)
    assert env_file.stat().st_mode & 0o077 == 0
    assert subprocess.run(["git", "check-ignore", "-q", "infra/.env"], cwd=ROOT).returncode == 0, "would be committed"


def test_every_variable_is_known_where_it_is_made(env_file: Path) -> None:
    text = (INFRA / "compose.yaml").read_text()
    asked = set(re.findall(r"\$\{([A-Z_]+)", text))
    example = (INFRA / ".env.example").read_text()
    offered = set(re.findall(r"^#?([A-Z_]+)=", example, re.MULTILINE))
    assert asked - {"STORE_ROOT_USER"} <= offered
    assert offered - {"COMPOSE_PROJECT_NAME"} <= asked
    assert {name for name in asked if re.search(rf"\$\{{{name}:\?", text)} == SECRETS
    defaults = dict(re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", text))
    assert not {name for name in defaults if re.search("PASSWORD|SECRET|AUTH|TOKEN", name)}, "a password by default"


def test_images_are_pinned(services: dict[str, Any]) -> None:
    images = [service["image"] for service in services.values()]
    images += re.findall(r"^FROM (\S+)", (INFRA / "Dockerfile").read_text(), re.MULTILINE)
    assert len(images) > 10
    for image in images:
        _, _, tag = image.partition(":")
        assert re.search(r"\d+\.\d+(\.\d+)?|RELEASE\.\d{4}-\d\d-\d\d", tag), f"{image} is not pinned"


def test_versions_agree_with_what_is_installed(services: dict[str, Any]) -> None:
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert {service["image"] for service in services.values() if "build" in service} == {f"rushes:{ours}"}
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert services["prefect"]["image"].startswith(f"prefecthq/prefect:{pinned['prefect']}-")


def test_ports_are_bound_to_loopback(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) == 6
    assert all(str(port).startswith("127.0.0.1:") for port in ports)


def test_a_host_needs_a_gpu_only_where_it_is_asked_for(services: dict[str, Any]) -> None:
    assert {name: service["profiles"] for name, service in services.items() if "profiles" in service} == {
        "gpu": ["gpu"], "cpu": ["cpu"],
    }  # fmt: skip
    assert [name for name, service in services.items() if "deploy" in service] == ["gpu"]
    assert services["gpu"]["environment"]["RUSHES_DEVICE"] == "cuda"
    assert services["gpu"]["command"] == services["cpu"]["command"]


def test_what_serves_is_asked_for_its_health_and_started_again(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["restart"] == ("no" if name in ONE_SHOT else "unless-stopped"), name
        if name not in ONE_SHOT | UNASKABLE:
            assert service["healthcheck"]["test"][0] == "CMD", name
        for other, terms in service.get("depends_on", {}).items():
            expected = "service_completed_successfully" if other in ONE_SHOT else "service_healthy"
            assert terms["condition"] == expected, (name, other)
            assert other in ONE_SHOT or "healthcheck" in services[other], f"{name} waits for {other} for ever"


def environment_of(services: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for service in services.values():
        yield from service.get("environment", {}).items()


def test_our_settings_exist(services: dict[str, Any]) -> None:
    named = {name for name, _ in environment_of(services) if name.startswith(PREFIX)}
    named |= set(re.findall(r"\bRUSHES_[A-Z_]+\b", (INFRA / "Dockerfile").read_text()))
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    assert named
    assert named <= known, f"unknown settings {sorted(named - known)}"


def test_our_commands_exist(services: dict[str, Any]) -> None:
    commands = {tuple(service["command"]) for service in services.values() if "build" in service}
    serve = ("serve", "--host", "0.0.0.0", "--port", "8400")
    assert commands == {("migrate",), ("deploy",), ("worker", "control"), ("worker", "gpu"), serve}
    for command in commands:
        asked = [Path(sys.executable).with_name("rushes"), *command, "--help"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert command[0] in done.stdout


def test_prefects_settings_exist_and_parse(services: dict[str, Any]) -> None:
    given = {name: str(value) for name, value in environment_of(services) if name.startswith("PREFECT_SERVER_")}
    script = """
import json
from prefect.settings import get_current_settings
from prefect.settings.models.root import Settings
def names(model):
    for name, field in model.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            yield from names(field.annotation)
        else:
            yield model.model_config.get("env_prefix", "").upper() + name.upper()
server = get_current_settings().server
services = server.services
print(json.dumps({
    "names": sorted(names(Settings)),
    "vacuum": sorted(services.db_vacuum.enabled),
    "kept": {kind: kept.total_seconds() for kind, kept in services.db_vacuum.event_retention_overrides.items()},
    "recorder": services.task_run_recorder.batch_size,
    "flush": services.task_run_recorder.flush_interval,
    "persister": services.event_persister.batch_size,
    "triggers": services.triggers.read_batch_size,
    "analytics": server.analytics_enabled,
}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | given, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert given.keys() <= set(told.pop("names"))
    assert told == {
        "vacuum": ["events", "flow_runs"], "recorder": 500, "flush": 1.0, "persister": 500, "triggers": 100,
        "kept": {"prefect.flow-run.heartbeat": 3600.0, "prefect.artifact.updated": 3600.0}, "analytics": False,
    }  # fmt: skip


def test_what_is_mounted_is_there(services: dict[str, Any]) -> None:
    sources = {
        mount.split(":")[0] for each in services.values() for mount in each.get("volumes", []) if mount[0] == "."
    }
    assert len(sources) == 4
    for source in sources:
        assert (INFRA / source).is_file(), source
    for script in INFRA.glob("*.sh"):
        subprocess.run(["sh", "-n", script], check=True)


def test_the_stores_user_may_use_the_bucket_alone() -> None:
    statements = json.loads((INFRA / "store-policy.json").read_text())["Statement"]
    assert {resource for each in statements for resource in each["Resource"]} == {
        "arn:aws:s3:::rushes", "arn:aws:s3:::rushes/*",
    }  # fmt: skip
    actions = {action for each in statements for action in each["Action"]}
    assert {"s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:ListBucket"} <= actions
    assert not any("*" in action for action in actions)


def test_the_collector_passes_on_what_it_receives(services: dict[str, Any]) -> None:
    config = yaml.safe_load((INFRA / "otel-collector.yaml").read_text())
    pipelines = config["service"]["pipelines"]
    assert pipelines.keys() == {"traces", "metrics"}
    for kind in ("receivers", "processors", "exporters"):
        used = {name for pipeline in pipelines.values() for name in pipeline[kind]}
        assert used == config[kind].keys(), f"{kind} that no pipeline uses, or that are not defined"
    port = config["receivers"]["otlp"]["protocols"]["http"]["endpoint"].rpartition(":")[2]
    assert services["control"]["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"] == f"http://collector:{port}"
    assert config["exporters"]["otlp_grpc/jaeger"]["endpoint"].partition(":")[0] in services


def test_the_image_gets_all_that_runs() -> None:
    allowed = {line[1:] for line in (INFRA / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert {"flows", "model", "db", "infra", "alembic.ini", "pyproject.toml", "constraints.txt"} <= allowed
    assert {path.name for path in ROOT.iterdir()} & allowed >= {"flows", "model", "db", "infra", "alembic.ini"}


def test_what_runs_may_not_change_the_schema(services: dict[str, Any]) -> None:
    """The owner's password reaches the server that makes the login, and the migration that uses it."""
    told = {name: str(service.get("environment", {})) for name, service in services.items()}
    assert {name for name, given in told.items() if "LEDGER_PASSWORD" in given} == {"postgres", "migrate"}
    assert {name for name, given in told.items() if "PREFECT_DB_PASSWORD" in given} == {"postgres", "prefect"}
    urls = {name: service.get("environment", {}).get("RUSHES_DATABASE_URL") for name, service in services.items()}
    logins = {name: url.partition("://")[2].partition(":")[0] for name, url in urls.items() if url}
    assert logins.pop("migrate") == "rushes"
    assert set(logins.values()) == {"platform"} and {"control", "gpu", "cpu", "deploy"} <= logins.keys()


@pytest.fixture
def prepared(tmp_path: Path, env_file: Path) -> Iterator[Callable[[str, str], str]]:
    """A server on which the script has run that the image runs on an empty volume: address by login and database."""
    server = postgres.start_postgres(tmp_path / "postgres")
    try:
        values = values_of(env_file)
        with psycopg.connect(server.libpq_url, autocommit=True) as session:
            session.execute("ALTER ROLE postgres PASSWORD 'first'")
        environment = values | {
            "PATH": f"{postgres.client_program('psql').parent}:{os.environ['PATH']}",
            "PGHOST": "127.0.0.1",
            "PGPORT": str(server.port),
            "PGPASSWORD": "first",
        }
        subprocess.run(["sh", INFRA / "postgres-init.sh"], env=environment, check=True, capture_output=True)
        own = {"rushes": "LEDGER", "prefect": "PREFECT_DB", "platform": "PLATFORM", "reader": "READER"}
        passwords = {login: values[f"{name}_PASSWORD"] for login, name in own.items()}
        yield lambda login, place: f"postgresql://{login}:{passwords[login]}@127.0.0.1:{server.port}/{place}"
    finally:
        postgres.stop_postgres(tmp_path / "postgres")


def test_owners_keep_to_their_own_database(prepared: Callable[[str, str], str]) -> None:
    for owner, other in (("rushes", "prefect"), ("prefect", "rushes")):
        with psycopg.connect(prepared(owner, owner)) as session:
            session.execute("CREATE TABLE mine (id int)")
        wrong_password = prepared(other, owner).replace(f"//{other}:", f"//{owner}:")
        for wrong in (prepared(owner, other), wrong_password):
            with pytest.raises(psycopg.OperationalError):
                psycopg.connect(wrong).close()
    for login in ("platform", "reader"):
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(prepared(login, "prefect")).close()


def test_the_platform_works_on_what_the_owner_migrated(prepared: Callable[[str, str], str]) -> None:
    assert upgrade(prepared("rushes", "rushes")) == ()
    platform = connect(prepared("platform", "rushes"))
    with sessions(platform).begin() as session:
        batch(session, "kept", 2)
        lease, clips = claim(session)
        render(session, lease, clips[0].clip_id)
    with pytest.raises(ProgrammingError, match="InsufficientPrivilege"), platform.begin() as connection:
        connection.execute(text("drop table clips"))
    platform.dispose()
    reader = connect(prepared("reader", "rushes"))
    assert sorted(run_sql(reader, "select status from history").rows) == [("done",), ("queued",)]
    with pytest.raises(SqlFailed, match="permission denied for table clips"):
        run_sql(reader, "select * from clips")
    reader.dispose()
