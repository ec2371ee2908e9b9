-- Many dead letters through again, as one job.
--
-- Promises
--   * A letter belongs to at most one job that is not ended, and so does its key: no two jobs send letters of one key.
--   * A letter is marked as sent in the transaction that lets it go, so a job that is interrupted anywhere goes on where it was.
--   * What became of each letter is told by the letter itself, until a later job takes it over: one that a job let go and
--     that died again counts for that job for ever.
--   * A row is never deleted; a job's letters keep its id until a later one takes them over.
--   * A parked event is marked as failed in the transaction that notes its failure and, if it is dead, writes its letter; its
--     record leaves afterwards. While it is marked, its failure is not noted again.

CREATE TABLE commerce.redrive_jobs (
    consumer      text        NOT NULL,
    id            uuid        NOT NULL,
    state         text        NOT NULL DEFAULT 'canary',
    -- Which letters were meant, as they were asked for.
    filter        jsonb       NOT NULL,
    -- How many letters were meant when it began.
    letters       bigint      NOT NULL,
    -- So many go first, and the rest only when all of them are settled.
    canary        bigint      NOT NULL,
    -- Letters that are let go in a second, at most.
    rate          integer     NOT NULL,
    -- It is given up if a larger share of its settled letters died again.
    abort_percent integer     NOT NULL,
    -- Why it ended as it did.
    ended_because text,
    actor         text        NOT NULL,
    role          text        NOT NULL,
    reason        text        NOT NULL,
    created_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    stepped_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- Letters that it let go, that died again, and that a later job has taken over.
    taken_over    bigint      NOT NULL DEFAULT 0,
    ended_at      timestamptz,

    CONSTRAINT redrive_jobs_pkey PRIMARY KEY (consumer, id),
    CONSTRAINT redrive_jobs_state_known
        CHECK (state IN ('canary', 'running', 'cancelled', 'succeeded', 'failed')),
    CONSTRAINT redrive_jobs_canary_positive CHECK (canary > 0),
    CONSTRAINT redrive_jobs_rate_positive CHECK (rate > 0),
    CONSTRAINT redrive_jobs_abort_percent_is_one CHECK (abort_percent BETWEEN 0 AND 100),
    CONSTRAINT redrive_jobs_end_has_a_time CHECK ((ended_at IS NOT NULL) = (state IN ('cancelled', 'succeeded', 'failed')))
);
CREATE INDEX redrive_jobs_at_work ON commerce.redrive_jobs (consumer, created_at) WHERE ended_at IS NULL;

ALTER TABLE commerce.dead_letters
    -- The job that means it, or meant it last.
    ADD COLUMN job uuid,
    -- When that job let it go; null while it has not, and for one that it gave back.
    ADD COLUMN job_sent_at timestamptz;
-- What became of a job's letters, and which are to go next.
CREATE INDEX dead_letters_by_job ON commerce.dead_letters (consumer, job)
    INCLUDE (state, job_sent_at, aggregate_type, aggregate_id) WHERE job IS NOT NULL;
CREATE INDEX dead_letters_to_send ON commerce.dead_letters (consumer, job, aggregate_type, aggregate_id, sequence)
    WHERE job IS NOT NULL AND job_sent_at IS NULL AND state = 'open';

-- A parked event whose failure is noted, its record not yet acknowledged in its topic: it is still to be sent.
ALTER TABLE commerce.parked_events ADD COLUMN failed boolean NOT NULL DEFAULT false;

GRANT SELECT, INSERT, UPDATE ON commerce.redrive_jobs TO commerce_svc;
GRANT UPDATE (failed) ON commerce.parked_events TO commerce_svc;
