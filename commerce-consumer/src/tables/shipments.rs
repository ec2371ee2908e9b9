use sqlx::{PgTransaction, Row, postgres::PgRow};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::shipment::{Shipment, ShipmentStatus};

/// Locks these shipments and returns those that are known.
///
/// # Errors
/// Any database error; the transaction is then of no use.
pub async fn lock(transaction: &mut PgTransaction<'_>, ids: &[&str]) -> Result<Vec<Shipment>, sqlx::Error> {
    sqlx::query(
        "SELECT id, order_id, status, sequence, warehouse, carrier, tracking_number, reason, units, returned_units,
                last_event_id, last_event_type, last_event_at
         FROM commerce.shipments WHERE id = ANY($1) ORDER BY id FOR NO KEY UPDATE",
    )
    .bind(ids)
    .try_map(|row: PgRow| {
        let status: String = row.try_get("status")?;
        Ok(Shipment {
            id: row.try_get("id")?,
            order_id: row.try_get("order_id")?,
            status: ShipmentStatus::from_name(&status)
                .ok_or_else(|| sqlx::Error::Decode(format!("unknown shipment status {status:?}").into()))?,
            sequence: row.try_get("sequence")?,
            warehouse: row.try_get("warehouse")?,
            carrier: row.try_get("carrier")?,
            tracking_number: row.try_get("tracking_number")?,
            reason: row.try_get("reason")?,
            units: row.try_get("units")?,
            returned_units: row.try_get("returned_units")?,
            last_event_id: row.try_get("last_event_id")?,
            last_event_type: row.try_get("last_event_type")?,
            last_event_at: row.try_get("last_event_at")?,
        })
    })
    .fetch_all(&mut **transaction)
    .await
}

/// Writes shipments that have changed or are new. The guard on `sequence` is the last line behind the decision: a row
/// never moves back.
///
/// # Errors
/// Any database error; the transaction is then of no use.
pub async fn save(transaction: &mut PgTransaction<'_>, shipments: &[&Shipment]) -> Result<(), sqlx::Error> {
    let text = |of: fn(&Shipment) -> &str| -> Vec<&str> { shipments.iter().map(|shipment| of(shipment)).collect() };
    let maybe = |of: fn(&Shipment) -> Option<&str>| -> Vec<Option<&str>> {
        shipments.iter().map(|shipment| of(shipment)).collect()
    };
    let number = |of: fn(&Shipment) -> i64| -> Vec<i64> { shipments.iter().map(|shipment| of(shipment)).collect() };
    sqlx::query(include_str!("save_shipments.sql"))
        .bind(text(|shipment| &shipment.id))
        .bind(text(|shipment| &shipment.order_id))
        .bind(text(|shipment| shipment.status.as_str()))
        .bind(number(|shipment| shipment.sequence))
        .bind(text(|shipment| &shipment.warehouse))
        .bind(text(|shipment| &shipment.carrier))
        .bind(maybe(|shipment| shipment.tracking_number.as_deref()))
        .bind(maybe(|shipment| shipment.reason.as_deref()))
        .bind(number(|shipment| shipment.units))
        .bind(number(|shipment| shipment.returned_units))
        .bind(
            shipments
                .iter()
                .map(|shipment| shipment.last_event_id)
                .collect::<Vec<Uuid>>(),
        )
        .bind(text(|shipment| &shipment.last_event_type))
        .bind(
            shipments
                .iter()
                .map(|shipment| shipment.last_event_at)
                .collect::<Vec<OffsetDateTime>>(),
        )
        .execute(&mut **transaction)
        .await?;
    Ok(())
}

/// A shipment as the REST interface shows it, with the inbox row of its last event if that is still kept.
#[derive(Debug, sqlx::FromRow)]
pub struct ShipmentRow {
    pub id: String,
    pub order_id: String,
    pub status: String,
    pub sequence: i64,
    pub warehouse: String,
    pub carrier: String,
    pub tracking_number: Option<String>,
    pub reason: Option<String>,
    pub units: i64,
    pub returned_units: i64,
    pub last_event_id: Uuid,
    pub last_event_type: String,
    pub last_event_at: OffsetDateTime,
    pub updated_at: OffsetDateTime,
    pub topic: Option<String>,
    pub partition: Option<i32>,
    pub record_offset: Option<i64>,
    pub applied_at: Option<OffsetDateTime>,
}

/// `consumer` is the group whose inbox row is shown.
///
/// # Errors
/// Any database error.
pub async fn find(
    executor: impl sqlx::PgExecutor<'_>,
    id: &str,
    consumer: &str,
) -> Result<Option<ShipmentRow>, sqlx::Error> {
    sqlx::query_as(
        "SELECT s.id, s.order_id, s.status, s.sequence, s.warehouse, s.carrier, s.tracking_number, s.reason, s.units,
                s.returned_units, s.last_event_id, s.last_event_type, s.last_event_at, s.updated_at,
                i.topic, i.partition, i.record_offset, i.applied_at
         FROM commerce.shipments s
         LEFT JOIN commerce.inbox i ON i.consumer = $2 AND i.event_id = s.last_event_id
         WHERE s.id = $1",
    )
    .bind(id)
    .bind(consumer)
    .fetch_optional(executor)
    .await
}

/// The ids of an order's shipments.
///
/// # Errors
/// Any database error.
pub async fn ids_of_order(executor: impl sqlx::PgExecutor<'_>, order_id: &str) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar("SELECT id FROM commerce.shipments WHERE order_id = $1 ORDER BY id")
        .bind(order_id)
        .fetch_all(executor)
        .await
}

/// How many events of an order's shipments have taken effect or were passed over.
///
/// # Errors
/// Any database error.
pub async fn events_of_order(executor: impl sqlx::PgExecutor<'_>, order_id: &str) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("SELECT coalesce(sum(sequence), 0)::bigint FROM commerce.shipments WHERE order_id = $1")
        .bind(order_id)
        .fetch_one(executor)
        .await
}

/// How many events have taken effect or were passed over: each moved one shipment's sequence by one.
///
/// # Errors
/// Any database error.
pub async fn events_applied(executor: impl sqlx::PgExecutor<'_>) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("SELECT coalesce(sum(sequence), 0)::bigint FROM commerce.shipments")
        .fetch_one(executor)
        .await
}

/// A shipment's row, locked.
///
/// # Errors
/// Any database error; the transaction is then of no use.
pub async fn rows(transaction: &mut PgTransaction<'_>, id: &str) -> Result<Vec<inbox::Row>, sqlx::Error> {
    let select = "SELECT to_jsonb(r)::text FROM commerce.shipments AS r WHERE id = $1 FOR NO KEY UPDATE";
    let found = sqlx::query_scalar(select)
        .bind(id)
        .fetch_all(&mut **transaction)
        .await?;
    super::as_rows("shipments", &["id"], found)
}
