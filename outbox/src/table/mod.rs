//! All SQL on the outbox table and the tables around it.

use std::sync::Arc;

use shared_events::Envelope;
use sqlx::{AssertSqlSafe, PgTransaction, types::Uuid};
use time::OffsetDateTime;

/// INIT, PUBLISHED, COMPLETED, and set aside: the marks of a row.
mod marks;

/// Rows to send, in an order that keeps each key's own.
mod unsent;

/// Which rows nobody has read back, and up to where there are none.
mod confirmations;

/// Up to where each slot is done.
mod positions;

/// Leases on buckets of keys.
mod buckets;

/// Rows that an operator wants sent again.
mod resends;

/// Days made ahead, and dropped when they are over.
mod partitions;

/// Counts and single rows, for people.
mod inspect;

pub(crate) use buckets::{Holding, lease, release};
pub(crate) use confirmations::{record_settled, settled_to, unconfirmed};
pub use inspect::{EventState, StateCount};
pub(crate) use inspect::{backlog, counts, drop_slot, event, slot};
pub(crate) use marks::{
    Aside, confirm, failed_keys, is_seen, mark_published, mark_published_again, may_pass, set_aside, snapshot,
};
pub(crate) use partitions::{drop_partitions, ensure_partitions, forget_default_rows};
pub(crate) use positions::{Position, SlotIdentity, record_position, recorded_position, unmarked_before};
pub use resends::Selection;
pub(crate) use resends::{forget_resends, next_resends, request_resends, resend_done, select_resends};
pub(crate) use unsent::{After, Unsent, UnsentRow, is_any_unsent, keys_with_unsent_before, unsent, unsent_of_key};

/// The outbox of one schema. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Table {
    schema: Arc<str>,
    append: Arc<str>,
}

impl Table {
    /// # Panics
    /// If `schema` is not a plain lower-case identifier.
    pub(crate) fn new(schema: &str) -> Self {
        let plain = !schema.is_empty()
            && schema
                .bytes()
                .all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_'));
        assert!(plain, "schema name {schema:?} is not of [a-z0-9_]");
        let append = format!(
            "INSERT INTO {schema}.outbox
                    (id, aggregatetype, aggregateid, type, version, sequence, payload, traceparent, tx_key, created_at)
             SELECT id, aggregatetype, aggregateid, type, version, sequence, payload::json, traceparent, tx_key, created_at
               FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::int[], $6::bigint[], $7::text[],
                           $8::text[], $9::uuid[], $10::timestamptz[])
                 AS event(id, aggregatetype, aggregateid, type, version, sequence, payload, traceparent, tx_key, created_at)"
        );
        Self {
            schema: schema.into(),
            append: append.into(),
        }
    }

    /// The statement with this table's schema for each `$schema`.
    fn sql(&self, statement: &str) -> AssertSqlSafe<String> {
        // The name was checked to be a plain identifier.
        AssertSqlSafe(statement.replace("$schema", &self.schema))
    }
}

/// The columns of several rows, ready for one `unnest`.
#[derive(Debug, Default)]
pub(crate) struct Rows<'a> {
    ids: Vec<Uuid>,
    aggregate_types: Vec<&'a str>,
    aggregate_ids: Vec<&'a str>,
    types: Vec<&'a str>,
    versions: Vec<i32>,
    sequences: Vec<i64>,
    payloads: Vec<String>,
    traceparents: Vec<Option<&'a str>>,
    tx_keys: Vec<Uuid>,
    created_at: Vec<OffsetDateTime>,
}

impl<'a> Rows<'a> {
    pub(crate) fn with_capacity(capacity: usize) -> Self {
        Self {
            ids: Vec::with_capacity(capacity),
            payloads: Vec::with_capacity(capacity),
            ..Self::default()
        }
    }

    pub(crate) fn push(&mut self, envelope: &'a Envelope, payload: String, traceparent: Option<&'a str>) {
        self.ids.push(envelope.id);
        self.aggregate_types.push(&envelope.aggregate_type);
        self.aggregate_ids.push(&envelope.aggregate_id);
        self.types.push(&envelope.event_type);
        self.versions.push(envelope.version);
        self.sequences.push(envelope.sequence);
        self.payloads.push(payload);
        self.traceparents.push(traceparent);
        self.tx_keys.push(envelope.transaction_key);
        self.created_at.push(envelope.timestamp);
    }
}

pub(crate) async fn append(table: &Table, tx: &mut PgTransaction<'_>, rows: &Rows<'_>) -> Result<(), sqlx::Error> {
    sqlx::query(AssertSqlSafe(table.append.to_string()))
        .bind(&rows.ids)
        .bind(&rows.aggregate_types)
        .bind(&rows.aggregate_ids)
        .bind(&rows.types)
        .bind(&rows.versions)
        .bind(&rows.sequences)
        .bind(&rows.payloads)
        .bind(&rows.traceparents)
        .bind(&rows.tx_keys)
        .bind(&rows.created_at)
        .execute(&mut **tx)
        .await?;
    Ok(())
}
