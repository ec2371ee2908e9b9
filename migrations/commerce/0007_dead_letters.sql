-- Dead letters, for those who repair them; and what an operator did.
--
-- Promises
--   * A row is written in the transaction that decides that an event is dead, before its record is sent to the dead-letter
--     topic: so every record of that topic has its row, and a topic that refuses a record loses nothing. The topic can
--     fill the table again.
--   * One row per event, however many copies of its record died; one per record if it could not be read.
--   * `state`: open (waits for a person), redriving (on its way through again), resolved (it took effect after all, or was
--     skipped). Nothing deletes a row.
--   * `failed_attempts` has one row for each try that failed, by event and attempt.
--   * `operator_actions` is only ever added to.

CREATE TABLE commerce.dead_letters (
    consumer            text        NOT NULL,
    -- The event's id; of a record that is no event, made of its place.
    id                  uuid        NOT NULL,
    aggregate_type      text,
    aggregate_id        text,
    sequence            bigint,
    event_type          text,
    origin_topic        text        NOT NULL,
    origin_partition    integer     NOT NULL,
    origin_offset       bigint      NOT NULL,
    origin_timestamp_ms bigint,
    attempts            integer     NOT NULL,
    partition           integer     NOT NULL,
    record_key          bytea,
    record_value        bytea,
    header_names        text[]      NOT NULL,
    header_values       bytea[]     NOT NULL,
    error_class         text        NOT NULL,
    error_type          text        NOT NULL,
    error_message       text        NOT NULL,
    -- Error type and message without what differs from event to event: letters that are alike have it in common.
    fingerprint         text        NOT NULL,
    consumer_version    text        NOT NULL,
    state               text        NOT NULL DEFAULT 'open',
    -- Whether later events of its key wait until it is resolved.
    holds               boolean     NOT NULL,
    deaths              integer     NOT NULL DEFAULT 1,
    first_died_at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    last_died_at        timestamptz NOT NULL DEFAULT clock_timestamp(),
    resolved_at         timestamptz,

    CONSTRAINT dead_letters_pkey PRIMARY KEY (consumer, id),
    CONSTRAINT dead_letters_state_known CHECK (state IN ('open', 'redriving', 'resolved'))
);
CREATE INDEX dead_letters_by_fingerprint ON commerce.dead_letters (consumer, state, fingerprint, last_died_at);
CREATE INDEX dead_letters_by_key ON commerce.dead_letters (consumer, aggregate_type, aggregate_id, sequence);
-- Whether a key that is let go meets another dead letter.
CREATE INDEX dead_letters_holding ON commerce.dead_letters (consumer, aggregate_type, aggregate_id, sequence)
    WHERE state = 'open' AND holds;
CREATE INDEX dead_letters_by_time ON commerce.dead_letters (consumer, state, last_died_at, id);

CREATE TABLE commerce.failed_attempts (
    consumer         text        NOT NULL,
    event_id         uuid        NOT NULL,
    attempt          integer     NOT NULL,
    failed_at        timestamptz NOT NULL DEFAULT clock_timestamp(),
    topic            text        NOT NULL,
    partition        integer     NOT NULL,
    error_class      text        NOT NULL,
    error_type       text        NOT NULL,
    error_message    text        NOT NULL,
    consumer_version text        NOT NULL
);
CREATE INDEX failed_attempts_by_event ON commerce.failed_attempts (consumer, event_id, failed_at);

CREATE TABLE commerce.operator_actions (
    id       bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT operator_actions_pkey PRIMARY KEY,
    consumer text        NOT NULL,
    acted_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    actor    text        NOT NULL,
    role     text        NOT NULL,
    action   text        NOT NULL,
    -- What it was done to: the ids of dead letters, a budget, a group.
    target   jsonb       NOT NULL,
    reason   text        NOT NULL,

    CONSTRAINT operator_actions_reason_given CHECK (octet_length(reason) BETWEEN 1 AND 500)
);
CREATE INDEX operator_actions_by_consumer ON commerce.operator_actions (consumer, id);

-- A parked event that shall not take effect: its key goes on without it.
ALTER TABLE commerce.parked_events ADD COLUMN skip boolean NOT NULL DEFAULT false;

-- What operators have set for a whole group; it outlives every instance. NULL: as configured.
CREATE TABLE commerce.consumer_controls (
    consumer     text        CONSTRAINT consumer_controls_pkey PRIMARY KEY,
    paused_since timestamptz,
    paused_by    text,
    live_rate    text,
    retry_rate   text
);

GRANT SELECT, INSERT, UPDATE ON commerce.dead_letters TO commerce_svc;
GRANT UPDATE (skip) ON commerce.parked_events TO commerce_svc;
GRANT SELECT, INSERT ON commerce.failed_attempts TO commerce_svc;
GRANT SELECT, INSERT ON commerce.operator_actions TO commerce_svc;
GRANT SELECT, INSERT, UPDATE ON commerce.consumer_controls TO commerce_svc;
