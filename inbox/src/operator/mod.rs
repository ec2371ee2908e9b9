//! What an operator may see and do; by SQL alone, so that any process with the database can serve it, whichever instances
//! run. Every change leaves a row in `operator_actions`, in its own transaction.

/// Many letters through again, as one job: a canary first, then at a rate, until too many die again.
pub mod jobs;

/// Another event in the place of one that can never take effect as it is.
pub mod edit;

/// Letters that need nobody any more, out of sight.
pub mod archive;

pub use archive::Shelving;
pub use edit::{Edit, EditError, Edited};
pub use jobs::{Eligible, Job, Plan};

use sqlx::{FromRow, PgConnection, PgPool, PgTransaction};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    crash_point,
    handler::Handler,
    ordering::KeyState,
    rate_limit::{Budget, Rate},
    table::{HeldKeysPage, Remembered, Table},
};

/// A handle that may be cloned and kept.
#[derive(Debug, Clone)]
pub struct Operator {
    table: Table,
    pool: PgPool,
    can_skip: fn(&str) -> bool,
}

/// Who acts, and why.
#[derive(Debug, Clone, Copy)]
pub struct Actor<'a> {
    pub name: &'a str,
    pub role: &'a str,
    /// 1 to 500 bytes.
    pub reason: &'a str,
}

/// Which dead letters are meant: those to which every field that is set applies.
#[derive(Debug, Clone, Default)]
pub struct LetterFilter {
    /// `open`, `redriving`, `resolved` or `archived`; `None`: any but `archived`.
    pub state: Option<String>,
    pub fingerprint: Option<String>,
    pub error_type: Option<String>,
    pub event_type: Option<String>,
    pub aggregate_id: Option<String>,
    pub consumer_version: Option<String>,
    /// Died last at or after.
    pub from: Option<OffsetDateTime>,
    /// Died last before.
    pub to: Option<OffsetDateTime>,
}

/// Dead letters that are alike.
#[derive(Debug, Clone, PartialEq, FromRow)]
pub struct LetterGroup {
    pub fingerprint: String,
    pub error_type: String,
    pub state: String,
    pub letters: i64,
    pub keys: i64,
    pub first_died_at: OffsetDateTime,
    pub last_died_at: OffsetDateTime,
}

/// A dead letter in a list.
#[derive(Debug, Clone, PartialEq, FromRow)]
pub struct LetterRow {
    /// The event's id, or one made of the record's place if it is no event.
    pub id: Uuid,
    pub state: String,
    pub aggregate_type: Option<String>,
    pub aggregate_id: Option<String>,
    pub sequence: Option<i64>,
    pub event_type: Option<String>,
    pub error_class: String,
    pub error_type: String,
    pub error_message: String,
    pub fingerprint: String,
    pub consumer_version: String,
    pub attempts: i32,
    pub deaths: i32,
    /// Whether later events of its key wait for it.
    pub holds: bool,
    pub first_died_at: OffsetDateTime,
    pub last_died_at: OffsetDateTime,
    pub resolved_at: Option<OffsetDateTime>,
    /// Since when it is out of sight; its state is then `archived`.
    pub archived_at: Option<OffsetDateTime>,
    /// The letter that it was made of.
    pub edited_from: Option<Uuid>,
    /// The letter that took its place.
    pub replaced_by: Option<Uuid>,
    pub origin_topic: String,
    pub origin_partition: i32,
    pub origin_offset: i64,
}

/// A dead letter with its bytes and its past.
#[derive(Debug, Clone, PartialEq)]
pub struct Letter {
    pub row: LetterRow,
    pub key: Option<Vec<u8>>,
    pub value: Option<Vec<u8>>,
    pub headers: Vec<(String, Vec<u8>)>,
    pub attempts: Vec<AttemptRow>,
    /// Events parked behind its key.
    pub parked: i64,
}

/// A try that failed.
#[derive(Debug, Clone, PartialEq, FromRow)]
pub struct AttemptRow {
    pub attempt: i32,
    pub failed_at: OffsetDateTime,
    pub topic: String,
    pub partition: i32,
    pub error_class: String,
    pub error_type: String,
    pub error_message: String,
    pub consumer_version: String,
}

