-- How often a product's stock has changed, so that two looks at it can be told apart from each other by more than its pieces.
--
-- Promises
--   * Each event that changes the stock raises `changes` by one, in the transaction of its effect.

ALTER TABLE commerce.products
    ADD COLUMN changes bigint NOT NULL DEFAULT 0,
    ADD CONSTRAINT products_changes_not_negative CHECK (changes >= 0);

GRANT UPDATE (changes) ON commerce.products TO commerce_svc;
