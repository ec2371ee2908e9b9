use sqlx::types::Uuid;

use super::Table;
use crate::limited_pool::LimitedPool;

/// Whether the same statement may succeed a moment later: it lost against another transaction or took too long
/// (serialization_failure, deadlock_detected, lock_not_available, query_canceled).
pub(crate) fn may_pass(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|error| error.code());
    matches!(code.as_deref(), Some("40001" | "40P01" | "55P03" | "57014"))
}

/// INIT → PUBLISHED, only forward: a row that is marked keeps its first time. One that was set aside is so no more.
/// Returns the ids that have no visible row.
pub(crate) async fn mark_published(table: &Table, pool: &LimitedPool, ids: &[Uuid]) -> Result<Vec<Uuid>, sqlx::Error> {
    // Ids are UUIDv7 and the table is partitioned by them. Planned with its ids each time: a generic plan would look for
    // each of them in every day's partition.
    let marked = sqlx::query(table.sql(
        "UPDATE $schema.outbox SET published_at = clock_timestamp(), failed_at = NULL, failure = NULL
          WHERE id = ANY($1) AND published_at IS NULL",
    ))
    .persistent(false)
    .bind(ids)
    .execute(pool)
    .await?;
    if marked.rows_affected() == ids.len() as u64 {
        return Ok(Vec::new());
    }
    sqlx::query_scalar(table.sql(
        "SELECT id FROM unnest($1::uuid[]) AS event(id)
          WHERE NOT EXISTS (SELECT FROM $schema.outbox AS row WHERE row.id = event.id AND row.published_at IS NOT NULL)",
    ))
    .bind(ids)
    .fetch_all(pool)
    .await
}

/// The rows were sent once more because nobody had confirmed them: their wait for a confirmation begins anew.
pub(crate) async fn mark_published_again(table: &Table, pool: &LimitedPool, ids: &[Uuid]) -> Result<(), sqlx::Error> {
    sqlx::query(
        table.sql(
            "UPDATE $schema.outbox SET published_at = clock_timestamp() WHERE id = ANY($1) AND confirmed_at IS NULL",
        ),
    )
    .persistent(false)
    .bind(ids)
    .execute(pool)
    .await?;
    Ok(())
}

/// → COMPLETED: the product's own group has read the records back, so they were published too, whoever did it.
pub(crate) async fn confirm(table: &Table, pool: &LimitedPool, ids: &[Uuid]) -> Result<u64, sqlx::Error> {
    let confirmed = sqlx::query(table.sql(
        "UPDATE $schema.outbox
            SET confirmed_at = clock_timestamp(), published_at = coalesce(published_at, clock_timestamp()),
                failed_at = NULL, failure = NULL
          WHERE id = ANY($1) AND confirmed_at IS NULL",
    ))
    .persistent(false)
    .bind(ids)
    .execute(pool)
    .await?;
    Ok(confirmed.rows_affected())
}

/// What became of setting a row aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Aside {
    Done,
    /// It had been published before, and was only to be repeated.
    Published,
    /// It cannot be seen: not yet, or no more.
    Unseen,
}

/// The broker refuses this row for itself: it is set aside, and its key waits behind it.
pub(crate) async fn set_aside(
    table: &Table,
    pool: &LimitedPool,
    id: Uuid,
    failure: &str,
) -> Result<Aside, sqlx::Error> {
    let marked = sqlx::query(table.sql(
        "UPDATE $schema.outbox SET failed_at = clock_timestamp(), failure = $2 WHERE id = $1 AND published_at IS NULL",
    ))
    .bind(id)
    .bind(failure)
    .execute(pool)
    .await?;
    Ok(if marked.rows_affected() == 1 {
        Aside::Done
    } else if is_seen(table, pool, id).await? {
        Aside::Published
    } else {
        Aside::Unseen
    })
}

/// Whether the row can be seen.
pub(crate) async fn is_seen(table: &Table, pool: &LimitedPool, id: Uuid) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(table.sql("SELECT EXISTS (SELECT FROM $schema.outbox WHERE id = $1)"))
        .bind(id)
        .fetch_one(pool)
        .await
}

/// Keys with a row that was set aside.
pub(crate) async fn failed_keys(table: &Table, pool: &LimitedPool) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar(table.sql("SELECT DISTINCT aggregateid FROM $schema.outbox WHERE failed_at IS NOT NULL"))
        .fetch_all(pool)
        .await
}

/// The oldest transaction still running and the next one to come, in the whole cluster: `(xmin, xmax)` of a snapshot.
/// What was running at one moment has ended, and its rows can be seen, once a later `xmin` has reached that `xmax`.
pub(crate) async fn snapshot(pool: &LimitedPool) -> Result<(i64, i64), sqlx::Error> {
    sqlx::query_as(
        "SELECT pg_snapshot_xmin(now)::text::bigint, pg_snapshot_xmax(now)::text::bigint FROM pg_current_snapshot() AS now",
    )
    .fetch_one(pool)
    .await
}
