"""Every setting of Rushes: the one place that reads the environment.

A value comes from `RUSHES_<NAME>` if that is set, else from `RUSHES_HOME/stack.json` (written by the embedded stack
while it runs), else from the default here. Everything else in the program takes these values as arguments.
Wrong settings stop the program at start, with the name of the setting in the message.

Secrets (SECRETS) may lie in files instead, which `RUSHES_<NAME>_FILE` names: a value in the environment is seen by all
who may look at the process, and by its children.
"""

from __future__ import annotations

import difflib
import json
import os
import stat
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    ByteSize,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from infra.libpq import forget_libpq
from infra.logs import PREFECT_SETTINGS, hide
from infra.otel import wrong_value

if TYPE_CHECKING:
    from infra.store.contract import Store

PREFIX = "RUSHES_"
DEFAULT_HOME = Path("~/.local/share/rushes")
STACK_FILE = "stack.json"
AUTO = "auto"  # the partition that follows the plan
SECRETS = (  # never shown
    "database_url",
    "reader_url",
    "prefect_database_url",
    "store_access_key",
    "store_secret_key",
    "prefect_auth",
    "rewriter_key",
    "vision_key",
)


class WrongSetting(ValueError):
    """A setting cannot be used. The message names it, its value, and what it must be."""

    exit_code = 2


class NotRunning(RuntimeError):
    """No stack runs and no setting says where one is. The message says how to start or name one."""

    exit_code = 1


