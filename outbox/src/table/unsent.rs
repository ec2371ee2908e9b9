use std::collections::HashSet;

use sqlx::{Row, postgres::PgRow, types::Uuid};
use time::OffsetDateTime;

use super::Table;
use crate::limited_pool::LimitedPool;

/// A row as the relay sends it from the table.
#[derive(Debug)]
pub(crate) struct UnsentRow {
    pub(crate) id: Uuid,
    pub(crate) aggregate_id: String,
    pub(crate) event_type: String,
    pub(crate) version: i32,
    pub(crate) sequence: i64,
    pub(crate) payload: String,
    pub(crate) traceparent: Option<String>,
    pub(crate) created_at: OffsetDateTime,
}

impl UnsentRow {
    pub(super) fn read(row: &PgRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            id: row.try_get("id")?,
            aggregate_id: row.try_get("aggregateid")?,
            event_type: row.try_get("type")?,
            version: row.try_get("version")?,
            sequence: row.try_get("sequence")?,
            payload: row.try_get("payload")?,
            traceparent: row.try_get("traceparent")?,
            created_at: row.try_get("created_at")?,
        })
    }
}

/// Where a pass over the table stands. The id is for two aggregates of different types with the same id.
#[derive(Debug, Clone, Default)]
pub(crate) struct After {
    aggregate_id: String,
    sequence: i64,
    id: Uuid,
}

impl After {
    /// Behind all rows of the key.
    fn whole_key(self) -> Self {
        Self {
            sequence: i64::MAX,
            id: Uuid::max(),
            ..self
        }
    }
}

impl From<&UnsentRow> for After {
    fn from(row: &UnsentRow) -> Self {
        Self {
            aggregate_id: row.aggregate_id.clone(),
            sequence: row.sequence,
            id: row.id,
        }
    }
}

/// Which unsent rows are meant. Rows of a key with one that was set aside are never among them: they wait behind it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Unsent {
    /// Keys of these buckets only; `None` for all.
    pub(crate) buckets: Option<Vec<i32>>,
    /// Created at or after.
    pub(crate) since: Option<OffsetDateTime>,
    /// Created before, as are all unsent rows before them in their key: the times are of several clocks.
    pub(crate) before: Option<OffsetDateTime>,
}

/// The next unsent rows of a pass, ordered by (aggregate id, sequence, id): each key's first unsent row comes first. Looks at
/// `limit` rows, which are not all meant, and says where to go on if there may be more.
pub(crate) async fn unsent(
    table: &Table,
    pool: &LimitedPool,
    wanted: &Unsent,
    after: &After,
    limit: i64,
) -> Result<(Vec<UnsentRow>, Option<After>), sqlx::Error> {
    // The limit stands inside: before the windows are computed, the rows come from the index in their order.
    let rows = sqlx::query(table.sql(
        "SELECT id, aggregateid, type, version, sequence, payload::text AS payload, traceparent, created_at, is_young, is_last
           FROM (SELECT page.*,
                        coalesce(bool_or(created_at >= $6) OVER (PARTITION BY aggregateid ORDER BY sequence, id), false)
                            AS is_young,
                        row_number() OVER (ORDER BY aggregateid, sequence, id) = $7 AS is_last
                   FROM (SELECT * FROM $schema.outbox
                          WHERE published_at IS NULL AND (aggregateid, sequence, id) > ($1, $2, $3)
                            AND ($4::int[] IS NULL OR $schema.outbox_bucket(aggregateid) = ANY($4))
                            AND ($5::timestamptz IS NULL OR created_at >= $5)
                            AND aggregateid NOT IN (SELECT failed.aggregateid FROM $schema.outbox AS failed
                                                     WHERE failed.failed_at IS NOT NULL)
                          ORDER BY aggregateid, sequence, id
                          LIMIT $7) AS page) AS waiting
          WHERE NOT is_young OR is_last
          ORDER BY aggregateid, sequence, id",
    ))
    .bind(&after.aggregate_id)
    .bind(after.sequence)
    .bind(after.id)
    .bind(&wanted.buckets)
    .bind(wanted.since)
    .bind(wanted.before)
    .bind(limit)
    .fetch_all(pool)
    .await?;
    let mut next = None;
    let mut found = Vec::with_capacity(rows.len());
    for row in &rows {
        let (event, is_young) = (UnsentRow::read(row)?, row.try_get("is_young")?);
        if row.try_get("is_last")? {
            let after = After::from(&event);
            next = Some(if is_young { after.whole_key() } else { after });
        }
        if !is_young {
            found.push(event);
        }
    }
    Ok((found, next))
}

/// Whether any row may be meant, in one look at what is unsent. Not by `EXISTS`: for a first row that hardly ever comes, a plan
/// that reads the whole table can look cheap.
pub(crate) async fn is_any_unsent(table: &Table, pool: &LimitedPool, wanted: &Unsent) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(table.sql(
        "SELECT coalesce(min(created_at) < coalesce($3, 'infinity'), false) FROM $schema.outbox
          WHERE published_at IS NULL
            AND ($1::int[] IS NULL OR $schema.outbox_bucket(aggregateid) = ANY($1))
            AND ($2::timestamptz IS NULL OR created_at >= $2)
            AND aggregateid NOT IN (SELECT failed.aggregateid FROM $schema.outbox AS failed
                                     WHERE failed.failed_at IS NOT NULL)",
    ))
    .bind(&wanted.buckets)
    .bind(wanted.since)
    .bind(wanted.before)
    .fetch_one(pool)
    .await
}

/// The next unsent rows of one key after a sequence, in their order, at most `limit`.
pub(crate) async fn unsent_of_key(
    table: &Table,
    pool: &LimitedPool,
    key: &str,
    after: i64,
    limit: i64,
) -> Result<Vec<UnsentRow>, sqlx::Error> {
    let rows = sqlx::query(table.sql(
        "SELECT id, aggregateid, type, version, sequence, payload::text AS payload, traceparent, created_at
           FROM $schema.outbox
          WHERE published_at IS NULL AND aggregateid = $1 AND sequence > $2
          ORDER BY sequence, id
          LIMIT $3",
    ))
    .bind(key)
    .bind(after)
    .bind(limit)
    .fetch_all(pool)
    .await?;
    rows.iter().map(UnsentRow::read).collect()
}

/// Keys among these (key, sequence) that have an unsent row before that sequence.
pub(crate) async fn keys_with_unsent_before(
    table: &Table,
    pool: &LimitedPool,
    events: &[(String, i64)],
) -> Result<HashSet<String>, sqlx::Error> {
    let (keys, sequences): (Vec<&str>, Vec<i64>) =
        events.iter().map(|(key, sequence)| (key.as_str(), *sequence)).unzip();
    let behind: Vec<String> = sqlx::query_scalar(table.sql(
        "SELECT asked.key FROM unnest($1::text[], $2::bigint[]) AS asked(key, sequence)
          WHERE EXISTS (SELECT FROM $schema.outbox AS o
                         WHERE o.published_at IS NULL AND o.aggregateid = asked.key AND o.sequence < asked.sequence)",
    ))
    .bind(keys)
    .bind(sequences)
    .fetch_all(pool)
    .await?;
    Ok(behind.into_iter().collect())
}
