-- Letters go back behind their keys, in the order of their sequence, and their keys are let go: the releaser does the rest. The
-- letters have been locked by a statement before, so that this one sees their state of now.
WITH letters AS (
    SELECT letter.*
      FROM {schema}.dead_letters AS letter
     WHERE letter.consumer = $1 AND letter.id = ANY($2) AND letter.state = 'open' AND letter.aggregate_id IS NOT NULL
     ORDER BY letter.aggregate_type, letter.aggregate_id, letter.sequence
), parked AS (
    INSERT INTO {schema}.parked_events
        (consumer, event_id, aggregate_type, aggregate_id, sequence, event_type, origin_topic, origin_partition, origin_offset,
         origin_timestamp_ms, attempts, partition, record_key, record_value, header_names, header_values, skip)
    SELECT consumer, id, aggregate_type, aggregate_id, sequence, event_type, origin_topic, origin_partition, origin_offset,
           -- The schedule begins anew.
           origin_timestamp_ms, 0, partition, record_key, record_value, header_names, header_values, $3
      FROM letters
    ON CONFLICT (consumer, event_id) DO UPDATE SET skip = excluded.skip, failed = false
    RETURNING aggregate_type, aggregate_id, (xmax = 0) AS added
), keys AS (
    SELECT aggregate_type, aggregate_id, count(*) FILTER (WHERE added) AS added
      FROM parked GROUP BY aggregate_type, aggregate_id
), first AS (
    SELECT DISTINCT ON (aggregate_type, aggregate_id) * FROM letters ORDER BY aggregate_type, aggregate_id, sequence
), held AS (
    INSERT INTO {schema}.held_keys AS held
        (consumer, aggregate_type, aggregate_id, state, event_id, event_type, sequence, partition, error_type, error_message,
         parked)
    SELECT $1, aggregate_type, aggregate_id, 'releasing', first.id, first.event_type, first.sequence, first.partition,
           first.error_type, first.error_message, keys.added
      FROM keys JOIN first USING (aggregate_type, aggregate_id)
     ORDER BY aggregate_type, aggregate_id
    ON CONFLICT (consumer, aggregate_type, aggregate_id) DO UPDATE
        -- An event in a retry topic still holds it; those parked behind it follow when it is settled.
        SET state = CASE held.state WHEN 'retrying' THEN held.state ELSE 'releasing' END,
            parked = held.parked + excluded.parked, changed_at = clock_timestamp()
)
UPDATE {schema}.dead_letters AS letter SET state = 'redriving'
  FROM letters WHERE letter.consumer = $1 AND letter.id = letters.id
RETURNING letter.id
