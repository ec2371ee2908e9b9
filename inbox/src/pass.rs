use sqlx::{PgPool, PgTransaction};

use crate::{
    handler::{Handler, HandlerError},
    operator::{Actor, Operator},
    ordering::Key,
    table::Table,
};

/// Lets keys go on without events that will never come. A handle that may be cloned and kept.
#[derive(Debug, Clone)]
pub struct Pass<H> {
    pub(crate) table: Table,
    pub(crate) pool: PgPool,
    pub(crate) operator: Operator,
    pub(crate) handler: H,
}

/// Why a key does not go on. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub enum PassError {
    #[error("the key does not wait for an event that has not come")]
    NotWaiting,
    #[error("the event with sequence {waits} has come and would be passed over; skip it if it shall not take effect")]
    WouldPassParked { waits: i64 },
    /// By the handler's word: it has nothing that could go on.
    #[error("nothing is known of the aggregate, so its first event is needed")]
    Unknown,
    #[error(transparent)]
    Handler(#[from] HandlerError),
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

impl<H: Handler> Pass<H> {
    /// The key's events before `sequence` that have not come count as passed over, and it goes on with `sequence`. One of them that
    /// comes after all is a duplicate.
    ///
    /// # Errors
    /// [`PassError`].
    pub async fn to(&self, key: &Key, sequence: i64, actor: Actor<'_>) -> Result<(), PassError> {
        let mut transaction = self.pool.begin().await?;
        let waits = self.lock_waiting(&mut transaction, key).await?;
        let waits = waits.ok_or(PassError::NotWaiting)?;
        if sequence > waits {
            return Err(PassError::WouldPassParked { waits });
        }
        if !self.handler.pass_to(&mut transaction, key, sequence).await? {
            return Err(PassError::Unknown);
        }
        self.table.settle(&mut transaction, &[key.clone()].into()).await?;
        let (aggregate_type, aggregate_id) = key;
        let target = serde_json::json!({ "aggregate_type": aggregate_type, "aggregate_id": aggregate_id, "to_sequence": sequence });
        self.operator
            .note(&mut transaction, "pass", &target.to_string(), actor)
            .await?;
        transaction.commit().await?;
        Ok(())
    }

    /// The sequence of the event that a waiting key is held by.
    async fn lock_waiting(
        &self,
        transaction: &mut PgTransaction<'_>,
        (aggregate_type, aggregate_id): &Key,
    ) -> Result<Option<i64>, sqlx::Error> {
        sqlx::query_scalar(self.table.sql(
            "SELECT sequence FROM {schema}.held_keys
              WHERE consumer = $1 AND aggregate_type = $2 AND aggregate_id = $3 AND state = 'waiting' FOR UPDATE",
        ))
        .bind(self.table.consumer())
        .bind(aggregate_type)
        .bind(aggregate_id)
        .fetch_optional(&mut **transaction)
        .await
    }
}
