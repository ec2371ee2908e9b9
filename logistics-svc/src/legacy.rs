//! The synchronous path: commerce's own code in the transaction of the change. The one place where this service knows the other;
//! without this file and the feature `legacy` it does not.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Context;
use commerce_consumer::{
    apply_shipment::ApplyShipment,
    comparison::{self, Expected},
    schema::{MIGRATOR, SCHEMA},
    tables,
};
use inbox::{HandlerError, Outcome, Synchronous, Table, UnknownTypes, synchronous::WITHOUT_RECORD};
use opentelemetry::{KeyValue, metrics::Counter};
use outbox::NewEvent;
use shared_events::{Envelope, shipment::ShipmentEvent};
use sqlx::{Connection, PgConnection, PgPool, PgTransaction};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::tables::shadow::{self, Expectation, Mismatch};

/// Commerce's rights, taken for its own statements only. It ends with the transaction or the savepoint.
const AS_COMMERCE: &str = "SET LOCAL ROLE commerce_svc";
/// The same for a change: what is locked there fails it soon, and not the requests behind it.
const CHANGE: &str = "SET LOCAL lock_timeout = '2s'; SET LOCAL ROLE commerce_svc";
const AS_LOGISTICS: &str = "SET LOCAL ROLE NONE";
/// A trial is worth no more than a moment of the request's time.
const TRIAL: &str =
    "SET LOCAL lock_timeout = '50ms'; SET LOCAL statement_timeout = '250ms'; SET LOCAL ROLE commerce_svc";
/// Most trials of one transaction, each of a few statements; and how long they may take together.
const MOST_TRIALS: usize = 20;
const TRIALS_WITHIN: Duration = Duration::from_millis(250);
/// Most expectations of one round.
const ROUND: i64 = 200;
/// What commerce has not applied after so long is not waited for any more.
const WAITS: Duration = Duration::from_secs(15 * 60);

/// Commerce's part of a change, done by this service.
#[derive(Debug)]
pub(crate) struct Legacy {
    path: Synchronous<ApplyShipment>,
    group: String,
    events: Counter<u64>,
    /// Up to where the expectations have been looked at.
    looked_to: Mutex<OffsetDateTime>,
}

impl Legacy {
    /// `group` is the consumer group under whose name commerce keeps its inbox.
    ///
    /// # Errors
    /// None that this service's constants could cause.
    pub(crate) fn new(group: &str) -> anyhow::Result<Self> {
        let table = Table::new(SCHEMA, group).context("the inbox table")?;
        let handler = ApplyShipment {
            unknown_types: UnknownTypes::Skip,
        };
        Ok(Self {
            path: Synchronous::new(handler, table),
            group: group.to_owned(),
            events: opentelemetry::global::meter("logistics")
                .u64_counter("flow.path.events")
                .with_unit("{event}")
                .with_description("Events whose order is not on the outbox alone, by what became of them")
                .build(),
            looked_to: Mutex::new(OffsetDateTime::UNIX_EPOCH),
        })
    }

