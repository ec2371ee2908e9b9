-- The letter has been locked, and is open. The new one has not died yet: what killed the first one tells why it is here.
INSERT INTO {schema}.dead_letters
    (consumer, id, edited_from, aggregate_type, aggregate_id, sequence, event_type, record_key, record_value, attempts, deaths,
     origin_topic, origin_partition, origin_offset, origin_timestamp_ms, partition, header_names, header_values, error_class,
     error_type, error_message, fingerprint, consumer_version, holds, first_died_at, last_died_at)
SELECT consumer, $3, id, $4, $5, $6, $7, coalesce(record_key, convert_to($5, 'UTF8')), $8, 0, 0,
       origin_topic, origin_partition, origin_offset, origin_timestamp_ms, partition, header_names, header_values, error_class,
       error_type, error_message, fingerprint, consumer_version, holds, first_died_at, last_died_at
  FROM {schema}.dead_letters
 WHERE consumer = $1 AND id = $2
