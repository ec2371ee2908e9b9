use std::{collections::BTreeMap, time::Duration};

use serde_json::{Map, Value};
use shared_events::Rejection;
use sqlx::{Connection, FromRow, PgConnection, PgPool, PgTransaction};
use uuid::Uuid;

use crate::{
    decode,
    failure::{Class, classify},
    handler::{Handler, IncomingEvent, Outcome, Position, Row},
    partition::failed,
    process::{BatchError, ask_handler, keep_dead},
    table::Table,
};

/// Tries dead letters as the releaser would, in transactions that are always rolled back. A handle that may be cloned and kept.
#[derive(Debug, Clone)]
pub struct DryRun<H> {
    pub(crate) table: Table,
    pub(crate) pool: PgPool,
    pub(crate) handler: H,
    pub(crate) transaction_limit: Duration,
}

/// What a letter would do if it were redriven now, and nothing else happened meanwhile.
#[derive(Debug, Clone, PartialEq)]
pub struct Tried {
    pub outcome: Outcome,
    /// By table and key.
    pub changes: Vec<RowChange>,
}

/// A row that would change: of its columns those that would. The whole row where it would come or go.
#[derive(Debug, Clone, PartialEq)]
pub struct RowChange {
    pub table: &'static str,
    pub key: Map<String, Value>,
    /// `None`: it would be new.
    pub before: Option<Map<String, Value>>,
    /// `None`: it would be gone.
    pub after: Option<Map<String, Value>>,
}

