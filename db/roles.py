"""Who may do what: `rushes_app` reads and writes rows, `rushes_reader` reads views; see docs/security.md.

Every upgrade ends with `settle_roles`, so no migration has to remember a grant, and roles that an administrator made
after the migrations, or a dump that was restored on another server, get theirs by `rushes migrate`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, LiteralString, cast

from psycopg import errors, sql
from sqlalchemy import Connection, make_url, text
from sqlalchemy.exc import DBAPIError

from db.session import connect

if TYPE_CHECKING:
    import psycopg

APP, READER = "rushes_app", "rushes_reader"
SEARCH_PATH = "ask, public"  # of those who ask: the views of ask by their short names
# How questions are planned.
PLANNING: dict[LiteralString, LiteralString] = {
    "random_page_cost": "1.1",  # as on every disk of today: else a day among millions is found by reading all of them
    "work_mem": "32MB",  # a day's stages are sorted in memory
    "jit": "off",  # to compile a question takes longer than to answer it
}
# Of a reader's login, since a login has no settings of the groups that it is in. A query that is forgotten ends, and a
# transaction that is left open does not hold back the server's clean-up; who needs longer may say so.
READER_SETTINGS: tuple[LiteralString, ...] = (
    "statement_timeout = '60s'",
    "idle_in_transaction_session_timeout = '10min'",
    "search_path = ask, public",
    *(f"{name} = '{value}'" for name, value in PLANNING.items()),
)

# Statements, one a row, that give the roles what they lack. Views and the schema's version are nobody's to write.
# A database may be closed to the public.
_LACKING = f"""
with relations as (
    select oid, relkind, relname, relkind = 'v' or relname = 'alembic_version' as read_only,
           relnamespace = to_regnamespace('ask') or relkind = 'v' and relname = 'history' as asked
    from pg_class where relnamespace in ('public'::regnamespace, to_regnamespace('ask')) and relkind in ('r', 'v')
), wanted as (
    select '{APP}' as role, oid, unnest(array['select', 'insert', 'update', 'delete']) as privilege
    from relations where not read_only
    union all select '{APP}', oid, 'select' from relations where read_only
    union all select '{APP}', oid, 'maintain' from relations where relname = 'clips' and :maintain  -- analyze
    union all select '{READER}', oid, 'select' from relations where asked
), unwanted as (
    select '{APP}' as role, oid, unnest(array['insert', 'update', 'delete']) as privilege
    from relations where read_only
)
select format('grant connect on database %I to %I', current_database(), rolname)
from pg_roles where rolname in ('{APP}', '{READER}') and not has_database_privilege(oid, current_database(), 'connect')
union all
select format('grant usage on schema %I to %I', nspname, rolname)
from pg_roles r, pg_namespace n where rolname in ('{APP}', '{READER}') and nspname in ('public', 'ask')
and not has_schema_privilege(r.oid, n.oid, 'usage')
union all
select format('grant %s on %s to %I', string_agg(privilege, ', '), w.oid::regclass, role)
from wanted w join pg_roles r on rolname = role
where not has_table_privilege(r.oid, w.oid, privilege) group by w.oid, role
union all
select format('revoke %s on %s from %I', string_agg(privilege, ', '), u.oid::regclass, role)
from unwanted u join pg_roles r on rolname = role
where has_table_privilege(r.oid, u.oid, privilege) group by u.oid, role
union all
select format('grant usage on sequence %s to %I', s.oid::regclass, rolname)
from pg_class s, pg_roles r where rolname = '{APP}' and s.relkind = 'S' and s.relnamespace = 'public'::regnamespace
and not has_sequence_privilege(r.oid, s.oid, 'usage')
"""

# Functions of Postgres that are everybody's until they are taken from PUBLIC: by the first a login that only reads
# could hold the locks of planners and migrations, by the others fill the disk.
_LOCKS = "proname ~ '^pg_(try_)?advisory_'"
_LARGE_OBJECTS = "proname ~ '^lo_(creat|create|from_bytea|put|truncate|truncate64|unlink)$' or proname = 'lowrite'"
# Statements that leave PUBLIC no more than it needs, and whether they are ours to run: of others Postgres only warns.
_OPEN = f"""
with closed as (
    select oid, proowner, {_LOCKS} as locks, oid::regprocedure::text as named, proacl
    from pg_proc where pronamespace = 'pg_catalog'::regnamespace and ({_LOCKS} or {_LARGE_OBJECTS})
), open as (
    select * from closed where has_function_privilege('public', oid, 'execute')
)
select 1 as place, pg_has_role(proowner, 'usage') as ours,
       format('grant execute on function %s to %I with grant option', string_agg(named, ', ' order by named), rolname)
           as statement
