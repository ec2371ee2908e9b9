use std::{collections::HashSet, sync::Arc};

use sqlx::{AssertSqlSafe, PgTransaction};
use uuid::Uuid;

use super::Table;
use crate::handler::IncomingEvent;

/// For [`rows`], which writes these columns in this order.
pub(super) fn copy_statement(schema: &str) -> String {
    format!(
        "COPY {schema}.inbox (consumer, event_id, aggregate_type, aggregate_id, sequence, topic, partition, record_offset)
         FROM STDIN (FORMAT BINARY)"
    )
}

impl Table {
    /// Inserts the rows of all events at once and returns the ids that are new. An id that is missing has taken effect
    /// before, or is taking effect right now in another transaction, which this one has then waited for.
    ///
    /// # Errors
    /// Any database error; the transaction is then of no use.
    pub async fn claim(
        &self,
        transaction: &mut PgTransaction<'_>,
        events: &[IncomingEvent],
    ) -> Result<HashSet<Uuid>, sqlx::Error> {
        let count = events.len();
        let mut ids = Vec::with_capacity(count);
        let mut aggregate_types = Vec::with_capacity(count);
        let mut aggregate_ids = Vec::with_capacity(count);
        let mut sequences = Vec::with_capacity(count);
        let mut topics = Vec::with_capacity(count);
        let mut partitions = Vec::with_capacity(count);
        let mut offsets = Vec::with_capacity(count);
        for IncomingEvent { envelope, position, .. } in events {
            ids.push(envelope.id);
            aggregate_types.push(envelope.aggregate_type.as_str());
            aggregate_ids.push(envelope.aggregate_id.as_str());
            sequences.push(envelope.sequence);
            topics.push(&*position.topic);
            partitions.push(position.partition);
            offsets.push(position.offset);
        }
        let claimed: Vec<(Uuid,)> = sqlx::query_as(AssertSqlSafe(Arc::clone(&self.claim)))
            .bind(&*self.consumer)
            .bind(ids)
            .bind(aggregate_types)
            .bind(aggregate_ids)
            .bind(sequences)
            .bind(topics)
            .bind(partitions)
            .bind(offsets)
            .fetch_all(&mut **transaction)
            .await?;
        Ok(claimed.into_iter().map(|(id,)| id).collect())
    }

    /// Inserts the rows of events that are all expected to be new, as one stream of rows: half of the server's work for
    /// [`Table::claim`], which has to be able to pass over a row. `false` if one of them has taken effect before, or is
    /// twice among them: the transaction is then of no use, and neither are its rows until they are vacuumed away.
    ///
    /// # Errors
    /// Any other database error; the transaction is then of no use.
    pub(crate) async fn claim_new(
        &self,
        transaction: &mut PgTransaction<'_>,
        events: &[IncomingEvent],
    ) -> Result<bool, sqlx::Error> {
        let mut stream = transaction.copy_in_raw(&self.claim_new).await?;
        stream.send(rows(&self.consumer, events)).await?;
        match stream.finish().await {
            Ok(_) => Ok(true),
            Err(sqlx::Error::Database(error)) if error.is_unique_violation() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Takes back claims of this transaction: those events did not take effect and must be free to come again.
    ///
    /// # Errors
    /// Any database error; the transaction is then of no use.
    pub async fn release(&self, transaction: &mut PgTransaction<'_>, ids: &[Uuid]) -> Result<(), sqlx::Error> {
        if ids.is_empty() {
            return Ok(());
        }
        sqlx::query(AssertSqlSafe(Arc::clone(&self.release)))
            .bind(&*self.consumer)
            .bind(ids)
            .execute(&mut **transaction)
            .await?;
        Ok(())
    }
}

/// The rows in the binary format of COPY (PostgreSQL, "COPY", section "Binary Format"): in id order, as `claim.sql` says why.
fn rows(consumer: &str, events: &[IncomingEvent]) -> Vec<u8> {
    const SIGNATURE: &[u8] = b"PGCOPY\n\xff\r\n\0";
    const NO_FLAGS_NO_EXTENSION: [u8; 8] = [0; 8];
    const END: i16 = -1;
    let columns: i16 = 8;
    let mut in_order: Vec<&IncomingEvent> = events.iter().collect();
    in_order.sort_unstable_by_key(|event| event.envelope.id);
    let mut rows = Vec::with_capacity(events.len() * 192);
    rows.extend(SIGNATURE);
    rows.extend(NO_FLAGS_NO_EXTENSION);
    for IncomingEvent { envelope, position, .. } in in_order {
        rows.extend(columns.to_be_bytes());
        for field in [
            consumer.as_bytes(),
            envelope.id.as_bytes(),
            envelope.aggregate_type.as_bytes(),
            envelope.aggregate_id.as_bytes(),
            &envelope.sequence.to_be_bytes(),
            position.topic.as_bytes(),
            &position.partition.to_be_bytes(),
            &position.offset.to_be_bytes(),
        ] {
            // Names are short, and no record is larger than the broker takes.
            rows.extend((field.len() as i32).to_be_bytes());
            rows.extend(field);
        }
    }
    rows.extend(END.to_be_bytes());
    rows
}
