-- Dead letters that are edited, archived, or read back from the topic.
--
-- Promises
--   * An edited letter is a letter of its own, with a new id; the one that it was made of is resolved. They point at each other
--     (`edited_from`, `replaced_by`), written in one transaction with the inbox row of the first one's event: a later copy of that
--     is a duplicate. A letter that was replaced is never open again.
--   * `archived_at` hides a letter that needs nobody: one that is resolved, or one that is no event and holds no key. Its state
--     stays beneath, for the day it is taken back.
--   * A letter that has been archived for DEAD_LETTERS_RETENTION is deleted with its failed attempts. Nothing else deletes a row of
--     the two tables; so much is left of what 0007_dead_letters.sql promises.
--   * `rebuilt_at` is set on a row that was read back from the dead-letter topic, until it dies again. Its times of death are then
--     those of its records.

ALTER TABLE commerce.dead_letters
    ADD COLUMN edited_from uuid,
    ADD COLUMN replaced_by uuid,
    ADD COLUMN archived_at timestamptz,
    ADD COLUMN rebuilt_at  timestamptz,
    ADD CONSTRAINT dead_letters_replaced_is_resolved CHECK (replaced_by IS NULL OR state = 'resolved'),
    ADD CONSTRAINT dead_letters_archived_needs_nobody
        CHECK (archived_at IS NULL OR state = 'resolved' OR (state = 'open' AND aggregate_id IS NULL AND NOT holds));
-- What is to be deleted next.
CREATE INDEX dead_letters_archived ON commerce.dead_letters (consumer, archived_at) WHERE archived_at IS NOT NULL;

GRANT DELETE ON commerce.dead_letters TO commerce_svc;
GRANT DELETE ON commerce.failed_attempts TO commerce_svc;
