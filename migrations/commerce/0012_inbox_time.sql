-- The time of an inbox row is that of the statement which inserts it. A default that is volatile, as clock_timestamp() is,
-- forbids PostgreSQL to insert the rows of a COPY page by page (docs/adr/0002).
ALTER TABLE commerce.inbox ALTER COLUMN applied_at SET DEFAULT statement_timestamp();
