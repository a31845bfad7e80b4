#!/bin/sh
# Runs once, inside the Postgres container, on an empty volume. Passwords go through psql variables, which quote them.
set -eu
psql --no-psqlrc -v ON_ERROR_STOP=1 -v ledger="$LEDGER_PASSWORD" -v prefect="$PREFECT_DB_PASSWORD" \
    -v platform="$PLATFORM_PASSWORD" -v reader="$READER_PASSWORD" \
    --username "${POSTGRES_USER:-postgres}" --dbname postgres <<'SQL'
CREATE ROLE rushes LOGIN PASSWORD :'ledger';
CREATE ROLE prefect LOGIN PASSWORD :'prefect';
-- Groups that `rushes migrate` would make itself, had its login the right to: who runs the platform, who reads `history`.
CREATE ROLE rushes_app NOLOGIN;
CREATE ROLE rushes_reader NOLOGIN;
CREATE ROLE platform LOGIN PASSWORD :'platform' IN ROLE rushes_app;
CREATE ROLE reader LOGIN PASSWORD :'reader' IN ROLE rushes_reader;
-- A query that is forgotten ends; the views of the schema `ask` go by their short names.
ALTER ROLE reader SET statement_timeout = '60s';
ALTER ROLE reader SET idle_in_transaction_session_timeout = '10min';
ALTER ROLE reader SET search_path = ask, public;
ALTER ROLE reader SET random_page_cost = '1.1';
ALTER ROLE reader SET work_mem = '32MB';
ALTER ROLE reader SET jit = 'off';
CREATE DATABASE rushes OWNER rushes;
CREATE DATABASE prefect OWNER prefect;
-- Each role keeps to its own database.
REVOKE CONNECT ON DATABASE rushes, prefect FROM PUBLIC;
GRANT CONNECT ON DATABASE rushes TO rushes_app, rushes_reader;
-- Advisory locks are for the owner and whom `rushes migrate` lets, large objects for nobody: see docs/security.md.
\connect rushes
DO $$ DECLARE
    each record;
BEGIN
    FOR each IN
        SELECT oid::regprocedure AS named, proname LIKE 'pg%' AS locks FROM pg_proc
        WHERE pronamespace = 'pg_catalog'::regnamespace AND (proname ~ '^pg_(try_)?advisory_' OR proname = 'lowrite'
            OR proname ~ '^lo_(creat|create|from_bytea|put|truncate|truncate64|unlink)$')
    LOOP
        IF each.locks THEN
            EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO rushes WITH GRANT OPTION', each.named);
        END IF;
        EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', each.named);
    END LOOP;
END $$;
SQL
