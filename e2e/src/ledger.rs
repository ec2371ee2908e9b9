use std::{
    collections::{HashMap, HashSet},
    fmt,
    time::Duration,
};

use shared_events::{Envelope, topics::GroupTopics};
use sqlx::{AssertSqlSafe, PgPool, Row};
use uuid::Uuid;

use crate::{
    place::{Place, TIERS},
    topic, wait_for,
    workload::Promise,
};

/// Rows shown of what a check found.
const EXAMPLES: u32 = 3;

/// Each query finds rows that must not be there.
const CHECKS: [(&str, &str); 15] = [
    (
        "lost: committed, not applied",
        "SELECT * FROM logistics.outbox AS o
          WHERE NOT EXISTS (SELECT FROM commerce.inbox AS i WHERE i.event_id = o.id)",
    ),
    (
        "phantom: applied, never committed",
        "SELECT * FROM commerce.inbox AS i
          WHERE NOT EXISTS (SELECT FROM logistics.outbox AS o WHERE o.id = i.event_id)",
    ),
    ("not marked as published", "SELECT * FROM logistics.outbox WHERE published_at IS NULL"),
    (
        "gap or repetition in an aggregate's sequence",
        "SELECT aggregatetype, aggregateid, count(*) FROM logistics.outbox GROUP BY aggregatetype, aggregateid
          HAVING min(sequence) <> 1 OR max(sequence) <> count(*) OR count(DISTINCT sequence) <> count(*)",
    ),
    (
        "torn: shipment and its events disagree",
        "SELECT * FROM logistics.shipments AS s FULL JOIN
                (SELECT aggregateid::bigint AS id, max(sequence) AS sequence FROM logistics.outbox GROUP BY 1) AS e
             ON e.id = s.id WHERE s.sequence IS DISTINCT FROM e.sequence",
    ),
    (
        "shipment differs between the services",
        "SELECT * FROM logistics.shipments AS l FULL JOIN commerce.shipments AS c ON c.id = l.id::text
          WHERE (l.status, l.sequence, l.order_id, l.carrier) IS DISTINCT FROM (c.status, c.sequence, c.order_id, c.carrier)",
    ),
    (
        "applied out of order",
        "SELECT * FROM (SELECT applied_at < lag(applied_at) OVER
                (PARTITION BY aggregate_type, aggregate_id ORDER BY sequence) AS earlier FROM commerce.inbox) AS step
          WHERE earlier",
    ),
    (
        "line differs from what was shipped, returned or cancelled",
        "WITH moved AS (
             SELECT s.order_id, l.sku,
                    sum(l.quantity) FILTER (WHERE s.status IN ('completed', 'returned')) AS shipped,
                    sum(l.returned_quantity) AS returned,
                    sum(l.quantity) FILTER (WHERE s.status = 'cancelled') AS cancelled
               FROM logistics.shipments AS s JOIN logistics.shipment_lines AS l ON l.shipment_id = s.id
              GROUP BY s.order_id, l.sku)
         SELECT * FROM commerce.order_lines AS c LEFT JOIN moved AS m ON (m.order_id, m.sku) = (c.order_id, c.sku)
          WHERE (c.shipped_quantity, c.returned_quantity, c.cancelled_quantity)
             <> (coalesce(m.shipped, 0), coalesce(m.returned, 0), coalesce(m.cancelled, 0))",
    ),
    (
        "line shipped that was never ordered",
        "SELECT * FROM logistics.shipments AS s JOIN logistics.shipment_lines AS l ON l.shipment_id = s.id
          WHERE NOT EXISTS (SELECT FROM commerce.order_lines AS c WHERE (c.order_id, c.sku) = (s.order_id, l.sku))",
    ),
    (
        "committed stock differs from what is still to be shipped",
        "SELECT * FROM commerce.products AS p LEFT JOIN
                (SELECT sku, sum(quantity - shipped_quantity - cancelled_quantity) AS open
                   FROM commerce.order_lines GROUP BY sku) AS l ON l.sku = p.sku
          WHERE p.committed <> coalesce(l.open, 0)",
    ),
    (
        "order status differs from its lines",
        "SELECT * FROM commerce.orders AS o JOIN
                (SELECT order_id, sum(quantity) AS ordered, sum(shipped_quantity) AS shipped,
                        sum(returned_quantity) AS returned, sum(cancelled_quantity) AS cancelled
                   FROM commerce.order_lines GROUP BY order_id) AS l ON l.order_id = o.id
          WHERE o.status <> CASE
                WHEN cancelled = ordered THEN 'cancelled'
                WHEN shipped + cancelled = ordered AND returned = shipped THEN 'returned'
                WHEN shipped + cancelled = ordered THEN 'shipped'
                WHEN shipped > 0 THEN 'partially_shipped'
                ELSE 'paid' END",
    ),
    (
        "timeline lacks an event",
        "SELECT * FROM logistics.outbox AS o WHERE o.type <> 'ShipmentCreated'
            AND NOT EXISTS (SELECT FROM commerce.order_timeline AS t WHERE t.event_id = o.id)",
    ),
    (
        "timeline has what never happened",
        "SELECT * FROM commerce.order_timeline AS t
          WHERE NOT EXISTS (SELECT FROM logistics.outbox AS o WHERE o.id = t.event_id AND o.type <> 'ShipmentCreated')",
    ),
    // Nothing dies where the ledger is used, so nothing may be left behind a letter either.
    ("key still held", "SELECT * FROM commerce.held_keys"),
    ("event still parked", "SELECT * FROM commerce.parked_events"),
];

