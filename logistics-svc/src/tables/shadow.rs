use std::time::Duration;

use sqlx::{PgConnection, PgExecutor};
use time::OffsetDateTime;
use uuid::Uuid;

/// What the synchronous path would have made of an event, until it is compared.
#[derive(Debug, Clone, sqlx::FromRow)]
pub struct Expectation {
    pub event_id: Uuid,
    pub event_type: String,
    /// JSON, as it was kept.
    pub expected: String,
    pub created_at: OffsetDateTime,
}

/// A column that the two paths have written differently.
#[derive(Debug, Clone)]
pub struct Mismatch {
    pub event_id: Uuid,
    pub event_type: String,
    pub shipment_id: String,
    pub order_id: String,
    pub table: String,
    pub row_key: String,
    pub column: String,
    pub expected: String,
    pub found: String,
}

/// # Errors
/// Any database error; the transaction is then of no use.
pub async fn expect(connection: &mut PgConnection, kept: &[(Uuid, String, String)]) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO logistics.shadow_expectations (event_id, event_type, expected)
         SELECT event_id, event_type, expected::json FROM unnest($1::uuid[], $2::text[], $3::text[])
             AS new (event_id, event_type, expected)",
    )
    .bind(kept.iter().map(|(id, _, _)| *id).collect::<Vec<Uuid>>())
    .bind(
        kept.iter()
            .map(|(_, event_type, _)| event_type.as_str())
            .collect::<Vec<&str>>(),
    )
    .bind(
        kept.iter()
            .map(|(_, _, expected)| expected.as_str())
            .collect::<Vec<&str>>(),
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// The oldest after `after`, locked; what another process compares is left out.
///
/// # Errors
/// Any database error; the transaction is then of no use.
pub async fn lock_after(
    connection: &mut PgConnection,
    after: OffsetDateTime,
    most: i64,
) -> Result<Vec<Expectation>, sqlx::Error> {
    sqlx::query_as(
        "SELECT event_id, event_type, expected::text AS expected, created_at FROM logistics.shadow_expectations
          WHERE created_at > $1 ORDER BY created_at LIMIT $2 FOR UPDATE SKIP LOCKED",
    )
    .bind(after)
    .bind(most)
    .fetch_all(connection)
    .await
}

/// Gives up what commerce has not settled within this time, some thousand at once. How many.
///
/// # Errors
/// Any database error.
pub async fn expire(executor: impl PgExecutor<'_>, after: Duration) -> Result<i64, sqlx::Error> {
    let expired = sqlx::query(
        "DELETE FROM logistics.shadow_expectations WHERE event_id IN (
             SELECT event_id FROM logistics.shadow_expectations
              WHERE created_at < clock_timestamp() - make_interval(secs => $1) LIMIT 5000 FOR UPDATE SKIP LOCKED)",
    )
    .bind(after.as_secs_f64())
    .execute(executor)
    .await?;
    Ok(i64::try_from(expired.rows_affected()).unwrap_or(i64::MAX))
}

/// # Errors
/// Any database error; the transaction is then of no use.
pub async fn forget(connection: &mut PgConnection, ids: &[Uuid]) -> Result<(), sqlx::Error> {
    sqlx::query("DELETE FROM logistics.shadow_expectations WHERE event_id = ANY($1)")
        .bind(ids)
        .execute(connection)
        .await?;
    Ok(())
}

/// # Errors
/// Any database error; the transaction is then of no use.
pub async fn note(connection: &mut PgConnection, mismatches: &[Mismatch]) -> Result<(), sqlx::Error> {
    let text = |of: fn(&Mismatch) -> &str| mismatches.iter().map(of).collect::<Vec<&str>>();
    sqlx::query(
        "INSERT INTO logistics.shadow_mismatches
             (event_id, event_type, shipment_id, order_id, table_name, row_key, column_name, expected, found)
         SELECT * FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[],
                              $8::text[], $9::text[])",
    )
    .bind(
        mismatches
            .iter()
            .map(|mismatch| mismatch.event_id)
            .collect::<Vec<Uuid>>(),
    )
    .bind(text(|mismatch| &mismatch.event_type))
    .bind(text(|mismatch| &mismatch.shipment_id))
    .bind(text(|mismatch| &mismatch.order_id))
    .bind(text(|mismatch| &mismatch.table))
    .bind(text(|mismatch| &mismatch.row_key))
    .bind(text(|mismatch| &mismatch.column))
    .bind(text(|mismatch| &mismatch.expected))
    .bind(text(|mismatch| &mismatch.found))
    .execute(connection)
    .await?;
    Ok(())
}

