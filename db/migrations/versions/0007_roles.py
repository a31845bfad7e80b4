"""Who may do what: `rushes_app` runs the platform, `rushes_reader` reads `history`; who migrates owns the tables.

Revision: 0007, after 0006

Both are groups that nobody logs in as: `create role anna login password '…' in role rushes_reader`. Roles belong to
the whole server, so they are made where they are missing, and stay while another database of the server grants to them.
Who migrates without the right to make roles gets a notice and no grants, unless an administrator has made them before.
"""

from __future__ import annotations

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

ROLES = ("rushes_app", "rushes_reader")

MAKE = """
do $$ begin
    if not exists (select from pg_roles where rolname = '{role}') then
        create role {role} nologin;
    end if;
exception
    when duplicate_object or unique_violation then null;  -- another database of this server did it at this moment
    when insufficient_privilege then
        raise notice 'role {role} is missing, and % may not make it: have it made before migrating', current_user;
end $$"""

GRANT = """
do $$ begin
    if exists (select from pg_roles where rolname = 'rushes_app') then
        grant usage on schema public to rushes_app;
        grant select, insert, update, delete on all tables in schema public to rushes_app;
        revoke insert, update, delete on alembic_version, history from rushes_app;
        grant usage on all sequences in schema public to rushes_app;
        alter default privileges in schema public grant select, insert, update, delete on tables to rushes_app;
        alter default privileges in schema public grant usage on sequences to rushes_app;
        if current_setting('server_version_num')::int >= 170000 then
            execute 'grant maintain on clips to rushes_app';  -- analyze, after a large request came in
        end if;
    end if;
    if exists (select from pg_roles where rolname = 'rushes_reader') then
        grant usage on schema public to rushes_reader;
        grant select on history to rushes_reader;
    end if;
end $$"""

DROP = """
do $$ begin
    if exists (select from pg_roles where rolname = '{role}') then
        alter default privileges in schema public revoke all on tables from {role};
        alter default privileges in schema public revoke all on sequences from {role};
        revoke all on all tables in schema public from {role};
        revoke all on all sequences in schema public from {role};
        revoke all on schema public from {role};
        drop role {role};
    end if;
exception
    when dependent_objects_still_exist or insufficient_privilege then null;  -- others still use it, or it is not ours
end $$"""


def upgrade() -> None:
    # Where somebody made the schema by hand, everybody could make tables in it before Postgres 15.
    op.execute("revoke create on schema public from public")
    for role in ROLES:
        op.execute(MAKE.format(role=role))
    op.execute(GRANT)


def downgrade() -> None:
    """Whoever was let in by these roles alone is locked out."""
    for role in ROLES:
        op.execute(DROP.format(role=role))
