use inbox::{HandlerError, Outcome, Synchronous};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use shared_events::{Envelope, shipment::ShipmentEvent};
use sqlx::{PgConnection, PgTransaction};
use uuid::Uuid;

use crate::{
    apply_shipment::ApplyShipment,
    tables::{self, RowsOfEvent},
};

/// Columns that two runs of the same change may leave different: the times at which they ran, and numbers drawn for rows.
pub const IGNORED: [(&str, &str); 4] = [
    ("orders", "updated_at"),
    ("shipments", "updated_at"),
    ("products", "updated_at"),
    ("order_timeline", "id"),
];

/// The rows of one event as one path leaves them, to be held against what another path has written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Expected {
    pub event_id: Uuid,
    pub shipment_id: String,
    pub order_id: String,
    /// Events of the order that have taken effect, this one among them.
    order_events: i64,
    rows: Vec<ExpectedRow>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct ExpectedRow {
    table: String,
    columns: Map<String, Value>,
}

/// One column of one row that differs; of a row that only one side has, all of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Difference {
    pub table: String,
    pub key: Value,
    /// `*` stands for the whole row.
    pub column: String,
    pub expected: Value,
    pub found: Value,
}

/// What came of a comparison.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// Rows that were compared.
    pub rows: usize,
    /// Rows that another event has changed since, or changed in between: they say nothing about this one.
    pub overtaken: usize,
    pub differences: Vec<Difference>,
}

/// What the event would make of its rows; its outcome if that is no effect. Inside a savepoint that is rolled back: the rows
/// are changed and locked.
///
/// # Errors
/// Whatever the handler fails with; the savepoint is of no use then.
pub async fn expect(
    path: &Synchronous<ApplyShipment>,
    transaction: &mut PgTransaction<'_>,
    envelope: &Envelope,
    event: &ShipmentEvent,
) -> Result<Result<Expected, Outcome>, HandlerError> {
    let outcomes = path.take_effect(transaction, std::slice::from_ref(envelope)).await?;
    match outcomes.into_iter().next() {
        Some(Outcome::Applied) => {}
        Some(outcome) => return Ok(Err(outcome)),
        None => return Ok(Err(Outcome::Skipped)),
    }
    let skus: Vec<String> = event.lines().iter().map(|line| line.sku.clone()).collect();
    let order_id = event.order_id().to_owned();
    let shipment_id = envelope.aggregate_id.clone();
    let asked = RowsOfEvent {
        order_id: &order_id,
        shipment_id: &shipment_id,
        event_id: envelope.id,
        skus: &skus,
    };
    let rows = tables::rows_of_event(transaction, &asked).await?;
    let order_events = tables::shipments::events_of_order(&mut **transaction, &order_id).await?;
    let rows = rows.into_iter().map(ExpectedRow::new);
    Ok(Ok(Expected {
        event_id: envelope.id,
        shipment_id,
        rows: rows.collect(),
        order_id,
        order_events,
    }))
}

/// Holds what was expected of an event that has taken effect against the rows as they stand now. Locks nothing.
///
/// # Errors
/// Any database error.
pub async fn compare(connection: &mut PgConnection, expected: &Expected) -> Result<Comparison, sqlx::Error> {
    let of_products = expected.rows.iter().filter(|row| row.table == "products");
    let skus: Vec<String> = of_products
        .filter_map(|row| row.columns.get("sku")?.as_str().map(ToOwned::to_owned))
        .collect();
    let asked = RowsOfEvent {
        order_id: &expected.order_id,
        shipment_id: &expected.shipment_id,
        event_id: expected.event_id,
        skus: &skus,
    };
    // Before the rows and after them: an event that takes effect in between is noticed.
    let before = tables::shipments::events_of_order(&mut *connection, &expected.order_id).await?;
    let found = tables::rows_of_event(&mut *connection, &asked).await?;
    let after = tables::shipments::events_of_order(&mut *connection, &expected.order_id).await?;
    let order_is_alone = [before, after] == [expected.order_events; 2];
    Ok(hold_against(expected, found, order_is_alone))
}

