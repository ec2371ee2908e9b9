UPDATE commerce.products AS p
SET sellable = p.sellable + new.sellable,
    committed = p.committed + new.committed,
    changes = p.changes + new.changes,
    updated_at = now()
FROM unnest($1::text[], $2::bigint[], $3::bigint[], $4::bigint[]) AS new (sku, sellable, committed, changes)
WHERE p.sku = new.sku
