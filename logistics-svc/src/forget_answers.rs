use std::time::Duration;

use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

use crate::tables::idempotency_keys;

const INTERVAL: Duration = Duration::from_secs(60);
/// Small, so that a deletion never holds up a request.
const BATCH: i64 = 1_000;

/// Deletes kept answers after 24 hours, batch by batch, until `stop`. Several processes may do so at once.
///
/// # Errors
/// None: what fails is logged and tried again a minute later.
pub async fn run(pool: PgPool, stop: CancellationToken) -> anyhow::Result<()> {
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(INTERVAL) => {}
        }
        while !stop.is_cancelled() {
            match idempotency_keys::delete_expired(&pool, BATCH).await {
                Ok(deleted) if deleted < BATCH.unsigned_abs() => break,
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(%error, "expired answers could not be deleted");
                    break;
                }
            }
        }
    }
}
