-- Each query finds rows that must not be there once everything has been applied. An appended event has no shipment in logistics, and
-- one in commerce.
SELECT 'committed, not applied', count(*) FROM logistics.outbox AS o WHERE NOT EXISTS (SELECT FROM commerce.inbox AS i WHERE i.event_id = o.id)
UNION ALL SELECT 'applied, never committed', count(*) FROM commerce.inbox AS i WHERE NOT EXISTS (SELECT FROM logistics.outbox AS o WHERE o.id = i.event_id)
UNION ALL SELECT 'not marked as published', count(*) FROM logistics.outbox WHERE published_at IS NULL
UNION ALL SELECT 'without its shipment in commerce', count(*) FROM logistics.outbox AS o
    WHERE NOT EXISTS (SELECT FROM commerce.shipments AS s WHERE s.id = o.aggregateid AND s.last_event_id = o.id AND s.sequence = 1)
UNION ALL SELECT 'shipment of no event', count(*) FROM commerce.shipments AS s
    WHERE NOT EXISTS (SELECT FROM logistics.outbox AS o WHERE o.aggregateid = s.id)
      AND NOT EXISTS (SELECT FROM logistics.shipments AS l WHERE l.id::text = s.id)
UNION ALL SELECT 'held keys', count(*) FROM commerce.held_keys
UNION ALL SELECT 'dead letters', count(*) FROM commerce.dead_letters
