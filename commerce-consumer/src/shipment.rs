//! What an event of a shipment does to commerce, pure: an effect or a typed refusal. No SQL, no clock.

use inbox::{Outcome, Reason};
use shared_events::{Envelope, shipment::ShipmentEvent};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::order::Order;

/// Where a shipment stands in the warehouse, as far as commerce has heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShipmentStatus {
    Open,
    OnHold,
    /// Shipped; a part of it may have come back.
    Completed,
    Cancelled,
    /// All of it came back.
    Returned,
}

impl ShipmentStatus {
    pub const ALL: [Self; 5] = [
        Self::Open,
        Self::OnHold,
        Self::Completed,
        Self::Cancelled,
        Self::Returned,
    ];

    /// The name in the REST interface and in the table.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::OnHold => "on_hold",
            Self::Completed => "completed",
            Self::Cancelled => "cancelled",
            Self::Returned => "returned",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.as_str() == name)
    }
}

/// A shipment as commerce knows it: the result of its events up to `sequence`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shipment {
    pub id: String,
    pub order_id: String,
    pub status: ShipmentStatus,
    /// The last event that took effect or was passed over.
    pub sequence: i64,
    pub warehouse: String,
    pub carrier: String,
    pub tracking_number: Option<String>,
    pub reason: Option<String>,
    /// Pieces in the parcel.
    pub units: i64,
    pub returned_units: i64,
    pub last_event_id: Uuid,
    pub last_event_type: String,
    pub last_event_at: OffsetDateTime,
}

/// All that one event changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Effect {
    pub shipment: Shipment,
    /// The order with the lines as they are afterwards; `None` if they stay as they are.
    pub order: Option<Order>,
    /// By sku, what is added to the product's stock.
    pub stock: Vec<(String, StockChange)>,
    pub entry: Option<Entry>,
}

/// Added to a product's pieces; negative values are taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StockChange {
    pub sellable: i64,
    pub committed: i64,
}

/// What the customer reads in the order's timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    Shipped,
    Delayed,
    Resumed,
    Cancelled,
    Returned,
}

impl Entry {
    /// The name in the REST interface and in the table.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Shipped => "shipped",
            Self::Delayed => "delayed",
            Self::Resumed => "resumed",
            Self::Cancelled => "cancelled",
            Self::Returned => "returned",
        }
    }
}

/// Why an event has no effect. [`Refusal::outcome`] says what becomes of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("sequence {sequence} has taken effect, the shipment is at {applied}")]
    AlreadyApplied { sequence: i64, applied: i64 },
    #[error("sequence {sequence} came while the shipment is at {applied}; those in between are missing")]
    SequenceGap { sequence: i64, applied: i64 },
    #[error("order {0} is not known")]
    UnknownOrder(String),
    #[error("order {order_id} has no line for {sku}")]
    UnknownLine { order_id: String, sku: String },
    #[error("the shipment belongs to order {recorded}, the event names {named}")]
    OtherOrder { recorded: String, named: String },
    #[error("a shipment that is {status} cannot take {event_type}")]
    WrongStatus { status: &'static str, event_type: String },
    #[error("{asked} of SKU {sku} cannot ship, {outstanding} are outstanding")]
    ShipsTooMany { sku: String, asked: i32, outstanding: i32 },
    #[error("{asked} of SKU {sku} cannot be cancelled, {outstanding} are outstanding")]
    CancelsTooMany { sku: String, asked: i32, outstanding: i32 },
    #[error("{asked} of SKU {sku} cannot come back, {out} are with the customer")]
    ReturnsTooMany { sku: String, asked: i32, out: i32 },
    #[error("{asked} pieces cannot come back from a parcel of which {out} are with the customer")]
    ReturnsMoreThanParcel { asked: i64, out: i64 },
}

