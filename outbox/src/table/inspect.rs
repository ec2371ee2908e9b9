use sqlx::{Row, types::Uuid};
use time::OffsetDateTime;

use super::Table;
use crate::limited_pool::LimitedPool;

/// Counting stops here: past it, "many" is all an operator needs, and the count stays cheap.
const COUNT_LIMIT: i64 = 1_000_000;

/// How many events are in one state of their life.
#[derive(Debug, Clone, PartialEq)]
pub struct StateCount {
    /// `init`, `failed`, `published` or `completed`.
    pub state: &'static str,
    /// At most 1,000,000 are counted.
    pub events: i64,
    pub oldest: Option<OffsetDateTime>,
}

/// One event's life.
#[derive(Debug, Clone, PartialEq)]
pub struct EventState {
    pub id: Uuid,
    pub aggregate_id: String,
    pub event_type: String,
    pub sequence: i64,
    pub created_at: OffsetDateTime,
    pub published_at: Option<OffsetDateTime>,
    pub confirmed_at: Option<OffsetDateTime>,
    pub failed_at: Option<OffsetDateTime>,
    /// Why the broker refuses it.
    pub failure: Option<String>,
    /// Whether it is asked for again and not yet sent.
    pub resend_open: bool,
}

impl EventState {
    /// `init`, `failed`, `published` or `completed`.
    pub fn state(&self) -> &'static str {
        match (self.confirmed_at, self.published_at, self.failed_at) {
            (Some(_), _, _) => "completed",
            (None, Some(_), _) => "published",
            (None, None, Some(_)) => "failed",
            (None, None, None) => "init",
        }
    }
}

const STATES: [(&str, &str); 4] = [
    ("init", "published_at IS NULL AND failed_at IS NULL"),
    ("failed", "failed_at IS NOT NULL"),
    ("published", "published_at IS NOT NULL AND confirmed_at IS NULL"),
    ("completed", "confirmed_at IS NOT NULL"),
];

/// Events per state, in the order of a life.
pub(crate) async fn counts(table: &Table, pool: &LimitedPool) -> Result<Vec<StateCount>, sqlx::Error> {
    let mut counts = Vec::with_capacity(STATES.len());
    for (state, condition) in STATES {
        let (events, oldest) = sqlx::query_as(table.sql(&format!(
            "SELECT count(*), min(created_at)
               FROM (SELECT created_at FROM $schema.outbox WHERE {condition} LIMIT {COUNT_LIMIT}) AS counted"
        )))
        .fetch_one(pool)
        .await?;
        counts.push(StateCount { state, events, oldest });
    }
    Ok(counts)
}

/// One event's life; `None` if there is no such event, or no more.
pub(crate) async fn event(table: &Table, pool: &LimitedPool, id: Uuid) -> Result<Option<EventState>, sqlx::Error> {
    let row = sqlx::query(table.sql(
        "SELECT aggregateid, type, sequence, created_at, published_at, confirmed_at, failed_at, failure,
                EXISTS (SELECT FROM $schema.outbox_resends AS r WHERE r.event_id = o.id AND r.done_at IS NULL) AS open
           FROM $schema.outbox AS o WHERE id = $1",
    ))
    .bind(id)
    .fetch_optional(pool)
    .await?;
    row.map(|row| {
        Ok(EventState {
            id,
            aggregate_id: row.try_get("aggregateid")?,
            event_type: row.try_get("type")?,
            sequence: row.try_get("sequence")?,
            created_at: row.try_get("created_at")?,
            published_at: row.try_get("published_at")?,
            confirmed_at: row.try_get("confirmed_at")?,
            failed_at: row.try_get("failed_at")?,
            failure: row.try_get("failure")?,
            resend_open: row.try_get("open")?,
        })
    })
    .transpose()
}

/// Rows not yet published: how many (at most 1,000,000 are counted) and the oldest one's time.
pub(crate) async fn backlog(
    table: &Table,
    pool: &LimitedPool,
    since: Option<OffsetDateTime>,
) -> Result<(i64, Option<OffsetDateTime>), sqlx::Error> {
    sqlx::query_as(table.sql(&format!(
        "SELECT count(*), min(created_at)
           FROM (SELECT created_at FROM $schema.outbox
                  WHERE published_at IS NULL AND ($1::timestamptz IS NULL OR created_at >= $1)
                  LIMIT {COUNT_LIMIT}) AS unsent"
    )))
    .bind(since)
    .fetch_one(pool)
    .await
}

/// A slot as the server describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, sqlx::FromRow)]
pub(crate) struct SlotRow {
    /// Bytes since the beginning of the log.
    pub(crate) confirmed: Option<i64>,
    /// Bytes of log behind that.
    pub(crate) lag: Option<i64>,
    /// Bytes of log that the server keeps.
    pub(crate) retained: Option<i64>,
}

/// `None` without such a slot.
pub(crate) async fn slot(pool: &LimitedPool, slot: &str) -> Result<Option<SlotRow>, sqlx::Error> {
    sqlx::query_as(
        "SELECT (confirmed_flush_lsn - '0/0')::bigint AS confirmed,
                (pg_current_wal_lsn() - confirmed_flush_lsn)::bigint AS lag,
                (pg_current_wal_lsn() - restart_lsn)::bigint AS retained
           FROM pg_catalog.pg_replication_slots WHERE slot_name = $1",
    )
    .bind(slot)
    .fetch_optional(pool)
    .await
}

/// Drops the slot if there is one and nobody streams from it; true if it is gone.
pub(crate) async fn drop_slot(pool: &LimitedPool, slot: &str) -> Result<bool, sqlx::Error> {
    sqlx::query(
        "SELECT pg_catalog.pg_drop_replication_slot(slot_name) FROM pg_catalog.pg_replication_slots
                  WHERE slot_name = $1 AND NOT active",
    )
    .bind(slot)
    .execute(pool)
    .await?;
    sqlx::query_scalar("SELECT NOT EXISTS (SELECT FROM pg_catalog.pg_replication_slots WHERE slot_name = $1)")
        .bind(slot)
        .fetch_one(pool)
        .await
}
