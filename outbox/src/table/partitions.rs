use time::OffsetDateTime;

use super::Table;
use crate::limited_pool::LimitedPool;

/// Makes today's partition and those of the next `days` days, where they do not exist.
pub(crate) async fn ensure_partitions(table: &Table, pool: &LimitedPool, days: i32) -> Result<(), sqlx::Error> {
    sqlx::query(table.sql("SELECT $schema.ensure_outbox_partitions($1)"))
        .bind(days)
        .execute(pool)
        .await?;
    Ok(())
}

/// Drops at most one day that ended before `keep_since` and holds nothing unsent; returns its name. Rows without a mark
/// that were created before `done_before` count as sent, but for those of a key with one that was set aside.
pub(crate) async fn drop_partitions(
    table: &Table,
    pool: &LimitedPool,
    keep_since: OffsetDateTime,
    done_before: Option<OffsetDateTime>,
) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar(table.sql("SELECT $schema.drop_outbox_partitions($1, $2, 1)"))
        .bind(keep_since)
        .bind(done_before)
        .fetch_all(pool)
        .await
}

/// Deletes at most `limit` rows that came while their partition was missing, under the same rule.
pub(crate) async fn forget_default_rows(
    table: &Table,
    pool: &LimitedPool,
    keep_since: OffsetDateTime,
    done_before: Option<OffsetDateTime>,
    limit: i64,
) -> Result<u64, sqlx::Error> {
    let deleted = sqlx::query(table.sql(
        "DELETE FROM $schema.outbox_default
          WHERE id IN (SELECT id FROM $schema.outbox_default
                        WHERE id < $schema.outbox_id_floor($1)
                          AND (published_at IS NOT NULL
                               OR created_at < $2
                                  AND aggregateid NOT IN (SELECT failed.aggregateid FROM $schema.outbox AS failed
                                                           WHERE failed.failed_at IS NOT NULL))
                        LIMIT $3)",
    ))
    .bind(keep_since)
    .bind(done_before)
    .bind(limit)
    .execute(pool)
    .await?;
    Ok(deleted.rows_affected())
}
