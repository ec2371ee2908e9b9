UPDATE commerce.products AS p
SET sellable = p.sellable + new.sellable,
    committed = p.committed + new.committed,
    updated_at = now()
FROM unnest($1::text[], $2::bigint[], $3::bigint[]) AS new (sku, sellable, committed)
WHERE p.sku = new.sku
