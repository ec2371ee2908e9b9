-- The inbox: one row per event that took effect, per consumer group.
--
-- Promises
--   * Inserted in the transaction of the effect: a row is here if and only if its event took effect, or was found to have
--     taken effect before (G2).
--   * A row that is deleted in the transaction that inserted it was never visible to anyone: its event did not take effect
--     and went to a retry or dead-letter topic. Nothing else is deleted here.
--   * `applied_at` is the time of the insert; the transaction commits a little later.

CREATE TABLE commerce.inbox (
    consumer       text        NOT NULL,
    event_id       uuid        NOT NULL,
    aggregate_type text        NOT NULL,
    aggregate_id   text        NOT NULL,
    sequence       bigint      NOT NULL,
    -- Where the record stood through which it came: the main topic's, or a retry tier's.
    topic          text        NOT NULL,
    partition      integer     NOT NULL,
    record_offset  bigint      NOT NULL,
    applied_at     timestamptz NOT NULL DEFAULT clock_timestamp(),

    CONSTRAINT inbox_pkey PRIMARY KEY (consumer, event_id),
    CONSTRAINT inbox_sequence_positive CHECK (sequence >= 1)
);

GRANT SELECT, INSERT, DELETE ON commerce.inbox TO commerce_svc;
