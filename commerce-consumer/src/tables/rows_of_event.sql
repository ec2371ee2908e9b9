-- One statement, so one snapshot: what is compared stood side by side.
SELECT 'orders' AS table_name, to_jsonb(r) AS columns FROM commerce.orders AS r WHERE id = $1
UNION ALL
SELECT 'order_lines', to_jsonb(r) FROM commerce.order_lines AS r WHERE order_id = $1
UNION ALL
SELECT 'shipments', to_jsonb(r) FROM commerce.shipments AS r WHERE id = $2
UNION ALL
SELECT 'order_timeline', to_jsonb(r) FROM commerce.order_timeline AS r WHERE event_id = $3
UNION ALL
SELECT 'products', to_jsonb(r) FROM commerce.products AS r WHERE sku = ANY($4)
