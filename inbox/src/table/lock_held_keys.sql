-- In the order of the keys, so that two workers that meet the same ones wait for each other instead of deadlocking.
SELECT held.aggregate_type, held.aggregate_id, held.state, held.event_id, held.sequence, held.parked
FROM {schema}.held_keys AS held
WHERE held.consumer = $1
  AND (held.aggregate_type, held.aggregate_id) IN (SELECT * FROM unnest($2::text[], $3::text[]))
ORDER BY held.aggregate_type, held.aggregate_id
FOR UPDATE
