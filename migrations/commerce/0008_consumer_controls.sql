-- What operators set while the consumer runs, for all of its instances and across their restarts.
--
-- Promises
--   * One row per consumer at most; without one, its settings are in force.
--   * Each instance looks once a second, and before its first record.
--   * Every change has its row in operator_actions, written in the same transaction.

-- An earlier shape, which nothing has ever written to.
DROP TABLE commerce.consumer_controls;

CREATE TABLE commerce.consumer_controls (
    consumer     text        CONSTRAINT consumer_controls_pkey PRIMARY KEY,
    -- Why nothing is applied; null while the consumer works.
    paused       text,
    -- Events per second of the whole group, or `unlimited`; null: as the settings say.
    live_rate    text,
    retry_rate   text,
    redrive_rate text,
    changed_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    changed_by   text        NOT NULL,
    -- Raised with each change, so that an older answer is told from a newer one.
    version      bigint      NOT NULL DEFAULT 0,

    CONSTRAINT consumer_controls_pause_has_a_reason CHECK (octet_length(paused) BETWEEN 1 AND 500),
    CONSTRAINT consumer_controls_live_rate_known CHECK (live_rate ~ '^(unlimited|[1-9][0-9]{0,9})$'),
    CONSTRAINT consumer_controls_retry_rate_known CHECK (retry_rate ~ '^(unlimited|[1-9][0-9]{0,9})$'),
    CONSTRAINT consumer_controls_redrive_rate_known CHECK (redrive_rate ~ '^(unlimited|[1-9][0-9]{0,9})$')
);

GRANT SELECT, INSERT, UPDATE ON commerce.consumer_controls TO commerce_svc;
