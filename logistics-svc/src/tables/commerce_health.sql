WITH newest AS (
    SELECT done.event_id IS NOT NULL AS has_taken_effect
      FROM unnest($2::uuid[]) WITH ORDINALITY AS asked (id, place)
      LEFT JOIN commerce.inbox AS done ON done.consumer = $1 AND done.event_id = asked.id
     WHERE done.topic IS DISTINCT FROM $3
       AND NOT EXISTS (SELECT FROM commerce.held_keys AS k WHERE k.consumer = $1 AND k.event_id = asked.id)
       AND NOT EXISTS (SELECT FROM commerce.parked_events AS p WHERE p.consumer = $1 AND p.event_id = asked.id)
       AND NOT EXISTS (SELECT FROM commerce.dead_letters AS d WHERE d.consumer = $1 AND d.id = asked.id)
     ORDER BY asked.place
     LIMIT 3
)
SELECT (SELECT count(*) FROM commerce.dead_letters
         WHERE consumer = $1 AND state IN ('open', 'redriving', 'resolved') AND last_died_at >= $4),
       coalesce((SELECT bool_and(NOT has_taken_effect) FROM newest), false)