/// Adds to what was counted so far.
///
/// # Errors
/// Any database error; the transaction is then of no use.
pub async fn count(connection: &mut PgConnection, counted: &[(&str, i64)]) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO logistics.shadow_tally AS t (outcome, count) SELECT * FROM unnest($1::text[], $2::bigint[])
         ON CONFLICT (outcome) DO UPDATE SET count = t.count + excluded.count",
    )
    .bind(counted.iter().map(|(outcome, _)| *outcome).collect::<Vec<&str>>())
    .bind(counted.iter().map(|(_, count)| *count).collect::<Vec<i64>>())
    .execute(connection)
    .await?;
    Ok(())
}

/// # Errors
/// Any database error.
pub async fn tally(executor: impl PgExecutor<'_>) -> Result<Vec<(String, i64)>, sqlx::Error> {
    sqlx::query_as("SELECT outcome, count FROM logistics.shadow_tally ORDER BY outcome")
        .fetch_all(executor)
        .await
}

/// Events that were compared.
///
/// # Errors
/// Any database error.
pub async fn compared(executor: impl PgExecutor<'_>) -> Result<i64, sqlx::Error> {
    let count = sqlx::query_scalar("SELECT count FROM logistics.shadow_tally WHERE outcome = 'compared'");
    Ok(count.fetch_optional(executor).await?.unwrap_or(0))
}

/// How many wait to be compared, and since when the oldest does.
///
/// # Errors
/// Any database error.
pub async fn waiting(executor: impl PgExecutor<'_>) -> Result<(i64, Option<OffsetDateTime>), sqlx::Error> {
    sqlx::query_as("SELECT count(*), min(created_at) FROM logistics.shadow_expectations")
        .fetch_one(executor)
        .await
}

/// Mismatches of one column of one table by one type of event, with the latest of them.
#[derive(Debug, sqlx::FromRow)]
pub struct Group {
    pub table_name: String,
    pub column_name: String,
    pub event_type: String,
    pub count: i64,
    pub first_found_at: OffsetDateTime,
    pub last_found_at: OffsetDateTime,
    pub event_id: Uuid,
    pub shipment_id: String,
    pub order_id: String,
    pub row_key: String,
    pub expected: String,
    pub found: String,
}

/// # Errors
/// Any database error.
pub async fn groups(executor: impl PgExecutor<'_>) -> Result<Vec<Group>, sqlx::Error> {
    sqlx::query_as(
        "SELECT g.*, m.event_id, m.shipment_id, m.order_id, m.row_key, m.expected, m.found
           FROM (SELECT table_name, column_name, event_type, count(*), min(found_at) AS first_found_at,
                        max(found_at) AS last_found_at, max(id) AS latest
                   FROM logistics.shadow_mismatches GROUP BY table_name, column_name, event_type) AS g
           JOIN logistics.shadow_mismatches AS m ON m.id = g.latest
          ORDER BY g.count DESC, g.table_name, g.column_name, g.event_type",
    )
    .fetch_all(executor)
    .await
}

/// Mismatches found at or after `since`; no more than `most` are counted.
///
/// # Errors
/// Any database error.
pub async fn found_since(executor: impl PgExecutor<'_>, since: OffsetDateTime, most: i64) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(
        "SELECT count(*) FROM (SELECT FROM logistics.shadow_mismatches WHERE found_at >= $1 LIMIT $2) AS found",
    )
    .bind(since)
    .bind(most)
    .fetch_one(executor)
    .await
}

/// Deletes mismatches that are older than a week, some at a time.
///
/// # Errors
/// Any database error.
pub async fn forget_old(executor: impl PgExecutor<'_>) -> Result<(), sqlx::Error> {
    sqlx::query(
        "DELETE FROM logistics.shadow_mismatches WHERE id IN (
             SELECT id FROM logistics.shadow_mismatches
              WHERE found_at < clock_timestamp() - interval '7 days' ORDER BY found_at LIMIT 10000)",
    )
    .execute(executor)
    .await?;
    Ok(())
}
