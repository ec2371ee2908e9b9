use std::{collections::HashSet, fmt};

use e2e::{place::Place, topic, workload};
use shared_events::headers::Redirect;
use sqlx::{AssertSqlSafe, FromRow, PgPool};

/// Each query finds rows that must not be there at any moment, whatever is under way.
const CHECKS: [(&str, &str); 13] = [
    (
        "parked events that their key does not count, or without a held key",
        "SELECT held.aggregate_id, held.parked, parked.rows FROM commerce.held_keys AS held
           FULL JOIN (SELECT aggregate_id, count(*) AS rows FROM commerce.parked_events GROUP BY aggregate_id) AS parked
             ON parked.aggregate_id = held.aggregate_id
          WHERE coalesce(held.parked, -1) <> coalesce(parked.rows, 0)",
    ),
    (
        "held without its cause",
        "SELECT * FROM commerce.held_keys AS held WHERE NOT CASE state
           WHEN 'dead' THEN EXISTS (SELECT FROM commerce.dead_letters WHERE id = held.event_id AND state = 'open' AND holds)
           WHEN 'retrying' THEN EXISTS (SELECT FROM commerce.failed_attempts WHERE event_id = held.event_id)
           WHEN 'waiting' THEN EXISTS (SELECT FROM commerce.parked_events WHERE event_id = held.event_id)
           ELSE parked > 0 END",
    ),
    (
        "held by an event that has taken effect",
        "SELECT * FROM commerce.held_keys AS held
          WHERE state <> 'releasing' AND EXISTS (SELECT FROM commerce.inbox WHERE event_id = held.event_id)",
    ),
    (
        "open dead letter that holds, of a key that is not held",
        "SELECT * FROM commerce.dead_letters AS letter WHERE state = 'open' AND holds
            AND NOT EXISTS (SELECT FROM commerce.held_keys WHERE aggregate_id = letter.aggregate_id)",
    ),
    (
        "redriven letter that is nowhere",
        "SELECT * FROM commerce.dead_letters AS letter WHERE state = 'redriving'
            AND NOT EXISTS (SELECT FROM commerce.parked_events WHERE event_id = letter.id)
            AND NOT EXISTS (SELECT FROM commerce.held_keys WHERE event_id = letter.id AND state = 'retrying')",
    ),
    (
        "letter that is resolved without its event, or not resolved with it",
        "SELECT * FROM commerce.dead_letters AS letter
          WHERE (state = 'resolved') <> EXISTS (SELECT FROM commerce.inbox WHERE event_id = letter.id)",
    ),
    (
        "letter that was let go by nobody",
        "SELECT * FROM commerce.dead_letters AS letter WHERE state = 'redriving' AND job_sent_at IS NULL
            AND NOT EXISTS (SELECT FROM commerce.operator_actions
                             WHERE action IN ('redrive', 'skip') AND target -> 'letters' ? letter.id::text)",
    ),
    (
        "redrive without its audit, or the reverse",
        "SELECT * FROM commerce.redrive_jobs AS job
           FULL JOIN (SELECT * FROM commerce.operator_actions WHERE action = 'redrive-job') AS action
             ON action.target ->> 'job' = job.id::text AND (action.target -> 'letters')::bigint = job.letters
          WHERE job.id IS NULL OR action.id IS NULL",
    ),
    (
        "cancelled redrive without its audit, or the reverse",
        "SELECT * FROM (SELECT * FROM commerce.redrive_jobs WHERE state = 'cancelled') AS job
           FULL JOIN (SELECT * FROM commerce.operator_actions WHERE action = 'cancel-job') AS action
             ON action.target ->> 'job' = job.id::text
          WHERE job.id IS NULL OR action.id IS NULL",
    ),
    (
        "changes of controls and their audit differ in number",
        "SELECT * FROM (SELECT (SELECT coalesce(sum(version), 0) FROM commerce.consumer_controls) AS changes,
                               (SELECT count(*) FROM commerce.operator_actions WHERE action = 'limit') AS audited) AS counted
          WHERE changes <> audited",
    ),
    (
        "took effect out of order",
        "SELECT * FROM (SELECT aggregate_id, sequence, sequence <> lag(sequence, 1, 0::bigint)
                               OVER (PARTITION BY aggregate_id ORDER BY applied_at, sequence) + 1 AS out
                          FROM commerce.inbox) AS step WHERE out",
    ),
    (
        "entry in a timeline without its event",
        "SELECT * FROM commerce.order_timeline AS entry
          WHERE NOT EXISTS (SELECT FROM commerce.inbox WHERE event_id = entry.event_id)",
    ),
    (
        "stock differs from what is to be shipped and what came back",
        "SELECT * FROM commerce.products AS product JOIN
                (SELECT sku, sum(quantity - shipped_quantity - cancelled_quantity) AS open,
                        sum(returned_quantity + cancelled_quantity) AS back FROM commerce.order_lines GROUP BY sku) AS line
             ON line.sku = product.sku
          WHERE committed <> open OR sellable <> {stock} + back",
    ),
];

