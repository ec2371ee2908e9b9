CREATE SCHEMA peer;
CREATE TABLE peer.shipments (id bigint PRIMARY KEY, order_id bigint, status text, completed_at timestamptz, carrier text, tracking text);
INSERT INTO peer.shipments SELECT n, n, 'open', NULL, 'Speedy Express', 'none' FROM generate_series(1, 2000000) AS n;
CREATE TABLE peer.outbox (seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, id uuid DEFAULT gen_random_uuid(), aggregatetype text,
    aggregateid text, type text, version integer DEFAULT 1, payload jsonb, created_at timestamptz DEFAULT clock_timestamp());
ANALYZE peer.shipments;
CHECKPOINT;
