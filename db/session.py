"""Connecting to the ledger and keeping its schema up to date."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import psycopg
from sqlalchemy import Connection, CursorResult, Delete, Engine, Insert, Update, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError, InvalidatePoolError
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import ConnectionPoolEntry

if TYPE_CHECKING:
    from alembic.config import Config

REVISION = "0001"  # of the schema that this code was written for: the newest in db/migrations
OLDER: tuple[str, ...] = ()  # revisions before it
FRESH = 1.0  # seconds since its last use within which a connection is taken to live
IDLE = 600.0  # seconds: no transaction of ours thinks for so long, so it belongs to a stalled process
_USED, _POOLED = "used", "pooled"
# A cut network answers nothing, and a connection may wait for it for hours: seconds until that counts as an error.
_NETWORK = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,  # milliseconds
}
# What PgBouncer, RDS Proxy and others say of settings that come with a connection.
_NO_OPTIONS = re.compile("startup parameter|command-line options", re.IGNORECASE)


class WrongSchema(RuntimeError):
    """The ledger's tables are not those that this version of Rushes was written for. The message says what to run."""

    exit_code = 1


def connect(
    url: str,
    *,
    application: str = "rushes",
    idle: float = IDLE,
    keep_plans: bool = False,
    again: Callable[[], str] | None = None,
    check: bool = False,
) -> Engine:
    """An engine for `url` (postgresql://… or postgresql+psycopg://…); connects at first use.

    idle: seconds after which the server ends a transaction that does nothing, and gives back the locks it held.
    keep_plans: for who says the same few statements about single rows again and again, which take longer to plan than
    to run. Else each is planned for its own parameters: what suits ten clips does not suit a million.
    again: the address as it is now, asked for at every new connection, since a password may have been changed.
    check: the first connection looks at the schema's revision, and raises WrongSchema where it is not REVISION.

    Behind a pooler of connections, such as PgBouncer with transaction pooling, a server connection is ours for one
    transaction only: settings go with each transaction, and no statement is prepared.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() != "postgresql":
        raise ValueError(
            f"the ledger needs Postgres: {parsed.render_as_string()} should begin with postgresql+psycopg://"
        )
    settings = {
        "timezone": "UTC",
        "datestyle": "ISO",
        "jit": "off",  # which costs more than it gives for statements this short
        "plan_cache_mode": "auto" if keep_plans else "force_custom_plan",
        "idle_in_transaction_session_timeout": f"{1000 * idle:.0f}",
    }
    given = parsed.query.get("options", "")
    options = [given if isinstance(given, str) else " ".join(given)]
    options += [f"-c {name}={value}" for name, value in settings.items()]
    engine = create_engine(
        parsed.set(drivername="postgresql+psycopg"),
        connect_args={
            "application_name": application,
            "client_encoding": "utf8",
            "options": " ".join(filter(None, options)),
            **_NETWORK,
        },
    )
    if again is not None:
        _ask_again(engine, again)  # first, since `_settle` connects
    _settle(engine, [f"set {{}} {name} = '{value}'" for name, value in settings.items()])
    _ping_idle_ones(engine)
    if check:
        _check_once(engine)
    return engine


def _settle(engine: Engine, settings: Sequence[str]) -> None:
    """Every transaction of the engine has these settings, `set {} name = value`, with a pooler before the server too.

    A pooler is one that refuses options, or gives another process id than the server's: some take options and drop
    them. Behind it nothing may outlive a transaction, so that the settings are sent with its `begin`, in one round trip
    as it is without them.
    """
    begin = "; ".join(("begin", *(each.format("local") for each in settings)))
    refused = False

    @event.listens_for(engine, "do_connect")
    def connected(  # pyright: ignore[reportUnusedFunction]
        _: Any, record: ConnectionPoolEntry, given: Sequence[Any], named: dict[str, Any]
    ) -> psycopg.Connection[Any]:
        nonlocal refused
        without = {**named, "options": ""}  # and none of PGOPTIONS
        bare = refused  # as it is now: another thread may find out meanwhile
        try:
            connection = psycopg.connect(*given, **without if bare else named, autocommit=True)
        except psycopg.OperationalError as error:
            if bare or not _NO_OPTIONS.search(str(error)):
                raise
            connection, refused = psycopg.connect(*given, **without, autocommit=True), True
        served_by = connection.execute("select pg_backend_pid()").fetchone()
        if refused or served_by != (connection.info.backend_pid,):
            connection.prepare_threshold = None
            record.info[_POOLED] = True
            return connection
        told = connection.info.parameter_status
        if told("TimeZone") != "UTC" or not (told("DateStyle") or "").startswith("ISO"):  # PGTZ, PGDATESTYLE
            connection.execute("; ".join(each.format("session") for each in settings).encode())
        connection.autocommit = False
        return connection

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:  # pyright: ignore[reportUnusedFunction]
        if _POOLED in connection.connection.info:
            connection.exec_driver_sql(begin)


def _ask_again(engine: Engine, again: Callable[[], str]) -> None:
    @event.listens_for(engine, "do_connect")
    def address(dialect: Any, record: Any, positional: Any, named: dict[str, Any]) -> None:  # pyright: ignore[reportUnusedFunction]
        now = make_url(again())
        named.update(dialect.create_connect_args(now.set(query={}))[1])


def _check_once(engine: Engine) -> None:
    checked = False

    @event.listens_for(engine, "connect")
    def look(connection: Any, record: Any) -> None:  # pyright: ignore[reportUnusedFunction]
        nonlocal checked
        if not checked:
            check_schema(connection)
            checked = True


def check_schema(connection: Any) -> str:
    """The schema's revision, where it is REVISION. connection: psycopg's, no transaction of which is left open.

    Raises WrongSchema, saying which is the older and what to run.
    """
    try:
        there = connection.execute("select version_num from alembic_version").fetchone()
    except psycopg.errors.UndefinedTable:
        there = None
    finally:
        connection.rollback()
    if there is None:
        raise WrongSchema("the ledger has no tables yet: `rushes migrate` makes them")
    if there[0] in OLDER:
        raise WrongSchema(
            f"the ledger is older than this program (revision {there[0]}, it wants {REVISION}): run `rushes migrate`"
        )
    if there[0] != REVISION:
        raise WrongSchema(
            f"the ledger is newer than this program (revision {there[0]}, it knows {REVISION} at most): "
            "install the version of Rushes that migrated it"
        )
    return REVISION


def _ping_idle_ones(engine: Engine) -> None:
    """A connection that lay idle is asked whether it lives before it is used, since the server may have been restarted.

    SQLAlchemy's own pre-ping asks at every use, in three round trips: as many as a short transaction has without it.
    """

    @event.listens_for(engine, "checkin")
    def put_back(_: Any, record: ConnectionPoolEntry) -> None:  # pyright: ignore[reportUnusedFunction]
        record.info[_USED] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def taken(connection: Any, record: ConnectionPoolEntry, _: Any) -> None:  # pyright: ignore[reportUnusedFunction]
        if time.monotonic() - record.info.get(_USED, math.inf) > FRESH:
            try:
                engine.dialect.do_ping(connection)
            except psycopg.Error as error:  # the pool then connects anew, and all others of it are looked at so
                raise InvalidatePoolError from error


# What Postgres, PgBouncer and libpq say of a login that is wrong, and will be as wrong in a minute. A connection that
# fails has no error code, so it is known by its words.
_REFUSED = re.compile(
    r"(password|SASL|scram|GSSAPI|peer|ident|certificate|cert|LDAP|PAM|RADIUS) authentication failed"
    r"|authentication failed for user|no password supplied|no pg_hba.conf entry|pg_hba.conf rejects"
    r"|role \".*\" (does not exist|is not permitted to log in)|database \".*\" does not exist"
    r"|permission denied for database|no such (user|database)|certificate verify failed",
    re.IGNORECASE,
)


def is_refused(error: BaseException) -> bool:
    """True where the server is there and refuses the login: its user, password or database is wrong."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    return isinstance(cause, psycopg.OperationalError) and _REFUSED.search(str(cause)) is not None