/// What was compared, and what was found.
#[derive(Debug)]
pub struct Ledger {
    /// Rows of the outbox.
    pub committed: i64,
    /// Rows of the inbox.
    pub applied: i64,
    pub shipments: i64,
    pub promises: usize,
    /// Each check with how many rows it found, all must be 0, and some of them.
    pub violations: Vec<Violation>,
    pub wire: Wire,
    pub retried: usize,
    pub dead_letters: usize,
}

/// What a check found.
#[derive(Debug)]
pub struct Violation {
    pub check: &'static str,
    pub rows: i64,
    /// The first ones, as text.
    pub examples: Vec<String>,
}

/// The main topic.
#[derive(Debug, Default)]
pub struct Wire {
    pub records: usize,
    /// Records beyond the first of their event id: absorbed by the inbox, counted all the same.
    pub duplicates: usize,
    /// First occurrences that came after a later sequence of their key.
    pub inversions: usize,
    /// Committed events that are not in the topic.
    pub missing: usize,
}

impl Ledger {
    /// Whether everything that must be 0 is 0, with no retry and no dead letter.
    pub fn is_clean(&self) -> bool {
        self.violations.iter().all(|violation| violation.rows == 0)
            && (self.wire.inversions, self.wire.missing, self.retried, self.dead_letters) == (0, 0, 0, 0)
    }
}

impl fmt::Display for Ledger {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Wire {
            records,
            duplicates,
            inversions,
            missing,
        } = self.wire;
        writeln!(
            formatter,
            "ledger: {} events committed, {} applied",
            self.committed, self.applied
        )?;
        writeln!(
            formatter,
            "  {} shipments, {} promises to clients compared",
            self.shipments, self.promises
        )?;
        writeln!(
            formatter,
            "  wire: {records} records, {duplicates} duplicates, {inversions} inversions, {missing} missing"
        )?;
        writeln!(
            formatter,
            "  {} records in retry topics, {} dead letters",
            self.retried, self.dead_letters
        )?;
        for Violation { check, rows, examples } in &self.violations {
            writeln!(formatter, "  {rows:>6}  {check}")?;
            for example in examples {
                writeln!(formatter, "          {example}")?;
            }
        }
        Ok(())
    }
}

/// Waits until every committed event has been applied and marked, and nothing is held or parked any more. Says how far it came when the deadline passes.
///
/// # Errors
/// If it never becomes quiet.
pub async fn quiet(owner: &PgPool, deadline: Duration) -> anyhow::Result<()> {
    let mut last = (0, 0, 0, 0);
    let waited = wait_for("the pair to become quiet", deadline, async || {
        let row = sqlx::query(
            "SELECT (SELECT count(*) FROM logistics.outbox), (SELECT count(*) FROM commerce.inbox),
                    (SELECT count(*) FROM logistics.outbox WHERE published_at IS NULL),
                    (SELECT count(*) FROM commerce.held_keys) + (SELECT count(*) FROM commerce.parked_events)",
        )
        .fetch_one(owner)
        .await?;
        last = (
            row.try_get::<i64, _>(0)?,
            row.try_get::<i64, _>(1)?,
            row.try_get::<i64, _>(2)?,
            row.try_get::<i64, _>(3)?,
        );
        Ok(last.0 == last.1 && (last.2, last.3) == (0, 0))
    });
    let result = waited.await;
    result.map_err(|error| {
        error.context(format!(
            "committed {}, applied {}, not published {}, held or parked {}",
            last.0, last.1, last.2, last.3
        ))
    })
}

