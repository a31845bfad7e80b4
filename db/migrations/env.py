"""Runs the migrations: one at a time over all starters, in one transaction, and never waiting long for a lock.

The address comes from the caller (db.session.upgrade), from `-x url=…`, or from RUSHES_DATABASE_URL.
"""

from __future__ import annotations

import logging.config
import os

from alembic import context
from sqlalchemy import Connection, text

from db.ask import MAKE_SCHEMA, VIEWS, settle
from db.roles import settle_roles
from db.session import connect
from db.tables import Base

TURN = 0x527573686573  # advisory lock: "Rushes"


def main() -> None:
    config = context.config
    url = config.attributes.get("url")
    if url is None:
        if config.config_file_name is not None:
            logging.config.fileConfig(config.config_file_name, disable_existing_loggers=False)
        url = context.get_x_argument(as_dictionary=True).get("url") or os.environ.get("RUSHES_DATABASE_URL")
    if not url:
        raise SystemExit("alembic: no database named: set RUSHES_DATABASE_URL or pass -x url=postgresql+psycopg://…")
    if context.is_offline_mode():
        context.configure(
            url=url, target_metadata=Base.metadata, literal_binds=True, dialect_opts={"paramstyle": "named"}
        )
        with context.begin_transaction():
            context.run_migrations()
            if context.get_revision_argument() == context.get_head_revision():
                for statement in (*MAKE_SCHEMA, *(each for view in VIEWS for each in view.remake)):
                    context.execute(statement)
        return
    engine = connect(url, application="rushes-migrations")
    try:
        with engine.connect() as connection, connection.begin():
            migrate(connection)
            if upgraded_to_head():
                settle(connection)
                left = config.attributes["left"] = settle_roles(connection)
                for statement in () if "url" in config.attributes else left:
                    logging.getLogger("rushes").warning("an administrator has to run: %s", statement)
    finally:
        engine.dispose()


def migrate(connection: Connection) -> None:
    # Waiting for another starter's migration is fine; the timeouts below are for what follows.
    connection.execute(text("set local lock_timeout = '5min'"))
    connection.execute(text("select pg_advisory_xact_lock(:turn)"), {"turn": TURN})
    # A migration that waits for a table lock makes every later reader of that table wait behind it: give up instead.
    connection.execute(text("set local lock_timeout = '5s'"))
    connection.execute(text("set local statement_timeout = '10min'"))
    context.configure(connection=connection, target_metadata=Base.metadata, compare_server_default=True)
    with context.begin_transaction():
        context.run_migrations()


def upgraded_to_head() -> bool:
    """False for a step on the way, a downgrade, and commands that only look."""
    now = context.get_context()
    return "destination_rev" in now.opts and set(now.get_current_heads()) == set(context.script.get_heads())


main()
