-- In id order, so that two workers that meet the same ids wait for each other instead of deadlocking.
INSERT INTO {schema}.inbox
    (consumer, event_id, aggregate_type, aggregate_id, sequence, topic, partition, record_offset)
SELECT $1, event.*
FROM unnest($2::uuid[], $3::text[], $4::text[], $5::bigint[], $6::text[], $7::integer[], $8::bigint[])
    AS event (event_id, aggregate_type, aggregate_id, sequence, topic, partition, record_offset)
ORDER BY event.event_id
ON CONFLICT (consumer, event_id) DO NOTHING
RETURNING event_id