fn hold_against(expected: &Expected, found: Vec<(String, Map<String, Value>)>, order_is_alone: bool) -> Comparison {
    let (mut rows, mut overtaken, mut differences) = (0, 0, Vec::new());
    let mut found: Vec<ExpectedRow> = found.into_iter().map(ExpectedRow::new).collect();
    for row in &expected.rows {
        let counterpart = found
            .iter()
            .position(|other| other.table == row.table && other.key() == row.key());
        let counterpart = counterpart.map(|place| found.swap_remove(place));
        let says_something = match (row.table.as_str(), &counterpart) {
            // Written once, for this event.
            ("order_timeline", _) => true,
            // As often changed as expected: by this event and by no other.
            ("products", Some(other)) => other.columns.get("changes") == row.columns.get("changes"),
            _ => order_is_alone,
        };
        if says_something {
            rows += 1;
            differences.extend(row.differences(counterpart.as_ref()));
        } else {
            overtaken += 1;
        }
    }
    for row in found {
        let expected_nowhere = row.table == "order_timeline" || order_is_alone;
        if expected_nowhere {
            rows += 1;
            let key = row.key();
            let whole = Value::Object(row.columns);
            differences.push(Difference {
                table: row.table,
                key,
                column: "*".to_owned(),
                expected: Value::Null,
                found: whole,
            });
        }
    }
    Comparison {
        rows,
        overtaken,
        differences,
    }
}

impl ExpectedRow {
    fn new((table, mut columns): (String, Map<String, Value>)) -> Self {
        columns.retain(|column, _| !IGNORED.contains(&(table.as_str(), column.as_str())));
        Self { table, columns }
    }

    fn key(&self) -> Value {
        let columns: &[&str] = match self.table.as_str() {
            "order_lines" => &["order_id", "sku"],
            "order_timeline" => &["event_id"],
            "products" => &["sku"],
            _ => &["id"],
        };
        let named = columns.iter().map(|column| (*column, self.columns.get(*column)));
        named.map(|(column, value)| (column.to_owned(), json!(value))).collect()
    }

    fn differences(&self, found: Option<&Self>) -> Vec<Difference> {
        let difference = |column: &str, expected: &Value, found: &Value| Difference {
            table: self.table.clone(),
            key: self.key(),
            column: column.to_owned(),
            expected: expected.clone(),
            found: found.clone(),
        };
        let Some(found) = found else {
            return vec![difference("*", &Value::Object(self.columns.clone()), &Value::Null)];
        };
        let mut columns: Vec<&String> = self.columns.keys().chain(found.columns.keys()).collect();
        columns.sort_unstable();
        columns.dedup();
        let pair = |column: &String| {
            let value = |row: &Self| row.columns.get(column).cloned().unwrap_or_default();
            let (expected, found) = (value(self), value(found));
            (expected != found).then(|| difference(column, &expected, &found))
        };
        columns.into_iter().filter_map(pair).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(table: &str, columns: Value) -> (String, Map<String, Value>) {
        (table.to_owned(), columns.as_object().cloned().unwrap_or_default())
    }

    fn expected(rows: Vec<(String, Map<String, Value>)>) -> Expected {
        Expected {
            event_id: Uuid::nil(),
            shipment_id: "1".to_owned(),
            order_id: "7".to_owned(),
            order_events: 2,
            rows: rows.into_iter().map(ExpectedRow::new).collect(),
        }
    }

    fn line(shipped: i64) -> (String, Map<String, Value>) {
        row(
            "order_lines",
            json!({"order_id": "7", "sku": "a", "shipped_quantity": shipped}),
        )
    }

    fn product(committed: i64, changes: i64) -> (String, Map<String, Value>) {
        row(
            "products",
            json!({"sku": "a", "committed": committed, "changes": changes}),
        )
    }

    #[test]
    fn a_column_that_differs_is_named_with_its_row() {
        let expected = expected(vec![line(3), product(9, 4)]);
        let Comparison { rows, differences, .. } = hold_against(&expected, vec![product(9, 4), line(2)], true);
        assert_eq!(rows, 2);
        assert_eq!(
            differences,
            [Difference {
                table: "order_lines".to_owned(),
                key: json!({"order_id": "7", "sku": "a"}),
                column: "shipped_quantity".to_owned(),
                expected: json!(3),
                found: json!(2),
            }]
        );
    }

    #[test]
    fn what_others_have_changed_says_nothing() {
        let expected = expected(vec![line(3), product(9, 4)]);
        let made = hold_against(&expected, vec![line(4), product(8, 5)], false);
        let nothing = Comparison {
            rows: 0,
            overtaken: 2,
            differences: Vec::new(),
        };
        assert_eq!(made, nothing);
    }

    #[test]
    fn a_row_that_only_one_side_has_differs_as_a_whole() {
        let entry = row("order_timeline", json!({"event_id": "e", "units": 3}));
        let other = row("order_timeline", json!({"event_id": "f", "units": 3}));
        let Comparison { differences, .. } = hold_against(&expected(vec![entry]), vec![other], false);
        let columns: Vec<&str> = differences.iter().map(|difference| &*difference.column).collect();
        assert_eq!(columns, ["*", "*"]);
    }
}