from open, pg_database d join pg_roles r on r.oid = datdba
where locks and datname = current_database() group by proowner, rolname
union all
select 2, pg_has_role(proowner, 'usage'),
       format('revoke execute on function %s from public', string_agg(named, ', ' order by named))
from open group by proowner
union all
select 3, bool_and(has_function_privilege(c.oid, 'execute with grant option')),
       format('grant execute on function %s to %I', string_agg(named, ', ' order by named), rolname)
from closed c, pg_roles r
where rolname = '{APP}' and locks and not exists (select from aclexplode(proacl) a where a.grantee = r.oid)
group by rolname
union all
select 4, pg_has_role(datdba, 'usage'), format('grant temporary on database %I to %I', datname, rolname)
from pg_database, pg_roles r
where datname = current_database() and rolname = '{APP}' and not exists (
    select from aclexplode(datacl) a where a.grantee = r.oid and a.privilege_type = 'TEMPORARY')
union all
select 5, pg_has_role(datdba, 'usage'), format('revoke temporary on database %I from public', datname)
from pg_database
where datname = current_database() and has_database_privilege('public', oid, 'temporary')
order by place
"""


def settle_roles(connection: Connection) -> tuple[str, ...]:
    """Makes the roles that are missing and gives both what they lack; nothing is written where nothing lacks.

    Gives the statements that the current user has no right to, which an administrator has to run.
    """
    left: list[str] = []
    for role in (APP, READER):
        if not connection.scalar(text("select exists (select from pg_roles where rolname = :role)"), {"role": role}):
            left += _try(connection, f"create role {role} nologin")
    major: int = (connection.dialect.server_version_info or (0,))[0]
    for statement in connection.scalars(text(_LACKING), {"maintain": major >= 17}).all():
        left += _try(connection, statement)
    for place in range(1, 6):  # one after another: what was granted in one is what the next may give on
        for row in connection.execute(text(_OPEN)).all():
            if row.place == place:
                left += _try(connection, row.statement) if row.ours else [row.statement]
    return tuple(left)


def _try(connection: Connection, statement: str) -> list[str]:
    """The statement itself, where it is not ours to run."""
    try:
        with connection.begin_nested():
            connection.exec_driver_sql(statement)
    except DBAPIError as error:
        if isinstance(error.orig, errors.InsufficientPrivilege):
            return [statement]
        if not isinstance(error.orig, errors.DuplicateObject | errors.UniqueViolation):
            raise  # else another database of this server made the role at this moment
    return []


def make_reader(url: str, reader_url: str) -> None:
    """Makes the login of `reader_url`, a member of `rushes_reader`, or gives it that password and READER_SETTINGS."""
    reader = make_url(reader_url)
    name, password = str(reader.username), str(reader.password)
    engine = connect(url)
    try:
        with engine.begin() as transaction:
            _make_reader(cast("psycopg.Connection[Any]", transaction.connection.driver_connection), name, password)
    finally:
        engine.dispose()


def _make_reader(connection: psycopg.Connection[Any], name: str, password: str) -> None:
    known = connection.execute("select from pg_roles where rolname = %s", [name]).fetchone() is not None
    # As a verifier: no password stands in the server's log, whatever happens to the statement.
    verifier = connection.pgconn.encrypt_password(password.encode(), name.encode()).decode()
    made = "alter role {} login password {}" if known else "create role {} login password {}"
    connection.execute(sql.SQL(made).format(sql.Identifier(name), sql.Literal(verifier)))
    connection.execute(sql.SQL("grant {} to {}").format(sql.Identifier(READER), sql.Identifier(name)))
    for setting in READER_SETTINGS:
        connection.execute(sql.SQL("alter role {} set {}").format(sql.Identifier(name), sql.SQL(setting)))