/// What an operator did.
#[derive(Debug, Clone, PartialEq, FromRow)]
pub struct ActionRow {
    pub id: i64,
    pub acted_at: OffsetDateTime,
    pub actor: String,
    pub role: String,
    pub action: String,
    /// JSON.
    pub target: String,
    pub reason: String,
}

/// What an operator sets for all instances, now and after their restarts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change<'a> {
    /// Nothing is applied until [`Change::GoOn`]; the actor's reason is shown meanwhile.
    Pause,
    GoOn,
    /// Rates of some budgets; `None`: as the settings say.
    Rates(&'a [(Budget, Option<Rate>)]),
}

/// What becomes of dead letters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Through again, in order per key, with a fresh schedule.
    Redrive,
    /// They shall not take effect; their keys go on without them.
    Skip,
}

impl Decision {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Redrive => "redrive",
            Self::Skip => "skip",
        }
    }
}

type StoredBytes = (Option<Vec<u8>>, Option<Vec<u8>>, Vec<String>, Vec<Vec<u8>>);

const LETTER: &str = "id, CASE WHEN archived_at IS NULL THEN state ELSE 'archived' END AS state, aggregate_type,
    aggregate_id, sequence, event_type, error_class, error_type, error_message, fingerprint, consumer_version, attempts,
    deaths, holds, first_died_at, last_died_at, resolved_at, archived_at, edited_from, replaced_by, origin_topic,
    origin_partition, origin_offset";

/// Which rows a filter means; `$1` is the consumer, the filter's fields are `$2` to `$9`.
const MEANT: &str = "consumer = $1 AND (archived_at IS NULL) = ($2::text IS DISTINCT FROM 'archived')
    AND ($2 IS NULL OR $2 = 'archived' OR state = $2) AND ($3::text IS NULL OR fingerprint = $3)
    AND ($4::text IS NULL OR error_type = $4) AND ($5::text IS NULL OR event_type = $5)
    AND ($6::text IS NULL OR aggregate_id = $6) AND ($7::text IS NULL OR consumer_version = $7)
    AND ($8::timestamptz IS NULL OR last_died_at >= $8) AND ($9::timestamptz IS NULL OR last_died_at < $9)";

/// Binds what [`MEANT`] names.
macro_rules! bind_filter {
    ($query:expr, $consumer:expr, $filter:expr) => {
        $query
            .bind($consumer)
            .bind(&$filter.state)
            .bind(&$filter.fingerprint)
            .bind(&$filter.error_type)
            .bind(&$filter.event_type)
            .bind(&$filter.aggregate_id)
            .bind(&$filter.consumer_version)
            .bind($filter.from)
            .bind($filter.to)
    };
}

use bind_filter;

impl Operator {
    pub fn new(table: Table, pool: PgPool) -> Self {
        Self {
            table,
            pool,
            can_skip: |_| true,
        }
    }

    /// One that skips only what the handler can pass over.
    pub fn of_handler<H: Handler>(table: Table, pool: PgPool) -> Self {
        Self {
            can_skip: H::can_pass_over,
            ..Self::new(table, pool)
        }
    }

    /// The keys that are held, in the order of type and id, after `after`.
    ///
    /// # Errors
    /// Any database error; so with all of these.
    pub async fn held_keys(
        &self,
        state: Option<KeyState>,
        after: Option<(&str, &str)>,
        most: u32,
    ) -> Result<HeldKeysPage, sqlx::Error> {
        self.table.held_keys(&self.pool, state, after, most).await
    }

