-- Each query finds rows that must not be there once everything has been applied. What was prepared has neither outbox nor inbox row.
SELECT 'committed, not applied', count(*) FROM logistics.outbox AS o WHERE NOT EXISTS (SELECT FROM commerce.inbox AS i WHERE i.event_id = o.id)
UNION ALL SELECT 'applied, never committed', count(*) FROM commerce.inbox AS i WHERE NOT EXISTS (SELECT FROM logistics.outbox AS o WHERE o.id = i.event_id)
UNION ALL SELECT 'not marked as published', count(*) FROM logistics.outbox WHERE published_at IS NULL
UNION ALL SELECT 'shipment differs between the services', count(*) FROM logistics.shipments AS l FULL JOIN commerce.shipments AS c ON c.id = l.id::text
    WHERE (l.status, l.sequence, l.order_id) IS DISTINCT FROM (c.status, c.sequence, c.order_id)
UNION ALL SELECT 'shipment and its events disagree', count(*) FROM public.prepared, logistics.shipments AS s LEFT JOIN
    (SELECT aggregateid::bigint AS id, max(sequence) AS sequence, count(*) AS events FROM logistics.outbox GROUP BY 1) AS e ON e.id = s.id
    WHERE s.sequence <> coalesce(e.sequence, 1)
       OR coalesce(e.events, 0) <> s.sequence - CASE WHEN s.id <= prepared.last THEN 1 ELSE 0 END
UNION ALL SELECT 'shipped quantity differs', count(*) FROM commerce.order_lines AS c LEFT JOIN (
    SELECT s.order_id, l.sku, sum(l.quantity) AS shipped FROM logistics.shipments AS s
      JOIN logistics.shipment_lines AS l ON l.shipment_id = s.id WHERE s.status = 'completed' GROUP BY 1, 2) AS m
      ON (m.order_id, m.sku) = (c.order_id, c.sku) WHERE c.shipped_quantity <> coalesce(m.shipped, 0)
UNION ALL SELECT 'committed stock differs', count(*) FROM commerce.products AS p LEFT JOIN
    (SELECT sku, sum(quantity - shipped_quantity - cancelled_quantity) AS open FROM commerce.order_lines GROUP BY sku) AS l ON l.sku = p.sku
    WHERE p.committed <> coalesce(l.open, 0)
UNION ALL SELECT 'held keys', count(*) FROM commerce.held_keys
UNION ALL SELECT 'dead letters', count(*) FROM commerce.dead_letters
