use std::time::Duration;

use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;

use crate::{
    limited_pool::LimitedPool,
    status::with_causes,
    table::{self, Table},
};

/// Partitions are made this far ahead.
const DAYS_AHEAD: i32 = 7;
const INTERVAL: Duration = Duration::from_secs(60 * 60);
/// After a failure, and while there is more to drop.
const SOON: Duration = Duration::from_secs(60);
/// Rows of the default partition deleted at once.
const BATCH: i64 = 1_000;
/// A server that vanished without a reset never answers.
const PATIENCE: Duration = Duration::from_secs(60);

/// Makes the outbox's days ahead and drops those past `keep`, until told to stop. If it fails, rows go to the default
/// partition meanwhile, and old days stay; no request fails.
pub(crate) async fn retain(table: Table, pool: LimitedPool, slot: String, keep: Duration, stop: CancellationToken) {
    loop {
        let round = tokio::time::timeout(PATIENCE, round(&table, &pool, &slot, keep)).await;
        let pause = match round.unwrap_or(Err(sqlx::Error::PoolTimedOut)) {
            Ok(true) => SOON,
            Ok(false) => INTERVAL,
            Err(error) => {
                tracing::warn!(error = with_causes(&error), "partitions could not be looked after");
                SOON
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// True if there may be more to drop.
async fn round(table: &Table, pool: &LimitedPool, slot: &str, keep: Duration) -> Result<bool, sqlx::Error> {
    table::ensure_partitions(table, pool, DAYS_AHEAD).await?;
    let keep_since = OffsetDateTime::now_utc() - keep;
    let done_before = table::unmarked_before(table, pool, slot).await?;
    let dropped = table::drop_partitions(table, pool, keep_since, done_before).await?;
    for partition in &dropped {
        tracing::info!(partition, "dropped: all of its day is past retention and published");
    }
    let deleted = table::forget_default_rows(table, pool, keep_since, done_before, BATCH).await?;
    table::forget_resends(table, pool, keep_since).await?;
    Ok(!dropped.is_empty() || deleted > 0)
}
