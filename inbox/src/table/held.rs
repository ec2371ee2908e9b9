use std::{collections::HashSet, sync::Arc};

use sqlx::{AssertSqlSafe, PgPool, PgTransaction};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{Table, parked::columns};
use crate::{
    crash_point,
    handler::{IncomingEvent, Reason},
    ordering::{HeldKey, HeldKeys, Key, KeyState},
};

/// From so many events on, a look at each of their keys costs more than a question before it.
const MANY: usize = 16;

type LockedRow = (String, String, String, Uuid, i64, i64);

/// A held key, for a person.
#[derive(Debug, Clone, PartialEq, sqlx::FromRow)]
pub struct HeldKeyRow {
    pub aggregate_type: String,
    pub aggregate_id: String,
    /// A [`KeyState`] by its name.
    pub state: String,
    /// The event that holds the key.
    pub event_id: Uuid,
    pub event_type: String,
    pub sequence: i64,
    pub partition: i32,
    pub error_type: String,
    pub error_message: String,
    /// Events parked behind it.
    pub parked: i64,
    pub held_since: OffsetDateTime,
    pub changed_at: OffsetDateTime,
}

/// Some held keys, in the order of type and id.
#[derive(Debug, Clone, PartialEq)]
pub struct HeldKeysPage {
    pub keys: Vec<HeldKeyRow>,
    /// Whether there are more behind the last one.
    pub more: bool,
}

/// A key to be held from now on.
pub(crate) struct Hold<'a> {
    pub(crate) event: &'a IncomingEvent,
    pub(crate) state: KeyState,
    pub(crate) reason: &'a Reason,
    pub(crate) partition: i32,
}

impl Table {
    /// Locks the rows of those of the events' keys that are held.
    pub(crate) async fn lock_held(
        &self,
        transaction: &mut PgTransaction<'_>,
        events: &[IncomingEvent],
    ) -> Result<HeldKeys, sqlx::Error> {
        // Mostly no key at all is held, and that costs less to ask than after each one of a batch.
        if events.len() >= MANY && !self.holds_any(transaction).await? {
            return Ok(HeldKeys::new());
        }
        let keys: HashSet<(&str, &str)> = events
            .iter()
            .map(|event| {
                (
                    event.envelope.aggregate_type.as_str(),
                    event.envelope.aggregate_id.as_str(),
                )
            })
            .collect();
        let (types, ids): (Vec<&str>, Vec<&str>) = keys.into_iter().unzip();
        let rows: Vec<LockedRow> = sqlx::query_as(AssertSqlSafe(Arc::clone(&self.lock_held)))
            .bind(&*self.consumer)
            .bind(types)
            .bind(ids)
            .fetch_all(&mut **transaction)
            .await?;
        let held = rows
            .into_iter()
            .map(|(aggregate_type, aggregate_id, state, event_id, sequence, parked)| {
                // A state that this version does not know holds the key until somebody has settled it.
                let state = KeyState::from_name(&state).unwrap_or(KeyState::Dead);
                let held = HeldKey {
                    state,
                    event_id,
                    sequence,
                    parked,
                };
                ((aggregate_type, aggregate_id), held)
            });
        Ok(held.collect())
    }

    async fn holds_any(&self, transaction: &mut PgTransaction<'_>) -> Result<bool, sqlx::Error> {
        sqlx::query_scalar(AssertSqlSafe(Arc::clone(&self.holds_any)))
            .bind(&*self.consumer)
            .fetch_one(&mut **transaction)
            .await
    }