def is_away(error: BaseException) -> bool:
    """True where an error says nothing of what was asked: the server is gone, starting, full, or chose a victim.

    The transaction is undone then and may be begun again from its start.
    """
    if is_refused(error):
        return False
    invalidated = isinstance(error, DBAPIError) and error.connection_invalidated
    cause = error.orig if isinstance(error, DBAPIError) else error  # a COPY raises the driver's own
    refused = isinstance(cause, psycopg.OperationalError) and not isinstance(cause, psycopg.errors.QueryCanceled)
    return invalidated or refused


def sessions(engine: Engine) -> sessionmaker[Session]:
    """Sessions on `engine`; use `with factory.begin() as session:` for one transaction."""
    return sessionmaker(engine, expire_on_commit=False)


def identity(session: Session) -> str:
    """Which ledger this is: its server's system identifier and its database's number.

    A dump that is restored is another ledger; a standby that takes over is the same one, and so is a copied volume.
    """
    found = session.execute(
        text("select system_identifier, oid from pg_control_system(), pg_database where datname = current_database()")
    ).one()
    return f"{found.system_identifier}/{found.oid}"


# Our functions never keep ORM objects across a write, so there is nothing to bring up to date in the session.
UNSYNCED = {"synchronize_session": False, "preserve_rowcount": True}


def change(session: Session, statement: Insert | Update | Delete, parameters: Mapping[str, Any] | None = None) -> int:
    """Run a write that returns no rows; gives the number of rows it touched."""
    return cast("CursorResult[Any]", session.execute(statement, parameters, execution_options=UNSYNCED)).rowcount


def upgrade(url: str, revision: str = "head") -> tuple[str, ...]:
    """Bring the schema to `revision`. Starters that do so at once take turns; the later ones find nothing to do.

    At the newest one the platform's roles get what they lack; gives the statements for it that are not ours to run.
    """
    from alembic import command  # takes a quarter of a second to load, and only those that migrate need it

    config = _config(url)
    command.upgrade(config, revision)
    return config.attributes.get("left", ())


def downgrade(url: str, revision: str) -> None:
    """Take the schema back to `revision` ("base" removes everything in it)."""
    from alembic import command

    command.downgrade(_config(url), revision)


def _config(url: str) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["url"] = url
    return config


ANALYZE_FROM = 2000  # clips at which a request changes the statistics that plans are made from
