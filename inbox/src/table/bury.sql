-- A letter that dies again is the same letter; one that is open already has only been tried once more. One that was resolved
-- meanwhile cannot die: its event has an inbox row; or its record is no event, and what took its place is a letter of its own.
INSERT INTO {schema}.dead_letters AS letter
    (consumer, id, aggregate_type, aggregate_id, sequence, event_type, error_class, error_type, error_message, fingerprint,
     consumer_version, origin_topic, origin_partition, origin_offset, origin_timestamp_ms, attempts, partition, record_key,
     record_value, header_names, header_values, holds)
SELECT DISTINCT ON (2) $1, coalesce(dead.event_id, md5(concat_ws('/', dead.origin_topic, dead.origin_partition, dead.origin_offset))::uuid),
       dead.aggregate_type, dead.aggregate_id, dead.sequence, dead.event_type, dead.error_class, dead.error_type,
       dead.error_message, dead.fingerprint, $11, dead.origin_topic, dead.origin_partition, dead.origin_offset,
       dead.origin_timestamp_ms, dead.attempts + 1, dead.partition, dead.record_key, dead.record_value,
       coalesce(($20::text[])[dead.headers_from:dead.headers_to], '{}'),
       coalesce(($21::bytea[])[dead.headers_from:dead.headers_to], '{}'), dead.holds
FROM unnest($2::uuid[], $3::text[], $4::text[], $5::bigint[], $6::text[], $7::text[], $8::text[], $9::text[], $10::text[],
            $12::text[], $13::integer[], $14::bigint[], $15::bigint[], $16::integer[], $17::integer[], $18::bytea[],
            $19::bytea[], $22::integer[], $23::integer[], $24::boolean[])
    AS dead (event_id, aggregate_type, aggregate_id, sequence, event_type, error_class, error_type, error_message, fingerprint,
             origin_topic, origin_partition, origin_offset, origin_timestamp_ms, attempts, partition, record_key, record_value,
             headers_from, headers_to, holds)
ON CONFLICT (consumer, id) DO UPDATE
    SET error_class = excluded.error_class, error_type = excluded.error_type, error_message = excluded.error_message,
        fingerprint = excluded.fingerprint, consumer_version = excluded.consumer_version, attempts = excluded.attempts,
        holds = excluded.holds, state = 'open', resolved_at = NULL, archived_at = NULL, rebuilt_at = NULL,
        deaths = letter.deaths + (letter.state <> 'open')::integer, last_died_at = clock_timestamp()
  WHERE letter.replaced_by IS NULL