    /// Holds keys, or gives those that are held another event.
    pub(crate) async fn hold(
        &self,
        transaction: &mut PgTransaction<'_>,
        holds: &[Hold<'_>],
    ) -> Result<(), sqlx::Error> {
        if holds.is_empty() {
            return Ok(());
        }
        let column = |of: fn(&IncomingEvent) -> &str| holds.iter().map(|hold| of(hold.event)).collect::<Vec<&str>>();
        sqlx::query(self.sql(include_str!("hold_keys.sql")))
            .bind(&*self.consumer)
            .bind(column(|event| &event.envelope.aggregate_type))
            .bind(column(|event| &event.envelope.aggregate_id))
            .bind(holds.iter().map(|hold| hold.state.as_str()).collect::<Vec<_>>())
            .bind(holds.iter().map(|hold| hold.event.envelope.id).collect::<Vec<_>>())
            .bind(column(|event| &event.envelope.event_type))
            .bind(
                holds
                    .iter()
                    .map(|hold| hold.event.envelope.sequence)
                    .collect::<Vec<_>>(),
            )
            .bind(holds.iter().map(|hold| hold.partition).collect::<Vec<_>>())
            .bind(holds.iter().map(|hold| &*hold.reason.error_type).collect::<Vec<_>>())
            .bind(
                holds
                    .iter()
                    .map(|hold| hold.reason.message.as_str())
                    .collect::<Vec<_>>(),
            )
            .execute(&mut **transaction)
            .await?;
        crash_point::HOLD_AFTER.reached();
        Ok(())
    }

    /// Lets keys go whose event is settled: at once, or as soon as what is parked behind them has taken effect. Their rows
    /// have been locked in this transaction. Returns whether any has something parked.
    pub(crate) async fn settle(
        &self,
        transaction: &mut PgTransaction<'_>,
        keys: &HashSet<Key>,
    ) -> Result<bool, sqlx::Error> {
        if keys.is_empty() {
            return Ok(false);
        }
        let types: Vec<&str> = keys.iter().map(|(aggregate_type, _)| aggregate_type.as_str()).collect();
        let ids: Vec<&str> = keys.iter().map(|(_, aggregate_id)| aggregate_id.as_str()).collect();
        let releasing = sqlx::query(self.sql(
            "UPDATE {schema}.held_keys SET state = 'releasing', changed_at = clock_timestamp()
              WHERE consumer = $1 AND parked > 0
                AND (aggregate_type, aggregate_id) IN (SELECT * FROM unnest($2::text[], $3::text[]))",
        ))
        .bind(&*self.consumer)
        .bind(&types)
        .bind(&ids)
        .execute(&mut **transaction)
        .await?;
        sqlx::query(self.sql(
            "DELETE FROM {schema}.held_keys
              WHERE consumer = $1 AND parked = 0
                AND (aggregate_type, aggregate_id) IN (SELECT * FROM unnest($2::text[], $3::text[]))",
        ))
        .bind(&*self.consumer)
        .bind(&types)
        .bind(&ids)
        .execute(&mut **transaction)
        .await?;
        Ok(releasing.rows_affected() > 0)
    }

    /// Holds those of the keys that have an open dead letter, and nothing parked before it, by the next of these letters;
    /// returns which.
    pub(crate) async fn hold_by_next_dead(
        &self,
        transaction: &mut PgTransaction<'_>,
        keys: &HashSet<Key>,
    ) -> Result<Vec<Key>, sqlx::Error> {
        if keys.is_empty() {
            return Ok(Vec::new());
        }
        let (types, ids) = columns(keys.iter());
        sqlx::query_as(self.sql(
            "UPDATE {schema}.held_keys AS held
                SET state = 'dead', event_id = letter.id, event_type = letter.event_type, sequence = letter.sequence,
                    error_type = letter.error_type, error_message = letter.error_message, changed_at = clock_timestamp()
               FROM unnest($2::text[], $3::text[]) AS key (aggregate_type, aggregate_id),
                    LATERAL (SELECT id, event_type, sequence, error_type, error_message FROM {schema}.dead_letters
                              WHERE consumer = $1 AND aggregate_type = key.aggregate_type
                                AND aggregate_id = key.aggregate_id AND state = 'open' AND holds
                              ORDER BY sequence LIMIT 1) AS letter
              WHERE held.consumer = $1 AND held.aggregate_type = key.aggregate_type
                AND held.aggregate_id = key.aggregate_id
                AND NOT EXISTS (SELECT FROM {schema}.parked_events AS parked
                                 WHERE parked.consumer = $1 AND parked.aggregate_type = key.aggregate_type
                                   AND parked.aggregate_id = key.aggregate_id
                                   AND (parked.sequence < letter.sequence OR parked.event_id = letter.id))
             RETURNING held.aggregate_type, held.aggregate_id",
        ))
        .bind(&*self.consumer)
        .bind(types)
        .bind(ids)
        .fetch_all(&mut **transaction)
        .await
    }

    /// How many keys are held in each state, and how many events are parked in all.
    ///
    /// # Errors
    /// Any database error.
    pub async fn held_counts(&self, pool: &PgPool) -> Result<Vec<(KeyState, i64, i64)>, sqlx::Error> {
        let rows: Vec<(String, i64, i64)> = sqlx::query_as(self.sql(
            "SELECT state, count(*), sum(parked)::bigint FROM {schema}.held_keys WHERE consumer = $1 GROUP BY state",
        ))
        .bind(&*self.consumer)
        .fetch_all(pool)
        .await?;
        let known = |(state, keys, parked): (String, i64, i64)| Some((KeyState::from_name(&state)?, keys, parked));
        Ok(rows.into_iter().filter_map(known).collect())
    }

    /// The held keys after `after` (a type and an id), at most `most`, of one state if one is given.
    ///
    /// # Errors
    /// Any database error.
    pub async fn held_keys(
        &self,
        pool: &PgPool,
        state: Option<KeyState>,
        after: Option<(&str, &str)>,
        most: u32,
    ) -> Result<HeldKeysPage, sqlx::Error> {
        let (after_type, after_id) = after.unwrap_or_default();
        let mut keys: Vec<HeldKeyRow> = sqlx::query_as(self.sql(
            "SELECT aggregate_type, aggregate_id, state, event_id, event_type, sequence, partition, error_type,
                    error_message, parked, held_since, changed_at
               FROM {schema}.held_keys
              WHERE consumer = $1 AND ($2::text IS NULL OR state = $2) AND (aggregate_type, aggregate_id) > ($3, $4)
              ORDER BY aggregate_type, aggregate_id
              LIMIT $5",
        ))
        .bind(&*self.consumer)
        .bind(state.map(KeyState::as_str))
        .bind(after_type)
        .bind(after_id)
        .bind(i64::from(most) + 1)
        .fetch_all(pool)
        .await?;
        let more = keys.len() > most as usize;
        keys.truncate(most as usize);
        Ok(HeldKeysPage { keys, more })
    }

    pub(crate) fn sql(&self, text: &str) -> AssertSqlSafe<String> {
        AssertSqlSafe(text.replace("{schema}", &self.schema))
    }
}
