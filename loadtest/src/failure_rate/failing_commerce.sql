-- Commerce refuses to change the shipments of loadtest.share percent of the orders.
CREATE FUNCTION commerce.refuse_some() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'this order cannot be changed';
END
$$;
DO $$
BEGIN
    EXECUTE format('CREATE TRIGGER refuse_some BEFORE UPDATE ON commerce.shipments FOR EACH ROW '
                   'WHEN (abs(hashtext(new.order_id)::bigint) %% 100 < %s) EXECUTE FUNCTION commerce.refuse_some()',
                   current_setting('loadtest.share')::integer);
END
$$;
