-- Letters that the table lacks. One whose event has an inbox row is settled and does not come back; one that is parked, or in a
-- retry topic, is on its way. A later record of a letter that was read back is another death of it; of any other letter, nothing new.
INSERT INTO {schema}.dead_letters AS letter
    (consumer, id, aggregate_type, aggregate_id, sequence, event_type, error_class, error_type, error_message, fingerprint,
     consumer_version, origin_topic, origin_partition, origin_offset, origin_timestamp_ms, attempts, partition, record_key,
     record_value, header_names, header_values, holds, state, first_died_at, last_died_at, rebuilt_at)
SELECT $1, coalesce(dead.event_id, md5(concat_ws('/', dead.origin_topic, dead.origin_partition, dead.origin_offset))::uuid),
       dead.aggregate_type, dead.aggregate_id, dead.sequence, dead.event_type, dead.error_class, dead.error_type,
       dead.error_message, dead.fingerprint, dead.consumer_version, dead.origin_topic, dead.origin_partition, dead.origin_offset,
       dead.origin_timestamp_ms, dead.attempts, dead.partition, dead.record_key, dead.record_value,
       coalesce(($20::text[])[dead.headers_from:dead.headers_to], '{}'),
       coalesce(($21::bytea[])[dead.headers_from:dead.headers_to], '{}'), dead.holds,
       CASE WHEN EXISTS (SELECT FROM {schema}.parked_events AS parked
                          WHERE parked.consumer = $1 AND parked.event_id = dead.event_id)
              OR EXISTS (SELECT FROM {schema}.held_keys AS held
                          WHERE held.consumer = $1 AND held.aggregate_type = dead.aggregate_type
                            AND held.aggregate_id = dead.aggregate_id AND held.event_id = dead.event_id
                            AND held.state = 'retrying')
            THEN 'redriving' ELSE 'open' END,
       died.at, died.at, clock_timestamp()
FROM unnest($2::uuid[], $3::text[], $4::text[], $5::bigint[], $6::text[], $7::text[], $8::text[], $9::text[], $10::text[],
            $11::text[], $12::text[], $13::integer[], $14::bigint[], $15::bigint[], $16::integer[], $17::integer[], $18::bytea[],
            $19::bytea[], $22::integer[], $23::integer[], $24::boolean[], $25::bigint[])
    AS dead (event_id, aggregate_type, aggregate_id, sequence, event_type, error_class, error_type, error_message, fingerprint,
             consumer_version, origin_topic, origin_partition, origin_offset, origin_timestamp_ms, attempts, partition, record_key,
             record_value, headers_from, headers_to, holds, died_ms),
     LATERAL (SELECT coalesce(to_timestamp(dead.died_ms / 1000.0), clock_timestamp())) AS died (at)
WHERE NOT EXISTS (SELECT FROM {schema}.inbox AS applied WHERE applied.consumer = $1 AND applied.event_id = dead.event_id)
ON CONFLICT (consumer, id) DO UPDATE
    SET error_class = excluded.error_class, error_type = excluded.error_type, error_message = excluded.error_message,
        fingerprint = excluded.fingerprint, consumer_version = excluded.consumer_version, attempts = excluded.attempts,
        deaths = letter.deaths + 1, last_died_at = excluded.last_died_at
  WHERE letter.rebuilt_at IS NOT NULL AND letter.last_died_at < excluded.last_died_at
    AND letter.state <> 'resolved' AND letter.archived_at IS NULL
RETURNING letter.xmax = 0
