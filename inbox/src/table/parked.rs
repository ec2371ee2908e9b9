use std::collections::HashSet;

use sqlx::{Arguments, FromRow, PgPool, PgTransaction, postgres::PgArguments};
use uuid::Uuid;

use super::{
    Table,
    records::{self, StoredRecord},
};
use crate::{crash_point, decode::History, handler::IncomingEvent, ordering::Key, record::Record};

/// An event to be parked, with the record it came in.
pub(crate) struct Parked<'a> {
    pub(crate) event: &'a IncomingEvent,
    pub(crate) record: &'a Record,
    pub(crate) history: &'a History,
}

/// An event that waits, as its row has it.
#[derive(Debug, FromRow)]
pub(crate) struct ParkedRow {
    /// Of its key among those asked for, from 1.
    pub(crate) place: i64,
    pub(crate) event_id: Uuid,
    pub(crate) event_type: String,
    pub(crate) sequence: i64,
    /// It shall not take effect: its key goes on without it.
    pub(crate) skip: bool,
    /// It has failed, which is noted; its record is still to be sent.
    pub(crate) failed: bool,
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

    /// Locks keys that are to be let go and that nobody else works on: those chosen, or without any the longest-waiting ones,
    /// at most `most`.
    pub(crate) async fn lock_releasing(
        &self,
        transaction: &mut PgTransaction<'_>,
        chosen: impl Iterator<Item = &Key>,
        left_out: &HashSet<Key>,
        most: u32,
    ) -> Result<Vec<Key>, sqlx::Error> {
        let (types, ids) = columns(chosen);
        let (types_left_out, ids_left_out) = columns(left_out.iter());
        sqlx::query_as(self.sql(
            "SELECT aggregate_type, aggregate_id FROM {schema}.held_keys
              WHERE consumer = $1 AND state = 'releasing'
                AND (cardinality($2::text[]) = 0 OR (aggregate_type, aggregate_id) IN (SELECT * FROM unnest($2, $3::text[])))
                AND (aggregate_type, aggregate_id) NOT IN (SELECT * FROM unnest($4::text[], $5::text[]))
              ORDER BY changed_at LIMIT $6
              FOR UPDATE SKIP LOCKED",
        ))
        .bind(&*self.consumer)
        .bind(types)
        .bind(ids)
        .bind(types_left_out)
        .bind(ids_left_out)
        .bind(i64::from(most))
        .fetch_all(&mut **transaction)
        .await
    }

    /// Puts a key that is to be let go behind the others.
    pub(crate) async fn put_back(
        &self,
        pool: &PgPool,
        (aggregate_type, aggregate_id): &Key,
    ) -> Result<(), sqlx::Error> {
        sqlx::query(self.sql(
            "UPDATE {schema}.held_keys SET changed_at = clock_timestamp()
              WHERE consumer = $1 AND aggregate_type = $2 AND aggregate_id = $3 AND state = 'releasing'",
        ))
        .bind(&*self.consumer)
        .bind(aggregate_type)
        .bind(aggregate_id)
        .execute(pool)
        .await?;
        Ok(())
    }

    /// The first events parked behind these keys, key by key, in sequence, as far as no dead letter stands before them; at
    /// most `most` of all of them. One whose own record is still to be sent is not behind its letter.
    pub(crate) async fn first_parked(
        &self,
        transaction: &mut PgTransaction<'_>,
        keys: &[Key],
        most: u32,
    ) -> Result<Vec<ParkedRow>, sqlx::Error> {
        let (types, ids) = columns(keys.iter());
        sqlx::query_as(self.sql(
            "SELECT key.place, first.*
               FROM unnest($2::text[], $3::text[]) WITH ORDINALITY AS key (aggregate_type, aggregate_id, place),
                    LATERAL (SELECT event_id, event_type, sequence, skip, failed, origin_topic, origin_partition,
                                    origin_offset, origin_timestamp_ms, attempts, partition, record_key, record_value,
                                    header_names, header_values
                               FROM {schema}.parked_events AS parked
                              WHERE parked.consumer = $1 AND parked.aggregate_type = key.aggregate_type
                                AND parked.aggregate_id = key.aggregate_id
                                AND (parked.failed OR parked.sequence <
                                     coalesce((SELECT min(sequence) FROM {schema}.dead_letters AS letter
                                                WHERE letter.consumer = $1 AND letter.aggregate_type = key.aggregate_type
                                                  AND letter.aggregate_id = key.aggregate_id
                                                  AND letter.state = 'open' AND letter.holds),
                                              9223372036854775807))
                              ORDER BY sequence, origin_offset
                              LIMIT $4) AS first
              ORDER BY key.place, first.sequence, first.origin_offset
              LIMIT $4",
        ))
        .bind(&*self.consumer)
        .bind(types)
        .bind(ids)
        .bind(i64::from(most))
        .fetch_all(&mut **transaction)
        .await
    }

    /// Their failures are noted in this transaction; their records are to be sent on.
    pub(crate) async fn mark_failed(
        &self,
        transaction: &mut PgTransaction<'_>,
        ids: &[Uuid],
    ) -> Result<(), sqlx::Error> {
        if ids.is_empty() {
            return Ok(());
        }
        sqlx::query(self.sql(
            "UPDATE {schema}.parked_events SET failed = true WHERE consumer = $1 AND event_id = ANY($2) AND NOT failed",
        ))
        .bind(&*self.consumer)
        .bind(ids)
        .execute(&mut **transaction)
        .await?;
        Ok(())
    }

    /// Takes events out from behind their keys, whose rows are locked; or of them only those that have failed. Returns how
    /// many.
    pub(crate) async fn unpark(
        &self,
        transaction: &mut PgTransaction<'_>,
        ids: &[Uuid],
        only_failed: bool,
    ) -> Result<u64, sqlx::Error> {
        if ids.is_empty() {
            return Ok(0);
        }
        let unparked: i64 = sqlx::query_scalar(self.sql(
            "WITH unparked AS (
                 DELETE FROM {schema}.parked_events
                  WHERE consumer = $1 AND event_id = ANY($2) AND (failed OR NOT $3)
              RETURNING aggregate_type, aggregate_id
             ), counted AS (
                 SELECT aggregate_type, aggregate_id, count(*) AS unparked FROM unparked GROUP BY aggregate_type, aggregate_id
             ), held AS (
                 UPDATE {schema}.held_keys AS held SET parked = held.parked - counted.unparked
                   FROM counted
                  WHERE held.consumer = $1 AND held.aggregate_type = counted.aggregate_type
                    AND held.aggregate_id = counted.aggregate_id
             )
             SELECT count(*) FROM unparked",
        ))
        .bind(&*self.consumer)
        .bind(ids)
        .bind(only_failed)
        .fetch_one(&mut **transaction)
        .await?;
        Ok(u64::try_from(unparked).unwrap_or_default())
    }
}

/// Keys as two columns.
pub(super) fn columns<'a>(keys: impl Iterator<Item = &'a Key>) -> (Vec<&'a str>, Vec<&'a str>) {
    keys.map(|(aggregate_type, aggregate_id)| (aggregate_type.as_str(), aggregate_id.as_str()))
        .unzip()
}