class Settings(BaseSettings):
    """Settings of this machine. Build it with `load_settings`, which also makes the home folder."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", frozen=True, env_ignore_empty=True)

    home: Path = Field(default=DEFAULT_HOME, description="Folder of all state; readable by its owner alone")
    database_url: str | None = Field(
        default=None, repr=False, description="The ledger: postgresql+psycopg://user:password@host/db"
    )
    reader_url: str | None = Field(
        default=None, repr=False, description="The ledger for `rushes sql`, by a login in rushes_reader"
    )
    store_url: str | None = Field(default=None, description="file:///folder or s3://bucket?endpoint=host:port")
    store_access_key: str | None = Field(default=None, repr=False)
    store_secret_key: SecretStr | None = None
    prefect_api_url: str | None = Field(default=None, description="http://host:port/api")
    prefect_ui_url: str | None = Field(
        default=None, description="Where people see Prefect; default: the API without /api"
    )
    prefect_database_url: str | None = Field(
        default=None,
        repr=False,
        description="Where the embedded Prefect server keeps its tables, if not in the embedded Postgres:"
        " postgresql+asyncpg://user:password@host/db",
    )
    web_url: str | None = Field(
        default=None, description="Where people reach the service that shows clips (`rushes serve`): http://host:port"
    )
    prefect_auth: SecretStr | None = Field(default=None, description="user:password, if the Prefect server asks for it")
    prompts_folder: Path | None = Field(
        default=None, description="prompts_uri may name files below it; default: home/prompts"
    )
    model: str = Field(default="mini", min_length=1, description="Model that engines load: a name or a folder")
    model_cache: ByteSize | None = Field(
        default=None,
        description="Most that fetched models may take of the home folder, such as 200GB; default: without bound",
    )
    device: Literal["cpu", "cuda"] = "cpu"
    partition: str = Field(
        default_factory=lambda said: "tp=1" if said.get("device") == "cuda" else "tp=2",
        description="How an engine divides the model over its ranks: cfg=…,sp=…,tp=…,zero=…; or auto: by plan",
    )
    gpus: str | None = Field(
        default=None, description="What the engines of a host share, like 8xh200, or 2xcpu; auto needs to know it"
    )
    threads: int = Field(default=1, ge=1, le=256, description="CPU threads of each rank")
    micro_batch: int = Field(
        default=1, ge=1, le=256, description="Clips denoised together; another number may change a clip's last bits"
    )
    compile: bool | Literal["reduce-overhead"] = Field(
        default=False,
        description="Compile the model's blocks: quicker steps, a slower first start; on a CPU it needs a C++ compiler."
        " reduce-overhead: and replay them as CUDA graphs",
    )
    start_timeout: float = Field(
        default=600,
        ge=1,
        le=86400,
        description="Seconds in which the ranks of an engine that loads its model read nothing, after which they count"
        " as hung",
    )
    engines: int | None = Field(
        default=None,
        ge=0,
        le=1000,
        description="Most engines that requests start, on all hosts together; 0: none, they are started by `rushes "
        "engine`. Default: 1, with partition auto one for each of RUSHES_GPUS",
    )
    request_engines: int | None = Field(
        default=None, ge=1, le=1000, description="Most of them that one request may start; default: all"
    )
    host_engines: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="Most engines of this host's worker, never more than its devices hold; default: as many as they "
        "hold, on a CPU 1",
    )
    linger: float = Field(
        default=60, ge=0, le=7 * 86400, description="Seconds that an engine waits for work before it leaves"
    )
    rewriter_url: str | None = Field(
        default=None,
        description="OpenAI-compatible endpoint that rewrites prompts in place of the model's own: http://host:port/v1",
    )
    rewriter_model: str | None = Field(default=None, min_length=1, description="Name of the model it is to use")
    rewriter_key: SecretStr | None = Field(default=None, description="Its API key, if it asks for one")
    vision_url: str | None = Field(
        default=None,
        description="OpenAI-compatible endpoint of a vision-language model that recaptions: http://host/v1",
    )
    vision_model: str | None = Field(default=None, description="The model's name on that endpoint")
    vision_key: SecretStr | None = Field(default=None, description="Its API key, if it asks for one")
    lease_seconds: float = Field(default=60, ge=1, le=3600, description="A silent engine loses its shard after so long")
    checkpoint_steps: int = Field(
        default=0, ge=0, le=10_000, description="Denoising steps between two checkpoints of a clip; 0: by seconds alone"
    )
    checkpoint_seconds: float = Field(
        default=30, ge=0, le=86400, description="Seconds between two checkpoints of a clip; 0: by steps alone"
    )
    shard_seconds: float = Field(default=20, ge=1, le=3600, description="Engine seconds that one shard should take")
    log: Literal["text", "json"] = Field(
        default="text", description="How services and their runs log: lines for people, or a JSON object a line"
    )
    ports: dict[str, int] = Field(default_factory=dict, description="Ports of the embedded stack's parts")

    @field_validator("home")
    @classmethod
    def _home_is_absolute(cls, value: Path) -> Path:
        return Path(os.path.abspath(value.expanduser()))

    @field_validator("database_url", "reader_url")
    @classmethod
    def _database_is_postgres(cls, value: str | None) -> str | None:
        if value is None:
            return None
        scheme, separator, rest = value.partition("://")
        if scheme in ("postgres", "postgresql", "postgresql+psycopg") and separator:
            return f"postgresql+psycopg://{rest}"  # what psql prints and what SQLAlchemy needs are both accepted
        raise ValueError("must begin with postgresql+psycopg://")

    @field_validator("prefect_database_url")
    @classmethod
    def _prefect_database_is_postgres(cls, value: str | None) -> str | None:
        if value is None:
            return None
        scheme, separator, rest = value.partition("://")
        if scheme in ("postgres", "postgresql", "postgresql+asyncpg") and separator:
            return f"postgresql+asyncpg://{rest}"
        raise ValueError("must begin with postgresql+asyncpg://")

    @field_validator("prefect_auth")
    @classmethod
    def _auth_has_both_parts(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and ":" not in value.get_secret_value():
            raise ValueError("must be user:password, as the Prefect server's own PREFECT_SERVER_API_AUTH_STRING")
        return value

    @field_validator("store_url")
    @classmethod
    def _store_is_known(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("file:///", "s3://")):
            raise ValueError("must begin with file:/// or s3://")
        return value

    @field_validator("prefect_api_url", "prefect_ui_url", "web_url", "rewriter_url", "vision_url")
    @classmethod
    def _url_is_http(cls, value: str | None) -> str | None:
        if value is not None and (urlsplit(value).scheme not in ("http", "https") or not urlsplit(value).netloc):
            raise ValueError("must be an http:// or https:// address")
        return value.rstrip("/") if value else value

    @field_validator("rewriter_url", "vision_url")
    @classmethod
    def _url_holds_no_password(cls, value: str | None, field: ValidationInfo) -> str | None:
        if value and "@" in urlsplit(value).netloc:  # it is recorded with all that was rewritten or captioned there
            key = f"{PREFIX}{field.field_name}".upper().replace("_URL", "_KEY")
            raise ValueError(f"must not hold a password: {key} holds the endpoint's key")
        return value

    @field_validator("compile", mode="wrap")
    @classmethod
    def _compile_is_known(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        try:
            return check(value)
        except ValidationError:  # one message for both types
            raise ValueError("must be true, false or reduce-overhead") from None

    @field_validator("partition")
    @classmethod
    def _partition_parses(cls, value: str) -> str:
        from model.config import Partition

        if value != AUTO:
            Partition.parse(value)
        return value

    @field_validator("gpus")
    @classmethod
    def _gpus_parse(cls, value: str | None) -> str | None:
        if value is not None:
            from flows.plan.layout import parse_gpus

            parse_gpus(value)
        return value

    @model_validator(mode="after")
    def _a_plan_needs_gpus(self) -> Settings:
        if self.partition == AUTO and self.gpus is None:
            raise ValueError(f"{PREFIX}PARTITION=auto needs {PREFIX}GPUS, like 8xh200 or 2xcpu, to plan for")
        if self.gpus is not None and self.gpus.lower().strip().endswith("xcpu") != (self.device == "cpu"):
            raise ValueError(f"{PREFIX}GPUS={self.gpus} does not go with {PREFIX}DEVICE={self.device}")
        return self

    @model_validator(mode="after")
    def _api_has_a_ui(self) -> Settings:
        if self.prefect_api_url and not self.prefect_api_url.endswith("/api"):
            raise ValueError(f"prefect_api_url={self.prefect_api_url} must end in /api")
        return self

    @model_validator(mode="after")
    def _endpoint_is_told_its_model(self) -> Settings:
        if self.rewriter_url and not self.rewriter_model:
            raise ValueError(f"{PREFIX}REWRITER_URL is set: {PREFIX}REWRITER_MODEL must name the model it is to use")
        return self

    @property
    def compiled(self) -> Path:
        """Where engines keep the code that they compiled."""
        return self.home / "compiled"

    @property
    def bytes_each(self) -> int:
        """Of a weight, in the type that engines compute in."""
        return 4 if self.device == "cpu" else 2

    @property
    def most_engines(self) -> int:
        """That requests may start, of all of them and on all hosts."""
        if self.engines is not None:
            return self.engines
        if self.partition != AUTO or self.gpus is None:
            return 1
        from flows.plan.layout import parse_gpus

        return parse_gpus(self.gpus)[0]

    @property
    def engines_each(self) -> int:
        """That one request may start, or is expected to find where nothing starts any: at least 1."""
        return max(1, min(self.most_engines, self.request_engines or self.most_engines))

    @property
    def prompts(self) -> Path:
        """The folder below which `prompts_uri` may name files."""
        return Path(os.path.abspath((self.prompts_folder or self.home / "prompts").expanduser()))

    @property
    def store(self) -> str:
        """The store's address; without any setting a folder of the home."""
        return self.store_url or (self.home / "store").as_uri()

    @property
    def prefect_password(self) -> str | None:
        """user:password for the Prefect server, or None."""
        return self.prefect_auth.get_secret_value() if self.prefect_auth else None

    def open_store(self) -> Store:
        """The object store that these settings name. Raises WrongSetting."""
        from infra.store.open import open_store

        try:
            return open_store(self.store, *self.store_keys(), again=self.store_keys)
        except ValueError as error:
            raise WrongSetting(f"{PREFIX}STORE_URL={self.store}: {error}") from None

    def child_environment(self) -> dict[str, str]:
        """The environment of a Prefect or engine process that is to work with these settings, in whichever folder."""
        from infra.stack.prefect import RUN_SETTINGS, WORKER_SETTINGS

        env = {**WORKER_SETTINGS, **self.log_environment, **os.environ, **RUN_SETTINGS, f"{PREFIX}HOME": str(self.home)}
        if self.prompts_folder:
            env[f"{PREFIX}PROMPTS_FOLDER"] = str(self.prompts)
        if Path(self.model).is_dir():
            env[f"{PREFIX}MODEL"] = os.path.abspath(self.model)
        for variable in (f"{PREFIX}{name.upper()}_FILE" for name in SECRETS):
            if file := env.get(variable):
                env[variable] = os.path.abspath(os.path.expanduser(file))
        if self.prefect_api_url:
            env["PREFECT_API_URL"] = self.prefect_api_url
        if self.prefect_password:
            env["PREFECT_API_AUTH_STRING"] = self.prefect_password
        return env

    @property
    def log_environment(self) -> dict[str, str]:
        """Variables with which processes of Prefect log as these settings say."""
        return {f"{PREFIX}LOG": self.log, **PREFECT_SETTINGS} if self.log == "json" else {}

    @property
    def stack_file(self) -> Path:
        return self.home / STACK_FILE

    @property
    def ui_url(self) -> str:
        """Where a person looks at Prefect. Raises NotRunning."""
        return self.prefect_ui_url or self.prefect_api.removesuffix("/api")

    @cached_property
    def database(self) -> str:
        """The ledger's address. Raises NotRunning when there is none."""
        return self._needed("database_url")

    def database_now(self) -> str:
        """The ledger's address, its file read again: a password may have been changed since. Raises NotRunning."""
        return _checked_again(self, "database_url") or self.database

    def store_keys(self) -> tuple[str, str]:
        """The store's access and secret key, their files read again."""
        secret = self.store_secret_key.get_secret_value() if self.store_secret_key else None
        access = _checked_again(self, "store_access_key") or self.store_access_key
        return access or "", _checked_again(self, "store_secret_key") or secret or ""

    def secrets(self) -> list[str]:
        """The passwords and keys that are set, each by itself. The name of a key is none."""
        return [
            each
            for name in SECRETS
            if (held := getattr(self, name)) and (each := _secret_of(name, held)) and name != "store_access_key"
        ]

    @property
    def reader(self) -> str:
        """The ledger's address for those who ask. Raises NotRunning when there is none."""
        return self.reader_url or self.database

    @property
    def elsewhere(self) -> tuple[str, ...]:
        """The settings that name a ledger or a Prefect server which are not those of the local stack that runs here."""
        stack = _read_stack(self.stack_file)
        named = (name for name in ("database_url", "prefect_api_url") if getattr(self, name) is not None)
        return tuple(f"{PREFIX}{name.upper()}" for name in named if getattr(self, name) != stack.get(name))

    @cached_property
    def prefect_api(self) -> str:
        """The Prefect API's address. Raises NotRunning when there is none."""
        return self._needed("prefect_api_url")

    def _needed(self, name: str) -> str:
        value: str | None = getattr(self, name)
        if value is None:
            unset = f"{PREFIX}{name.upper()} is not set"
            if named := self.elsewhere:
                raise NotRunning(f"{unset}, and {named[0]} names servers elsewhere: name this one as well")
            raise NotRunning(f"no stack is running under {self.home} and {unset}: start one with `rushes up`")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings


