use std::time::Duration;

use sqlx::types::Uuid;

use super::Table;
use crate::limited_pool::LimitedPool;

/// A bucket that this instance holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Holding {
    pub(crate) bucket: i32,
    /// Raised with every change of owner.
    pub(crate) epoch: i64,
    /// Beyond the fair share: to be given back when nothing of it is on its way.
    pub(crate) surplus: bool,
}

/// Renews this member's leases for `term`, takes free buckets up to its fair share, and returns what it holds now.
pub(crate) async fn lease(
    table: &Table,
    pool: &LimitedPool,
    member: Uuid,
    term: Duration,
) -> Result<Vec<Holding>, sqlx::Error> {
    let rows: Vec<(i32, i64, bool)> = sqlx::query_as(
        table.sql("SELECT bucket, epoch, surplus FROM $schema.lease_outbox_buckets($1, make_interval(secs => $2))"),
    )
    .bind(member)
    .bind(term.as_secs_f64())
    .fetch_all(pool)
    .await?;
    let holding = |(bucket, epoch, surplus)| Holding { bucket, epoch, surplus };
    Ok(rows.into_iter().map(holding).collect())
}

/// Gives these buckets back; nothing of them is on its way any more.
pub(crate) async fn release(
    table: &Table,
    pool: &LimitedPool,
    member: Uuid,
    buckets: &[i32],
) -> Result<(), sqlx::Error> {
    sqlx::query(table.sql(
        "UPDATE $schema.outbox_relay_buckets SET leased_until = '-infinity' WHERE owner = $1 AND bucket = ANY($2)",
    ))
    .bind(member)
    .bind(buckets)
    .execute(pool)
    .await?;
    Ok(())
}

impl Table {
    /// Gives everything back and leaves, so that others need not wait for the leases to run out.
    pub(crate) async fn leave(&self, pool: &LimitedPool, member: Uuid) -> Result<(), sqlx::Error> {
        sqlx::query(self.sql(
            "WITH gone AS (DELETE FROM $schema.outbox_relay_members WHERE member = $1)
             UPDATE $schema.outbox_relay_buckets SET leased_until = '-infinity' WHERE owner = $1",
        ))
        .bind(member)
        .execute(pool)
        .await?;
        Ok(())
    }
}
