-- The switch between the outbox and the synchronous path, and what shadow mode found.
--
-- Promises
--   * `flag_values` is the switch and its history in one: the newest row is in force, none means `outbox`. Rows are only ever
--     added, so every value is here with who set it, when and why; the previous value is the row before.
--   * `flag_instances` says which value each API process runs. A process writes its own row when its value changes and every
--     second besides; one that has not for ten seconds is gone.
--   * A roll-out is moved by one process at a time, under its row's lock, and at most one runs. Its steps are values of the flag
--     like any other; a value that somebody sets meanwhile ends it.
--   * A row of `shadow_expectations` is committed with the event that it is about, and goes in the transaction that notes what
--     the comparison found.

CREATE TABLE logistics.flag_values (
    version   bigint      CONSTRAINT flag_values_pkey PRIMARY KEY,
    -- What orders of the share get, and what the rest gets.
    mode      text        NOT NULL,
    rest      text        NOT NULL,
    -- Of all orders, in hundredths of a percent, by a hash of the order's id.
    share     integer     NOT NULL,
    set_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    set_by    text        NOT NULL,
    reason    text        NOT NULL,
    -- The roll-out whose step it is, or whose end.
    rollout   bigint,

    CONSTRAINT flag_values_version_positive CHECK (version >= 1),
    CONSTRAINT flag_values_mode_known CHECK (mode IN ('outbox', 'shadow', 'legacy')),
    CONSTRAINT flag_values_rest_known CHECK (rest IN ('outbox', 'shadow', 'legacy')),
    CONSTRAINT flag_values_share_range CHECK (share BETWEEN 0 AND 10000),
    CONSTRAINT flag_values_reason_length CHECK (octet_length(reason) BETWEEN 1 AND 500)
);
GRANT SELECT, INSERT ON logistics.flag_values TO logistics_svc;

CREATE TABLE logistics.flag_instances (
    instance   uuid        CONSTRAINT flag_instances_pkey PRIMARY KEY,
    address    text        NOT NULL,
    -- Version that it runs; 0 is the value before any was set.
    version    bigint      NOT NULL,
    -- Why it cannot run `legacy` and `shadow`, and leaves their events to the outbox; null if it can.
    unable     text,
    -- Changes asked of it and those that failed without being refused, since it started.
    requests   bigint      NOT NULL DEFAULT 0,
    failures   bigint      NOT NULL DEFAULT 0,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    seen_at    timestamptz NOT NULL DEFAULT clock_timestamp()
);
GRANT SELECT, INSERT, UPDATE, DELETE ON logistics.flag_instances TO logistics_svc;

CREATE TABLE logistics.flag_rollouts (
    id             bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT flag_rollouts_pkey PRIMARY KEY,
    -- running; done: every step was soaked; returned: a condition was met; superseded: somebody else set the flag.
    state          text        NOT NULL DEFAULT 'running',
    mode           text        NOT NULL,
    rest           text        NOT NULL,
    -- Shares, rising.
    steps          integer[]   NOT NULL,
    soak_seconds   double precision NOT NULL,
    -- It stops when one of them is passed; null: not looked at.
    most_mismatches   bigint,
    most_lag_seconds  double precision,
    most_error_ratio  double precision,
    most_dead_letters bigint,
    -- How many steps are in force or were, and the value of the flag that the last of them is.
    step           integer     NOT NULL DEFAULT 0,
    version        bigint,
    step_began_at  timestamptz,
    -- When a process last looked whether a condition is met.
    watched_at     timestamptz,
    -- The value that was in force when the last soaked step ended, or before the first: where a stop returns to.
    safe_version   bigint      NOT NULL,
    -- What had been counted when the step began.
    requests_before     bigint,
    failures_before     bigint,
    compared_before     bigint,
    started_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    started_by     text        NOT NULL,
    reason         text        NOT NULL,
    ended_at       timestamptz,
    ended_because  text,

    CONSTRAINT flag_rollouts_state_known CHECK (state IN ('running', 'done', 'returned', 'superseded')),
    CONSTRAINT flag_rollouts_ended_with_reason CHECK ((state = 'running') = (ended_because IS NULL)),
    CONSTRAINT flag_rollouts_has_steps CHECK (cardinality(steps) BETWEEN 1 AND 100),
    CONSTRAINT flag_rollouts_reason_length CHECK (octet_length(reason) BETWEEN 1 AND 500)
);
CREATE UNIQUE INDEX flag_rollouts_one_runs ON logistics.flag_rollouts ((true)) WHERE state = 'running';
GRANT SELECT, INSERT ON logistics.flag_rollouts TO logistics_svc;
GRANT UPDATE (state, step, version, step_began_at, watched_at, safe_version, requests_before, failures_before,
              compared_before, ended_at, ended_because) ON logistics.flag_rollouts TO logistics_svc;

CREATE TABLE logistics.shadow_expectations (
    event_id   uuid        CONSTRAINT shadow_expectations_pkey PRIMARY KEY,
    event_type text        NOT NULL,
    -- The rows as the synchronous path would have left them.
    expected   json        NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX shadow_expectations_age ON logistics.shadow_expectations (created_at);
GRANT SELECT, INSERT, DELETE ON logistics.shadow_expectations TO logistics_svc;
-- FOR UPDATE, so that several processes share the comparisons.
GRANT UPDATE (created_at) ON logistics.shadow_expectations TO logistics_svc;

CREATE TABLE logistics.shadow_mismatches (
    id          bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT shadow_mismatches_pkey PRIMARY KEY,
    event_id    uuid        NOT NULL,
    event_type  text        NOT NULL,
    shipment_id text        NOT NULL,
    order_id    text        NOT NULL,
    table_name  text        NOT NULL,
    row_key     text        NOT NULL,
    -- `*` stands for the whole row.
    column_name text        NOT NULL,
    expected    text        NOT NULL,
    found       text        NOT NULL,
    found_at    timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX shadow_mismatches_age ON logistics.shadow_mismatches (found_at);
CREATE INDEX shadow_mismatches_place ON logistics.shadow_mismatches (table_name, column_name, event_type, id);
GRANT SELECT, INSERT, DELETE ON logistics.shadow_mismatches TO logistics_svc;

-- What became of expectations: one row each for `compared`, `different`, `expired`, `rows_compared` and
-- `rows_overtaken`.
CREATE TABLE logistics.shadow_tally (
    outcome text   CONSTRAINT shadow_tally_pkey PRIMARY KEY,
    count   bigint NOT NULL
);
GRANT SELECT, INSERT, UPDATE ON logistics.shadow_tally TO logistics_svc;