/// Compares everything. Reads what the processes wrote, with connections of its own; asks none of them.
///
/// # Errors
/// If database or broker do not answer.
pub async fn check(place: &Place, owner: &PgPool, promises: &[Promise]) -> anyhow::Result<Ledger> {
    check_at(&place.brokers, &place.topics, owner, promises).await
}

/// The same of a pair that runs elsewhere.
///
/// # Errors
/// If database or broker do not answer.
pub async fn check_at(
    brokers: &str,
    topics: &GroupTopics,
    owner: &PgPool,
    promises: &[Promise],
) -> anyhow::Result<Ledger> {
    let mut violations = Vec::new();
    for (check, query) in CHECKS {
        let rows = format!("SELECT count(*) FROM ({query}) AS found");
        let examples = format!("SELECT found::text FROM ({query}) AS found LIMIT {EXAMPLES}");
        violations.push(Violation {
            check,
            rows: sqlx::query_scalar(AssertSqlSafe(rows)).fetch_one(owner).await?,
            examples: sqlx::query_scalar(AssertSqlSafe(examples)).fetch_all(owner).await?,
        });
    }
    violations.push(Violation {
        check: "promise to a client that is not kept",
        rows: broken_promises(owner, promises).await?,
        examples: Vec::new(),
    });
    let committed: Vec<Uuid> = sqlx::query_scalar("SELECT id FROM logistics.outbox")
        .fetch_all(owner)
        .await?;
    let mut retried = 0;
    for tier in 1..=TIERS {
        retried += topic::count(brokers, &topics.retry(tier)).await?;
    }
    Ok(Ledger {
        committed: committed.len() as i64,
        applied: sqlx::query_scalar("SELECT count(*) FROM commerce.inbox")
            .fetch_one(owner)
            .await?,
        shipments: sqlx::query_scalar("SELECT count(*) FROM logistics.shipments")
            .fetch_one(owner)
            .await?,
        promises: promises.len(),
        violations,
        wire: wire(brokers, topics.main(), &committed).await?,
        retried,
        dead_letters: topic::count(brokers, &topics.dead_letter()).await?,
    })
}

async fn broken_promises(owner: &PgPool, promises: &[Promise]) -> anyhow::Result<i64> {
    let shipments: Vec<i64> = promises.iter().map(|promise| promise.shipment).collect();
    let statuses: Vec<&str> = promises.iter().map(|promise| promise.status).collect();
    let sequences: Vec<i64> = promises.iter().map(|promise| promise.sequence).collect();
    let broken = sqlx::query_scalar(
        "SELECT count(*) FROM unnest($1::bigint[], $2::text[], $3::bigint[]) AS promised(id, status, sequence)
           LEFT JOIN logistics.shipments AS s USING (id)
          WHERE (s.status, s.sequence) IS DISTINCT FROM (promised.status, promised.sequence)",
    );
    Ok(broken
        .bind(shipments)
        .bind(statuses)
        .bind(sequences)
        .fetch_one(owner)
        .await?)
}

async fn wire(brokers: &str, main: &str, committed: &[Uuid]) -> anyhow::Result<Wire> {
    let mut wire = Wire::default();
    let mut seen = HashSet::new();
    let mut last_of_key: HashMap<String, i64> = HashMap::new();
    for record in topic::read(brokers, main).await? {
        wire.records += 1;
        let envelope = Envelope::decode(record.value.as_deref().unwrap_or_default())?;
        if !seen.insert(envelope.id) {
            wire.duplicates += 1;
            continue;
        }
        let last = last_of_key.entry(envelope.aggregate_id).or_default();
        if envelope.sequence < *last {
            wire.inversions += 1;
        }
        *last = envelope.sequence.max(*last);
    }
    wire.missing = committed.iter().filter(|id| !seen.contains(id)).count();
    Ok(wire)
}
