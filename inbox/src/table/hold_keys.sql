-- How long the key is held stays, whichever of its events holds it.
INSERT INTO {schema}.held_keys
    (consumer, aggregate_type, aggregate_id, state, event_id, event_type, sequence, partition, error_type, error_message)
SELECT $1, key.*
FROM unnest($2::text[], $3::text[], $4::text[], $5::uuid[], $6::text[], $7::bigint[], $8::integer[], $9::text[], $10::text[])
    AS key (aggregate_type, aggregate_id, state, event_id, event_type, sequence, partition, error_type, error_message)
ORDER BY key.aggregate_type, key.aggregate_id
ON CONFLICT (consumer, aggregate_type, aggregate_id) DO UPDATE
    SET state = excluded.state, event_id = excluded.event_id, event_type = excluded.event_type,
        sequence = excluded.sequence, partition = excluded.partition, error_type = excluded.error_type,
        error_message = excluded.error_message, changed_at = clock_timestamp()