/// What the consumer may leave behind at any moment. Nothing may move meanwhile.
pub(crate) async fn assert_consistent(place: &Place, owner: &PgPool) -> anyhow::Result<()> {
    for (check, query) in CHECKS {
        let query = query.replace("{stock}", &workload::initial_stock().to_string());
        let rows = format!("SELECT found::text FROM ({query}) AS found LIMIT 3");
        let rows: Vec<String> = sqlx::query_scalar(AssertSqlSafe(rows)).fetch_all(owner).await?;
        anyhow::ensure!(rows.is_empty(), "{check}: {rows:#?}");
    }
    let topic = dead_letter_topic(place).await?;
    let without_row: Vec<_> = topic.difference(&dead_letter_rows(owner).await?).cloned().collect();
    anyhow::ensure!(
        without_row.is_empty(),
        "records of dead letters without a row: {without_row:?}"
    );
    Ok(())
}

/// Once the topics are worked through. A letter whose event was repaired before its record left has no record, and needs
/// none; a wave repairs none so early.
pub(crate) async fn assert_every_letter_has_its_record(place: &Place, owner: &PgPool) -> anyhow::Result<()> {
    let topic = dead_letter_topic(place).await?;
    let rows = dead_letter_rows(owner).await?;
    let without_record: Vec<_> = rows.difference(&topic).collect();
    anyhow::ensure!(
        without_record.is_empty(),
        "dead letters without a record: {without_record:?}"
    );
    Ok(())
}

/// A record by where it first stood.
type Origin = (String, i32, i64);

async fn dead_letter_topic(place: &Place) -> anyhow::Result<HashSet<Origin>> {
    let mut origins = HashSet::new();
    for record in topic::read(&place.brokers, &place.topics.dead_letter()).await? {
        let redirect = Redirect::decode(&record.headers);
        let origin = redirect
            .ok_or_else(|| anyhow::anyhow!("a dead letter without its origin"))?
            .origin;
        origins.insert((origin.topic.to_string(), origin.partition, origin.offset));
    }
    Ok(origins)
}

async fn dead_letter_rows(owner: &PgPool) -> anyhow::Result<HashSet<Origin>> {
    let rows = sqlx::query_as("SELECT origin_topic, origin_partition, origin_offset FROM commerce.dead_letters");
    Ok(rows.fetch_all(owner).await?.into_iter().collect())
}

/// What there was of a wave.
#[derive(Debug, Default, FromRow)]
pub(crate) struct Counted {
    pub(crate) events: i64,
    failed: i64,
    letters: i64,
    deaths: i64,
    actions: i64,
}

impl Counted {
    pub(crate) fn add(&mut self, other: Self) {
        self.events += other.events;
        self.failed += other.failed;
        self.letters += other.letters;
        self.deaths += other.deaths;
        self.actions += other.actions;
    }
}

impl fmt::Display for Counted {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "{} events once, {} tries that failed, {} letters that died {} times, {} actions",
            self.events, self.failed, self.letters, self.deaths, self.actions
        )
    }
}
