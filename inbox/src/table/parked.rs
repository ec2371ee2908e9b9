use sqlx::{Arguments, FromRow, PgTransaction, postgres::PgArguments};
use uuid::Uuid;

use super::{
    Table,
    records::{self, StoredRecord},
};
use crate::{crash_point, decode::History, handler::IncomingEvent, ordering::Key, queue::Record};

/// An event to be parked, with the record it came in.
pub(crate) struct Parked<'a> {
    pub(crate) event: &'a IncomingEvent,
    pub(crate) record: &'a Record,
    pub(crate) history: &'a History,
}

/// An event that waits, as its row has it.
#[derive(Debug, FromRow)]
pub(crate) struct ParkedRow {
    pub(crate) event_id: Uuid,
    /// It shall not take effect: its key goes on without it.
    pub(crate) skip: bool,
    #[sqlx(flatten)]
    pub(crate) record: StoredRecord,
}

impl Table {
    /// Parks events behind their keys, whose rows stand and are locked. Returns each key's number of parked events.
    pub(crate) async fn park(
        &self,
        transaction: &mut PgTransaction<'_>,
        parked: &[Parked<'_>],
    ) -> Result<Vec<(Key, i64)>, sqlx::Error> {
        if parked.is_empty() {
            return Ok(Vec::new());
        }
        let envelopes = || parked.iter().map(|parked| &parked.event.envelope);
        let mut arguments = PgArguments::default();
        let added = [
            arguments.add(&*self.consumer),
            arguments.add(envelopes().map(|envelope| envelope.id).collect::<Vec<_>>()),
            arguments.add(
                envelopes()
                    .map(|envelope| envelope.aggregate_type.as_str())
                    .collect::<Vec<_>>(),
            ),
            arguments.add(
                envelopes()
                    .map(|envelope| envelope.aggregate_id.as_str())
                    .collect::<Vec<_>>(),
            ),
            arguments.add(envelopes().map(|envelope| envelope.sequence).collect::<Vec<_>>()),
            arguments.add(
                envelopes()
                    .map(|envelope| envelope.event_type.as_str())
                    .collect::<Vec<_>>(),
            ),
        ];
        added
            .into_iter()
            .collect::<Result<(), _>>()
            .map_err(sqlx::Error::Encode)?;
        let records = parked
            .iter()
            .map(|parked| (parked.record, parked.history, parked.event.position.partition));
        records::add(&mut arguments, records)?;
        let rows: Vec<(String, String, i64)> =
            sqlx::query_as_with(self.sql(include_str!("park_events.sql")), arguments)
                .fetch_all(&mut **transaction)
                .await?;
        crash_point::PARK_AFTER.reached();
        Ok(rows
            .into_iter()
            .map(|(aggregate_type, aggregate_id, parked)| ((aggregate_type, aggregate_id), parked))
            .collect())
    }

    /// Locks a key that is to be let go and that nobody else works on: the one given, or the longest-waiting.
    pub(crate) async fn lock_releasing(
        &self,
        transaction: &mut PgTransaction<'_>,
        key: Option<&Key>,
    ) -> Result<Option<Key>, sqlx::Error> {
        let (aggregate_type, aggregate_id) = key.map(|(kind, id)| (kind.as_str(), id.as_str())).unzip();
        sqlx::query_as(self.sql(
            "SELECT aggregate_type, aggregate_id FROM {schema}.held_keys
              WHERE consumer = $1 AND state = 'releasing'
                AND ($2::text IS NULL OR (aggregate_type = $2 AND aggregate_id = $3))
              ORDER BY changed_at LIMIT 1
              FOR UPDATE SKIP LOCKED",
        ))
        .bind(&*self.consumer)
        .bind(aggregate_type)
        .bind(aggregate_id)
        .fetch_optional(&mut **transaction)
        .await
    }

    /// The first events parked behind a key, in sequence, as far as no dead letter stands before them.
    pub(crate) async fn first_parked(
        &self,
        transaction: &mut PgTransaction<'_>,
        (aggregate_type, aggregate_id): &Key,
        most: i64,
    ) -> Result<Vec<ParkedRow>, sqlx::Error> {
        sqlx::query_as(self.sql(
            "SELECT event_id, skip, origin_topic, origin_partition, origin_offset, origin_timestamp_ms, attempts, partition,
                    record_key, record_value, header_names, header_values
               FROM {schema}.parked_events
              WHERE consumer = $1 AND aggregate_type = $2 AND aggregate_id = $3
                AND sequence < coalesce((SELECT min(sequence) FROM {schema}.dead_letters
                                          WHERE consumer = $1 AND aggregate_type = $2 AND aggregate_id = $3
                                            AND state = 'open' AND holds),
                                        9223372036854775807)
              ORDER BY sequence, origin_offset
              LIMIT $4",
        ))
        .bind(&*self.consumer)
        .bind(aggregate_type)
        .bind(aggregate_id)
        .bind(most)
        .fetch_all(&mut **transaction)
        .await
    }

    /// Takes events out from behind their key, whose row is locked. Returns how many.
    pub(crate) async fn unpark(
        &self,
        transaction: &mut PgTransaction<'_>,
        (aggregate_type, aggregate_id): &Key,
        ids: &[Uuid],
    ) -> Result<u64, sqlx::Error> {
        if ids.is_empty() {
            return Ok(0);
        }
        let unparked =
            sqlx::query(self.sql("DELETE FROM {schema}.parked_events WHERE consumer = $1 AND event_id = ANY($2)"))
                .bind(&*self.consumer)
                .bind(ids)
                .execute(&mut **transaction)
                .await?
                .rows_affected();
        sqlx::query(self.sql(
            "UPDATE {schema}.held_keys SET parked = parked - $4
              WHERE consumer = $1 AND aggregate_type = $2 AND aggregate_id = $3",
        ))
        .bind(&*self.consumer)
        .bind(aggregate_type)
        .bind(aggregate_id)
        .bind(i64::try_from(unparked).unwrap_or(i64::MAX))
        .execute(&mut **transaction)
        .await?;
        Ok(unparked)
    }
}