def load_settings(**given: Any) -> Settings:
    """The settings of this process: `given` over environment over stack.json over defaults.

    Makes the home folder (mode 0700) if it is missing. Raises WrongSetting.
    """
    _refuse_misspelt_names()
    if wrong := wrong_value(os.environ):
        raise WrongSetting(wrong)
    home = _make_home(Path(given.get("home") or os.environ.get(f"{PREFIX}HOME") or DEFAULT_HOME))
    from_files = {name: value for name, value in _secrets_in_files().items() if name not in given}
    named = {name for name in Settings.model_fields if name in given or os.environ.get(PREFIX + name.upper())}
    named |= from_files.keys()
    if "database_url" in named:
        named.add("reader_url")  # the stack's reader would be asking another ledger
    else:
        forget_libpq()  # they are about another Postgres than the stack's own
    from_stack = {name: value for name, value in _read_stack(home / STACK_FILE).items() if name not in named}
    values: dict[str, Any] = {**from_stack, **from_files, **given, "home": home}
    try:
        settings = Settings(**values)
    except ValidationError as error:
        raise WrongSetting("; ".join(_say(e, home, from_stack) for e in error.errors())) from None
    hide(settings.secrets())
    return settings


def log_format() -> Literal["text", "json"]:
    """RUSHES_LOG before all settings are read, of which one may be wrong; what is neither counts as text."""
    return "json" if os.environ.get(f"{PREFIX}LOG") == "json" else "text"


