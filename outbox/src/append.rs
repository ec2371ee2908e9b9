use shared_events::{Envelope, envelope::format_timestamp, headers::EventHeaders};
use sqlx::{PgTransaction, types::Uuid};

use crate::table::{self, Rows, Table};

/// Kafka's per-record overhead and the length prefixes of key and value, rounded up.
const RECORD_OVERHEAD_BYTES: usize = 128;
/// Length prefixes of one header, rounded up.
const HEADER_OVERHEAD_BYTES: usize = 8;

/// An event about to be committed, and the trace it belongs to.
#[derive(Debug, Clone)]
pub struct NewEvent {
    pub envelope: Envelope,
    /// W3C `traceparent` of the request.
    pub traceparent: Option<String>,
}

/// The write side of one service's outbox.
#[derive(Debug, Clone)]
pub struct Outbox {
    table: Table,
    source: String,
    max_event_bytes: usize,
}

#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// Found here, before the commit, and not by a relay that would retry for ever (HAZARDS H8).
    #[error("the event of {aggregate_id} has {bytes} bytes as a Kafka record, allowed are {limit}")]
    TooLarge {
        aggregate_id: String,
        bytes: usize,
        limit: usize,
    },
    #[error("the event cannot be written as JSON")]
    Encode(#[from] serde_json::Error),
    #[error("the event's time cannot be written")]
    Time(#[from] time::error::Format),
    #[error("the outbox rows could not be inserted")]
    Database(#[from] sqlx::Error),
}

impl Outbox {
    /// `schema` holds the table `outbox`; `source` names the service in CloudEvents headers; `max_event_bytes` is the
    /// largest Kafka record that topic and producer take, counting key, headers and value.
    ///
    /// # Panics
    /// If `schema` is not a plain lower-case identifier: a defect of the program, found at its start.
    pub fn new(schema: &str, source: &str, max_event_bytes: usize) -> Self {
        Self {
            table: Table::new(schema),
            source: source.to_owned(),
            max_event_bytes,
        }
    }

    /// Inserts the rows as part of the caller's transaction: event and change commit together or not at all. One
    /// statement for any number of events.
    ///
    /// # Errors
    /// After an error the transaction must be rolled back.
    pub async fn append(&self, tx: &mut PgTransaction<'_>, events: &[NewEvent]) -> Result<(), AppendError> {
        if events.is_empty() {
            return Ok(());
        }
        let mut rows = Rows::with_capacity(events.len());
        for event in events {
            let envelope = &event.envelope;
            let payload = envelope.encode()?;
            self.check_size(event, &payload)?;
            rows.push(envelope, payload, event.traceparent.as_deref());
        }
        table::append(&self.table, tx, &rows).await?;
        Ok(())
    }

    fn check_size(&self, event: &NewEvent, payload: &str) -> Result<(), AppendError> {
        let envelope = &event.envelope;
        let time = format_timestamp(envelope.timestamp)?;
        let mut id = Uuid::encode_buffer();
        let headers = EventHeaders {
            id: envelope.id.hyphenated().encode_lower(&mut id),
            event_type: &envelope.event_type,
            version: envelope.version,
            source: &self.source,
            time: &time,
            subject: &envelope.aggregate_id,
            traceparent: event.traceparent.as_deref(),
        };
        let mut bytes = RECORD_OVERHEAD_BYTES + envelope.aggregate_id.len() + payload.len();
        headers.for_each(|name, value| bytes += HEADER_OVERHEAD_BYTES + name.len() + value.len());
        if bytes > self.max_event_bytes {
            return Err(AppendError::TooLarge {
                aggregate_id: envelope.aggregate_id.clone(),
                bytes,
                limit: self.max_event_bytes,
            });
        }
        Ok(())
    }
}
