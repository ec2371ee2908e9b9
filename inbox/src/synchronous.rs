use std::{borrow::Cow, sync::Arc};

use shared_events::Envelope;
use sqlx::PgTransaction;

use crate::{
    handler::{Handler, HandlerError, IncomingEvent, Outcome, Position, Reason},
    table::Table,
};

/// Stands for a topic in the inbox rows of events that came without a record.
pub const WITHOUT_RECORD: &str = "synchronous";

/// The way around the topic: events take effect in the transaction that causes them.
///
/// Their records arrive all the same, and find their inbox rows: duplicates. What keeps both ways in one order is that
/// nothing takes effect here before its predecessors have: neither behind an event that failed ([`Table`]'s held keys), nor
/// ahead of one that is still on its way (the handler answers [`Outcome::Early`]).
#[derive(Debug, Clone)]
pub struct Synchronous<H> {
    handler: H,
    table: Table,
}

impl<H: Handler> Synchronous<H> {
    /// `table` bears the name of the consumer group that reads the topic.
    pub fn new(handler: H, table: Table) -> Self {
        Self { handler, table }
    }

    /// Lets new events take effect, each if it can, and says of each what became of it. One that did not take effect has left
    /// nothing behind, and is as free to come by its record as if this had not been called.
    ///
    /// # Errors
    /// The transaction is of no use then.
    pub async fn take_effect(
        &self,
        transaction: &mut PgTransaction<'_>,
        envelopes: &[Envelope],
    ) -> Result<Vec<Outcome>, HandlerError> {
        let events: Vec<IncomingEvent> = envelopes.iter().map(without_record).collect();
        let held = self.table.lock_held(transaction, &events).await?;
        let key = |event: &IncomingEvent| {
            (
                event.envelope.aggregate_type.clone(),
                event.envelope.aggregate_id.clone(),
            )
        };
        let goes: Vec<bool> = events
            .iter()
            .map(|event| self.handler.takes(&event.envelope) && !held.contains_key(&key(event)))
            .collect();
        let going = events.iter().zip(&goes).filter(|(_, goes)| **goes);
        let going: Vec<IncomingEvent> = going.map(|(event, _)| event.clone()).collect();
        if going.is_empty() {
            return Ok(events.iter().map(|_| behind()).collect());
        }
        let answers = self.handler.apply(transaction, &going).await?;
        // After the effect, unlike in the engine: nobody else has these events yet, and their rows then stand in the order in
        // which they took effect.
        let done = going.iter().zip(&answers).filter(|(_, answer)| has_effect(answer));
        let done: Vec<IncomingEvent> = done.map(|(event, _)| event.clone()).collect();
        self.table.claim(transaction, &done).await?;
        let mut answers = answers.into_iter();
        let outcome = |goes: &bool| goes.then(|| answers.next()).flatten().unwrap_or_else(behind);
        Ok(goes.iter().map(outcome).collect())
    }
}

fn has_effect(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Applied | Outcome::Duplicate | Outcome::Skipped)
}

fn behind() -> Outcome {
    Outcome::Early(Reason {
        error_type: Cow::Borrowed("held"),
        message: "its key is held by an event before it".to_owned(),
    })
}

fn without_record(envelope: &Envelope) -> IncomingEvent {
    IncomingEvent {
        envelope: envelope.clone(),
        position: Position {
            topic: Arc::from(WITHOUT_RECORD),
            partition: -1,
            offset: -1,
        },
        traceparent: None,
    }
}
