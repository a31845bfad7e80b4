#!/bin/sh
# Runs once, inside the Postgres container, on an empty volume. Passwords go through psql variables, which quote them.
set -eu
psql --no-psqlrc -v ON_ERROR_STOP=1 -v ledger="$LEDGER_PASSWORD" -v prefect="$PREFECT_DB_PASSWORD" \
    --username "${POSTGRES_USER:-postgres}" --dbname postgres <<'SQL'
CREATE ROLE rushes LOGIN PASSWORD :'ledger';
CREATE ROLE prefect LOGIN PASSWORD :'prefect';
CREATE DATABASE rushes OWNER rushes;
CREATE DATABASE prefect OWNER prefect;
-- Each role keeps to its own database.
REVOKE CONNECT ON DATABASE rushes, prefect FROM PUBLIC;
SQL