    /// Why this service cannot do commerce's part: another database, or a right that is missing.
    ///
    /// # Errors
    /// Any database error.
    pub(crate) async fn inability(&self, pool: &PgPool) -> Result<Option<String>, sqlx::Error> {
        let (is_here, may): (bool, bool) = sqlx::query_as(
            "SELECT EXISTS (SELECT FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
                             WHERE n.nspname = 'commerce' AND c.relname = 'inbox'),
                    coalesce(pg_catalog.pg_has_role(current_user, pg_catalog.to_regrole('commerce_svc'), 'SET'), false)",
        )
        .fetch_one(pool)
        .await?;
        if !is_here {
            return Ok(Some(
                "commerce's schema is not in the database of this service".to_owned(),
            ));
        }
        if !may {
            let needed = "GRANT commerce_svc TO logistics_svc WITH INHERIT FALSE, SET TRUE";
            return Ok(Some(format!("this service may not act as commerce_svc: {needed}")));
        }
        let mut tx = pool.begin().await?;
        sqlx::raw_sql(AS_COMMERCE).execute(&mut *tx).await?;
        let there: Option<i64> = sqlx::query_scalar("SELECT max(version) FROM commerce._sqlx_migrations WHERE success")
            .fetch_one(&mut *tx)
            .await?;
        tx.rollback().await?;
        let needed = MIGRATOR.iter().map(|migration| migration.version).max();
        Ok((there < needed)
            .then(|| "a migration of commerce's schema is missing; run `commerce-consumer migrate`".to_owned()))
    }

    /// Lets events take effect in commerce with this transaction. One whose shipment has an earlier event that commerce has not
    /// applied is left to the outbox, as is one that commerce does not take: it comes by its record, and dies there if it must.
    ///
    /// # Errors
    /// Whatever commerce's statements fail with. The transaction is of no use then: that is the old path.
    pub(crate) async fn take_effect(
        &self,
        tx: &mut PgTransaction<'_>,
        events: &[&NewEvent],
    ) -> Result<(), sqlx::Error> {
        let envelopes: Vec<Envelope> = events.iter().map(|event| event.envelope.clone()).collect();
        sqlx::raw_sql(CHANGE).execute(&mut **tx).await?;
        let outcomes = self.path.take_effect(tx, &envelopes).await.map_err(database)?;
        sqlx::raw_sql(AS_LOGISTICS).execute(&mut **tx).await?;
        for outcome in outcomes {
            self.count("legacy", became(&outcome));
        }
        Ok(())
    }

    /// Tries events out, keeps what they would have written, and takes it back: each on what is committed, or the rows of one
    /// would be expected to hold what another has only tried. Whatever goes wrong there is counted, and never the request's failure.
    ///
    /// # Errors
    /// Only those of a connection that is of no use any more.
    pub(crate) async fn try_out(&self, tx: &mut PgTransaction<'_>, events: &[&NewEvent]) -> Result<(), sqlx::Error> {
        let mut kept = Vec::new();
        let end = Instant::now() + TRIALS_WITHIN;
        for (place, event) in events.iter().enumerate() {
            if place >= MOST_TRIALS || Instant::now() >= end {
                self.count("shadow", "left_out");
                continue;
            }
            let mut savepoint = Connection::begin(&mut **tx).await?;
            let tried = self.trial(&mut savepoint, &event.envelope).await;
            savepoint.rollback().await?;
            match tried {
                Ok(Ok(expected)) => {
                    kept.push((event.envelope.id, event.envelope.event_type.clone(), expected));
                    self.count("shadow", "expected");
                }
                Ok(Err(outcome)) => self.count("shadow", became(&outcome)),
                Err(error) => {
                    tracing::debug!(%error, event_id = %event.envelope.id, "the synchronous path could not be tried out");
                    self.count("shadow", "failed");
                }
            }
        }
        if !kept.is_empty() {
            shadow::expect(tx, &kept).await?;
        }
        Ok(())
    }

    /// What is expected, as it is kept; or what became of the event instead.
    async fn trial(
        &self,
        savepoint: &mut PgTransaction<'_>,
        envelope: &Envelope,
    ) -> Result<Result<String, Outcome>, sqlx::Error> {
        let Ok(known) = ShipmentEvent::from_envelope(envelope) else {
            return Ok(Err(Outcome::Skipped));
        };
        sqlx::raw_sql(TRIAL).execute(&mut **savepoint).await?;
        let expected = comparison::expect(&self.path, savepoint, envelope, &known).await;
        match expected.map_err(database)? {
            Ok(expected) => serde_json::to_string(&expected)
                .map(Ok)
                .map_err(|error| sqlx::Error::Encode(error.into())),
            Err(outcome) => Ok(Err(outcome)),
        }
    }

    /// Holds what was expected against what the consumer has written, a page of it. Whether there may be more.
    ///
    /// # Errors
    /// Any database error; nothing is noted then.
    pub(crate) async fn compare(&self, pool: &PgPool) -> Result<bool, sqlx::Error> {
        let expired = shadow::expire(pool, WAITS).await?;
        let mut tx = pool.begin().await?;
        let after = *self.looked_to.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = shadow::lock_after(&mut tx, after, ROUND).await?;
        // From the oldest again once the newest has been looked at.
        let full = waiting.len() as i64 == ROUND;
        let next = waiting.last().filter(|_| full).map(|last| last.created_at);
        *self.looked_to.lock().unwrap_or_else(PoisonError::into_inner) = next.unwrap_or(OffsetDateTime::UNIX_EPOCH);
        if waiting.is_empty() && expired == 0 {
            return Ok(false);
        }
        let (mut settled, mut mismatches) = (Vec::new(), Vec::new());
        let (mut compared, mut different, mut compared_rows, mut overtaken_rows, mut expired) = (0, 0, 0, 0, expired);
        sqlx::raw_sql(AS_COMMERCE).execute(&mut *tx).await?;
        let ids: Vec<Uuid> = waiting.iter().map(|expectation| expectation.event_id).collect();
        let taken_effect = tables::taken_effect(&mut *tx, &self.group, &ids).await?;
        let ready = |expectation: &Expectation| taken_effect.contains(&expectation.event_id);
        for expectation in waiting.into_iter().filter(ready) {
            let Ok(expected) = serde_json::from_str::<Expected>(&expectation.expected) else {
                // Of another release.
                expired += 1;
                settled.push(expectation.event_id);
                continue;
            };
            let made = comparison::compare(&mut tx, &expected).await?;
            compared += 1;
            different += i64::from(!made.differences.is_empty());
            compared_rows += made.rows as i64;
            overtaken_rows += made.overtaken as i64;
            mismatches.extend(made.differences.into_iter().map(|difference| Mismatch {
                event_id: expectation.event_id,
                event_type: expectation.event_type.clone(),
                shipment_id: expected.shipment_id.clone(),
                order_id: expected.order_id.clone(),
                table: difference.table,
                row_key: difference.key.to_string(),
                column: difference.column,
                expected: difference.expected.to_string(),
                found: difference.found.to_string(),
            }));
            settled.push(expectation.event_id);
        }
        sqlx::raw_sql(AS_LOGISTICS).execute(&mut *tx).await?;
        if settled.is_empty() && expired == 0 {
            tx.rollback().await?;
            return Ok(full);
        }
        shadow::note(&mut tx, &mismatches).await?;
        shadow::forget(&mut tx, &settled).await?;
        let counted = [
            ("compared", compared),
            ("different", different),
            ("expired", expired),
            ("rows_compared", compared_rows),
            ("rows_overtaken", overtaken_rows),
        ];
        shadow::count(&mut tx, &counted).await?;
        tx.commit().await?;
        for mismatch in mismatches.iter().take(5) {
            tracing::warn!(
                event_id = %mismatch.event_id, shipment_id = mismatch.shipment_id, table = mismatch.table,
                row = mismatch.row_key, column = mismatch.column, expected = mismatch.expected, found = mismatch.found,
                "the consumer has written something else than the synchronous path would have"
            );
        }
        for (outcome, count) in counted {
            let attributes = [KeyValue::new("path", "shadow"), KeyValue::new("outcome", outcome)];
            self.events.add(u64::try_from(count).unwrap_or(0), &attributes);
        }
        Ok(full)
    }

    /// How many dead letters commerce has had since then; and whether it waits for its records: of these events, the newest first,
    /// those that neither took effect synchronously nor wait for a person or an earlier event have not come to it.
    ///
    /// # Errors
    /// Any database error.
    pub(crate) async fn commerce_health(
        &self,
        connection: &mut PgConnection,
        events: &[Uuid],
        since: OffsetDateTime,
    ) -> Result<(i64, bool), sqlx::Error> {
        sqlx::raw_sql(AS_COMMERCE).execute(&mut *connection).await?;
        let health = sqlx::query_as(include_str!("tables/commerce_health.sql"))
            .bind(&self.group)
            .bind(events)
            .bind(WITHOUT_RECORD)
            .bind(since)
            .fetch_one(&mut *connection)
            .await?;
        sqlx::raw_sql(AS_LOGISTICS).execute(&mut *connection).await?;
        Ok(health)
    }

    fn count(&self, path: &'static str, outcome: &'static str) {
        let attributes = [KeyValue::new("path", path), KeyValue::new("outcome", outcome)];
        self.events.add(1, &attributes);
    }
}

/// What became of an event that was to take effect at once: `applied`, or why it was left to the outbox.
fn became(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::Applied => "applied",
        Outcome::Duplicate | Outcome::Skipped => "without_effect",
        Outcome::Early(_) => "behind",
        Outcome::Retry(_) => "not_yet",
        Outcome::DeadLetter(_) => "refused",
    }
}

fn database(error: HandlerError) -> sqlx::Error {
    match error {
        HandlerError::Database(error) => error,
        HandlerError::Other(error) => sqlx::Error::Encode(error),
    }
}
