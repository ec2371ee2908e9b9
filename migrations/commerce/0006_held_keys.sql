-- Order per key through failure: which keys are held, and the events that wait behind them.
--
-- Promises
--   * A row here is a key whose event `event_id` has failed, is missing a predecessor, or has just been settled; events of
--     the key with a higher sequence do not take effect while it stands (G3). Written in the transaction that found out.
--   * Everything that reads a row to decide about its key has locked it, so nothing parks behind a key that is just leaving.
--   * A parked event is deleted in the transaction in which it takes effect, or after the broker has acknowledged its copy
--     in a retry or dead-letter topic. Nothing else deletes it.
--   * `parked` is the number of the key's rows in `parked_events`.
--   * The row goes when its event is settled and nothing is parked behind it any more.

CREATE TABLE commerce.held_keys (
    consumer       text        NOT NULL,
    aggregate_type text        NOT NULL,
    aggregate_id   text        NOT NULL,
    -- retrying: the event is in a retry topic. dead: it is in the dead-letter topic. waiting: it is parked, an earlier one has
    -- not come yet. releasing: it is settled, those behind it are on their way.
    state          text        NOT NULL,
    event_id       uuid        NOT NULL,
    event_type     text        NOT NULL,
    sequence       bigint      NOT NULL,
    partition      integer     NOT NULL,
    error_type     text        NOT NULL,
    error_message  text        NOT NULL,
    parked         bigint      NOT NULL DEFAULT 0,
    held_since     timestamptz NOT NULL DEFAULT clock_timestamp(),
    changed_at     timestamptz NOT NULL DEFAULT clock_timestamp(),

    CONSTRAINT held_keys_pkey PRIMARY KEY (consumer, aggregate_type, aggregate_id),
    CONSTRAINT held_keys_state_known CHECK (state IN ('retrying', 'dead', 'waiting', 'releasing')),
    CONSTRAINT held_keys_parked_not_negative CHECK (parked >= 0)
);
-- What the releaser looks for several times a second.
CREATE INDEX held_keys_releasing ON commerce.held_keys (consumer, changed_at) WHERE state = 'releasing';

CREATE TABLE commerce.parked_events (
    consumer            text        NOT NULL,
    event_id            uuid        NOT NULL,
    aggregate_type      text        NOT NULL,
    aggregate_id        text        NOT NULL,
    sequence            bigint      NOT NULL,
    event_type          text        NOT NULL,
    -- Where the event first stood, and how often it has been tried.
    origin_topic        text        NOT NULL,
    origin_partition    integer     NOT NULL,
    origin_offset       bigint      NOT NULL,
    origin_timestamp_ms bigint,
    attempts            integer     NOT NULL,
    -- The record, to be sent on as it came.
    partition           integer     NOT NULL,
    record_key          bytea,
    record_value        bytea       NOT NULL,
    header_names        text[]      NOT NULL,
    header_values       bytea[]     NOT NULL,
    parked_at           timestamptz NOT NULL DEFAULT clock_timestamp(),

    CONSTRAINT parked_events_pkey PRIMARY KEY (consumer, event_id)
);
CREATE INDEX parked_events_key ON commerce.parked_events (consumer, aggregate_type, aggregate_id, sequence, origin_offset);

GRANT SELECT, INSERT, UPDATE, DELETE ON commerce.held_keys TO commerce_svc;
GRANT SELECT, INSERT, DELETE ON commerce.parked_events TO commerce_svc;
