-- What the relay needs beyond the write-ahead log: rows set aside, rows asked for again, and who polls what.
--
-- Promises
--   * A row that the broker refuses for itself (too large, invalid) is set aside with the reason; the rows of its key wait
--     behind it, all others flow (HAZARDS H29).
--   * A row that its group does not read back is found, however many there are.
--   * A request to send a row again is kept with who asked and what became of it.
--   * At most one instance holds a lease on a bucket of keys at a time; each change of owner raises the bucket's epoch.
--     Leases spare duplicates. Order does not depend on them: whoever publishes sends each key's unsent rows in sequence
--     from the first one on, and two such runs merged keep the order of first arrivals.

ALTER TABLE logistics.outbox
    ADD COLUMN failed_at timestamptz,
    ADD COLUMN failure   text,
    ADD CONSTRAINT outbox_failure_has_reason CHECK ((failed_at IS NULL) = (failure IS NULL)),
    ADD CONSTRAINT outbox_failed_is_unpublished CHECK (failed_at IS NULL OR published_at IS NULL);

CREATE INDEX outbox_failed ON logistics.outbox (aggregateid) WHERE failed_at IS NOT NULL;

GRANT UPDATE (failed_at, failure) ON logistics.outbox TO logistics_relay;

CREATE TABLE logistics.outbox_resends (
    event_id     uuid        NOT NULL,
    requested_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    requested_by text        NOT NULL,
    reason       text        NOT NULL,
    done_at      timestamptz,
    -- Null when it was sent, else why not.
    refusal      text,

    CONSTRAINT outbox_resends_pkey PRIMARY KEY (event_id, requested_at),
    CONSTRAINT outbox_resends_refused_when_done CHECK (refusal IS NULL OR done_at IS NOT NULL)
);
CREATE INDEX outbox_resends_open ON logistics.outbox_resends (event_id) WHERE done_at IS NULL;

GRANT SELECT, INSERT ON logistics.outbox_resends TO logistics_svc;
GRANT SELECT, INSERT, UPDATE (done_at, refusal), DELETE ON logistics.outbox_resends TO logistics_relay;

-- Up to where the rows are settled that a group reads back: confirmed, or refused by the broker when they were to be sent again.
-- What is unconfirmed after it is looked for again and again, however long the relay was away.
CREATE TABLE logistics.outbox_confirmations (
    confirm_group text NOT NULL,
    settled_to    uuid NOT NULL,

    CONSTRAINT outbox_confirmations_pkey PRIMARY KEY (confirm_group)
);

GRANT SELECT, INSERT, UPDATE ON logistics.outbox_confirmations TO logistics_relay;

-- Rows created before `unmarked_before` that carry no mark were published while marks were switched off.
ALTER TABLE logistics.outbox_relay_positions ADD COLUMN unmarked_before timestamptz;

CREATE FUNCTION logistics.outbox_bucket(aggregateid text) RETURNS integer
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
    -- Without a search path of its own it is inlined; so every name is written out.
RETURN (pg_catalog.hashtextextended(aggregateid, 0) OPERATOR(pg_catalog.&) 63)::pg_catalog.int4;

CREATE TABLE logistics.outbox_relay_members (
    member     uuid        NOT NULL,
    seen_until timestamptz NOT NULL,

    CONSTRAINT outbox_relay_members_pkey PRIMARY KEY (member)
);

CREATE TABLE logistics.outbox_relay_buckets (
    bucket       integer     NOT NULL,
    owner        uuid,
    epoch        bigint      NOT NULL DEFAULT 0,
    leased_until timestamptz NOT NULL DEFAULT '-infinity',

    CONSTRAINT outbox_relay_buckets_pkey PRIMARY KEY (bucket),
    CONSTRAINT outbox_relay_buckets_range CHECK (bucket BETWEEN 0 AND 63)
);
INSERT INTO logistics.outbox_relay_buckets (bucket) SELECT generate_series(0, 63);

-- Renews the member's leases, takes free buckets up to its fair share, and returns what it holds. A bucket beyond the fair
-- share is marked `surplus`: the member finishes what it has sent of it and then gives it back. One at a time: with some
-- instances once a second, nobody waits.
CREATE FUNCTION logistics.lease_outbox_buckets(asking uuid, term interval)
    RETURNS TABLE (bucket integer, epoch bigint, surplus boolean)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '2s'