    /// Dead letters by what they have in common, the largest group first, at most 200 groups.
    ///
    /// # Errors
    /// Any database error.
    pub async fn groups(&self, filter: &LetterFilter) -> Result<Vec<LetterGroup>, sqlx::Error> {
        let sql = format!(
            "SELECT fingerprint, error_type, CASE WHEN archived_at IS NULL THEN state ELSE 'archived' END AS state,
                    count(*) AS letters, count(DISTINCT (aggregate_type, aggregate_id)) AS keys,
                    min(first_died_at) AS first_died_at, max(last_died_at) AS last_died_at
               FROM {{schema}}.dead_letters WHERE {MEANT}
              GROUP BY 1, 2, 3 ORDER BY letters DESC, fingerprint LIMIT 200"
        );
        bind_filter!(sqlx::query_as(self.table.sql(&sql)), self.table.consumer(), filter)
            .fetch_all(&self.pool)
            .await
    }

    /// Dead letters, the latest first, at most `most`, that died before `before` (its time and id).
    ///
    /// # Errors
    /// Any database error.
    pub async fn letters(
        &self,
        filter: &LetterFilter,
        before: Option<(OffsetDateTime, Uuid)>,
        most: u32,
    ) -> Result<Vec<LetterRow>, sqlx::Error> {
        let sql = format!(
            "SELECT {LETTER} FROM {{schema}}.dead_letters
              WHERE {MEANT} AND ($10::timestamptz IS NULL OR (last_died_at, id) < ($10, $11))
              ORDER BY last_died_at DESC, id DESC LIMIT $12"
        );
        let (time, id) = before.unzip();
        bind_filter!(sqlx::query_as(self.table.sql(&sql)), self.table.consumer(), filter)
            .bind(time)
            .bind(id)
            .bind(i64::from(most))
            .fetch_all(&self.pool)
            .await
    }

    /// How many letters a filter means.
    ///
    /// # Errors
    /// Any database error.
    pub async fn count(&self, filter: &LetterFilter) -> Result<i64, sqlx::Error> {
        let sql = format!("SELECT count(*) FROM {{schema}}.dead_letters WHERE {MEANT}");
        bind_filter!(sqlx::query_scalar(self.table.sql(&sql)), self.table.consumer(), filter)
            .fetch_one(&self.pool)
            .await
    }

    /// One dead letter with its bytes and every try that failed.
    ///
    /// # Errors
    /// Any database error.
    pub async fn letter(&self, id: Uuid) -> Result<Option<Letter>, sqlx::Error> {
        let sql = format!("SELECT {LETTER} FROM {{schema}}.dead_letters WHERE consumer = $1 AND id = $2");
        let row: Option<LetterRow> = sqlx::query_as(self.table.sql(&sql))
            .bind(self.table.consumer())
            .bind(id)
            .fetch_optional(&self.pool)
            .await?;
        let Some(row) = row else { return Ok(None) };
        let (key, value, names, values): StoredBytes = sqlx::query_as(self.table.sql(
            "SELECT record_key, record_value, header_names, header_values
               FROM {schema}.dead_letters WHERE consumer = $1 AND id = $2",
        ))
        .bind(self.table.consumer())
        .bind(id)
        .fetch_one(&self.pool)
        .await?;
        let attempts = sqlx::query_as(self.table.sql(
            "SELECT attempt, failed_at, topic, partition, error_class, error_type, error_message, consumer_version
               FROM {schema}.failed_attempts WHERE consumer = $1 AND event_id = $2 ORDER BY failed_at LIMIT 1000",
        ))
        .bind(self.table.consumer())
        .bind(id)
        .fetch_all(&self.pool)
        .await?;
        let parked: Option<i64> = sqlx::query_scalar(self.table.sql(
            "SELECT parked FROM {schema}.held_keys WHERE consumer = $1 AND aggregate_type = $2 AND aggregate_id = $3",
        ))
        .bind(self.table.consumer())
        .bind(&row.aggregate_type)
        .bind(&row.aggregate_id)
        .fetch_optional(&self.pool)
        .await?;
        Ok(Some(Letter {
            row,
            key,
            value,
            headers: names.into_iter().zip(values).collect(),
            attempts,
            parked: parked.unwrap_or_default(),
        }))
    }

