use outbox::NewEvent;
use shared_events::{
    Envelope,
    envelope::Fact,
    shipment::{AGGREGATE_TYPE, ShipmentEvent},
};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::shipment::Changed;

/// What all events of one transaction share.
#[derive(Debug, Clone)]
pub struct Occasion {
    pub transaction_key: Uuid,
    /// When the changes were decided.
    pub now: OffsetDateTime,
    /// The request's trace.
    pub traceparent: Option<String>,
}

/// The outbox row of a change. Its id is new, rises within the process, and names the day's partition.
///
/// # Errors
/// Only if the payload cannot be written as JSON: a defect.
pub fn new_event(changed: &Changed, occasion: &Occasion) -> Result<NewEvent, serde_json::Error> {
    let id = Uuid::now_v7();
    let fact = Fact {
        aggregate_type: AGGREGATE_TYPE,
        aggregate_id: changed.shipment.id.to_string(),
        sequence: changed.shipment.sequence,
        transaction_key: occasion.transaction_key,
        timestamp: occasion.now,
    };
    let envelope = match &changed.event {
        ShipmentEvent::Created(payload) => Envelope::new(id, fact, payload),
        ShipmentEvent::Completed(payload) => Envelope::new(id, fact, payload),
        ShipmentEvent::Held(payload) => Envelope::new(id, fact, payload),
        ShipmentEvent::Released(payload) => Envelope::new(id, fact, payload),
        ShipmentEvent::Cancelled(payload) => Envelope::new(id, fact, payload),
        ShipmentEvent::Returned(payload) => Envelope::new(id, fact, payload),
    }?;
    Ok(NewEvent {
        envelope,
        traceparent: occasion.traceparent.clone(),
    })
}