AS $$
DECLARE
    -- Not now(): the wait for the lock must not shorten a lease.
    moment timestamptz;
    share  integer;
    held   integer;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('logistics.lease_outbox_buckets', 0));
    moment := clock_timestamp();
    INSERT INTO logistics.outbox_relay_members AS m VALUES (asking, moment + term)
        ON CONFLICT (member) DO UPDATE SET seen_until = EXCLUDED.seen_until;
    DELETE FROM logistics.outbox_relay_members AS m WHERE m.seen_until < moment;
    -- A lease that has run out is taken anew, with a new epoch, even by its own last owner.
    UPDATE logistics.outbox_relay_buckets AS b SET leased_until = moment + term
     WHERE b.owner = asking AND b.leased_until > moment;
    GET DIAGNOSTICS held = ROW_COUNT;
    SELECT ceil(64.0 / count(*))::integer INTO share FROM logistics.outbox_relay_members;
    UPDATE logistics.outbox_relay_buckets AS b
       SET owner = asking, epoch = b.epoch + 1, leased_until = moment + term
     WHERE b.bucket IN (SELECT f.bucket FROM logistics.outbox_relay_buckets AS f WHERE f.leased_until <= moment
                         ORDER BY f.bucket LIMIT greatest(share - held, 0));
    RETURN QUERY
        SELECT b.bucket, b.epoch, row_number() OVER (ORDER BY b.bucket) > share
          FROM logistics.outbox_relay_buckets AS b
         WHERE b.owner = asking AND b.leased_until > moment
         ORDER BY b.bucket;
END
$$;
REVOKE ALL ON FUNCTION logistics.lease_outbox_buckets(uuid, interval) FROM PUBLIC;

GRANT SELECT, INSERT, UPDATE, DELETE ON logistics.outbox_relay_members TO logistics_relay;
GRANT SELECT, UPDATE ON logistics.outbox_relay_buckets TO logistics_relay;
GRANT EXECUTE ON FUNCTION logistics.lease_outbox_buckets(uuid, interval) TO logistics_relay;

-- Drops the daily partitions that ended before `keep_since` and hold nothing unsent, at most `most` of them, and returns
-- their names. `done_before` is the time before which rows without a mark count as sent (null: none do).
CREATE FUNCTION logistics.drop_outbox_partitions(keep_since timestamptz, done_before timestamptz, most integer)
    RETURNS SETOF text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    -- Dropping locks the whole outbox against writers: rather than make them queue behind us, give up and come again.
    SET lock_timeout = '200ms'
AS $$
DECLARE
    part    record;
    unsent  boolean;
    dropped integer := 0;
    -- A row that was set aside, and what waits behind it, is never done with, whatever the marks say.
    left_over CONSTANT text := 'SELECT EXISTS (SELECT FROM logistics.%I WHERE published_at IS NULL '
                               'AND ($1 IS NULL OR created_at >= $1 OR aggregateid IN '
                               '(SELECT f.aggregateid FROM logistics.outbox AS f WHERE f.failed_at IS NOT NULL)))';
BEGIN
    -- A typing error must not empty the outbox.
    IF keep_since IS NULL OR keep_since > now() - interval '1 hour' THEN
        RAISE EXCEPTION 'keep_since is %, it must be an hour ago or more', keep_since
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    -- Two relays that drop at once would only wait for each other.
    IF NOT pg_try_advisory_xact_lock(hashtextextended('logistics.drop_outbox_partitions', 0)) THEN
        RETURN;
    END IF;
    FOR part IN
        SELECT c.relname AS name, to_date(substr(c.relname, 8), 'YYYYMMDD') AS day
          FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid
         WHERE i.inhparent = 'logistics.outbox'::regclass AND c.relname ~ '^outbox_[0-9]{8}$'
         ORDER BY c.relname
    LOOP
        EXIT WHEN dropped >= most OR ((part.day + 1)::timestamp AT TIME ZONE 'UTC') > keep_since;
        -- Looked at without a lock first: a partition that must stay shall cost nobody anything.
        EXECUTE format(left_over, part.name) INTO unsent USING done_before;
        CONTINUE WHEN unsent;
        BEGIN
            LOCK TABLE logistics.outbox IN ACCESS EXCLUSIVE MODE;
            EXECUTE format(left_over, part.name) INTO unsent USING done_before;
            IF NOT unsent THEN
                EXECUTE format('DROP TABLE logistics.%I', part.name);
                dropped := dropped + 1;
                RETURN NEXT part.name;
            END IF;
        EXCEPTION WHEN lock_not_available THEN
            EXIT;
        END;
    END LOOP;
END
$$;
REVOKE ALL ON FUNCTION logistics.drop_outbox_partitions(timestamptz, timestamptz, integer) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION logistics.drop_outbox_partitions(timestamptz, timestamptz, integer) TO logistics_relay;

-- Rows of the default partition are few: they came while partitions were missing.
GRANT SELECT, DELETE ON logistics.outbox_default TO logistics_relay;
