//! All SQL of the service, one file per table. Whoever changes rows locks them in this order, each table's rows in the
//! order of their keys: orders (and under them their lines and timelines), shipments, products. Several partitions
//! apply at once; one order of locks for all of them rules deadlocks out.

use std::collections::HashSet;

use inbox::Row;
use serde_json::{Map, Value};
use sqlx::{PgConnection, PgExecutor};
use uuid::Uuid;

pub mod orders;

pub mod order_lines;

pub mod shipments;

pub mod order_timeline;

/// Hot: locked last and for the shortest time.
pub mod products;

/// Rows as JSON objects have them.
fn as_rows(table: &'static str, key: &[&str], found: Vec<String>) -> Result<Vec<Row>, sqlx::Error> {
    let row = |text: String| {
        let columns: Map<String, Value> =
            serde_json::from_str(&text).map_err(|error| sqlx::Error::Decode(error.into()))?;
        let named = columns.iter().filter(|(column, _)| key.contains(&column.as_str()));
        Ok(Row {
            table,
            key: named.map(|(column, value)| (column.clone(), value.clone())).collect(),
            columns,
        })
    };
    found.into_iter().map(row).collect()
}

/// Whose rows are meant.
#[derive(Debug, Clone, Copy)]
pub struct RowsOfEvent<'a> {
    pub order_id: &'a str,
    pub shipment_id: &'a str,
    pub event_id: Uuid,
    pub skus: &'a [String],
}

/// Every row that an event concerns, with its table, as they stand in one snapshot. Locks nothing.
///
/// # Errors
/// Any database error.
pub async fn rows_of_event(
    connection: &mut PgConnection,
    of: &RowsOfEvent<'_>,
) -> Result<Vec<(String, Map<String, Value>)>, sqlx::Error> {
    let rows: Vec<(String, String)> = sqlx::query_as(concat!(
        "SELECT table_name, columns::text FROM (",
        include_str!("rows_of_event.sql"),
        ") AS r"
    ))
    .bind(of.order_id)
    .bind(of.shipment_id)
    .bind(of.event_id)
    .bind(of.skus)
    .fetch_all(connection)
    .await?;
    let row = |(table, columns): (String, String)| {
        let columns = serde_json::from_str(&columns).map_err(|error| sqlx::Error::Decode(error.into()))?;
        Ok((table, columns))
    };
    rows.into_iter().map(row).collect()
}

/// Those of these events for which the consumer has an inbox row.
///
/// # Errors
/// Any database error.
pub async fn taken_effect(
    executor: impl PgExecutor<'_>,
    consumer: &str,
    event_ids: &[Uuid],
) -> Result<HashSet<Uuid>, sqlx::Error> {
    let taken = sqlx::query_scalar("SELECT event_id FROM commerce.inbox WHERE consumer = $1 AND event_id = ANY($2)")
        .bind(consumer)
        .bind(event_ids)
        .fetch_all(executor)
        .await?;
    Ok(taken.into_iter().collect())
}
