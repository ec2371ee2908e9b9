-- The outbox: one row per event, inserted by the transaction of the change it announces.
--
-- Promises
--   * A row is here if and only if its change is committed (G1). `payload` is the envelope, byte for byte what Kafka gets.
--   * Rows are never updated but for their two marks, and marks are only set: INIT (both null) -> PUBLISHED (the broker has
--     acknowledged) -> COMPLETED (the product's own consumer group has read the record back).
--   * Rows leave by the day, as a whole partition, never before all of them are published.
--
-- Partitions. Ids are UUIDv7: the first 48 bits are the milliseconds since 1970, so a day is a range of ids and the primary
-- key (id) stays unique over all partitions. `ensure_outbox_partitions` creates the days ahead; the relay calls it. If
-- nobody does, rows go to the default partition: a missing partition never fails a request.
--
-- What cannot be stated here: (aggregatetype, aggregateid, sequence) is unique. A unique constraint over partitions must
-- contain the partition key, and an aggregate's events span days. The row lock of the aggregate keeps it; tests check it.

CREATE TABLE logistics.outbox (
    id            uuid        NOT NULL,
    aggregatetype text        NOT NULL,
    aggregateid   text        NOT NULL,
    type          text        NOT NULL,
    version       integer     NOT NULL,
    sequence      bigint      NOT NULL,
    -- json, not jsonb: the text is kept verbatim.
    payload       json        NOT NULL,
    traceparent   text,
    tx_key        uuid        NOT NULL,
    created_at    timestamptz NOT NULL DEFAULT now(),
    published_at  timestamptz,
    confirmed_at  timestamptz,

    CONSTRAINT outbox_pkey PRIMARY KEY (id),
    CONSTRAINT outbox_aggregateid_length CHECK (octet_length(aggregateid) BETWEEN 1 AND 255),
    CONSTRAINT outbox_version_positive CHECK (version >= 1),
    CONSTRAINT outbox_sequence_positive CHECK (sequence >= 1),
    CONSTRAINT outbox_confirmed_after_published CHECK (confirmed_at IS NULL OR published_at IS NOT NULL)
) PARTITION BY RANGE (id);

-- What is still to be sent, each aggregate's events in their order: small whatever the size of the table.
CREATE INDEX outbox_unpublished ON logistics.outbox (aggregateid, sequence) WHERE published_at IS NULL;

-- Every row is updated twice, soon after its insert, so vacuum comes after a few thousand rows and not after a fifth of the
-- day; a partitioned table cannot hold these settings itself.
CREATE TABLE logistics.outbox_default PARTITION OF logistics.outbox DEFAULT
    WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 5000,
          autovacuum_vacuum_insert_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.05);

-- The smallest UUIDv7 of an instant's millisecond; before 1970 there is none, and the smallest of all does.
CREATE FUNCTION logistics.outbox_id_floor(instant timestamptz) RETURNS uuid
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
AS $$
    SELECT (lpad(to_hex(greatest(floor(extract(epoch FROM instant) * 1000), 0)::bigint), 12, '0') || repeat('0', 20))::uuid
$$;

-- Creates the daily partitions (UTC) from today to `days_ahead` days ahead, at most 60, and returns how many are new.
-- Safe to call at any time and from several sessions at once. A day whose rows already stand in the default partition is
-- skipped: its rows stay there, and PostgreSQL refuses a partition that would claim them.
CREATE FUNCTION logistics.ensure_outbox_partitions(days_ahead integer) RETURNS integer
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    -- Attaching locks the default partition. Rather than queue behind a long reader, with all others behind us, give up.
    SET lock_timeout = '2s'
AS $$
DECLARE
    today   date    := (now() AT TIME ZONE 'UTC')::date;
    created integer := 0;
    day     date;
    name    text;
    low     uuid;
    high    uuid;
BEGIN
    IF days_ahead IS NULL OR days_ahead NOT BETWEEN 0 AND 60 THEN
        RAISE EXCEPTION 'days_ahead is %, allowed are 0 to 60', days_ahead USING ERRCODE = 'invalid_parameter_value';
    END IF;
    PERFORM pg_advisory_xact_lock(hashtextextended('logistics.ensure_outbox_partitions', 0));
    FOR ahead IN 0..days_ahead LOOP
        day  := today + ahead;
        name := 'outbox_' || to_char(day, 'YYYYMMDD');
        low  := logistics.outbox_id_floor(day::timestamp AT TIME ZONE 'UTC');
        high := logistics.outbox_id_floor((day + 1)::timestamp AT TIME ZONE 'UTC');
        CONTINUE WHEN to_regclass(format('logistics.%I', name)) IS NOT NULL;
        CONTINUE WHEN EXISTS (SELECT FROM logistics.outbox_default WHERE id >= low AND id < high);
        -- CREATE TABLE … PARTITION OF would lock the whole outbox against writers; ATTACH does not.
        EXECUTE format('CREATE TABLE logistics.%I (LIKE logistics.outbox INCLUDING DEFAULTS INCLUDING CONSTRAINTS '
                       'INCLUDING INDEXES INCLUDING STORAGE) WITH (autovacuum_vacuum_scale_factor = 0.02, '
                       'autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_insert_scale_factor = 0.05, '
                       'autovacuum_analyze_scale_factor = 0.05)', name);
        BEGIN
            EXECUTE format('ALTER TABLE logistics.outbox ATTACH PARTITION logistics.%I FOR VALUES FROM (%L) TO (%L)',
                           name, low, high);
            created := created + 1;
        EXCEPTION WHEN check_violation THEN
            -- A row of that day was committed to the default partition after the look above.
            EXECUTE format('DROP TABLE logistics.%I', name);
        END;
    END LOOP;
    RETURN created;
END
$$;
REVOKE ALL ON FUNCTION logistics.ensure_outbox_partitions(integer) FROM PUBLIC;

SELECT logistics.ensure_outbox_partitions(7);

-- Inserts only: marks and dropped partitions are nobody's event. One table for every relay, however many partitions.
CREATE PUBLICATION logistics_outbox FOR TABLE logistics.outbox
    WITH (publish = 'insert', publish_via_partition_root = true);

GRANT SELECT, INSERT ON logistics.outbox TO logistics_svc;
GRANT SELECT, UPDATE (published_at, confirmed_at) ON logistics.outbox TO logistics_relay;
GRANT EXECUTE ON FUNCTION logistics.ensure_outbox_partitions(integer) TO logistics_relay;
