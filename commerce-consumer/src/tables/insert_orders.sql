INSERT INTO commerce.orders
    (id, customer_id, ordered_on, required_on, carrier, ship_name, ship_city, ship_country, status)
SELECT new.*, $9
FROM unnest($1::text[], $2::text[], $3::date[], $4::date[], $5::text[], $6::text[], $7::text[], $8::text[]) AS new
ON CONFLICT (id) DO NOTHING
RETURNING id
