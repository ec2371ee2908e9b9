use sqlx::Row;
use time::OffsetDateTime;

use super::Table;
use crate::limited_pool::LimitedPool;
use crate::watermark::Lsn;

/// A slot of one database cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SlotIdentity {
    pub(crate) slot: String,
    pub(crate) system_identifier: String,
}

/// Up to where everything is published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Position {
    pub(crate) lsn: Lsn,
    /// When marks are off: rows created before this time need none.
    pub(crate) unmarked_before: Option<OffsetDateTime>,
}

/// Everything below `position` is published, and marked if marks are on. Only forward, within one cluster.
pub(crate) async fn record_position(
    table: &Table,
    pool: &LimitedPool,
    identity: &SlotIdentity,
    position: Position,
) -> Result<(), sqlx::Error> {
    sqlx::query(table.sql(
        "INSERT INTO $schema.outbox_relay_positions AS recorded (slot, system_identifier, position, unmarked_before)
         VALUES ($1, $2, $3::pg_lsn, $4)
         ON CONFLICT (slot) DO UPDATE
            SET system_identifier = EXCLUDED.system_identifier,
                position = EXCLUDED.position,
                unmarked_before = greatest(recorded.unmarked_before, EXCLUDED.unmarked_before),
                updated_at = clock_timestamp()
          WHERE recorded.system_identifier <> EXCLUDED.system_identifier OR recorded.position < EXCLUDED.position",
    ))
    .bind(&identity.slot)
    .bind(&identity.system_identifier)
    .bind(position.lsn.to_string())
    .bind(position.unmarked_before)
    .execute(pool)
    .await?;
    Ok(())
}

/// The position recorded for the slot; zero if there is none for this cluster.
pub(crate) async fn recorded_position(
    table: &Table,
    pool: &LimitedPool,
    identity: &SlotIdentity,
) -> Result<Lsn, sqlx::Error> {
    let row = sqlx::query(table.sql(
        "SELECT (position - '0/0'::pg_lsn)::bigint AS position
           FROM $schema.outbox_relay_positions WHERE slot = $1 AND system_identifier = $2",
    ))
    .bind(&identity.slot)
    .bind(&identity.system_identifier)
    .fetch_optional(pool)
    .await?;
    let position: i64 = row.map_or(Ok(0), |row| row.try_get("position"))?;
    Ok(Lsn(u64::try_from(position).unwrap_or_default()))
}

/// The time before which rows without a mark count as sent, because marks were off then.
pub(crate) async fn unmarked_before(
    table: &Table,
    pool: &LimitedPool,
    slot: &str,
) -> Result<Option<OffsetDateTime>, sqlx::Error> {
    let found: Option<Option<OffsetDateTime>> =
        sqlx::query_scalar(table.sql("SELECT unmarked_before FROM $schema.outbox_relay_positions WHERE slot = $1"))
            .bind(slot)
            .fetch_optional(pool)
            .await?;
    Ok(found.flatten())
}
