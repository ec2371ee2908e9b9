use std::{borrow::Cow, future::Future, sync::Arc};

use serde_json::{Map, Value};
use shared_events::{Envelope, Rejection};
use sqlx::PgTransaction;

use crate::ordering::Key;

/// What a service does with the events of a topic.
pub trait Handler: Send + Sync + 'static {
    /// Whether this event is for [`Handler::apply`]; the rest is skipped, before any transaction, or dead-lettered by policy. A handler that counts an aggregate's sequence takes all of its events, also those of types that mean
    /// nothing to it. Keep it cheap.
    fn takes(&self, envelope: &Envelope) -> bool;

    /// Takes effect inside `transaction` and says for each event, in order, what became of it.
    ///
    /// The engine has already inserted the events' inbox rows in this transaction and commits after a success. Several
    /// partitions do this at once: lock rows in one global order. Nothing outside the database may be waited for. The
    /// future is dropped when the transaction passes its limit.
    ///
    /// # Errors
    /// An error rolls the whole batch back. If it is the platform's, the same batch comes again; otherwise the events
    /// come again one by one.
    fn apply(
        &self,
        transaction: &mut PgTransaction<'_>,
        events: &[IncomingEvent],
    ) -> impl Future<Output = Result<Vec<Outcome>, HandlerError>> + Send;

    /// Whether events of this type can be left out at all. For one that cannot, nothing behind it could ever take effect: a
    /// person's wish to skip it is refused, and such a type must not stand in [`crate::Parking::released_by`].
    fn can_pass_over(event_type: &str) -> bool {
        let _ = event_type;
        true
    }

    /// The event will not take effect any more and its key goes on: whatever counts an aggregate's sequence moves past
    /// it. Called inside the transaction that notes the decision; by default nothing has to be done.
    ///
    /// # Errors
    /// As [`Handler::apply`].
    fn pass_over(
        &self,
        transaction: &mut PgTransaction<'_>,
        event: &IncomingEvent,
    ) -> impl Future<Output = Result<(), HandlerError>> + Send {
        let _ = (transaction, event);
        std::future::ready(Ok(()))
    }

    /// The events of an aggregate before `sequence` that have not come will never come: whatever counts its sequence moves there,
    /// so that `sequence` is the next. False if too little is known of it for that; nothing may have changed then. By default
    /// nothing has to be done.
    ///
    /// # Errors
    /// As [`Handler::apply`].
    fn pass_to(
        &self,
        transaction: &mut PgTransaction<'_>,
        key: &Key,
        sequence: i64,
    ) -> impl Future<Output = Result<bool, HandlerError>> + Send {
        let _ = (transaction, key, sequence);
        std::future::ready(Ok(true))
    }

    /// Every row of the service's own tables that this event may change or bring about, as it stands now. A dry run asks before
    /// and after [`Handler::apply`], in one transaction that is rolled back, and shows what differs. Rows that others may change
    /// in between are to be locked, in the order in which `apply` locks them. By default there is nothing to show.
    ///
    /// # Errors
    /// As [`Handler::apply`].
    fn rows(
        &self,
        transaction: &mut PgTransaction<'_>,
        event: &IncomingEvent,
    ) -> impl Future<Output = Result<Vec<Row>, HandlerError>> + Send {
        let _ = (transaction, event);
        std::future::ready(Ok(Vec::new()))
    }
}

/// A row as it stands, column by column.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    pub table: &'static str,
    /// The columns that name it.
    pub key: Map<String, Value>,
    /// All of its columns.
    pub columns: Map<String, Value>,
}

/// A decoded event and where it came from.
#[derive(Debug, Clone)]
pub struct IncomingEvent {
    pub envelope: Envelope,
    pub position: Position,
    /// The trace of the request that caused it, if the record carries a valid one.
    pub traceparent: Option<String>,
}

/// A record's coordinates in Kafka.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Position {
    pub topic: Arc<str>,
    pub partition: i32,
    pub offset: i64,
}

/// What became of one event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It took effect in this transaction.
    Applied,
    /// It had taken effect before; nothing changed.
    Duplicate,
    /// It means nothing to this service; at most its place in the aggregate's sequence was noted.
    Skipped,
    /// It cannot take effect now but may later: a row it needs is not there yet.
    Retry(Reason),
    /// An earlier event of its aggregate has not taken effect. It waits for that one, parked and without counting as a
    /// failure; without order per key it is a [`Outcome::Retry`].
    Early(Reason),
    /// It can never take effect as it is.
    DeadLetter(Reason),
}

/// Why an event did not take effect.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{error_type}: {message}")]
pub struct Reason {
    /// Stable short name for headers, metrics and grouping: one of a fixed set, never made from data.
    pub error_type: Cow<'static, str>,
    /// For the operator, in one line of at most [`MAX_MESSAGE_BYTES`]. It travels in a header, so it holds ids and
    /// numbers but no payload.
    pub message: String,
}

/// The longest message of a [`Reason`]: readers quote what they did not understand, and that may be a whole record.
pub const MAX_MESSAGE_BYTES: usize = 300;

impl Reason {
    pub fn new(error_type: &'static str, message: impl Into<String>) -> Self {
        Self {
            error_type: Cow::Borrowed(error_type),
            message: one_line(&message.into()),
        }
    }
}

/// Cut to its limit, control characters escaped.
fn one_line(text: &str) -> String {
    const CUT: &str = "…";
    let mut line = String::new();
    for character in text.chars() {
        let before = line.len();
        if character.is_control() {
            line.extend(character.escape_default());
        } else {
            line.push(character);
        }
        if line.len() > MAX_MESSAGE_BYTES - CUT.len() {
            line.truncate(before);
            line.push_str(CUT);
            break;
        }
    }
    line
}

impl From<Rejection> for Reason {
    fn from(rejection: Rejection) -> Self {
        Self::new(rejection.code(), rejection.to_string())
    }
}

/// Why a handler could not finish a batch.
#[derive(Debug, thiserror::Error)]
pub enum HandlerError {
    #[error(transparent)]
    Database(#[from] sqlx::Error),
    /// Anything else: the events come again one by one, then by the retry schedule.
    #[error(transparent)]
    Other(Box<dyn std::error::Error + Send + Sync>),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_one_bounded_line_whatever_it_quotes() {
        let quoted = Reason::new("x", "a\nb\u{1b}[31mä");
        assert_eq!(quoted.message, "a\\nb\\u{1b}[31mä");
        for long in ["x".repeat(2_000_000), "ä".repeat(10_000), "\0".repeat(10_000)] {
            let message = Reason::from(Rejection::UnknownType(long)).message;
            assert!(
                message.len() <= MAX_MESSAGE_BYTES && message.ends_with('…'),
                "{message}"
            );
        }
    }
}
