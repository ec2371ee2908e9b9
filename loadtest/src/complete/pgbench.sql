-- The same business step as pgbench does it, one transaction each: the peer of `complete`. Prepared by pgbench_tables.sql.
\set id random(1, 2000000)
BEGIN;
UPDATE peer.shipments SET status = 'completed', completed_at = now() WHERE id = :id;
INSERT INTO peer.outbox (aggregatetype, aggregateid, type, payload)
VALUES ('shipment', :id::bigint::text, 'ShipmentCompleted', jsonb_build_object('shipmentId', :id::bigint, 'orderId', :id::bigint,
        'lines', jsonb_build_array(jsonb_build_object('sku', '11', 'quantity', 2))));
COMMIT;