/// Why a letter could not be tried.
#[derive(Debug, thiserror::Error)]
pub enum DryRunError {
    #[error("there is no such dead letter")]
    NotFound,
    /// The platform's fault, not the letter's.
    #[error("the letter could not be tried: {0}")]
    Platform(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl From<BatchError> for DryRunError {
    fn from(error: BatchError) -> Self {
        Self::Platform(error.into())
    }
}

#[derive(FromRow)]
struct StoredValue {
    record_value: Option<Vec<u8>>,
    origin_topic: String,
    origin_partition: i32,
    origin_offset: i64,
}

impl<H: Handler> DryRun<H> {
    /// What a letter would do now, whatever its state. Do not cancel it from outside, as with any transaction here.
    ///
    /// # Errors
    /// [`DryRunError`].
    pub async fn letter(&self, id: Uuid) -> Result<Tried, DryRunError> {
        let mut connection = self.pool.acquire().await.map_err(BatchError::Begin)?;
        let tried = tokio::time::timeout(self.transaction_limit, self.try_letter(&mut connection, id));
        match tried.await {
            Ok(result) => result,
            Err(_) => {
                // As in `Process::process`.
                drop(connection.detach());
                Err(BatchError::TimedOut(self.transaction_limit).into())
            }
        }
    }

    async fn try_letter(&self, connection: &mut PgConnection, id: Uuid) -> Result<Tried, DryRunError> {
        let stored: Option<StoredValue> = sqlx::query_as(self.table.sql(
            "SELECT record_value, origin_topic, origin_partition, origin_offset
               FROM {schema}.dead_letters WHERE consumer = $1 AND id = $2",
        ))
        .bind(self.table.consumer())
        .bind(id)
        .fetch_optional(&mut *connection)
        .await
        .map_err(BatchError::Inbox)?;
        let stored = stored.ok_or(DryRunError::NotFound)?;
        let envelope = match decode::decode(stored.record_value.as_deref()) {
            Ok(envelope) => envelope,
            Err(rejection) => return Ok(without_effect(Outcome::DeadLetter(rejection.into()))),
        };
        if !self.handler.takes(&envelope) {
            let unknown = Rejection::UnknownType(envelope.event_type);
            return Ok(without_effect(Outcome::DeadLetter(unknown.into())));
        }
        let event = IncomingEvent {
            envelope,
            position: Position {
                topic: stored.origin_topic.as_str().into(),
                partition: stored.origin_partition,
                offset: stored.origin_offset,
            },
            traceparent: None,
        };
        let mut transaction = connection.begin().await.map_err(BatchError::Begin)?;
        let tried = self.try_event(&mut transaction, event).await;
        transaction.rollback().await.map_err(BatchError::Inbox)?;
        match tried {
            Ok(tried) => Ok(tried),
            Err(error) if classify(&error) == Class::Platform => Err(error.into()),
            Err(error) => Ok(without_effect(failed(&error))),
        }
    }

    async fn try_event(&self, transaction: &mut PgTransaction<'_>, event: IncomingEvent) -> Result<Tried, BatchError> {
        let events = [event];
        let claimed = self.table.claim(transaction, &events).await;
        if claimed.map_err(BatchError::Inbox)?.is_empty() {
            return Ok(without_effect(Outcome::Duplicate));
        }
        let [event] = &events;
        let before = self.handler.rows(transaction, event).await;
        let before = before.map_err(BatchError::Handler)?;
        let mut outcomes = ask_handler(&self.handler, transaction, &events).await?;
        keep_dead(&self.table, transaction, &events, &mut outcomes).await?;
        let after = self.handler.rows(transaction, event).await;
        let after = after.map_err(BatchError::Handler)?;
        Ok(Tried {
            outcome: outcomes.remove(0),
            changes: changes(before, after),
        })
    }
}

fn without_effect(outcome: Outcome) -> Tried {
    Tried {
        outcome,
        changes: Vec::new(),
    }
}

/// What differs between two looks at the same rows.
fn changes(before: Vec<Row>, after: Vec<Row>) -> Vec<RowChange> {
    let by_key = |rows: Vec<Row>| -> BTreeMap<(&'static str, String), Row> {
        let name = |row: &Row| (row.table, Value::Object(row.key.clone()).to_string());
        rows.into_iter().map(|row| (name(&row), row)).collect()
    };
    let (mut before, after) = (by_key(before), by_key(after));
    let mut changes = BTreeMap::new();
    for (name, new) in after {
        let change = match before.remove(&name) {
            None => (None, Some(new.columns)),
            Some(old) if old.columns == new.columns => continue,
            Some(old) => {
                let only = |columns: &Map<String, Value>, others: &Map<String, Value>| {
                    let differs = |(column, value): &(&String, &Value)| others.get(*column) != Some(*value);
                    let differing = columns.iter().filter(differs);
                    differing
                        .map(|(column, value)| (column.clone(), value.clone()))
                        .collect()
                };
                let (old, new) = (only(&old.columns, &new.columns), only(&new.columns, &old.columns));
                (Some(old), Some(new))
            }
        };
        changes.insert(name, (new.key, change));
    }
    for (name, gone) in before {
        changes.insert(name, (gone.key, (Some(gone.columns), None)));
    }
    changes
        .into_iter()
        .map(|((table, _), (key, (before, after)))| RowChange {
            table,
            key,
            before,
            after,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn row(id: i64, amount: i64) -> Row {
        let object = |value: Value| value.as_object().cloned().unwrap_or_default();
        Row {
            table: "things",
            key: object(json!({"id": id})),
            columns: object(json!({"id": id, "amount": amount, "name": "x"})),
        }
    }

    #[test]
    fn only_rows_and_columns_that_differ_are_changes() {
        let found = changes(
            vec![row(1, 5), row(2, 7), row(3, 1)],
            vec![row(2, 8), row(3, 1), row(4, 2)],
        );
        let shown: Vec<Value> = found
            .into_iter()
            .map(|change| json!([change.key, change.before, change.after]))
            .collect();
        assert_eq!(
            shown,
            [
                json!([{"id": 1}, {"id": 1, "amount": 5, "name": "x"}, null]),
                json!([{"id": 2}, {"amount": 7}, {"amount": 8}]),
                json!([{"id": 4}, null, {"id": 4, "amount": 2, "name": "x"}]),
            ]
        );
    }
}
