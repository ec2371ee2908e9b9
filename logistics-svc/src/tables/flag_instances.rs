use std::time::Duration;

use sqlx::{PgExecutor, postgres::types::PgInterval};
use time::OffsetDateTime;
use uuid::Uuid;

/// One that has not written for so long is gone.
pub const GONE_AFTER: Duration = Duration::from_secs(10);

/// What a process says of itself.
#[derive(Debug, Clone)]
pub struct Heartbeat<'a> {
    pub instance: Uuid,
    pub address: &'a str,
    pub version: i64,
    pub unable: Option<&'a str>,
    pub requests: i64,
    pub failures: i64,
}

/// An API process that runs.
#[derive(Debug, Clone, sqlx::FromRow)]
pub struct Instance {
    pub instance: Uuid,
    pub address: String,
    /// Of the value that it runs.
    pub version: i64,
    /// Why it leaves events to the outbox that the flag wants elsewhere.
    pub unable: Option<String>,
    pub started_at: OffsetDateTime,
    pub seen_at: OffsetDateTime,
}

/// # Errors
/// Any database error.
pub async fn beat(executor: impl PgExecutor<'_>, beat: &Heartbeat<'_>) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO logistics.flag_instances AS i (instance, address, version, unable, requests, failures)
         VALUES ($1, $2, $3, $4, $5, $6)
         ON CONFLICT (instance) DO UPDATE
         SET version = $3, unable = $4, requests = $5, failures = $6, seen_at = clock_timestamp()",
    )
    .bind(beat.instance)
    .bind(beat.address)
    .bind(beat.version)
    .bind(beat.unable)
    .bind(beat.requests)
    .bind(beat.failures)
    .execute(executor)
    .await?;
    Ok(())
}

/// Those that are not gone.
///
/// # Errors
/// Any database error.
pub async fn list(executor: impl PgExecutor<'_>) -> Result<Vec<Instance>, sqlx::Error> {
    sqlx::query_as(
        "SELECT instance, address, version, unable, started_at, seen_at
           FROM logistics.flag_instances WHERE seen_at > clock_timestamp() - $1::interval ORDER BY started_at",
    )
    .bind(interval(GONE_AFTER))
    .fetch_all(executor)
    .await
}

/// Takes a process out that ends.
///
/// # Errors
/// Any database error.
pub async fn leave(executor: impl PgExecutor<'_>, instance: Uuid) -> Result<(), sqlx::Error> {
    sqlx::query("UPDATE logistics.flag_instances SET seen_at = '-infinity' WHERE instance = $1")
        .bind(instance)
        .execute(executor)
        .await?;
    Ok(())
}

/// Changes that were asked for and those that failed, over all processes that are remembered: those of the last day, and all
/// since a roll-out began that still runs.
///
/// # Errors
/// Any database error.
pub async fn requests_and_failures(executor: impl PgExecutor<'_>) -> Result<(i64, i64), sqlx::Error> {
    sqlx::query_as(
        "SELECT coalesce(sum(requests), 0)::bigint, coalesce(sum(failures), 0)::bigint FROM logistics.flag_instances",
    )
    .fetch_one(executor)
    .await
}

/// Forgets processes that started long ago and are gone.
///
/// # Errors
/// Any database error.
pub async fn forget(executor: impl PgExecutor<'_>) -> Result<(), sqlx::Error> {
    sqlx::query(
        "DELETE FROM logistics.flag_instances
          WHERE seen_at < clock_timestamp() - interval '1 day' AND started_at < clock_timestamp() - interval '1 day'
            AND NOT EXISTS (SELECT FROM logistics.flag_rollouts WHERE state = 'running')",
    )
    .execute(executor)
    .await?;
    Ok(())
}

fn interval(duration: Duration) -> PgInterval {
    PgInterval {
        months: 0,
        days: 0,
        microseconds: i64::try_from(duration.as_micros()).unwrap_or(i64::MAX),
    }
}
