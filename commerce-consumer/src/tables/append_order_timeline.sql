INSERT INTO commerce.order_timeline
    (order_id, event_id, shipment_id, kind, happened_at, units, carrier, tracking_number, reason)
SELECT new.order_id, new.event_id, new.shipment_id, new.kind, new.happened_at, new.units, new.carrier,
       new.tracking_number, new.reason
FROM unnest($1::text[], $2::uuid[], $3::text[], $4::text[], $5::timestamptz[], $6::bigint[], $7::text[], $8::text[],
            $9::text[]) WITH ORDINALITY
    AS new (order_id, event_id, shipment_id, kind, happened_at, units, carrier, tracking_number, reason, place)
ORDER BY new.place
