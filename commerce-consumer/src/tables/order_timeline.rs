use sqlx::PgTransaction;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::shipment::Entry;

/// One entry to be written.
#[derive(Debug, Clone)]
pub struct NewEntry<'a> {
    pub order_id: &'a str,
    pub event_id: Uuid,
    pub shipment_id: &'a str,
    pub kind: Entry,
    pub happened_at: OffsetDateTime,
    pub units: i64,
    pub carrier: &'a str,
    pub tracking_number: Option<&'a str>,
    pub reason: Option<&'a str>,
}

/// Appends entries in this order; the caller holds their orders' locks.
///
/// # Errors
/// Any database error; the transaction is then of no use.
pub async fn append(transaction: &mut PgTransaction<'_>, entries: &[NewEntry<'_>]) -> Result<(), sqlx::Error> {
    sqlx::query(include_str!("append_order_timeline.sql"))
        .bind(entries.iter().map(|entry| entry.order_id).collect::<Vec<&str>>())
        .bind(entries.iter().map(|entry| entry.event_id).collect::<Vec<Uuid>>())
        .bind(entries.iter().map(|entry| entry.shipment_id).collect::<Vec<&str>>())
        .bind(entries.iter().map(|entry| entry.kind.as_str()).collect::<Vec<&str>>())
        .bind(
            entries
                .iter()
                .map(|entry| entry.happened_at)
                .collect::<Vec<OffsetDateTime>>(),
        )
        .bind(entries.iter().map(|entry| entry.units).collect::<Vec<i64>>())
        .bind(entries.iter().map(|entry| entry.carrier).collect::<Vec<&str>>())
        .bind(
            entries
                .iter()
                .map(|entry| entry.tracking_number)
                .collect::<Vec<Option<&str>>>(),
        )
        .bind(entries.iter().map(|entry| entry.reason).collect::<Vec<Option<&str>>>())
        .execute(&mut **transaction)
        .await?;
    Ok(())
}

/// An entry as the REST interface shows it.
#[derive(Debug, sqlx::FromRow)]
pub struct EntryRow {
    pub event_id: Uuid,
    pub shipment_id: String,
    pub kind: String,
    pub happened_at: OffsetDateTime,
    pub units: i64,
    pub carrier: String,
    pub tracking_number: Option<String>,
    pub reason: Option<String>,
}

/// # Errors
/// Any database error.
pub async fn list(executor: impl sqlx::PgExecutor<'_>, order_id: &str) -> Result<Vec<EntryRow>, sqlx::Error> {
    sqlx::query_as(
        "SELECT event_id, shipment_id, kind, happened_at, units, carrier, tracking_number, reason
         FROM commerce.order_timeline WHERE order_id = $1 ORDER BY id",
    )
    .bind(order_id)
    .fetch_all(executor)
    .await
}

/// An order's rows; the caller holds its lock.
///
/// # Errors
/// Any database error; the transaction is then of no use.
pub async fn rows(transaction: &mut PgTransaction<'_>, order_id: &str) -> Result<Vec<inbox::Row>, sqlx::Error> {
    let select = "SELECT to_jsonb(r)::text FROM commerce.order_timeline AS r WHERE order_id = $1";
    let found = sqlx::query_scalar(select)
        .bind(order_id)
        .fetch_all(&mut **transaction)
        .await?;
    super::as_rows("order_timeline", &["id"], found)
}
