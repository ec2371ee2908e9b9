INSERT INTO commerce.shipments AS s
    (id, order_id, status, sequence, warehouse, carrier, tracking_number, reason, units, returned_units,
     last_event_id, last_event_type, last_event_at)
SELECT *
FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::text[], $6::text[], $7::text[], $8::text[],
            $9::bigint[], $10::bigint[], $11::uuid[], $12::text[], $13::timestamptz[])
ON CONFLICT (id) DO UPDATE
SET status = excluded.status,
    sequence = excluded.sequence,
    carrier = excluded.carrier,
    tracking_number = excluded.tracking_number,
    reason = excluded.reason,
    units = excluded.units,
    returned_units = excluded.returned_units,
    last_event_id = excluded.last_event_id,
    last_event_type = excluded.last_event_type,
    last_event_at = excluded.last_event_at,
    updated_at = now()
WHERE s.sequence < excluded.sequence