def _secrets_in_files() -> dict[str, str]:
    """The secrets whose files the environment names, without the white space around them."""
    return {name: value for name in SECRETS if (value := _secret_in_file(name)) is not None}


def _secret_in_file(name: str) -> str | None:
    """A secret as its file holds it; None where the environment names no file. Raises WrongSetting."""
    variable = f"{PREFIX}{name.upper()}"
    file = os.environ.get(f"{variable}_FILE")
    if not file:
        return None
    if os.environ.get(variable):
        raise WrongSetting(f"{variable} and {variable}_FILE={file} are both set: keep one of them")
    try:
        found = Path(file).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise WrongSetting(f"{variable}_FILE={file}: cannot be read ({error})") from None
    if not found:
        raise WrongSetting(f"{variable}_FILE={file}: is empty")
    return found


def _checked_again(settings: Settings, name: str) -> str | None:
    """A secret as its file holds it now; None where no file is named, or where it is being written just now."""
    file = os.environ.get(f"{PREFIX}{name.upper()}_FILE")
    if not file:
        return None
    try:
        found = Path(file).expanduser().stat()
        return _checked(settings.home, name, (file, found.st_ino, found.st_size, found.st_mtime_ns))
    except (OSError, ValueError):
        return None


@lru_cache(maxsize=2 * len(SECRETS))  # every request to a store asks for its keys
def _checked(home: Path, name: str, stamp: tuple[str, int, int, int]) -> str:
    """The secret in the file of this stamp, as a setting. Raises ValueError."""
    held: dict[str, Any] = {name: _secret_in_file(name)}
    value = getattr(Settings(home=home, **held), name)
    if name != "store_access_key":
        hide([_secret_of(name, value)])
    return value.get_secret_value() if isinstance(value, SecretStr) else value


