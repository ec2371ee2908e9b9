use sqlx::types::Uuid;
use time::OffsetDateTime;

use super::{Table, UnsentRow};
use crate::limited_pool::LimitedPool;

/// Which events an operator means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selection {
    /// Events by their ids.
    Ids(Vec<Uuid>),
    /// All events of one aggregate.
    AggregateId(String),
    /// Events created in `[from, to)`.
    Created { from: OffsetDateTime, to: OffsetDateTime },
}

const IN_ORDER: &str = "ORDER BY aggregateid, sequence, id LIMIT $1";

/// Ids of the events meant, each key's in its order, at most `limit`.
pub(crate) async fn select_resends(
    table: &Table,
    pool: &LimitedPool,
    meant: &Selection,
    limit: i64,
) -> Result<Vec<Uuid>, sqlx::Error> {
    let select = |condition: &str| table.sql(&format!("SELECT id FROM $schema.outbox WHERE {condition} {IN_ORDER}"));
    let query = match meant {
        Selection::Ids(ids) => sqlx::query_scalar(select("id = ANY($2)")).bind(limit).bind(ids),
        Selection::AggregateId(id) => sqlx::query_scalar(select("aggregateid = $2")).bind(limit).bind(id),
        // Ids begin with their time, within an hour of the row's: only the days concerned are read.
        Selection::Created { from, to } => sqlx::query_scalar(select(
            "id >= $schema.outbox_id_floor($2 - interval '1 hour') AND id < $schema.outbox_id_floor($3 + interval '1 hour')
             AND created_at >= $2 AND created_at < $3",
        ))
        .bind(limit)
        .bind(from)
        .bind(to),
    };
    query.fetch_all(pool).await
}

/// Asks the relay to send these events again; those already asked for and not yet sent are left out. Returns how many.
pub(crate) async fn request_resends(
    table: &Table,
    pool: &LimitedPool,
    ids: &[Uuid],
    requested_by: &str,
    reason: &str,
) -> Result<u64, sqlx::Error> {
    let requested = sqlx::query(table.sql(
        "INSERT INTO $schema.outbox_resends (event_id, requested_by, reason)
         SELECT id, $2, $3 FROM unnest($1::uuid[]) AS asked(id)
          WHERE NOT EXISTS (SELECT FROM $schema.outbox_resends AS r WHERE r.event_id = asked.id AND r.done_at IS NULL)",
    ))
    .bind(ids)
    .bind(requested_by)
    .bind(reason)
    .execute(pool)
    .await?;
    Ok(requested.rows_affected())
}

/// The next rows that are to be sent again, each key's in its order, and the ids among them that were set aside. The others
/// of a key with such a row wait: they would fill each look, and the repair of their key would stand behind them.
pub(crate) async fn next_resends(
    table: &Table,
    pool: &LimitedPool,
    buckets: Option<&[i32]>,
    limit: i64,
) -> Result<(Vec<UnsentRow>, Vec<Uuid>), sqlx::Error> {
    let rows = sqlx::query(table.sql(
        "SELECT o.id, o.aggregateid, o.type, o.version, o.sequence, o.payload::text AS payload, o.traceparent,
                o.created_at, o.failed_at IS NOT NULL AS failed
           FROM $schema.outbox_resends AS r JOIN $schema.outbox AS o ON o.id = r.event_id
          WHERE r.done_at IS NULL
            -- One that was never sent goes when its source brings it: sent now, it would pass those before it.
            AND (o.published_at IS NOT NULL OR o.failed_at IS NOT NULL
                 OR o.created_at < (SELECT max(unmarked_before) FROM $schema.outbox_relay_positions))
            AND (o.failed_at IS NOT NULL
                 OR o.aggregateid NOT IN (SELECT failed.aggregateid FROM $schema.outbox AS failed
                                           WHERE failed.failed_at IS NOT NULL))
            AND ($1::int[] IS NULL OR $schema.outbox_bucket(o.aggregateid) = ANY($1))
          ORDER BY o.aggregateid, o.sequence, o.id
          LIMIT $2",
    ))
    .bind(buckets)
    .bind(limit)
    .fetch_all(pool)
    .await?;
    let mut failed = Vec::new();
    let mut found = Vec::with_capacity(rows.len());
    for row in &rows {
        let event = UnsentRow::read(row)?;
        if sqlx::Row::try_get(row, "failed")? {
            failed.push(event.id);
        }
        found.push(event);
    }
    Ok((found, failed))
}

/// What became of the open request for this event: sent, or not for the reason given.
pub(crate) async fn resend_done(
    table: &Table,
    pool: &LimitedPool,
    ids: &[Uuid],
    refusal: Option<&str>,
) -> Result<(), sqlx::Error> {
    sqlx::query(table.sql(
        "UPDATE $schema.outbox_resends SET done_at = clock_timestamp(), refusal = $2
          WHERE event_id = ANY($1) AND done_at IS NULL",
    ))
    .bind(ids)
    .bind(refusal)
    .execute(pool)
    .await?;
    Ok(())
}

/// Deletes requests from before `keep_since`: the events they mean are past retention.
pub(crate) async fn forget_resends(
    table: &Table,
    pool: &LimitedPool,
    keep_since: OffsetDateTime,
) -> Result<(), sqlx::Error> {
    sqlx::query(table.sql("DELETE FROM $schema.outbox_resends WHERE requested_at < $1"))
        .bind(keep_since)
        .execute(pool)
        .await?;
    Ok(())
}
