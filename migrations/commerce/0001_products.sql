-- Products and their stock, in pieces.
--
-- Promises
--   * `committed` is what is promised to customers and still in the warehouse: over all order lines of the sku, the sum of
--     quantity - shipped_quantity - cancelled_quantity. Every change of a line moves it in the same transaction.
--   * `sellable` can be promised to the next customer. Cancelling gives committed pieces back to it, a return adds to it.
--   * There are few rows and every batch of events meets most of them: they are locked last, in the order of their skus.
--
-- The role `commerce_svc` exists before the first migration: roles belong to the server, migrations to one database. The
-- schema exists too; the migrator creates it for its own record.

GRANT USAGE ON SCHEMA commerce TO commerce_svc;
-- A service that may not migrate still refuses to start on a schema that is behind.
GRANT SELECT ON commerce._sqlx_migrations TO commerce_svc;

CREATE TABLE commerce.products (
    sku        text COLLATE "C" CONSTRAINT products_pkey PRIMARY KEY,
    name       text           NOT NULL,
    unit_price numeric(12, 4) NOT NULL,
    sellable   bigint         NOT NULL,
    committed  bigint         NOT NULL,
    updated_at timestamptz    NOT NULL DEFAULT now(),

    CONSTRAINT products_sku_length CHECK (octet_length(sku) BETWEEN 1 AND 64),
    CONSTRAINT products_unit_price_not_negative CHECK (unit_price >= 0),
    CONSTRAINT products_sellable_not_negative CHECK (sellable >= 0),
    CONSTRAINT products_committed_not_negative CHECK (committed >= 0)
) WITH (
    -- Hot rows: room beside each for its new versions, and vacuum long before a fifth of a tiny table has changed.
    fillfactor = 10,
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 1000
);

GRANT SELECT, INSERT ON commerce.products TO commerce_svc;
GRANT UPDATE (sellable, committed, updated_at) ON commerce.products TO commerce_svc;