impl Refusal {
    /// What is missing may still come; what contradicts the records never fits.
    pub fn outcome(&self) -> Outcome {
        let error_type = match self {
            Self::AlreadyApplied { .. } => return Outcome::Duplicate,
            Self::SequenceGap { .. } => "sequence_gap",
            Self::UnknownOrder(_) => "unknown_order",
            Self::UnknownLine { .. } => "unknown_line",
            Self::OtherOrder { .. } => "other_order",
            Self::WrongStatus { .. } => "wrong_status",
            Self::ShipsTooMany { .. } => "ships_too_many",
            Self::CancelsTooMany { .. } => "cancels_too_many",
            Self::ReturnsTooMany { .. } | Self::ReturnsMoreThanParcel { .. } => "returns_too_many",
        };
        let reason = Reason::new(error_type, self.to_string());
        match self {
            Self::SequenceGap { .. } => Outcome::Early(reason),
            Self::UnknownOrder(_) | Self::UnknownLine { .. } => Outcome::Retry(reason),
            _ => Outcome::DeadLetter(reason),
        }
    }
}

/// What an event does, given what commerce knows of its shipment and order.
///
/// # Errors
/// A [`Refusal`]; nothing changes then.
pub fn decide(
    shipment: Option<&Shipment>,
    order: Option<&Order>,
    envelope: &Envelope,
    event: &ShipmentEvent,
) -> Result<Effect, Refusal> {
    let sequence = next_in_sequence(shipment, envelope)?;
    if let Some(shipment) = shipment
        && shipment.order_id != event.order_id()
    {
        let (recorded, named) = (shipment.order_id.clone(), event.order_id().to_owned());
        return Err(Refusal::OtherOrder { recorded, named });
    }
    let order = order.ok_or_else(|| Refusal::UnknownOrder(event.order_id().to_owned()))?;
    let units = event.lines().iter().map(|line| i64::from(line.quantity)).sum();

    let Some(before) = shipment else {
        return create(envelope, event, units);
    };
    let mut effect = Effect {
        shipment: at(before, envelope, sequence),
        order: None,
        stock: Vec::new(),
        entry: None,
    };
    let after = &mut effect.shipment;
    match (before.status, event) {
        (ShipmentStatus::Open, ShipmentEvent::Completed(completed)) => {
            after.status = ShipmentStatus::Completed;
            after.carrier = completed.carrier.clone();
            after.tracking_number = Some(completed.tracking_number.clone());
            after.units = units;
            effect.entry = Some(Entry::Shipped);
        }
        (ShipmentStatus::Open, ShipmentEvent::Held(held)) => {
            after.status = ShipmentStatus::OnHold;
            after.reason = Some(held.reason.clone());
            effect.entry = Some(Entry::Delayed);
        }
        (ShipmentStatus::OnHold, ShipmentEvent::Released(_)) => {
            after.status = ShipmentStatus::Open;
            after.reason = None;
            effect.entry = Some(Entry::Resumed);
        }
        (ShipmentStatus::Open | ShipmentStatus::OnHold, ShipmentEvent::Cancelled(cancelled)) => {
            after.status = ShipmentStatus::Cancelled;
            after.reason = Some(cancelled.reason.clone());
            effect.entry = Some(Entry::Cancelled);
        }
        (ShipmentStatus::Completed, ShipmentEvent::Returned(returned)) => {
            let out = before.units - before.returned_units;
            if units > out {
                return Err(Refusal::ReturnsMoreThanParcel { asked: units, out });
            }
            after.returned_units += units;
            if after.returned_units == after.units {
                after.status = ShipmentStatus::Returned;
            }
            after.reason = Some(returned.reason.clone());
            effect.entry = Some(Entry::Returned);
        }
        (status, _) => {
            return Err(Refusal::WrongStatus {
                status: status.as_str(),
                event_type: envelope.event_type.clone(),
            });
        }
    }
    move_pieces(&mut effect, order, event)?;
    Ok(effect)
}

/// The shipment after an event of a type that commerce does not know: its place in the sequence is taken, so that the
/// events behind it can follow. `None` if that event is the shipment's first: there is nothing yet to note it on, and
/// what this shipment is stays unknown, so the events behind it are gaps until someone decides.
///
/// # Errors
/// A [`Refusal`] by sequence.
pub fn pass_over(shipment: Option<&Shipment>, envelope: &Envelope) -> Result<Option<Shipment>, Refusal> {
    let sequence = next_in_sequence(shipment, envelope)?;
    Ok(shipment.map(|before| at(before, envelope, sequence)))
}

