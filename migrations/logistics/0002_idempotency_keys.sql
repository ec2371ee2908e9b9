-- Answers kept for clients that repeat a request.
--
-- Promises
--   * A row is written by the transaction that made the change, so an answer is here if and only if its change is (H1).
--   * Only answers of the 200 class are kept; a refused request is judged afresh when it is repeated.
--   * `response` is the answer's body, byte for byte.
--   * A key is kept for 24 hours; the API processes delete older rows in small batches.
--   * Two equal requests at once: an advisory transaction lock on the hash of route and key lets one through.

CREATE TABLE logistics.idempotency_keys (
    -- The operation, e.g. `completeShipment`.
    route        text        NOT NULL,
    key          text        NOT NULL,
    -- SHA-256 of the path and the body: the same key with another request is a mistake of the client.
    request_hash bytea       NOT NULL,
    status       integer     NOT NULL,
    location     text,
    -- json, not jsonb: the text is kept as it was sent.
    response     json        NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT now(),

    CONSTRAINT idempotency_keys_pkey PRIMARY KEY (route, key),
    CONSTRAINT idempotency_keys_key_length CHECK (octet_length(key) BETWEEN 1 AND 255),
    CONSTRAINT idempotency_keys_hash_is_sha256 CHECK (octet_length(request_hash) = 32),
    CONSTRAINT idempotency_keys_status_is_success CHECK (status BETWEEN 200 AND 299)
) WITH (
    -- Every row is deleted a day later: vacuum by a small fraction, or a busy day leaves the table twice its size.
    autovacuum_vacuum_scale_factor = 0.02,
    autovacuum_vacuum_threshold = 1000
);
CREATE INDEX idempotency_keys_age ON logistics.idempotency_keys (created_at);

GRANT SELECT, INSERT, DELETE ON logistics.idempotency_keys TO logistics_svc;
