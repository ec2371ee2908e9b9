use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    time::Duration,
};

use sqlx::{Arguments, PgPool, PgTransaction, postgres::PgArguments};
use uuid::Uuid;

use super::{Table, records};
use crate::{
    crash_point,
    decode::History,
    failure::Class,
    fingerprint::fingerprint,
    handler::{IncomingEvent, Reason},
    record::Record,
};

/// A try that failed.
pub(crate) struct Failed<'a> {
    /// `None` if the record could not be read.
    pub(crate) event: Option<&'a IncomingEvent>,
    pub(crate) record: &'a Record,
    pub(crate) history: &'a History,
    pub(crate) topic: &'a str,
    pub(crate) partition: i32,
    pub(crate) class: Class,
    pub(crate) reason: &'a Reason,
    /// Set if it is a dead letter now: whether it holds its key.
    pub(crate) dead: Option<bool>,
}

impl Table {
    /// Notes tries that failed, and keeps the records of those that are dead letters now.
    pub(crate) async fn note_failures(
        &self,
        transaction: &mut PgTransaction<'_>,
        failed: &[Failed<'_>],
        consumer_version: &str,
    ) -> Result<(), sqlx::Error> {
        let events: Vec<(&IncomingEvent, &Failed<'_>)> = failed
            .iter()
            .filter_map(|failed| Some((failed.event?, failed)))
            .collect();
        if !events.is_empty() {
            let attempt = |failed: &Failed<'_>| i32::try_from(failed.history.attempts.saturating_add(1));
            sqlx::query(self.sql(
                "INSERT INTO {schema}.failed_attempts
                     (consumer, event_id, attempt, topic, partition, error_class, error_type, error_message, consumer_version)
                 SELECT $1, attempt.*, $9
                 FROM unnest($2::uuid[], $3::integer[], $4::text[], $5::integer[], $6::text[], $7::text[], $8::text[]) AS attempt",
            ))
            .bind(&*self.consumer)
            .bind(events.iter().map(|(event, _)| event.envelope.id).collect::<Vec<Uuid>>())
            .bind(events.iter().map(|(_, failed)| attempt(failed).unwrap_or(i32::MAX)).collect::<Vec<_>>())
            .bind(events.iter().map(|(_, failed)| failed.topic).collect::<Vec<_>>())
            .bind(events.iter().map(|(_, failed)| failed.partition).collect::<Vec<_>>())
            .bind(events.iter().map(|(_, failed)| failed.class.as_str()).collect::<Vec<_>>())
            .bind(events.iter().map(|(_, failed)| &*failed.reason.error_type).collect::<Vec<_>>())
            .bind(events.iter().map(|(_, failed)| failed.reason.message.as_str()).collect::<Vec<_>>())
            .bind(consumer_version)
            .execute(&mut **transaction)
            .await?;
        }
        let dead: Vec<&Failed<'_>> = failed.iter().filter(|failed| failed.dead.is_some()).collect();
        if dead.is_empty() {
            return Ok(());
        }
        let envelopes = || dead.iter().map(|dead| dead.event.map(|event| &event.envelope));
        let reasons = || dead.iter().map(|dead| dead.reason);
        let mut arguments = PgArguments::default();
        let added = [
            arguments.add(&*self.consumer),
            arguments.add(envelopes().map(|envelope| Some(envelope?.id)).collect::<Vec<_>>()),
            arguments.add(
                envelopes()
                    .map(|envelope| Some(envelope?.aggregate_type.as_str()))
                    .collect::<Vec<_>>(),
            ),
            arguments.add(
                envelopes()
                    .map(|envelope| Some(envelope?.aggregate_id.as_str()))
                    .collect::<Vec<_>>(),
            ),
            arguments.add(envelopes().map(|envelope| Some(envelope?.sequence)).collect::<Vec<_>>()),
            arguments.add(
                envelopes()
                    .map(|envelope| Some(envelope?.event_type.as_str()))
                    .collect::<Vec<_>>(),
            ),
            arguments.add(dead.iter().map(|dead| dead.class.as_str()).collect::<Vec<_>>()),
            arguments.add(reasons().map(|reason| &*reason.error_type).collect::<Vec<_>>()),
            arguments.add(reasons().map(|reason| reason.message.as_str()).collect::<Vec<_>>()),
            arguments.add(
                reasons()
                    .map(|reason| fingerprint(&reason.error_type, &reason.message))
                    .collect::<Vec<_>>(),
            ),
            arguments.add(consumer_version),
        ];
        added
            .into_iter()
            .collect::<Result<(), _>>()
            .map_err(sqlx::Error::Encode)?;
        records::add(
            &mut arguments,
            dead.iter().map(|dead| (dead.record, dead.history, dead.partition)),
        )?;
        let holds: Vec<bool> = dead.iter().map(|dead| dead.dead.unwrap_or_default()).collect();
        arguments.add(holds).map_err(sqlx::Error::Encode)?;
        sqlx::query_with(self.sql(include_str!("bury.sql")), arguments)
            .execute(&mut **transaction)
            .await?;
        crash_point::LETTER_AFTER.reached();
        Ok(())
    }

    /// Of these events, those that are dead letters which let their key go on, and why they died.
    pub(crate) async fn let_go_on(
        &self,
        transaction: &mut PgTransaction<'_>,
        ids: &[Uuid],
    ) -> Result<HashMap<Uuid, Reason>, sqlx::Error> {
        let letters: Vec<(Uuid, String, String)> = sqlx::query_as(self.sql(
            "SELECT id, error_type, error_message FROM {schema}.dead_letters
              WHERE consumer = $1 AND id = ANY($2) AND state = 'open' AND NOT holds",
        ))
        .bind(&*self.consumer)
        .bind(ids)
        .fetch_all(&mut **transaction)
        .await?;
        let reason = |(id, error_type, message)| {
            let error_type = Cow::Owned(error_type);
            (id, Reason { error_type, message })
        };
        Ok(letters.into_iter().map(reason).collect())
    }

    /// Of these events, those that are dead letters which let their key go on, redriven or not, and whose event has not taken
    /// effect.
    pub(crate) async fn without_effect(
        &self,
        transaction: &mut PgTransaction<'_>,
        ids: &[Uuid],
    ) -> Result<HashSet<Uuid>, sqlx::Error> {
        let dead: Vec<(Uuid,)> = sqlx::query_as(self.sql(
            "SELECT id FROM {schema}.dead_letters
              WHERE consumer = $1 AND id = ANY($2) AND state <> 'resolved' AND NOT holds",
        ))
        .bind(&*self.consumer)
        .bind(ids)
        .fetch_all(&mut **transaction)
        .await?;
        Ok(dead.into_iter().map(|(id,)| id).collect())
    }

    /// Dead letters whose event has taken effect after all, or shall not any more.
    pub(crate) async fn resolve(&self, transaction: &mut PgTransaction<'_>, ids: &[Uuid]) -> Result<(), sqlx::Error> {
        if ids.is_empty() {
            return Ok(());
        }
        sqlx::query(self.sql(
            "UPDATE {schema}.dead_letters SET state = 'resolved', resolved_at = clock_timestamp()
              WHERE consumer = $1 AND id = ANY($2) AND state <> 'resolved'",
        ))
        .bind(&*self.consumer)
        .bind(ids)
        .execute(&mut **transaction)
        .await?;
        Ok(())
    }

    /// Deletes letters that have been archived for this long, and their failed attempts, at most `most`; returns how many. Any
    /// instance may do it at any time.
    pub(crate) async fn delete_archived(
        &self,
        pool: &PgPool,
        retention: Duration,
        most: u32,
    ) -> Result<u32, sqlx::Error> {
        let deleted: i64 = sqlx::query_scalar(self.sql(include_str!("delete_archived.sql")))
            .bind(&*self.consumer)
            .bind(retention.as_secs_f64())
            .bind(i64::from(most))
            .fetch_one(pool)
            .await?;
        Ok(u32::try_from(deleted).unwrap_or(u32::MAX))
    }
}
