//! All SQL of the service, one file per table. Whoever changes rows locks them in this order, each table's rows in the
//! order of their keys: orders (and under them their lines and timelines), shipments, products. Several partitions
//! apply at once; one order of locks for all of them rules deadlocks out.

use inbox::Row;
use serde_json::{Map, Value};

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
