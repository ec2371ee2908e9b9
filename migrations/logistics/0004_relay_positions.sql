-- Up to where each replication slot's events are published, as the relay itself knows it.
--
-- Promises
--   * A position is written here before the slot is told of it, so a slot is never ahead of its row.
--   * A slot that is ahead was made, replaced or advanced by someone else: rows between may never be streamed. The relay
--     then publishes every unsent row from the table before it streams (HAZARDS H14, H16). A crash in the middle of that
--     leaves the row behind the slot, and the next start begins it again.
--   * Positions only move forward, within one database cluster: after a restore into another one they mean nothing.

CREATE TABLE logistics.outbox_relay_positions (
    slot              text        NOT NULL,
    -- Of the database cluster, as IDENTIFY_SYSTEM reports it.
    system_identifier text        NOT NULL,
    position          pg_lsn      NOT NULL,
    updated_at        timestamptz NOT NULL DEFAULT clock_timestamp(),

    CONSTRAINT outbox_relay_positions_pkey PRIMARY KEY (slot)
);

GRANT SELECT, INSERT, UPDATE ON logistics.outbox_relay_positions TO logistics_relay;
