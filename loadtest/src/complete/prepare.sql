-- Open shipments 1 to loadtest.shipments, as if they had been created through the API long ago: logistics has them, and commerce has
-- their orders and has applied their first events. Five shipments to an order, or as loadtest.skew has it; one to three lines
-- of Northwind's 77 products.
CREATE TEMPORARY TABLE parcel AS
SELECT n AS id,
       'L' || ceil(power(random(), current_setting('loadtest.skew')::double precision)
                   * current_setting('loadtest.shipments')::bigint / 5)::bigint AS order_id
  FROM generate_series(1, current_setting('loadtest.shipments')::bigint) AS n;
UPDATE parcel SET order_id = 'L' || (id + 4) / 5 WHERE current_setting('loadtest.skew')::double precision = 1;

CREATE TEMPORARY TABLE piece AS
SELECT p.id, p.order_id, (1 + (p.id * 31 + line * 26) % 77)::text AS sku, (1 + (p.id + line) % 12)::integer AS quantity
  FROM parcel AS p, generate_series(0, p.id % 3) AS line;
CREATE INDEX ON piece (id);
ANALYZE parcel, piece;

INSERT INTO logistics.shipments (id, order_id, warehouse, carrier, status, sequence, created_at, updated_at)
SELECT id, order_id, 'main', 'Speedy Express', 'open', 1, now(), now() FROM parcel;
SELECT setval('logistics.shipments_id_seq', (SELECT max(id) FROM parcel));
INSERT INTO logistics.shipment_lines (shipment_id, sku, quantity) SELECT id, sku, quantity FROM piece;

INSERT INTO commerce.products (sku, name, unit_price, sellable, committed)
SELECT n::text, 'product ' || n, 10, 1000, coalesce((SELECT sum(quantity) FROM piece WHERE sku = n::text), 0)
  FROM generate_series(1, 77) AS n;
INSERT INTO commerce.orders (id, customer_id, ordered_on, carrier, ship_name, ship_city, ship_country, status)
SELECT order_id, 'VINET', current_date, 'Speedy Express', 'a ship', 'a city', 'a country', 'paid'
  FROM (SELECT order_id FROM parcel UNION SELECT 'L' || n FROM generate_series(1, 20) AS n) AS ordered;
INSERT INTO commerce.order_lines (order_id, sku, quantity, unit_price)
SELECT order_id, sku, sum(quantity), 10 FROM piece GROUP BY order_id, sku;
INSERT INTO commerce.shipments (id, order_id, status, sequence, warehouse, carrier, units, last_event_id, last_event_type, last_event_at)
SELECT p.id::text, p.order_id, 'open', 1, 'main', 'Speedy Express', (SELECT sum(quantity) FROM piece WHERE piece.id = p.id),
       gen_random_uuid(), 'ShipmentCreated', now()
  FROM parcel AS p;
-- What is created from now on has all of its events, and what stands here all but the first.
CREATE TABLE public.prepared AS SELECT max(id) AS last FROM parcel;
DROP TABLE parcel, piece;
