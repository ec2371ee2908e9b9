#!/bin/bash
# Run once, on an empty volume: the three roles that the services log in with (docs/adr/0009). The database is POSTGRES_DB, and
# the migrations do the rest.
set -eu
psql -v ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" \
    -v logistics="$LOGISTICS_PASSWORD" -v relay="$RELAY_PASSWORD" -v commerce="$COMMERCE_PASSWORD" <<'SQL'
CREATE ROLE logistics_svc WITH LOGIN NOREPLICATION PASSWORD :'logistics';
CREATE ROLE logistics_relay WITH LOGIN REPLICATION PASSWORD :'relay';
CREATE ROLE commerce_svc WITH LOGIN NOREPLICATION PASSWORD :'commerce';
-- For the synchronous path only, which says so with SET ROLE; nothing of it is inherited.
GRANT commerce_svc TO logistics_svc WITH INHERIT FALSE, SET TRUE;
SQL
