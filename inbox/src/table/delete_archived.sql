-- One that is being taken back right now is locked, and left alone.
WITH due AS (
    SELECT id FROM {schema}.dead_letters
     WHERE consumer = $1 AND archived_at < clock_timestamp() - make_interval(secs => $2)
     ORDER BY archived_at LIMIT $3
       FOR UPDATE SKIP LOCKED
), gone AS (
    DELETE FROM {schema}.dead_letters AS letter USING due
     WHERE letter.consumer = $1 AND letter.id = due.id
    RETURNING letter.id
), attempts AS (
    DELETE FROM {schema}.failed_attempts AS attempt USING gone
     WHERE attempt.consumer = $1 AND attempt.event_id = gone.id
)
SELECT count(*) FROM gone