fn next_in_sequence(shipment: Option<&Shipment>, envelope: &Envelope) -> Result<i64, Refusal> {
    let (sequence, applied) = (envelope.sequence, shipment.map_or(0, |shipment| shipment.sequence));
    if sequence <= applied {
        return Err(Refusal::AlreadyApplied { sequence, applied });
    }
    if sequence > applied + 1 {
        return Err(Refusal::SequenceGap { sequence, applied });
    }
    Ok(sequence)
}

/// The same shipment with this as its last event.
fn at(before: &Shipment, envelope: &Envelope, sequence: i64) -> Shipment {
    Shipment {
        sequence,
        last_event_id: envelope.id,
        last_event_type: envelope.event_type.clone(),
        last_event_at: envelope.timestamp,
        ..before.clone()
    }
}

/// The first event only makes the shipment known.
fn create(envelope: &Envelope, event: &ShipmentEvent, units: i64) -> Result<Effect, Refusal> {
    let ShipmentEvent::Created(created) = event else {
        return Err(Refusal::WrongStatus {
            status: "unknown",
            event_type: envelope.event_type.clone(),
        });
    };
    let shipment = Shipment {
        id: envelope.aggregate_id.clone(),
        order_id: created.order_id.clone(),
        status: ShipmentStatus::Open,
        sequence: envelope.sequence,
        warehouse: created.warehouse.clone(),
        carrier: created.carrier.clone(),
        tracking_number: None,
        reason: None,
        units,
        returned_units: 0,
        last_event_id: envelope.id,
        last_event_type: envelope.event_type.clone(),
        last_event_at: envelope.timestamp,
    };
    Ok(Effect {
        shipment,
        order: None,
        stock: Vec::new(),
        entry: None,
    })
}

/// Moves the event's pieces through the order's lines and the products' stock. Both are moved here together, so that
/// `committed` stays the sum of what is outstanding.
fn move_pieces(effect: &mut Effect, order: &Order, event: &ShipmentEvent) -> Result<(), Refusal> {
    if !matches!(
        event,
        ShipmentEvent::Completed(_) | ShipmentEvent::Cancelled(_) | ShipmentEvent::Returned(_)
    ) {
        return Ok(());
    }
    let mut after = order.clone();
    for shared_events::shipment::Line { sku, quantity } in event.lines() {
        let (sku, asked) = (sku.clone(), *quantity);
        let Some(line) = after.lines.get_mut(&sku) else {
            return Err(Refusal::UnknownLine {
                order_id: event.order_id().to_owned(),
                sku,
            });
        };
        let (outstanding, out, pieces) = (line.outstanding(), line.kept(), i64::from(asked));
        let change = match event {
            ShipmentEvent::Completed(_) if asked > outstanding => {
                return Err(Refusal::ShipsTooMany {
                    sku,
                    asked,
                    outstanding,
                });
            }
            ShipmentEvent::Completed(_) => {
                line.shipped += asked;
                StockChange {
                    sellable: 0,
                    committed: -pieces,
                }
            }
            ShipmentEvent::Cancelled(_) if asked > outstanding => {
                return Err(Refusal::CancelsTooMany {
                    sku,
                    asked,
                    outstanding,
                });
            }
            ShipmentEvent::Cancelled(_) => {
                line.cancelled += asked;
                StockChange {
                    sellable: pieces,
                    committed: -pieces,
                }
            }
            _ if asked > out => return Err(Refusal::ReturnsTooMany { sku, asked, out }),
            _ => {
                line.returned += asked;
                StockChange {
                    sellable: pieces,
                    committed: 0,
                }
            }
        };
        effect.stock.push((sku, change));
    }
    effect.order = Some(after);
    Ok(())
}

#[cfg(test)]
mod tests;