    /// The open letters that a filter means, in the order in which their keys need them, at most `most`.
    ///
    /// # Errors
    /// Any database error.
    pub async fn select(&self, filter: &LetterFilter, most: u32) -> Result<Vec<Uuid>, sqlx::Error> {
        let sql = format!(
            "SELECT id FROM {{schema}}.dead_letters WHERE {MEANT} AND state = 'open' AND aggregate_id IS NOT NULL
              ORDER BY aggregate_type, aggregate_id, sequence LIMIT $10"
        );
        bind_filter!(sqlx::query_scalar(self.table.sql(&sql)), self.table.consumer(), filter)
            .bind(i64::from(most))
            .fetch_all(&self.pool)
            .await
    }

    /// Those of these letters that are open and can be decided about.
    ///
    /// # Errors
    /// Any database error.
    pub async fn open(&self, ids: &[Uuid]) -> Result<Vec<Uuid>, sqlx::Error> {
        sqlx::query_scalar(self.table.sql(
            "SELECT id FROM {schema}.dead_letters
              WHERE consumer = $1 AND id = ANY($2) AND state = 'open' AND aggregate_id IS NOT NULL ORDER BY id",
        ))
        .bind(self.table.consumer())
        .bind(ids)
        .fetch_all(&self.pool)
        .await
    }

    /// Those of these letters that cannot be skipped, with their types: nothing behind them could take effect without them.
    ///
    /// # Errors
    /// Any database error.
    pub async fn unskippable(&self, ids: &[Uuid]) -> Result<Vec<(Uuid, String)>, sqlx::Error> {
        let mut letters: Vec<(Uuid, String)> = sqlx::query_as(self.table.sql(
            "SELECT id, event_type FROM {schema}.dead_letters
              WHERE consumer = $1 AND id = ANY($2) AND event_type IS NOT NULL ORDER BY id",
        ))
        .bind(self.table.consumer())
        .bind(ids)
        .fetch_all(&self.pool)
        .await?;
        letters.retain(|(_, event_type)| !(self.can_skip)(event_type));
        Ok(letters)
    }

    /// Sends open dead letters on their way, all of them or none, and returns the ids of those that went. One that is
    /// not open any more, is no event, or is to be skipped and cannot be, is left out.
    ///
    /// # Errors
    /// Any database error.
    pub async fn decide(&self, ids: &[Uuid], decision: Decision, actor: Actor<'_>) -> Result<Vec<Uuid>, sqlx::Error> {
        let skip = decision == Decision::Skip;
        let mut ids = ids.to_vec();
        if skip {
            let never = self.unskippable(&ids).await?;
            ids.retain(|id| never.iter().all(|(other, _)| other != id));
        }
        let mut transaction = self.pool.begin().await?;
        let gone = self.let_go(&mut transaction, &ids, skip).await?;
        crash_point::DECIDE_PARKED.reached();
        if !gone.is_empty() {
            let target = serde_json::json!({ "letters": gone }).to_string();
            self.note(&mut transaction, decision.as_str(), &target, actor).await?;
        }
        crash_point::DECIDE_COMMIT_BEFORE.reached();
        transaction.commit().await?;
        crash_point::DECIDE_COMMIT_AFTER.reached();
        Ok(gone)
    }

    /// Parks these letters behind their keys and lets the keys go, as far as they are open; returns which they are.
    async fn let_go(&self, connection: &mut PgConnection, ids: &[Uuid], skip: bool) -> Result<Vec<Uuid>, sqlx::Error> {
        // Held keys before letters, as worker and releaser do.
        sqlx::query(self.table.sql(
            "SELECT FROM {schema}.held_keys
              WHERE consumer = $1 AND (aggregate_type, aggregate_id) IN
                    (SELECT aggregate_type, aggregate_id FROM {schema}.dead_letters WHERE consumer = $1 AND id = ANY($2))
              ORDER BY aggregate_type, aggregate_id FOR UPDATE",
        ))
        .bind(self.table.consumer())
        .bind(ids)
        .execute(&mut *connection)
        .await?;
        self.lock_letters(connection, ids).await?;
        crash_point::LETTERS_LOCKED.reached();
        sqlx::query_scalar(self.table.sql(include_str!("../table/redrive.sql")))
            .bind(self.table.consumer())
            .bind(ids)
            .bind(skip)
            .fetch_all(connection)
            .await
    }