def _secret_of(name: str, value: SecretStr | str) -> str:
    """The secret in a setting: of an address and of user:password the password alone."""
    plain = value.get_secret_value() if isinstance(value, SecretStr) else value
    if name.endswith("_url"):
        plain = plain.partition("://")[2].rpartition("@")[0]
    return plain.partition(":")[2] if name.endswith("_url") or name == "prefect_auth" else plain


def _say(error: Any, home: Path, from_stack: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    reason = str(error["msg"]).removeprefix("Value error, ")
    if not where:
        return reason
    if error["loc"][0] in from_stack:
        return f"{home / STACK_FILE}: {where} {_lower(reason)}: stop and start the stack to write it anew"
    value = "" if where in SECRETS else f"={error['input']}"
    return f"{PREFIX}{where.upper()}{value}: {_lower(reason)}"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _read_stack(path: Path) -> dict[str, Any]:
    try:
        stack = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise WrongSetting(f"{path} cannot be read ({error}): stop and start the stack to write it anew") from None
    if not isinstance(stack, dict):
        raise WrongSetting(f"{path} must hold a JSON object: stop and start the stack to write it anew")
    return {name: value for name, value in stack.items() if name in Settings.model_fields}


def _make_home(home: Path) -> Path:
    """Makes `home` or tightens our own one to 0700; never changes the rights of a folder that is not ours to change.

    The root of a volume may belong to somebody else and be open to a group, or to all (Kubernetes: fsGroup): it is
    taken as it is where we may write, since who mounts it decides who sees it. A folder like /tmp is not.
    """
    home = Path(os.path.abspath(home.expanduser()))
    name = f"{PREFIX}HOME={home}"
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = home.stat()
        mode = found.st_mode
        if not stat.S_IMODE(mode) & 0o077:
            return home
        if found.st_uid != os.geteuid():
            if mode & stat.S_ISVTX or not os.access(home, os.R_OK | os.W_OK | os.X_OK):
                raise WrongSetting(f"{name}: belongs to another user, and is not ours to use: name a folder of its own")
            return home
        if any(home.iterdir()) and not (home / STACK_FILE).exists():
            raise WrongSetting(
                f"{name}: others may enter it (mode {stat.S_IMODE(mode):04o}) and it holds other things: "
                "name a folder of its own, or chmod 700 it yourself"
            )
        with suppress(PermissionError):  # a mount that keeps no rights
            home.chmod(0o700)
    except (FileExistsError, NotADirectoryError):
        raise WrongSetting(f"{name}: is not a folder") from None
    except OSError as error:
        raise WrongSetting(f"{name}: cannot be made or entered ({error.strerror})") from None
    return home


def _refuse_misspelt_names() -> None:
    """A misspelt setting would silently do nothing. Names that resemble none of ours may be somebody else's."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    known |= {f"{PREFIX}{name.upper()}_FILE" for name in SECRETS}
    for name in os.environ:
        if name.startswith(PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
            if near:
                raise WrongSetting(f"{name} is not a setting: did you mean {near[0]}?")
