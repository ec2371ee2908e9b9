-- An event that is parked already stays where it is: this is a second copy of it.
WITH added AS (
    INSERT INTO {schema}.parked_events
        (consumer, event_id, aggregate_type, aggregate_id, sequence, event_type, origin_topic, origin_partition, origin_offset,
         origin_timestamp_ms, attempts, partition, record_key, record_value, header_names, header_values)
    SELECT $1, event.event_id, event.aggregate_type, event.aggregate_id, event.sequence, event.event_type,
           event.origin_topic, event.origin_partition, event.origin_offset, event.origin_timestamp_ms, event.attempts,
           event.partition, event.record_key, event.record_value,
           coalesce(($15::text[])[event.headers_from:event.headers_to], '{}'),
           coalesce(($16::bytea[])[event.headers_from:event.headers_to], '{}')
    FROM unnest($2::uuid[], $3::text[], $4::text[], $5::bigint[], $6::text[], $7::text[], $8::integer[], $9::bigint[],
                $10::bigint[], $11::integer[], $12::integer[], $13::bytea[], $14::bytea[], $17::integer[], $18::integer[])
        AS event (event_id, aggregate_type, aggregate_id, sequence, event_type, origin_topic, origin_partition, origin_offset,
                  origin_timestamp_ms, attempts, partition, record_key, record_value, headers_from, headers_to)
    ORDER BY event.event_id
    ON CONFLICT (consumer, event_id) DO NOTHING
    RETURNING aggregate_type, aggregate_id
), counted AS (
    SELECT aggregate_type, aggregate_id, count(*) AS added FROM added GROUP BY aggregate_type, aggregate_id
)
UPDATE {schema}.held_keys AS held
   SET parked = held.parked + counted.added
  FROM counted
 WHERE held.consumer = $1
   AND held.aggregate_type = counted.aggregate_type
   AND held.aggregate_id = counted.aggregate_id
RETURNING held.aggregate_type, held.aggregate_id, held.parked