    /// In the order of their ids, so that two operators who mean the same ones wait for each other.
    async fn lock_letters(&self, connection: &mut PgConnection, ids: &[Uuid]) -> Result<(), sqlx::Error> {
        sqlx::query(
            self.table
                .sql("SELECT FROM {schema}.dead_letters WHERE consumer = $1 AND id = ANY($2) ORDER BY id FOR UPDATE"),
        )
        .bind(self.table.consumer())
        .bind(ids)
        .execute(connection)
        .await?;
        Ok(())
    }

    /// What operators have set.
    ///
    /// # Errors
    /// Any database error.
    pub async fn remembered(&self) -> Result<Remembered, sqlx::Error> {
        self.table.controls(&self.pool).await
    }

    /// Sets something for all instances; each one finds it within a second or two.
    ///
    /// # Errors
    /// Any database error; nothing is changed then.
    pub async fn change(&self, change: Change<'_>, actor: Actor<'_>) -> Result<Remembered, sqlx::Error> {
        let mut transaction = self.pool.begin().await?;
        let mut controls = self.table.lock_controls(&mut transaction, actor.name).await?;
        let (action, target) = match change {
            Change::Pause => {
                controls.paused = Some(actor.reason.to_owned());
                ("pause", serde_json::json!({}))
            }
            Change::GoOn => ("resume", serde_json::json!({ "paused": controls.paused.take() })),
            Change::Rates(rates) => {
                let mut target = serde_json::Map::new();
                for (budget, rate) in rates {
                    let text = |rate: Option<Rate>| rate.map(|rate| rate.to_string());
                    let change = serde_json::json!({ "from": text(controls.rate(*budget)), "to": text(*rate) });
                    target.insert(budget.as_str().to_owned(), change);
                    controls.set_rate(*budget, *rate);
                }
                ("limit", target.into())
            }
        };
        self.table
            .set_controls(&mut transaction, &mut controls, actor.name)
            .await?;
        self.note(&mut transaction, action, &target.to_string(), actor).await?;
        crash_point::CHANGE_COMMIT_BEFORE.reached();
        transaction.commit().await?;
        crash_point::CHANGE_COMMIT_AFTER.reached();
        Ok(controls)
    }

    /// Keeps an action that changes nothing in the database.
    ///
    /// # Errors
    /// Any database error; the action is then not to be done.
    pub async fn note_action(
        &self,
        action: &str,
        target: &serde_json::Value,
        actor: Actor<'_>,
    ) -> Result<(), sqlx::Error> {
        let mut transaction = self.pool.begin().await?;
        self.note(&mut transaction, action, &target.to_string(), actor).await?;
        transaction.commit().await
    }

    /// What operators did, the latest first, before the action `before`.
    ///
    /// # Errors
    /// Any database error.
    pub async fn actions(&self, before: Option<i64>, most: u32) -> Result<Vec<ActionRow>, sqlx::Error> {
        sqlx::query_as(self.table.sql(
            "SELECT id, acted_at, actor, role, action, target::text AS target, reason FROM {schema}.operator_actions
              WHERE consumer = $1 AND ($2::bigint IS NULL OR id < $2) ORDER BY id DESC LIMIT $3",
        ))
        .bind(self.table.consumer())
        .bind(before)
        .bind(i64::from(most))
        .fetch_all(&self.pool)
        .await
    }

    pub(crate) async fn note(
        &self,
        transaction: &mut PgTransaction<'_>,
        action: &str,
        target: &str,
        actor: Actor<'_>,
    ) -> Result<(), sqlx::Error> {
        sqlx::query(self.table.sql(
            "INSERT INTO {schema}.operator_actions (consumer, actor, role, action, target, reason)
             VALUES ($1, $2, $3, $4, $5::jsonb, $6)",
        ))
        .bind(self.table.consumer())
        .bind(actor.name)
        .bind(actor.role)
        .bind(action)
        .bind(target)
        .bind(actor.reason)
        .execute(&mut **transaction)
        .await?;
        Ok(())
    }
}
