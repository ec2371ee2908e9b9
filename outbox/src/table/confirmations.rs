use sqlx::{Row, types::Uuid};

use super::Table;
use crate::limited_pool::LimitedPool;

/// How long rows are looked at again although all of them were settled: ids are given out before the commit, by several clocks.
const MARGIN_SECONDS: f64 = 3_600.0;

/// Up to where the rows that the group reads back are settled, and up to where they had `patience_seconds` to be.
pub(crate) async fn settled_to(
    table: &Table,
    pool: &LimitedPool,
    group: &str,
    patience_seconds: f64,
) -> Result<(Uuid, Uuid), sqlx::Error> {
    sqlx::query_as(table.sql(
        "SELECT coalesce((SELECT settled_to FROM $schema.outbox_confirmations WHERE confirm_group = $1),
                         $schema.outbox_id_floor(now() - make_interval(secs => $2 + $3))),
                $schema.outbox_id_floor(now() - make_interval(secs => $2))",
    ))
    .bind(group)
    .bind(patience_seconds)
    .bind(MARGIN_SECONDS)
    .fetch_one(pool)
    .await
}

/// Everything before `to` is settled. Only forward, and not into the last hour.
pub(crate) async fn record_settled(
    table: &Table,
    pool: &LimitedPool,
    group: &str,
    to: Uuid,
    patience_seconds: f64,
) -> Result<(), sqlx::Error> {
    sqlx::query(table.sql(
        "INSERT INTO $schema.outbox_confirmations AS recorded (confirm_group, settled_to)
         VALUES ($1, least($2, $schema.outbox_id_floor(now() - make_interval(secs => $3 + $4))))
         ON CONFLICT (confirm_group) DO UPDATE SET settled_to = EXCLUDED.settled_to
          WHERE recorded.settled_to < EXCLUDED.settled_to",
    ))
    .bind(group)
    .bind(to)
    .bind(patience_seconds)
    .bind(MARGIN_SECONDS)
    .execute(pool)
    .await?;
    Ok(())
}

/// What a look at some rows has found.
#[derive(Debug)]
pub(crate) struct Unconfirmed {
    /// Published and not confirmed in time.
    pub(crate) due: Vec<Uuid>,
    /// The first row that is not settled, due or not.
    pub(crate) first: Option<Uuid>,
    /// Where the next look begins; `None` if there was nothing more.
    pub(crate) next: Option<Uuid>,
}

/// Looks at up to `limit` rows of `[from, to)`.
///
/// Found by their ids, which begin with their time: an index on unconfirmed rows would cost every mark.
pub(crate) async fn unconfirmed(
    table: &Table,
    pool: &LimitedPool,
    from: Uuid,
    to: Uuid,
    patience_seconds: f64,
    limit: i64,
) -> Result<Unconfirmed, sqlx::Error> {
    let next: Option<Uuid> = sqlx::query_scalar(
        table.sql("SELECT id FROM $schema.outbox WHERE id >= $1 AND id < $2 ORDER BY id OFFSET $3 LIMIT 1"),
    )
    .bind(from)
    .bind(to)
    .bind(limit)
    .fetch_optional(pool)
    .await?;
    let rows = sqlx::query(table.sql(
        "SELECT id, coalesce(published_at < now() - make_interval(secs => $3), false) AS due
           FROM $schema.outbox AS o
          WHERE id >= $1 AND id < $2 AND confirmed_at IS NULL
            AND (published_at IS NULL
                 OR NOT EXISTS (SELECT FROM $schema.outbox_resends AS r
                                 WHERE r.event_id = o.id AND r.refusal IS NOT NULL))
          ORDER BY id",
    ))
    .bind(from)
    .bind(next.unwrap_or(to))
    .bind(patience_seconds)
    .fetch_all(pool)
    .await?;
    let mut due = Vec::new();
    for row in &rows {
        if row.try_get("due")? {
            due.push(row.try_get("id")?);
        }
    }
    let first = rows.first().map(|row| row.try_get("id")).transpose()?;
    Ok(Unconfirmed { due, first, next })
}
